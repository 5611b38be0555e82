//! Each method with its own options and no others: an option without meaning for a method cannot be
//! requested.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::method::{Criterion, Fallback, Method, Similarity, SpotChoice};
use crate::objective::{AlignmentOptions, Objective, TradeOff};

/// A method with its own options.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "method", rename_all = "snake_case")]
pub enum MethodOptions {
    HgpromptCv(BothTerms),
    Hgprompt(BothTerms),
    HOnly(Guarded),
    AlignmentOnly(AlignmentTerm),
    Pool(Pool),
    Average(Guarded),
    SingleBest(SingleBest),
    Spot(Spot),
    Panda(TargetTuned),
    Attempt(TargetTuned),
}

/// The options of methods that weigh two terms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct BothTerms {
    /// t in [0, 1]: 0 weighs transferability alone, 1 gradient alignment alone. `knee` and
    /// `validation` choose it on the Pareto path. `{"alignment_weight": λ}` gives λ instead.
    /// Default 0.5.
    pub trade_off: TradeOff,
    pub alignment: AlignmentOptions,
    /// What to do if the composed prompt does worse than a single source. With `single_best`, the
    /// source with the lowest cross-fitted loss on the target samples gets all weight if its loss
    /// is below the composed prompt's. With `none`, nothing. Excludes `refine`. Default
    /// `single_best` with the method `hgprompt_cv` (without `refine` and `early_stopping`, and with
    /// a backbone), otherwise `none`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
}

/// The options of the method that minimises gradient alignment alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct AlignmentTerm {
    pub alignment: AlignmentOptions,
    /// What to do if the composed prompt does worse than a single source, as with `hgprompt_cv`.
    /// Default `none`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
}

/// The options of the log-linear pool of predictions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Pool {
    /// β ≥ 0: how strongly the weights are pulled towards equal ones, in samples.
    #[schema(minimum = 0)]
    pub beta: f64,
    /// The number of sources to keep, those with the largest weights; "no prompt" counts as one. The weights are then
    /// fitted again [default: all].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub top_k: Option<usize>,
    /// What to do if the composed prompt does worse than a single source, as with `hgprompt_cv`. It decides about the
    /// composed prompt alone, never about the pool's weights. Default `single_best`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
}

/// The options of methods that have a fallback and nothing else.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Guarded {
    /// What to do if the composed prompt does worse than a single source, as with `hgprompt_cv`.
    /// Default `none`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
}

/// The options of the best single source, which has no fallback.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct SingleBest {
    pub by: Criterion,
}

/// The options of SPoT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Spot {
    pub similarity: Similarity,
    /// The number of most similar sources to use [default: all].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub top_k: Option<usize>,
    pub choice: SpotChoice,
    /// Epochs of the short tuning on the target, as with `panda`.
    #[schema(minimum = 1, maximum = 100)]
    pub target_epochs: u32,
    /// What to do if the composed prompt does worse than a single source, as with `hgprompt_cv`.
    /// Default `none`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
}

/// The options of methods that tune on the target and have no other options of their own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct TargetTuned {
    /// Epochs of the short tuning on the target samples, on which the weights are based. Otherwise
    /// it runs like `promptweave tune`, and starts from the sources' common initial prompt if they
    /// state one.
    #[schema(minimum = 1, maximum = 100)]
    pub target_epochs: u32,
    /// What to do if the composed prompt does worse than a single source, as with `hgprompt_cv`.
    /// Default `none`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
}

/// Default number of epochs of the short tuning on the target.
pub const TARGET_EPOCHS: u32 = 5;

impl Default for Pool {
    fn default() -> Self {
        Self {
            beta: 10.0,
            top_k: None,
            fallback: None,
        }
    }
}

impl Default for Spot {
    fn default() -> Self {
        Self {
            similarity: Similarity::default(),
            top_k: None,
            choice: SpotChoice::default(),
            target_epochs: TARGET_EPOCHS,
            fallback: None,
        }
    }
}

impl Default for TargetTuned {
    fn default() -> Self {
        Self {
            target_epochs: TARGET_EPOCHS,
            fallback: None,
        }
    }
}

impl Default for MethodOptions {
    fn default() -> Self {
        Self::HgpromptCv(BothTerms::default())
    }
}

impl MethodOptions {
    pub fn method(&self) -> Method {
        match self {
            Self::HgpromptCv(_) => Method::HgpromptCv,
            Self::Hgprompt(_) => Method::Hgprompt,
            Self::HOnly(_) => Method::HOnly,
            Self::AlignmentOnly(_) => Method::AlignmentOnly,
            Self::Pool(_) => Method::Pool,
            Self::Average(_) => Method::Average,
            Self::SingleBest(_) => Method::SingleBest,
            Self::Spot(_) => Method::Spot,
            Self::Panda(_) => Method::Panda,
            Self::Attempt(_) => Method::Attempt,
        }
    }

    /// The trade-off, if the method has one.
    pub fn trade_off_mut(&mut self) -> Option<&mut TradeOff> {
        match self {
            Self::HgpromptCv(both) | Self::Hgprompt(both) => Some(&mut both.trade_off),
            _ => None,
        }
    }

    /// The fallback, if the method has one.
    pub fn fallback_mut(&mut self) -> Option<&mut Option<Fallback>> {
        match self {
            Self::HgpromptCv(both) | Self::Hgprompt(both) => Some(&mut both.fallback),
            Self::HOnly(guarded) | Self::Average(guarded) => Some(&mut guarded.fallback),
            Self::AlignmentOnly(term) => Some(&mut term.fallback),
            Self::Pool(pool) => Some(&mut pool.fallback),
            Self::SingleBest(_) => None,
            Self::Spot(spot) => Some(&mut spot.fallback),
            Self::Panda(tuned) | Self::Attempt(tuned) => Some(&mut tuned.fallback),
        }
    }

    /// The epochs of the short tuning, if the method tunes on the target.
    pub fn target_epochs_mut(&mut self) -> Option<&mut u32> {
        match self {
            Self::Spot(spot) => Some(&mut spot.target_epochs),
            Self::Panda(tuned) | Self::Attempt(tuned) => Some(&mut tuned.target_epochs),
            _ => None,
        }
    }
}

impl Objective {
    pub fn method(&self) -> Method {
        self.options.method()
    }

    /// The alignment options, if the method takes gradients. The defaults apply to what the other
    /// methods report.
    pub fn alignment(&self) -> Option<AlignmentOptions> {
        match &self.options {
            MethodOptions::HgpromptCv(both) | MethodOptions::Hgprompt(both) => Some(both.alignment),
            MethodOptions::AlignmentOnly(term) => Some(term.alignment),
            _ => None,
        }
    }

    /// The options of the pool that every result reports: the method's own, or the defaults.
    pub fn pool(&self) -> Pool {
        match &self.options {
            MethodOptions::Pool(pool) => pool.clone(),
            _ => Pool::default(),
        }
    }

    /// Whether a `fallback` is requested.
    pub fn falls_back(&self) -> bool {
        let asked = match &self.options {
            MethodOptions::HgpromptCv(both) | MethodOptions::Hgprompt(both) => both.fallback,
            MethodOptions::HOnly(guarded) | MethodOptions::Average(guarded) => guarded.fallback,
            MethodOptions::AlignmentOnly(term) => term.fallback,
            MethodOptions::Pool(pool) => pool.fallback,
            MethodOptions::SingleBest(_) => None,
            MethodOptions::Spot(spot) => spot.fallback,
            MethodOptions::Panda(tuned) | MethodOptions::Attempt(tuned) => tuned.fallback,
        };
        asked == Some(Fallback::SingleBest)
    }

    /// Epochs of the short tuning, if the method tunes on the target.
    pub fn target_epochs(&self) -> Option<u32> {
        match &self.options {
            MethodOptions::Spot(spot) => Some(spot.target_epochs),
            MethodOptions::Panda(tuned) | MethodOptions::Attempt(tuned) => {
                Some(tuned.target_epochs)
            }
            _ => None,
        }
    }
}
