//! Changing a prompt's description, tags, metadata and card; deleting and restoring a prompt.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Map, Value};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::conditional::Preconditions;
use crate::http::error::Problem;
use crate::http::extract::{Json, Path, read_value};
use crate::http::prompts::{DescribedPrompt, check_description, etag, existing, locked};
use crate::registry::{deletion, prompts};
use promptweave_domain::merge_patch;
use promptweave_domain::prompt_description::PromptDescription;
use promptweave_domain::reference::ResourceName;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(change_prompt, delete_prompt))
        .routes(routes!(restore_prompt))
}

/// A merge patch (RFC 7396): a field that is left out stays, null removes it, tags and metadata are merged.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it exists for the API document alone")]
struct ChangePrompt {
    #[schema(max_length = 4096)]
    description: Option<String>,
    #[schema(example = json!({"domain": "texture", "old": null}))]
    tags: Option<BTreeMap<String, Option<String>>>,
    #[schema(value_type = Option<Object>)]
    metadata: Option<Map<String, Value>>,
    #[schema(max_length = 65536)]
    card: Option<String>,
}

/// Change a prompt's description, tags, metadata or model card
#[utoipa::path(
    patch,
    path = "/prompts/{name}",
    tag = "prompts",
    security(("api_key" = ["write"])),
    params(
        ("name" = String, Path),
        ("if-match" = Option<String>, Header, description = "ETag of the prompt as it was read, or `*`"),
    ),
    request_body(content = ChangePrompt, content_type = "application/merge-patch+json"),
    responses(
        (status = 200, description = "It is so now", body = DescribedPrompt, headers(("etag" = String))),
        (status = 404, description = "`prompt_not_found`"),
        (status = 412, description = "`precondition_failed`: it is another by now"),
        (status = 428, description = "`precondition_required`: send `If-Match`"),
    )
)]
async fn change_prompt(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
    preconditions: Preconditions,
    Json(patch): Json<Map<String, Value>>,
) -> Result<Response, Problem> {
    let mut tx = state.pool.begin().await?;
    let prompt = locked(&mut tx, caller.project_id, &name).await?;
    preconditions.check_change(Some(&etag(&prompt)))?;
    let current = prompts::description(&mut tx, caller.project_id, &prompt).await?;
    let changed = patched(&current, patch)?;
    if changed != current {
        prompts::describe(&mut tx, caller.project_id, &prompt, &changed).await?;
    }
    let prompt = existing(&mut tx, caller.project_id, &name).await?;
    tx.commit().await?;
    Ok(DescribedPrompt::new(prompt, changed).into_response(StatusCode::OK))
}

fn patched(
    current: &PromptDescription,
    patch: Map<String, Value>,
) -> Result<PromptDescription, Problem> {
    let Ok(Value::Object(mut json)) = serde_json::to_value(current) else {
        unreachable!("a struct is an object");
    };
    merge_patch::apply(&mut json, patch);
    let changed = read_value(&Value::Object(json))?;
    check_description(&changed)?;
    Ok(changed)
}

/// Delete a prompt that nothing refers to
///
/// The prompt is hidden, and its name stays taken; `restore` brings it back. These refer to a prompt: a protected
/// alias, a prompt that was composed or tuned from it, a job that has not ended.
#[utoipa::path(
    delete,
    path = "/prompts/{name}",
    tag = "prompts",
    security(("api_key" = ["write"])),
    params(
        ("name" = String, Path),
        ("if-match" = Option<String>, Header, description = "ETag of the prompt as it was read, or `*`"),
    ),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "`prompt_not_found`"),
        (status = 409, description = "`prompt_in_use`: the detail names who refers to it"),
        (status = 412, description = "`precondition_failed`: it is another by now"),
        (status = 428, description = "`precondition_required`: send `If-Match`"),
    )
)]
async fn delete_prompt(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
    preconditions: Preconditions,
) -> Result<StatusCode, Problem> {
    let mut tx = state.pool.begin().await?;
    let prompt = locked(&mut tx, caller.project_id, &name).await?;
    preconditions.check_change(Some(&etag(&prompt)))?;
    deletion::delete(&mut tx, caller.project_id, &prompt).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Restore a deleted prompt, with its versions and aliases
#[utoipa::path(
    post,
    path = "/prompts/{name}/restore",
    tag = "prompts",
    security(("api_key" = ["write"])),
    params(("name" = String, Path)),
    responses(
        (status = 200, description = "It is there now, or was before", body = DescribedPrompt,
         headers(("etag" = String))),
        (status = 404, description = "`prompt_not_found`: it never was"),
    )
)]
async fn restore_prompt(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<ResourceName>,
) -> Result<Response, Problem> {
    let mut tx = state.pool.begin().await?;
    deletion::restore(&mut tx, caller.project_id, &name).await?;
    let prompt = existing(&mut tx, caller.project_id, &name).await?;
    let description = prompts::description(&mut tx, caller.project_id, &prompt).await?;
    tx.commit().await?;
    Ok(DescribedPrompt::new(prompt, description).into_response(StatusCode::OK))
}
