//! A job: its states, their legal moves, and the specification of an ensemble. A specification is
//! fully resolved, so that nothing published later changes what was requested.
//!
//! ```text
//!            claim                     finish
//!  queued ─────────► running ─┬──────────────► succeeded
//!    ▲ │               │      ├─ refused, ─────► failed ──┐
//!    │ │ cancel        │      │  attempts exhausted       │
//!    │ └──────────┐    │      │                           │
//!    │            ▼    │      │ cancel requested          │
//!    │        cancelled◄──────┘ and noticed               │
//!    │            │    │                                  │
//!    ├────────────┼────┘ lease lost, graceful stop,       │
//!    │            │      a transient error                │
//!    └────────────┴───────────────────────────────────────┘
//!                        a client asks for another try
//! ```

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::backbone::BackboneConfig;
use crate::composition::TargetSamples;
use crate::digest::Digest;
use crate::early_stopping::EarlyStopping;
use crate::method::Method;
use crate::objective::Objective;
use crate::phase::Phase;
use crate::words::JobErrorCode;

/// Number of attempts after which a failing job ends as `attempts_exhausted`.
pub const MAX_ATTEMPTS: i32 = 5;
/// Priority of a job that names none. Jobs with a smaller number are claimed first.
pub const DEFAULT_PRIORITY: i32 = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobState {
    pub const ALL: [Self; 5] = [
        Self::Queued,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }

    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// Whether a job may go from this state to the next. This is the one list of legal moves: the
    /// statements of `jobs::queue` make these and no others.
    pub fn may_become(self, next: Self) -> bool {
        use JobState::{Cancelled, Failed, Queued, Running, Succeeded};
        matches!(
            (self, next),
            (Queued, Running | Cancelled)
                | (Running, Queued | Succeeded | Failed | Cancelled)
                // A client may ask for another try.
                | (Failed | Cancelled, Queued)
        )
    }
}

/// How one attempt at a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AttemptOutcome {
    Succeeded,
    /// A permanent error: another try would not help.
    Failed,
    /// An error after which the job waits for another attempt.
    Retried,
    Cancelled,
    /// The lease ran out without a word from the worker.
    Lost,
    /// The worker was stopped and gave the job back; the attempt does not count.
    Released,
}

impl AttemptOutcome {
    pub fn name(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Retried => "retried",
            Self::Cancelled => "cancelled",
            Self::Lost => "lost",
            Self::Released => "released",
        }
    }
}

/// How far the current phase has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    pub phase: Phase,
    /// Units of work that are finished, out of `total`.
    pub done: u64,
    pub total: u64,
}

/// Why a job, or one attempt at it, failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobError {
    #[schema(value_type = JobErrorCode)]
    pub code: String,
    pub detail: String,
}

impl JobError {
    pub fn new(code: JobErrorCode, detail: impl Into<String>) -> Self {
        Self {
            code: code.name().to_owned(),
            detail: detail.into(),
        }
    }
}

/// What an ensemble job computes. Names are for people; the digests decide the result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EnsembleSpec {
    pub target: TargetSpec,
    /// The source prompts in the order of the request.
    pub sources: Vec<SourceSpec>,
    pub backbone: BackboneSpec,
    pub objective: Objective,
    /// Name of the prompt under which the result is published. The method `pool` publishes its ensemble too, under
    /// `<output>-ensemble`.
    pub output: String,
    /// When to stop before all gradients are taken; absent if all are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<EarlyStopping>,
    /// Present if α is solved for again from an earlier ensemble's statistics, without backbone and
    /// images. Then `sources` are some of that ensemble's sources.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solved_from: Option<SolvedFrom>,
}

/// The end of the name that a pool's ensemble is published under.
pub const ENSEMBLE_SUFFIX: &str = "-ensemble";

impl EnsembleSpec {
    /// The name that the pool's ensemble is published under: `<output>-ensemble`. `None` if the method is another.
    pub fn ensemble_output(&self) -> Option<String> {
        (self.objective.method() == Method::Pool)
            .then(|| format!("{}{ENSEMBLE_SUFFIX}", self.output))
    }
}

/// The ensemble whose statistics replace backbone and images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SolvedFrom {
    pub ensemble: Uuid,
    /// Digest of that ensemble's `statistics.safetensors` in the blob store.
    #[schema(value_type = String, example = "sha256:…")]
    pub statistics: Digest,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TargetSpec {
    pub dataset: String,
    pub version: i32,
    /// Digest of the packed images in the blob store.
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    #[serde(flatten)]
    pub samples: TargetSamples,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SourceSpec {
    /// The prompt version's id.
    pub id: Uuid,
    pub prompt: String,
    pub version: i32,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BackboneSpec {
    pub name: String,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    pub preprocessing_id: String,
    /// Digest of `model.safetensors` in the blob store.
    #[schema(value_type = String, example = "sha256:…")]
    pub model_digest: Digest,
    pub config: BackboneConfig,
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;
    use crate::backbone::{Filter, Preprocessing};
    use crate::specification::Specification as _;
    use crate::split::Split;

    pub(crate) fn spec() -> EnsembleSpec {
        let preprocessing = Preprocessing {
            size: 98,
            filter: Filter::Bicubic,
            antialias: true,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
        };
        let source = |name: &str| SourceSpec {
            id: Uuid::nil(),
            prompt: name.to_owned(),
            version: 1,
            digest: Digest::of(name.as_bytes()),
        };
        EnsembleSpec {
            target: TargetSpec {
                dataset: "emoji".into(),
                version: 1,
                digest: Digest::of(b"emoji"),
                samples: TargetSamples {
                    split: Split::Train,
                    eval_split: Some(Split::Test),
                    max_samples: 2000,
                    seed: 0,
                    skip_unreadable: false,
                },
            },
            sources: vec![source("digits"), source("flowers")],
            backbone: BackboneSpec {
                name: "tiny".into(),
                digest: Digest::of(b"backbone"),
                preprocessing_id: preprocessing.id(),
                model_digest: Digest::of(b"model"),
                config: BackboneConfig {
                    architecture: "vit_tiny".into(),
                    embed_dim: 8,
                    depth: 1,
                    num_heads: 1,
                    patch_size: 14,
                    pos_grid: 7,
                    norm_eps: 1e-6,
                    preprocessing,
                },
            },
            objective: Objective::default(),
            output: "emoji-1".into(),
            early_stopping: None,
            solved_from: None,
        }
    }

    #[test]
    fn every_state_but_success_can_be_left_and_a_terminal_one_for_the_queue_alone() {
        for state in JobState::ALL {
            let nexts: Vec<_> = JobState::ALL
                .into_iter()
                .filter(|next| state.may_become(*next))
                .collect();
            match state {
                JobState::Succeeded => assert_eq!(nexts, []),
                state if state.is_terminal() => assert_eq!(nexts, [JobState::Queued]),
                _ => assert!(nexts.len() > 1, "{state:?}"),
            }
            assert!(!state.may_become(state));
            assert_eq!(JobState::from_name(state.name()), Some(state));
        }
        assert!(!JobState::Queued.may_become(JobState::Succeeded));
    }

    #[test]
    fn the_digest_is_of_what_is_computed_and_not_of_what_it_is_called() {
        let spec = spec();
        let read: EnsembleSpec =
            serde_json::from_value(serde_json::to_value(&spec).unwrap()).unwrap();
        assert_eq!(read, spec);
        let mut renamed = spec.clone();
        renamed.output = "other".into();
        renamed.sources[0].prompt = "numbers".into();
        assert_eq!(renamed.digest(), spec.digest());
        let mut changed = spec.clone();
        changed.target.samples.seed = 1;
        assert_ne!(changed.digest(), spec.digest());
        let mut impatient = spec.clone();
        impatient.early_stopping = Some(EarlyStopping {
            max_standard_error: 0.01,
        });
        assert_ne!(impatient.digest(), spec.digest());
        let mut swapped = spec.clone();
        swapped.sources.reverse();
        assert_ne!(swapped.digest(), spec.digest());
    }

    #[test]
    fn solving_again_is_told_apart_by_the_statistics_and_the_sources() {
        let whole = spec();
        assert!(!json!(whole).to_string().contains("solved_from"));
        let from = |ensemble, statistics: &[u8]| EnsembleSpec {
            solved_from: Some(SolvedFrom {
                ensemble: Uuid::from_u128(ensemble),
                statistics: Digest::of(statistics),
            }),
            ..spec()
        };
        let resolved = from(1, b"statistics");
        let read: EnsembleSpec = serde_json::from_value(json!(resolved)).unwrap();
        assert_eq!(read, resolved);
        assert_ne!(resolved.digest(), whole.digest());
        assert_ne!(resolved.digest(), from(1, b"others").digest());
        assert_eq!(resolved.digest(), from(2, b"statistics").digest());
        let mut subset = resolved.clone();
        subset.sources.pop();
        assert_ne!(subset.digest(), resolved.digest());
    }
}
