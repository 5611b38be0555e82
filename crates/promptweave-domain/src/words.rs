//! Words that clients branch on, each written once. The code names a variant, the database and the
//! API use its word, and the API's document lists all words.

/// Makes an enum of words, with its conversions to text.
macro_rules! words {
    ($(#[$about:meta])* $name:ident { $($(#[$meta:meta])* $variant:ident = $word:tt,)+ }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
        pub enum $name {
            $($(#[$meta])* #[serde(rename = $word)] $variant,)+
        }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                }
            }
        }

        #[cfg(any(test, feature = "testing"))]
        impl PartialEq<&str> for $name {
            fn eq(&self, word: &&str) -> bool {
                self.name() == *word
            }
        }
    };
}

words! {
    /// An event in a job's history.
    EventKind {
        Queued = "queued",
        /// A worker began an attempt.
        Started = "started",
        /// The attempt entered another phase.
        Phase = "phase",
        /// A shard of the work was finished.
        Shard = "shard",
        /// A helper lost a shard, or failed at it.
        ShardLost = "shard_lost",
        /// An estimate of α from the shards so far.
        Estimate = "estimate",
        /// An epoch of a tuning was finished.
        Epoch = "epoch",
        /// An attempt failed with a transient error, so that the job is tried again.
        Retried = "retried",
        /// The worker's lease ran out without a sign of life.
        Lost = "lost",
        /// The worker was stopped, and gave the job back.
        Released = "released",
        RetryRequested = "retry_requested",
        CancelRequested = "cancel_requested",
        Cancelled = "cancelled",
        Failed = "failed",
        Succeeded = "succeeded",
    }
}

words! {
    /// An event in an alias's history.
    AliasEventKind {
        Created = "created",
        Moved = "moved",
        Protected = "protected",
        Unprotected = "unprotected",
        Deleted = "deleted",
    }
}

words! {
    /// The state of a worker.
    WorkerState {
        Idle = "idle",
        Busy = "busy",
        /// The worker claims nothing more, and finishes the job it has.
        Draining = "draining",
        Stopped = "stopped",
        /// The worker's last starts all failed.
        Defunct = "defunct",
    }
}

words! {
    /// The state of a webhook's message.
    DeliveryState {
        Pending = "pending",
        Delivered = "delivered",
        /// The last try failed.
        Failed = "failed",
    }
}

words! {
    /// The dtype of a stored prompt's numbers.
    PromptDtype {
        F32 = "f32",
        F16 = "f16",
        Bf16 = "bf16",
    }
}

words! {
    /// A warning about a result.
    WarningCode {
        NearTies = "near_ties",
        SurrogateGap = "surrogate_gap",
        FewSamples = "few_samples",
        SingletonClass = "singleton_class",
        SkippedImages = "skipped_images",
        NoStandardErrors = "no_standard_errors",
        SaturatedHead = "saturated_head",
        FellBack = "fell_back",
        NoFallback = "no_fallback",
        WeightAtBound = "weight_at_bound",
        InitSeedsDiffer = "init_seeds_differ",
        NothingHelps = "nothing_helps",
        EnsembleNotPublished = "ensemble_not_published",
    }
}

words! {
    /// Why a job, or one attempt at it, failed.
    JobErrorCode {
        AttemptsExhausted = "attempts_exhausted",
        BackboneMismatch = "backbone_mismatch",
        BackboneUnusable = "backbone_unusable",
        BlobStoreFailed = "blob_store_failed",
        CacheUnreadable = "cache_unreadable",
        CacheUnusable = "cache_unusable",
        CheckpointUnavailable = "checkpoint_unavailable",
        DatasetUnusable = "dataset_unusable",
        DeepPromptNotComposable = "deep_prompt_not_composable",
        DeepPromptNotPredictable = "deep_prompt_not_predictable",
        DeepStart = "deep_start",
        DeviceFailed = "device_failed",
        EmptySplit = "empty_split",
        EngineGone = "engine_gone",
        EnginePanicked = "engine_panicked",
        InputUnavailable = "input_unavailable",
        InvalidObjective = "invalid_objective",
        LengthMismatch = "length_mismatch",
        Libtorch = "libtorch",
        MakesNoPrompt = "makes_no_prompt",
        NoHead = "no_head",
        NoSources = "no_sources",
        NoThread = "no_thread",
        NotFinite = "not_finite",
        NotStored = "not_stored",
        OneBlock = "one_block",
        OneClass = "one_class",
        PixelFile = "pixel_file",
        PreprocessingMismatch = "preprocessing_mismatch",
        SameSource = "same_source",
        SharingFailed = "sharing_failed",
        Stalled = "stalled",
        StatisticsUnusable = "statistics_unusable",
        Stopped = "stopped",
        TooFewImages = "too_few_images",
        UnknownSource = "unknown_source",
        UnreadableImage = "unreadable_image",
        UnusableResult = "unusable_result",
        WidthMismatch = "width_mismatch",
        WorkerLost = "worker_lost",
    }
}
