//! From statistics to α: the part that a whole composition and solving again share.

pub mod estimates;
pub(crate) mod jackknife;
pub mod optimizer;
pub mod solver;
pub mod term_weights;

use std::borrow::Cow;

use crate::baselines::{scores, single_best, uniform};
use crate::compose::steps::{Steps, stop_on};
use crate::device::threads::OneThread;
use crate::error::EngineError;
use crate::pool::Pool;
use crate::score::alignment::{AlignmentStatistics, GradientAlignment};
use crate::score::evaluate::OnUnseen;
use crate::score::gradients::num_folds;
use crate::score::h_score::HScore;
use crate::solve::jackknife::standard_errors;
use crate::solve::solver::{Solution, Solver, Terms};
use crate::statistics::SolveInputs;
use promptweave_domain::composition::{MethodReport, PathPoint};
use promptweave_domain::objective::{
    AlignmentOptions, InvalidObjective, MethodOptions, Objective, TradeOffRule, Weighing,
};
use promptweave_domain::phase::Phase;

/// Why statistics without predictions are refused.
const NO_PREDICTIONS: &str = "`pool` needs the sources' predictions, which the statistics do not keep: they were made by an \
                              earlier version; run the whole composition";

/// α with everything that is known about it without a forward pass.
pub struct Solved {
    pub h_score: HScore,
    pub alignment: GradientAlignment,
    pub solution: Solution,
    /// The trade-off t, unless a raw λ was requested, and the rule that chose it.
    pub trade_off: Option<f64>,
    pub trade_off_rule: Option<TradeOffRule>,
    /// λ, or `None` if it is infinite.
    pub alignment_weight: Option<f64>,
    pub standard_errors: Option<Vec<f64>>,
}

/// A callback that scores the path's points, for `trade_off: "validation"`.
pub type Validate<'a> =
    &'a mut dyn FnMut(&[PathPoint], &mut Steps<'_>) -> Result<Vec<OnUnseen>, EngineError>;

/// Solves as `objective` says. `validate` is called only for the rule that needs it.
pub fn solve(
    ground: SolveInputs<'_>,
    objective: &Objective,
    steps: &mut Steps<'_>,
    validate: Validate<'_>,
) -> Result<Solved, EngineError> {
    let weighing = objective.weighing();
    let variant = objective.alignment().unwrap_or_default().variant;
    let h_score = HScore::new(ground.features, ground.labels, &objective.h_score)?;
    let m = h_score.num_sources();
    let leave_out = match ground.gradients {
        Some(gradients) => Cow::Borrowed(&gradients.leave_out),
        None => Cow::Owned(vec![
            AlignmentStatistics::none(m);
            num_folds(ground.labels.len())
        ]),
    };
    let _alone = OneThread::begin();
    let alignment = alignment_of(ground, objective);
    let terms = Terms {
        h_score: &h_score,
        alignment: &alignment,
    };
    let mut solver = Solver::new(terms);
    let explored = solver.explore(&mut || stop_on(steps.tick(Phase::Solve)))?;
    let ranges = explored.ranges;
    let path = explored.path();
    let mut validated = None;
    let (scale, trade_off, trade_off_rule) = match weighing {
        Weighing::AlignmentWeight(lambda) => (ranges.at_lambda(lambda), None, None),
        Weighing::TradeOff(t) => (ranges.at(t), Some(t), None),
        Weighing::Rule(rule) => {
            let at = match rule {
                TradeOffRule::Knee => ranges.knee(&path),
                TradeOffRule::Validation => {
                    let of_points = validate(&path, steps)?;
                    let at = least_loss(&of_points);
                    validated = Some(of_points);
                    at
                }
            };
            let t = path[at].trade_off;
            (ranges.at(t), Some(t), Some(rule))
        }
    };
    let tick = &mut || stop_on(steps.tick(Phase::Solve));
    let mut solution = solver.choose(explored, scale, objective.experimental.entropy, tick)?;
    for (point, of_point) in (solution.path.iter_mut()).zip(validated.into_iter().flatten()) {
        point.validation_accuracy = Some(of_point.accuracy);
        point.validation_loss = Some(of_point.loss);
    }
    let whole = jackknife::Solved {
        h_score: &h_score,
        features: ground.features,
        labels: ground.labels,
        variant,
        scale,
        entropy: objective.experimental.entropy,
        alpha: &solution.alpha,
    };
    let standard_errors = standard_errors(&whole, &leave_out, tick)?;
    Ok(Solved {
        h_score,
        alignment,
        solution,
        trade_off,
        trade_off_rule,
        alignment_weight: match weighing {
            Weighing::AlignmentWeight(lambda) => Some(lambda),
            _ => scale.lambda(),
        },
        standard_errors,
    })
}

/// α by any method that needs no forward pass of its own. `num_classes` is the dataset's number of
/// classes; `pool` is there unless it cannot be fitted.
pub fn weigh_features(
    ground: SolveInputs<'_>,
    pool: Option<&Pool>,
    objective: &Objective,
    num_classes: usize,
    steps: &mut Steps<'_>,
    validate: Validate<'_>,
) -> Result<(Solved, MethodReport), EngineError> {
    let mut report = MethodReport {
        name: objective.method(),
        ..MethodReport::default()
    };
    if objective.method().solves() {
        return Ok((solve(ground, objective, steps, validate)?, report));
    }
    let m = ground.features.size()[0] as usize;
    let alpha = match &objective.options {
        MethodOptions::SingleBest(single) => {
            let _alone = OneThread::begin();
            let tick = &mut || stop_on(steps.tick(Phase::Solve));
            let scores = scores(single.by, ground, objective, num_classes, tick)?;
            let alpha = single_best(&scores);
            report.scores = Some(scores);
            alpha
        }
        MethodOptions::Pool(_) => pool
            .ok_or_else(|| InvalidObjective {
                field: "method",
                problem: NO_PREDICTIONS.into(),
            })?
            .over_prompts(),
        _ => uniform(m),
    };
    Ok((Solved::given(ground, objective, alpha)?, report))
}

impl Solved {
    /// The result for an α that was not solved for.
    pub fn given(
        ground: SolveInputs<'_>,
        objective: &Objective,
        alpha: Vec<f64>,
    ) -> Result<Self, EngineError> {
        let h_score = HScore::new(ground.features, ground.labels, &objective.h_score)?;
        let _alone = OneThread::begin();
        let alignment = alignment_of(ground, objective);
        let terms = Terms {
            h_score: &h_score,
            alignment: &alignment,
        };
        Ok(Self {
            solution: Solution::given(terms, alpha)?,
            h_score,
            alignment,
            trade_off: None,
            trade_off_rule: None,
            alignment_weight: None,
            standard_errors: None,
        })
    }
}

/// L_align from the gradients, or of none if there are none.
fn alignment_of(ground: SolveInputs<'_>, objective: &Objective) -> GradientAlignment {
    let m = ground.features.size()[0] as usize;
    let statistics = match ground.gradients {
        Some(gradients) => gradients.whole.clone(),
        None => AlignmentStatistics::none(m),
    };
    let AlignmentOptions { variant, .. } = objective.alignment().unwrap_or_default();
    GradientAlignment::new(variant, statistics)
}

/// The point of least loss; of equals the one nearest the middle of the path, where neither term is
/// given up.
fn least_loss(points: &[OnUnseen]) -> usize {
    let middle = points.len() / 2;
    (0..points.len())
        .min_by(|a, b| {
            let nearer = a.abs_diff(middle).cmp(&b.abs_diff(middle));
            points[*a].loss.total_cmp(&points[*b].loss).then(nearer)
        })
        .unwrap_or(middle)
}
