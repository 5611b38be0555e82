//! The options of a method as flags of `compose` and `solve`. What is given becomes the JSON that the API takes and is read as
//! that, so that both refuse the same.

use anyhow::{anyhow, bail};
use serde::Serialize;
use serde_json::{Value, json};

use promptweave_domain::json;
use promptweave_domain::json::Mistake;
use promptweave_domain::method::{
    Criterion, Fallback, Method, Scale, Similarity, SpotChoice, UniformMix,
};
use promptweave_domain::objective::{
    AlignTokens, AlignmentVariant, GradientNormalization, HScoreMode, HeadKind, Objective,
    Shrinkage, Standardise, TradeOff,
};

/// Options that the statistics do not fix. What is not given stays unchanged.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SolveOptions {
    /// How α is found: `hgprompt_cv`, `hgprompt`, `h_only`, `alignment_only`, `pool`, `average`, `single_best`, `spot`, `panda` or `attempt` [default: hgprompt_cv].
    #[arg(long)]
    pub method: Option<Method>,
    /// What `single_best` chooses by: `h_score`, `logme` or `validation` [default: h_score].
    #[arg(long, value_name = "CRITERION")]
    pub single_best_by: Option<Criterion>,
    /// For `pool`: β, how strongly weights are pulled towards equal ones, in samples [default: 10].
    #[arg(long)]
    pub beta: Option<f64>,
    /// For `pool` and `spot`: use only this many sources, those with the largest weights or similarities [default: all].
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// t in 0..=1: 0 weighs transferability alone, 1 gradient alignment alone; or `knee`, or (with a
    /// backbone) `validation` [default: 0.5].
    #[arg(long, value_name = "T")]
    pub trade_off: Option<TradeOff>,
    /// A raw λ instead of --trade-off.
    #[arg(long, value_name = "LAMBDA", conflicts_with = "trade_off")]
    pub alignment_weight: Option<f64>,
    /// Variant of the gradient alignment: `mixture_weighted`, `mixture_uniform` or `fishr` [default: mixture_weighted].
    #[arg(long)]
    pub alignment_variant: Option<AlignmentVariant>,
    /// Mode of the H-score: `cross_validated`, `standard` or `trace_ratio` [default: cross_validated; with `hgprompt`:
    /// standard].
    #[arg(long)]
    pub h_score_mode: Option<HScoreMode>,
    /// Standardisation of features: `none` or `per_source` [default: none].
    #[arg(long)]
    pub standardise: Option<Standardise>,
    /// ρ of the H-score's covariance, 0 or from 1e-6 to below 1; or `oas`, or `ledoit_wolf` [default: 0.3 with
    /// `cross_validated`, otherwise 0.01].
    #[arg(long, value_name = "RHO")]
    pub h_score_shrinkage: Option<Shrinkage>,
    /// Experimental: τ of the entropy term that makes weights dense [default: 0, off].
    #[arg(long, value_name = "TAU")]
    pub entropy: Option<f64>,
    /// Experimental: γ in αᵢ = (1-γ) α*ᵢ + γ/M, which pulls the method's weights α* towards equal ones; or (with a backbone)
    /// `auto` [default: 0].
    #[arg(long, value_name = "GAMMA")]
    pub uniform_mix: Option<UniformMix>,
}

/// Options that the statistics depend on, or that need the backbone.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct BackboneOptions {
    /// Normalisation of every prompt's gradients: `none` or `rms` [default: none].
    #[arg(long)]
    pub gradient_normalization: Option<GradientNormalization>,
    /// The closed-form head that defines the loss: `lda`, `ridge` or `shared` [default: lda].
    #[arg(long)]
    pub head: Option<HeadKind>,
    /// ρ of that head, from 1e-6 to below 1 [default: 0.3].
    #[arg(long, value_name = "RHO")]
    pub head_shrinkage: Option<f64>,
    /// `off`, or `hungarian`: match the prompts' tokens before they are summed [default: off].
    #[arg(long)]
    pub align_tokens: Option<AlignTokens>,
    /// For `spot`: similarity of two prompts, `all_pairs` or `token_mean` [default: all_pairs].
    #[arg(long, value_name = "SIMILARITY")]
    pub spot_similarity: Option<Similarity>,
    /// For `spot`: how sources are combined, `weighted_average` or `best_of` [default: weighted_average].
    #[arg(long, value_name = "CHOICE")]
    pub spot_choice: Option<SpotChoice>,
    /// For `spot`, `panda` and `attempt`: epochs of the short tuning on the target [default: 5].
    #[arg(long, value_name = "EPOCHS")]
    pub target_epochs: Option<u32>,
    /// `none`, or `single_best`: the source with the lowest cross-fitted loss on the target samples gets all weight where that is
    /// lower than the composed prompt's [default: single_best with `hgprompt_cv` and `pool`, otherwise none].
    #[arg(long)]
    pub fallback: Option<Fallback>,
    /// Experimental: β in P₀ + β Σ αᵢ (Pᵢ - P₀), or `auto` [default: 1].
    #[arg(long, value_name = "BETA")]
    pub scale: Option<Scale>,
    /// Experimental: init seed of P₀ [default: the one that all sources say they have].
    #[arg(long, value_name = "SEED")]
    pub anchor_seed: Option<u64>,
    /// Experimental: steps on the true objective, through the backbone [default: 0, off].
    #[arg(long, value_name = "STEPS")]
    pub refine: Option<u32>,
}

/// A flag, its place in an objective, and what was given.
type Given = (&'static str, &'static str, Option<Value>);

impl SolveOptions {
    fn given(&self) -> [Given; 11] {
        let raw = self
            .alignment_weight
            .map(|weight| json!({"alignment_weight": weight}));
        [
            ("single-best-by", "/by", value(&self.single_best_by)),
            ("beta", "/beta", value(&self.beta)),
            ("top-k", "/top_k", value(&self.top_k)),
            ("trade-off", "/trade_off", value(&self.trade_off)),
            ("alignment-weight", "/trade_off", raw),
            (
                "alignment-variant",
                "/alignment/variant",
                value(&self.alignment_variant),
            ),
            ("h-score-mode", "/h_score/mode", value(&self.h_score_mode)),
            (
                "standardise",
                "/h_score/standardise",
                value(&self.standardise),
            ),
            (
                "h-score-shrinkage",
                "/h_score/shrinkage",
                value(&self.h_score_shrinkage),
            ),
            ("entropy", "/experimental/entropy", value(&self.entropy)),
            (
                "uniform-mix",
                "/experimental/uniform_mix",
                value(&self.uniform_mix),
            ),
        ]
    }

    /// An objective of these options, with defaults for what is not given.
    pub fn objective(&self, backbone: &BackboneOptions) -> anyhow::Result<Objective> {
        let method = self.method.unwrap_or_default();
        let given = self.given().into_iter().chain(backbone.given());
        objective(json!({"method": method}), given)
    }

    /// `base`, with what is given in place of what it says.
    pub fn over(&self, base: &Objective) -> anyhow::Result<Objective> {
        let mut base = match self.method {
            Some(method) if method != base.method() => base.for_method(method),
            _ => base.clone(),
        };
        if self.h_score_mode.is_some() && self.h_score_mode != base.h_score.mode {
            // The base's ρ belongs to another mode.
            base.h_score.shrinkage = None;
        }
        objective(json!(base), self.given())
    }
}

impl BackboneOptions {
    fn given(&self) -> [Given; 11] {
        [
            (
                "gradient-normalization",
                "/alignment/gradient_normalization",
                value(&self.gradient_normalization),
            ),
            ("head", "/head/kind", value(&self.head)),
            (
                "head-shrinkage",
                "/head/shrinkage",
                value(&self.head_shrinkage),
            ),
            ("align-tokens", "/align_tokens", value(&self.align_tokens)),
            (
                "spot-similarity",
                "/similarity",
                value(&self.spot_similarity),
            ),
            ("spot-choice", "/choice", value(&self.spot_choice)),
            (
                "target-epochs",
                "/target_epochs",
                value(&self.target_epochs),
            ),
            ("fallback", "/fallback", value(&self.fallback)),
            ("scale", "/experimental/scale", value(&self.scale)),
            (
                "anchor-seed",
                "/experimental/anchor_seed",
                value(&self.anchor_seed),
            ),
            ("refine", "/experimental/refine", value(&self.refine)),
        ]
    }
}

fn value<T: Serialize>(given: &Option<T>) -> Option<Value> {
    given.as_ref().map(|given| json!(given))
}

/// `base` with the given options; an option that the method does not have is refused by its flag's name.
fn objective(mut base: Value, given: impl IntoIterator<Item = Given>) -> anyhow::Result<Objective> {
    let given: Vec<Given> = (given.into_iter())
        .filter(|(_, _, value)| value.is_some())
        .collect();
    for (_, place, value) in &given {
        let at = place.split('/').skip(1);
        *at.fold(&mut base, |part, name| &mut part[name]) = json!(value);
    }
    let json::Reading {
        value, mistakes, ..
    } = json::read::<Objective>(&base);
    if let Some(objective) = value.filter(|_| mistakes.is_empty()) {
        return Ok(objective);
    }
    let said = |Mistake { pointer, detail }: &Mistake| {
        let flag = given
            .iter()
            .find(|(_, place, _)| place.starts_with(pointer));
        match flag {
            Some((flag, ..)) => format!("--{flag}: {detail}"),
            None => format!("{pointer}: {detail}"),
        }
    };
    match mistakes.as_slice() {
        [mistake] => bail!(said(mistake)),
        several => {
            let lines = several
                .iter()
                .map(|mistake| format!("\n  {}", said(mistake)));
            Err(anyhow!(
                "{} options cannot be:{}",
                several.len(),
                lines.collect::<String>()
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_of_another_method_is_refused_with_its_flag_and_both_methods() {
        let asked = SolveOptions {
            method: Some(Method::Panda),
            trade_off: Some(TradeOff::Value(0.5)),
            top_k: Some(3),
            ..SolveOptions::default()
        };
        let backbone = BackboneOptions {
            target_epochs: Some(2),
            ..BackboneOptions::default()
        };
        let refused = asked.objective(&backbone).unwrap_err().to_string();
        for part in [
            "2 options cannot be:",
            "--trade-off: unknown field `trade_off`: the method `panda` has `target_epochs`,",
            "`trade_off` is of `hgprompt_cv`, `hgprompt`",
            "--top-k: unknown field `top_k`",
            "`top_k` is of `pool`, `spot`",
        ] {
            assert!(refused.contains(part), "{refused}");
        }
    }

    #[test]
    fn every_flag_has_its_place() {
        for method in Method::ALL {
            let asked = SolveOptions {
                method: Some(method),
                ..SolveOptions::default()
            };
            let objective = asked.objective(&BackboneOptions::default());
            assert_eq!(objective.unwrap().method(), method);
        }
        let asked = SolveOptions {
            alignment_weight: Some(2.0),
            alignment_variant: Some(AlignmentVariant::Fishr),
            entropy: Some(0.5),
            ..SolveOptions::default()
        };
        let found = json!(asked.over(&Objective::default()).unwrap());
        assert_eq!(found["trade_off"], json!({"alignment_weight": 2.0}));
        assert_eq!(found["alignment"]["variant"], "fishr");
        assert_eq!(found["experimental"], json!({"entropy": 0.5}));
    }
}
