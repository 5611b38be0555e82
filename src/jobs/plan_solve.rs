//! From a request to solve an ensemble again to its specification. Everything it may name was
//! resolved when that ensemble was posted, so nothing but aliases is looked up: not even a version
//! that was published since can come in.

use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use super::Job;
use super::plan::{
    PlanError, check_output, check_samples, default_output, invalid_objective, no_sources, refuse,
    source_pointer,
};
use crate::domain::composition::{CompositionResult, TargetSamples};
use crate::domain::digest::Digest;
use crate::domain::job::{EnsembleSpec, JobState, SolvedFrom, SourceSpec, TargetSpec};
use crate::domain::method::{Criterion, Method, SingleBestOptions, UniformMix};
use crate::domain::objective::{Objective, TradeOff, TradeOffRule};
use crate::domain::reference::{Reference, ResourceName, VersionSelector};
use crate::registry::prompt_versions;

/// An ensemble that succeeded: what it computed, and what it computed that from.
#[derive(Clone, Debug)]
pub struct Solved {
    pub id: Uuid,
    pub spec: EnsembleSpec,
    pub result: CompositionResult,
    /// Of `statistics.safetensors` in the blob store.
    pub statistics: Digest,
    /// Since when they are no longer there.
    pub statistics_deleted_at: Option<OffsetDateTime>,
}

impl TryFrom<Job> for Solved {
    /// The job, which has not succeeded.
    type Error = Box<Job>;

    fn try_from(job: Job) -> Result<Self, Box<Job>> {
        match job {
            Job {
                id,
                state: JobState::Succeeded,
                spec,
                result: Some(result),
                statistics_digest: Some(statistics),
                statistics_deleted_at,
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

/// What was asked for, in names; what is left out stays as it was.
#[derive(Clone, Debug, Default)]
pub struct SolveRequest {
    pub sources: Option<Vec<Reference>>,
    /// Replaces the ensemble's own as a whole.
    pub objective: Option<Objective>,
    /// `<dataset>-<short id of the job>` by default.
    pub output: Option<ResourceName>,
}

/// Puts the versions that aliases point to now in their place; one that there is not stays, and will
/// be no source.
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
    check_output(request.output.as_ref())?;
    let recorded = &solved.spec;
    let sources = match &request.sources {
        None => recorded.sources.clone(),
        Some(references) => sources(solved, references)?,
    };
    let objective = match &request.objective {
        None => without_backbone(solved),
        Some(objective) => {
            objective.weighing().map_err(invalid_objective)?;
            objective.clone()
        }
    };
    objective
        .check_without_backbone(
            &recorded.objective,
            solved.result.objective.gradient_alignment.is_some(),
        )
        .map_err(invalid_objective)?;
    let num_samples = solved.result.diagnostics.num_samples;
    check_samples(&objective, num_samples, recorded.backbone.config.embed_dim)?;
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

/// The ensemble's own objective, less what its statistics cannot answer: no refinement, no fallback, and what was chosen then, the
/// trade-off, the share of equal weights, or the single best source itself, in place of choosing anew.
fn without_backbone(solved: &Solved) -> Objective {
    let mut objective = solved.spec.objective.without_forward_passes();
    let fallback = solved.result.method.fallback.as_ref();
    if fallback.is_some_and(|fallback| fallback.taken) {
        return Objective {
            single_best: SingleBestOptions {
                by: Criterion::Validation,
            },
            uniform_mix: UniformMix::default(),
            h_score: objective.h_score.clone(),
            ..objective.for_method(Method::SingleBest)
        };
    }
    if objective.trade_off == Some(TradeOff::Rule(TradeOffRule::Validation)) {
        objective.trade_off = solved.result.objective.trade_off.map(TradeOff::Value);
    }
    if matches!(solved.spec.objective.uniform_mix, UniformMix::Rule(_)) {
        objective.uniform_mix = UniformMix::Value(solved.result.method.uniform_mix);
    }
    objective
}

/// The ensemble's sources that are named, in the order they are named in.
fn sources(solved: &Solved, references: &[Reference]) -> Result<Vec<SourceSpec>, PlanError> {
    if references.is_empty() {
        return no_sources();
    }
    let mut sources: Vec<SourceSpec> = Vec::with_capacity(references.len());
    for (index, reference) in references.iter().enumerate() {
        let pointer = source_pointer(index);
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
        if sources.contains(source) {
            let detail = format!(
                "`{reference}` is `{}:{}` once more; name each source once",
                source.prompt, source.version
            );
            return refuse("same_source", pointer, detail);
        }
        sources.push(source.clone());
    }
    Ok(sources)
}

/// A bare name means the version that the ensemble recorded, not the newest.
fn means(reference: &Reference, source: &SourceSpec) -> bool {
    reference.name.as_str() == source.prompt
        && match &reference.version {
            VersionSelector::Newest => true,
            VersionSelector::Number(number) => *number == source.version,
            VersionSelector::Digest(digest) => *digest == source.digest,
            // Pinned before, if there is such an alias.
            VersionSelector::Alias(_) => false,
        }
}

fn listed<'a>(sources: impl IntoIterator<Item = &'a SourceSpec>) -> String {
    let names = sources
        .into_iter()
        .map(|source| format!("`{}:{}`", source.prompt, source.version));
    names.collect::<Vec<_>>().join(", ")
}
