//! `/v1/prompts/compose`: Σ αᵢ Pᵢ with weights that the user gives, published immediately. An ensemble with the same
//! weights composes the same numbers, bit by bit.

use axum::extract::State;
use axum::response::IntoResponse;
use serde::Deserialize;
use sqlx::PgConnection;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::db::DbError;
use crate::http::AppState;
use crate::http::access::Caller;
use crate::http::error::Problem;
use crate::http::extract::Json;
use crate::http::prompt_files;
use crate::http::prompt_versions::PublishedVersion;
use crate::jobs::plan::sources::{NamedPrompt, sources as plan_sources};
use crate::registry::lineage::Role;
use crate::registry::prompt_versions;
use crate::registry::prompt_versions::{NewVersion, Parent, VersionFile};
use crate::registry::prompts;
use promptweave_domain::compatibility::{
    Blamed, Incompatible, common_backbone, common_preprocessing,
};
use promptweave_domain::method::common_seed;
use promptweave_domain::mixture::mix;
use promptweave_domain::prompt_file::{FORMAT, Origin, PromptFile, PromptMetadata, WeighedPrompt};
use promptweave_domain::reference::{Reference, ResourceName};
use promptweave_domain::tensor::Tensor;

/// How far the sum of the weights may be from 1.
const TOLERANCE: f64 = 1e-6;
/// The most memory that all sources may take together, as f32, in bytes.
const MAX_BYTES: usize = 256 << 20;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(compose_prompt))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ComposePrompt {
    #[schema(min_items = 1, max_items = 64)]
    sources: Vec<WeighedSource>,
    output: ComposedOutput,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct WeighedSource {
    /// `name`, `name:3` or `name@sha256:…`.
    #[schema(value_type = String, example = "dtd:1")]
    prompt: Reference,
    /// α, from 0 to 1. All weights together sum to 1, to within 1e-6.
    #[schema(minimum = 0, maximum = 1, example = 1.0)]
    weight: f64,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ComposedOutput {
    /// The prompt that the sum becomes a version of; it is created if it does not exist.
    #[schema(value_type = String, pattern = "^[a-z0-9][a-z0-9._-]{0,127}$", example = "dtd-and-svhn")]
    name: ResourceName,
}

/// Compose prompts with given weights, and publish the sum as a version with its lineage
///
/// The weights are at least 0 and sum to 1. The sources must have the same shape and must not be deep. Those that
/// record a backbone and a preprocessing must record the same ones. Repeating a request answers 200 with the existing
/// version.
#[utoipa::path(
    post,
    path = "/prompts/compose",
    tag = "prompts",
    security(("api_key" = ["write"])),
    request_body = ComposePrompt,
    responses(
        (status = 201, body = PublishedVersion, headers(("location" = String), ("etag" = String))),
        (status = 200, description = "The sum is a version already", body = PublishedVersion),
        (status = 409, description = "`prompt_deleted`: of the output"),
        (status = 422, description = "`invalid_body`, `invalid_weights`, `reserved_name`, \
            `no_sources`, `too_many_sources`, `unknown_prompt`, `not_a_prompt`, `deep_prompt_not_composable`, \
            `same_source`, `width_mismatch`, `length_mismatch`, `backbone_mismatch`, \
            `preprocessing_mismatch`, `too_large`, `not_finite`"),
    )
)]
async fn compose_prompt(
    State(state): State<AppState>,
    caller: Caller,
    Json(body): Json<ComposePrompt>,
) -> Result<impl IntoResponse, Problem> {
    let project_id = caller.project_id;
    check_weights(&body.sources)?;
    prompts::check_name(&body.output.name)
        .map_err(|error| Problem::field("reserved_name", "/output/name", error.to_string()))?;
    let references: Vec<_> = body.sources.iter().map(|it| it.prompt.clone()).collect();
    let alpha: Vec<_> = body.sources.iter().map(|source| source.weight).collect();

    let mut transaction = state.pool.begin().await?;
    let sources = plan_sources(&mut transaction, project_id, &references).await?;
    let made_of = sources
        .iter()
        .zip(&alpha)
        .map(|(source, weight)| WeighedPrompt {
            prompt: Some(source.version.prompt.to_string()),
            version: Some(source.version.version),
            digest: Some(source.version.digest),
            weight: *weight,
        });
    let metadata = PromptMetadata {
        sources: WeighedPrompt::with_weight(made_of),
        ..common_metadata(&sources)?
    };
    let prompts = read(&mut transaction, &sources).await?;
    let composed = move || {
        let file = PromptFile {
            prompt_embeddings: mix(&prompts, &alpha),
            metadata: Some(metadata),
            deep_prompt_embeddings: None,
            head: None,
            sketch: None,
            dtype: "f32",
        };
        file.to_bytes()
    };
    let bytes = tokio::task::spawn_blocking(composed)
        .await
        .map_err(Problem::internal)?;
    // Checked like any other file: a sum of finite numbers may overflow.
    let (bytes, file) = prompt_files::read(bytes).await?;
    let metadata = file
        .metadata
        .clone()
        .unwrap_or_else(PromptMetadata::unknown);
    let version_file = VersionFile::Prompt {
        file: &file,
        metadata: &metadata,
    };
    prompt_files::check_backbone(&mut transaction, project_id, version_file).await?;
    let output =
        prompts::find_or_create(&mut transaction, project_id, &body.output.name, "").await?;
    let parents: Vec<_> = sources
        .iter()
        .zip(&body.sources)
        .map(|(named, source)| Parent {
            role: Role::Source,
            version_id: named.version.id,
            weight: source.weight,
        })
        .collect();
    let new = NewVersion {
        prompt_id: output.id,
        bytes: &bytes,
        file: version_file,
        produced_by_job: None,
        parents: &parents,
    };
    let (version, created) = prompt_versions::insert(&mut transaction, project_id, new).await?;
    transaction.commit().await?;
    Ok(prompt_files::published(version, created))
}

fn check_weights(sources: &[WeighedSource]) -> Result<(), Problem> {
    const CODE: &str = "invalid_weights";
    for (index, WeighedSource { weight, .. }) in sources.iter().enumerate() {
        if !(0.0..=1.0).contains(weight) {
            let detail = format!("is {weight}; a weight lies in 0..=1");
            return Err(Problem::field(
                CODE,
                format!("/sources/{index}/weight"),
                detail,
            ));
        }
    }
    let sum: f64 = sources.iter().map(|source| source.weight).sum();
    if !sources.is_empty() && (sum - 1.0).abs() > TOLERANCE {
        let detail = format!("the weights sum to {sum}; they must sum to 1, to {TOLERANCE:e}");
        return Err(Problem::field(CODE, "/sources", detail));
    }
    Ok(())
}

/// The sum's metadata: what all sources agree on. A source without metadata is trusted to fit, as in an ensemble.
fn common_metadata(sources: &[NamedPrompt]) -> Result<PromptMetadata, Problem> {
    let facts: Vec<_> = sources
        .iter()
        .map(|source| source.version.facts())
        .collect();
    let unlike = |(index, Incompatible { code, detail }): Blamed| {
        Problem::field(code.name(), &sources[index].pointer, detail)
    };
    Ok(PromptMetadata {
        format: FORMAT,
        backbone_digest: common_backbone(&facts).map_err(unlike)?,
        preprocessing_id: common_preprocessing(&facts)
            .map_err(unlike)?
            .map(str::to_owned),
        init_seed: common_seed(sources.iter().map(|source| source.version.init_seed)),
        task: None,
        classes: None,
        origin: Origin::Composed,
        training: None,
        sources: Vec::new(),
    })
}

/// Reads the sources' numbers, with one file in memory at a time.
async fn read(
    conn: &mut PgConnection,
    sources: &[NamedPrompt],
) -> Result<Vec<Tensor<f32>>, Problem> {
    let numbers: usize = sources
        .iter()
        .map(|it| it.version.facts())
        .map(|facts| facts.num_tokens * facts.embed_dim)
        .sum();
    if numbers * size_of::<f32>() > MAX_BYTES {
        let detail = format!(
            "the sources have {numbers} numbers; at most {} are summed at once",
            MAX_BYTES / size_of::<f32>()
        );
        return Err(Problem::field("too_large", "/sources", detail));
    }
    let mut prompts = Vec::with_capacity(sources.len());
    for source in sources {
        let bytes = prompt_versions::content(conn, &source.version.digest).await?;
        let bytes = bytes.ok_or(DbError::RowCount(0))?;
        let (_, file) = prompt_files::read(bytes).await?;
        prompts.push(file.prompt_embeddings);
    }
    Ok(prompts)
}
