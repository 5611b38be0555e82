//! An ensemble as clients see it.

use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::domain::composition::Phase;
use crate::domain::digest::Digest;
use crate::domain::job::{EnsembleSpec, JobError, JobState};
use crate::jobs::Job;

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Ensemble {
    pub id: Uuid,
    state: JobState,
    /// The phase in work, or the one it stopped in.
    phase: Option<Phase>,
    progress: Option<EnsembleProgress>,
    /// Attempts begun, of `max_attempts`.
    attempt: i32,
    max_attempts: i32,
    /// Somebody asked it to stop.
    cancel_requested: bool,
    priority: i32,
    /// What is computed, with every reference resolved when it was posted.
    spec: EnsembleSpec,
    /// Equal digests mean equal answers.
    #[schema(value_type = String, example = "sha256:…")]
    spec_digest: Digest,
    /// Of one that repeats another.
    replay: Option<Replay>,
    /// Of a failed job, or of the last attempt of one that waits for another.
    error: Option<JobError>,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    started_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    finished_at: Option<OffsetDateTime>,
    urls: Urls,
}

/// How far the phase is.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(super) struct EnsembleProgress {
    pub phase: Phase,
    /// In `features`, `gradients` and `verify` an image with one prompt counts one.
    done: u64,
    total: u64,
    /// Of `done` since the phase began.
    per_second: Option<f64>,
    /// Until this phase is done, at that speed.
    seconds_left: Option<f64>,
}

impl EnsembleProgress {
    pub fn of(job: &Job) -> Option<Self> {
        let progress = job.progress?;
        let per_second = job
            .phase_seconds
            .filter(|seconds| *seconds > 0.0 && progress.done > 0)
            .map(|seconds| progress.done as f64 / seconds);
        Some(Self {
            phase: progress.phase,
            done: progress.done,
            total: progress.total,
            per_second,
            seconds_left: per_second
                .map(|per_second| progress.total.saturating_sub(progress.done) as f64 / per_second),
        })
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct Replay {
    /// The ensemble that it repeats.
    of: Uuid,
    /// max |Δα| over the sources, once both have weights.
    max_weight_difference: Option<f64>,
}

impl Replay {
    fn of(job: &Job) -> Option<Self> {
        let differences = || {
            let again = &job.result.as_ref()?.source_weights;
            let pairs = job.original_weights.as_ref()?.iter().zip(again);
            let differences = pairs.map(|(a, b)| (a.weight - b.weight).abs());
            Some(differences.fold(0.0, f64::max))
        };
        Some(Self {
            of: job.replay_of?,
            max_weight_difference: differences(),
        })
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct Urls {
    #[serde(rename = "self")]
    this: String,
    events: String,
    cancel: String,
    /// Another try of one that failed or was cancelled.
    retry: String,
    /// The same once more, to compare the answers.
    replay: String,
    result: String,
    statistics: String,
    /// The composed prompt's file, once there is one.
    composed: Option<String>,
    /// Where to solve again from its statistics, once there are some.
    resolve: Option<String>,
}

impl From<Job> for Ensemble {
    fn from(job: Job) -> Self {
        let this = path(job.id);
        let composed = job.result.as_ref().and_then(|result| {
            let (prompt, version) = (result.composed.prompt.as_ref()?, result.composed.version?);
            Some(format!("/v1/prompts/{prompt}/versions/{version}/content"))
        });
        Self {
            id: job.id,
            state: job.state,
            phase: job.progress.map(|progress| progress.phase),
            progress: EnsembleProgress::of(&job),
            replay: Replay::of(&job),
            attempt: job.attempt,
            max_attempts: job.max_attempts,
            cancel_requested: job.cancel_requested,
            priority: job.priority,
            spec: job.spec,
            spec_digest: job.spec_digest,
            error: job.error,
            created_at: job.created_at,
            started_at: job.started_at,
            finished_at: job.finished_at,
            urls: Urls {
                events: format!("{this}/events"),
                cancel: format!("{this}/cancel"),
                retry: format!("{this}/retry"),
                replay: format!("{this}/replay"),
                result: format!("{this}/result"),
                statistics: format!("{this}/statistics"),
                resolve: (job.statistics_digest.is_some() && job.statistics_deleted_at.is_none())
                    .then(|| format!("{this}/resolve")),
                composed,
                this,
            },
        }
    }
}

pub(super) fn path(id: Uuid) -> String {
    format!("/v1/ensembles/{id}")
}
