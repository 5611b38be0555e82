//! The cells to compute. A cell is one target, one method, some sources and one seed.

use std::fmt;

use serde_json::{Value, json};

use crate::reproduce::Table;
use crate::reproduce::suite::Suite;
use promptweave_domain::stratified::stratified_subset;

/// A way to a prompt for a target, with the key that rows and tables use.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    pub key: &'static str,
    pub label: &'static str,
    /// The method as a request's `objective`.
    pub objective: fn() -> Value,
}

/// The initial prompt without any source: no transfer.
pub const NONE: &str = "none";
/// The prompt tuned on the target itself, which no transfer method has. It shows how much there is
/// to gain.
pub const OWN: &str = "own";
/// A single source, unchanged.
pub const ALONE: &str = "alone";
/// HGPrompt as published.
pub const HGPROMPT: &str = "hgprompt";
/// The method of an empty objective.
pub const DEFAULT: &str = "hgprompt_cv";

/// The methods in the order of the tables.
pub const METHODS: [Method; 17] = [
    Method {
        key: NONE,
        label: "no transfer (initial prompt)",
        objective: || published(json!({"method": "average"})),
    },
    Method {
        key: OWN,
        label: "the target's own prompt",
        objective: || published(json!({"method": "average"})),
    },
    Method {
        key: "average",
        label: "average",
        objective: || published(json!({"method": "average"})),
    },
    Method {
        key: "single_best",
        label: "single best, by H",
        objective: || published(json!({"method": "single_best"})),
    },
    Method {
        key: "single_best_logme",
        label: "single best, by LogME",
        objective: || published(json!({"method": "single_best", "by": "logme"})),
    },
    Method {
        key: "single_best_validation",
        label: "single best, by validation",
        objective: || published(json!({"method": "single_best", "by": "validation"})),
    },
    Method {
        key: "spot",
        label: "SPoT, all pairs",
        objective: || published(json!({"method": "spot"})),
    },
    Method {
        key: "spot_token_mean",
        label: "SPoT, mean tokens",
        objective: || published(json!({"method": "spot", "similarity": "token_mean"})),
    },
    Method {
        key: "spot_best_of_3",
        label: "SPoT, best of 3",
        objective: || published(json!({"method": "spot", "top_k": 3, "choice": "best_of"})),
    },
    Method {
        key: "panda",
        label: "PANDA",
        objective: || published(json!({"method": "panda"})),
    },
    Method {
        key: "attempt",
        label: "ATTEMPT, mean attention",
        objective: || published(json!({"method": "attempt"})),
    },
    Method {
        key: "h_only",
        label: "H only",
        objective: || published(json!({"method": "h_only"})),
    },
    Method {
        key: "alignment_only",
        label: "alignment only",
        objective: || published(json!({"method": "alignment_only"})),
    },
    Method {
        key: HGPROMPT,
        label: "HGPrompt, as published",
        objective: || published(json!({})),
    },
    Method {
        key: DEFAULT,
        label: "HGPrompt, promptweave's default",
        objective: || json!({}),
    },
    Method {
        key: "average_auto",
        label: "average, scale auto",
        objective: || published(json!({"method": "average", "experimental": {"scale": "auto"}})),
    },
    Method {
        key: "hgprompt_auto",
        label: "HGPrompt, scale auto",
        objective: || published(json!({"experimental": {"scale": "auto"}})),
    },
];

/// HGPrompt with dense weights, which rank all sources. Its ranks are correlated with the sources'
/// own accuracies; it is not in the main table.
pub const DENSE: Method = Method {
    key: "hgprompt_dense",
    label: "HGPrompt, entropy 0.1",
    objective: || published(json!({"experimental": {"entropy": 0.1}})),
};
const ALONE_METHOD: Method = Method {
    key: ALONE,
    label: "a source alone",
    objective: || published(json!({"method": "average"})),
};

/// Settings of HGPrompt and of its rivals from which a default could be chosen. Their prompts are
/// used unchanged with a closed-form head, whatever the profile.
pub const VARIANTS: [Method; 24] = [
    Method {
        key: "trade_off_0.9",
        label: "trade-off 0.9",
        objective: || published(json!({"trade_off": 0.9})),
    },
    Method {
        key: "h_shrinkage_0.1",
        label: "ρ of H 0.1",
        objective: || published(json!({"h_score": {"shrinkage": 0.1}})),
    },
    Method {
        key: "published_fallback",
        label: "as published; or the single best",
        objective: || published(json!({"fallback": "single_best"})),
    },
    Method {
        key: "cross_validated",
        label: "cross-validated H",
        objective: || json!({"fallback": "none"}),
    },
    Method {
        key: "cross_validated_only",
        label: "cross-validated H only",
        objective: || json!({"method": "h_only"}),
    },
    Method {
        key: "cross_validated_0.6_only",
        label: "cross-validated H only, ρ 0.6",
        objective: || json!({"method": "h_only", "h_score": {"shrinkage": 0.6}}),
    },
    Method {
        key: "cross_validated_auto",
        label: "cross-validated H only; share of equal weights and scale auto",
        objective: || json!({"method": "h_only", "experimental": {"uniform_mix": "auto", "scale": "auto"}}),
    },
    Method {
        key: "cross_validated_both_auto",
        label: "cross-validated H; share of equal weights and scale auto",
        objective: || json!({"fallback": "none", "experimental": {"uniform_mix": "auto", "scale": "auto"}}),
    },
    Method {
        key: "cross_validated_validated",
        label: "cross-validated H; trade-off and scale by validation",
        objective: || json!({"fallback": "none", "trade_off": "validation", "experimental": {"scale": "auto"}}),
    },
    Method {
        key: "hgprompt_cv_auto",
        label: "promptweave's default, scale auto",
        objective: || json!({"experimental": {"scale": "auto"}}),
    },
    Method {
        key: "trace_ratio",
        label: "H as a ratio of traces, standardised",
        objective: || {
            published(json!({"h_score": {"mode": "trace_ratio", "standardise": "per_source"}}))
        },
    },
    Method {
        key: "aligned",
        label: "tokens aligned",
        objective: || published(json!({"align_tokens": "hungarian"})),
    },
    Method {
        key: "validated",
        label: "trade-off and scale by validation",
        objective: || {
            published(json!({"trade_off": "validation", "experimental": {"scale": "auto"}}))
        },
    },
    Method {
        key: "trace_ratio_validated",
        label: "trade-off, scale by validation; H as a ratio of traces",
        objective: || {
            published(json!({
                "h_score": {"mode": "trace_ratio", "standardise": "per_source"},
                "trade_off": "validation",
                "experimental": {"scale": "auto"},
            }))
        },
    },
    DENSE,
    Method {
        key: "entropy_1",
        label: "entropy 1",
        objective: || published(json!({"experimental": {"entropy": 1.0}})),
    },
    Method {
        key: "scale_0.5",
        label: "scale 0.5",
        objective: || published(json!({"experimental": {"scale": 0.5}})),
    },
    Method {
        key: "average_scale_0.5",
        label: "average, scale 0.5",
        objective: || published(json!({"method": "average", "experimental": {"scale": 0.5}})),
    },
    Method {
        key: "single_best_auto",
        label: "single best by validation, scale auto",
        objective: || {
            published(json!({
                "method": "single_best",
                "by": "validation",
                "experimental": {"scale": "auto"},
            }))
        },
    },
    Method {
        key: "uniform_mix_auto",
        label: "share of equal weights auto",
        objective: || published(json!({"experimental": {"uniform_mix": "auto"}})),
    },
    Method {
        key: "both_auto",
        label: "share of equal weights and scale auto",
        objective: || published(json!({"experimental": {"uniform_mix": "auto", "scale": "auto"}})),
    },
    Method {
        key: "h_only_both_auto",
        label: "H only; share of equal weights and scale auto",
        objective: || {
            published(
                json!({"method": "h_only", "experimental": {"uniform_mix": "auto", "scale": "auto"}}),
            )
        },
    },
    Method {
        key: "initial_too",
        label: "the initial prompt as one more source",
        objective: || published(json!({})),
    },
    Method {
        key: "best_initial_too",
        label: "single best by validation, the initial prompt among them",
        objective: || published(json!({"method": "single_best", "by": "validation"})),
    },
];

/// Sets H to HGPrompt's published mode. All methods then report H on one scale, and HGPrompt weighs
/// by it.
fn published(mut objective: Value) -> Value {
    let fields = objective.as_object_mut().expect("an object");
    fields.entry("method").or_insert(json!("hgprompt"));
    let h_score = fields.entry("h_score").or_insert(json!({}));
    if h_score.get("mode").is_none() {
        h_score["mode"] = json!("standard");
    }
    objective
}

pub const ABLATION: [&str; 5] = [NONE, "average", "h_only", "alignment_only", HGPROMPT];
pub const SCALABILITY: [&str; 6] = ["average", "single_best", "spot", "panda", HGPROMPT, DEFAULT];
/// Number of orders in which sources are added.
pub const ORDERS: u64 = 3;

fn all() -> impl Iterator<Item = Method> {
    METHODS.into_iter().chain(VARIANTS).chain([ALONE_METHOD])
}

pub fn method(key: &str) -> Method {
    let mut found = all().filter(|method| method.key == key);
    found.next().expect("keys are of this module")
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    pub seed: u64,
    pub target: String,
    pub method: &'static str,
    /// The sources' tasks, by name; empty for [`NONE`].
    pub sources: Vec<String>,
}

impl Cell {
    /// Whether the initial prompt is also a source, after the others.
    pub fn has_initial(&self) -> bool {
        self.method == NONE || self.method.contains("initial_too")
    }

    /// Whether prompt and head are tuned on the target, if the profile does that.
    pub fn is_tuned(&self) -> bool {
        // A source alone serves to judge rankings only.
        self.method != ALONE && VARIANTS.iter().all(|variant| variant.key != self.method)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            seed,
            target,
            method,
            sources,
        } = self;
        match sources.as_slice() {
            [one] => write!(f, "seed {seed}, {target}, {method} ({one})"),
            several => write!(f, "seed {seed}, {target}, {method} of {}", several.len()),
        }
    }
}

/// All cells of these tables, one seed and one target after the other, so that a target's features
/// are at hand for all its methods.
pub fn cells(suite: &Suite, seeds: &[u64], tables: &[Table]) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    for seed in seeds {
        for target in &suite.targets {
            for cell in of_target(suite, *seed, target, tables) {
                if !cells.contains(&cell) {
                    cells.push(cell);
                }
            }
        }
    }
    cells
}

fn of_target(suite: &Suite, seed: u64, target: &str, tables: &[Table]) -> Vec<Cell> {
    let others = suite.others(target);
    let cell = |method: &'static str, sources: &[String]| Cell {
        seed,
        target: target.to_owned(),
        method,
        sources: sources.to_vec(),
    };
    let with_all = |key: &'static str| match key {
        NONE => cell(NONE, &[]),
        OWN => cell(OWN, &[target.to_owned()]),
        key => cell(key, &others),
    };
    let mut cells = Vec::new();
    for table in tables {
        match table {
            Table::Main => cells.extend(METHODS.iter().map(|method| with_all(method.key))),
            Table::Ablation => cells.extend(ABLATION.map(with_all)),
            Table::Spearman => {
                let of = [
                    "spot",
                    "spot_token_mean",
                    "panda",
                    HGPROMPT,
                    DENSE.key,
                    DEFAULT,
                ];
                cells.extend(of.map(with_all));
                let alone = others
                    .iter()
                    .map(|other| cell(ALONE, std::slice::from_ref(other)));
                cells.extend(alone);
            }
            Table::Settings => {
                cells.extend(METHODS.iter().map(|method| with_all(method.key)));
                cells.extend(VARIANTS.iter().map(|variant| with_all(variant.key)));
            }
            Table::Tsne => {}
            Table::Scalability => {
                for size in sizes(others.len()) {
                    for order in 0..ORDERS {
                        let sources = subset(&others, size, seed, order);
                        cells.extend(SCALABILITY.map(|key| cell(key, &sources)));
                    }
                }
            }
        }
    }
    cells
}

/// Numbers of sources: 3, 5, 7, … and all.
pub fn sizes(sources: usize) -> Vec<usize> {
    (3..sources).step_by(2).chain([sources]).collect()
}

/// A subset of the sources of this size, by name. It contains the smaller subsets of the same seed
/// and order.
pub fn subset(sources: &[String], size: usize, seed: u64, order: u64) -> Vec<String> {
    // The subset takes the smallest digests, so that a larger one contains the smaller one.
    let labels = vec![0; sources.len()];
    let chosen = stratified_subset(&labels, size, seed * ORDERS + order);
    chosen.into_iter().map(|i| sources[i].clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use promptweave_domain::objective::Objective;

    #[test]
    fn every_method_is_a_request_that_is_accepted() {
        for method in all() {
            let objective: Objective = serde_json::from_value((method.objective)()).unwrap();
            assert!(objective.check().is_ok(), "{}", method.key);
            assert_eq!(super::method(method.key).label, method.label);
        }
    }

    #[test]
    fn subsets_are_nested_and_end_with_all() {
        let sources: Vec<String> = "abcdefghi".chars().map(String::from).collect();
        let sizes = sizes(sources.len());
        assert_eq!(sizes, [3, 5, 7, 9]);
        for order in 0..ORDERS {
            let subsets: Vec<_> = sizes
                .iter()
                .map(|size| subset(&sources, *size, 4, order))
                .collect();
            for pair in subsets.windows(2) {
                assert!(
                    pair[0].iter().all(|name| pair[1].contains(name)),
                    "{pair:?}"
                );
            }
            assert_eq!(subsets[3], sources);
        }
        assert_ne!(subset(&sources, 3, 4, 0), subset(&sources, 3, 4, 1));
    }
}
