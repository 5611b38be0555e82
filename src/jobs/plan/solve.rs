//! From a request to solve an ensemble again to its specification. Everything that the request may name was resolved
//! when the ensemble was posted. Only aliases are looked up, so a version that was published since cannot come in.

use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::jobs::Job;
use crate::jobs::plan::sources::{no_sources, source_pointer};
use crate::jobs::plan::{PlanError, check_outputs, default_output};
use crate::jobs::refusals::{Refusal, Refusals, refuse};
use crate::registry::prompt_versions;
use promptweave_domain::composition::{CompositionResult, TargetSamples};
use promptweave_domain::digest::Digest;
use promptweave_domain::job::{EnsembleSpec, JobState, SolvedFrom, SourceSpec, TargetSpec};
use promptweave_domain::method::{Criterion, Method, UniformMix};
use promptweave_domain::objective::{
    Experimental, GradientNormalization, MethodOptions, Objective, SingleBest, TradeOff,
    TradeOffRule,
};
use promptweave_domain::reference::{Reference, ResourceName, VersionSelector};

/// An ensemble that succeeded: its result, and what that was computed from.
#[derive(Clone, Debug)]
pub struct Solved {
    pub id: Uuid,
    pub spec: EnsembleSpec,
    pub result: CompositionResult,
    /// The digest of `statistics.safetensors` in the blob store.
    pub statistics: Digest,
    /// When the statistics were deleted.
    pub statistics_deleted_at: Option<OffsetDateTime>,
}

impl TryFrom<Job> for Solved {
    /// The job, if it has not succeeded.
    type Error = Box<Job>;

    fn try_from(job: Job) -> Result<Self, Box<Job>> {
        match job {
            Job {
                id,
                state: JobState::Succeeded,
                spec,
                result: Some(result),
                file_digest: Some(statistics),
                file_deleted_at: statistics_deleted_at,
                ..
            } => Ok(Self {
                id,
                spec,
                result,
                statistics,
                statistics_deleted_at,
            }),
            job => Err(Box::new(job)),
        }
    }
}

/// A request to solve again, with names that are not looked up yet. What it leaves out stays as it was.
#[derive(Clone, Debug, Default)]
pub struct SolveRequest {
    pub sources: Option<Vec<Reference>>,
    /// Replaces the ensemble's whole objective.
    pub objective: Option<Objective>,
    /// `<dataset>-<short id of the job>` by default.
    pub output: Option<ResourceName>,
}

/// Replaces aliases by the versions that they point to now. An unknown alias stays, and will match no source.
pub async fn pin_aliases(
    conn: &mut PgConnection,
    project_id: Uuid,
    references: &mut [Reference],
) -> Result<(), PlanError> {
    for reference in references {
        if let VersionSelector::Alias(_) = reference.version
            && let Some(found) = prompt_versions::resolve(conn, project_id, reference).await?
        {
            reference.version = VersionSelector::Number(found.version);
        }
    }
    Ok(())
}

/// Checks a request and specifies the job `job_id`.
pub fn plan(
    job_id: Uuid,
    solved: &Solved,
    request: &SolveRequest,
) -> Result<EnsembleSpec, PlanError> {
    let mut refusals = Refusals::default();
    let recorded = &solved.spec;
    let sources = match &request.sources {
        None => recorded.sources.clone(),
        Some(references) => sources(solved, references, &mut refusals),
    };
    let objective = match &request.objective {
        None => without_backbone(solved),
        Some(objective) => objective.clone(),
    };
    refusals.note(check_outputs(request.output.as_ref(), &objective));
    refusals.of_objective(objective.mistakes());
    refusals.of_objective(objective.needs_backbone());
    let gradients = gradients(solved, &objective);
    refusals.of_objective(objective.differs_from_statistics(&recorded.objective, gradients));
    let (n, d) = (
        solved.result.diagnostics.num_samples,
        recorded.backbone.config.embed_dim,
    );
    refusals.of_objective(objective.h_score.check_samples(n, d).err());
    let sources = refusals.finish(Some(sources))?;
    Ok(EnsembleSpec {
        target: TargetSpec {
            samples: TargetSamples {
                // There is no backbone to evaluate with.
                eval_split: None,
                ..recorded.target.samples.clone()
            },
            ..recorded.target.clone()
        },
        sources,
        backbone: recorded.backbone.clone(),
        objective: objective.settled(false),
        output: match &request.output {
            Some(name) => name.to_string(),
            None => default_output(&recorded.target.dataset, job_id),
        },
        early_stopping: None,
        solved_from: Some(SolvedFrom {
            ensemble: solved.id,
            statistics: solved.statistics,
        }),
    })
}

/// The ensemble's own objective without what its statistics cannot answer: no refinement, no fallback, and in place of
/// a choice by validation what was chosen then (the trade-off, the share of equal weights, or the single best source).
fn without_backbone(solved: &Solved) -> Objective {
    let mut objective = solved.spec.objective.without_forward_passes();
    let fallback = solved.result.method.fallback.as_ref();
    // The fallback of a pool is about the composed prompt alone, and its weights stay.
    let is_pool = objective.method() == Method::Pool;
    if !is_pool && fallback.is_some_and(|fallback| fallback.taken) {
        return Objective {
            options: MethodOptions::SingleBest(SingleBest {
                by: Criterion::Validation,
            }),
            experimental: Experimental::default(),
            ..objective
        };
    }
    if let Some(trade_off) = objective.options.trade_off_mut()
        && *trade_off == TradeOff::Rule(TradeOffRule::Validation)
    {
        let chosen = solved.result.objective.trade_off;
        *trade_off = chosen.map_or_else(TradeOff::default, TradeOff::Value);
    }
    let asked = &solved.spec.objective.experimental;
    if matches!(asked.uniform_mix, UniformMix::Chosen(_)) {
        let chosen = solved.result.method.uniform_mix;
        objective.experimental.uniform_mix = UniformMix::Value(chosen);
    }
    objective
}

/// How the gradients in the statistics are normalised, if there are any. If the ensemble's own method takes none, they
/// are an earlier ensemble's, and the engine checks in the file whether they are as requested.
fn gradients(solved: &Solved, asked: &Objective) -> Option<GradientNormalization> {
    solved.result.objective.gradient_alignment?;
    let alignment = solved.spec.objective.alignment().or(asked.alignment());
    Some(alignment.unwrap_or_default().gradient_normalization)
}

/// The ensemble's sources that the request names, in its order.
fn sources(solved: &Solved, references: &[Reference], refusals: &mut Refusals) -> Vec<SourceSpec> {
    let mut sources: Vec<SourceSpec> = Vec::with_capacity(references.len());
    if references.is_empty() {
        refusals.note::<()>(no_sources());
    }
    for (index, reference) in references.iter().enumerate() {
        let found = source(solved, reference, &sources, source_pointer(index));
        sources.extend(refusals.note(found).cloned());
    }
    sources
}

/// The source that a reference means, if it was not named before.
fn source<'a>(
    solved: &'a Solved,
    reference: &Reference,
    before: &[SourceSpec],
    pointer: String,
) -> Result<&'a SourceSpec, Refusal> {
    let recorded = solved.spec.sources.iter();
    let meant: Vec<_> = recorded.filter(|source| means(reference, source)).collect();
    let source = match meant.as_slice() {
        [source] => *source,
        [] => {
            let detail = format!(
                "`{reference}` is no source of ensemble `{}`; its sources are {}",
                solved.id,
                listed(&solved.spec.sources)
            );
            return refuse("unknown_source", pointer, detail);
        }
        several => {
            let detail = format!(
                "`{reference}` is several sources of the ensemble; name one of {}",
                listed(several.iter().copied())
            );
            return refuse("ambiguous_source", pointer, detail);
        }
    };
    if before.contains(source) {
        let detail = format!(
            "`{reference}` is `{}:{}` once more; name each source once",
            source.prompt, source.version
        );
        return refuse("same_source", pointer, detail);
    }
    Ok(source)
}

/// A bare name means the version that the ensemble recorded, not the newest.
fn means(reference: &Reference, source: &SourceSpec) -> bool {
    reference.name.as_str() == source.prompt
        && match &reference.version {
            VersionSelector::Newest => true,
            VersionSelector::Number(number) => *number == source.version,
            VersionSelector::Digest(digest) => *digest == source.digest,
            // An alias that exists was replaced by its version before.
            VersionSelector::Alias(_) => false,
        }
}

fn listed<'a>(sources: impl IntoIterator<Item = &'a SourceSpec>) -> String {
    let names = sources
        .into_iter()
        .map(|source| format!("`{}:{}`", source.prompt, source.version));
    names.collect::<Vec<_>>().join(", ")
}
