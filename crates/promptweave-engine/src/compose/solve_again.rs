//! Solving again from the statistics of an earlier composition, with another trade-off, variant or
//! mode, or with fewer sources. It needs no backbone and no images.

use crate::baselines::towards_uniform;
use crate::compose::ensemble::Pooled;
use crate::compose::report::Findings;
use crate::compose::sources::{anchored, composed_prompt};
use crate::compose::steps::{Steps, stop_on};
use crate::error::EngineError;
use crate::solve::weigh_features;
use crate::statistics::{Metadata, Statistics};
use promptweave_domain::compatibility::same_source;
use promptweave_domain::composer::{Composition, Observer};
use promptweave_domain::composition::{SolveInput, SourceRef};
use promptweave_domain::digest::Digest;
use promptweave_domain::phase::Phase;

pub fn solve_again(
    input: &SolveInput,
    device: String,
    observer: &mut dyn Observer,
) -> Result<Composition, EngineError> {
    let mut steps = Steps::new(observer);
    steps.begin(Phase::Solve)?;
    let (all, recorded) = Statistics::parse(&input.statistics)?;
    let objective = input.objective.settled(false);
    objective.check()?;
    let differs =
        objective.differs_from_statistics(&recorded.objective, recorded.gradient_normalization);
    if let Some(refused) = (objective.needs_backbone().into_iter())
        .chain(differs)
        .next()
    {
        return Err(refused.into());
    }
    let rows = rows_of(&input.sources, &recorded)?;
    let statistics = all.of_sources(&rows);
    let metadata = Metadata {
        objective: objective.clone(),
        ..recorded.of_sources(&rows)
    };
    let tick = &mut || stop_on(steps.tick(Phase::Solve));
    let pooled = Pooled::of(&statistics, &metadata, tick)?;
    let (solved, mut method) = weigh_features(
        statistics.ground(),
        pooled.as_ref().map(|pooled| &pooled.pool),
        &objective,
        metadata.classes.len(),
        &mut steps,
        &mut |_, _| unreachable!("`validation` was refused"),
    )?;
    method.uniform_mix = objective.experimental.uniform_mix.known();
    let alpha = towards_uniform(&solved.solution.alpha, method.uniform_mix);
    // Without the backbone there are no features of the composed prompt to fit a head on.
    let versions: Vec<Option<i32>> = input.sources.iter().map(|source| source.version).collect();
    let embeddings = anchored(&statistics.prompts, &alpha, None, 1.0);
    let composed = composed_prompt(&metadata, &versions, &alpha, embeddings);
    let evidence = Findings {
        metadata,
        versions,
        device,
        solved_from: Some(Digest::of(&input.statistics)),
        statistics: &statistics,
        solved,
        method,
        alpha,
        composed,
        verified: None,
        refinement: None,
        pooled,
        comparison: Vec::new(),
        early_stop: None,
        fallback_dropped: recorded.objective.falls_back()
            && recorded.objective.method() == input.objective.method(),
    };
    evidence.composition(steps)
}

/// The positions of the requested sources among the recorded ones.
fn rows_of(sources: &[SourceRef], recorded: &Metadata) -> Result<Vec<usize>, EngineError> {
    if sources.is_empty() {
        return Err(EngineError::NoSources);
    }
    let mut rows: Vec<usize> = Vec::with_capacity(sources.len());
    for source in sources {
        let known = &recorded.sources;
        let row = known.iter().position(|other| other.digest == source.digest);
        let row = row.ok_or_else(|| EngineError::UnknownSource {
            prompt: source.prompt.clone(),
            known: recorded.source_names(),
        })?;
        if let Some(earlier) = rows.iter().position(|other| *other == row) {
            let (first, second) = (&sources[earlier].prompt, &source.prompt);
            same_source::<()>(first, second, &source.digest)?;
        }
        rows.push(row);
    }
    Ok(rows)
}
