//! `/v1/predictions`: jobs that predict the images of a dataset, by a prompt with a head or by an ensemble.

use axum::extract::State;
use axum::http::{HeaderMap, Method};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::content::File;
use crate::http::error::Problem;
use crate::http::extract::{Draft, Path};
use crate::http::jobs::{
    JobRequest, JobStatus, JobUrls, Resource, accept, check_priority, default_priority, existing,
    no_result, path,
};
use crate::http::named::default_split;
use crate::jobs::Job;
use crate::jobs::plan::prediction::{PredictionRequest, plan};
use crate::jobs::requests::Reuse;
use promptweave_domain::prediction::TableFormat;
use promptweave_domain::reference::{Reference, ResourceName};
use promptweave_domain::specification::PredictionSpec;
use promptweave_domain::split::Split;

pub fn router() -> OpenApiRouter<AppState> {
    operations::router()
        .routes(routes!(create_prediction))
        .routes(routes!(get_prediction_file))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreatePrediction {
    /// A prompt with a head, or an ensemble: `name`, `name:2`, `name:production` or `name@sha256:…`.
    #[schema(value_type = String, example = "food-ensemble:1")]
    model: Reference,
    /// The dataset whose images are predicted: `name`, `name:2` or `name@sha256:…`.
    #[schema(value_type = String, example = "food:1")]
    dataset: Reference,
    /// The split, of which all images are predicted.
    #[serde(default = "default_split")]
    #[schema(default = "train")]
    split: Split,
    /// Leave out unreadable images and count them, instead of failing.
    #[serde(default)]
    skip_unreadable: bool,
    /// The backbone. It may be left out if only one registered backbone fits the model.
    #[schema(value_type = Option<String>, example = "vit-s14")]
    backbone: Option<ResourceName>,
    /// How many of the most probable classes the file has for each image.
    #[serde(default = "default_top_k")]
    #[schema(minimum = 1, maximum = 1000, default = 1)]
    top_k: usize,
    /// The form of the file.
    #[serde(default)]
    #[schema(default = "csv")]
    format: TableFormat,
    /// Jobs with a smaller number go first; 100 by default.
    #[serde(default = "default_priority")]
    #[schema(minimum = 0, maximum = 1000, default = 100)]
    priority: i32,
    /// Predict even if a prediction with the same `spec_digest` waits, runs or has succeeded.
    #[serde(default)]
    force: bool,
}

fn default_top_k() -> usize {
    1
}

#[derive(Debug, Serialize, ToSchema)]
pub struct PredictionJob {
    #[serde(flatten)]
    job: JobStatus,
    /// The specification, with every reference resolved when it was posted.
    spec: PredictionSpec,
    urls: PredictionUrls,
}

#[derive(Debug, Serialize, ToSchema)]
struct PredictionUrls {
    #[serde(flatten)]
    job: JobUrls,
    /// The file with the predictions, once there is one.
    file: Option<String>,
}

impl Resource for PredictionSpec {
    type Response = PredictionJob;
}

impl From<Job<PredictionSpec>> for PredictionJob {
    fn from(job: Job<PredictionSpec>) -> Self {
        let this = path::<PredictionSpec>(job.id);
        Self {
            job: JobStatus::from(&job),
            urls: PredictionUrls {
                job: JobUrls::of::<PredictionSpec>(job.id),
                file: job.file_digest.map(|_| format!("{this}/file")),
            },
            spec: job.spec,
        }
    }
}

/// Predict the images of a dataset, by a prompt with a head or by an ensemble
///
/// The file has a row for each image of the split: the image's path, its label, and the most probable classes with
/// their probabilities. The path is that in the stored dataset, which keeps the images of the upload under `images/`.
/// If every label is the name of one of the model's classes, the result has accuracy, loss and confusion matrix. If a
/// prediction with the same `spec_digest` waits, runs or has succeeded, the answer is that prediction, unless `force`
/// is set.
#[utoipa::path(
    post,
    path = "/predictions",
    tag = "predictions",
    security(("api_key" = ["run"])),
    request_body = CreatePrediction,
    responses(
        (status = 200, description = "It was computed before", body = PredictionJob,
         headers(("location" = String))),
        (status = 202, body = PredictionJob, headers(("location" = String), ("retry-after" = u32))),
        (status = 422, description = "`unknown_prompt`, `no_head`, `deep_prompt_not_predictable`, `width_mismatch`, \
            `unknown_dataset`, `unknown_split`, `empty_split`, `unknown_backbone`, `backbone_required`, \
            `backbone_ambiguous`, `backbone_mismatch`, `preprocessing_mismatch`, `invalid_top_k`, `too_large` (more than 4 GiB in \
            memory), `invalid_priority`; \
            `invalid_request` where there are several, each with its own in errors"),
        (status = 429, description = "`queue_full`: as many jobs wait as the operator lets",
         headers(("retry-after" = u32))),
    )
)]
async fn create_prediction(
    State(state): State<AppState>,
    caller: Caller,
    Draft { body, mut mistakes }: Draft<CreatePrediction>,
) -> Result<Response, Problem> {
    mistakes.note(check_priority(body.priority))?;
    let request = PredictionRequest {
        model: body.model,
        dataset: body.dataset,
        split: body.split,
        skip_unreadable: body.skip_unreadable,
        backbone: body.backbone,
        top_k: body.top_k,
        format: body.format,
    };
    let mut conn = state.pool.acquire().await?;
    let spec = mistakes.finish(plan(&mut conn, caller.project_id, &request).await)?;
    let order = JobRequest {
        id: state.clock.new_id(),
        priority: body.priority,
        spec: &spec,
        replay_of: None,
        reuse: (!body.force).then_some(Reuse { output: None }),
    };
    accept(&state, &mut conn, caller.project_id, order).await
}

/// A table of predictions.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "it exists for the API document alone")]
struct PredictionFile(Vec<u8>);

/// Download the predictions, as CSV, JSON Lines or Parquet
///
/// The columns are `image`, `label`, `class` and `probability`, then `class_2` and `probability_2` and so on, down to
/// `top_k`.
#[utoipa::path(
    get,
    path = "/predictions/{id}/file",
    tag = "predictions",
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
        (status = 200, description = "The file, of the type that `format` says",
         content(
            (PredictionFile = "text/csv"),
            (PredictionFile = "application/jsonl"),
            (PredictionFile = "application/vnd.apache.parquet"),
         ),
         headers(("etag" = String), ("content-digest" = String), ("repr-digest" = String))),
        (status = 206, description = "The range",
         content(
            (PredictionFile = "text/csv"),
            (PredictionFile = "application/jsonl"),
            (PredictionFile = "application/vnd.apache.parquet"),
         ),
         headers(("etag" = String), ("content-range" = String), ("repr-digest" = String))),
        (status = 304, description = "The copy at hand is this one", headers(("etag" = String))),
        (status = 404, description = "`prediction_not_found`"),
        (status = 409, description = "`prediction_not_finished`, `prediction_failed`, `prediction_cancelled`"),
        (status = 416, description = "`range_not_satisfiable`: the file ends before it",
         headers(("content-range" = String))),
    )
)]
async fn get_prediction_file(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
    method: Method,
    request: HeaderMap,
) -> Result<Response, Problem> {
    let mut conn = state.pool.acquire().await?;
    let job = existing::<PredictionSpec>(&mut conn, caller.project_id, id).await?;
    drop(conn);
    let (Some(digest), Some(result)) = (job.file_digest, &job.result) else {
        return Err(no_result(&job));
    };
    let format = result.file.format;
    let file = File {
        digest,
        size: result.file.size,
        kind: format.media_type(),
        name: format!("{id}.{}", format.name()),
        immutable: true,
        ranges: true,
    };
    file.serve(&state.blobs, &method, &request).await
}

mod operations {
    use super::PredictionJob;
    use crate::http::jobs::operations::job_operations;
    use promptweave_domain::prediction::PredictionResult;
    use promptweave_domain::specification::PredictionSpec;

    job_operations! {
        PredictionSpec => PredictionJob, PredictionResult;
        one: "prediction", a: "a prediction",
        result: "Get accuracy, loss and confusion matrix, and the digest of the file",
        events: "",
        retry: "A failed or cancelled prediction is queued again as it was posted.",
    }
}
