//! Import and export of PEFT prompt-tuning adapters: `/v1/prompts/import-peft` and `…/{ref}/peft`.

use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, header};
use axum::response::IntoResponse;
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::db::DbError;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::extract::{Body, Path, Query, escape, media_type, unsupported_media_type};
use crate::http::prompt_files;
use crate::http::prompt_files::MissingMetadata;
use crate::http::prompt_versions::{PublishedVersion, VersionPath};
use crate::http::{AppState, HttpSettings};
use crate::registry::prompt_versions;
use crate::registry::prompt_versions::{NewVersion, VersionFile, VersionKind};
use crate::registry::{backbones, prompts};
use promptweave_domain::digest::Digest;
use promptweave_domain::reference::ResourceName;
use promptweave_formats::peft;
use promptweave_formats::peft::archive;
use promptweave_formats::peft::archive::ArchiveError;
use promptweave_formats::peft::{AdapterConfig, CONFIG_FILE, Layers, PeftError};

const TAR: &str = "application/x-tar";

pub fn router(settings: &HttpSettings) -> OpenApiRouter<AppState> {
    let upload = OpenApiRouter::new()
        .routes(routes!(import_peft))
        .layer(DefaultBodyLimit::max(settings.max_upload_bytes));
    OpenApiRouter::new()
        .routes(routes!(export_peft))
        .merge(upload)
}

/// A tar archive.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "it exists for the API document alone")]
struct TarBytes(Vec<u8>);

/// What the adapter does not record: the prompt that it becomes a version of, and what it was trained for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ImportQuery {
    /// The prompt to publish under; it is created if it does not exist.
    #[param(value_type = String, pattern = "^[a-z0-9][a-z0-9._-]{0,127}$", example = "dtd")]
    name: ResourceName,
    /// Digest of the backbone that the adapter was trained for, as `GET /v1/backbones` gives it.
    #[param(value_type = Option<String>, example = "sha256:…")]
    backbone_digest: Option<Digest>,
    /// Id of the preprocessing that it was trained with, e.g. `98-bicubic-imagenet`.
    preprocessing_id: Option<String>,
    /// Seed of the initial prompt.
    init_seed: Option<u64>,
    /// The task it was trained on.
    task: Option<String>,
}

/// Publish a version from a PEFT prompt-tuning adapter: the body is a tar of its folder
///
/// Make the tar with `tar -c -C DIR .` in the folder that `save_pretrained` wrote. `adapter_model.safetensors` becomes
/// the version unchanged, so its sha256 is the version's digest; `adapter_config.json` is kept in `training`. Folders
/// in the archive do not matter, other files are ignored, and nothing is unpacked.
#[utoipa::path(
    post,
    path = "/prompts/import-peft",
    tag = "prompts",
    security(("api_key" = ["write"])),
    params(ImportQuery),
    request_body(
        description = "The archive, uncompressed",
        content((TarBytes = "application/x-tar"), (TarBytes = "application/octet-stream")),
    ),
    responses(
        (status = 201, body = PublishedVersion, headers(("location" = String), ("etag" = String))),
        (status = 200, description = "These bytes are a version already", body = PublishedVersion),
        (status = 413, description = "`body_too_large`"),
        (status = 415, description = "`unsupported_format` (not a tar, or the weights are a pickle), \
            `unsupported_media_type`"),
        (status = 422, description = "`invalid_archive`, `invalid_adapter`, `unsupported_adapter` \
            (LoRA, prefix tuning, …), `reserved_name`, and all that publishing a version answers"),
    )
)]
async fn import_peft(
    State(state): State<AppState>,
    caller: Caller,
    Query(query): Query<ImportQuery>,
    headers: HeaderMap,
    Body(bytes): Body,
) -> Result<impl IntoResponse, Problem> {
    let kind = media_type(&headers);
    if let Some(other) = kind.as_deref()
        && ![TAR, "application/octet-stream"].contains(&other)
    {
        return Err(unsupported_media_type(Some(other), &format!("`{TAR}`")));
    }
    let found = archive::find(&bytes).map_err(refuse_archive)?;
    let config = AdapterConfig::parse(&bytes[found.config]).map_err(refuse_adapter)?;
    let (bytes, file) = prompt_files::read(bytes.slice(found.model)).await?;
    config.check(&file).map_err(refuse_adapter)?;
    let missing = MissingMetadata {
        backbone_digest: query.backbone_digest,
        preprocessing_id: query.preprocessing_id,
        init_seed: query.init_seed,
        task: query.task,
    };
    let mut metadata = missing.complete(file.metadata.as_ref())?;
    metadata.training.get_or_insert_with(|| config.record());

    let version_file = VersionFile::Prompt {
        file: &file,
        metadata: &metadata,
    };
    let mut transaction = state.pool.begin().await?;
    prompt_files::check_backbone(&mut transaction, caller.project_id, version_file).await?;
    let prompt =
        prompts::find_or_create(&mut transaction, caller.project_id, &query.name, "").await?;
    let new = NewVersion {
        prompt_id: prompt.id,
        bytes: &bytes,
        file: version_file,
        produced_by_job: None,
        parents: &[],
    };
    let (version, created) =
        prompt_versions::insert(&mut transaction, caller.project_id, new).await?;
    transaction.commit().await?;
    Ok(prompt_files::published(version, created))
}

fn refuse_archive(error: ArchiveError) -> Problem {
    match error {
        ArchiveError::Foreign(_) | ArchiveError::Pickled => {
            prompt_files::unsupported_format(error.to_string())
        }
        error => Problem::unprocessable("invalid_archive", prompt_files::with_cause(&error)),
    }
}

fn refuse_adapter(error: PeftError) -> Problem {
    let code = match error {
        PeftError::OtherAdapter(_) => "unsupported_adapter",
        PeftError::Deep => "deep_prompt_not_exportable",
        _ => "invalid_adapter",
    };
    let detail = prompt_files::with_cause(&error);
    let pointer = format!("/{}", escape(CONFIG_FILE));
    match (&error, error.field()) {
        (PeftError::Deep, _) => Problem::field(code, "/deep_prompt_embeddings", detail),
        (_, Some(field)) => Problem::field(code, format!("{pointer}/{field}"), detail),
        (_, None) => Problem::field(code, pointer, detail),
    }
}

/// Download a version as a PEFT prompt-tuning adapter, in a tar that unpacks to its folder
///
/// `adapter_model.safetensors` has the numbers of `prompt_embeddings`, bit by bit. An imported adapter gets its
/// `adapter_config.json` back. For any other prompt, that file has the sizes but not the base model: set
/// `base_model_name_or_path` and `task_type` if PEFT should find the model by itself.
#[utoipa::path(
    get,
    path = "/prompts/{name}/versions/{ref}/peft",
    tag = "prompts",
    security(("api_key" = ["read"])),
    params(VersionPath),
    responses(
        (status = 200, description = "A tar of `adapter_config.json` and `adapter_model.safetensors`",
         content_type = "application/x-tar", body = TarBytes),
        (status = 404, description = "`prompt_not_found`, `version_not_found`"),
        (status = 422, description = "`deep_prompt_not_exportable`, `not_a_prompt` (an ensemble)"),
    )
)]
async fn export_peft(
    State(state): State<AppState>,
    caller: Caller,
    Path(path): Path<VersionPath>,
) -> Result<impl IntoResponse, Problem> {
    let mut conn = state.pool.acquire().await?;
    let version = path.resolve(&mut conn, caller.project_id).await?;
    if version.kind == VersionKind::Ensemble {
        let detail = format!(
            "`{}:{}` is an ensemble, and a PEFT adapter holds one prompt; download the file itself from `content`",
            version.prompt, version.version
        );
        return Err(Problem::unprocessable("not_a_prompt", detail));
    }
    let bytes = prompt_versions::content(&mut conn, &version.digest)
        .await?
        .ok_or(DbError::RowCount(0))?;
    let backbone = match &version.backbone_digest {
        Some(digest) => backbones::find_by_digest(&mut conn, caller.project_id, digest).await?,
        None => Vec::new(),
    };
    let layers = backbone.first().map(|backbone| Layers {
        num_layers: backbone.config.depth,
        num_attention_heads: backbone.config.num_heads,
    });
    drop(conn);
    let name = format!("{}-{}-peft.tar", version.prompt, version.version);
    // Stored files were checked when they were uploaded.
    let (bytes, file) = prompt_files::read(bytes).await?;
    let packing = tokio::task::spawn_blocking(move || {
        let adapter = peft::export(&bytes, &file, version.training.as_ref(), layers)?;
        Ok(archive::pack(&adapter))
    });
    let packed = packing.await.map_err(Problem::internal)?;
    let packed = packed.map_err(refuse_adapter)?;
    let headers = [
        (header::CONTENT_TYPE, TAR.to_owned()),
        (
            header::CONTENT_DISPOSITION,
            format!("attachment; filename=\"{name}\""),
        ),
    ];
    Ok((headers, packed))
}
