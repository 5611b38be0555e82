//! `/v1/prompts`: the names that prompt versions are published under, and searching them.

use std::collections::BTreeMap;

use axum::Json as JsonResponse;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::conditional::Preconditions;
use crate::http::error::Problem;
use crate::http::extract::{Json, Path, Query, escape};
use crate::http::page::{Page, PageQuery};
use crate::registry::backbones;
use crate::registry::prompts;
use crate::registry::prompts::{Facet, Prompt};
use promptweave_domain::digest::Digest;
use promptweave_domain::prompt_description::PromptDescription;
use promptweave_domain::reference::{AliasName, ResourceName};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_prompt, list_prompts))
        .routes(routes!(get_prompt))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreatePrompt {
    #[schema(value_type = String, pattern = "^[a-z0-9][a-z0-9._-]{0,127}$", example = "dtd")]
    name: ResourceName,
    #[serde(default)]
    #[schema(max_length = 4096)]
    description: String,
    #[serde(default)]
    tags: BTreeMap<String, String>,
    /// Any JSON object of at most 16 KiB.
    #[serde(default)]
    #[schema(value_type = Object)]
    metadata: Map<String, Value>,
    /// The model card, in Markdown.
    #[serde(default)]
    #[schema(max_length = 65536)]
    card: String,
}

/// A prompt with the fields that lists leave out.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DescribedPrompt {
    #[serde(flatten)]
    prompt: Prompt,
    /// Any JSON object.
    #[schema(value_type = Object)]
    metadata: Map<String, Value>,
    /// The model card, in Markdown.
    card: String,
}

impl DescribedPrompt {
    pub(super) fn new(prompt: Prompt, description: PromptDescription) -> Self {
        let PromptDescription { metadata, card, .. } = description;
        Self {
            prompt,
            metadata,
            card,
        }
    }

    pub(super) fn into_response(self, status: StatusCode) -> Response {
        let etag = [(header::ETAG, etag(&self.prompt))];
        (status, etag, JsonResponse(self)).into_response()
    }
}

pub(super) fn etag(prompt: &Prompt) -> String {
    format!("\"{}\"", prompt.revision)
}

pub(super) fn check_description(description: &PromptDescription) -> Result<(), Problem> {
    description.check().map_err(|broken| {
        let pointer: String = broken
            .path
            .iter()
            .map(|part| format!("/{}", escape(part)))
            .collect();
        Problem::field("invalid_body", pointer, broken.rule)
    })
}

/// Create a prompt, which versions are then published under
#[utoipa::path(
    post,
    path = "/prompts",
    tag = "prompts",
    security(("api_key" = ["write"])),
    request_body = CreatePrompt,
    responses(
        (status = 201, body = DescribedPrompt, headers(("location" = String), ("etag" = String))),
        (status = 409, description = "`name_taken`, `prompt_deleted`: names are not given again"),
        (status = 422, description = "`invalid_body`, `reserved_name`"),
    )
)]
async fn create_prompt(
    State(state): State<AppState>,
    caller: Caller,
    Json(body): Json<CreatePrompt>,
) -> Result<Response, Problem> {
    let description = PromptDescription {
        description: body.description,
        tags: body.tags,
        metadata: body.metadata,
        card: body.card,
    };
    check_description(&description)?;
    let mut conn = state.pool.acquire().await?;
    let prompt = prompts::create(&mut conn, caller.project_id, &body.name, &description).await?;
    let location = [(header::LOCATION, format!("/v1/prompts/{}", prompt.name))];
    let created = DescribedPrompt::new(prompt, description);
    Ok((location, created.into_response(StatusCode::CREATED)).into_response())
}

/// Filters of the list; a prompt is listed if it passes all of them.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListPrompts {
    /// A tag as `key` or `key=value`. May be given several times; a prompt must have all of them.
    #[serde(default)]
    #[param(required = false, example = json!(["domain=texture"]))]
    tag: Vec<String>,
    /// Name or digest of a backbone that one of the versions is for.
    backbone: Option<String>,
    /// A task that one of the versions was tuned on; only the first 512 characters count.
    task: Option<String>,
    /// An alias that points to one of the versions.
    #[param(value_type = Option<String>)]
    alias: Option<AliasName>,
    /// The most items in the answer; 50 by default.
    #[param(minimum = 1, maximum = 200)]
    page_size: Option<u32>,
    /// `next_page_token` of the previous page.
    page_token: Option<String>,
}

impl ListPrompts {
    async fn facets(
        self,
        conn: &mut PgConnection,
        project_id: Uuid,
    ) -> Result<Vec<Facet>, Problem> {
        let mut facets: Vec<_> = self.tag.into_iter().map(Facet::Tag).collect();
        if let Some(backbone) = self.backbone {
            facets.push(Facet::Backbone(
                digest_of(conn, project_id, &backbone).await?,
            ));
        }
        facets.extend(self.task.map(Facet::Task));
        facets.extend(self.alias.map(Facet::Alias));
        Ok(facets)
    }
}

/// The digest of a backbone, given its name or digest. Prompts may be for a backbone that is not registered.
async fn digest_of(
    conn: &mut PgConnection,
    project_id: Uuid,
    backbone: &str,
) -> Result<Digest, Problem> {
    let refuse = |detail: String| Problem::field("unknown_backbone", "/backbone", detail);
    if let Ok(digest) = backbone.parse() {
        return Ok(digest);
    }
    let Ok(name) = backbone.parse::<ResourceName>() else {
        let detail = "is neither a name nor `sha256:` and 64 hex digits".to_owned();
        return Err(refuse(detail));
    };
    let found = backbones::find(conn, project_id, &name).await?;
    found.map(|backbone| backbone.digest).ok_or_else(|| {
        refuse(format!(
            "there is no backbone `{name}`; see GET /v1/backbones"
        ))
    })
}

/// List prompts by name: all, or those with a given tag, alias, backbone or task
#[utoipa::path(
    get,
    path = "/prompts",
    tag = "prompts",
    security(("api_key" = ["read"])),
    params(ListPrompts),
    responses(
        (status = 200, body = Page<Prompt>),
        (status = 422, description = "`invalid_query`, `unknown_backbone`, `invalid_page_size`, \
            `invalid_page_token`"),
    )
)]
async fn list_prompts(
    State(state): State<AppState>,
    caller: Caller,
    Query(mut query): Query<ListPrompts>,
) -> Result<JsonResponse<Page<Prompt>>, Problem> {
    let page = PageQuery::new(query.page_size, query.page_token.take());
    let (after, limit) = (page.after::<ResourceName>()?, page.limit()?);
    let mut conn = state.pool.acquire().await?;
    let facets = query.facets(&mut conn, caller.project_id).await?;
    let found = prompts::list(&mut conn, caller.project_id, &facets, after.as_ref(), limit).await?;
    Ok(JsonResponse(
        page.page(found, |prompt| prompt.name.to_string())?,
    ))
}

/// Get a prompt by name, with its metadata and model card
#[utoipa::path(
    get,
    path = "/prompts/{name}",
    tag = "prompts",
    security(("api_key" = ["read"])),
    params(
        ("name" = String, Path),
        ("if-none-match" = Option<String>, Header, description = "ETag of a copy at hand"),
    ),
    responses(
        (status = 200, body = DescribedPrompt, headers(("etag" = String))),
        (status = 304, description = "The copy at hand is this one", headers(("etag" = String))),
        (status = 404, description = "`prompt_not_found`"),
    )
)]
async fn get_prompt(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
    preconditions: Preconditions,
) -> Result<Response, Problem> {
    let mut conn = state.pool.acquire().await?;
    let prompt = existing(&mut conn, caller.project_id, &name).await?;
    let etag = etag(&prompt);
    if preconditions.has_copy(&etag) {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response());
    }
    let description = prompts::description(&mut conn, caller.project_id, &prompt).await?;
    Ok(DescribedPrompt::new(prompt, description).into_response(StatusCode::OK))
}

/// [`existing`], with the row locked until the transaction ends.
pub(super) async fn locked(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
) -> Result<Prompt, Problem> {
    prompts::lock(conn, project_id, name)
        .await?
        .ok_or_else(|| not_found(name))
}

pub(super) async fn existing(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
) -> Result<Prompt, Problem> {
    prompts::find(conn, project_id, name)
        .await?
        .ok_or_else(|| not_found(name))
}

pub(super) fn not_found(name: &ResourceName) -> Problem {
    Problem::not_found("prompt_not_found", format!("there is no prompt `{name}`"))
}
