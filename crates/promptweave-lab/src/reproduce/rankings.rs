//! Rankings of the sources compared with each source's worth alone: do scores predict which source
//! helps?

use crate::reproduce::cells::{ALONE, DEFAULT, DENSE, HGPROMPT};
use crate::reproduce::measures::{mean_and_deviation, spearman};
use crate::reproduce::report::{Report, mean_of, number, table};
use crate::reproduce::results::Row;

/// Rankings of the sources, by a method's weights or by a score in some method's row.
const RANKINGS: [(&str, &str, Ranking); 14] = [
    ("HGPrompt, α", HGPROMPT, Ranking::Weights),
    ("HGPrompt, α with entropy 0.1", DENSE.key, Ranking::Weights),
    ("SPoT, all pairs", "spot", Ranking::Score("by_method")),
    (
        "SPoT, mean tokens",
        "spot_token_mean",
        Ranking::Score("by_method"),
    ),
    ("PANDA", "panda", Ranking::Score("by_method")),
    ("H-score", HGPROMPT, Ranking::Score("h_score")),
    (
        "H-score, adjusted",
        HGPROMPT,
        Ranking::Score("h_score_adjusted"),
    ),
    (
        "H-score, cross-validated",
        DEFAULT,
        Ranking::Score("h_score"),
    ),
    ("LogME", HGPROMPT, Ranking::Score("logme")),
    ("LEEP", HGPROMPT, Ranking::Score("leep")),
    ("NCE", HGPROMPT, Ranking::Score("nce")),
    ("OTCE", HGPROMPT, Ranking::Score("otce")),
    (
        "cross-fitted accuracy",
        HGPROMPT,
        Ranking::Alone(|row| row.validation_accuracy),
    ),
    (
        "cross-fitted loss",
        HGPROMPT,
        Ranking::Alone(|row| Some(-row.validation_loss?)),
    ),
];

#[derive(Clone, Copy)]
enum Ranking {
    Weights,
    Score(&'static str),
    /// A value in the row of the source alone.
    Alone(fn(&Row) -> Option<f64>),
}

/// The worth of a source alone. Higher is better.
type Worth = fn(&Row) -> Option<f64>;

const BY_ACCURACY: Worth = |row| Some(row.eval_accuracy);
/// The held-out loss is finer than accuracy on some hundred test images, and comes from more
/// images.
const BY_HELD_OUT_LOSS: Worth = |row| Some(-row.held_out_loss?);

impl<'a> Report<'a> {
    /// A ranking's numbers, and the worths that they are to predict, by source, for one seed.
    fn ranked(&self, row: &Row, ranking: Ranking, worth: Worth) -> Option<(Vec<f64>, Vec<f64>)> {
        let alone = self.of(&row.target, ALONE);
        let of_source = |source: &String| {
            let of = |other: &&&Row| {
                other.seed == row.seed && other.sources == std::slice::from_ref(source)
            };
            alone.iter().find(of).copied()
        };
        let alone: Vec<&Row> = row.sources.iter().map(of_source).collect::<Option<_>>()?;
        let scores = match ranking {
            Ranking::Weights => row.weights.clone(),
            Ranking::Score(name) => {
                let (_, scores) = row.scores.iter().find(|(metric, _)| metric == name)?;
                scores.clone()
            }
            Ranking::Alone(score) => {
                let scores = alone.iter().map(|row| score(row));
                scores.collect::<Option<_>>()?
            }
        };
        let worths = alone.iter().map(|row| worth(row));
        Some((scores, worths.collect::<Option<_>>()?))
    }

    /// The coefficient of each target, as the mean over its seeds; and last the mean over targets.
    fn coefficients(
        &self,
        (_, key, ranking): (&str, &str, Ranking),
        worth: Worth,
    ) -> Vec<Option<f64>> {
        let of_target = |target| {
            let rows = self.rows_of(target, key).into_iter();
            let of_seeds: Vec<f64> = rows
                .filter_map(|row| self.ranked(row, ranking, worth))
                .filter_map(|(scores, worths)| spearman(&scores, &worths))
                .collect();
            mean_of(&of_seeds)
        };
        let mut all: Vec<Option<f64>> = self.targets().map(of_target).collect();
        let there: Vec<f64> = all.iter().flatten().copied().collect();
        all.push(mean_of(&there));
        all
    }

    pub(super) fn correlations(&self) -> String {
        let mut header = vec!["ranking by".to_owned()];
        header.extend(self.targets().map(str::to_owned));
        header.extend(["mean", "by held-out loss"].map(str::to_owned));
        let rows = RANKINGS.into_iter().map(|ranking| {
            let mut coefficients = self.coefficients(ranking, BY_ACCURACY);
            coefficients.extend(self.coefficients(ranking, BY_HELD_OUT_LOSS).pop());
            let mut row = vec![ranking.0.to_owned()];
            row.extend(coefficients.into_iter().map(|mean| number(mean, 2)));
            row
        });
        format!(
            "\n### Do scores foretell which source helps?\n\nSpearman's coefficient, ties at their average rank, of a \
             ranking of the sources with their zero-shot accuracies on the target (the source prompt frozen, a closed-form \
             head); mean over seeds. The last column is the mean with their losses on held-out images in place of accuracies, \
             which are coarser.\n\n{}",
            table(&header, rows)
        )
    }

    /// HGPrompt's α, with each source's accuracy minus the target's mean, in points.
    pub(super) fn points(&self) -> Vec<(&'a str, Vec<(f64, f64)>)> {
        let of_target = |target: &'a str| {
            let mut points = Vec::new();
            for row in self.rows_of(target, HGPROMPT) {
                if let Some((weights, accuracies)) = self.ranked(row, Ranking::Weights, BY_ACCURACY)
                {
                    let mean = mean_and_deviation(&accuracies).0;
                    let relative = accuracies.iter().map(|accuracy| 100.0 * (accuracy - mean));
                    points.extend(weights.into_iter().zip(relative));
                }
            }
            (target, points)
        };
        self.targets().map(of_target).collect()
    }
}
