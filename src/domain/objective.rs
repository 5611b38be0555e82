//! The method's settings, and what they may be: one shape for the API, the command line, a job's
//! specification and the metadata of `statistics.safetensors`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::method::{
    Criterion, MAX_SCALE, MAX_TARGET_EPOCHS, Method, Scale, Similarity, SingleBestOptions,
    SpotChoice, SpotOptions, TargetTuning,
};

/// Refinement steps after which nothing more is to be expected of them; each is a pass over all samples.
pub const MAX_REFINE: u32 = 100;

/// The method's settings. Everything has a default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Objective {
    /// How α is found.
    #[serde(skip_serializing_if = "is_off")]
    pub method: Method,
    /// t in [0, 1]: 0 weighs transferability alone, 1 gradient alignment alone. Scale-free: both
    /// terms are normalised by their range between their own optima. `knee` and `validation` choose it
    /// on the path. Default 0.5; excludes `alignment_weight`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trade_off: Option<TradeOff>,
    /// λ ≥ 0 in L(α) = -H(α) + λ L_align(α), taken as it is. Excludes `trade_off`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0)]
    pub alignment_weight: Option<f64>,
    /// τ ≥ 0: subtracts τ·S(α)/ln M from the minimised function, which is on a scale of order 1; S is the
    /// entropy. Weights become dense, so that every source has a rank. 0 is off.
    #[serde(skip_serializing_if = "is_off")]
    #[schema(minimum = 0)]
    pub entropy: f64,
    pub h_score: HScoreOptions,
    pub alignment: AlignmentOptions,
    pub head: HeadOptions,
    pub align_tokens: AlignTokens,
    /// Projected-gradient steps on the objective with the true H(f of Σ αᵢ Pᵢ), through the backbone,
    /// after solving; each is accepted only if it improves that objective. 0 is off, at most 100; excludes
    /// `entropy`, `scale` and methods that do not solve.
    #[serde(skip_serializing_if = "is_off")]
    #[schema(maximum = 100)]
    pub refine: u32,
    /// Of the method `single_best`.
    #[serde(skip_serializing_if = "is_off")]
    pub single_best: SingleBestOptions,
    /// Of the method `spot`.
    #[serde(skip_serializing_if = "is_off")]
    pub spot: SpotOptions,
    /// Of the methods `spot`, `panda` and `attempt`.
    #[serde(skip_serializing_if = "is_off")]
    pub target_tuning: TargetTuning,
    /// β in P_T = P₀ + β Σ αᵢ (Pᵢ - P₀): how far the composed prompt goes from the shared initial prompt P₀ towards
    /// Σ αᵢ Pᵢ. Default 1, the paper's sum.
    #[serde(skip_serializing_if = "is_off")]
    pub scale: Scale,
    /// Init seed of P₀, for a `scale` other than 1 [default: the one that all sources say they have].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub anchor: Option<u64>,
}

/// Off, which is what leaving it out means.
fn is_off<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// How the two terms are weighed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weighing {
    TradeOff(f64),
    Rule(TradeOffRule),
    AlignmentWeight(f64),
}

/// A number in [0, 1], or the rule that chooses it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a number, `knee` or `validation`")]
pub enum TradeOff {
    Value(f64),
    Rule(TradeOffRule),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TradeOffRule {
    /// The point of the path farthest from the chord between its ends, both terms normalised.
    Knee,
    /// The point of the path whose composed prompt has the highest cross-fitted accuracy on the target
    /// samples with a closed-form head: one forward pass a distinct point.
    Validation,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HScoreOptions {
    pub mode: HScoreMode,
    pub standardise: Standardise,
    pub shrinkage: Shrinkage,
}

impl Default for HScoreOptions {
    fn default() -> Self {
        Self {
            mode: HScoreMode::default(),
            standardise: Standardise::default(),
            shrinkage: Shrinkage::Fixed(0.01),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HScoreMode {
    /// tr(cov(f)⁻¹ cov(E[f|y])), the definition (Bao et al. 2019).
    #[default]
    Inv,
    /// tr cov(E[f|y]) / tr cov(f), as in H-ensemble's code (Wu et al. 2024); needs no shrinkage.
    TraceRatio,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Standardise {
    /// Features enter as they are.
    #[default]
    None,
    /// Every coordinate of every source's features is divided by its own standard deviation.
    PerSource,
}

/// ρ in Σ_ρ = (1-ρ)Σ + ρ(tr Σ/d)I: 0 (with more than d+1 samples) or a number in [1e-6, 1), or an
/// estimate from the uniform mixture of the features, which then stays as it is while α moves. Too
/// low and noise directions score near d ≥ N; too high and α collapses to one source.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a number, `oas` or `ledoit_wolf`")]
pub enum Shrinkage {
    Fixed(f64),
    Estimated(ShrinkageEstimate),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ShrinkageEstimate {
    /// Oracle approximating shrinkage (Chen et al. 2010).
    Oas,
    /// Ledoit & Wolf 2004.
    LedoitWolf,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AlignmentOptions {
    pub reading: AlignmentReading,
    pub gradient_norm: GradientNorm,
}

/// Which reading of the gradient-alignment term; the paper leaves open about what gradients vary and
/// which mean the variances are compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum AlignmentReading {
    /// Variances about the mixed gradient, against their α-weighted mean.
    #[default]
    R1,
    /// Variances about the mixed gradient, against their plain mean: a convex quadratic.
    R2,
    /// Variances about each prompt's own mean, against their α-weighted mean, as in Fishr (Ramé et al.
    /// 2022). Uniform weights always minimise it.
    R3,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GradientNorm {
    /// Gradients enter as they are, so that prompts with large gradients weigh more.
    #[default]
    None,
    /// Each prompt's gradients are divided by the root mean square of their norms over the samples.
    Rms,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HeadOptions {
    pub kind: HeadKind,
    /// ρ_h in [1e-6, 1), the shrinkage of the closed-form head that defines the loss. Too low and the
    /// head saturates, so that a few samples make up all of the gradient.
    #[schema(minimum = 1e-6, exclusive_maximum = 1)]
    pub shrinkage: f64,
}

impl Default for HeadOptions {
    fn default() -> Self {
        Self {
            kind: HeadKind::default(),
            shrinkage: 0.3,
        }
    }
}

/// The head that defines the loss, fitted in closed form on the target samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HeadKind {
    /// Shrunken linear discriminant analysis, one head a source.
    #[default]
    Lda,
    /// Ridge regression on one-hot labels, one head a source.
    Ridge,
    /// One shrunken linear discriminant analysis on the features of all sources together.
    Shared,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AlignTokens {
    /// Token i of every prompt is summed with token i of the others.
    #[default]
    Off,
    /// Every prompt's tokens are first put into the order that matches those of the most central prompt
    /// best (assignment on cosine similarity). No feature depends on that order; Σ αᵢ Pᵢ does.
    Hungarian,
}

// ---- Text, for the command line --------------------------------------------------------------

/// Reads a word as JSON would, so that the command line and the API know the same words.
fn from_word<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T, String> {
    let word = match text.parse::<f64>() {
        Ok(number) => serde_json::json!(number),
        Err(_) => serde_json::json!(text),
    };
    serde_json::from_value(word).map_err(|error| error.to_string())
}

macro_rules! words {
    ($($type:ty),*) => {$(
        impl FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                from_word(text)
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let word = serde_json::to_value(self).map_err(|_| fmt::Error)?;
                match word.as_str() {
                    Some(text) => f.write_str(text),
                    None => write!(f, "{word}"),
                }
            }
        }
    )*};
}
words!(
    TradeOff,
    HScoreMode,
    Standardise,
    Shrinkage,
    AlignmentReading,
    GradientNorm,
    HeadKind,
    AlignTokens,
    Method,
    Criterion,
    Similarity,
    SpotChoice,
    Scale
);

// ---- Ranges ----------------------------------------------------------------------------------

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
        match self.mode {
            HScoreMode::Inv => self.shrinkage.check_samples(n, d),
            HScoreMode::TraceRatio => Ok(()),
        }
    }
}

impl Objective {
    /// Checks ranges and says how the terms are weighed.
    pub fn weighing(&self) -> Result<Weighing, InvalidObjective> {
        self.h_score.shrinkage.check("h_score.shrinkage")?;
        check_shrinkage("head.shrinkage", self.head.shrinkage)?;
        if !(self.entropy.is_finite() && self.entropy >= 0.0) {
            let problem = format!("is {}; it must be finite and ≥ 0", self.entropy);
            return refuse("entropy", problem);
        }
        if self.refine > MAX_REFINE {
            let problem = format!("is {}; it must be at most {MAX_REFINE}", self.refine);
            return refuse("refine", problem);
        }
        if self.refine > 0 && self.entropy > 0.0 {
            let problem = "excludes `entropy`: its steps know nothing of dense weights";
            return refuse("refine", problem);
        }
        self.check_method()?;
        match self.method {
            Method::Hgprompt => {}
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
            if given && method != Method::Hgprompt {
                return refuse(
                    field,
                    format!("is of the method `hgprompt`; `{method}` weighs no terms"),
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
        match self.scale {
            Scale::Value(beta) if !(0.0..=MAX_SCALE).contains(&beta) => {
                let problem = format!("is {beta}; it must lie in 0..={MAX_SCALE}, or be `auto`");
                refuse("scale", problem)
            }
            scale if scale != Scale::default() && self.refine > 0 => {
                refuse("scale", "excludes `refine`, whose steps are on Σ αᵢ Pᵢ")
            }
            _ => Ok(()),
        }
    }

    /// The same by another method, less what belongs to this one alone.
    pub fn for_method(&self, method: Method) -> Self {
        Self {
            method,
            trade_off: None,
            alignment_weight: None,
            entropy: 0.0,
            refine: 0,
            single_best: SingleBestOptions::default(),
            spot: SpotOptions::default(),
            target_tuning: TargetTuning::default(),
            ..self.clone()
        }
    }

    /// What is left of it where α is solved for again without a backbone: no refinement, and Σ αᵢ Pᵢ itself.
    pub fn without_forward_passes(&self) -> Self {
        Self {
            refine: 0,
            scale: Scale::default(),
            anchor: None,
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
        if self.alignment.gradient_norm != recorded.alignment.gradient_norm {
            let made = recorded.alignment.gradient_norm;
            return refuse("alignment.gradient_norm", format!("{SAME} `{made}`"));
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
    fn the_command_line_knows_the_words_of_the_api() {
        assert_eq!("0.25".parse(), Ok(TradeOff::Value(0.25)));
        assert_eq!("knee".parse(), Ok(TradeOff::Rule(TradeOffRule::Knee)));
        assert_eq!(
            "oas".parse(),
            Ok(Shrinkage::Estimated(ShrinkageEstimate::Oas))
        );
        assert_eq!("trace_ratio".parse(), Ok(HScoreMode::TraceRatio));
        assert_eq!(AlignmentReading::R3.to_string(), "R3");
        assert_eq!(Shrinkage::Fixed(0.01).to_string(), "0.01");
        assert_eq!(
            "shrunk".parse::<Shrinkage>().unwrap_err(),
            "expected a number, `oas` or `ledoit_wolf`"
        );
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
            "`refine` excludes `entropy`: its steps know nothing of dense weights"
        );
        let singular = Shrinkage::Fixed(0.0).check_samples(9, 8).unwrap_err();
        assert!(
            singular.to_string().contains("set it to 0.01"),
            "{singular}"
        );
        assert!(Shrinkage::Fixed(0.0).check_samples(10, 8).is_ok());
    }

    #[test]
    fn a_method_goes_with_its_own_options_alone() {
        let check = |json: &str| serde_json::from_str::<Objective>(json).unwrap().weighing();
        let field = |json: &str| check(json).unwrap_err().field;
        for fine in [
            r#"{"method": "average", "scale": "auto", "anchor": 3}"#,
            r#"{"method": "alignment_only", "entropy": 0.1}"#,
            r#"{"method": "single_best", "single_best": {"by": "log_me"}}"#,
            r#"{"method": "spot", "spot": {"top_k": 3, "choice": "best_of"}}"#,
            r#"{"method": "panda", "target_tuning": {"epochs": 1}}"#,
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
            (r#"{"single_best": {"by": "log_me"}}"#, "single_best"),
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
        // What is not said is not written: specifications of before have the digests that they had.
        let written = serde_json::to_value(Objective::default()).unwrap();
        assert!(written.get("method").is_none() && written.get("scale").is_none());
    }
}
