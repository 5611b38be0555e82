//! `/v1/datasets`: labelled images, registered from the operator's directories.

use std::path::Path as FilePath;

use axum::Json as JsonResponse;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::AppState;
use super::access::Caller;
use super::dataset_uploads;
use super::error::Problem;
use super::extract::{Json, Path, Query};
use super::page::{Page, PageQuery};
use crate::domain::dataset::DatasetError;
use crate::domain::parquet::ParquetError;
use crate::domain::reference::{Reference, ResourceName, VersionSelector};
use crate::registry::datasets::{self, DatasetVersion, NewDatasetVersion, PackError, Packed};
use crate::registry::references;

/// Most names of left-out images in an answer; the count is always whole.
const MAX_SKIPPED_NAMES: usize = 100;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(register_dataset, list_datasets))
        .routes(routes!(get_dataset))
        .merge(dataset_uploads::router())
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RegisterDataset {
    #[schema(value_type = String, pattern = "^[a-z0-9][a-z0-9._-]{0,127}$", example = "food")]
    name: ResourceName,
    /// A directory that the server lists under its `--dataset-root`: VTAB-1k list files, folders of
    /// images named by class, WebDataset's layout, or Hugging Face's Parquet files.
    #[schema(example = "target")]
    directory: String,
    /// Leave unreadable images out, and count them, instead of refusing the data set.
    #[serde(default)]
    skip_bad: bool,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RegisteredDataset {
    #[serde(flatten)]
    dataset: DatasetVersion,
    /// Names of the first hundred images that were left out.
    skipped_images: Vec<String>,
}

/// Register a directory of labelled images as the next version of a data set
///
/// Every image is decoded once as a check, and the original files are stored. The same images
/// under the same name once more answer 200 with the version that exists.
#[utoipa::path(
    post,
    path = "/datasets",
    tag = "datasets",
    security(("api_key" = ["write"])),
    request_body = RegisterDataset,
    responses(
        (status = 201, body = RegisteredDataset, headers(("location" = String))),
        (status = 200, description = "These images are a version already", body = RegisteredDataset),
        (status = 409, description = "`file_changed`: while it was read; try again when nobody \
            writes to it"),
        (status = 422, description = "`unknown_directory`, `invalid_dataset`, `empty_dataset`, \
            `label_out_of_range`, `unreadable_image` (names the file; see `skip_bad`)"),
    )
)]
async fn register_dataset(
    State(state): State<AppState>,
    caller: Caller,
    Json(body): Json<RegisterDataset>,
) -> Result<impl IntoResponse, Problem> {
    let RegisterDataset {
        name,
        directory,
        skip_bad,
    } = body;
    let dir = super::directory(&state.settings.dataset_roots, &directory)?;
    let pack = move |out: &FilePath| {
        let packed = datasets::pack(&dir, skip_bad, out);
        packed.map_err(|error| refuse(error, &dir, &directory))
    };
    publish(&state, &caller, &name, pack).await
}

/// Packs images off the runtime's threads, stores the pack, and answers with its version: 201, or
/// 200 where it was one already.
pub(super) async fn publish(
    state: &AppState,
    caller: &Caller,
    name: &ResourceName,
    pack: impl FnOnce(&FilePath) -> Result<Packed, Problem> + Send + 'static,
) -> Result<Response, Problem> {
    let scratch = tempfile::Builder::new()
        .prefix("promptweave-pack-")
        .tempfile_in(&state.settings.scratch_dir)
        .map_err(Problem::internal)?
        .into_temp_path();
    // Reads and decodes every image. The scratch file goes with the closure and comes back.
    let packing = tokio::task::spawn_blocking(move || (pack(&scratch), scratch));
    let (packed, scratch) = packing.await.map_err(Problem::internal)?;
    let packed = packed?;
    let pack = state.blobs.put_file(&scratch).await?;
    drop(scratch);

    let new = NewDatasetVersion {
        pack,
        classes: &packed.classes,
        class_counts: &packed.class_counts,
        skipped: packed.skipped.len(),
    };
    let mut transaction = state.pool.begin().await?;
    references::hold(&mut transaction, &state.blobs, &pack.digest).await?;
    let (dataset, created) =
        datasets::insert_version(&mut transaction, caller.project_id, name, new).await?;
    transaction.commit().await?;
    let status = if created {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    let location = format!("/v1/datasets/{name}");
    let mut skipped_images = packed.skipped;
    skipped_images.truncate(MAX_SKIPPED_NAMES);
    let answer = RegisteredDataset {
        dataset,
        skipped_images,
    };
    Ok((status, [(header::LOCATION, location)], JsonResponse(answer)).into_response())
}

fn refuse(error: PackError, dir: &FilePath, directory: &str) -> Problem {
    let detail = super::chain_for_client(&error, dir, directory);
    refuse_pack(
        error,
        "/directory",
        detail,
        "send `\"skip_bad\": true` to leave it out",
    )
}

/// What is wrong with images that were to be packed. `pointer` says where the request named them.
pub(super) fn refuse_pack(error: PackError, pointer: &str, detail: String, skip: &str) -> Problem {
    match error {
        PackError::Io(_) | PackError::Foreign(_) => return Problem::internal(error),
        PackError::PackTooLarge(_) => {
            return Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "archive_too_large", detail);
        }
        _ => {}
    }
    if let Some(image) = error.bad_image() {
        let pointer = format!("{pointer}/{}", super::extract::escape(image));
        let detail = format!("{detail}; repair it, or {skip}");
        return Problem::field("unreadable_image", pointer, detail);
    }
    let code = match error {
        PackError::NothingLeft(_) | PackError::Listing(DatasetError::Empty(_)) => "empty_dataset",
        PackError::Listing(DatasetError::Label { .. })
        | PackError::Parquet(ParquetError::Label { .. }) => "label_out_of_range",
        _ => "invalid_dataset",
    };
    Problem::field(code, pointer, detail)
}

/// List data sets by name, each with its newest version
#[utoipa::path(
    get,
    path = "/datasets",
    tag = "datasets",
    security(("api_key" = ["read"])),
    params(PageQuery),
    responses((status = 200, body = Page<DatasetVersion>))
)]
async fn list_datasets(
    State(state): State<AppState>,
    caller: Caller,
    Query(page): Query<PageQuery>,
) -> Result<JsonResponse<Page<DatasetVersion>>, Problem> {
    let (after, limit) = (page.after::<ResourceName>()?, page.limit()?);
    let mut conn = state.pool.acquire().await?;
    let found = datasets::list(&mut conn, caller.project_id, after.as_ref(), limit).await?;
    Ok(JsonResponse(
        page.page(found, |dataset| dataset.name.to_string())?,
    ))
}

/// The newest version of a data set
#[utoipa::path(
    get,
    path = "/datasets/{name}",
    tag = "datasets",
    security(("api_key" = ["read"])),
    params(("name" = String, Path)),
    responses(
        (status = 200, body = DatasetVersion),
        (status = 404, description = "`dataset_not_found`"),
    )
)]
async fn get_dataset(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
) -> Result<JsonResponse<DatasetVersion>, Problem> {
    let mut conn = state.pool.acquire().await?;
    let reference = Reference {
        name,
        version: VersionSelector::Newest,
    };
    let found = datasets::resolve(&mut conn, caller.project_id, &reference).await?;
    found.map(JsonResponse).ok_or_else(|| {
        let detail = format!("there is no data set `{reference}`");
        Problem::not_found("dataset_not_found", detail)
    })
}
