//! What an objective may be: ranges, and what goes with what.

use super::{
    HScoreMode, HScoreOptions, MAX_REFINE, Objective, Shrinkage, TradeOff, TradeOffRule, Weighing,
    is_off,
};
use crate::domain::method::{
    Fallback, MAX_SCALE, MAX_TARGET_EPOCHS, Method, Scale, SingleBestOptions, SpotOptions,
    TargetTuning, UniformMix,
};

#[derive(Debug, thiserror::Error, PartialEq)]
#[error("`{field}` {problem}")]
pub struct InvalidObjective {
    /// Dotted, e.g. `h_score.shrinkage`.
    pub field: &'static str,
    pub problem: String,
}

fn refuse<T>(field: &'static str, problem: impl Into<String>) -> Result<T, InvalidObjective> {
    let problem = problem.into();
    Err(InvalidObjective { field, problem })
}

/// Below 1e-6 a covariance of fewer samples than dimensions is singular in floating point.
pub fn check_shrinkage(field: &'static str, rho: f64) -> Result<(), InvalidObjective> {
    if (1e-6..1.0).contains(&rho) {
        return Ok(());
    }
    refuse(
        field,
        format!("is {rho}; it must be at least 1e-6 and below 1"),
    )
}

impl Shrinkage {
    /// Checks the range. 0 passes: whether there are samples enough for it, [`Self::check_samples`] says.
    pub fn check(self, field: &'static str) -> Result<(), InvalidObjective> {
        match self {
            Self::Fixed(0.0) | Self::Estimated(_) => Ok(()),
            Self::Fixed(rho) => check_shrinkage(field, rho),
        }
    }

    /// Refuses ρ = 0 where the covariance of N samples in d dimensions is singular.
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
    /// As [`Shrinkage::check_samples`]; `trace_ratio` inverts nothing.
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
    /// Checks ranges and says how the terms are weighed.
    pub fn weighing(&self) -> Result<Weighing, InvalidObjective> {
        self.h_score.shrinkage().check("h_score.shrinkage")?;
        check_shrinkage("head.shrinkage", self.head.shrinkage)?;
        if !(self.entropy.is_finite() && self.entropy >= 0.0) {
            let problem = format!("is {}; it must be finite and ≥ 0", self.entropy);
            return refuse("entropy", problem);
        }
        self.check_method()?;
        self.check_share_and_scale()?;
        self.check_refine()?;
        match self.method {
            method if method.weighs() => {}
            Method::AlignmentOnly => return Ok(Weighing::TradeOff(1.0)),
            _ => return Ok(Weighing::TradeOff(0.0)),
        }
        match (self.trade_off, self.alignment_weight) {
            (Some(_), Some(_)) => refuse(
                "alignment_weight",
                "excludes `trade_off`: give one of the two",
            ),
            (Some(TradeOff::Value(t)), None) if !(0.0..=1.0).contains(&t) => {
                refuse("trade_off", format!("is {t}; it must lie in 0..=1"))
            }
            (None, Some(lambda)) if !(lambda.is_finite() && lambda >= 0.0) => refuse(
                "alignment_weight",
                format!("is {lambda}; it must be finite and ≥ 0"),
            ),
            (None, Some(lambda)) => Ok(Weighing::AlignmentWeight(lambda)),
            (Some(TradeOff::Value(t)), None) => Ok(Weighing::TradeOff(t)),
            (Some(TradeOff::Rule(rule)), None) => Ok(Weighing::Rule(rule)),
            (None, None) => Ok(Weighing::TradeOff(0.5)),
        }
    }

    /// Whether the method goes with the rest of what is asked.
    fn check_method(&self) -> Result<(), InvalidObjective> {
        let method = self.method;
        let only_hgprompt = [
            ("trade_off", self.trade_off.is_some()),
            ("alignment_weight", self.alignment_weight.is_some()),
        ];
        if method == Method::HOnly && self.entropy > 0.0 {
            let problem = "is weighed by the range of both terms, and `h_only` has one";
            return refuse("entropy", problem);
        }
        let only_solved = [("entropy", self.entropy > 0.0), ("refine", self.refine > 0)];
        for (field, given) in only_hgprompt {
            if given && !method.weighs() {
                return refuse(
                    field,
                    format!("is of the method `hgprompt_cv`; `{method}` weighs no terms"),
                );
            }
        }
        for (field, given) in only_solved {
            if given && !method.solves() {
                return refuse(
                    field,
                    format!("is of methods that solve; `{method}` does not"),
                );
            }
        }
        let others = [
            (
                "single_best",
                !is_off(&self.single_best),
                method == Method::SingleBest,
            ),
            ("spot", !is_off(&self.spot), method == Method::Spot),
            (
                "target_tuning",
                !is_off(&self.target_tuning),
                method.tunes(),
            ),
        ];
        for (field, given, fits) in others {
            if given && !fits {
                return refuse(field, format!("is of another method than `{method}`"));
            }
        }
        if self.spot.top_k == Some(0) {
            return refuse("spot.top_k", "is 0; it must be at least 1");
        }
        let epochs = self.target_tuning.epochs;
        if !(1..=MAX_TARGET_EPOCHS).contains(&epochs) {
            let problem = format!("is {epochs}; it must lie in 1..={MAX_TARGET_EPOCHS}");
            return refuse("target_tuning.epochs", problem);
        }
        Ok(())
    }

    fn check_share_and_scale(&self) -> Result<(), InvalidObjective> {
        match (self.uniform_mix, self.scale) {
            (UniformMix::Value(gamma), _) if !(0.0..=1.0).contains(&gamma) => {
                let problem = format!("is {gamma}; it must lie in 0..=1, or be `auto`");
                refuse("uniform_mix", problem)
            }
            (_, Scale::Value(beta)) if !(0.0..=MAX_SCALE).contains(&beta) => {
                let problem = format!("is {beta}; it must lie in 0..={MAX_SCALE}, or be `auto`");
                refuse("scale", problem)
            }
            _ => Ok(()),
        }
    }

    fn check_refine(&self) -> Result<(), InvalidObjective> {
        if self.refine > MAX_REFINE {
            let problem = format!("is {}; it must be at most {MAX_REFINE}", self.refine);
            return refuse("refine", problem);
        }
        const UNDONE: &str = "excludes `refine`, which it would undo";
        let excluded = [
            (
                "entropy",
                self.entropy > 0.0,
                "excludes `refine`, whose steps know nothing of dense weights",
            ),
            ("uniform_mix", !is_off(&self.uniform_mix), UNDONE),
            ("fallback", self.falls_back(), UNDONE),
            (
                "scale",
                !is_off(&self.scale),
                "excludes `refine`, whose steps are on Σ αᵢ Pᵢ",
            ),
        ];
        match excluded
            .iter()
            .find(|(_, given, _)| *given && self.refine > 0)
        {
            Some((field, _, problem)) => refuse(field, *problem),
            None => Ok(()),
        }
    }

    /// Whether a `fallback` is asked for.
    pub fn falls_back(&self) -> bool {
        self.fallback == Some(Fallback::SingleBest)
    }

    /// What it means on the whole, with what is not said as the method has it. Without a backbone, or where a `early_stopping` looks at
    /// α on the way, there can be no fallback.
    pub fn settled(&self, can_fall_back: bool) -> Self {
        let mut settled = self.clone();
        let h_score = &mut settled.h_score;
        h_score.mode.get_or_insert(match self.method {
            Method::Hgprompt => HScoreMode::Standard,
            _ => HScoreMode::default(),
        });
        h_score.shrinkage = Some(h_score.shrinkage());
        let falls_back = can_fall_back && self.method == Method::HgpromptCv && self.refine == 0;
        settled.fallback.get_or_insert(match falls_back {
            true => Fallback::SingleBest,
            false => Fallback::None,
        });
        settled
    }

    /// The same by another method, less what belongs to this one alone.
    pub fn for_method(&self, method: Method) -> Self {
        let mut h_score = self.h_score.clone();
        if (method == Method::Hgprompt) != (self.method == Method::Hgprompt) {
            (h_score.mode, h_score.shrinkage) = (None, None);
        }
        let mut other = Self {
            h_score,
            method,
            single_best: SingleBestOptions::default(),
            spot: SpotOptions::default(),
            target_tuning: TargetTuning::default(),
            ..self.clone()
        };
        if !(self.method.weighs() && method.weighs()) {
            (other.trade_off, other.alignment_weight) = (None, None);
            (other.entropy, other.refine) = (0.0, 0);
        }
        other
    }

    /// What is left of it where α is solved for again without a backbone: no refinement, nothing that is chosen by forward
    /// passes, and Σ αᵢ Pᵢ itself.
    pub fn without_forward_passes(&self) -> Self {
        Self {
            refine: 0,
            uniform_mix: match self.uniform_mix {
                UniformMix::Rule(_) => UniformMix::default(),
                value => value,
            },
            fallback: Some(Fallback::None),
            scale: Scale::default(),
            anchor_seed: None,
            ..self.clone()
        }
    }

    /// Checks what needs a backbone where there is only a statistics file made with `recorded`, with `gradients` or
    /// without.
    pub fn check_without_backbone(
        &self,
        recorded: &Self,
        gradients: bool,
    ) -> Result<(), InvalidObjective> {
        const SAME: &str = "is fixed by the statistics, which were made with";
        if self.trade_off == Some(TradeOff::Rule(TradeOffRule::Validation)) {
            return refuse(
                "trade_off",
                "`validation` needs the backbone: run the whole composition, or choose a number or `knee`",
            );
        }
        if self.refine > 0 {
            return refuse(
                "refine",
                "needs the backbone: run the whole composition, or leave it out",
            );
        }
        if self.method.tunes() {
            let problem = format!(
                "`{}` tunes a prompt: run the whole composition",
                self.method
            );
            return refuse("method", problem);
        }
        if matches!(self.uniform_mix, UniformMix::Rule(_)) {
            return refuse(
                "uniform_mix",
                "`auto` needs the backbone: run the whole composition, or choose a number",
            );
        }
        if self.falls_back() {
            return refuse("fallback", "needs the backbone: run the whole composition");
        }
        if self.scale != Scale::default() {
            return refuse("scale", "needs the backbone: run the whole composition");
        }
        if self.method.takes_gradients() && !gradients {
            let problem = format!(
                "`{}` needs gradients, and the statistics were made without; run the whole composition",
                self.method
            );
            return refuse("method", problem);
        }
        if self.alignment.gradient_normalization != recorded.alignment.gradient_normalization {
            let made = recorded.alignment.gradient_normalization;
            return refuse(
                "alignment.gradient_normalization",
                format!("{SAME} `{made}`"),
            );
        }
        if self.head.kind != recorded.head.kind {
            return refuse("head.kind", format!("{SAME} `{}`", recorded.head.kind));
        }
        if self.head.shrinkage != recorded.head.shrinkage {
            let made = recorded.head.shrinkage;
            return refuse("head.shrinkage", format!("{SAME} {made}"));
        }
        if self.align_tokens != recorded.align_tokens {
            return refuse(
                "align_tokens",
                format!("{SAME} `{}`", recorded.align_tokens),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_objective_is_the_default_and_unknown_fields_are_refused() {
        let objective: Objective = serde_json::from_str("{}").unwrap();
        assert_eq!(objective, Objective::default());
        assert_eq!(objective.weighing(), Ok(Weighing::TradeOff(0.5)));
        assert!(serde_json::from_str::<Objective>(r#"{"lambda": 1}"#).is_err());
    }

    #[test]
    fn ranges_are_checked_and_the_field_is_named() {
        let refusal = |json: &str| {
            serde_json::from_str::<Objective>(json)
                .unwrap()
                .weighing()
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            refusal(r#"{"trade_off": 1.5}"#),
            "`trade_off` is 1.5; it must lie in 0..=1"
        );
        assert_eq!(
            refusal(r#"{"h_score": {"shrinkage": 1e-9}}"#),
            "`h_score.shrinkage` is 0.000000001; it must be at least 1e-6 and below 1"
        );
        assert_eq!(
            refusal(r#"{"trade_off": "knee", "alignment_weight": 1.0}"#),
            "`alignment_weight` excludes `trade_off`: give one of the two"
        );
        assert_eq!(
            refusal(r#"{"refine": 101}"#),
            "`refine` is 101; it must be at most 100"
        );
        assert_eq!(
            refusal(r#"{"refine": 1, "entropy": 0.1}"#),
            "`entropy` excludes `refine`, whose steps know nothing of dense weights"
        );
        let singular = Shrinkage::Fixed(0.0).check_samples(9, 8).unwrap_err();
        assert!(
            singular.to_string().contains("set it to 0.01"),
            "{singular}"
        );
        assert!(Shrinkage::Fixed(0.0).check_samples(10, 8).is_ok());
    }

    #[test]
    fn what_is_not_said_is_as_the_method_has_it() {
        let settled = |json: &str, can_fall_back| {
            let objective: Objective = serde_json::from_str(json).unwrap();
            let settled = objective.settled(can_fall_back);
            assert_eq!(settled.settled(true), settled, "{json}");
            let HScoreOptions {
                mode, shrinkage, ..
            } = settled.h_score;
            (mode.unwrap(), shrinkage.unwrap(), settled.fallback.unwrap())
        };
        let fixed = Shrinkage::Fixed;
        let (cross_validated, standard) = (HScoreMode::CrossValidated, HScoreMode::Standard);
        for (json, can_fall_back, expected) in [
            (
                "{}",
                true,
                (cross_validated, fixed(0.3), Fallback::SingleBest),
            ),
            ("{}", false, (cross_validated, fixed(0.3), Fallback::None)),
            (
                r#"{"refine": 1}"#,
                true,
                (cross_validated, fixed(0.3), Fallback::None),
            ),
            (
                r#"{"fallback": "none"}"#,
                true,
                (cross_validated, fixed(0.3), Fallback::None),
            ),
            (
                r#"{"method": "average"}"#,
                true,
                (cross_validated, fixed(0.3), Fallback::None),
            ),
            (
                r#"{"method": "hgprompt"}"#,
                true,
                (standard, fixed(0.01), Fallback::None),
            ),
            (
                r#"{"method": "hgprompt", "h_score": {"shrinkage": 0.1}}"#,
                true,
                (standard, fixed(0.1), Fallback::None),
            ),
            (
                r#"{"h_score": {"mode": "standard"}}"#,
                true,
                (standard, fixed(0.01), Fallback::SingleBest),
            ),
        ] {
            assert_eq!(settled(json, can_fall_back), expected, "{json}");
        }
    }

    #[test]
    fn a_method_goes_with_its_own_options_alone() {
        let check = |json: &str| serde_json::from_str::<Objective>(json).unwrap().weighing();
        let field = |json: &str| check(json).unwrap_err().field;
        for fine in [
            r#"{"method": "average", "scale": "auto", "anchor_seed": 3}"#,
            r#"{"method": "alignment_only", "entropy": 0.1}"#,
            r#"{"method": "single_best", "single_best": {"by": "logme"}}"#,
            r#"{"method": "spot", "spot": {"top_k": 3, "choice": "best_of"}}"#,
            r#"{"method": "panda", "target_tuning": {"epochs": 1}}"#,
            r#"{"method": "h_only", "uniform_mix": "auto", "scale": "auto"}"#,
        ] {
            assert!(check(fine).is_ok(), "{fine}");
        }
        assert_eq!(
            check(r#"{"method": "alignment_only"}"#),
            Ok(Weighing::TradeOff(1.0))
        );
        for (refused, expected) in [
            (r#"{"method": "average", "trade_off": 0.5}"#, "trade_off"),
            (
                r#"{"method": "h_only", "alignment_weight": 1}"#,
                "alignment_weight",
            ),
            (r#"{"method": "spot", "entropy": 0.1}"#, "entropy"),
            (r#"{"method": "h_only", "entropy": 0.1}"#, "entropy"),
            (r#"{"method": "average", "refine": 1}"#, "refine"),
            (r#"{"scale": 0.5, "refine": 1}"#, "scale"),
            (r#"{"scale": 2.5}"#, "scale"),
            (r#"{"scale": -0.5}"#, "scale"),
            (r#"{"uniform_mix": 0.5, "refine": 1}"#, "uniform_mix"),
            (r#"{"uniform_mix": 1.5}"#, "uniform_mix"),
            (r#"{"fallback": "single_best", "refine": 1}"#, "fallback"),
            (r#"{"single_best": {"by": "logme"}}"#, "single_best"),
            (r#"{"method": "panda", "spot": {"top_k": 3}}"#, "spot"),
            (r#"{"method": "spot", "spot": {"top_k": 0}}"#, "spot.top_k"),
            (r#"{"target_tuning": {"epochs": 3}}"#, "target_tuning"),
            (
                r#"{"method": "spot", "target_tuning": {"epochs": 0}}"#,
                "target_tuning.epochs",
            ),
        ] {
            assert_eq!(field(refused), expected, "{refused}");
        }
        // Another method leaves behind what is not its own.
        let full: Objective = serde_json::from_str(
            r#"{"trade_off": 0.3, "refine": 2, "h_score": {"shrinkage": 0.5}}"#,
        )
        .unwrap();
        let average = full.for_method(Method::Average);
        assert!(average.weighing().is_ok());
        assert_eq!(average.h_score, full.h_score);
        let published = full.for_method(Method::Hgprompt).settled(true);
        assert_eq!((published.trade_off, published.refine), (full.trade_off, 2));
        assert_eq!(published.h_score.mode(), HScoreMode::Standard);
        assert_eq!(published.h_score.shrinkage(), Shrinkage::Fixed(0.01));
        // What is not said is not written: specifications of before have the digests that they had.
        let written = serde_json::to_value(Objective::default()).unwrap();
        for since in ["method", "scale", "uniform_mix", "fallback"] {
            assert!(written.get(since).is_none(), "{since}");
        }
    }
}
