//! The operations that every kind of job has: list, get, result, events, cancel and retry.

/// Makes these operations of a kind of job, with their documents, and `router()`, which has them all. A kind that is
/// used by this adds its own POST.
///
/// `gone` is an answer more that a retry may have, with its description.
macro_rules! job_operations {
    (
        $spec:ident => $response:ident, $result:ident;
        one: $one:literal, a: $a:literal,
        result: $about_result:literal,
        events: $about_events:literal,
        retry: $about_retry:literal,
        $(gone: $gone:literal,)?
    ) => {
        use axum::Json as JsonResponse;
        use axum::extract::State;
        use axum::http::HeaderMap;
        use axum::response::Response;
        use utoipa_axum::router::OpenApiRouter;
        use utoipa_axum::routes;
        use uuid::Uuid;

        use crate::http::AppState;
        use crate::http::access::Caller;
        use crate::http::error::Problem;
        use crate::http::extract::{Path, Query};
        use crate::http::jobs;
        use crate::http::jobs::WaitQuery;
        use crate::http::jobs::events::{EventQuery, Events};
        use crate::http::page::{Page, PageQuery};

        pub(in crate::http) fn router() -> OpenApiRouter<AppState> {
            OpenApiRouter::new()
                .routes(routes!(list))
                .routes(routes!(get))
                .routes(routes!(result))
                .routes(routes!(events))
                .routes(routes!(cancel))
                .routes(routes!(retry))
        }

        #[utoipa::path(
            get,
            path = concat!("/", $one, "s"),
            operation_id = concat!("list_", $one, "s"),
            summary = concat!("List ", $one, "s, the newest first"),
            tag = concat!($one, "s"),
            security(("api_key" = ["read"])),
            params(PageQuery),
            responses((status = 200, description = concat!("A page of ", $one, "s"), body = Page<$response>))
        )]
        async fn list(
            State(state): State<AppState>,
            caller: Caller,
            Query(query): Query<PageQuery>,
        ) -> Result<JsonResponse<Page<$response>>, Problem> {
            jobs::list::<$spec>(&state, &caller, &query).await
        }

        #[utoipa::path(
            get,
            path = concat!("/", $one, "s/{id}"),
            operation_id = concat!("get_", $one),
            summary = concat!("Get ", $a, "'s state and progress"),
            description = concat!(
                "`Retry-After` is sent until the ", $one, " is over: poll again after so many seconds, or use `wait` \
                 instead of polling."
            ),
            tag = concat!($one, "s"),
            security(("api_key" = ["read"])),
            params(("id" = Uuid, Path), WaitQuery),
            responses(
                (status = 200, description = concat!("The ", $one), body = $response),
                (status = 404, description = concat!("`", $one, "_not_found`")),
            )
        )]
        async fn get(
            State(state): State<AppState>,
            caller: Caller,
            Path(id): Path<Uuid>,
            Query(wait): Query<WaitQuery>,
        ) -> Result<Response, Problem> {
            jobs::get::<$spec>(&state, &caller, id, wait).await
        }

        #[utoipa::path(
            get,
            path = concat!("/", $one, "s/{id}/result"),
            operation_id = concat!("get_", $one, "_result"),
            summary = $about_result,
            tag = concat!($one, "s"),
            security(("api_key" = ["read"])),
            params(("id" = Uuid, Path)),
            responses(
                (status = 200, description = concat!("The result of the ", $one), body = $result),
                (status = 404, description = concat!("`", $one, "_not_found`")),
                (status = 409, description = concat!(
                    "`", $one, "_not_finished`, `", $one, "_failed`, `", $one, "_cancelled`"
                )),
            )
        )]
        async fn result(
            State(state): State<AppState>,
            caller: Caller,
            Path(id): Path<Uuid>,
        ) -> Result<JsonResponse<$result>, Problem> {
            jobs::result::<$spec>(&state, &caller, id).await
        }

        #[utoipa::path(
            get,
            path = concat!("/", $one, "s/{id}/events"),
            operation_id = concat!("list_", $one, "_events"),
            summary = concat!("List ", $a, "'s events, in order"),
            description = concat!(
                "With `Accept: text/event-stream`, the answer is a stream of server-sent events that ends with the ",
                $one, ". Each event has its number as `id` and its kind as `event`. `progress` events without an `id` \
                 come between them, with the `progress` of the ", $one, " as data. A client that reconnects with \
                 `Last-Event-ID` misses no event.", $about_events
            ),
            tag = concat!($one, "s"),
            security(("api_key" = ["read"])),
            params(
                ("id" = Uuid, Path),
                EventQuery,
                ("last-event-id" = Option<i32>, Header, minimum = 0,
                 description = "The last event that came, of a stream; goes before `after`"),
            ),
            responses(
                (status = 200, description = "Events after `after`: a page, or a stream until the end",
                 content((Events = "application/json"), (String = "text/event-stream"))),
                (status = 204, description = "Of a stream: it is over, and there is nothing after \
                    `Last-Event-ID`; a client need not come back"),
                (status = 404, description = concat!("`", $one, "_not_found`")),
            )
        )]
        async fn events(
            State(state): State<AppState>,
            caller: Caller,
            Path(id): Path<Uuid>,
            Query(query): Query<EventQuery>,
            headers: HeaderMap,
        ) -> Result<Response, Problem> {
            jobs::events::list::<$spec>(state, &caller, id, query, &headers).await
        }

        #[utoipa::path(
            post,
            path = concat!("/", $one, "s/{id}/cancel"),
            operation_id = concat!("cancel_", $one),
            summary = concat!("Cancel ", $a),
            description = "If it waits, it is cancelled immediately. If it runs, it stops at its next step.",
            tag = concat!($one, "s"),
            security(("api_key" = ["run"])),
            params(("id" = Uuid, Path)),
            responses(
                (status = 200, description = "It is cancelled", body = $response),
                (status = 202, description = "It was asked to stop", body = $response),
                (status = 404, description = concat!("`", $one, "_not_found`")),
                (status = 409, description = concat!("`", $one, "_over`: it has succeeded or failed")),
            )
        )]
        async fn cancel(
            State(state): State<AppState>,
            caller: Caller,
            Path(id): Path<Uuid>,
        ) -> Result<Response, Problem> {
            jobs::actions::cancel::<$spec>(&state, &caller, id).await
        }

        #[utoipa::path(
            post,
            path = concat!("/", $one, "s/{id}/retry"),
            operation_id = concat!("retry_", $one),
            summary = concat!("Retry ", $a),
            description = $about_retry,
            tag = concat!($one, "s"),
            security(("api_key" = ["run"])),
            params(("id" = Uuid, Path)),
            responses(
                (status = 202, body = $response, headers(("retry-after" = u32))),
                (status = 404, description = concat!("`", $one, "_not_found`")),
                (status = 409, description = concat!(
                    "`", $one, "_not_over` (it waits or runs), `", $one, "_over` (it has succeeded)"
                )),
                $((status = 410, description = $gone),)?
            )
        )]
        async fn retry(
            State(state): State<AppState>,
            caller: Caller,
            Path(id): Path<Uuid>,
        ) -> Result<Response, Problem> {
            jobs::actions::retry::<$spec>(&state, &caller, id).await
        }
    };
}

pub(in crate::http) use job_operations;
