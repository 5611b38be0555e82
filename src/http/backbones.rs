//! `/v1/backbones`: frozen vision transformers, registered from the operator's directories or URIs (or
//! [uploaded](crate::http::backbone_uploads)). Tensor names of every library that publishes them are understood.

use std::path::Path as FilePath;

use axum::Json as JsonResponse;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use sqlx::PgConnection;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::backbone_uploads::{MAX_UPLOAD, open_archive};
use crate::http::error::Problem;
use crate::http::extract::{Json, Path, Query};
use crate::http::page::{Page, PageQuery};
use crate::http::sources::{Named, fetch_file, fetch_repository, is_repository};
use crate::registry::backbones;
use crate::registry::backbones::RegisteredBackbone;
use crate::registry::references;
use promptweave_domain::reference::ResourceName;
use promptweave_formats::backbone::{Backbone, BackboneError, CONFIG_FILE, MODEL_FILE};
use promptweave_formats::checkpoint;
use promptweave_formats::checkpoint::{Checkpoint, ImportError, PREPROCESSOR_FILE, Settings};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(register_backbone, list_backbones))
        .routes(routes!(get_backbone))
}

/// Most bytes of f32 weights that a checkpoint may convert to; a ViT-G has 7.4 GiB.
pub(super) const MAX_WEIGHTS: u64 = 16 << 30;

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RegisterBackbone {
    #[schema(value_type = String, pattern = "^[a-z0-9][a-z0-9._-]{0,127}$", example = "vit-s14")]
    name: ResourceName,
    /// A directory that the server lists under its `--backbone-root`. It holds `config.json` and `model.safetensors` as
    /// promptweave writes them, or a ViT checkpoint (safetensors, or the original `.npz`) with the tensor names of
    /// timm, Hugging Face, DINOv2 or Google, and its `config.json` if there is one. Give either this or a `uri`.
    #[schema(example = "vit_s14_focus")]
    directory: Option<String>,
    /// A URI below one that the operator allows (`--allow-uri`): `hf://org/name@revision` (`model.safetensors`,
    /// `config.json`, `preprocessor_config.json`; the revision may be left out), or `https://…` or `s3://bucket/key` of
    /// an archive as `PUT /v1/backbones/{name}` takes it.
    uri: Option<String>,
    /// Settings that a foreign checkpoint and the files beside it lack or get wrong.
    config: Option<Settings>,
}

/// Register a backbone from one of the operator's directories or a URI
///
/// A URI is fetched within the request, so the download must finish within the server's `--request-timeout-s`.
#[utoipa::path(
    post,
    path = "/backbones",
    tag = "backbones",
    security(("api_key" = ["write"])),
    request_body = RegisterBackbone,
    responses(
        (status = 201, body = RegisteredBackbone, headers(("location" = String))),
        (status = 200, description = "It is registered already", body = RegisteredBackbone),
        (status = 409, description = "`name_taken`, `backbone_exists`, `file_changed` (while it \
            was read; try again when nobody writes to it)"),
        (status = 403, description = "`uri_not_allowed` (by the operator, or as it leads to no public \
            address)"),
        (status = 413, description = "`archive_too_large`"),
        (status = 415, description = "`unsupported_format`"),
        (status = 422, description = "`directory_or_uri` (give one of them), `unknown_directory`, \
            `invalid_uri`, `uri_failed` (says what came), `invalid_archive`, `invalid_backbone`, \
            `missing_setting` (the checkpoint does not say it: give it in `config`)"),
    )
)]
async fn register_backbone(
    State(state): State<AppState>,
    caller: Caller,
    Json(body): Json<RegisterBackbone>,
) -> Result<Response, Problem> {
    let RegisterBackbone {
        name,
        directory,
        uri,
        config,
    } = body;
    let uri = match Named::of(directory, uri)? {
        Named::Uri(uri) => uri,
        Named::Directory(directory) => {
            let dir = crate::http::directory(&state.settings.backbone_roots, &directory)?;
            let read = move |scratch: &FilePath| {
                let opened = open(&dir, config, scratch);
                opened.map_err(|error| refuse(error, &dir, &directory, "/directory"))
            };
            return publish(&state, &caller, &name, read).await;
        }
    };
    if !is_repository(&uri) {
        let fetched = fetch_file(&state, &uri, MAX_UPLOAD).await?;
        let scratch_dir = state.settings.scratch_dir.clone();
        let read =
            move |scratch: &FilePath| open_archive(fetched, config, scratch, &scratch_dir, "/uri");
        return publish(&state, &caller, &name, read).await;
    }
    let (dir, found) = fetch_repository(&state, &uri, MAX_UPLOAD, |names| {
        let wanted = [MODEL_FILE, CONFIG_FILE, PREPROCESSOR_FILE].into_iter();
        let there = wanted.filter(|file| names.iter().any(|name| name == file));
        there
            .map(|file| ((), file.to_owned(), file.to_owned()))
            .collect()
    })
    .await?;
    if !found.iter().any(|(_, file, _)| file == MODEL_FILE) {
        let detail =
            format!("`{uri}` has no `{MODEL_FILE}`; weights are read from no other file there");
        return Err(Problem::field("invalid_backbone", "/uri", detail));
    }
    let read = move |scratch: &FilePath| {
        let opened = open(dir.path(), config, scratch);
        opened.map_err(|error| refuse(error, dir.path(), uri.url().as_str(), "/uri"))
    };
    publish(&state, &caller, &name, read).await
}

/// Reads a backbone off the runtime's threads, with a scratch folder for converted files, stores it, and answers with
/// it: 201, or 200 if it was already registered.
pub(super) async fn publish(
    state: &AppState,
    caller: &Caller,
    name: &ResourceName,
    read: impl FnOnce(&FilePath) -> Result<Backbone, Problem> + Send + 'static,
) -> Result<Response, Problem> {
    let scratch = tempfile::tempdir_in(&state.settings.scratch_dir).map_err(Problem::internal)?;
    // Reads and digests the whole file. The folder goes with the closure and comes back.
    let reading = tokio::task::spawn_blocking(move || (read(scratch.path()), scratch));
    let (backbone, scratch) = reading.await.map_err(Problem::internal)?;
    let backbone = backbone?;
    let model = state.blobs.put_file(&backbone.model_path()).await?;
    drop(scratch);
    let mut transaction = state.pool.begin().await?;
    references::hold(&mut transaction, &state.blobs, &model.digest).await?;
    let (registered, created) =
        backbones::insert(&mut transaction, caller.project_id, name, &backbone, model).await?;
    transaction.commit().await?;
    let status = if created {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    let location = [(header::LOCATION, format!("/v1/backbones/{name}"))];
    Ok((status, location, JsonResponse(registered)).into_response())
}

/// The problem of a folder that cannot be read. The client knows the folder as `shown`, and named it at `pointer`.
pub(super) fn refuse(
    error: ImportError,
    dir: &FilePath,
    shown: &str,
    pointer: &'static str,
) -> Problem {
    let detail = crate::http::chain_for_client(&error, dir, shown);
    match error {
        ImportError::MissingSetting { setting } => {
            Problem::field("missing_setting", format!("/config/{setting}"), detail)
        }
        error => {
            let problem = match pointer {
                "" => Problem::unprocessable("invalid_backbone", detail),
                pointer => Problem::field("invalid_backbone", pointer, detail),
            };
            match error {
                ImportError::Backbone(BackboneError::Read { .. }) | ImportError::Io { .. } => {
                    problem.caused_by(error)
                }
                _ => problem,
            }
        }
    }
}

/// Opens the backbone in a directory; another library's checkpoint is converted into `scratch`.
pub(super) fn open(
    dir: &FilePath,
    config: Option<Settings>,
    scratch: &FilePath,
) -> Result<Backbone, ImportError> {
    if checkpoint::is_ours(dir) && config.is_none() {
        return Ok(Backbone::open(dir)?);
    }
    let checkpoint = Checkpoint::in_folder(dir)?;
    let imported = checkpoint::import(
        &checkpoint,
        config.unwrap_or_default(),
        MAX_WEIGHTS,
        scratch,
    )?;
    tracing::info!(
        naming = ?imported.naming,
        left_out = imported.left_out.join(", "),
        digest = %imported.backbone.digest,
        "checkpoint converted",
    );
    Ok(imported.backbone)
}

/// List backbones by name
#[utoipa::path(
    get,
    path = "/backbones",
    tag = "backbones",
    security(("api_key" = ["read"])),
    params(PageQuery),
    responses((status = 200, body = Page<RegisteredBackbone>))
)]
async fn list_backbones(
    State(state): State<AppState>,
    caller: Caller,
    Query(page): Query<PageQuery>,
) -> Result<JsonResponse<Page<RegisteredBackbone>>, Problem> {
    let (after, limit) = (page.after::<ResourceName>()?, page.limit()?);
    let mut conn = state.pool.acquire().await?;
    let found = backbones::list(&mut conn, caller.project_id, after.as_ref(), limit).await?;
    Ok(JsonResponse(
        page.page(found, |backbone| backbone.name.to_string())?,
    ))
}

/// Get a backbone by name
#[utoipa::path(
    get,
    path = "/backbones/{name}",
    tag = "backbones",
    security(("api_key" = ["read"])),
    params(("name" = String, Path)),
    responses(
        (status = 200, body = RegisteredBackbone),
        (status = 404, description = "`backbone_not_found`"),
    )
)]
async fn get_backbone(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
) -> Result<JsonResponse<RegisteredBackbone>, Problem> {
    let mut conn = state.pool.acquire().await?;
    let found = existing(&mut conn, caller.project_id, &name).await?;
    Ok(JsonResponse(found))
}

/// The backbone of this name, or the problem that there is none.
pub(super) async fn existing(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
) -> Result<RegisteredBackbone, Problem> {
    let found = backbones::find(conn, project_id, name).await?;
    found.ok_or_else(|| {
        let detail = format!("there is no backbone `{name}`");
        Problem::not_found("backbone_not_found", detail)
    })
}
