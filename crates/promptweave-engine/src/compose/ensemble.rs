//! The pool as a file, and how it compares with what else could be used, on images that no head saw.

use tch::Tensor;

use crate::compose::Workspace;
use crate::compose::steps::Steps;
use crate::error::EngineError;
use crate::pool::unseen::log_probabilities;
use crate::pool::{EPSILON, Pool};
use crate::samples::Samples;
use crate::score::evaluate::{correct, cross_entropy};
use crate::score::head::ClosedFormHead;
use crate::statistics::{Metadata, Statistics};
use crate::vit::features::extract;
use promptweave_domain::composition::{Compared, Prediction};
use promptweave_domain::ensemble_file::{EnsembleFile, EnsembleKind, EnsembleMetadata, Member};
use promptweave_domain::prompt_file::{FORMAT, WeighedPrompt};
use promptweave_domain::proportions::{Paired, wilson};

/// A pool with the heads of its members, M sources and the backbone without a prompt.
pub struct Pooled {
    pub pool: Pool,
    /// Every member's calibrated head, fitted on all target samples.
    heads: Vec<ClosedFormHead>,
}

impl Pooled {
    /// Fits the pool and its heads; `None` if the statistics do not keep the predictions.
    pub fn of(
        statistics: &Statistics,
        metadata: &Metadata,
        tick: &mut dyn FnMut() -> Result<(), EngineError>,
    ) -> Result<Option<Self>, EngineError> {
        let Statistics {
            features, labels, ..
        } = statistics;
        let Some(unseen) = &statistics.predictions else {
            return Ok(None);
        };
        let objective = &metadata.objective;
        let (predictions, of_known) = unseen.labelled(labels);
        let pool = crate::pool::fit(&predictions, &of_known, &objective.pool(), tick)?;
        let heads = unseen.heads(features, labels, &objective.head)?;
        Ok(Some(Self { pool, heads }))
    }

    /// The ensemble file of the members with a weight. `versions` are the sources'.
    pub fn file(
        &self,
        statistics: &Statistics,
        metadata: &Metadata,
        versions: &[Option<i32>],
    ) -> Result<EnsembleFile, EngineError> {
        let members = self.pool.members();
        let of = |i: &usize| {
            let source = metadata.sources.get(*i);
            WeighedPrompt {
                prompt: source.map(|source| source.prompt.clone()),
                version: versions.get(*i).copied().flatten(),
                digest: source.map(|source| source.digest),
                weight: self.pool.alpha[*i],
            }
        };
        let tensors = |i: &usize| {
            Ok(Member {
                prompt_embeddings: statistics.prompts.get(*i).cloned(),
                head: self.heads[*i].to_prompt_head()?,
            })
        };
        Ok(EnsembleFile {
            metadata: EnsembleMetadata {
                format: FORMAT,
                kind: EnsembleKind::Ensemble,
                backbone_digest: metadata.backbone_digest,
                preprocessing_id: metadata.preprocessing_id.clone(),
                classes: metadata.classes.clone(),
                members: members.iter().map(of).collect(),
                sharpness: self.pool.sharpness,
                epsilon: EPSILON,
            },
            members: members
                .iter()
                .map(tensors)
                .collect::<Result<_, EngineError>>()?,
        })
    }

    /// The weight of every member in the pool, s αᵢ, and in the uniform pool.
    fn exponents(&self) -> (Vec<f64>, f64) {
        let Pool {
            alpha, sharpness, ..
        } = &self.pool;
        let uniform = self.pool.uniform_sharpness / alpha.len() as f64;
        (alpha.iter().map(|a| sharpness * a).collect(), uniform)
    }
}

impl Workspace<'_> {
    /// What the pool, and what else could be used, predicts for the evaluation samples. `composed` are the calibrated
    /// logits of the composed prompt. Every member takes a forward pass over these samples.
    pub(super) fn compare(
        &self,
        pooled: &Pooled,
        composed: &Tensor,
        eval: &Samples,
        steps: &mut Steps<'_>,
    ) -> Result<Vec<Compared>, EngineError> {
        let (exponents, uniform) = pooled.exponents();
        let losses = &pooled.pool.source_losses;
        let last = self.tensors.len();
        let best = (0..last)
            .min_by(|a, b| losses[*a].total_cmp(&losses[*b]))
            .expect("there are sources");
        let mut count = steps.counter(((last + 1) * eval.len()) as u64);
        let nothing = self.no_prompt();
        let (mut sum, mut even) = (composed.zeros_like(), composed.zeros_like());
        let (mut single, mut none) = (None, None);
        let members = self.tensors.iter().chain([&nothing]);
        for (i, (prompt, head)) in members.zip(&pooled.heads).enumerate() {
            let prompts = std::slice::from_ref(prompt);
            let features = extract(self.vit, &self.vit.pairs(eval, prompts), &mut count)?.get(0);
            let log_p = log_probabilities(&head.logits(&features), EPSILON);
            sum += &log_p * exponents[i];
            even += &log_p * uniform;
            if i == best {
                single = Some(log_p);
            } else if i == last {
                none = Some(log_p);
            }
        }
        let members = pooled.pool.members().len();
        let all = [
            (Prediction::Pool, members, sum),
            (Prediction::UniformPool, last + 1, even),
            (
                Prediction::ComposedPrompt,
                1,
                log_probabilities(composed, EPSILON),
            ),
            (Prediction::SingleBest, 1, single.expect("a source")),
            (Prediction::NoTransfer, 1, none.expect("the last")),
        ];
        let mut rows: Vec<Compared> = Vec::with_capacity(all.len());
        let mut of_pool: Option<Vec<bool>> = None;
        for (prediction, forward_passes, logits) in all {
            let right = correct(&logits, &eval.labels)?;
            let of_pool = of_pool.get_or_insert_with(|| right.clone());
            let paired = Paired::of(of_pool, &right);
            let (n, successes) = (right.len(), right.iter().filter(|it| **it).count());
            rows.push(Compared {
                prediction,
                forward_passes,
                accuracy: successes as f64 / n as f64,
                accuracy_interval: wilson(successes, n),
                loss: cross_entropy(&logits, &eval.labels),
                pool_gain: paired.difference(),
                pool_gain_interval: paired.interval(),
                p_value: paired.p_value(),
            });
        }
        Ok(rows)
    }
}
