//! `/v1/prompts/{name}/versions`: the immutable versions published under a name.

use axum::Json as JsonResponse;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::HeaderMap;
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::db::DbError;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::extract::{Body, Path, Query, media_type, unsupported_media_type};
use crate::http::page::{Page, PageQuery};
use crate::http::prompt_files;
use crate::http::prompt_files::MissingMetadata;
use crate::http::prompts::{existing, locked, not_found};
use crate::http::{AppState, HttpSettings};
use crate::registry::prompt_versions;
use crate::registry::prompt_versions::{NewVersion, PromptVersion, VersionFile};
use crate::registry::prompts;
use promptweave_domain::prediction::Model;
use promptweave_domain::reference::{Reference, ResourceName, VersionSelector};

pub(super) const PROMPT_FILE: &str = "application/vnd.prompt+safetensors";

pub fn router(settings: &HttpSettings) -> OpenApiRouter<AppState> {
    let upload = OpenApiRouter::new()
        .routes(routes!(publish_version, list_versions))
        .layer(DefaultBodyLimit::max(settings.max_upload_bytes));
    OpenApiRouter::new()
        .routes(routes!(get_version))
        .routes(routes!(deprecate_version))
        .routes(routes!(undeprecate_version))
        .merge(upload)
}

/// A version, and the URLs of what belongs to it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PublishedVersion {
    #[serde(flatten)]
    version: PromptVersion,
    urls: VersionUrls,
}

#[derive(Debug, Serialize, ToSchema)]
struct VersionUrls {
    #[serde(rename = "self")]
    this: String,
    /// The URL of the file.
    content: String,
    /// What the version was made of, if it was composed; with `?direction=down`, what was made with it.
    lineage: String,
    /// The version as a PEFT adapter, unless it is deep or an ensemble.
    peft: String,
}

impl From<PromptVersion> for PublishedVersion {
    fn from(version: PromptVersion) -> Self {
        let this = format!(
            "/v1/prompts/{}/versions/{}",
            version.prompt, version.version
        );
        Self {
            version,
            urls: VersionUrls {
                content: format!("{this}/content"),
                lineage: format!("{this}/lineage"),
                peft: format!("{this}/peft"),
                this,
            },
        }
    }
}

impl PublishedVersion {
    pub(super) fn location(&self) -> &str {
        &self.urls.this
    }
}

/// A safetensors file.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "it exists for the API document alone")]
pub(super) struct PromptFileBytes(Vec<u8>);

/// Publish a version: the body is a prompt file or an ensemble file
///
/// A prompt file is safetensors with `prompt_embeddings` `[m, d]` in f32, f16 or bf16. It may also have
/// `deep_prompt_embeddings` `[L-1, m, d]`, `head.weight` `[K, d]` with `head.bias` `[K]`, and `sketch.features`
/// `[n, d]` with `sketch.labels` `[n]`. An ensemble file is safetensors as `promptweave compose` writes it: for member i
/// it has `i.prompt_embeddings`, `i.head.weight` and `i.head.bias`. Uploading the same bytes again answers 200 with the
/// existing version.
#[utoipa::path(
    post,
    path = "/prompts/{name}/versions",
    tag = "prompts",
    security(("api_key" = ["write"])),
    params(("name" = String, Path), MissingMetadata),
    request_body(
        description = "The file",
        content(
            (PromptFileBytes = "application/vnd.prompt+safetensors"),
            (PromptFileBytes = "application/octet-stream"),
        ),
    ),
    responses(
        (status = 201, body = PublishedVersion, headers(("location" = String), ("etag" = String))),
        (status = 200, description = "These bytes are a version already", body = PublishedVersion),
        (status = 404, description = "`prompt_not_found`"),
        (status = 413, description = "`body_too_large`"),
        (status = 415, description = "`unsupported_format` (a pickle, a zip, a NumPy array, …: the \
            detail names it, and how to convert it), `unsupported_media_type`"),
        (status = 422, description = "`not_safetensors`, `header_too_long`, `unknown_tensor`, \
            `missing_tensor`, `wrong_dtype`, `wrong_shape`, `not_finite`, `wrong_label`, \
            `invalid_metadata`, `unsupported_format_version`, `metadata_conflict`, \
            `width_mismatch`, `depth_mismatch`, `preprocessing_mismatch`"),
    )
)]
async fn publish_version(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
    Query(missing): Query<MissingMetadata>,
    headers: HeaderMap,
    Body(bytes): Body,
) -> Result<impl IntoResponse, Problem> {
    let kind = media_type(&headers);
    if let Some(other) = kind.as_deref()
        && ![PROMPT_FILE, "application/octet-stream"].contains(&other)
    {
        return Err(unsupported_media_type(
            Some(other),
            &format!("`{PROMPT_FILE}`"),
        ));
    }
    let (bytes, model) = prompt_files::read_any(bytes).await?;
    let metadata;
    let file = match &model {
        Model::Prompt(file) => {
            metadata = missing.complete(file.metadata.as_ref())?;
            VersionFile::Prompt {
                file,
                metadata: &metadata,
            }
        }
        Model::Ensemble(file) => {
            missing.agree_with(file)?;
            VersionFile::Ensemble(file)
        }
    };

    let mut transaction = state.pool.begin().await?;
    let prompt_id = prompts::find_id(&mut transaction, caller.project_id, &name)
        .await?
        .ok_or_else(|| not_found(&name))?;
    prompt_files::check_backbone(&mut transaction, caller.project_id, file).await?;
    let new = NewVersion {
        prompt_id,
        bytes: &bytes,
        file,
        produced_by_job: None,
        parents: &[],
    };
    let (version, created) =
        prompt_versions::insert(&mut transaction, caller.project_id, new).await?;
    transaction.commit().await?;

    Ok(prompt_files::published(version, created))
}

/// List a prompt's versions, newest first, with deprecated ones
#[utoipa::path(
    get,
    path = "/prompts/{name}/versions",
    tag = "prompts",
    security(("api_key" = ["read"])),
    params(("name" = String, Path), PageQuery),
    responses(
        (status = 200, body = Page<PublishedVersion>),
        (status = 404, description = "`prompt_not_found`"),
    )
)]
async fn list_versions(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
    Query(page): Query<PageQuery>,
) -> Result<JsonResponse<Page<PublishedVersion>>, Problem> {
    let (before, limit) = (page.after::<i32>()?, page.limit()?);
    let mut conn = state.pool.acquire().await?;
    existing(&mut conn, caller.project_id, &name).await?;
    let found = prompt_versions::list(&mut conn, caller.project_id, &name, before, limit).await?;
    let published = found.into_iter().map(PublishedVersion::from).collect();
    Ok(JsonResponse(
        page.page(published, |it: &PublishedVersion| {
            it.version.version.to_string()
        })?,
    ))
}

// ---- One version ---------------------------------------------------------------------------

/// The parameters of every path below.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(super) struct VersionPath {
    #[param(value_type = String)]
    name: ResourceName,
    /// A number, an alias, or `sha256:` and 64 hex digits.
    #[serde(rename = "ref")]
    #[param(example = "1")]
    selector: String,
}

impl VersionPath {
    /// Whether the selector always means the same bytes.
    pub(super) fn is_immutable(&self) -> bool {
        use VersionSelector::{Digest, Number};
        matches!(self.selector.parse(), Ok(Number(_) | Digest(_)))
    }

    pub(super) async fn resolve(
        self,
        conn: &mut PgConnection,
        project_id: Uuid,
    ) -> Result<PromptVersion, Problem> {
        let version: VersionSelector = self.selector.parse().map_err(
            |error: promptweave_domain::reference::InvalidReference| {
                Problem::field("invalid_reference", "/ref", error.to_string())
            },
        )?;
        let reference = Reference {
            name: self.name,
            version,
        };
        if let Some(found) = prompt_versions::resolve(conn, project_id, &reference).await? {
            return Ok(found);
        }
        existing(conn, project_id, &reference.name).await?;
        Err(Problem::not_found(
            "version_not_found",
            format!("there is no version `{reference}`"),
        ))
    }
}

/// Get a version by number, alias or digest
#[utoipa::path(
    get,
    path = "/prompts/{name}/versions/{ref}",
    tag = "prompts",
    security(("api_key" = ["read"])),
    params(VersionPath),
    responses(
        (status = 200, body = PublishedVersion),
        (status = 404, description = "`prompt_not_found`, `version_not_found`"),
    )
)]
async fn get_version(
    State(state): State<AppState>,
    caller: Caller,
    Path(path): Path<VersionPath>,
) -> Result<JsonResponse<PublishedVersion>, Problem> {
    let mut conn = state.pool.acquire().await?;
    let version = path.resolve(&mut conn, caller.project_id).await?;
    Ok(JsonResponse(version.into()))
}

/// Deprecate a version: a bare name no longer means it, but it stays readable by number, alias and digest
#[utoipa::path(
    post,
    path = "/prompts/{name}/versions/{ref}/deprecate",
    tag = "prompts",
    security(("api_key" = ["write"])),
    params(VersionPath),
    responses(
        (status = 200, body = PublishedVersion),
        (status = 404, description = "`prompt_not_found`, `version_not_found`"),
    )
)]
async fn deprecate_version(
    State(state): State<AppState>,
    caller: Caller,
    Path(path): Path<VersionPath>,
) -> Result<JsonResponse<PublishedVersion>, Problem> {
    set_deprecated(&state, &caller, path, true).await
}

/// Undo a deprecation: a bare name means the version again if it is the newest
#[utoipa::path(
    post,
    path = "/prompts/{name}/versions/{ref}/undeprecate",
    tag = "prompts",
    security(("api_key" = ["write"])),
    params(VersionPath),
    responses(
        (status = 200, body = PublishedVersion),
        (status = 404, description = "`prompt_not_found`, `version_not_found`"),
    )
)]
async fn undeprecate_version(
    State(state): State<AppState>,
    caller: Caller,
    Path(path): Path<VersionPath>,
) -> Result<JsonResponse<PublishedVersion>, Problem> {
    set_deprecated(&state, &caller, path, false).await
}

async fn set_deprecated(
    state: &AppState,
    caller: &Caller,
    path: VersionPath,
    deprecated: bool,
) -> Result<JsonResponse<PublishedVersion>, Problem> {
    let mut transaction = state.pool.begin().await?;
    locked(&mut transaction, caller.project_id, &path.name).await?;
    let version = path.resolve(&mut transaction, caller.project_id).await?;
    prompt_versions::set_deprecated(&mut transaction, caller.project_id, &version, deprecated)
        .await?;
    let reference = Reference {
        name: version.prompt,
        version: VersionSelector::Number(version.version),
    };
    let set = prompt_versions::resolve(&mut transaction, caller.project_id, &reference).await?;
    transaction.commit().await?;
    Ok(JsonResponse(set.ok_or(DbError::RowCount(0))?.into()))
}
