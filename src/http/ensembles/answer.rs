//! An ensemble as clients see it.

use serde::Serialize;
use sqlx::PgConnection;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::ensembles::replay::hold_statistics;
use crate::http::error::Problem;
use crate::http::jobs::{JobStatus, JobUrls, Resource, path};
use crate::jobs::Job;
use promptweave_domain::job::EnsembleSpec;

#[derive(Debug, Serialize, ToSchema)]
pub struct Ensemble {
    #[serde(flatten)]
    job: JobStatus,
    /// The specification, with every reference resolved when it was posted.
    spec: EnsembleSpec,
    /// The comparison with the original; only on an ensemble made by `replay`.
    replay: Option<Replay>,
    urls: Urls,
}

impl Resource for EnsembleSpec {
    type Response = Ensemble;

    const REPEAT: &'static str = "replay it";

    async fn hold(
        &self,
        conn: &mut PgConnection,
        state: &AppState,
        project_id: Uuid,
    ) -> Result<(), Problem> {
        hold_statistics(conn, state, project_id, self).await
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct Replay {
    /// The ensemble that this one repeats.
    original_id: Uuid,
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
            original_id: job.replay_of?,
            max_weight_difference: differences(),
        })
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct Urls {
    #[serde(flatten)]
    job: JobUrls,
    /// Where to compute it again, to compare the answers.
    replay: String,
    statistics: String,
    /// The composed prompt's file, once there is one.
    composed_prompt: Option<String>,
    /// The pool's ensemble file, once there is one; always null with another method than `pool`.
    ensemble: Option<String>,
    /// Where to solve again from its statistics, once there are some.
    solve: Option<String>,
}

impl From<Job> for Ensemble {
    fn from(job: Job) -> Self {
        let this = path::<EnsembleSpec>(job.id);
        let result = job.result.as_ref();
        let composed_prompt = result.and_then(|result| {
            let composed = &result.composed_prompt;
            Some(content(composed.prompt.as_ref()?, composed.version?))
        });
        let ensemble = result.and_then(|result| {
            let ensemble = result.pool.as_ref()?.ensemble.as_ref()?;
            Some(content(ensemble.prompt.as_ref()?, ensemble.version?))
        });
        Self {
            job: JobStatus::from(&job),
            replay: Replay::of(&job),
            spec: job.spec,
            urls: Urls {
                job: JobUrls::of::<EnsembleSpec>(job.id),
                replay: format!("{this}/replay"),
                statistics: format!("{this}/statistics"),
                solve: (job.file_digest.is_some() && job.file_deleted_at.is_none())
                    .then(|| format!("{this}/solve")),
                composed_prompt,
                ensemble,
            },
        }
    }
}

/// The URL of a version's file.
fn content(prompt: &str, version: i32) -> String {
    format!("/v1/prompts/{prompt}/versions/{version}/content")
}
