//! `/v1/webhooks/{id}/deliveries`: the messages sent to a webhook, their outcome, and sending them again.

use axum::Json as JsonResponse;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use sqlx::PgConnection;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::extract::{Path, Query};
use crate::http::page::{Page, PageQuery};
use crate::http::webhooks;
use crate::webhooks::deliveries;
use crate::webhooks::deliveries::Delivery;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_webhook_deliveries))
        .routes(routes!(get_webhook_delivery))
        .routes(routes!(redeliver))
}

async fn existing(
    conn: &mut PgConnection,
    project_id: Uuid,
    webhook_id: Uuid,
    id: Uuid,
) -> Result<Delivery, Problem> {
    let found = deliveries::find(conn, project_id, webhook_id, id).await?;
    found.ok_or_else(|| {
        let detail =
            format!("webhook {webhook_id} has no delivery {id}; they are kept for 30 days");
        Problem::not_found("delivery_not_found", detail)
    })
}

/// 202 with a delivery that waits to be sent.
pub(super) async fn accepted(
    conn: &mut PgConnection,
    project_id: Uuid,
    webhook_id: Uuid,
    id: Uuid,
) -> Result<Response, Problem> {
    let delivery = existing(conn, project_id, webhook_id, id).await?;
    let path = format!("/v1/webhooks/{webhook_id}/deliveries/{id}");
    let location = [(header::LOCATION, path)];
    Ok((StatusCode::ACCEPTED, location, JsonResponse(delivery)).into_response())
}

/// List a webhook's past and waiting deliveries, newest first
#[utoipa::path(
    get,
    path = "/webhooks/{id}/deliveries",
    tag = "webhooks",
    security(("api_key" = ["admin"])),
    params(("id" = Uuid, Path), PageQuery),
    responses(
        (status = 200, body = Page<Delivery>),
        (status = 404, description = "`webhook_not_found`"),
    )
)]
async fn list_webhook_deliveries(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<Uuid>,
    Query(page): Query<PageQuery>,
) -> Result<JsonResponse<Page<Delivery>>, Problem> {
    let (before, limit) = (page.after::<Uuid>()?, page.limit()?);
    let mut conn = state.pool.acquire().await?;
    webhooks::existing(&mut conn, caller.project_id, id).await?;
    let found = deliveries::list(&mut conn, caller.project_id, id, before, limit).await?;
    Ok(JsonResponse(
        page.page(found, |delivery| delivery.id.to_string())?,
    ))
}

/// Get a delivery by id
#[utoipa::path(
    get,
    path = "/webhooks/{id}/deliveries/{delivery_id}",
    tag = "webhooks",
    security(("api_key" = ["admin"])),
    params(("id" = Uuid, Path), ("delivery_id" = Uuid, Path)),
    responses(
        (status = 200, body = Delivery),
        (status = 404, description = "`webhook_not_found`, `delivery_not_found`"),
    )
)]
async fn get_webhook_delivery(
    State(state): State<AppState>,
    caller: Caller,
    Path((id, delivery_id)): Path<(Uuid, Uuid)>,
) -> Result<JsonResponse<Delivery>, Problem> {
    let mut conn = state.pool.acquire().await?;
    webhooks::existing(&mut conn, caller.project_id, id).await?;
    let delivery = existing(&mut conn, caller.project_id, id, delivery_id).await?;
    Ok(JsonResponse(delivery))
}

/// Send a message again now, with all its tries, whether or not it arrived
///
/// It keeps its `webhook-id`. A delivery that is being sent is left alone.
#[utoipa::path(
    post,
    path = "/webhooks/{id}/deliveries/{delivery_id}/redeliver",
    tag = "webhooks",
    security(("api_key" = ["admin"])),
    params(("id" = Uuid, Path), ("delivery_id" = Uuid, Path)),
    responses(
        (status = 202, description = "It waits to be sent", body = Delivery, headers(("location" = String))),
        (status = 404, description = "`webhook_not_found`, `delivery_not_found`"),
        (status = 409, description = "`webhook_disabled`"),
    )
)]
async fn redeliver(
    State(state): State<AppState>,
    caller: Caller,
    Path((id, delivery_id)): Path<(Uuid, Uuid)>,
) -> Result<Response, Problem> {
    let project_id = caller.project_id;
    let mut conn = state.pool.acquire().await?;
    webhooks::enabled(&mut conn, project_id, id).await?;
    deliveries::redeliver(&mut conn, project_id, id, delivery_id).await?;
    accepted(&mut conn, project_id, id, delivery_id).await
}
