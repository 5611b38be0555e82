//! Routes and their document, built from one list.

use axum::http::Method;
use utoipa::OpenApi as _;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::path::{Operation, ParameterIn};
use utoipa::openapi::{OpenApi, Ref, RefOr, ResponseBuilder, Schema};
use utoipa_axum::router::OpenApiRouter;

use crate::http::access;
use crate::http::access::RequiredScopes;
use crate::http::error::ProblemDocument;
use crate::http::idempotency;
use crate::http::idempotency::KeyedOperations;
use crate::http::{
    AppState, HttpSettings, aliases, api_keys, backbone_content, backbone_uploads, backbones,
    compose, content_digest, datasets, document, ensembles, health, lineage, links, peft,
    predictions, projects, prompt_changes, prompt_content, prompt_versions, prompts, rankings,
    tunings, webhook_deliveries, webhooks, workers,
};
use promptweave_domain::reference::{ResourceName, VersionSelector};

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
        (name = "datasets", description = "Labelled images: the targets of ensembles, tunings and rankings, and what predictions are made for"),
        (name = "ensembles", description = "Jobs that weigh prompts for a target and compose them"),
        (name = "tunings", description = "Jobs that train a prompt and a head for a target"),
        (name = "rankings", description = "Jobs that score prompts for a target"),
        (name = "predictions", description = "Jobs that predict the images of a dataset"),
        (name = "webhooks", description = "Who is told when a job ends"),
        (name = "workers", description = "The processes that run jobs"),
        (name = "projects", description = "Each has its own resources, which keys of others do not see"),
        (name = "api-keys", description = "Who may do what in a project"),
        (name = "health", description = "Whether the server answers, and whether it can work"),
    )
)]
struct Document;

/// Every route with its documentation, and what the surrounding layers read from it.
pub(super) struct Routes {
    pub routes: OpenApiRouter<AppState>,
    pub scopes: RequiredScopes,
    pub keyed: KeyedOperations,
}

/// Builds all routes. A new resource is added here, and as a tag above.
pub(super) fn routes(settings: &HttpSettings) -> Routes {
    let v1 = OpenApiRouter::new()
        .merge(prompts::router())
        .merge(prompt_changes::router())
        .merge(prompt_versions::router(settings))
        .merge(prompt_content::router())
        .merge(compose::router())
        .merge(lineage::router())
        .merge(peft::router(settings))
        .merge(aliases::router())
        .merge(backbones::router())
        .merge(backbone_content::router())
        .merge(backbone_uploads::router())
        .merge(datasets::router())
        .merge(ensembles::router())
        .merge(tunings::router())
        .merge(rankings::router())
        .merge(predictions::router())
        .merge(webhooks::router())
        .merge(webhook_deliveries::router())
        .merge(workers::router())
        .merge(projects::router())
        .merge(api_keys::router());
    let mut routes = OpenApiRouter::with_openapi(Document::openapi())
        .merge(health::router())
        .merge(workers::health_router())
        .nest("/v1", v1);
    let scopes = access::document(routes.get_openapi_mut());
    document_names(routes.get_openapi_mut());
    document_implied(routes.get_openapi_mut());
    content_digest::document(routes.get_openapi_mut());
    links::document(routes.get_openapi_mut());
    let keyed = idempotency::document(routes.get_openapi_mut(), &scopes);
    document_problems(routes.get_openapi_mut());
    document::mend(routes.get_openapi_mut());
    Routes {
        routes,
        scopes,
        keyed,
    }
}

/// The API's document, as `/openapi.json` serves it.
pub fn openapi() -> OpenApi {
    routes(&HttpSettings::default()).routes.into_openapi()
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

/// Gives parameters that have the same name everywhere the same schema.
fn document_names(document: &mut OpenApi) {
    for (_, _, operation) in operations(document) {
        for parameter in operation.parameters.iter_mut().flatten() {
            let RefOr::T(parameter) = parameter else {
                continue;
            };
            let pattern = match (&parameter.parameter_in, parameter.name.as_str()) {
                (ParameterIn::Path, "name") => ResourceName::PATTERN,
                (ParameterIn::Path, "ref") => VersionSelector::PATTERN,
                _ => continue,
            };
            if let Some(RefOr::T(Schema::Object(schema))) = &mut parameter.schema {
                schema.pattern = Some(pattern.to_owned());
            }
        }
    }
}

/// Documents on every operation the answers that follow from its inputs. There is no `default`: a status that is not
/// listed is a mistake in the document, which `make fuzz-api` finds.
fn document_implied(document: &mut OpenApi) {
    for (_, _, operation) in operations(document) {
        let mut implied = vec![
            ("500", "`internal_error`"),
            (
                "503",
                "`database_unavailable`, `request_timeout`: worth another try",
            ),
        ];
        if operation.parameters.is_some() {
            implied.push(("422", "`invalid_path`, `invalid_query`"));
        }
        if operation.request_body.is_some() {
            implied.extend([
                ("400", "`malformed_json`, `body_interrupted`"),
                ("413", "`body_too_large`"),
                ("415", "`unsupported_media_type`"),
                ("422", "`invalid_body`"),
            ]);
        }
        let responses = &mut operation.responses.responses;
        for (status, description) in implied {
            let response = || ResponseBuilder::new().description(description).build();
            responses
                .entry(status.to_owned())
                .or_insert_with(|| response().into());
        }
    }
}

/// Adds a reason to the description of a refusal's status.
pub(super) fn add_refusal(operation: &mut Operation, status: &str, refusal: &str) {
    let response = operation
        .responses
        .responses
        .entry(status.to_owned())
        .or_insert_with(|| ResponseBuilder::new().build().into());
    if let RefOr::T(response) = response {
        let description = &mut response.description;
        let separator = if description.is_empty() { "" } else { ", " };
        description.push_str(separator);
        description.push_str(refusal);
    }
}

/// Documents on every operation that its errors are problem documents.
fn document_problems(document: &mut OpenApi) {
    const PROBLEM: &str = "application/problem+json";
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("ProblemDocument")))
        .build();
    for (_, _, operation) in operations(document) {
        for (status, response) in &mut operation.responses.responses {
            if let RefOr::T(response) = response
                && status.starts_with(['4', '5'])
            {
                response
                    .content
                    .insert(PROBLEM.to_owned(), RefOr::T(content.clone()));
            }
        }
    }
}
