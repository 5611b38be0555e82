//! The statistics that a successful ensemble was computed from, while they are kept.

use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::Response;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::content::File;
use crate::http::error::Problem;
use crate::http::extract::Path;
use crate::http::jobs::{existing, no_result};
use crate::jobs::plan::solve::Solved;

/// The ensemble if it succeeded; otherwise the problem says why it has no result.
async fn succeeded(state: &AppState, caller: &Caller, id: Uuid) -> Result<Solved, Problem> {
    let job = existing(&mut *state.pool.acquire().await?, caller.project_id, id).await?;
    Solved::try_from(job).map_err(|job| no_result(&job))
}

/// The ensemble, if it succeeded and its statistics still exist.
pub(super) async fn with_statistics(
    state: &AppState,
    caller: &Caller,
    id: Uuid,
) -> Result<Solved, Problem> {
    let solved = succeeded(state, caller, id).await?;
    check_statistics(id, solved.statistics_deleted_at)?;
    Ok(solved)
}

pub(super) fn check_statistics(
    id: Uuid,
    deleted_at: Option<OffsetDateTime>,
) -> Result<(), Problem> {
    let Some(at) = deleted_at else {
        return Ok(());
    };
    let detail = format!(
        "the statistics of ensemble `{id}` were let go at {at}: they are kept for so many days as the \
         operator says (--statistics-days); post the ensemble again"
    );
    Err(Problem::new(StatusCode::GONE, "statistics_deleted", detail))
}

/// A safetensors file.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "it exists for the API document alone")]
pub(super) struct StatisticsBytes(Vec<u8>);

/// Download the statistics that the weights were computed from, as safetensors, whole or a range of the bytes
#[utoipa::path(
    get,
    path = "/ensembles/{id}/statistics",
    tag = "ensembles",
    security(("api_key" = ["read"])),
    params(
        ("id" = Uuid, Path),
        ("if-none-match" = Option<String>, Header, description = "ETag of a copy at hand"),
        ("range" = Option<String>, Header, description = "One range of bytes, e.g. `bytes=1000-`; \
            several at once are answered with the whole file"),
        ("if-range" = Option<String>, Header, description = "ETag that the file must have for \
            `range` to count"),
    ),
    responses(
        (status = 200, content_type = "application/octet-stream", body = StatisticsBytes,
         headers(("etag" = String), ("content-digest" = String), ("repr-digest" = String))),
        (status = 206, description = "The range", content_type = "application/octet-stream", body = StatisticsBytes,
         headers(("etag" = String), ("content-range" = String), ("repr-digest" = String))),
        (status = 304, description = "The copy at hand is this one", headers(("etag" = String))),
        (status = 404, description = "`ensemble_not_found`"),
        (status = 409, description = "`ensemble_not_finished`, `ensemble_failed`, \
            `ensemble_cancelled`"),
        (status = 410, description = "`statistics_deleted`: their time is over"),
        (status = 416, description = "`range_not_satisfiable`: the file ends before it",
         headers(("content-range" = String))),
    )
)]
pub(super) async fn get_ensemble_statistics(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
    method: Method,
    request: HeaderMap,
) -> Result<Response, Problem> {
    let digest = with_statistics(&state, &caller, id).await?.statistics;
    let file = File {
        digest,
        size: state.blobs.size(&digest).await?,
        kind: "application/octet-stream",
        name: format!("{id}-statistics.safetensors"),
        immutable: true,
        ranges: true,
    };
    file.serve(&state.blobs, &method, &request).await
}
