//! From a request for an ensemble to its specification: every reference resolved, everything that
//! cannot be composed refused before it is queued, with the place in the request.

pub mod backbone;
pub mod prediction;
pub mod ranking;
pub mod solve;
pub mod sources;
pub mod target;
pub mod tuning;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::jobs::plan::backbone::{backbone, check_fits};
use crate::jobs::plan::sources::{NamedPrompt, find_sources};
use crate::jobs::plan::target::target;
pub use crate::jobs::refusals::PlanError;
use crate::jobs::refusals::{Refusal, Refusals, refuse};
use crate::registry::RegistryError;
use crate::registry::backbones::RegisteredBackbone;
use crate::registry::datasets::DatasetVersion;
use crate::registry::prompt_versions;
use crate::registry::prompt_versions::{PromptVersion, VersionKind};
use crate::registry::prompts;
use promptweave_domain::composition::TargetSamples;
use promptweave_domain::early_stopping::EarlyStopping;
use promptweave_domain::job::{
    BackboneSpec, ENSEMBLE_SUFFIX, EnsembleSpec, SourceSpec, TargetSpec,
};
use promptweave_domain::method::{Method, NO_ANCHOR, Scale, UniformMix, common_seed};
use promptweave_domain::objective::{Objective, TradeOffRule, Weighing};
use promptweave_domain::reference::{MAX_NAME_LENGTH, Reference, ResourceName, VersionSelector};

/// Features of all sources and samples, as they are held in memory and stored; gradients and solver
/// need a few times that.
pub const MAX_FEATURE_BYTES: usize = 4 << 30;

/// A request, with names that are not looked up yet.
#[derive(Clone, Debug)]
pub struct EnsembleRequest {
    pub dataset: Reference,
    pub samples: TargetSamples,
    pub sources: Vec<Reference>,
    /// May be left out where only one backbone fits the prompts.
    pub backbone: Option<ResourceName>,
    pub objective: Objective,
    pub early_stopping: Option<EarlyStopping>,
    /// `<dataset>-<short id of the job>` by default.
    pub output: Option<ResourceName>,
}

fn check_early_stopping(
    asked: Option<EarlyStopping>,
    objective: &Objective,
) -> Result<(), Refusal> {
    let method = objective.method();
    let Some(EarlyStopping { max_standard_error }) = asked else {
        return Ok(());
    };
    let refused = |pointer: &str, detail| refuse("invalid_early_stopping", pointer, detail);
    if !(max_standard_error > 0.0 && max_standard_error <= 1.0) {
        let detail = format!("is {max_standard_error}; it must lie above 0 and not above 1");
        return refused("/early_stopping/max_standard_error", detail);
    }
    if !method.takes_gradients() {
        let detail = format!("is about gradients, and `{method}` takes none");
        return refused("/early_stopping", detail);
    }
    if matches!(objective.experimental.uniform_mix, UniformMix::Chosen(_)) || objective.falls_back()
    {
        let detail = "cannot be watched with `experimental.uniform_mix: \"auto\"` or a `fallback`, which know α at the end only; use a \
                      number, and no fallback";
        return refused("/early_stopping", detail.to_owned());
    }
    if objective.weighing() == Weighing::Rule(TradeOffRule::Validation) {
        let detail = "cannot be watched with `trade_off: \"validation\"`, which knows α at the end \
                      only; use `knee` or a number";
        return refused("/early_stopping", detail.to_owned());
    }
    Ok(())
}

/// Resolves and checks a project's request for the job `job_id`.
pub async fn plan(
    conn: &mut PgConnection,
    project_id: Uuid,
    job_id: Uuid,
    request: &EnsembleRequest,
) -> Result<EnsembleSpec, PlanError> {
    let mut refusals = Refusals::default();
    refusals.of_objective(request.objective.mistakes());
    refusals.note(check_early_stopping(
        request.early_stopping,
        &request.objective,
    ));
    refusals.note(check_outputs(request.output.as_ref(), &request.objective));
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
        .resolve(conn, project_id, &request.objective, refusals)
        .await?;
    let spec = EnsembleSpec {
        sources,
        backbone,
        objective: request.objective.settled(request.early_stopping.is_none()),
        output: output_name(request.output.as_ref(), &target, job_id),
        target: target_spec(&target, &request.samples),
        early_stopping: request.early_stopping,
        solved_from: None,
    };
    check_ensemble_name(conn, project_id, &spec).await?;
    Ok(spec)
}

/// Refuses an output whose ensemble would become the newest version of a prompt, so that its bare name meant no prompt
/// any more.
pub async fn check_ensemble_name(
    conn: &mut PgConnection,
    project_id: Uuid,
    spec: &EnsembleSpec,
) -> Result<(), PlanError> {
    let name = spec.ensemble_output().map(|name| name.parse());
    let Some(Ok(name)) = name else {
        return Ok(());
    };
    let newest = Reference {
        name,
        version: VersionSelector::Newest,
    };
    let taken = prompt_versions::resolve(conn, project_id, &newest).await?;
    match taken.filter(|version| version.kind == VersionKind::Prompt) {
        None => Ok(()),
        Some(prompt) => {
            let detail = format!(
                "the method `pool` publishes its ensemble under `{}`, which is a prompt; choose another output",
                prompt.prompt
            );
            let refused = refuse::<()>("name_taken", "/output/name", detail);
            Err(PlanError::Refused(refused.err().into_iter().collect()))
        }
    }
}

/// What a request says, in names, of all that features are computed of.
pub(super) struct NamedInputs<'a> {
    pub dataset: &'a Reference,
    pub samples: &'a TargetSamples,
    pub sources: &'a [Reference],
    pub backbone: Option<&'a ResourceName>,
}

/// What the names stand for now.
pub(super) struct ResolvedInputs {
    pub target: DatasetVersion,
    pub sources: Vec<SourceSpec>,
    pub backbone: BackboneSpec,
}

impl NamedInputs<'_> {
    /// Finds the inputs, and checks that they fit each other and the objective. The error has all mistakes, with those
    /// that were noted before.
    pub(super) async fn resolve(
        &self,
        conn: &mut PgConnection,
        project_id: Uuid,
        objective: &Objective,
        mut refusals: Refusals,
    ) -> Result<ResolvedInputs, PlanError> {
        let found = self
            .find(conn, project_id, objective, &mut refusals)
            .await?;
        refusals.finish(found)
    }

    /// The inputs, or `None` if something is wrong, which is noted.
    async fn find(
        &self,
        conn: &mut PgConnection,
        project_id: Uuid,
        objective: &Objective,
        refusals: &mut Refusals,
    ) -> Result<Option<ResolvedInputs>, RegistryError> {
        let target = target(conn, project_id, self.dataset, self.samples, refusals).await?;
        let (sources, all) = find_sources(conn, project_id, self.sources, refusals).await?;
        // The backbone that all sources share is known only if all of them were found.
        let backbone = match all || self.backbone.is_some() {
            true => backbone(conn, project_id, self.backbone, &sources, refusals).await?,
            false => None,
        };
        if all {
            refusals.note(check_anchor(objective, &sources));
        }
        let Some(backbone) = backbone else {
            return Ok(None);
        };
        for source in &sources {
            refusals.note(check_fits(source, &backbone));
        }
        let Some(target) = target else {
            return Ok(None);
        };
        let images: u64 = target.class_counts[&self.samples.split].iter().sum();
        let num_samples = self.samples.max_samples.min(images as usize);
        let embed_dim = backbone.config.embed_dim;
        refusals.note(check_size(self.sources.len(), num_samples, embed_dim));
        refusals.of_objective(
            objective
                .h_score
                .check_samples(num_samples, embed_dim)
                .err(),
        );
        Ok(Some(ResolvedInputs {
            target,
            sources: sources.iter().map(|it| source_spec(&it.version)).collect(),
            backbone: backbone_spec(backbone),
        }))
    }
}

pub(super) fn target_spec(target: &DatasetVersion, samples: &TargetSamples) -> TargetSpec {
    TargetSpec {
        dataset: target.name.to_string(),
        version: target.version,
        digest: target.digest,
        samples: samples.clone(),
    }
}

pub(super) fn source_spec(source: &PromptVersion) -> SourceSpec {
    SourceSpec {
        id: source.id,
        prompt: source.prompt.to_string(),
        version: source.version,
        digest: source.digest,
    }
}

pub(super) fn backbone_spec(backbone: RegisteredBackbone) -> BackboneSpec {
    BackboneSpec {
        name: backbone.name.to_string(),
        digest: backbone.digest,
        preprocessing_id: backbone.preprocessing_id,
        model_digest: backbone.model_digest,
        config: backbone.config,
    }
}

/// The name that was asked for, or the default.
pub(super) fn output_name(
    asked: Option<&ResourceName>,
    target: &DatasetVersion,
    job_id: Uuid,
) -> String {
    match asked {
        Some(name) => name.to_string(),
        None => default_output(target.name.as_str(), job_id),
    }
}

/// Refuses a name that no prompt could be published under later.
pub(super) fn check_output(name: Option<&ResourceName>) -> Result<(), Refusal> {
    match name.map(prompts::check_name) {
        Some(Err(error)) => refuse("reserved_name", "/output/name", error.to_string()),
        Some(Ok(())) | None => Ok(()),
    }
}

/// Refuses a name that the results of an ensemble could not be published under later.
pub(super) fn check_outputs(
    name: Option<&ResourceName>,
    objective: &Objective,
) -> Result<(), Refusal> {
    check_output(name)?;
    let longest = MAX_NAME_LENGTH - ENSEMBLE_SUFFIX.len();
    match name {
        Some(name) if objective.method() == Method::Pool && name.as_str().len() > longest => {
            let detail = format!(
                "has {} characters; with the method `pool` it may have {longest}, because the ensemble is published \
                 under `<name>{ENSEMBLE_SUFFIX}`",
                name.as_str().len()
            );
            refuse("output_too_long", "/output/name", detail)
        }
        Some(_) | None => Ok(()),
    }
}

/// `<dataset>-<short id>`: the end of the id, since its beginning is the time.
pub fn default_output(dataset: &str, job_id: Uuid) -> String {
    let id = job_id.simple().to_string();
    let end = format!("-{}", &id[id.len() - 8..]);
    // There is room for the name of a pool's ensemble too.
    let room = MAX_NAME_LENGTH - end.len() - ENSEMBLE_SUFFIX.len();
    let dataset: String = dataset.chars().take(room).collect();
    dataset + &end
}

/// Refuses features of M sources and N samples in d dimensions that are too large for memory.
fn check_size(m: usize, n: usize, d: usize) -> Result<(), Refusal> {
    let bytes_a_sample = m * d * size_of::<f32>();
    if n * bytes_a_sample <= MAX_FEATURE_BYTES {
        return Ok(());
    }
    let detail = format!(
        "features of {m} sources and {n} images in {d} dimensions take {:.1} GiB; at most {} GiB are \
         held: set it to {} or less, or name fewer sources",
        (n * bytes_a_sample) as f64 / f64::from(1 << 30),
        MAX_FEATURE_BYTES >> 30,
        MAX_FEATURE_BYTES / bytes_a_sample,
    );
    refuse("too_large", "/target/max_samples", detail)
}

/// Checks that the initial prompt is known, which a scale other than 1 needs.
fn check_anchor(objective: &Objective, sources: &[NamedPrompt]) -> Result<(), Refusal> {
    let shared = common_seed(sources.iter().map(|source| source.version.init_seed));
    let experimental = &objective.experimental;
    if experimental.scale == Scale::default() || experimental.anchor_seed.or(shared).is_some() {
        return Ok(());
    }
    refuse(
        "invalid_objective",
        "/objective/experimental/scale",
        NO_ANCHOR,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_name_is_always_a_name() {
        let id = Uuid::now_v7();
        for dataset in ["food", &"d".repeat(128)] {
            let name = default_output(dataset, id);
            let ensemble = format!("{name}{ENSEMBLE_SUFFIX}");
            assert!(ensemble.parse::<ResourceName>().is_ok(), "{name}");
            assert!(name.ends_with(&id.simple().to_string()[24..]));
        }
    }

    #[test]
    fn the_largest_number_of_samples_that_fits_is_named() {
        let most = MAX_FEATURE_BYTES / (64 * 1024 * 4);
        assert!(check_size(64, most, 1024).is_ok());
        let refusal = check_size(64, most + 1, 1024).unwrap_err();
        assert_eq!(refusal.code, "too_large");
        assert_eq!(refusal.pointer, "/target/max_samples");
        let detail = refusal.detail;
        assert!(
            detail.contains(&format!("set it to {most} or less")),
            "{detail}"
        );
    }
}
