//! Reading JSON that people write. Every mistake in a document's shape is reported with its place,
//! in JSON's own words.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, DeserializeOwned};
use serde_json::Value;

/// The largest number of mistakes reported for one document.
const MAX_MISTAKES: usize = 32;

/// A part of a document that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// JSON pointer to the part.
    pub pointer: String,
    pub detail: String,
}

/// The format in which a type that reads its own parts reports a mistake. [`read`] finds the place
/// in it.
impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pointer, detail } = self;
        match pointer.as_str() {
            "" => write!(f, "{detail}"),
            pointer => write!(f, "at {pointer}: {detail}"),
        }
    }
}

/// A document, as far as it can be read.
#[derive(Debug)]
pub struct Reading<T> {
    /// The document without its mistakes; `None` if nothing is left of it.
    pub value: Option<T>,
    pub mistakes: Vec<Mistake>,
    pub left_out: LeftOut,
}

/// The parts that were left out of a document, as pointers into the whole document.
#[derive(Clone, Debug, Default)]
pub struct LeftOut {
    parts: Vec<String>,
    /// For each array, the indices of the elements that were left out, in order.
    of_arrays: BTreeMap<String, Vec<usize>>,
}

/// Reads a document. After each mistake it reads again without the mistaken part, so that all
/// mistakes are found.
pub fn read<T: DeserializeOwned>(document: &Value) -> Reading<T> {
    let mut rest = document.clone();
    let mut reading = Reading {
        value: None,
        mistakes: Vec::new(),
        left_out: LeftOut::default(),
    };
    loop {
        let Mistake { pointer, detail } = match part::<T>(&rest) {
            Ok(value) => {
                reading.value = Some(value);
                return reading;
            }
            Err(mistake) => mistake,
        };
        let place = reading.left_out.original(&pointer);
        if !reading.left_out.explains(&place, &detail) {
            let pointer = place;
            reading.mistakes.push(Mistake { pointer, detail });
        }
        // `method` decides which other fields are allowed: without it the fields beside it cannot
        // be checked.
        let part = pointer.strip_suffix("/method").unwrap_or(&pointer);
        let place = reading.left_out.original(part);
        if reading.mistakes.len() == MAX_MISTAKES || !leave_out(&mut rest, part) {
            return reading;
        }
        reading.left_out.note(place, document);
    }
}

/// Reads a document, or returns its first mistake.
pub fn part<T: for<'a> Deserialize<'a>>(document: &Value) -> Result<T, Mistake> {
    serde_path_to_error::deserialize(document).map_err(|error| {
        let mut pointer = json_pointer(error.path());
        let message = error.into_inner().to_string();
        match message
            .strip_prefix("at ")
            .and_then(|text| text.split_once(": "))
        {
            Some((within, detail)) if within.starts_with('/') => {
                pointer += within;
                let detail = detail.to_owned();
                Mistake { pointer, detail }
            }
            _ => Mistake {
                pointer,
                detail: in_json_words(&message),
            },
        }
    })
}

impl LeftOut {
    /// Translates a pointer into the reduced document to a pointer into the original.
    pub fn original(&self, pointer: &str) -> String {
        let mut place = String::new();
        for segment in pointer.split('/').skip(1) {
            let index = segment.parse::<usize>().ok();
            let shifted = self.of_arrays.get(&place).zip(index);
            let segment = match shifted {
                Some((gone, index)) => gone
                    .iter()
                    .fold(index, |at, gone| at + usize::from(*gone <= at))
                    .to_string(),
                None => segment.to_owned(),
            };
            place = place + "/" + &segment;
        }
        place
    }

    /// Whether a complaint about this part may be due to a part that was left out.
    pub fn spoils(&self, place: &str) -> bool {
        let within = |part: &str, whole: &str| {
            let rest = part.strip_prefix(whole);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let mut parts = self.parts.iter();
        parts.any(|part| within(part, place) || within(place, part))
    }

    fn note(&mut self, place: String, document: &Value) {
        if let Some((parent, last)) = place.rsplit_once('/')
            && document.pointer(parent).is_some_and(Value::is_array)
            && let Ok(index) = last.parse()
        {
            let gone = self.of_arrays.entry(parent.to_owned()).or_default();
            gone.push(index);
            gone.sort_unstable();
        }
        self.parts.push(place);
    }

    /// Whether a field is missing because it was left out.
    fn explains(&self, place: &str, detail: &str) -> bool {
        let missing = detail.strip_prefix("missing field `");
        missing
            .and_then(|rest| rest.strip_suffix('`'))
            .is_some_and(|field| self.parts.contains(&format!("{place}/{}", escape(field))))
    }
}

/// Removes a part from a document, and tells whether it did. The whole document cannot be removed.
fn leave_out(document: &mut Value, pointer: &str) -> bool {
    let Some((parent, last)) = pointer.rsplit_once('/') else {
        return false;
    };
    match document.pointer_mut(parent) {
        Some(Value::Object(fields)) => {
            let name = last.replace("~1", "/").replace("~0", "~");
            fields.remove(&name).is_some()
        }
        Some(Value::Array(items)) => match last.parse::<usize>() {
            Ok(index) if index < items.len() => {
                items.remove(index);
                true
            }
            _ => false,
        },
        _ => false,
    }
}

/// The place of an error as a JSON pointer.
pub fn json_pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    path.iter()
        .map(|segment| match segment {
            Segment::Seq { index } => format!("/{index}"),
            Segment::Map { key } => format!("/{}", escape(key)),
            Segment::Enum { variant } => format!("/{}", escape(variant)),
            Segment::Unknown => String::new(),
        })
        .collect()
}

/// Escapes a name as one segment of a JSON pointer (RFC 6901).
pub fn escape(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

/// Rewrites serde's message about a value, which names Rust's types, in JSON's words.
pub fn in_json_words(message: &str) -> String {
    // A message about text ends with the position.
    let message = match message.rsplit_once(" at line ") {
        Some((message, place)) if place.contains(" column ") => message,
        _ => message,
    };
    for what in ["invalid type: ", "invalid value: ", "invalid length "] {
        let parts = message.strip_prefix(what);
        if let Some((found, expected)) = parts.and_then(|rest| rest.rsplit_once(", expected ")) {
            let found = match what {
                "invalid length " => format!("an array of {found}"),
                _ => found_words(found),
            };
            return format!("expected {}, found {found}", expected_words(expected));
        }
    }
    match message.strip_prefix("unknown variant ") {
        Some(rest) => format!("unknown value {rest}"),
        None => message.to_owned(),
    }
}

fn found_words(found: &str) -> String {
    match found.split_once(' ').unwrap_or((found, "")) {
        ("null", _) | ("unit" | "Option", "value") => "null".into(),
        ("boolean", value) => value.trim_matches('`').into(),
        ("integer", value) => format!("the number {}", value.trim_matches('`')),
        ("floating", point) => {
            let value = point.trim_start_matches("point ").trim_matches('`');
            format!("the number {value}")
        }
        ("string", value) => format!("the string {value}"),
        ("map", _) => "an object".into(),
        ("sequence", _) => "an array".into(),
        ("unit", _) => "a string".into(),
        _ => found.into(),
    }
}

fn expected_words(expected: &str) -> String {
    let whole = |least: i64, most: i64| format!("a whole number from {least} to {most}");
    match expected {
        "a map" | "map" => "an object".into(),
        "a sequence" => "an array".into(),
        "a boolean" => "`true` or `false`".into(),
        "f32" | "f64" => "a number".into(),
        "u64" | "usize" => "a whole number from 0".into(),
        "i64" | "isize" => "a whole number".into(),
        "u8" => whole(0, u8::MAX.into()),
        "u16" => whole(0, u16::MAX.into()),
        "u32" => whole(0, u32::MAX.into()),
        "i16" => whole(i16::MIN.into(), i16::MAX.into()),
        "i32" => whole(i32::MIN.into(), i32::MAX.into()),
        "unit" => "null".into(),
        "a borrowed string"
        | "identifier"
        | "variant identifier"
        | "string or map"
        | "map with a single key" => "a string".into(),
        _ if expected.starts_with("enum ") => "a string".into(),
        _ if expected.starts_with("struct ") => "an object".into(),
        _ => expected.into(),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Order {
        item: Item,
        #[serde(default)]
        names: Vec<String>,
        count: Option<u32>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Item {
        size: f64,
        #[serde(default)]
        kind: Kind,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Kind {
        #[default]
        Plain,
        Fine,
    }

    fn mistakes(document: Value) -> (bool, Vec<(String, String)>) {
        let Reading {
            value, mistakes, ..
        } = read::<Order>(&document);
        let told = mistakes.into_iter().map(|m| (m.pointer, m.detail));
        (value.is_some(), told.collect())
    }

    #[test]
    fn every_mistake_is_told_of_at_its_place_in_the_document() {
        let (read, told) = mistakes(json!({
            "item": {"size": 1, "kind": "coarse"},
            "names": ["a", 5, "b", null, {}],
            "count": -1,
            "colour": "red",
        }));
        assert!(read, "all of that can be left out");
        let places: Vec<_> = told.iter().map(|(place, _)| place.as_str()).collect();
        let expected = [
            "/colour",
            "/count",
            "/item/kind",
            "/names/1",
            "/names/3",
            "/names/4",
        ];
        assert_eq!(places, expected);
        let detail = |at: usize| told[at].1.as_str();
        assert_eq!(
            detail(0),
            "unknown field `colour`, expected one of `item`, `names`, `count`"
        );
        assert_eq!(
            detail(1),
            "expected a whole number from 0 to 4294967295, found the number -1"
        );
        assert_eq!(
            detail(2),
            "unknown value `coarse`, expected `plain` or `fine`"
        );
        assert_eq!(detail(5), "expected a string, found an object");
    }

    #[test]
    fn what_is_missing_because_it_was_wrong_is_no_second_mistake() {
        let wrong = json!({"item": {"size": "large"}, "names": 3});
        let (read, told) = mistakes(wrong);
        assert!(!read);
        let expected = [
            (
                "/item/size",
                "expected a number, found the string \"large\"",
            ),
            ("/names", "expected an array, found the number 3"),
        ];
        assert_eq!(told, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
        let (_, told) = mistakes(json!({"item": {}, "count": true}));
        let places: Vec<_> = told.iter().map(|(place, _)| place.as_str()).collect();
        assert_eq!(places, ["/count", "/item"]);
        let (_, told) = mistakes(json!([]));
        assert_eq!(told[0].1, "expected an object, found an array of 0");
        let many = json!({"item": {"size": 1}, "names": vec![1; 1000]});
        assert_eq!(mistakes(many).1.len(), MAX_MISTAKES);
    }

    #[test]
    fn places_behind_what_was_left_out_are_those_of_the_document() {
        let document = json!({"item": {"size": 1}, "names": [1, "a", 2, 3, "b"]});
        let reading = read::<Order>(&document);
        assert_eq!(reading.value.as_ref().unwrap().names, ["a", "b"]);
        let left_out = reading.left_out;
        assert_eq!(left_out.original("/names/0"), "/names/1");
        assert_eq!(left_out.original("/names/1/x"), "/names/4/x");
        assert_eq!(left_out.original("/item/1"), "/item/1");
        assert!(left_out.spoils("/names") && left_out.spoils("/names/2"));
        assert!(left_out.spoils("/names/0/x"));
        assert!(left_out.spoils("") && !left_out.spoils("/names/1"));
    }

    #[test]
    fn rusts_types_are_not_named() {
        for (said, meant) in [
            (
                "invalid type: integer `5`, expected struct Target",
                "expected an object, found the number 5",
            ),
            (
                "invalid type: map, expected f64",
                "expected a number, found an object",
            ),
            (
                "invalid type: floating point `1.5`, expected usize",
                "expected a whole number from 0, found the number 1.5",
            ),
            (
                "invalid type: sequence, expected a boolean at line 1 column 7",
                "expected `true` or `false`, found an array",
            ),
            (
                "invalid type: string \"a, expected b\", expected a map",
                "expected an object, found the string \"a, expected b\"",
            ),
            (
                "invalid type: null, expected a sequence",
                "expected an array, found null",
            ),
            (
                "invalid type: boolean `true`, expected string or map",
                "expected a string, found true",
            ),
            ("expected a number or `auto`", "expected a number or `auto`"),
            ("missing field `x`", "missing field `x`"),
        ] {
            assert_eq!(in_json_words(said), meant);
        }
    }
}
