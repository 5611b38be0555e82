//! From a request for a ranking to its specification.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::jobs::plan::{NamedInputs, PlanError, ResolvedInputs, target_spec};
use crate::jobs::refusals::{Refusals, refuse};
use promptweave_domain::composition::TargetSamples;
use promptweave_domain::ranking::RankingObjective;
use promptweave_domain::reference::{Reference, ResourceName};
use promptweave_domain::specification::RankingSpec;

/// A request, with names that are not looked up yet.
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
    let mut refusals = Refusals::default();
    refusals.of_objective(objective.mistakes());
    if request.samples.eval_split.is_some() {
        refusals.note::<()>(refuse(
            "nothing_to_evaluate",
            "/target/eval_split",
            "a ranking makes nothing that could be evaluated; leave it out",
        ));
    }
    let named = NamedInputs {
        dataset: &request.dataset,
        samples: &request.samples,
        sources: &request.sources,
        backbone: request.backbone.as_ref(),
    };
    let ResolvedInputs {
        target,
        sources,
        backbone,
    } = named
        .resolve(conn, project_id, &objective, refusals)
        .await?;
    Ok(RankingSpec {
        sources,
        backbone,
        objective: request.objective.clone(),
        target: target_spec(&target, &request.samples),
    })
}
