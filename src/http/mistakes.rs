//! A request with mistakes. As much of it as can be read is still checked, so that the client learns of all mistakes at
//! once, each with its place in the body.

use axum::body::Bytes;
use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::http::error::{FieldError, Problem};
use promptweave_domain::json;
use promptweave_domain::json::{LeftOut, Mistake, Reading};

/// A body as far as it can be read, and the mistakes found so far.
#[derive(Default)]
pub struct Draft<T> {
    pub body: T,
    pub mistakes: Mistakes,
}

/// The mistakes found in one request.
#[derive(Debug, Default)]
pub struct Mistakes {
    bytes: Bytes,
    errors: Vec<FieldError>,
    /// The parts of the body that were not read, because they are wrong.
    left_out: LeftOut,
}

/// Reads a body, and refuses one that cannot be read at all.
pub(super) fn read<T: DeserializeOwned>(bytes: Bytes) -> Result<Draft<T>, Problem> {
    let malformed = |error: &serde_json::Error| {
        let detail = format!("the body is not JSON: {error}");
        Problem::new(StatusCode::BAD_REQUEST, "malformed_json", detail)
    };
    let wrong = match serde_json::from_slice::<T>(&bytes) {
        Ok(body) => {
            let mistakes = Mistakes {
                bytes,
                ..Mistakes::default()
            };
            return Ok(Draft { body, mistakes });
        }
        Err(error) => error,
    };
    let document = serde_json::from_slice(&bytes).map_err(|error| malformed(&error))?;
    let Reading {
        value,
        mistakes,
        left_out,
    } = json::read(&document);
    let mistakes = Mistakes {
        bytes,
        errors: errors(mistakes),
        left_out,
    };
    match value {
        // A repeated field is an error of the body, but a parsed document has it only once and reads without one.
        Some(_) if mistakes.errors.is_empty() => {
            let detail = json::in_json_words(&wrong.to_string());
            Err(Problem::field("invalid_body", "", detail))
        }
        Some(body) => Ok(Draft { body, mistakes }),
        None => Err(Problem::of_mistakes(mistakes.errors)),
    }
}

/// Reads a document that was parsed before.
pub fn read_value<T: DeserializeOwned>(document: &Value) -> Result<T, Problem> {
    let Reading {
        value, mistakes, ..
    } = json::read(document);
    match value {
        Some(value) if mistakes.is_empty() => Ok(value),
        _ => Err(Problem::of_mistakes(errors(mistakes))),
    }
}

fn errors(mistakes: Vec<Mistake>) -> Vec<FieldError> {
    let of = |it: Mistake| FieldError::new("invalid_body", it.pointer, it.detail);
    mistakes.into_iter().map(of).collect()
}

impl<T> Draft<T> {
    /// The body, if it has no mistake.
    pub fn sound(self) -> Result<T, Problem> {
        self.mistakes.finish(Ok::<T, Problem>(self.body))
    }
}

impl Mistakes {
    /// Records what a check refuses about the request. Any other failure is returned.
    pub fn note(&mut self, checked: Result<(), Problem>) -> Result<(), Problem> {
        let Err(problem) = checked else {
            return Ok(());
        };
        let document = serde_json::from_slice(&self.bytes).unwrap_or_default();
        for mut error in problem.into_mistakes()? {
            error.pointer = self.place(&document, &error.pointer);
            if !self.left_out.spoils(&error.pointer) {
                self.errors.push(error);
            }
        }
        Ok(())
    }

    /// Returns what was made of the request, if it has no mistake.
    pub fn finish<T>(mut self, made: Result<T, impl Into<Problem>>) -> Result<T, Problem> {
        let made = made.map_err(Into::into);
        let made = match made {
            Ok(made) => Some(made),
            Err(problem) => {
                self.note(Err(problem))?;
                None
            }
        };
        match made {
            Some(made) if self.errors.is_empty() => Ok(made),
            _ => Err(Problem::of_mistakes(self.errors)),
        }
    }

    /// Where in the body a part is, given its full form: in `"sources": ["dtd"]`, `/sources/0/prompt` is at
    /// `/sources/0`.
    fn place(&self, document: &Value, pointer: &str) -> String {
        let pointer = self.left_out.original(pointer);
        let ends = pointer.match_indices('/').map(|(at, _)| at).skip(1);
        let short = ends
            .map(|at| &pointer[..at])
            .find(|part| document.pointer(part).is_some_and(Value::is_string));
        short.unwrap_or(&pointer).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Order {
        #[serde(default)]
        names: Vec<String>,
        #[serde(default)]
        priority: u8,
    }

    fn draft(body: &'static str) -> Result<Draft<Order>, Problem> {
        read(Bytes::from_static(body.as_bytes()))
    }

    fn told(problem: &Problem) -> (String, Vec<String>) {
        let document = serde_json::to_value(problem.document("/", "1")).unwrap();
        let errors = document["errors"].as_array().unwrap().iter();
        let pointers = errors.map(|error| format!("{} {}", error["code"], error["pointer"]));
        let code = document["code"].as_str().unwrap().to_owned();
        (code, pointers.map(|text| text.replace('"', "")).collect())
    }

    #[test]
    fn mistakes_of_shape_and_of_content_come_together() {
        let Draft { body, mut mistakes } =
            draft(r#"{"names": [1, "a", "b"], "priority": "high"}"#).unwrap();
        assert_eq!((body.names.len(), body.priority), (2, 0));
        let refused = |pointer: &str| Err(Problem::field("unknown_name", pointer, "is unknown"));
        // A mistake inside a part that is wrong already is not reported again; a short form is a place too.
        for pointer in ["/names/1/name", "/names", "/priority"] {
            mistakes.note(refused(pointer)).unwrap();
        }
        let problem = mistakes.finish(Ok::<_, Problem>(())).unwrap_err();
        let (code, errors) = told(&problem);
        assert_eq!(code, "invalid_request");
        let expected = [
            "invalid_body /names/0",
            "invalid_body /priority",
            "unknown_name /names/2",
        ];
        assert_eq!(errors, expected);
    }

    #[test]
    fn mistakes_of_one_kind_have_its_code_and_others_of_the_server_are_not_the_requests() {
        let problem = draft(r#"{"names": 1, "priority": 256, "x": 1}"#).unwrap();
        let problem = problem.sound().map(|_| ()).unwrap_err();
        let (code, errors) = told(&problem);
        assert_eq!((code.as_str(), errors.len()), ("invalid_body", 3));
        let Draft { mut mistakes, .. } = draft("{}").unwrap();
        let broken = Problem::not_found("prompt_not_found", "there is none");
        assert!(mistakes.note(Err(broken)).is_err());
        assert!(draft("{").is_err_and(|problem| problem.code() == "malformed_json"));
        assert!(draft("3").is_err_and(|problem| problem.code() == "invalid_body"));
        let twice = r#"{"priority": 1, "priority": 2}"#;
        assert!(draft(twice).is_err_and(|problem| problem.code() == "invalid_body"));
    }
}
