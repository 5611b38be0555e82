//! Checks of an objective beyond its shape: ranges, conflicts of the experimental options, and
//! options that need a backbone.

use crate::method::{Fallback, MAX_SCALE, MAX_TARGET_EPOCHS, Method, Scale, UniformMix};
use crate::objective::{
    AlignmentWeight, Experimental, GradientNormalization, HScoreMode, HScoreOptions, MAX_REFINE,
    MethodOptions, Objective, Shrinkage, TradeOff, TradeOffRule, Weighing, is_off,
};

#[derive(Debug, thiserror::Error, PartialEq)]
#[error("`{field}` {problem}")]
pub struct InvalidObjective {
    /// The field's dotted path, e.g. `h_score.shrinkage`.
    pub field: &'static str,
    pub problem: String,
}

fn refuse<T>(field: &'static str, problem: impl Into<String>) -> Result<T, InvalidObjective> {
    let problem = problem.into();
    Err(InvalidObjective { field, problem })
}

/// Checks that ρ lies in [1e-6, 1). Below 1e-6 a covariance of fewer samples than dimensions is
/// singular in floating point.
pub fn check_shrinkage(field: &'static str, rho: f64) -> Result<(), InvalidObjective> {
    if (1e-6..1.0).contains(&rho) {
        return Ok(());
    }
    refuse(
        field,
        format!("is {rho}; it must be at least 1e-6 and below 1"),
    )
}

fn check_target_epochs(epochs: u32) -> Result<(), InvalidObjective> {
    if (1..=MAX_TARGET_EPOCHS).contains(&epochs) {
        return Ok(());
    }
    refuse(
        "target_epochs",
        format!("is {epochs}; it must lie in 1..={MAX_TARGET_EPOCHS}"),
    )
}

impl Shrinkage {
    /// Checks the range of ρ. 0 passes here: [`Self::check_samples`] checks whether there are
    /// samples enough for it.
    pub fn check(self, field: &'static str) -> Result<(), InvalidObjective> {
        match self {
            Self::Fixed(0.0) | Self::Estimated(_) => Ok(()),
            Self::Fixed(rho) => check_shrinkage(field, rho),
        }
    }

    /// Refuses ρ = 0 if the covariance of N samples in d dimensions is singular.
    pub fn check_samples(self, n: usize, d: usize) -> Result<(), InvalidObjective> {
        if self != Self::Fixed(0.0) || n > d + 1 {
            return Ok(());
        }
        refuse(
            "h_score.shrinkage",
            format!(
                "is 0 with {n} samples in {d} dimensions: up to {} samples every H is K-1, whatever \
                 the features; set it to 0.01, or give more samples",
                d + 1
            ),
        )
    }
}

impl HScoreOptions {
    /// Applies [`Shrinkage::check_samples`], except with `trace_ratio`, which inverts nothing.
    pub fn check_samples(&self, n: usize, d: usize) -> Result<(), InvalidObjective> {
        match self.mode() {
            HScoreMode::Standard | HScoreMode::CrossValidated => {
                self.shrinkage().check_samples(n, d)
            }
            HScoreMode::TraceRatio => Ok(()),
        }
    }
}

impl Objective {
    /// How the two terms are weighed.
    pub fn weighing(&self) -> Weighing {
        match &self.options {
            MethodOptions::HgpromptCv(both) | MethodOptions::Hgprompt(both) => match both.trade_off
            {
                TradeOff::Value(t) => Weighing::TradeOff(t),
                TradeOff::Rule(rule) => Weighing::Rule(rule),
                TradeOff::Weight(AlignmentWeight { alignment_weight }) => {
                    Weighing::AlignmentWeight(alignment_weight)
                }
            },
            MethodOptions::AlignmentOnly(_) => Weighing::TradeOff(1.0),
            _ => Weighing::TradeOff(0.0),
        }
    }

    /// Checks ranges and conflicts of the experimental options. Returns the first mistake.
    pub fn check(&self) -> Result<(), InvalidObjective> {
        self.mistakes().into_iter().next().map_or(Ok(()), Err)
    }

    /// All mistakes in the objective.
    pub fn mistakes(&self) -> Vec<InvalidObjective> {
        let checked = [
            self.h_score.shrinkage().check("h_score.shrinkage"),
            check_shrinkage("head.shrinkage", self.head.shrinkage),
            self.check_weighing(),
            self.check_beta(),
            self.check_top_k(),
            self.target_epochs().map_or(Ok(()), check_target_epochs),
            self.check_entropy(),
            self.experimental.check_uniform_mix(),
            self.experimental.check_scale(),
            self.check_refine(),
        ];
        checked.into_iter().filter_map(Result::err).collect()
    }

    fn check_weighing(&self) -> Result<(), InvalidObjective> {
        match self.weighing() {
            Weighing::TradeOff(t) if !(0.0..=1.0).contains(&t) => {
                refuse("trade_off", format!("is {t}; it must lie in 0..=1"))
            }
            Weighing::AlignmentWeight(lambda) if !(lambda.is_finite() && lambda >= 0.0) => refuse(
                "trade_off.alignment_weight",
                format!("is {lambda}; it must be finite and ≥ 0"),
            ),
            _ => Ok(()),
        }
    }

    fn check_beta(&self) -> Result<(), InvalidObjective> {
        let beta = self.pool().beta;
        if beta.is_finite() && beta >= 0.0 {
            return Ok(());
        }
        refuse("beta", format!("is {beta}; it must be finite and ≥ 0"))
    }

    fn check_top_k(&self) -> Result<(), InvalidObjective> {
        let top_k = match &self.options {
            MethodOptions::Spot(spot) => spot.top_k,
            MethodOptions::Pool(pool) => pool.top_k,
            _ => None,
        };
        match top_k {
            Some(0) => refuse("top_k", "is 0; it must be at least 1"),
            _ => Ok(()),
        }
    }

    fn check_entropy(&self) -> Result<(), InvalidObjective> {
        const ENTROPY: &str = "experimental.entropy";
        let entropy = self.experimental.entropy;
        if !(entropy.is_finite() && entropy >= 0.0) {
            let problem = format!("is {entropy}; it must be finite and ≥ 0");
            return refuse(ENTROPY, problem);
        }
        match self.method() {
            _ if entropy == 0.0 => Ok(()),
            Method::HOnly => refuse(
                ENTROPY,
                "is weighed by the range of both terms, and `h_only` has one",
            ),
            method if !method.solves() => refuse(
                ENTROPY,
                format!("goes with methods that solve; `{method}` does not"),
            ),
            _ => Ok(()),
        }
    }

    fn check_refine(&self) -> Result<(), InvalidObjective> {
        const REFINE: &str = "experimental.refine";
        let Experimental {
            entropy,
            refine: steps,
            uniform_mix,
            scale,
            ..
        } = self.experimental;
        if steps > MAX_REFINE {
            let problem = format!("is {steps}; it must be at most {MAX_REFINE}");
            return refuse(REFINE, problem);
        }
        if steps == 0 {
            return Ok(());
        }
        let method = self.method();
        if !method.solves() {
            let problem = format!("goes with methods that solve; `{method}` does not");
            return refuse(REFINE, problem);
        }
        const UNDONE: &str = "excludes `experimental.refine`, which it would undo";
        if entropy > 0.0 {
            return refuse(
                "experimental.entropy",
                "excludes `experimental.refine`, whose steps know nothing of dense weights",
            );
        }
        if !is_off(&uniform_mix) {
            return refuse("experimental.uniform_mix", UNDONE);
        }
        if self.falls_back() {
            return refuse("fallback", UNDONE);
        }
        if !is_off(&scale) {
            return refuse(
                "experimental.scale",
                "excludes `experimental.refine`, whose steps are on Σ αᵢ Pᵢ",
            );
        }
        Ok(())
    }

    /// The objective with every omitted option filled in by the method's defaults. Without a
    /// backbone, or with `early_stopping` (which looks at α on the way), there can be no fallback
    /// (`can_fall_back`).
    pub fn settled(&self, can_fall_back: bool) -> Self {
        let mut settled = self.clone();
        let h_score = &mut settled.h_score;
        h_score.mode.get_or_insert(match self.method() {
            Method::Hgprompt => HScoreMode::Standard,
            _ => HScoreMode::default(),
        });
        h_score.shrinkage = Some(h_score.shrinkage());
        let by_default = match self.method() {
            Method::HgpromptCv | Method::Pool if can_fall_back && self.experimental.refine == 0 => {
                Fallback::SingleBest
            }
            _ => Fallback::None,
        };
        if let Some(fallback) = settled.options.fallback_mut() {
            fallback.get_or_insert(by_default);
        }
        settled
    }

    /// The objective without all that needs a backbone, for solving for α again: no refinement,
    /// nothing that forward passes choose, and the plain sum Σ αᵢ Pᵢ.
    pub fn without_forward_passes(&self) -> Self {
        let Experimental {
            entropy,
            uniform_mix,
            ..
        } = self.experimental;
        let mut left = Self {
            experimental: Experimental {
                entropy,
                uniform_mix: match uniform_mix {
                    UniformMix::Chosen(_) => UniformMix::default(),
                    value => value,
                },
                ..Experimental::default()
            },
            ..self.clone()
        };
        if let Some(fallback) = left.options.fallback_mut() {
            *fallback = Some(Fallback::None);
        }
        left
    }

    /// All options that need a backbone, as mistakes of an objective for a statistics file.
    pub fn needs_backbone(&self) -> Vec<InvalidObjective> {
        const RUN: &str = "needs the backbone: run the whole composition";
        let method = self.method();
        let Experimental {
            refine,
            uniform_mix,
            scale,
            ..
        } = self.experimental;
        let refused = [
            (
                self.weighing() == Weighing::Rule(TradeOffRule::Validation),
                "trade_off",
                "`validation` needs the backbone: run the whole composition, or choose a number or `knee`".to_owned(),
            ),
            (refine > 0, "experimental.refine", format!("{RUN}, or leave it out")),
            (
                method.tunes(),
                "method",
                format!("`{method}` tunes a prompt: run the whole composition"),
            ),
            (
                matches!(uniform_mix, UniformMix::Chosen(_)),
                "experimental.uniform_mix",
                "`auto` needs the backbone: run the whole composition, or choose a number".to_owned(),
            ),
            (self.falls_back(), "fallback", RUN.to_owned()),
            (scale != Scale::default(), "experimental.scale", RUN.to_owned()),
        ];
        let refused = refused.into_iter().filter(|(given, ..)| *given);
        refused
            .map(|(_, field, problem)| InvalidObjective { field, problem })
            .collect()
    }

    /// All differences from the objective that the statistics were made with (`recorded`) and from
    /// their kind of `gradients`, if any.
    pub fn differs_from_statistics(
        &self,
        recorded: &Self,
        gradients: Option<GradientNormalization>,
    ) -> Vec<InvalidObjective> {
        let method = self.method();
        let mut mistakes = Vec::new();
        let mut add = |field, problem| mistakes.push(InvalidObjective { field, problem });
        let same = |made: &dyn std::fmt::Display| {
            format!("is fixed by the statistics, which were made with `{made}`")
        };
        match (self.alignment(), gradients) {
            (None, _) => {}
            (Some(_), None) => add(
                "method",
                format!(
                    "`{method}` needs gradients, and the statistics were made without; run the whole composition"
                ),
            ),
            (Some(asked), Some(made)) if asked.gradient_normalization != made => {
                add("alignment.gradient_normalization", same(&made));
            }
            (Some(_), Some(_)) => {}
        }
        if self.head.kind != recorded.head.kind {
            add("head.kind", same(&recorded.head.kind));
        }
        if self.head.shrinkage != recorded.head.shrinkage {
            add("head.shrinkage", same(&recorded.head.shrinkage));
        }
        if self.align_tokens != recorded.align_tokens {
            add("align_tokens", same(&recorded.align_tokens));
        }
        mistakes
    }
}

impl Experimental {
    fn check_uniform_mix(&self) -> Result<(), InvalidObjective> {
        match self.uniform_mix {
            UniformMix::Value(gamma) if !(0.0..=1.0).contains(&gamma) => refuse(
                "experimental.uniform_mix",
                format!("is {gamma}; it must lie in 0..=1, or be `auto`"),
            ),
            _ => Ok(()),
        }
    }

    fn check_scale(&self) -> Result<(), InvalidObjective> {
        match self.scale {
            Scale::Value(beta) if !(0.0..=MAX_SCALE).contains(&beta) => refuse(
                "experimental.scale",
                format!("is {beta}; it must lie in 0..={MAX_SCALE}, or be `auto`"),
            ),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Objective {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn ranges_are_checked_and_the_field_is_named() {
        let refusal = |json: &str| read(json).check().unwrap_err().to_string();
        for (json, expected) in [
            (
                r#"{"trade_off": 1.5}"#,
                "`trade_off` is 1.5; it must lie in 0..=1",
            ),
            (
                r#"{"trade_off": {"alignment_weight": -1}}"#,
                "`trade_off.alignment_weight` is -1; it must be finite and ≥ 0",
            ),
            (
                r#"{"h_score": {"shrinkage": 1e-9}}"#,
                "`h_score.shrinkage` is 0.000000001; it must be at least 1e-6 and below 1",
            ),
            (
                r#"{"experimental": {"refine": 101}}"#,
                "`experimental.refine` is 101; it must be at most 100",
            ),
            (
                r#"{"experimental": {"refine": 1, "entropy": 0.1}}"#,
                "`experimental.entropy` excludes `experimental.refine`, whose steps know nothing of dense weights",
            ),
            (
                r#"{"method": "spot", "top_k": 0}"#,
                "`top_k` is 0; it must be at least 1",
            ),
            (
                r#"{"method": "panda", "target_epochs": 0}"#,
                "`target_epochs` is 0; it must lie in 1..=100",
            ),
        ] {
            assert_eq!(refusal(json), expected);
        }
        let several = r#"{"trade_off": 2, "head": {"shrinkage": 2}, "experimental": {"scale": 3}}"#;
        let mistakes = read(several).mistakes();
        let fields: Vec<_> = mistakes.iter().map(|mistake| mistake.field).collect();
        assert_eq!(
            fields,
            ["head.shrinkage", "trade_off", "experimental.scale"]
        );
        let singular = Shrinkage::Fixed(0.0).check_samples(9, 8).unwrap_err();
        assert!(
            singular.to_string().contains("set it to 0.01"),
            "{singular}"
        );
        assert!(Shrinkage::Fixed(0.0).check_samples(10, 8).is_ok());
        // A ratio of traces inverts nothing.
        let mut of_none = read(r#"{"h_score": {"shrinkage": 0.0}}"#).h_score;
        assert!(of_none.check_samples(9, 8).is_err());
        of_none.mode = Some(HScoreMode::TraceRatio);
        assert!(of_none.check_samples(9, 8).is_ok());
    }

    #[test]
    fn what_is_not_said_is_as_the_method_has_it() {
        let settled = |json: &str, can_fall_back| {
            let settled = read(json).settled(can_fall_back);
            assert_eq!(settled.settled(true), settled, "{json}");
            let HScoreOptions {
                mode, shrinkage, ..
            } = settled.h_score;
            (mode.unwrap(), shrinkage.unwrap(), settled.falls_back())
        };
        let cross_validated = (HScoreMode::CrossValidated, Shrinkage::Fixed(0.3));
        let standard = |rho| (HScoreMode::Standard, Shrinkage::Fixed(rho));
        for (json, can_fall_back, (mode, rho), falls_back) in [
            ("{}", true, cross_validated, true),
            ("{}", false, cross_validated, false),
            (
                r#"{"experimental": {"refine": 1}}"#,
                true,
                cross_validated,
                false,
            ),
            (r#"{"fallback": "none"}"#, true, cross_validated, false),
            (r#"{"method": "average"}"#, true, cross_validated, false),
            (r#"{"method": "single_best"}"#, true, cross_validated, false),
            (r#"{"method": "hgprompt"}"#, true, standard(0.01), false),
            (
                r#"{"method": "hgprompt", "h_score": {"shrinkage": 0.1}}"#,
                true,
                standard(0.1),
                false,
            ),
            (
                r#"{"h_score": {"mode": "standard"}}"#,
                true,
                standard(0.01),
                true,
            ),
        ] {
            let expected = (mode, rho, falls_back);
            assert_eq!(settled(json, can_fall_back), expected, "{json}");
        }
    }

    #[test]
    fn an_experimental_option_goes_with_what_it_can() {
        for fine in [
            r#"{"method": "average", "experimental": {"scale": "auto", "anchor_seed": 3}}"#,
            r#"{"method": "alignment_only", "experimental": {"entropy": 0.1}}"#,
            r#"{"method": "h_only", "experimental": {"uniform_mix": "auto", "scale": "auto"}}"#,
            r#"{"method": "h_only", "experimental": {"refine": 2}}"#,
        ] {
            assert_eq!(read(fine).mistakes(), [], "{fine}");
        }
        for (refused, expected) in [
            (
                r#"{"method": "spot", "experimental": {"entropy": 0.1}}"#,
                "experimental.entropy",
            ),
            (
                r#"{"method": "h_only", "experimental": {"entropy": 0.1}}"#,
                "experimental.entropy",
            ),
            (
                r#"{"method": "average", "experimental": {"refine": 1}}"#,
                "experimental.refine",
            ),
            (
                r#"{"experimental": {"scale": 0.5, "refine": 1}}"#,
                "experimental.scale",
            ),
            (r#"{"experimental": {"scale": 2.5}}"#, "experimental.scale"),
            (r#"{"experimental": {"scale": -0.5}}"#, "experimental.scale"),
            (
                r#"{"experimental": {"uniform_mix": 0.5, "refine": 1}}"#,
                "experimental.uniform_mix",
            ),
            (
                r#"{"experimental": {"uniform_mix": 1.5}}"#,
                "experimental.uniform_mix",
            ),
            (
                r#"{"fallback": "single_best", "experimental": {"refine": 1}}"#,
                "fallback",
            ),
        ] {
            let mistakes = read(refused).mistakes();
            assert_eq!(mistakes.len(), 1, "{refused}");
            assert_eq!(mistakes[0].field, expected, "{refused}");
        }
    }

    #[test]
    fn statistics_fix_what_they_were_made_with_and_know_no_backbone() {
        let rms = Some(GradientNormalization::Rms);
        let recorded = read(r#"{"alignment": {"gradient_normalization": "rms"}}"#);
        let fields = |json: &str, gradients| -> Vec<&str> {
            let asked = read(json);
            let differs = asked.differs_from_statistics(&recorded, gradients);
            let mistakes = asked.needs_backbone().into_iter().chain(differs);
            mistakes.map(|mistake| mistake.field).collect()
        };
        assert!(fields(r#"{"method": "average"}"#, rms).is_empty());
        assert!(fields(r#"{"alignment": {"gradient_normalization": "rms"}}"#, rms).is_empty());
        assert_eq!(fields("{}", rms), ["alignment.gradient_normalization"]);
        assert_eq!(fields("{}", None), ["method"]);
        let all = r#"{"method": "spot", "fallback": "single_best", "align_tokens": "hungarian",
                      "head": {"kind": "ridge", "shrinkage": 0.5}, "experimental": {"scale": 0.5}}"#;
        let expected = [
            "method",
            "fallback",
            "experimental.scale",
            "head.kind",
            "head.shrinkage",
            "align_tokens",
        ];
        assert_eq!(fields(all, rms), expected);
    }
}
