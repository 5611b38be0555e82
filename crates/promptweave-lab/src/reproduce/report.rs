//! The four tables, their comma-separated values, and their pictures, made from the rows alone.

use std::fmt::Write as _;
use std::path::Path;

use clap::ValueEnum as _;

use crate::reproduce::cells::{ABLATION, DEFAULT, HGPROMPT, METHODS, NONE, OWN, method};
use crate::reproduce::measures::{half_interval, mean_and_deviation};
use crate::reproduce::results::Row;
use crate::reproduce::suite::Suite;
use crate::reproduce::{Settings, Table};
use crate::reproduce::{layouts, plots};
use promptweave::offline::write_whole;

/// The methods that HGPrompt is compared with.
const RIVALS: [&str; 11] = [
    NONE,
    OWN,
    "average",
    "single_best",
    "single_best_logme",
    "single_best_validation",
    "spot",
    "spot_token_mean",
    "spot_best_of_3",
    "panda",
    "attempt",
];

pub struct Report<'a> {
    pub suite: &'a Suite,
    pub seeds: &'a [u64],
    pub settings: &'a Settings,
    pub rows: &'a [Row],
    /// Tables that have cells without a row, and the number of such cells.
    pub missing: &'a [(Table, usize)],
}

impl<'a> Report<'a> {
    /// Writes report.md, the cells as CSV and the pictures as SVG, from the rows that exist.
    pub fn write(&self, out: &Path, tables: &[Table]) -> anyhow::Result<()> {
        let all: Vec<&str> = METHODS.iter().map(|method| method.key).collect();
        let seed = self.seeds.first().copied().unwrap_or_default();
        let layouts = layouts::read(out, self.suite, seed)?;
        let text = tables.iter().map(|table| match table {
            Table::Main => self.accuracies("Accuracy", &all) + &self.differences(),
            Table::Ablation => self.accuracies("Ablation: both terms, and each alone", &ABLATION),
            Table::Spearman => self.correlations(),
            Table::Scalability => self.scalability(),
            Table::Settings => self.settings(),
            Table::Tsne => layouts::section(&layouts, self.suite.tasks.len(), seed),
        });
        let text = self.preface() + &text.collect::<String>();
        write_whole(&out.join("report.md"), text.as_bytes())?;
        write_whole(&out.join("cells.csv"), self.csv().as_bytes())?;
        for table in tables {
            match table {
                Table::Main => {
                    plots::accuracies(&out.join("accuracies.svg"), &self.means(&all))?;
                    plots::weights(&out.join("weights.svg"), &self.weights())?;
                }
                Table::Ablation | Table::Settings => {}
                Table::Spearman => {
                    plots::correlation(&out.join("spearman.svg"), &self.points())?;
                }
                Table::Scalability => {
                    plots::scalability(&out.join("scalability.svg"), &self.by_number())?;
                }
                Table::Tsne => layouts::picture(&out.join("tsne.svg"), &layouts)?,
            }
        }
        println!("wrote {}", out.join("report.md").display());
        Ok(())
    }

    fn preface(&self) -> String {
        let Settings {
            source_samples,
            target_samples,
            source_tuning,
            precision,
            ..
        } = self.settings;
        let seconds = (self.rows.iter()).fold(0.0, |sum, row| sum + row.seconds);
        let of_tuning = self.rows.iter().filter_map(|row| row.tuning_seconds);
        // `sum` over nothing would give -0.
        let tuning = of_tuning.fold(0.0, |sum, seconds| sum + seconds);
        let heads = match &self.settings.target_tuning {
            None => "a closed-form head, no target tuning but for what SPoT and PANDA compare with"
                .to_owned(),
            Some(tuning) => format!(
                "then prompt and head tuned on them for {} epochs, from the composed prompt and its closed-form head",
                tuning.epochs
            ),
        };
        let of_table = |(table, missing): &(Table, usize)| {
            let table = table.to_possible_value().expect("none is hidden");
            format!("{missing} of `{}`", table.get_name())
        };
        let missing: Vec<String> = self.missing.iter().map(of_table).collect();
        let missing = match missing.as_slice() {
            [] => String::new(),
            some => format!(" **Not finished: cells are missing, {}.**", some.join(", ")),
        };
        format!(
            "Profile {}, {precision}: {} tasks, seeds {}; {} cells.{missing} Source prompts of {} tokens, {} epochs on up to \
             {source_samples} images each; N = up to {target_samples} target images; {heads}. The compositions took {seconds:.0} s together and \
             the tunings on the target {tuning:.0} s, those of the sources not counted.\n",
            self.settings.profile,
            self.suite.tasks.len(),
            self.seed_names(),
            self.rows.len(),
            source_tuning.num_tokens,
            source_tuning.epochs,
        )
    }

    pub(super) fn seed_names(&self) -> String {
        let seeds: Vec<String> = self.seeds.iter().map(u64::to_string).collect();
        seeds.join(", ")
    }

    /// The rows of a method with all the sources that it takes, one for each seed.
    pub(super) fn rows_of(&self, target: &str, key: &str) -> Vec<&Row> {
        let all = self.suite.others(target);
        let whole = |row: &&Row| matches!(key, NONE | OWN) || row.sources == all;
        self.of(target, key).into_iter().filter(whole).collect()
    }

    pub(super) fn of(&self, target: &str, key: &str) -> Vec<&Row> {
        let seeds = self.seeds;
        let rows = self.rows.iter();
        rows.filter(|row| row.target == target && row.method == key && seeds.contains(&row.seed))
            .collect()
    }

    pub(super) fn targets(&self) -> impl Iterator<Item = &'a str> {
        self.suite.tasks.iter().map(|task| task.name.as_str())
    }

    /// Accuracies in percent, one for each seed.
    fn percents(&self, target: &str, key: &str) -> Vec<f64> {
        let rows = self.rows_of(target, key);
        rows.iter().map(|row| 100.0 * row.accuracy()).collect()
    }

    /// Targets that have rows of all these methods.
    fn common_targets(&self, keys: &[&str]) -> Vec<&'a str> {
        let has_all = |target: &&str| keys.iter().all(|key| !self.rows_of(target, key).is_empty());
        self.targets().filter(has_all).collect()
    }

    /// Each method's mean over the targets that have rows of all of them, so that the means can be
    /// compared. `None` without such targets.
    fn means(&self, keys: &[&str]) -> Vec<(&'static str, Option<f64>)> {
        let targets = self.common_targets(keys);
        let mean = |key: &&str| {
            let of_target = |target: &&str| mean_of(&self.percents(target, key));
            let of_targets: Vec<f64> = targets.iter().filter_map(of_target).collect();
            (method(key).label, mean_of(&of_targets))
        };
        keys.iter().map(mean).collect()
    }

    fn accuracies(&self, title: &str, keys: &[&str]) -> String {
        let mut header = vec!["method".to_owned()];
        header.extend(self.targets().map(str::to_owned));
        header.push("mean".into());
        let means = self.means(keys);
        let rows = keys.iter().zip(&means).map(|(key, (label, mean))| {
            let of_targets = self
                .targets()
                .map(|target| spread(&self.percents(target, key)));
            let mut row = vec![(*label).to_owned()];
            row.extend(of_targets);
            row.push(number(*mean, 1));
            row
        });
        let common = self.common_targets(keys).len();
        format!(
            "\n### {title}\n\nTest accuracy in percent, mean ± standard deviation over seeds; the mean is over the {common} \
             tasks that have rows of all methods.\n\n{}",
            table(&header, rows)
        )
    }

    /// Differences of HGPrompt, the default and as published, from its rivals.
    fn differences(&self) -> String {
        let all = RIVALS.into_iter();
        format!(
            "\n### Differences\n\nPaired over tasks and seeds: a task's difference is the mean over its seeds, the interval \
             is Student's over the tasks, each row for itself: of so many rows one may lie outside by chance.\n\n{}\n{}\n{}",
            self.differences_of(DEFAULT, "the default", all.clone().chain([HGPROMPT])),
            self.gave_way(),
            self.differences_of(HGPROMPT, "as published", all),
        )
    }

    /// Text about how often the default gives all weight to one source.
    fn gave_way(&self) -> String {
        let rows = self
            .targets()
            .flat_map(|target| self.rows_of(target, DEFAULT));
        let alone: Vec<bool> = rows.map(|row| row.weights.contains(&1.0)).collect();
        let times = alone.iter().filter(|alone| **alone).count();
        format!(
            "The default gave all weight to one source in {times} of {} cells.\n",
            alone.len()
        )
    }

    /// Differences with one number for each task, its mean over the seeds, so that a task counts
    /// once.
    fn differences_of(
        &self,
        key: &str,
        name: &str,
        rivals: impl Iterator<Item = &'static str>,
    ) -> String {
        let rows = rivals.map(|rival| {
            let mut differences = Vec::new();
            for target in self.targets() {
                let pairs = self.rows_of(target, key).into_iter().filter_map(|own| {
                    let others = self.rows_of(target, rival);
                    let other = others.into_iter().find(|other| other.seed == own.seed)?;
                    Some(100.0 * (own.accuracy() - other.accuracy()))
                });
                let pairs: Vec<f64> = pairs.collect();
                if !pairs.is_empty() {
                    differences.push(mean_and_deviation(&pairs).0);
                }
            }
            let better = differences
                .iter()
                .filter(|difference| **difference > 0.0)
                .count();
            let mean = mean_of(&differences);
            let interval = mean
                .zip(half_interval(&differences))
                .map(|(mean, half)| (mean - half, mean + half));
            let verdict = match interval {
                Some((low, _)) if low > 0.0 => "better",
                Some((_, high)) if high < 0.0 => "worse",
                _ => "not told apart",
            };
            vec![
                method(rival).label.to_owned(),
                mean.map_or("–".into(), |mean| format!("{mean:+.1}")),
                interval.map_or("–".into(), |(low, high)| {
                    format!("{low:+.1} to {high:+.1}")
                }),
                format!("{better} of {}", differences.len()),
                verdict.to_owned(),
            ]
        });
        let header = [
            &format!("{name} less …"),
            "points",
            "95 % interval",
            "better on",
            &format!("{name} is"),
        ];
        table(&header.map(str::to_owned), rows)
    }

    /// HGPrompt's α by target and source, the mean over seeds; `None` on the diagonal.
    fn weights(&self) -> (Vec<&'a str>, Vec<Vec<Option<f64>>>) {
        let names: Vec<&str> = self.targets().collect();
        let of_target = |target: &&str| {
            let rows = self.rows_of(target, HGPROMPT);
            let weight = |source: &&str| {
                let of_seeds = rows.iter().filter_map(|row| {
                    let at = row.sources.iter().position(|name| name == source)?;
                    Some(row.weights[at])
                });
                let of_seeds: Vec<f64> = of_seeds.collect();
                (!of_seeds.is_empty()).then(|| mean_and_deviation(&of_seeds).0)
            };
            names.iter().map(weight).collect()
        };
        let weights = names.iter().map(of_target).collect();
        (names, weights)
    }

    fn csv(&self) -> String {
        let optional = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
        let mut text = "seed,target,method,sources,eval_accuracy,tuned_accuracy,train_accuracy,validation_accuracy,validation_loss,held_out_accuracy,held_out_loss,h_score,uniform_mix,scale,seconds,weights\n".to_owned();
        for row in self.rows {
            let weights: Vec<String> = row
                .sources
                .iter()
                .zip(&row.weights)
                .map(|(s, w)| format!("{s}:{w}"))
                .collect();
            let _ = writeln!(
                text,
                "{},{},{},{},{},{},{},{},{},{},{},{},{},{},{:.3},{}",
                row.seed,
                row.target,
                row.method,
                row.sources.len(),
                row.eval_accuracy,
                optional(row.tuned_accuracy),
                row.train_accuracy,
                optional(row.validation_accuracy),
                optional(row.validation_loss),
                optional(row.held_out_accuracy),
                optional(row.held_out_loss),
                row.h_score,
                optional(row.uniform_mix),
                row.scale,
                row.seconds,
                weights.join(" ")
            );
        }
        text
    }
}

pub(super) fn mean_of(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| mean_and_deviation(values).0)
}

/// A formatted number; a dash for none.
pub(super) fn number(value: Option<f64>, decimals: usize) -> String {
    value.map_or("–".into(), |value| format!("{value:.decimals$}"))
}

/// `mean ± deviation`, the mean of one seed, or a dash.
fn spread(percents: &[f64]) -> String {
    match (percents, mean_and_deviation(percents)) {
        ([], _) => "–".into(),
        ([one], _) => format!("{one:.1}"),
        (_, (mean, deviation)) => format!("{mean:.1} ± {deviation:.1}"),
    }
}

/// A Markdown table, also readable as plain text.
pub(super) fn table(header: &[String], rows: impl Iterator<Item = Vec<String>>) -> String {
    let rows: Vec<Vec<String>> = rows.collect();
    let width = |column: usize| {
        let cells = rows
            .iter()
            .chain([header.to_vec()].iter())
            .map(|row| row[column].chars().count())
            .max();
        cells.unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |row: &[String]| {
        let cells = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(at, (cell, width))| match at {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let rule = widths.iter().enumerate().map(|(at, width)| match at {
        0 => "-".repeat(*width),
        _ => format!("{}:", "-".repeat(width - 1)),
    });
    let rule: Vec<String> = rule.collect();
    let mut text = line(header) + &line(&rule);
    rows.iter().for_each(|row| text += &line(row));
    text
}
