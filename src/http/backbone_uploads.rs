//! `PUT /v1/backbones/{name}`: a backbone's folder in an archive, sent as the body.

use std::fs::File;
use std::path::Path as FilePath;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::backbones::{MAX_WEIGHTS, open, publish, refuse};
use crate::http::dataset_uploads::{ArchiveBytes, check_media_type, refuse_archive};
use crate::http::error::Problem;
use crate::http::extract::{Path, Query};
use crate::http::prompt_files::unsupported_format;
use crate::http::spool::spool;
use crate::registry::backbones::RegisteredBackbone;
use promptweave_domain::error_chain::chain;
use promptweave_domain::reference::ResourceName;
use promptweave_formats::archive::Archive;
use promptweave_formats::backbone::{Backbone, CONFIG_FILE, MODEL_FILE};
use promptweave_formats::checkpoint::{PREPROCESSOR_FILE, Settings};
use promptweave_formats::error::FileError;
use promptweave_formats::files::Files as _;

/// The upload limit: a foreign checkpoint may hold f64 weights, and small files lie beside them.
pub(super) const MAX_UPLOAD: u64 = 2 * MAX_WEIGHTS + (64 << 20);
const MAX_SETTINGS: u64 = 1 << 20;
/// Extensions of files in which libraries keep weights as pickles.
const PICKLED: [&str; 4] = ["bin", "pt", "pth", "ckpt"];

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(upload_backbone))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct UploadOptions {
    /// Settings that the archive's files lack or get wrong, as JSON, like `config` of `POST /v1/backbones`.
    #[param(example = r#"{"num_heads": 6}"#)]
    config: Option<String>,
}

impl UploadOptions {
    fn config(&self) -> Result<Option<Settings>, Problem> {
        let Some(text) = &self.config else {
            return Ok(None);
        };
        let json = serde_json::from_str(text);
        json.map(Some)
            .map_err(|error| Problem::field("invalid_query", "/config", error.to_string()))
    }
}

/// Upload a backbone: its folder in an archive
///
/// The archive is a tar, tar.gz or zip of what `POST /v1/backbones` reads from a directory: the weights
/// (`model.safetensors`, or the only `.safetensors` or `.npz`), `config.json` and, from Hugging Face,
/// `preprocessor_config.json`. Other files are ignored.
#[utoipa::path(
    put,
    path = "/backbones/{name}",
    tag = "backbones",
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
        (status = 201, body = RegisteredBackbone, headers(("location" = String))),
        (status = 200, description = "It is registered already", body = RegisteredBackbone),
        (status = 400, description = "`body_interrupted`"),
        (status = 409, description = "`name_taken`, `backbone_exists`"),
        (status = 413, description = "`body_too_large`, `archive_too_large` (unpacked)"),
        (status = 415, description = "`unsupported_format` (no archive, or the weights are a pickle), \
            `unsupported_media_type`"),
        (status = 422, description = "`invalid_archive` (names the entry and the rule), \
            `invalid_backbone`, `missing_setting` (say it in `config`)"),
    )
)]
async fn upload_backbone(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
    Query(options): Query<UploadOptions>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let config = options.config()?;
    check_media_type(&headers)?;
    let scratch_dir = state.settings.scratch_dir.clone();
    let upload = spool(&headers, body, MAX_UPLOAD, &scratch_dir).await?;
    let read = move |scratch: &FilePath| {
        open_archive(upload.into_file(), config, scratch, &scratch_dir, "")
    };
    publish(&state, &caller, &name, read).await
}

/// Opens the backbone in an archive; `pointer` is where the request named it.
pub(super) fn open_archive(
    file: File,
    config: Option<Settings>,
    scratch: &FilePath,
    scratch_dir: &FilePath,
    pointer: &'static str,
) -> Result<Backbone, Problem> {
    let archive = Archive::open(file, MAX_UPLOAD, scratch_dir);
    let (folder, converted) = (scratch.join("folder"), scratch.join("converted"));
    for dir in [&folder, &converted] {
        std::fs::create_dir(dir).map_err(Problem::internal)?;
    }
    take_out(&archive.map_err(refuse_archive)?, &folder)?;
    let opened = open(&folder, config, &converted);
    opened.map_err(|error| refuse(error, &folder, "the archive", pointer))
}

/// Copies the files of a backbone out of an archive, under file names that we choose.
fn take_out(archive: &Archive, folder: &FilePath) -> Result<(), Problem> {
    let names = archive.files("").map_err(Problem::internal)?;
    let ends = |name: &&String, endings: &[&str]| {
        let ending = FilePath::new(name).extension().and_then(|it| it.to_str());
        ending.is_some_and(|it| endings.contains(&it))
    };
    let weights: Vec<_> = names
        .iter()
        .filter(|name| ends(name, &["safetensors", "npz"]))
        .collect();
    let model = match weights[..] {
        [one] => one.clone(),
        _ if archive.is_file(MODEL_FILE) => MODEL_FILE.to_owned(),
        [] => {
            if let Some(pickle) = names.iter().find(|name| ends(name, &PICKLED)) {
                return Err(unsupported_format(format!(
                    "`{pickle}` is a pickle, which may run programs; convert it to `{MODEL_FILE}`"
                )));
            }
            let detail = format!(
                "the archive has neither `{MODEL_FILE}` nor another `.safetensors` or `.npz`"
            );
            return Err(Problem::unprocessable("invalid_backbone", detail));
        }
        _ => {
            let detail = format!(
                "the archive has {} files of weights; call the one you mean `{MODEL_FILE}`",
                weights.len()
            );
            return Err(Problem::unprocessable("invalid_backbone", detail));
        }
    };
    let as_ours = match FilePath::new(&model).extension() {
        Some(ending) if ending == "npz" => "model.npz",
        _ => MODEL_FILE,
    };
    copy(archive, &model, MAX_UPLOAD, &folder.join(as_ours))?;
    for settings in [CONFIG_FILE, PREPROCESSOR_FILE] {
        if archive.is_file(settings) {
            copy(archive, settings, MAX_SETTINGS, &folder.join(settings))?;
        }
    }
    Ok(())
}

fn copy(archive: &Archive, name: &str, max: u64, to: &FilePath) -> Result<(), Problem> {
    let mut out = File::create(to).map_err(Problem::internal)?;
    archive
        .copy(name, max, &mut out)
        .map_err(|error| match error {
            FileError::Archive(error) => refuse_archive(error),
            FileError::TooLarge { .. } => {
                let detail = format!("`{name}`: {}", chain(&error));
                Problem::unprocessable("invalid_backbone", detail)
            }
            FileError::Io(error) => Problem::internal(error),
        })
}
