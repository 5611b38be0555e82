//! `/livez`: the process answers. `/readyz`: it can work, because the database is reachable and has this program's
//! schema.

use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::db::MIGRATOR;
use crate::http::AppState;
use crate::http::error::Problem;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(livez))
        .routes(routes!(readyz))
}

#[derive(Debug, Serialize, ToSchema)]
struct Health {
    #[schema(example = "ok")]
    status: &'static str,
}

const OK: axum::Json<Health> = axum::Json(Health { status: "ok" });

/// Check that the process answers
#[utoipa::path(get, path = "/livez", tag = "health", responses((status = 200, body = Health)))]
async fn livez() -> axum::Json<Health> {
    OK
}

/// Check that the server can work: its database is reachable and migrated
#[utoipa::path(
    get,
    path = "/readyz",
    tag = "health",
    responses(
        (status = 200, body = Health),
        (status = 503, description = "`database_unavailable`, `not_migrated`"),
    )
)]
async fn readyz(State(state): State<AppState>) -> Result<axum::Json<Health>, Problem> {
    let newest = MIGRATOR.iter().map(|m| m.version).max();
    // This query is not checked at build time: the table is sqlx's own, and is missing before the first migration.
    let applied: Result<Option<i64>, sqlx::Error> =
        sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success")
            .fetch_one(&state.pool)
            .await;
    const UNDEFINED_TABLE: &str = "42P01";
    let applied = match applied {
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some(UNDEFINED_TABLE) => {
            None
        }
        other => other?,
    };
    // A newer schema is fine: migrations only go forward, and the next release may be starting.
    if applied >= newest {
        return Ok(OK);
    }
    Err(Problem::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "not_migrated",
        "the database lacks migrations of this version; run `promptweave migrate`",
    )
    .retry_after(5))
}
