//! `POST /v1/datasets/{name}/versions`: labelled images in an archive, sent as the body.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::datasets::{RegisteredDataset, publish, refuse_pack};
use crate::http::error::Problem;
use crate::http::extract::{Path, Query, escape, media_type, unsupported_media_type};
use crate::http::prompt_files::unsupported_format;
use crate::http::spool::spool;
use crate::registry::datasets::{PackError, Packed, pack_files, pack_parquet};
use promptweave_domain::error_chain::chain;
use promptweave_domain::reference::ResourceName;
use promptweave_domain::split::Split;
use promptweave_formats::archive::Archive;
use promptweave_formats::error::ArchiveError;
use promptweave_formats::parquet;
use promptweave_formats::parquet::Shard;

const MEDIA_TYPES: [&str; 4] = [
    "application/x-tar",
    "application/gzip",
    "application/zip",
    "application/octet-stream",
];

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(upload_dataset))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct UploadOptions {
    /// Leave out unreadable images and count them, instead of refusing the dataset.
    #[serde(default)]
    skip_unreadable: bool,
}

/// An archive.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "it exists for the API document alone")]
pub(super) struct ArchiveBytes(Vec<u8>);

/// Upload labelled images as the next version of a dataset
///
/// The dataset is created if it does not exist. The body is a tar, tar.gz or zip in a layout that `POST /v1/datasets`
/// reads: VTAB-1k list files, folders of images named by class, or WebDataset. A single folder around everything is
/// allowed. Or the body is one Parquet file as Hugging Face writes them (columns `image` and `label`); then all images
/// become `train`. Register several shards or splits from a directory instead.
///
/// The format is recognised by the content. The body is spooled to disk and never unpacked. Uploading the same images
/// under the same name again answers 200 with the existing version. images under the same name once more answer 200
/// with the version that exists.
#[utoipa::path(
    post,
    path = "/datasets/{name}/versions",
    tag = "datasets",
    security(("api_key" = ["write"])),
    params(("name" = String, Path), UploadOptions),
    request_body(
        description = "The archive; it is recognised by its content",
        content(
            (ArchiveBytes = "application/x-tar"),
            (ArchiveBytes = "application/gzip"),
            (ArchiveBytes = "application/zip"),
            (ArchiveBytes = "application/octet-stream"),
        ),
    ),
    responses(
        (status = 201, body = RegisteredDataset, headers(("location" = String))),
        (status = 200, description = "These images are a version already", body = RegisteredDataset),
        (status = 400, description = "`body_interrupted`"),
        (status = 413, description = "`body_too_large`, `archive_too_large` (unpacked)"),
        (status = 415, description = "`unsupported_format`, `unsupported_media_type`"),
        (status = 422, description = "`invalid_archive` (names the entry and the rule), \
            `invalid_dataset`, `empty_dataset`, `label_out_of_range`, `unreadable_image` (names the \
            file; see `skip_unreadable`)"),
    )
)]
async fn upload_dataset(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
    Query(options): Query<UploadOptions>,
    headers: HeaderMap,
    body: Body,
) -> Result<impl IntoResponse, Problem> {
    check_media_type(&headers)?;
    let limit = state.settings.max_dataset_bytes;
    let scratch_dir = state.settings.scratch_dir.clone();
    let upload = spool(&headers, body, limit, &scratch_dir).await?;
    let pack = move |out: &std::path::Path| {
        let packed = pack_file(
            upload.into_file(),
            limit,
            options.skip_unreadable,
            &scratch_dir,
            out,
        );
        packed
            .map_err(|error| refuse_file(error, "", "send `?skip_unreadable=true` to leave it out"))
    };
    publish(&state, &caller, &name, pack).await
}

/// Packs the images of one file: an archive or Parquet, recognised by content, not by name.
pub(super) fn pack_file(
    file: File,
    limit: u64,
    skip_unreadable: bool,
    scratch_dir: &std::path::Path,
    out: &std::path::Path,
) -> Result<Packed, PackError> {
    if starts_with(&file, parquet::MAGIC)? {
        let shard = Shard {
            split: Split::Train,
            name: "the file".to_owned(),
            file,
        };
        return pack_parquet(vec![shard], skip_unreadable, limit, out);
    }
    pack_files(
        &Archive::open(file, limit, scratch_dir)?,
        skip_unreadable,
        out,
    )
}

fn starts_with(file: &File, magic: &[u8]) -> io::Result<bool> {
    let mut start = vec![0; magic.len()];
    match file.read_exact_at(&mut start, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        read => read.map(|()| start == magic),
    }
}

/// Refuses a media type that is not an archive's; the archive itself is recognised by its content.
pub(super) fn check_media_type(headers: &HeaderMap) -> Result<(), Problem> {
    match media_type(headers) {
        Some(other) if !MEDIA_TYPES.contains(&other.as_str()) => {
            let expected = MEDIA_TYPES.map(|known| format!("`{known}`")).join(", ");
            Err(unsupported_media_type(Some(&other), &expected))
        }
        _ => Ok(()),
    }
}

/// The problem of a file of images that was refused; `pointer` and `skip` are as in [`refuse_pack`].
pub(super) fn refuse_file(error: PackError, pointer: &str, skip: &str) -> Problem {
    if let PackError::Archive(error) = error {
        return refuse_archive(error);
    }
    let detail = chain(&error);
    refuse_pack(error, pointer, detail, skip)
}

pub(super) fn refuse_archive(error: ArchiveError) -> Problem {
    let detail = chain(&error);
    match &error {
        ArchiveError::Unrecognised => unsupported_format(detail),
        ArchiveError::Read(_) => Problem::internal(error),
        ArchiveError::TooLarge(_) => {
            Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "archive_too_large", detail)
        }
        _ => match error.entry() {
            Some(entry) => Problem::field("invalid_archive", format!("/{}", escape(entry)), detail),
            None => Problem::unprocessable("invalid_archive", detail),
        },
    }
}
