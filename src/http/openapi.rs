//! Routes and their document, from one list.

use axum::http::Method;
use utoipa::OpenApi as _;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::path::Operation;
use utoipa::openapi::{OpenApi, Ref, RefOr, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;

use super::access::{self, RequiredScopes};
use super::error::ProblemDocument;
use super::{
    AppState, HttpSettings, backbones, datasets, ensembles, health, peft, prompt_versions, prompts,
    workers,
};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "promptweave",
        description = "A registry for visual prompts, with workers that learn which of them help \
                       a new task, and how much of each.",
        license(name = "MIT", identifier = "MIT"),
    ),
    components(schemas(ProblemDocument)),
    tags(
        (name = "prompts", description = "Prompt assets and their immutable versions"),
        (name = "backbones", description = "Frozen vision transformers that prompts are made for"),
        (name = "datasets", description = "Labelled images, the targets of ensembles"),
        (name = "ensembles", description = "Jobs that weigh prompts for a target and compose them"),
        (name = "workers", description = "The processes that run jobs"),
        (name = "health", description = "Whether the server answers, and whether it can work"),
    )
)]
struct Document;

/// Every route with its documentation, and the scopes that this asks for. A new resource is added
/// here and as a tag above.
pub(super) fn routes(settings: &HttpSettings) -> (OpenApiRouter<AppState>, RequiredScopes) {
    let v1 = OpenApiRouter::new()
        .merge(prompts::router())
        .merge(prompt_versions::router(settings))
        .merge(peft::router(settings))
        .merge(backbones::router())
        .merge(datasets::router())
        .merge(ensembles::router())
        .merge(workers::router());
    let mut routes = OpenApiRouter::with_openapi(Document::openapi())
        .merge(health::router())
        .merge(workers::health_router())
        .nest("/v1", v1);
    let scopes = access::document(routes.get_openapi_mut());
    document_problems(routes.get_openapi_mut());
    (routes, scopes)
}

/// The API's document, as `/openapi.json` serves it.
pub fn openapi() -> OpenApi {
    routes(&HttpSettings::default()).0.into_openapi()
}

/// Every operation by method and path.
pub(super) fn operations(
    document: &mut OpenApi,
) -> impl Iterator<Item = (Method, &str, &mut Operation)> {
    document.paths.paths.iter_mut().flat_map(|(path, item)| {
        [
            (Method::GET, &mut item.get),
            (Method::POST, &mut item.post),
            (Method::PUT, &mut item.put),
            (Method::PATCH, &mut item.patch),
            (Method::DELETE, &mut item.delete),
        ]
        .into_iter()
        .filter_map(|(method, operation)| Some((method, path.as_str(), operation.as_mut()?)))
    })
}

/// Says of every operation that its errors, named or not, are problem documents.
fn document_problems(document: &mut OpenApi) {
    const PROBLEM: &str = "application/problem+json";
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("ProblemDocument")))
        .build();
    let any = ResponseBuilder::new().description("An error").build();
    for (_, _, operation) in operations(document) {
        let responses = &mut operation.responses.responses;
        responses
            .entry("default".to_owned())
            .or_insert_with(|| RefOr::T(any.clone()));
        for (status, response) in responses {
            let is_error = status.starts_with(['4', '5']) || status == "default";
            if let RefOr::T(response) = response
                && is_error
            {
                response
                    .content
                    .insert(PROBLEM.to_owned(), RefOr::T(content.clone()));
            }
        }
    }
}
