//! Conditional requests (RFC 9110, section 13): they spare a download that the client already has, and keep a change
//! from overwriting somebody else's.

use axum::extract::FromRequestParts;
use axum::http::{HeaderMap, HeaderName, StatusCode, header, request};

use crate::http::error::Problem;

/// `If-Match` and `If-None-Match` of a request.
#[derive(Clone, Debug, Default)]
pub struct Preconditions {
    if_match: Option<Tags>,
    if_none_match: Option<Tags>,
}

/// `*`, or the entity tags of a header. A tag that cannot be parsed matches nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Tags {
    Any,
    /// Each tag with its quotes, and whether it is weak.
    List(Vec<(bool, String)>),
}

impl<S: Send + Sync> FromRequestParts<S> for Preconditions {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, _: &S) -> Result<Self, Problem> {
        Ok(Self::of(&parts.headers))
    }
}

impl Preconditions {
    pub fn of(headers: &HeaderMap) -> Self {
        Self {
            if_match: Tags::of(headers, &header::IF_MATCH),
            if_none_match: Tags::of(headers, &header::IF_NONE_MATCH),
        }
    }

    /// Whether the client's copy is `etag`, so that the answer is 304.
    pub fn has_copy(&self, etag: &str) -> bool {
        match &self.if_none_match {
            None => false,
            Some(tags) => tags.fit_weakly(etag),
        }
    }

    /// Checks whether a resource may be created (`current` is None), changed or deleted. The answer is 412 if the
    /// client knows another state of it, and 428 if it would change one without naming the state that it knows.
    pub fn check_change(&self, current: Option<&str>) -> Result<(), Problem> {
        if let Some(tags) = &self.if_match {
            let Some(etag) = current else {
                return Err(failed("it is not there; leave `If-Match` out to make it"));
            };
            if !tags.fit_strongly(etag) {
                return Err(failed(format!(
                    "its ETag is {etag} now; read it again and repeat the change with that `If-Match`"
                )));
            }
        }
        if let (Some(tags), Some(etag)) = (&self.if_none_match, current)
            && tags.fit_weakly(etag)
        {
            return Err(failed(
                "it is there already, and `If-None-Match` says it must not be",
            ));
        }
        if current.is_some() && self.if_match.is_none() {
            return Err(Problem::new(
                StatusCode::PRECONDITION_REQUIRED,
                "precondition_required",
                "a change needs `If-Match` with the ETag of the state it is meant for, or `If-Match: *` \
                 for whatever it is",
            ));
        }
        Ok(())
    }
}

fn failed(detail: impl Into<String>) -> Problem {
    Problem::new(
        StatusCode::PRECONDITION_FAILED,
        "precondition_failed",
        detail,
    )
}

impl Tags {
    /// Parses a header; None if it is absent.
    fn of(headers: &HeaderMap, name: &HeaderName) -> Option<Self> {
        if !headers.contains_key(name) {
            return None;
        }
        let values = headers.get_all(name).iter();
        let texts: Vec<&str> = values
            .map(|value| value.to_str().unwrap_or_default())
            .collect();
        if texts.iter().any(|text| text.trim() == "*") {
            return Some(Self::Any);
        }
        Some(Self::List(
            texts.into_iter().flat_map(entity_tags).collect(),
        ))
    }

    /// Whether a strong tag matches. A weak tag says "about the same", which is not enough for a change or a range.
    fn fit_strongly(&self, etag: &str) -> bool {
        match self {
            Self::Any => true,
            Self::List(tags) => tags.iter().any(|(weak, tag)| !weak && tag == etag),
        }
    }

    fn fit_weakly(&self, etag: &str) -> bool {
        match self {
            Self::Any => true,
            Self::List(tags) => tags.iter().any(|(_, tag)| tag == etag),
        }
    }
}

/// Parses `"a", W/"b"` up to the first thing that is not a tag; a comma may stand inside the quotes.
fn entity_tags(mut text: &str) -> Vec<(bool, String)> {
    let mut tags = Vec::new();
    loop {
        text = text.trim_start_matches([' ', '\t', ',']);
        let (weak, quoted) = match text.strip_prefix("W/") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let Some((tag, rest)) = quoted
            .strip_prefix('"')
            .and_then(|rest| rest.split_once('"'))
        else {
            return tags;
        };
        tags.push((weak, format!("\"{tag}\"")));
        text = rest;
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn asked(headers: &[(HeaderName, &'static str)]) -> Preconditions {
        let pairs = headers.iter().cloned();
        Preconditions::of(
            &pairs
                .map(|(name, value)| (name, HeaderValue::from_static(value)))
                .collect(),
        )
    }

    #[test]
    fn entity_tags_are_read_with_their_quotes() {
        let tags = entity_tags(r#" "a" ,W/"b,c",, "" , x, "d""#);
        let expected = [(false, "\"a\""), (true, "\"b,c\""), (false, "\"\"")];
        assert_eq!(tags, expected.map(|(weak, tag)| (weak, tag.to_owned())));
        assert_eq!(entity_tags("\"open"), []);
    }

    #[test]
    fn a_copy_is_compared_weakly_and_a_change_strongly() {
        let copy = |value| asked(&[(header::IF_NONE_MATCH, value)]).has_copy("\"7\"");
        assert!(copy("\"7\"") && copy("W/\"7\"") && copy("\"1\", \"7\"") && copy("*"));
        assert!(!copy("\"8\"") && !copy("7") && !asked(&[]).has_copy("\"7\""));

        let status = |headers: &[_], current: Option<&str>| {
            let checked = asked(headers).check_change(current);
            checked.map_or_else(|problem| problem.status().as_u16(), |()| 200)
        };
        let if_match = |value| [(header::IF_MATCH, value)];
        let if_none_match = |value| [(header::IF_NONE_MATCH, value)];
        let there = Some("\"7\"");
        assert_eq!(status(&if_match("\"7\""), there), 200);
        assert_eq!(status(&if_match("*"), there), 200);
        assert_eq!(status(&if_match("\"6\""), there), 412);
        assert_eq!(status(&if_match("W/\"7\""), there), 412);
        assert_eq!(status(&if_match("7"), there), 412);
        assert_eq!(status(&if_match("*"), None), 412);
        assert_eq!(status(&if_none_match("*"), None), 200);
        assert_eq!(status(&if_none_match("*"), there), 412);
        assert_eq!(status(&if_none_match("\"6\""), there), 428);
        assert_eq!(status(&[], there), 428);
        assert_eq!(status(&[], None), 200);
    }
}
