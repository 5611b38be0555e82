//! From a request for a prediction to its specification.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::db::DbError;
use crate::jobs::plan::backbone::backbone;
use crate::jobs::plan::sources::NamedPrompt;
use crate::jobs::plan::target::classes_in;
use crate::jobs::plan::{MAX_FEATURE_BYTES, PlanError, backbone_spec, source_spec};
use crate::jobs::refusals::{Refusal, Refusals, compatible, refuse};
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
/// Memory for the path and the label of an image, and for each class in its row, in a few copies.
const BYTES_A_ROW: usize = 500;
const BYTES_A_CLASS: usize = 200;
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
    if let (Some((_, backbone, num_classes)), Some(dataset)) = (&found, &dataset) {
        let images = dataset.class_counts[&request.split].iter().sum();
        let d = backbone.config.embed_dim;
        refusals.note(check_size(images, *num_classes, d, request.top_k));
    }
    let ((model, backbone, _), dataset) = refusals.finish(found.zip(dataset))?;
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

/// Refuses predictions that are too large for memory: K probabilities in f64, d features in f32, and a row of the table
/// for each image.
fn check_size(
    images: u64,
    num_classes: usize,
    embed_dim: usize,
    top_k: usize,
) -> Result<(), Refusal> {
    let row = BYTES_A_ROW + BYTES_A_CLASS * top_k.min(num_classes);
    let bytes_an_image = size_of::<f64>() * num_classes + size_of::<f32>() * embed_dim + row;
    let most = MAX_FEATURE_BYTES / bytes_an_image;
    if images <= most as u64 {
        return Ok(());
    }
    let detail = format!(
        "the split has {images} images; with {num_classes} classes, {embed_dim} dimensions and this `top_k`, {most} are the \
         most that one prediction holds in memory: lower `top_k`, or split the dataset"
    );
    refuse("too_large", "/split", detail)
}

/// The model, its backbone and its number of classes, if model and backbone can predict.
async fn model(
    conn: &mut PgConnection,
    project_id: Uuid,
    request: &PredictionRequest,
    refusals: &mut Refusals,
) -> Result<Option<(NamedPrompt, RegisteredBackbone, usize)>, RegistryError> {
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
    let bytes = content.ok_or(DbError::RowCount(0))?;
    // An ensemble may be large, so it is parsed off the runtime's threads. Stored files were checked when they were
    // published.
    let parsing = tokio::task::spawn_blocking(move || Model::parse(&bytes));
    let checked = match parsing.await.expect("parsing does not panic") {
        Ok(parsed) => {
            let named = model.version.facts().name;
            compatible(MODEL, parsed.check(&named, digest, &backbone.facts()))
        }
        Err(error) => refuse("unknown_prompt", MODEL, chain(&error)),
    };
    let classes = refusals.note(checked);
    Ok(classes.map(|classes| (model, backbone, classes.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_images_that_fit_are_named() {
        let most = (MAX_FEATURE_BYTES / (8 * 1000 + 4 * 768 + 700)) as u64;
        assert_eq!(check_size(most, 1000, 768, 1), Ok(()));
        let refusal = check_size(most + 1, 1000, 768, 1).unwrap_err();
        assert!(check_size(most, 1000, 768, 1000).is_err());
        assert_eq!(
            (refusal.code, refusal.pointer.as_str()),
            ("too_large", "/split")
        );
        assert!(
            refusal.detail.contains(&format!("{most} are the most")),
            "{}",
            refusal.detail
        );
    }
}
