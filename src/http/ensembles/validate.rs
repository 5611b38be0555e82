//! `/v1/ensembles/validate`: what a request would compute and cost, without running it.

use axum::Json as JsonResponse;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::ensembles::CreateEnsemble;
use crate::http::error::Problem;
use crate::http::extract::Draft;
use crate::http::jobs::check_priority;
use crate::jobs::cost::{Cost, estimate};
use crate::jobs::plan::plan;
use crate::jobs::requests::{NewJob, same};
use promptweave_domain::digest::Digest;
use promptweave_domain::job::EnsembleSpec;
use promptweave_domain::specification::Specification as _;

/// What a request would compute.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EnsemblePlan {
    /// The specification with every reference resolved. If the request names no output, the output's name differs each
    /// time.
    spec: EnsembleSpec,
    #[schema(value_type = String, example = "sha256:…")]
    spec_digest: Digest,
    /// An ensemble with the same specification that waits, runs or has succeeded; a POST is answered with it unless
    /// forced.
    same_as: Option<Uuid>,
    cost: Cost,
}

/// Check a request for an ensemble, and estimate its cost, without queueing it
#[utoipa::path(
    post,
    path = "/ensembles/validate",
    tag = "ensembles",
    security(("api_key" = ["run"])),
    request_body = CreateEnsemble,
    responses(
        (status = 200, body = EnsemblePlan),
        (status = 422, description = "As `POST /v1/ensembles`"),
    )
)]
pub(super) async fn validate_ensemble(
    State(state): State<AppState>,
    caller: Caller,
    Draft { body, mut mistakes }: Draft<CreateEnsemble>,
) -> Result<JsonResponse<EnsemblePlan>, Problem> {
    let priority = body.priority;
    mistakes.note(check_priority(priority))?;
    let request = body.request();
    let id = state.clock.new_id();
    let mut conn = state.pool.acquire().await?;
    let spec = mistakes.finish(plan(&mut conn, caller.project_id, id, &request).await)?;
    let new = NewJob {
        id,
        project_id: caller.project_id,
        priority,
        spec: &spec,
        replay_of: None,
    };
    Ok(JsonResponse(EnsemblePlan {
        same_as: same(&mut conn, &new, request.reuse()).await?,
        cost: estimate(&mut conn, caller.project_id, &spec).await?,
        spec_digest: spec.digest(),
        spec,
    }))
}
