//! How source prompts rank for a target, by every metric there is, without composing anything.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::digest::Digest;
use crate::objective::{
    HScoreMode, HScoreOptions, MethodOptions, Objective, TARGET_EPOCHS, TargetTuned,
};

/// How the metrics are computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RankingObjective {
    /// Of the metrics `h_score` and `h_score_adjusted`; the mode is `standard` by default here.
    pub h_score: HScoreOptions,
    /// Epochs of the short tuning on the target that the similarities of SPoT and PANDA are to.
    #[schema(minimum = 1, maximum = 100)]
    pub target_epochs: u32,
}

impl Default for RankingObjective {
    fn default() -> Self {
        Self {
            h_score: HScoreOptions::default(),
            target_epochs: TARGET_EPOCHS,
        }
    }
}

impl RankingObjective {
    /// The objective of a composition that looks at the same; no weights are made.
    pub fn objective(&self) -> Objective {
        Objective {
            options: MethodOptions::Panda(TargetTuned {
                target_epochs: self.target_epochs,
                fallback: None,
            }),
            h_score: HScoreOptions {
                mode: self.h_score.mode.or(Some(HScoreMode::Standard)),
                ..self.h_score.clone()
            },
            ..Objective::default()
        }
    }
}

/// One table for any set of prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Ranking {
    /// In the order they were named.
    pub sources: Vec<RankedSource>,
    /// N
    pub num_samples: usize,
    /// Of the short tuning on the target that the similarities are to.
    pub target_tuning_seconds: f64,
}

/// Higher is better, by every metric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RankedSource {
    pub prompt: String,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    /// H of the source's features alone; by default as `standard` with ρ = 0.01, 0 ≤ H ≤ min(d, K-1).
    pub h_score: f64,
    /// H less its chance level, over what is left above it.
    pub h_score_adjusted: f64,
    /// H as `cross_validated`, of samples that it was not fitted on, ≤ K-1.
    pub h_score_cross_validated: f64,
    /// Log of the maximum evidence a sample and class.
    pub logme: f64,
    /// ≤ 0; null where the prompt file has no source head.
    pub leep: Option<f64>,
    /// ≤ 0; null where the prompt file has no source head.
    pub nce: Option<f64>,
    /// ≤ 0; null where the prompt file has no feature sketch.
    pub otce: Option<f64>,
    /// SPoT: cosine of mean tokens with those of a prompt tuned on the target.
    pub spot_token_mean: f64,
    /// SPoT: mean cosine over all pairs of tokens.
    pub spot_all_pairs: f64,
    /// PANDA: cosine of what the prompts do to the mean feature.
    pub panda: f64,
}

impl RankedSource {
    /// The metrics by name, in the order of the table.
    pub const METRICS: [&str; 10] = [
        "h_score",
        "h_score_adjusted",
        "h_score_cross_validated",
        "logme",
        "leep",
        "nce",
        "otce",
        "spot_token_mean",
        "spot_all_pairs",
        "panda",
    ];

    /// One of [`Self::METRICS`], where the prompt file allows it.
    pub fn metric(&self, name: &str) -> Option<f64> {
        match name {
            "h_score" => Some(self.h_score),
            "h_score_adjusted" => Some(self.h_score_adjusted),
            "h_score_cross_validated" => Some(self.h_score_cross_validated),
            "logme" => Some(self.logme),
            "leep" => self.leep,
            "nce" => self.nce,
            "otce" => self.otce,
            "spot_token_mean" => Some(self.spot_token_mean),
            "spot_all_pairs" => Some(self.spot_all_pairs),
            "panda" => Some(self.panda),
            _ => None,
        }
    }
}
