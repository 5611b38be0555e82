//! The settings table: settings of HGPrompt beside the other methods, with the criteria that need
//! no test label and the test accuracies. It shows by which criterion a default may be chosen, and
//! what the choice is worth. Heads are in closed form, whatever the profile.

use crate::reproduce::cells::{DEFAULT, HGPROMPT, METHODS, OWN, VARIANTS, method};
use crate::reproduce::measures::{half_interval, spearman};
use crate::reproduce::report::{Report, mean_of, number, table};
use crate::reproduce::results::Row;

/// A value in a row.
type RowValue = fn(&Row) -> Option<f64>;

/// Criteria by which settings could be chosen. Higher is better.
const CRITERIA: [(&str, RowValue); 6] = [
    ("held-out loss", |row| Some(-row.held_out_loss?)),
    ("held-out accuracy", |row| row.held_out_accuracy),
    ("cross-fitted loss", |row| Some(-row.validation_loss?)),
    ("cross-fitted accuracy", |row| row.validation_accuracy),
    ("H of the composed prompt", |row| {
        // H is compared only among methods that have it on one scale.
        let others = ["trace_ratio", "h_shrinkage", "cross_validated", DEFAULT];
        let is_other = others.iter().any(|other| row.method.starts_with(other));
        (!is_other).then_some(row.h_score)
    }),
    ("accuracy on the samples the head was fitted on", |row| {
        Some(row.train_accuracy)
    }),
];

fn held_out_loss(row: &Row) -> Option<f64> {
    row.held_out_loss
}

fn test(row: &Row) -> Option<f64> {
    Some(100.0 * row.eval_accuracy)
}

fn all() -> impl Iterator<Item = &'static str> {
    METHODS.iter().chain(&VARIANTS).map(|method| method.key)
}

impl Report<'_> {
    /// The table, for the seeds that have every row that some seed has for all targets. So all rows
    /// of the table are from the same seeds.
    pub(super) fn settings(&self) -> String {
        let has = |seed: u64, key: &str| {
            let of_seed = Report {
                seeds: &[seed],
                ..*self
            };
            of_seed
                .targets()
                .all(|target| of_seed.is_whole(target, key))
        };
        let of_some: Vec<&str> = all()
            .filter(|key| self.seeds.iter().any(|seed| has(*seed, key)))
            .collect();
        let has_all = |seed: &u64| of_some.iter().all(|key| has(*seed, key));
        let whole: Vec<u64> = self.seeds.iter().copied().filter(has_all).collect();
        let seeds = if whole.is_empty() { self.seeds } else { &whole };
        Report { seeds, ..*self }.settings_of_seeds()
    }

    fn settings_of_seeds(&self) -> String {
        let targets: Vec<&str> = self
            .targets()
            .filter(|t| self.is_whole(t, HGPROMPT))
            .collect();
        let of_method = |key: &'static str| -> ([f64; 2], Vec<String>) {
            let mean =
                |of: RowValue| mean_of(&self.by_target(&targets, key, of).unwrap_or_default());
            let losses = [mean(held_out_loss), mean(|row| row.validation_loss)];
            let row = vec![
                method(key).label.to_owned(),
                number(losses[0], 3),
                self.beside_published(&targets, key, held_out_loss, 3),
                number(mean(|row| Some(100.0 * row.held_out_accuracy?)), 1),
                number(losses[1], 3),
                number(mean(test), 1),
                self.beside_published(&targets, key, test, 1),
            ];
            (losses.map(|loss| loss.unwrap_or(f64::INFINITY)), row)
        };
        let mut rows: Vec<_> = all().map(of_method).collect();
        rows.sort_by(|(a, _), (b, _)| a[0].total_cmp(&b[0]).then(a[1].total_cmp(&b[1])));
        let header = [
            "setting",
            "held-out loss",
            "less that as published, 95 %",
            "held-out accuracy",
            "cross-fitted loss",
            "test",
            "less that as published, 95 %",
        ];
        let criteria = CRITERIA.iter().map(|(name, criterion)| {
            // The target's own prompt was tuned on the samples that validate the others.
            let methods = || all().filter(|key| *key != OWN);
            let of_target = |target: &&str| self.foretold(target, methods(), *criterion);
            let coefficients: Vec<f64> = targets.iter().filter_map(of_target).collect();
            let half =
                half_interval(&coefficients).map_or("–".into(), |half| format!("± {half:.2}"));
            vec![(*name).to_owned(), number(mean_of(&coefficients), 2), half]
        });
        format!(
            "\n### Settings\n\nThe composed prompt with its closed-form head, of seeds {}, the mean over the {} tasks that have \
             rows of HGPrompt for all of them, in the order of the loss (nats) on held-out images: training images that are not among the N samples, seen \
             by no method. The cross-fitted loss is over ten folds of the N samples, and what some methods choose by, which makes it \
             too low for these, and for the own prompt, which was tuned on them. Losses are at the temperature of least loss. \
             Intervals are Student's over the tasks; a dash where some task has no row yet.\n\n{}\n\
             Spearman's coefficient, over the rows of the table above but the own prompt's, of what could be chosen by with test \
             accuracy; mean over tasks with Student's interval.\n\n{}",
            self.seed_names(),
            targets.len(),
            table(
                &header.map(str::to_owned),
                rows.into_iter().map(|(_, row)| row)
            ),
            table(
                &["choice by", "coefficient", "95 %"].map(str::to_owned),
                criteria
            ),
        )
    }

    /// Student's interval of a method's numbers minus those of HGPrompt as published.
    fn beside_published(
        &self,
        targets: &[&str],
        key: &str,
        of: RowValue,
        decimals: usize,
    ) -> String {
        let published = self.by_target(targets, HGPROMPT, of).unwrap_or_default();
        let others = self.by_target(targets, key, of).unwrap_or_default();
        let beside: Vec<f64> = others.iter().zip(&published).map(|(a, b)| a - b).collect();
        let (mean, half) = (mean_of(&beside), half_interval(&beside));
        match mean.zip(half).filter(|_| key != HGPROMPT) {
            None => "–".into(),
            Some((mean, half)) => {
                format!("{:+.decimals$} to {:+.decimals$}", mean - half, mean + half)
            }
        }
    }

    fn is_whole(&self, target: &str, key: &str) -> bool {
        let rows = self.rows_of(target, key);
        rows.len() == self.seeds.len() && rows.iter().all(|row| row.validation_loss.is_some())
    }

    /// Means over seeds, by target; `None` if some target lacks a row.
    fn by_target(
        &self,
        targets: &[&str],
        key: &str,
        of: impl Fn(&Row) -> Option<f64>,
    ) -> Option<Vec<f64>> {
        let mean = |target: &&str| {
            let values: Option<Vec<f64>> = self.rows_of(target, key).into_iter().map(&of).collect();
            mean_of(&values?).filter(|_| self.is_whole(target, key))
        };
        targets.iter().map(mean).collect()
    }

    /// The rank correlation of a criterion with the methods' test accuracies on a target.
    fn foretold(
        &self,
        target: &str,
        methods: impl Iterator<Item = &'static str>,
        criterion: RowValue,
    ) -> Option<f64> {
        let of_method = |key: &'static str| {
            let chosen_by = self.by_target(&[target], key, criterion)?[0];
            let tested = self.by_target(&[target], key, |row| Some(row.eval_accuracy))?[0];
            Some((chosen_by, tested))
        };
        let (by, tested): (Vec<f64>, Vec<f64>) = methods.filter_map(of_method).unzip();
        spearman(&by, &tested)
    }
}
