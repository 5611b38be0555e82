//! The fields of an answer that every kind of job has.

use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::jobs::Job;
use promptweave_domain::digest::Digest;
use promptweave_domain::job::{JobError, JobState};
use promptweave_domain::phase::Phase;
use promptweave_domain::specification::Specification;

#[derive(Debug, Serialize, ToSchema)]
pub struct JobStatus {
    id: Uuid,
    state: JobState,
    /// The phase in progress, or the one in which the job stopped.
    phase: Option<Phase>,
    progress: Option<JobProgress>,
    /// Attempts begun, of `max_attempts`.
    attempt: i32,
    max_attempts: i32,
    /// Whether a client asked the job to stop.
    cancel_requested: bool,
    priority: i32,
    /// Digest of the specification. Jobs with equal digests have equal answers.
    #[schema(value_type = String, example = "sha256:…")]
    spec_digest: Digest,
    /// The error of a failed job, or of the last attempt if the job waits for another attempt.
    error: Option<JobError>,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    started_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    finished_at: Option<OffsetDateTime>,
}

impl<S: Specification> From<&Job<S>> for JobStatus {
    fn from(job: &Job<S>) -> Self {
        Self {
            id: job.id,
            state: job.state,
            phase: job.progress.map(|progress| progress.phase),
            progress: JobProgress::of(job),
            attempt: job.attempt,
            max_attempts: job.max_attempts,
            cancel_requested: job.cancel_requested,
            priority: job.priority,
            spec_digest: job.spec_digest,
            error: job.error.clone(),
            created_at: job.created_at,
            started_at: job.started_at,
            finished_at: job.finished_at,
        }
    }
}

/// The progress of a phase.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct JobProgress {
    phase: Phase,
    /// Units of work done. In `features`, `gradients`, `verify`, `select` and `tune`, one unit is one image with one
    /// prompt.
    done: u64,
    total: u64,
    /// Units of work per second since the phase began.
    per_second: Option<f64>,
    /// Estimated seconds until this phase is done.
    eta_seconds: Option<f64>,
}

impl JobProgress {
    pub fn of<S: Specification>(job: &Job<S>) -> Option<Self> {
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
            eta_seconds: per_second
                .map(|per_second| progress.total.saturating_sub(progress.done) as f64 / per_second),
        })
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct JobUrls {
    #[serde(rename = "self")]
    this: String,
    events: String,
    cancel: String,
    /// Where to retry a failed or cancelled job.
    retry: String,
    result: String,
}

impl JobUrls {
    pub fn of<S: Specification>(id: Uuid) -> Self {
        let this = path::<S>(id);
        Self {
            events: format!("{this}/events"),
            cancel: format!("{this}/cancel"),
            retry: format!("{this}/retry"),
            result: format!("{this}/result"),
            this,
        }
    }
}

pub fn path<S: Specification>(id: Uuid) -> String {
    format!("/v1/{}s/{id}", S::KIND)
}
