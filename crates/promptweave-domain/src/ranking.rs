//! Ranking source prompts for a target by every metric, without composing anything.

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
    /// How the metrics `h_score` and `h_score_adjusted` are computed. The default mode is
    /// `standard` here.
    pub h_score: HScoreOptions,
    /// Epochs of the short tuning on the target. SPoT and PANDA measure similarity to the prompt it
    /// gives.
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
    /// The objective of a composition that would compute the same metrics. No weights are made.
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

/// The metrics of a set of prompts, as a table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Ranking {
    /// The sources in the order of the request.
    pub sources: Vec<RankedSource>,
    /// N, the number of target samples.
    pub num_samples: usize,
    /// Duration of the short tuning on the target in seconds.
    pub target_tuning_seconds: f64,
}

/// The metrics of one source prompt. Higher is better for every metric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RankedSource {
    pub prompt: String,
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    /// H of the source's features alone. By default it is computed as `standard` with ρ = 0.01, and
    /// 0 ≤ H ≤ min(d, K-1).
    pub h_score: f64,
    /// H minus its chance level, divided by the range that is left above it.
    pub h_score_adjusted: f64,
    /// H as `cross_validated`, on samples that it was not fitted on, ≤ K-1.
    pub h_score_cross_validated: f64,
    /// LogME: log of the maximum evidence, for each sample and class.
    pub logme: f64,
    /// LEEP ≤ 0; null if the prompt file has no source head.
    pub leep: Option<f64>,
    /// NCE ≤ 0; null if the prompt file has no source head.
    pub nce: Option<f64>,
    /// OTCE ≤ 0; null if the prompt file has no feature sketch.
    pub otce: Option<f64>,
    /// SPoT: cosine of the mean tokens of this prompt and of one tuned on the target.
    pub spot_token_mean: f64,
    /// SPoT: mean cosine over all pairs of tokens of the two prompts.
    pub spot_all_pairs: f64,
    /// PANDA: cosine of the two prompts' effects on the mean feature.
    pub panda: f64,
}

impl RankedSource {
    /// The metrics' names, in the order of the table.
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

    /// The value of one of [`Self::METRICS`]; `None` if the prompt file does not allow it.
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
