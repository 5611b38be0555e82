//! Refinement of α on the true objective: H(f of Σ αᵢ Pᵢ) in place of H(Σ αᵢ f_{Pᵢ}).
//!
//! The solver's H uses mixed features, a surrogate: f is not linear in P. Here H is differentiated
//! through the backbone, with two passes over the samples in each step:
//!
//! ```text
//! P_T ─► f [N, d] ─► H, ∂H/∂f ─► per micro-batch: backward of ⟨f, ∂H/∂f⟩ to P_T ─► ∂H/∂αᵢ = ⟨∂H/∂P_T, Pᵢ⟩
//! ```
//!
//! A step is taken only if it improves the objective, so refinement never makes the result worse.

use std::ops::ControlFlow;

use tch::{Kind, Tensor};

use crate::error::EngineError;
use crate::samples::Samples;
use crate::samples::classes::numbered;
use crate::score::alignment::GradientAlignment;
use crate::score::h_score::{HScore, Sums, centred, differentiable_regression, indicators};
use crate::solve::optimizer::project_to_simplex;
use crate::solve::solver::Tick;
use crate::solve::term_weights::Scale;
use crate::vit::Vit;
use crate::vit::features::extract;
use promptweave_domain::composition::Refinement;
use promptweave_domain::objective::{HScoreMode, HScoreOptions, Shrinkage};

/// The largest change of a weight at the first try, before the projection.
const FIRST_MOVE: f64 = 0.1;
/// The most tries for one step. Each tried step is half as long as the one before, and takes a
/// forward pass over all samples.
const TRIES: u32 = 6;

pub struct Refiner<'a> {
    pub vit: &'a Vit,
    pub samples: &'a Samples,
    /// The sources' prompts, [m, d] each.
    pub prompts: &'a [Tensor],
    pub alignment: &'a GradientAlignment,
    pub scale: Scale,
    /// The H-score's options, with the shrinkage as it was used.
    pub h_score: HScoreOptions,
}

/// The true objective at one α.
struct Point {
    alpha: Vec<f64>,
    /// Features of the composed prompt, [N, d].
    features: Tensor,
    h: f64,
    value: f64,
}

impl Refiner<'_> {
    /// Refines `alpha` by at most `steps` accepted steps.
    pub fn refine(
        &self,
        alpha: &[f64],
        steps: u32,
        tick: Tick<'_>,
    ) -> Result<(Vec<f64>, Refinement), EngineError> {
        let mut evaluations = 1;
        let mut here = self.point(alpha.to_vec(), &mut *tick)?;
        let before = here.h;
        let mut accepted = 0;
        let mut longest = f64::INFINITY;
        while accepted < steps {
            let gradient = self.gradient(&here, &mut *tick)?;
            let steepest = gradient.iter().fold(0.0, |most: f64, g| most.max(g.abs()));
            if steepest == 0.0 {
                break;
            }
            let mut step = longest.min(FIRST_MOVE / steepest);
            let mut better = None;
            for _ in 0..TRIES {
                let moved: Vec<f64> = (here.alpha.iter().zip(&gradient))
                    .map(|(a, g)| a - step * g)
                    .collect();
                let next = project_to_simplex(&moved);
                if next == here.alpha {
                    break;
                }
                let next = self.point(next, &mut *tick)?;
                evaluations += 1;
                if next.value < here.value {
                    better = Some(next);
                    break;
                }
                step *= 0.5;
            }
            let Some(next) = better else { break };
            here = next;
            accepted += 1;
            longest = 2.0 * step;
        }
        let refinement = Refinement {
            accepted_steps: accepted,
            evaluations,
            solved_weights: alpha.to_vec(),
            h_score_before: before,
            h_score_after: here.h,
        };
        Ok((here.alpha, refinement))
    }

    /// The composed prompt Σ αᵢ Pᵢ.
    fn mixed(&self, alpha: &[f64]) -> Tensor {
        let prompts = Tensor::stack(self.prompts, 0);
        let weights = Tensor::from_slice(alpha)
            .to_kind(prompts.kind())
            .to_device(prompts.device());
        (prompts * weights.view([-1, 1, 1])).sum_dim_intlist(0, false, self.vit.kind)
    }

    fn point(&self, alpha: Vec<f64>, tick: Tick<'_>) -> Result<Point, EngineError> {
        let prompt = self.mixed(&alpha);
        let mut ticked = Ok(());
        let prompt = [prompt];
        let pairs = self.vit.pairs(self.samples, &prompt);
        let extracted = extract(self.vit, &pairs, |_| ticking(&mut *tick, &mut ticked));
        ticked?;
        let features = extracted?;
        let h = HScore::new(&features, &self.samples.labels, &self.h_score)?.value(&[1.0])?;
        let value = -self.scale.h * h + self.scale.l * self.alignment.value(&alpha);
        Ok(Point {
            features: features.get(0),
            alpha,
            h,
            value,
        })
    }

    /// The gradient of the true objective by α, without its part across Σα = 1.
    fn gradient(&self, at: &Point, tick: Tick<'_>) -> Result<Vec<f64>, EngineError> {
        let by_features = self.by_features(&at.features)?;
        let prompt = self.mixed(&at.alpha);
        let mut by_prompt = prompt.zeros_like();
        let mut ticked = Ok(());
        let outcome = self.vit.each_micro_batch(
            &self.vit.pairs(self.samples, &[prompt]),
            || by_features.shallow_clone(),
            |by_features, batch| {
                // A micro-batch has consecutive rows.
                let (first, count) = (batch.rows[0] as i64, batch.rows.len() as i64);
                let slopes = by_features.narrow(0, first, count);
                let slope = |_, features: &Tensor| {
                    Ok(slopes.to_device(features.device()).to_kind(features.kind()))
                };
                Ok(batch.gradients(&mut { slope })?.sum_dim_intlist(
                    [0i64, 1].as_slice(),
                    false,
                    None::<Kind>,
                ))
            },
            |_, gradient| {
                by_prompt += gradient.to_device(self.vit.device);
                Ok(())
            },
            &mut |_| ticking(&mut *tick, &mut ticked),
        );
        ticked?;
        outcome?;
        let (_, of_alignment) = self.alignment.value_and_gradient(&at.alpha);
        let mut gradient = Vec::with_capacity(self.prompts.len());
        for (prompt, of_alignment) in self.prompts.iter().zip(of_alignment) {
            let of_h = f64::try_from((prompt * &by_prompt).sum(Kind::Double))?;
            gradient.push(-self.scale.h * of_h + self.scale.l * of_alignment);
        }
        let mean = gradient.iter().sum::<f64>() / gradient.len() as f64;
        gradient.iter_mut().for_each(|g| *g -= mean);
        if gradient.iter().any(|g| !g.is_finite()) {
            return Err(EngineError::NotFinite("the gradients of the true H-score"));
        }
        Ok(gradient)
    }

    /// ∂H/∂f [N, d].
    fn by_features(&self, features: &Tensor) -> Result<Tensor, EngineError> {
        let leaf = features
            .to_kind(Kind::Double)
            .detach()
            .copy()
            .set_requires_grad(true);
        let h = differentiable(&leaf, &self.samples.labels, &self.h_score)?;
        Ok(Tensor::run_backward(&[h], &[&leaf], false, false).swap_remove(0))
    }
}

/// Calls `tick`, and stores its error if it breaks off.
fn ticking(tick: Tick<'_>, ticked: &mut Result<(), EngineError>) -> ControlFlow<()> {
    *ticked = tick();
    match ticked {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    }
}

/// H of one prompt's features [N, d] in a form that libtorch can differentiate. It follows the
/// definition, while [`HScore`] is made for many cheap evaluations.
fn differentiable(
    features: &Tensor,
    labels: &[usize],
    options: &HScoreOptions,
) -> Result<Tensor, EngineError> {
    let (classes, num_classes) = numbered(labels);
    let x = centred(&features.unsqueeze(0), options.standardise);
    let sums = Sums::of(std::iter::once(x.shallow_clone()), &classes, num_classes);
    let x = x.squeeze_dim(0);
    if options.mode() == HScoreMode::TraceRatio {
        let (scale, weights) = (sums.degrees(), sums.class_weights());
        let by_class = sums.by_class.squeeze_dim(1);
        let between = by_class.square().sum_dim_intlist(1, false, Kind::Double);
        return Ok((between * weights).sum(Kind::Double) * scale / x.square().sum(Kind::Double));
    }
    let Shrinkage::Fixed(rho) = options.shrinkage() else {
        unreachable!("the refiner is given the shrinkage as it was used");
    };
    let indicators = indicators(&classes, &sums.counts).to_device(x.device());
    let cross_validated = options.mode() == HScoreMode::CrossValidated;
    differentiable_regression(&x, &indicators, rho, cross_validated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::Selection;
    use crate::score::alignment::AlignmentStatistics;
    use crate::tensors::prompt_tensor;
    use crate::testing::{input, noise_tensor, standard};
    use crate::vit::{Compute, Vit};
    use promptweave_domain::objective::{AlignmentVariant, Standardise};
    use promptweave_domain::precision::Precision;
    use promptweave_domain::split::Split;
    use promptweave_formats::backbone::Backbone;
    use promptweave_formats::dataset::LabelledImages;
    use tch::Device;

    #[test]
    fn the_differentiable_h_is_the_solvers_h() {
        let labels: Vec<usize> = (0..30).map(|i| i % 3).collect();
        let features = noise_tensor(&[30, 5], 1);
        for mode in [
            HScoreMode::Standard,
            HScoreMode::CrossValidated,
            HScoreMode::TraceRatio,
        ] {
            for standardise in [Standardise::None, Standardise::PerSource] {
                let options = HScoreOptions {
                    mode: Some(mode),
                    standardise,
                    shrinkage: Some(Shrinkage::Fixed(0.05)),
                };
                let expected = HScore::new(&features.unsqueeze(0), &labels, &options)
                    .unwrap()
                    .value(&[1.0])
                    .unwrap();
                let h = f64::try_from(differentiable(&features, &labels, &options).unwrap());
                assert!((h.unwrap() - expected).abs() < 1e-10, "{options:?}");
            }
        }
    }

    #[test]
    fn the_gradient_is_that_of_the_true_objective_and_steps_improve_it() {
        let dir = tempfile::tempdir().unwrap();
        let input = input(dir.path(), 3);
        let backbone = Backbone::open(&input.backbone_dir).unwrap();
        let vit = Vit::load(&backbone, &Compute::on(Device::Cpu, Precision::F64)).unwrap();
        let selection = Selection {
            split: Split::Train,
            max_samples: None,
            seed: 0,
            skip_unreadable: false,
        };
        let dataset = LabelledImages::read(&input.target_dir).unwrap();
        let samples = Samples::load(&dataset, &selection, &backbone.config.preprocessing).unwrap();
        let prompts: Vec<Tensor> = input
            .sources
            .iter()
            .map(|s| prompt_tensor(&s.file.prompt_embeddings, &vit))
            .collect();
        let rows = noise_tensor(&[6, 20], 2);
        let gram = Vec::try_from(rows.matmul(&rows.tr()).flatten(0, -1)).unwrap();
        let alignment = GradientAlignment::new(
            AlignmentVariant::MixtureWeighted,
            AlignmentStatistics {
                num_sources: 3,
                gram,
                variance_gram: vec![0.0; 9],
            },
        );
        let refiner = Refiner {
            vit: &vit,
            samples: &samples,
            prompts: &prompts,
            alignment: &alignment,
            scale: Scale { h: 1.0, l: 0.01 },
            h_score: standard(0.1),
        };
        let alpha = [0.5, 0.3, 0.2];
        let here = refiner.point(alpha.to_vec(), &mut || Ok(())).unwrap();
        let gradient = refiner.gradient(&here, &mut || Ok(())).unwrap();
        for i in 0..3 {
            let along = |step: f64| {
                let alpha: Vec<f64> = (0..3)
                    .map(|k| alpha[k] + step * (f64::from(u8::from(i == k)) - alpha[k]))
                    .collect();
                refiner.point(alpha, &mut || Ok(())).unwrap().value
            };
            let numeric = (along(1e-5) - along(-1e-5)) / 2e-5;
            let analytic: f64 = (0..3)
                .map(|k| gradient[k] * (f64::from(u8::from(i == k)) - alpha[k]))
                .sum();
            // A model in f64 keeps its features in f64.
            assert!(
                (numeric - analytic).abs() < 1e-6 * (1.0 + analytic.abs()),
                "{numeric} {analytic}"
            );
        }
        let (refined, report) = refiner.refine(&alpha, 3, &mut || Ok(())).unwrap();
        let there = refiner.point(refined, &mut || Ok(())).unwrap();
        assert!(report.accepted_steps > 0 && there.value < here.value);
        assert_eq!(report.h_score_after, there.h);
        assert!((there.alpha.iter().sum::<f64>() - 1.0).abs() < 1e-12);

        // Near the minimum, here that of `fishr` at uniform weights, the first move leads too far
        // and is cut short.
        let identity = (0..9).map(|at| f64::from(u8::from(at % 4 == 0))).collect();
        let convex = GradientAlignment::new(
            AlignmentVariant::Fishr,
            AlignmentStatistics {
                num_sources: 3,
                gram: vec![0.0; 36],
                variance_gram: identity,
            },
        );
        let refiner = Refiner {
            alignment: &convex,
            scale: Scale { h: 0.0, l: 1.0 },
            ..refiner
        };
        let beside = [0.34, 0.33, 0.33];
        let (nearer, report) = refiner.refine(&beside, 1, &mut || Ok(())).unwrap();
        assert_eq!(report.accepted_steps, 1);
        assert!(convex.value(&nearer) < convex.value(&beside));
    }
}
