//! `/v1/datasets`: labelled images, registered from the operator's directories or URIs.

use std::fs::File;
use std::path::Path as FilePath;

use axum::Json as JsonResponse;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::dataset_uploads;
use crate::http::dataset_uploads::{pack_file, refuse_file};
use crate::http::error::Problem;
use crate::http::extract::{Json, Path, Query};
use crate::http::page::{Page, PageQuery};
use crate::http::sources::{Named, fetch_file, fetch_repository, is_repository};
use crate::registry::datasets;
use crate::registry::datasets::{
    DatasetVersion, NewDatasetVersion, PackError, Packed, pack_parquet,
};
use crate::registry::references;
use crate::remote::uri::SourceUri;
use promptweave_domain::reference::{Reference, ResourceName, VersionSelector};
use promptweave_formats::dataset::DatasetError;
use promptweave_formats::parquet;
use promptweave_formats::parquet::{ParquetError, Shard};

const SKIP: &str = "send `\"skip_unreadable\": true` to leave it out";
/// The most names of left-out images in an answer; the count is always complete.
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
    /// A directory that the server lists under its `--dataset-root`. It holds VTAB-1k list files, folders of images
    /// named by class, WebDataset's layout, or Hugging Face's Parquet files. Give either this or a `uri`.
    #[schema(example = "target")]
    directory: Option<String>,
    /// A URI below one that the operator allows (`--allow-uri`): `https://…` or `s3://bucket/key` of an archive or a
    /// Parquet file, or `hf://datasets/org/name@revision/folder` for the Parquet files of a repository. Revision and
    /// folder may be left out; `@~parquet` means the files that the Hub converted itself.
    uri: Option<String>,
    /// Leave out unreadable images and count them, instead of refusing the dataset.
    #[serde(default)]
    skip_unreadable: bool,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RegisteredDataset {
    #[serde(flatten)]
    dataset: DatasetVersion,
    /// Names of the first hundred images that were left out.
    skipped_images: Vec<String>,
}

/// Register labelled images from a directory or a URI as the next version of a dataset
///
/// Every image is decoded once as a check, and the original files are stored. Registering the same images under the
/// same name again answers 200 with the existing version. A URI is fetched within the request, so the download must
/// finish within the server's `--request-timeout-s`.
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
        (status = 403, description = "`uri_not_allowed` (by the operator, or as it leads to no public \
            address)"),
        (status = 413, description = "`archive_too_large`"),
        (status = 415, description = "`unsupported_format`"),
        (status = 422, description = "`directory_or_uri` (give one of them), `unknown_directory`, \
            `invalid_uri`, `uri_failed` (says what came), `invalid_archive`, `invalid_dataset`, \
            `empty_dataset`, `label_out_of_range`, `unreadable_image` (names the file; see `skip_unreadable`)"),
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
        uri,
        skip_unreadable,
    } = body;
    match Named::of(directory, uri)? {
        Named::Directory(directory) => {
            let dir = crate::http::directory(&state.settings.dataset_roots, &directory)?;
            let pack = move |out: &FilePath| {
                let packed = datasets::pack(&dir, skip_unreadable, out);
                packed.map_err(|error| refuse(error, &dir, &directory))
            };
            publish(&state, &caller, &name, pack).await
        }
        Named::Uri(uri) => {
            let fetched = Fetched::fetch(&state, &uri).await?;
            let (limit, scratch_dir) = (
                state.settings.max_dataset_bytes,
                state.settings.scratch_dir.clone(),
            );
            let pack = move |out: &FilePath| {
                let packed = fetched.pack(limit, skip_unreadable, &scratch_dir, out);
                packed.map_err(|error| refuse_file(error, "/uri", SKIP))
            };
            publish(&state, &caller, &name, pack).await
        }
    }
}

/// A fetched URI, until it is packed.
enum Fetched {
    File(File),
    Shards(Vec<Shard>),
}

impl Fetched {
    async fn fetch(state: &AppState, uri: &SourceUri) -> Result<Self, Problem> {
        let limit = state.settings.max_dataset_bytes;
        if !is_repository(uri) {
            return Ok(Self::File(fetch_file(state, uri, limit).await?));
        }
        let (dir, found) = fetch_repository(state, uri, limit, |names| {
            let chosen = parquet::choose(names).into_iter().enumerate();
            let numbered = chosen.map(|(i, (split, name))| (split, name, i.to_string()));
            numbered.collect()
        })
        .await?;
        if found.is_empty() {
            let detail = format!(
                "`{uri}` has no Parquet files of a split: a dataset is `hf://datasets/org/name`, with the folder of \
                 its files behind it where it has several; `name@~parquet` means those that the Hub made itself"
            );
            return Err(Problem::field("empty_dataset", "/uri", detail));
        }
        let shards = found.into_iter().map(|(split, name, number)| {
            let file = File::open(dir.path().join(number))?;
            Ok(Shard { split, name, file })
        });
        // Open files stay readable after their names are deleted with the folder.
        let shards: Result<_, std::io::Error> = shards.collect();
        Ok(Self::Shards(shards.map_err(Problem::internal)?))
    }

    fn pack(
        self,
        limit: u64,
        skip_unreadable: bool,
        scratch_dir: &FilePath,
        out: &FilePath,
    ) -> Result<Packed, PackError> {
        match self {
            Self::File(file) => pack_file(file, limit, skip_unreadable, scratch_dir, out),
            Self::Shards(shards) => pack_parquet(shards, skip_unreadable, limit, out),
        }
    }
}

/// Packs images off the runtime's threads, stores the pack, and answers with its version: 201, or 200 if the version
/// already existed.
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
    let detail = crate::http::chain_for_client(&error, dir, directory);
    refuse_pack(error, "/directory", detail, SKIP)
}

/// The problem of images that cannot be packed. `pointer` says where the request named them.
pub(super) fn refuse_pack(error: PackError, pointer: &str, detail: String, skip: &str) -> Problem {
    match error {
        PackError::Io(_) | PackError::Foreign(_) => return Problem::internal(error),
        PackError::PackTooLarge(_) => {
            return Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "archive_too_large", detail);
        }
        _ => {}
    }
    if let Some(image) = error.bad_image() {
        let pointer = format!("{pointer}/{}", crate::http::extract::escape(image));
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

/// List datasets by name, each with its newest version
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

/// Get the newest version of a dataset
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
        let detail = format!("there is no dataset `{reference}`");
        Problem::not_found("dataset_not_found", detail)
    })
}
