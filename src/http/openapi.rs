//! Routes and their document, from one list.

use utoipa::OpenApi as _;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::{OpenApi, Ref, RefOr, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;

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

/// Every route with its documentation; a new resource is added here and as a tag above.
pub(super) fn routes(settings: &HttpSettings) -> OpenApiRouter<AppState> {
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
    document_problems(routes.get_openapi_mut());
    routes
}

/// The API's document, as `/openapi.json` serves it.
pub fn openapi() -> OpenApi {
    routes(&HttpSettings::default()).into_openapi()
}

/// Says of every operation that its errors, named or not, are problem documents.
fn document_problems(document: &mut OpenApi) {
    const PROBLEM: &str = "application/problem+json";
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("ProblemDocument")))
        .build();
    let any = ResponseBuilder::new().description("An error").build();
    for item in document.paths.paths.values_mut() {
        let methods = [
            &mut item.get,
            &mut item.post,
            &mut item.put,
            &mut item.patch,
            &mut item.delete,
        ];
        for operation in methods.into_iter().flatten() {
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
}
