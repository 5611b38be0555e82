//! From a request for a ranking to its specification.

use sqlx::PgConnection;
use uuid::Uuid;

use super::plan::{
    PlanError, backbone, backbone_spec, check_fits, check_samples, check_size, invalid_objective,
    refuse, source_pointer, source_spec, sources, target, target_spec,
};
use crate::domain::composition::TargetSamples;
use crate::domain::ranking::RankingObjective;
use crate::domain::reference::{Reference, ResourceName};
use crate::domain::specification::RankingSpec;

/// What was asked for, in names.
#[derive(Clone, Debug)]
pub struct RankingRequest {
    pub dataset: Reference,
    pub samples: TargetSamples,
    pub sources: Vec<Reference>,
    /// May be left out where only one backbone fits the prompts.
    pub backbone: Option<ResourceName>,
    pub objective: RankingObjective,
}

/// Resolves and checks a project's request.
pub async fn plan(
    conn: &mut PgConnection,
    project_id: Uuid,
    request: &RankingRequest,
) -> Result<RankingSpec, PlanError> {
    let objective = request.objective.objective();
    objective.weighing().map_err(invalid_objective)?;
    if request.samples.eval_split.is_some() {
        let detail = "a ranking makes nothing that could be evaluated; leave it out";
        return refuse("nothing_to_evaluate", "/target/eval_split", detail);
    }
    let target = target(conn, project_id, &request.dataset, &request.samples).await?;
    let sources = sources(conn, project_id, &request.sources).await?;
    let backbone = backbone(conn, project_id, request.backbone.as_ref(), &sources).await?;
    for (index, source) in sources.iter().enumerate() {
        check_fits(source, &backbone, &source_pointer(index))?;
    }
    let images: u64 = target.class_counts[&request.samples.split].iter().sum();
    let num_samples = request.samples.max_samples.min(images as usize);
    let embed_dim = backbone.config.embed_dim;
    check_size(sources.len(), num_samples, embed_dim)?;
    check_samples(&objective, num_samples, embed_dim)?;
    Ok(RankingSpec {
        sources: sources.iter().map(source_spec).collect(),
        backbone: backbone_spec(backbone),
        objective: request.objective.clone(),
        target: target_spec(&target, &request.samples),
    })
}
