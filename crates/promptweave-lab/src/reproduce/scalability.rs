//! Accuracy by the number of sources, over nested subsets of them.

use crate::reproduce::cells::{ORDERS, SCALABILITY, method, sizes, subset};
use crate::reproduce::measures::mean_and_deviation;
use crate::reproduce::plots;
use crate::reproduce::report::{Report, table};

impl<'a> Report<'a> {
    /// By method: the number of sources, with mean and deviation over seeds and orders of the mean
    /// over the targets.
    pub(super) fn by_number(&self) -> Vec<plots::Line<'static>> {
        let sizes = sizes(self.suite.tasks.len() - 1);
        let seeds = self.seeds_of_all_sizes();
        let of_method = |key: &'static str| {
            let of_size = |size: &usize| {
                let orders = seeds
                    .iter()
                    .flat_map(|seed| (0..ORDERS).map(move |order| (*seed, order)));
                let means: Vec<f64> = orders
                    .filter_map(|(seed, order)| self.mean_of_order(key, *size, seed, order))
                    .collect();
                let (mean, deviation) = mean_and_deviation(&means);
                (!means.is_empty()).then_some((*size, mean, deviation))
            };
            (
                method(key).label,
                sizes.iter().filter_map(of_size).collect(),
            )
        };
        SCALABILITY.into_iter().map(of_method).collect()
    }

    /// The seeds that have every row, so that all numbers of sources are from the same seeds.
    fn seeds_of_all_sizes(&self) -> Vec<u64> {
        let sizes = sizes(self.suite.tasks.len() - 1);
        let has = |seed: u64, key: &str| {
            let mut subsets =
                (sizes.iter()).flat_map(|size| (0..ORDERS).map(move |order| (*size, order)));
            subsets.all(|(size, order)| self.mean_of_order(key, size, seed, order).is_some())
        };
        let whole = |seed: &u64| SCALABILITY.iter().all(|key| has(*seed, key));
        self.seeds.iter().copied().filter(whole).collect()
    }

    /// Mean accuracy over all targets in percent; `None` until all are there.
    fn mean_of_order(&self, key: &str, size: usize, seed: u64, order: u64) -> Option<f64> {
        let of_target = |target: &'a str| {
            let sources = subset(&self.suite.others(target), size, seed, order);
            let rows = self.of(target, key).into_iter();
            let mut of_subset = rows.filter(|row| row.seed == seed && row.sources == sources);
            of_subset.next().map(|row| 100.0 * row.accuracy())
        };
        let accuracies: Option<Vec<f64>> = self.targets().map(of_target).collect();
        accuracies.map(|accuracies| mean_and_deviation(&accuracies).0)
    }

    pub(super) fn scalability(&self) -> String {
        let series = self.by_number();
        let sizes: Vec<usize> = series
            .first()
            .map_or(Vec::new(), |(_, of)| of.iter().map(|p| p.0).collect());
        let mut header = vec!["sources".to_owned()];
        header.extend(sizes.iter().map(usize::to_string));
        let rows = series.iter().map(|(label, of_sizes)| {
            let mut row = vec![(*label).to_owned()];
            row.extend(sizes.iter().map(|size| {
                let found = of_sizes.iter().find(|(of, ..)| of == size);
                found.map_or("–".into(), |(_, mean, error)| {
                    format!("{mean:.1} ± {error:.1}")
                })
            }));
            row
        });
        let seeds = self.seeds_of_all_sizes();
        let of = Report {
            seeds: &seeds,
            ..*self
        };
        format!(
            "\n### More sources\n\nMean test accuracy over all targets in percent, mean ± standard deviation over the seeds that have \
             every row ({}) and the {ORDERS} orders in which sources are added.\n\n{}",
            of.seed_names(),
            table(&header, rows)
        )
    }
}
