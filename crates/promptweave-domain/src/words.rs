//! Words that clients branch on, each written once: the code names a variant, the database and the API have its word, and the
//! API's document lists them all.

/// Makes an enum of words, with what needs them as text.
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
    /// What can happen to a job.
    EventKind {
        Queued = "queued",
        /// A worker began an attempt.
        Started = "started",
        /// The attempt came to another phase.
        Phase = "phase",
        /// A shard of the work is done.
        Shard = "shard",
        /// A helper lost a shard, or failed at it.
        ShardLost = "shard_lost",
        /// What α is by the shards so far.
        Estimate = "estimate",
        /// An epoch of a tuning is over.
        Epoch = "epoch",
        /// An attempt failed, and another one may not.
        Retried = "retried",
        /// The worker was not heard of within its lease.
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
    /// What can happen to an alias.
    AliasEventKind {
        Created = "created",
        Moved = "moved",
        Protected = "protected",
        Unprotected = "unprotected",
        Deleted = "deleted",
    }
}

words! {
    /// What a worker does.
    WorkerState {
        Idle = "idle",
        Busy = "busy",
        /// It claims nothing more, and ends with the job it has.
        Draining = "draining",
        Stopped = "stopped",
        /// Several starts in a row have failed.
        Defunct = "defunct",
    }
}

words! {
    /// How far a webhook's message is.
    DeliveryState {
        Pending = "pending",
        Delivered = "delivered",
        /// The last try failed too.
        Failed = "failed",
    }
}

words! {
    /// What the numbers of a stored prompt are.
    PromptDtype {
        F32 = "f32",
        F16 = "f16",
        Bf16 = "bf16",
    }
}

words! {
    /// What a careful reader of a result would want to be told.
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
    }
}

words! {
    /// Why an attempt at a job failed, or the job.
    JobErrorCode {
        AttemptsExhausted = "attempts_exhausted",
        BackboneUnusable = "backbone_unusable",
        BlobStoreFailed = "blob_store_failed",
        CacheUnreadable = "cache_unreadable",
        CacheUnusable = "cache_unusable",
        CheckpointUnavailable = "checkpoint_unavailable",
        DatasetUnusable = "dataset_unusable",
        DeviceFailed = "device_failed",
        EmptySplit = "empty_split",
        EngineGone = "engine_gone",
        EnginePanicked = "engine_panicked",
        IncompatibleSource = "incompatible_source",
        InputUnavailable = "input_unavailable",
        InvalidObjective = "invalid_objective",
        Libtorch = "libtorch",
        MakesNoPrompt = "makes_no_prompt",
        NoSources = "no_sources",
        NoThread = "no_thread",
        NotFinite = "not_finite",
        NotStored = "not_stored",
        OneBlock = "one_block",
        OneClass = "one_class",
        PixelFile = "pixel_file",
        SameSource = "same_source",
        SharingFailed = "sharing_failed",
        Stalled = "stalled",
        StatisticsUnusable = "statistics_unusable",
        Stopped = "stopped",
        TooFewImages = "too_few_images",
        UnknownSource = "unknown_source",
        UnreadableImage = "unreadable_image",
        UnusableResult = "unusable_result",
        WorkerLost = "worker_lost",
    }
}
