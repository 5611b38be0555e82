//! What a default is to be chosen by, and what the choice is worth: settings of HGPrompt beside the other methods, by what
//! can be known without a test label and by what test labels say. Closed-form heads, whatever the profile.

use super::cells::{HGPROMPT, METHODS, VARIANTS, method};
use super::measures::{half_interval, mean_and_deviation, spearman};
use super::report::{Report, mean_of, number, table};
use super::results::Row;

/// Something that a row says.
type Said = fn(&Row) -> Option<f64>;

/// What could be chosen by, the better the higher.
const CRITERIA: [(&str, Said); 4] = [
    ("cross-fitted loss", |row| Some(-row.validation_loss?)),
    ("cross-fitted accuracy", |row| row.validation_accuracy),
    ("H of the composed prompt", |row| {
        // On one scale alone.
        let is_inv =
            !row.method.starts_with("trace_ratio") && !row.method.starts_with("h_shrinkage");
        is_inv.then_some(row.h_score)
    }),
    ("accuracy on the samples the head was fitted on", |row| {
        Some(row.train_accuracy)
    }),
];

impl Report<'_> {
    pub(super) fn settings(&self) -> String {
        let targets: Vec<&str> = self
            .targets()
            .filter(|t| self.is_whole(t, HGPROMPT))
            .collect();
        let all = || METHODS.iter().chain(&VARIANTS).map(|method| method.key);
        let test = |row: &Row| Some(100.0 * row.eval_accuracy);
        let own = self.by_target(&targets, HGPROMPT, test).unwrap_or_default();
        let of_method = |key: &'static str| -> (f64, Vec<String>) {
            let mean = |of: Said| mean_of(&self.by_target(&targets, key, of).unwrap_or_default());
            let loss = mean(|row| row.validation_loss);
            let tested = self.by_target(&targets, key, test).unwrap_or_default();
            let beside: Vec<f64> = tested.iter().zip(&own).map(|(a, b)| a - b).collect();
            let interval = half_interval(&beside)
                .filter(|_| key != HGPROMPT)
                .map(|half| {
                    let mean = mean_and_deviation(&beside).0;
                    format!("{:+.1} to {:+.1}", mean - half, mean + half)
                });
            let row = vec![
                method(key).label.to_owned(),
                number(loss, 3),
                number(mean(|row| Some(100.0 * row.validation_accuracy?)), 1),
                number(mean_of(&tested), 1),
                interval.unwrap_or("–".into()),
            ];
            (loss.unwrap_or(f64::INFINITY), row)
        };
        let mut rows: Vec<(f64, Vec<String>)> = all().map(of_method).collect();
        rows.sort_by(|a, b| a.0.total_cmp(&b.0));
        let header = [
            "setting",
            "cross-fitted loss",
            "accuracy",
            "test",
            "test less HGPrompt's, 95 %",
        ];
        let criteria = CRITERIA.iter().map(|(name, criterion)| {
            let of_target = |target: &&str| self.foretold(target, all(), *criterion);
            let coefficients: Vec<f64> = targets.iter().filter_map(of_target).collect();
            let half =
                half_interval(&coefficients).map_or("–".into(), |half| format!("± {half:.2}"));
            vec![(*name).to_owned(), number(mean_of(&coefficients), 2), half]
        });
        format!(
            "\n### Settings\n\nThe composed prompt with its closed-form head, the mean over the {} tasks that have rows of HGPrompt \
             for all seeds, in the order of what can be known without a test label: loss (nats) and accuracy cross-fitted over ten \
             folds of the target samples. The interval is Student's over the tasks; a dash where some task has no row yet.\n\n{}\n\
             Spearman's coefficient, over the rows of the table above, of what could be chosen by with test accuracy; mean over tasks \
             with Student's interval.\n\n{}",
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

    fn is_whole(&self, target: &str, key: &str) -> bool {
        let rows = self.rows_of(target, key);
        rows.len() == self.seeds.len() && rows.iter().all(|row| row.validation_loss.is_some())
    }

    /// Means over seeds; None where some target lacks a row.
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

    /// How a criterion ranks the methods of a target, beside their test accuracies.
    fn foretold(
        &self,
        target: &str,
        methods: impl Iterator<Item = &'static str>,
        criterion: Said,
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
