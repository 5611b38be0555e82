//! The method's settings as options of `compose` and `solve`.

use crate::domain::method::{
    Criterion, Fallback, Method, Scale, Similarity, SpotChoice, SpotOptions, TargetTuning,
    UniformMix,
};
use crate::domain::objective::{
    AlignTokens, AlignmentOptions, AlignmentVariant, GradientNormalization, HScoreMode, HeadKind,
    HeadOptions, Objective, Shrinkage, Standardise, TradeOff,
};

/// What statistics leave open. What is not given stays as it was.
#[derive(Clone, Debug, clap::Args)]
pub struct SolveOptions {
    /// How α is found: `hgprompt_cv`, `hgprompt`, `h_only`, `alignment_only`, `average`, `single_best`,
    /// `spot`, `panda` or `attempt` [default: hgprompt_cv].
    #[arg(long)]
    pub method: Option<Method>,
    /// What `single_best` chooses by: `h_score`, `logme` or `validation` [default: h_score].
    #[arg(long, value_name = "CRITERION")]
    pub single_best_by: Option<Criterion>,
    /// t in 0..=1: 0 weighs transferability alone, 1 gradient alignment alone; or `knee`, or (with a
    /// backbone) `validation` [default: 0.5].
    #[arg(long, value_name = "T")]
    pub trade_off: Option<TradeOff>,
    /// A raw λ instead of --trade-off.
    #[arg(long, value_name = "LAMBDA", conflicts_with = "trade_off")]
    pub alignment_weight: Option<f64>,
    /// τ of the entropy term that makes weights dense [default: 0, off].
    #[arg(long, value_name = "TAU")]
    pub entropy: Option<f64>,
    /// `cross_validated`, `standard` or `trace_ratio` [default: cross_validated; of `hgprompt`: standard].
    #[arg(long)]
    pub h_score_mode: Option<HScoreMode>,
    /// Features: `none` or `per_source` [default: none].
    #[arg(long)]
    pub standardise: Option<Standardise>,
    /// ρ of the H-score's covariance, 0 or from 1e-6 to below 1; or `oas`, or `ledoit_wolf` [default: 0.3 with
    /// `cross_validated`, otherwise 0.01].
    #[arg(long, value_name = "RHO")]
    pub h_score_shrinkage: Option<Shrinkage>,
    /// Of the gradient alignment: `mixture_weighted`, `mixture_uniform` or `fishr` [default: mixture_weighted].
    #[arg(long)]
    pub alignment_variant: Option<AlignmentVariant>,
    /// γ in αᵢ = (1-γ) α*ᵢ + γ/M, which pulls the method's weights α* towards equal ones; or (with a backbone) `auto`
    /// [default: 0].
    #[arg(long, value_name = "GAMMA")]
    pub uniform_mix: Option<UniformMix>,
}

/// What the statistics themselves depend on, or what needs the backbone.
#[derive(Clone, Debug, clap::Args)]
pub struct BackboneOptions {
    /// Of every prompt's gradients: `none` or `rms`.
    #[arg(long, default_value_t)]
    pub gradient_normalization: GradientNormalization,
    /// The closed-form head that defines the loss: `lda`, `ridge` or `shared`.
    #[arg(long, default_value_t)]
    pub head: HeadKind,
    /// ρ of that head, from 1e-6 to below 1.
    #[arg(long, value_name = "RHO", default_value_t = HeadOptions::default().shrinkage)]
    pub head_shrinkage: f64,
    /// `off`, or `hungarian`: match the prompts' tokens before they are summed.
    #[arg(long, default_value_t)]
    pub align_tokens: AlignTokens,
    /// Of `spot`: `all_pairs` or `token_mean`.
    #[arg(long, value_name = "SIMILARITY", default_value_t)]
    pub spot_similarity: Similarity,
    /// Of `spot`: only so many of the sources, the most similar [default: all].
    #[arg(long, value_name = "K")]
    pub spot_top_k: Option<usize>,
    /// Of `spot`: `weighted_average` or `best_of`.
    #[arg(long, value_name = "CHOICE", default_value_t)]
    pub spot_choice: SpotChoice,
    /// Of `spot`, `panda` and `attempt`: epochs of the short tuning on the target.
    #[arg(long, value_name = "EPOCHS", default_value_t = TargetTuning::default().epochs)]
    pub target_epochs: u32,
    /// `none`, or `single_best`: the source with the lowest cross-fitted loss on the target samples gets all weight where that is
    /// lower than the composed prompt's [default: single_best with `hgprompt_cv`, otherwise none].
    #[arg(long)]
    pub fallback: Option<Fallback>,
    /// β in P₀ + β Σ αᵢ (Pᵢ - P₀), or `auto`.
    #[arg(long, value_name = "BETA", default_value_t)]
    pub scale: Scale,
    /// Init seed of P₀ [default: the one that all sources say they have].
    #[arg(long, value_name = "SEED")]
    pub anchor_seed: Option<u64>,
    /// Steps on the true objective, through the backbone; 0 is off.
    #[arg(long, value_name = "STEPS", default_value_t = 0)]
    pub refine: u32,
}

impl SolveOptions {
    /// `base`, with what is given in place of what it says.
    pub fn over(&self, base: &Objective) -> Objective {
        let mut objective = match self.method {
            Some(method) if method != base.method => base.for_method(method),
            _ => base.clone(),
        };
        set(&mut objective.single_best.by, self.single_best_by);
        if self.trade_off.is_some() || self.alignment_weight.is_some() {
            objective.trade_off = self.trade_off;
            objective.alignment_weight = self.alignment_weight;
        }
        set(&mut objective.entropy, self.entropy);
        let h_score = &mut objective.h_score;
        if self.h_score_mode.is_some() && self.h_score_mode != h_score.mode {
            // ρ of another mode.
            (h_score.mode, h_score.shrinkage) = (self.h_score_mode, None);
        }
        set(&mut h_score.standardise, self.standardise);
        h_score.shrinkage = self.h_score_shrinkage.or(h_score.shrinkage);
        set(&mut objective.alignment.variant, self.alignment_variant);
        set(&mut objective.uniform_mix, self.uniform_mix);
        objective
    }
}

fn set<T>(value: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *value = given;
    }
}

impl BackboneOptions {
    /// An objective with these and defaults.
    pub fn objective(&self) -> Objective {
        Objective {
            alignment: AlignmentOptions {
                gradient_normalization: self.gradient_normalization,
                ..Default::default()
            },
            head: HeadOptions {
                kind: self.head,
                shrinkage: self.head_shrinkage,
            },
            align_tokens: self.align_tokens,
            refine: self.refine,
            fallback: self.fallback,
            spot: SpotOptions {
                similarity: self.spot_similarity,
                top_k: self.spot_top_k,
                choice: self.spot_choice,
            },
            target_tuning: TargetTuning {
                epochs: self.target_epochs,
            },
            scale: self.scale,
            anchor_seed: self.anchor_seed,
            ..Default::default()
        }
    }
}
