//! From a request for a prediction to its specification.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::jobs::plan::backbone::backbone;
use crate::jobs::plan::sources::NamedPrompt;
use crate::jobs::plan::target::classes_in;
use crate::jobs::plan::{PlanError, backbone_spec, source_spec};
use crate::jobs::refusals::{Refusals, compatible, refuse};
use crate::registry::RegistryError;
use crate::registry::backbones::RegisteredBackbone;
use crate::registry::datasets;
use crate::registry::datasets::DatasetVersion;
use crate::registry::prompt_versions;
use promptweave_domain::error_chain::chain;
use promptweave_domain::prediction::{Model, TableFormat};
use promptweave_domain::reference::{Reference, ResourceName};
use promptweave_domain::specification::{ImagesSpec, PredictionSpec};
use promptweave_domain::split::Split;

const MODEL: &str = "/model";
/// The most classes that a table may have for each image.
pub const MAX_TOP_K: usize = 1000;

/// A request, with names that are not looked up yet.
#[derive(Clone, Debug)]
pub struct PredictionRequest {
    pub model: Reference,
    pub dataset: Reference,
    pub split: Split,
    pub skip_unreadable: bool,
    /// May be left out where only one backbone fits the model.
    pub backbone: Option<ResourceName>,
    pub top_k: usize,
    pub format: TableFormat,
}

/// Resolves and checks a project's request.
pub async fn plan(
    conn: &mut PgConnection,
    project_id: Uuid,
    request: &PredictionRequest,
) -> Result<PredictionSpec, PlanError> {
    let mut refusals = Refusals::default();
    if !(1..=MAX_TOP_K).contains(&request.top_k) {
        let detail = format!("is {}; it must lie in 1..={MAX_TOP_K}", request.top_k);
        refusals.note::<()>(refuse("invalid_top_k", "/top_k", detail));
    }
    let dataset = images(conn, project_id, request, &mut refusals).await?;
    let found = model(conn, project_id, request, &mut refusals).await?;
    let ((model, backbone), dataset) = refusals.finish(found.zip(dataset))?;
    Ok(PredictionSpec {
        images: ImagesSpec {
            dataset: dataset.name.to_string(),
            version: dataset.version,
            digest: dataset.digest,
            split: request.split,
            skip_unreadable: request.skip_unreadable,
        },
        model: source_spec(&model.version),
        backbone: backbone_spec(backbone),
        top_k: request.top_k,
        format: request.format,
    })
}

/// The dataset, if it has images in the split.
async fn images(
    conn: &mut PgConnection,
    project_id: Uuid,
    request: &PredictionRequest,
    refusals: &mut Refusals,
) -> Result<Option<DatasetVersion>, RegistryError> {
    let Some(dataset) = datasets::resolve(conn, project_id, &request.dataset).await? else {
        let detail = format!("there is no dataset `{}`", request.dataset);
        refusals.note::<()>(refuse("unknown_dataset", "/dataset", detail));
        return Ok(None);
    };
    let has_images = match classes_in(&dataset, request.split, "/split") {
        Ok(classes) if classes.is_empty() => {
            let detail = format!("split `{}` holds no images", request.split.name());
            refuse("empty_split", "/split", detail)
        }
        Ok(_) => Ok(()),
        Err(refusal) => Err(refusal),
    };
    Ok(refusals.note(has_images).map(|()| dataset))
}

/// The model and its backbone, if the two can predict.
async fn model(
    conn: &mut PgConnection,
    project_id: Uuid,
    request: &PredictionRequest,
    refusals: &mut Refusals,
) -> Result<Option<(NamedPrompt, RegisteredBackbone)>, RegistryError> {
    let found = prompt_versions::resolve(conn, project_id, &request.model).await?;
    let Some(version) = found else {
        let detail = format!("there is no prompt version `{}`", request.model);
        refusals.note::<()>(refuse("unknown_prompt", MODEL, detail));
        return Ok(None);
    };
    let model = NamedPrompt {
        version,
        pointer: MODEL.to_owned(),
    };
    let name = request.backbone.as_ref();
    let prompts = std::slice::from_ref(&model);
    let Some(backbone) = backbone(conn, project_id, name, prompts, refusals).await? else {
        return Ok(None);
    };
    let digest = model.version.digest;
    let content = prompt_versions::content(conn, &digest).await?;
    // Stored files were checked when they were published.
    let parsed = content.map(|bytes| Model::parse(&bytes));
    let checked = match parsed {
        Some(Ok(parsed)) => {
            let named = model.version.facts().name;
            let checked = parsed.check(&named, digest, &backbone.facts());
            compatible(MODEL, checked.map(drop))
        }
        Some(Err(error)) => refuse("unknown_prompt", MODEL, chain(&error)),
        None => refuse("unknown_prompt", MODEL, "its file is gone"),
    };
    Ok(refusals.note(checked).map(|()| (model, backbone)))
}
