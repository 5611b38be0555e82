//! How requests name what they work on: a string if the name is all there is to say, or an object.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{Ref, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use promptweave_domain::composition::TargetSamples;
use promptweave_domain::reference::Reference;
use promptweave_domain::split::Split;

/// The dataset whose images are learned from.
#[derive(Debug)]
pub struct Target(TargetObject);

/// A prompt.
#[derive(Debug)]
pub struct Source {
    pub prompt: Reference,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct TargetObject {
    /// `name`, `name:2` or `name@sha256:…`.
    #[schema(value_type = String, example = "food:1")]
    dataset: Reference,
    #[serde(default = "default_split")]
    #[schema(default = "train")]
    split: Split,
    /// Labelled images that the result is evaluated on; nothing is learned from them.
    eval_split: Option<Split>,
    /// The most images to use: a seeded, stratified choice. It must be at least the number of classes.
    #[serde(default = "default_max_samples")]
    #[schema(minimum = 2, maximum = 1_000_000, default = 2000)]
    max_samples: usize,
    #[serde(default)]
    seed: u64,
    /// Leave out unreadable images and count them, instead of failing.
    #[serde(default)]
    skip_unreadable: bool,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SourceObject {
    /// `name`, `name:2`, `name:production` or `name@sha256:…`.
    #[schema(value_type = String, example = "dtd")]
    prompt: Reference,
}

pub(super) fn default_split() -> Split {
    Split::Train
}

fn default_max_samples() -> usize {
    2000
}

impl Target {
    pub fn samples(self) -> (Reference, TargetSamples) {
        let Self(asked) = self;
        let samples = TargetSamples {
            split: asked.split,
            eval_split: asked.eval_split,
            max_samples: asked.max_samples,
            seed: asked.seed,
            skip_unreadable: asked.skip_unreadable,
        };
        (asked.dataset, samples)
    }
}

impl From<Reference> for TargetObject {
    fn from(dataset: Reference) -> Self {
        Self {
            dataset,
            split: default_split(),
            eval_split: None,
            max_samples: default_max_samples(),
            seed: 0,
            skip_unreadable: false,
        }
    }
}

impl From<Reference> for SourceObject {
    fn from(prompt: Reference) -> Self {
        Self { prompt }
    }
}

// ---- Both forms --------------------------------------------------------------------------------

/// Reads either form. An object's fields are read in place, so that a mistake in one has its own pointer.
struct Either<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de> + From<Reference>> Visitor<'de> for Either<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or an object")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        text.parse::<Reference>().map(T::from).map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(fields))
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Either(PhantomData)).map(Self)
    }
}

impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let SourceObject { prompt } = deserializer.deserialize_any(Either(PhantomData))?;
        Ok(Self { prompt })
    }
}

/// The schema of both forms. The object is a component, so that generated clients have a name for it.
fn either<Object: ToSchema>(name: &str, example: &str, about: &str) -> RefOr<Schema> {
    let name = ObjectBuilder::new()
        .schema_type(Type::String)
        .description(Some(name))
        .examples([example]);
    let object = Ref::from_schema_name(Object::name());
    let forms = OneOfBuilder::new().item(name).item(object);
    forms.description(Some(about)).into()
}

fn add<Object: ToSchema>(schemas: &mut Vec<(String, RefOr<Schema>)>) {
    schemas.push((Object::name().into_owned(), Object::schema()));
    Object::schemas(schemas);
}

impl PartialSchema for Target {
    fn schema() -> RefOr<Schema> {
        let name = "The dataset alone, as `dataset` of the object, with its split `train`.";
        let about = "Whose images are learned from.";
        either::<TargetObject>(name, "food:1", about)
    }
}

impl ToSchema for Target {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        add::<TargetObject>(schemas);
    }
}

impl PartialSchema for Source {
    fn schema() -> RefOr<Schema> {
        let name = "The prompt alone: `name`, `name:2`, `name:production` or `name@sha256:…`.";
        either::<SourceObject>(name, "dtd", "A prompt.")
    }
}

impl ToSchema for Source {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        add::<SourceObject>(schemas);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use promptweave_domain::json;

    #[test]
    fn a_name_alone_is_the_object_that_says_no_more() {
        let target = |form| serde_json::from_value::<Target>(form).unwrap().samples();
        let (short, full) = (
            target(json!("pets:2")),
            target(json!({"dataset": "pets:2"})),
        );
        assert_eq!(short, full);
        assert_eq!(short.1.max_samples, 2000);
        let digest = format!("dtd@sha256:{}", "0".repeat(64));
        for name in ["dtd", "dtd:3", "dtd:production", &digest] {
            let source: Source = serde_json::from_value(json!(name)).unwrap();
            assert_eq!(source.prompt.to_string(), name);
        }
    }

    #[test]
    fn mistakes_of_either_form_have_their_place() {
        let told = |form| {
            let mistakes = json::read::<Vec<Source>>(&form).mistakes;
            let told = mistakes.into_iter().map(|it| (it.pointer, it.detail));
            told.collect::<Vec<_>>()
        };
        let wrong = told(json!(["Dtd", {"prompt": "dtd:0"}, {"promt": "dtd"}, 7, "dtd"]));
        let places: Vec<_> = wrong.iter().map(|(place, _)| place.as_str()).collect();
        assert_eq!(places, ["/0", "/1/prompt", "/2/promt", "/2", "/3"]);
        assert!(wrong[0].1.contains("is not a name"), "{wrong:?}");
        assert_eq!(
            wrong[4].1,
            "expected a string or an object, found the number 7"
        );
    }
}
