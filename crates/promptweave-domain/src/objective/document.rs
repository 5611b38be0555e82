//! An objective as JSON: a flat object whose `method` decides which other fields are allowed.

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use utoipa::openapi::schema::{AdditionalProperties, ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::json;
use crate::json::Mistake;
use crate::method::Method;
use crate::objective::options::{
    AlignmentTerm, BothTerms, Guarded, MethodOptions, Pool, SingleBest, Spot, TargetTuned,
};
use crate::objective::{
    AlignTokens, Experimental, HScoreMode, HScoreOptions, HeadOptions, Objective,
};

/// The options that all methods have.
#[derive(Default, Deserialize, ToSchema)]
#[serde(default)]
struct Common {
    h_score: HScoreOptions,
    head: HeadOptions,
    align_tokens: AlignTokens,
    experimental: Experimental,
}

const COMMON: [&str; 4] = ["h_score", "head", "align_tokens", "experimental"];
const EXPERIMENTAL: [&str; 5] = ["entropy", "refine", "uniform_mix", "scale", "anchor_seed"];

impl Method {
    /// Names of the options that not all methods have.
    pub fn own_options(self) -> &'static [&'static str] {
        match self {
            Self::HgpromptCv | Self::Hgprompt => &["trade_off", "alignment", "fallback"],
            Self::AlignmentOnly => &["alignment", "fallback"],
            Self::Pool => &["beta", "top_k", "fallback"],
            Self::HOnly | Self::Average => &["fallback"],
            Self::SingleBest => &["by"],
            Self::Spot => &["similarity", "top_k", "choice", "target_epochs", "fallback"],
            Self::Panda | Self::Attempt => &["target_epochs", "fallback"],
        }
    }

    fn has(self, option: &str) -> bool {
        self.own_options().contains(&option) || COMMON.contains(&option)
    }
}

impl<'de> Deserialize<'de> for Objective {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = Map::deserialize(deserializer)?;
        Self::from_fields(fields).map_err(D::Error::custom)
    }
}

impl Objective {
    fn from_fields(mut fields: Map<String, Value>) -> Result<Self, Mistake> {
        let within = |name: &'static str| {
            move |mistake: Mistake| Mistake {
                pointer: format!("/{name}{}", mistake.pointer),
                ..mistake
            }
        };
        let method = match fields.remove("method") {
            Some(word) => json::part(&word).map_err(within("method"))?,
            None => Method::default(),
        };
        if let Some(name) = fields.keys().find(|name| !method.has(name)) {
            return Err(Mistake {
                pointer: format!("/{}", json::escape(name)),
                detail: no_option(name, method),
            });
        }
        let fields = Value::Object(fields);
        let Common {
            h_score,
            head,
            align_tokens,
            experimental,
        } = json::part(&fields)?;
        Ok(Self {
            options: MethodOptions::read(method, &fields)?,
            h_score,
            head,
            align_tokens,
            experimental,
        })
    }

    /// This objective with another method. It loses the options that the other method does not
    /// have, and those about this method's solution.
    pub fn for_method(&self, method: Method) -> Self {
        let Ok(Value::Object(mut fields)) = serde_json::to_value(self) else {
            unreachable!("an objective is an object");
        };
        fields.retain(|name, _| method.has(name));
        let options = MethodOptions::read(method, &Value::Object(fields));
        let mut other = Self {
            options: options.expect("they are as they were written"),
            ..self.clone()
        };
        if (method == Method::Hgprompt) != (self.method() == Method::Hgprompt) {
            (other.h_score.mode, other.h_score.shrinkage) = (None::<HScoreMode>, None);
        }
        if !(self.method().weighs() && method.weighs()) {
            (other.experimental.entropy, other.experimental.refine) = (0.0, 0);
        }
        other
    }
}

impl MethodOptions {
    fn read(method: Method, fields: &Value) -> Result<Self, Mistake> {
        fn of<T: DeserializeOwned>(
            make: fn(T) -> MethodOptions,
            fields: &Value,
        ) -> Result<MethodOptions, Mistake> {
            json::part(fields).map(make)
        }
        match method {
            Method::HgpromptCv => of(Self::HgpromptCv, fields),
            Method::Hgprompt => of(Self::Hgprompt, fields),
            Method::HOnly => of(Self::HOnly, fields),
            Method::AlignmentOnly => of(Self::AlignmentOnly, fields),
            Method::Pool => of(Self::Pool, fields),
            Method::Average => of(Self::Average, fields),
            Method::SingleBest => of(Self::SingleBest, fields),
            Method::Spot => of(Self::Spot, fields),
            Method::Panda => of(Self::Panda, fields),
            Method::Attempt => of(Self::Attempt, fields),
        }
    }
}

/// Why a field is refused: which fields the method has, and which method has the field.
fn no_option(name: &str, method: Method) -> String {
    let listed = |names: &mut dyn Iterator<Item = String>| names.collect::<Vec<_>>().join(", ");
    let names = method.own_options().iter().chain(&COMMON);
    let has = listed(&mut names.map(|name| format!("`{name}`")));
    let others = Method::ALL
        .into_iter()
        .filter(|other| other.own_options().contains(&name));
    let others = listed(&mut others.map(|other| format!("`{other}`")));
    let whose = match (EXPERIMENTAL.contains(&name), others.as_str()) {
        (true, _) => format!("; there is an `experimental.{name}`"),
        (false, "") => String::new(),
        (false, others) => format!("; `{name}` is of {others}"),
    };
    format!("unknown field `{name}`: the method `{method}` has {has}{whose}")
}

// ---- Schema in the API's document --------------------------------------------------------------

impl PartialSchema for Objective {
    fn schema() -> RefOr<Schema> {
        let methods = Method::ALL.into_iter().map(of_method);
        let one_of = methods.fold(OneOfBuilder::new(), OneOfBuilder::item);
        one_of
            .description(Some(
                "How the weights are found: a `method` with the options that it has. Where `method` is left out, it is \
                 `hgprompt_cv`; everything else has a default as well.",
            ))
            .into()
    }
}

impl ToSchema for Objective {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Common::schemas(schemas);
        BothTerms::schemas(schemas);
        Pool::schemas(schemas);
        SingleBest::schemas(schemas);
        Spot::schemas(schemas);
    }
}

/// The schema of a request with this method: all fields that it may have.
fn of_method(method: Method) -> Schema {
    let (own, description) = match method {
        Method::HgpromptCv => (
            BothTerms::schema(),
            "H-score and gradient alignment, weighed by `trade_off`, with H `cross_validated`, and the best single source in \
             place of a prompt that does worse. The default.",
        ),
        Method::Hgprompt => (
            BothTerms::schema(),
            "The same as published, with H as `standard` and no `fallback`.",
        ),
        Method::HOnly => (Guarded::schema(), "The H-score alone; takes no gradients."),
        Method::AlignmentOnly => (AlignmentTerm::schema(), "Gradient alignment alone."),
        Method::Pool => (
            Pool::schema(),
            "A log-linear pool of the sources' own predictions; takes no gradients.",
        ),
        Method::Average => (Guarded::schema(), "Equal weights."),
        Method::SingleBest => (SingleBest::schema(), "All weight on one source."),
        Method::Spot => (Spot::schema(), "As SPoT weighs, by similarity of prompts."),
        Method::Panda => (
            TargetTuned::schema(),
            "As PANDA weighs, by similarity of what prompts do to the target's features.",
        ),
        Method::Attempt => (TargetTuned::schema(), "As ATTEMPT weighs, by attention."),
    };
    let name = ObjectBuilder::new()
        .schema_type(Type::String)
        .enum_values(Some([method.to_string()]));
    let mut object = ObjectBuilder::new()
        .title(Some(method.to_string()))
        .description(Some(description))
        .property("method", name)
        .additional_properties(Some(AdditionalProperties::FreeForm(false)));
    if method != Method::default() {
        object = object.required("method");
    }
    for part in [own, Common::schema()] {
        if let RefOr::T(Schema::Object(part)) = part {
            object = (part.properties.into_iter()).fold(object, |object, (name, schema)| {
                object.property(name, schema)
            });
        }
    }
    object.into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::objective::{TradeOff, TradeOffRule, Weighing};

    #[test]
    fn an_objective_that_says_nothing_is_the_default_and_reads_back_from_what_it_writes() {
        let read = |json: Value| serde_json::from_value::<Objective>(json).unwrap();
        assert_eq!(read(json!({})), Objective::default());
        assert_eq!(read(json!({})).weighing(), Weighing::TradeOff(0.5));
        for method in Method::ALL {
            let objective = read(json!({"method": method, "experimental": {"scale": "auto"}}));
            assert_eq!(objective.method(), method);
            let written = json!(objective);
            assert_eq!(read(written.clone()), objective);
            // All options of a method are written, and may be requested.
            for name in written.as_object().unwrap().keys() {
                assert!(name == "method" || method.has(name), "{method}: {name}");
            }
            let Schema::Object(object) = of_method(method) else {
                panic!("an object");
            };
            let names = method
                .own_options()
                .iter()
                .chain(&COMMON)
                .chain(&["method"]);
            let mut names: Vec<_> = names.map(|name| (*name).to_owned()).collect();
            let mut in_schema: Vec<_> = object.properties.keys().cloned().collect();
            names.sort();
            in_schema.sort();
            assert_eq!(names, in_schema, "{method}");
        }
        let written = json!(Experimental {
            entropy: 1.0,
            refine: 1,
            uniform_mix: "auto".parse().unwrap(),
            scale: "auto".parse().unwrap(),
            anchor_seed: Some(1),
        });
        assert!(EXPERIMENTAL.iter().all(|name| written.get(name).is_some()));
    }

    #[test]
    fn an_option_of_another_method_is_refused_with_the_name_of_both() {
        let mistakes = |json: Value| json::read::<Objective>(&json).mistakes;
        let told = mistakes(json!({
            "method": "panda", "top_k": 3, "trade_off": 0.5, "scale": 0.5, "lambda": 1, "target_epochs": "five",
            "h_score": {"mode": "inverted"}, "experimental": {"entropy": "high"},
        }));
        let has = "the method `panda` has `target_epochs`, `fallback`, `h_score`, `head`, `align_tokens`, `experimental`";
        let expected = [
            ("/lambda", format!("unknown field `lambda`: {has}")),
            (
                "/scale",
                format!("unknown field `scale`: {has}; there is an `experimental.scale`"),
            ),
            (
                "/top_k",
                format!("unknown field `top_k`: {has}; `top_k` is of `pool`, `spot`"),
            ),
            (
                "/trade_off",
                format!(
                    "unknown field `trade_off`: {has}; `trade_off` is of `hgprompt_cv`, `hgprompt`"
                ),
            ),
            (
                "/experimental/entropy",
                "expected a number, found the string \"high\"".to_owned(),
            ),
            (
                "/h_score/mode",
                "unknown value `inverted`, expected one of `cross_validated`, `standard`, `trace_ratio`"
                    .to_owned(),
            ),
            (
                "/target_epochs",
                "expected a whole number from 0 to 4294967295, found the string \"five\""
                    .to_owned(),
            ),
        ];
        let told: Vec<_> = told
            .iter()
            .map(|m| (m.pointer.as_str(), m.detail.clone()))
            .collect();
        assert_eq!(told, expected);
        // With an unknown method, the rest cannot be checked.
        let told = mistakes(json!({"method": "best", "by": "logme"}));
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].pointer, "/method");
        assert!(
            told[0]
                .detail
                .starts_with("unknown value `best`, expected one of `hgprompt_cv`")
        );
        assert_eq!(
            mistakes(json!([]))[0].detail,
            "expected an object, found an array"
        );
    }

    #[test]
    fn a_trade_off_is_one_of_four_things() {
        let weighing = |json: Value| {
            let objective: Objective = serde_json::from_value(json!({"trade_off": json})).unwrap();
            objective.weighing()
        };
        assert_eq!(weighing(json!(0.25)), Weighing::TradeOff(0.25));
        assert_eq!(weighing(json!("knee")), Weighing::Rule(TradeOffRule::Knee));
        let raw = json!({"alignment_weight": 2});
        assert_eq!(weighing(raw), Weighing::AlignmentWeight(2.0));
        for wrong in [
            json!("mean"),
            json!({"alignment_weight": 1, "t": 2}),
            json!(null),
        ] {
            let told = json::part::<TradeOff>(&wrong).unwrap_err();
            assert!(
                told.detail.starts_with("expected a number, `knee`"),
                "{told}"
            );
        }
    }

    #[test]
    fn another_method_leaves_behind_what_is_not_its_own() {
        let full: Objective = serde_json::from_value(json!({
            "trade_off": 0.3, "fallback": "none", "alignment": {"variant": "fishr"},
            "h_score": {"shrinkage": 0.5}, "experimental": {"refine": 2},
        }))
        .unwrap();
        let average = full.for_method(Method::Average);
        assert_eq!(average.method(), Method::Average);
        assert_eq!(average.h_score, full.h_score);
        assert_eq!(average.experimental.refine, 0);
        let published = full.for_method(Method::Hgprompt).settled(true);
        assert_eq!(published.weighing(), Weighing::TradeOff(0.3));
        assert_eq!(published.alignment(), full.alignment());
        assert_eq!(published.experimental.refine, 2);
        assert_eq!(published.h_score.mode(), HScoreMode::Standard);
    }
}
