//! `/v1/webhooks`: receivers that are notified when a job ends. Their messages are in
//! [`webhook_deliveries`](crate::http::webhook_deliveries).

use axum::Json as JsonResponse;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use secrecy::ExposeSecret as _;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::PgConnection;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::extract::{Json, Path, Query, read_value};
use crate::http::page::{Page, PageQuery};
use crate::remote::network::{Network, NotPublic, Verdict};
use crate::webhooks::deliveries::Delivery;
use crate::webhooks::outbox;
use crate::webhooks::registered;
use crate::webhooks::registered::{Settings, Webhook};
use promptweave_domain::merge_patch;
use promptweave_domain::webhook::{EventType, EventTypes, WebhookSecret, WebhookUrl};

const MAX_DESCRIPTION: usize = 512;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_webhook, list_webhooks))
        .routes(routes!(get_webhook, change_webhook, delete_webhook))
        .routes(routes!(test_webhook))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateWebhook {
    /// The URL that messages are POSTed to. It must be a public address, unless the operator allows another.
    #[schema(value_type = String, max_length = 2048, pattern = "^https?://", example = "https://receiver.example/promptweave")]
    url: WebhookUrl,
    #[serde(default)]
    #[schema(max_length = 512, example = "tells the nightly build")]
    description: String,
    /// The events that the webhook is sent; all of them by default.
    #[serde(default)]
    #[schema(value_type = Option<Vec<EventType>>, min_items = 1)]
    event_types: EventTypes,
    /// The secret that messages are signed with: `whsec_` and 24 to 64 bytes in base64. One is generated if none is
    /// given.
    #[schema(value_type = Option<String>, pattern = "^whsec_[A-Za-z0-9+/]{32,86}={0,2}$", example = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD")]
    secret: Option<WebhookSecret>,
}

/// A webhook with its secret, which is shown only this once.
#[derive(Serialize, ToSchema)]
struct NewWebhook {
    #[schema(example = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD")]
    secret: String,
    #[serde(flatten)]
    webhook: Webhook,
}

/// A merge patch (RFC 7396): a field that is left out stays.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it exists for the API document alone")]
struct ChangeWebhook {
    #[schema(
        max_length = 2048,
        pattern = "^https?://",
        example = "https://receiver.example/promptweave"
    )]
    url: Option<String>,
    #[schema(max_length = 512)]
    description: Option<String>,
    #[schema(min_items = 1)]
    event_types: Option<Vec<EventType>>,
    /// While a webhook is disabled, nothing is sent to it and no new messages are kept for it. Waiting messages are
    /// sent afterwards.
    disabled: Option<bool>,
}

/// Refuses a URL that messages could never be delivered to. A host name is resolved and checked when a message is sent.
fn check(settings: &Settings, network: &Network) -> Result<(), Problem> {
    let url = settings.url.url();
    if network.verdict(url) == Verdict::Refused {
        let refused = NotPublic(url.host_str().unwrap_or_default().to_owned());
        let detail = format!(
            "{refused}; name a host that is reached from everywhere, or ask whoever runs the server to open \
             this one (--allow-network)"
        );
        return Err(Problem::field("address_not_public", "/url", detail));
    }
    if settings.description.chars().count() > MAX_DESCRIPTION {
        let detail = format!("has more than {MAX_DESCRIPTION} characters");
        return Err(Problem::field("invalid_body", "/description", detail));
    }
    Ok(())
}

pub(super) async fn existing(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
) -> Result<Webhook, Problem> {
    let found = registered::find(conn, project_id, id).await?;
    found.ok_or_else(|| not_found(id))
}

/// The webhook, if it exists and is enabled.
pub(super) async fn enabled(
    conn: &mut PgConnection,
    project_id: Uuid,
    id: Uuid,
) -> Result<Webhook, Problem> {
    let webhook = existing(conn, project_id, id).await?;
    if webhook.disabled_at.is_some() {
        let detail = format!(
            "webhook {id} is disabled, by its owner or because its receiver answered 410; enable it with PATCH \
             {{\"disabled\": false}}"
        );
        return Err(Problem::conflict("webhook_disabled", detail));
    }
    Ok(webhook)
}

fn not_found(id: Uuid) -> Problem {
    let detail = format!("there is no webhook {id}; `GET /v1/webhooks` lists what there is");
    Problem::not_found("webhook_not_found", detail)
}

/// Register a receiver of this project's events; only this answer shows the secret
///
/// Messages are signed according to Standard Webhooks (standardwebhooks.com), and sent at least once.
#[utoipa::path(
    post,
    path = "/webhooks",
    tag = "webhooks",
    security(("api_key" = ["admin"])),
    request_body = CreateWebhook,
    responses(
        (status = 201, body = NewWebhook, headers(("location" = String))),
        (status = 409, description = "`too_many_webhooks`: the project has 100"),
        (status = 422, description = "`invalid_body`, `address_not_public`"),
    )
)]
async fn create_webhook(
    State(state): State<AppState>,
    caller: Caller,
    Json(body): Json<CreateWebhook>,
) -> Result<impl IntoResponse, Problem> {
    let settings = Settings {
        url: body.url,
        description: body.description,
        event_types: body.event_types,
        disabled: false,
    };
    check(&settings, &state.settings.network)?;
    let secret = match body.secret {
        Some(secret) => secret,
        None => WebhookSecret::generate().map_err(Problem::internal)?,
    };
    let (id, project_id) = (state.clock.new_id(), caller.project_id);
    let mut conn = state.pool.acquire().await?;
    if !registered::insert(&mut conn, project_id, id, &settings, &secret).await? {
        let most = registered::MOST;
        let detail = format!("this project has {most} webhooks, and no more are kept; delete one");
        return Err(Problem::conflict("too_many_webhooks", detail));
    }
    let made = NewWebhook {
        secret: secret.text().expose_secret().to_owned(),
        webhook: existing(&mut conn, project_id, id).await?,
    };
    let headers = [
        (header::LOCATION, format!("/v1/webhooks/{id}")),
        (header::CACHE_CONTROL, "no-store".to_owned()),
    ];
    Ok((StatusCode::CREATED, headers, JsonResponse(made)))
}

/// List this project's webhooks, newest first, without secrets
#[utoipa::path(
    get,
    path = "/webhooks",
    tag = "webhooks",
    security(("api_key" = ["admin"])),
    params(PageQuery),
    responses((status = 200, body = Page<Webhook>))
)]
async fn list_webhooks(
    State(state): State<AppState>,
    caller: Caller,
    Query(page): Query<PageQuery>,
) -> Result<JsonResponse<Page<Webhook>>, Problem> {
    let (before, limit) = (page.after::<Uuid>()?, page.limit()?);
    let mut conn = state.pool.acquire().await?;
    let found = registered::list(&mut conn, caller.project_id, before, limit).await?;
    Ok(JsonResponse(
        page.page(found, |webhook| webhook.id.to_string())?,
    ))
}

/// Get a webhook by id, without its secret
#[utoipa::path(
    get,
    path = "/webhooks/{id}",
    tag = "webhooks",
    security(("api_key" = ["admin"])),
    params(("id" = Uuid, Path)),
    responses(
        (status = 200, body = Webhook),
        (status = 404, description = "`webhook_not_found`"),
    )
)]
async fn get_webhook(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Result<JsonResponse<Webhook>, Problem> {
    let mut conn = state.pool.acquire().await?;
    Ok(JsonResponse(
        existing(&mut conn, caller.project_id, id).await?,
    ))
}

/// Change a webhook's URL or events, or disable or enable it
#[utoipa::path(
    patch,
    path = "/webhooks/{id}",
    tag = "webhooks",
    security(("api_key" = ["admin"])),
    params(("id" = Uuid, Path)),
    request_body(content = ChangeWebhook, content_type = "application/merge-patch+json"),
    responses(
        (status = 200, description = "It is so now", body = Webhook),
        (status = 404, description = "`webhook_not_found`"),
        (status = 422, description = "`invalid_body`, `address_not_public`"),
    )
)]
async fn change_webhook(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
    Json(patch): Json<Map<String, Value>>,
) -> Result<JsonResponse<Webhook>, Problem> {
    let project_id = caller.project_id;
    let mut tx = state.pool.begin().await?;
    registered::lock(&mut tx, project_id, id).await?;
    let current = Settings::from(existing(&mut tx, project_id, id).await?);
    let changed = patched(&current, patch)?;
    check(&changed, &state.settings.network)?;
    registered::change(&mut tx, project_id, id, &changed).await?;
    let webhook = existing(&mut tx, project_id, id).await?;
    tx.commit().await?;
    Ok(JsonResponse(webhook))
}

fn patched(current: &Settings, patch: Map<String, Value>) -> Result<Settings, Problem> {
    let Ok(Value::Object(mut json)) = serde_json::to_value(current) else {
        unreachable!("a struct is an object");
    };
    merge_patch::apply(&mut json, patch);
    read_value(&Value::Object(json))
}

/// Delete a webhook with its deliveries; a message that is being sent may still arrive
#[utoipa::path(
    delete,
    path = "/webhooks/{id}",
    tag = "webhooks",
    security(("api_key" = ["admin"])),
    params(("id" = Uuid, Path)),
    responses(
        (status = 204, description = "It is told nothing any more"),
        (status = 404, description = "`webhook_not_found`"),
    )
)]
async fn delete_webhook(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Result<StatusCode, Problem> {
    let mut conn = state.pool.acquire().await?;
    if !registered::delete(&mut conn, caller.project_id, id).await? {
        return Err(not_found(id));
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Send a message of type `webhook.test`, whatever events the webhook is sent
#[utoipa::path(
    post,
    path = "/webhooks/{id}/test",
    tag = "webhooks",
    security(("api_key" = ["admin"])),
    params(("id" = Uuid, Path)),
    responses(
        (status = 202, description = "It waits to be sent", body = Delivery, headers(("location" = String))),
        (status = 404, description = "`webhook_not_found`"),
        (status = 409, description = "`webhook_disabled`"),
    )
)]
async fn test_webhook(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
) -> Result<impl IntoResponse, Problem> {
    let delivery_id = state.clock.new_id();
    let mut conn = state.pool.acquire().await?;
    enabled(&mut conn, caller.project_id, id).await?;
    if !outbox::test(&mut conn, caller.project_id, id, delivery_id).await? {
        return Err(not_found(id));
    }
    crate::http::webhook_deliveries::accepted(&mut conn, caller.project_id, id, delivery_id).await
}
