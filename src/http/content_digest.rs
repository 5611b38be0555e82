//! `Content-Digest` and `Repr-Digest` (RFC 9530): sent with downloads, and checked on requests that have one.

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sfv::{BareItem, Dictionary, ListEntry, Parser};
use sha2::{Digest as _, Sha256, Sha512};
use utoipa::openapi::path::{ParameterBuilder, ParameterIn};
use utoipa::openapi::{ObjectBuilder, OpenApi, RefOr, Required, Type};

use crate::http::error::Problem;
use crate::http::openapi::{add_refusal, operations};
use promptweave_domain::digest::Digest;

/// The header with the digest of the bytes in this message.
pub(super) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("content-digest");
/// The header with the digest of the whole file, even if the message has only a part of it or none.
pub(super) const REPR_DIGEST: HeaderName = HeaderName::from_static("repr-digest");

/// A digest formatted as the value of either header.
pub(super) fn value(digest: &Digest) -> HeaderValue {
    let text = format!("sha-256=:{}:", STANDARD.encode(digest.as_bytes()));
    HeaderValue::try_from(text).expect("plain characters")
}

/// The digests that a request claims for its body, each with the hash of the bytes read so far.
#[derive(Clone, Default)]
pub struct Expected(Vec<(Hasher, Vec<u8>)>);

#[derive(Clone)]
enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Expected {
    /// Parses the header. Nothing is expected if it is absent.
    ///
    /// # Errors
    /// 400 `invalid_content_digest` if it cannot be parsed, or has neither sha-256 nor sha-512.
    pub fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let mut values = headers.get_all(CONTENT_DIGEST).iter().peekable();
        if values.peek().is_none() {
            return Ok(Self::default());
        }
        let mut fields = Dictionary::new();
        for value in values {
            Parser::new(value.as_bytes())
                .parse_dictionary_with_visitor(&mut fields)
                .map_err(|error| invalid(&format!("cannot be read: {error}")))?;
        }
        let mut expected = Vec::new();
        for (algorithm, field) in &fields {
            let (hasher, size) = match algorithm.as_str() {
                "sha-256" => (Hasher::Sha256(Sha256::new()), 32),
                "sha-512" => (Hasher::Sha512(Sha512::new()), 64),
                _ => continue,
            };
            match field {
                ListEntry::Item(item)
                    if let BareItem::ByteSequence(bytes) = &item.bare_item
                        && bytes.len() == size =>
                {
                    expected.push((hasher, bytes.clone()));
                }
                _ => {
                    let wrong = format!("has no {size} bytes in base64 between colons");
                    return Err(invalid(&format!("says `{algorithm}` and {wrong}")));
                }
            }
        }
        if expected.is_empty() {
            return Err(invalid("has neither `sha-256` nor `sha-512`"));
        }
        Ok(Self(expected))
    }

    pub fn update(&mut self, bytes: &[u8]) {
        for (hasher, _) in &mut self.0 {
            match hasher {
                Hasher::Sha256(hasher) => hasher.update(bytes),
                Hasher::Sha512(hasher) => hasher.update(bytes),
            }
        }
    }

    /// Compares the digests, once the whole body went through [`Self::update`].
    ///
    /// # Errors
    /// 400 `content_digest_mismatch`.
    pub fn check(self) -> Result<(), Problem> {
        for (hasher, expected) in self.0 {
            let (algorithm, found) = match hasher {
                Hasher::Sha256(hasher) => ("sha-256", hasher.finalize().to_vec()),
                Hasher::Sha512(hasher) => ("sha-512", hasher.finalize().to_vec()),
            };
            if found != expected {
                let text = |bytes| format!("`{algorithm}=:{}:`", STANDARD.encode(bytes));
                let detail = format!(
                    "the body has {}, and `Content-Digest` says {}; it was damaged on the way, or is \
                     another file: send it again",
                    text(found),
                    text(expected),
                );
                let code = "content_digest_mismatch";
                return Err(Problem::new(StatusCode::BAD_REQUEST, code, detail));
            }
        }
        Ok(())
    }
}

fn invalid(what: &str) -> Problem {
    let detail = format!(
        "`Content-Digest` {what}; send `sha-256=:<base64>:` or `sha-512=:<base64>:` (RFC 9530), or \
         leave it out"
    );
    Problem::new(StatusCode::BAD_REQUEST, "invalid_content_digest", detail)
}

/// Documents on every operation with a body that the header is checked.
pub(super) fn document(document: &mut OpenApi) {
    for (_, _, operation) in operations(document) {
        if operation.request_body.is_none() {
            continue;
        }
        let text = ObjectBuilder::new().schema_type(Type::String);
        let parameter = ParameterBuilder::new()
            .name(CONTENT_DIGEST.as_str())
            .parameter_in(ParameterIn::Header)
            .required(Required::False)
            .description(Some(
                "`sha-256=:<base64>:` or `sha-512=…` of the body (RFC 9530), to refuse it where it was damaged \
                 on the way",
            ))
            .schema(Some(text));
        let parameters = operation.parameters.get_or_insert_default();
        parameters.push(RefOr::T(parameter.build()));
        let refusal = "`invalid_content_digest`, `content_digest_mismatch`";
        add_refusal(operation, "400", refusal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(header: &str, body: &[u8]) -> String {
        let headers = HeaderMap::from_iter([(CONTENT_DIGEST, header.parse().unwrap())]);
        let checked = Expected::of(&headers).and_then(|mut expected| {
            // The result must not depend on how the body is split.
            let (first, second) = body.split_at(body.len() / 2);
            expected.update(first);
            expected.update(second);
            expected.check()
        });
        checked.map_or_else(|problem| problem.code().to_owned(), |()| "right".to_owned())
    }

    #[test]
    fn digests_of_the_rfc_are_right_for_its_body() {
        // The examples of RFC 9530, appendices A and B.
        let body = b"{\"hello\": \"world\"}\n";
        let sha256 = "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:";
        let sha512 = "sha-512=:YMAam51Jz/jOATT6/zvHrLVgOYTGFy1d6GJiOHTohq4yP+pgk4vf2aCs\
                      yRZOtw8MjkM7iw7yZ/WkppmM44T3qg==:";
        assert_eq!(outcome(sha256, body), "right");
        assert_eq!(outcome(sha512, body), "right");
        assert_eq!(outcome(&format!("md5=:AAAA:, {sha256}"), body), "right");
        let other = b"{\"hello\": \"woild\"}\n";
        assert_eq!(outcome(sha256, other), "content_digest_mismatch");
        assert_eq!(outcome(sha512, other), "content_digest_mismatch");
        let both = format!("{sha512}, sha-256=:{}:", STANDARD.encode([0; 32]));
        assert_eq!(outcome(&both, body), "content_digest_mismatch");
        for unreadable in [
            "",
            "sha-256",
            "sha-256=abc",
            "sha-256=:AAAA:",
            "sha-256=(:AAAA:)",
            "md5=:AAAA:",
            "sha-256=:!:",
        ] {
            let found = outcome(unreadable, body);
            assert_eq!(found, "invalid_content_digest", "{unreadable}");
        }
        let ours = value(&Digest::of(body));
        assert_eq!(ours.to_str().unwrap(), sha256);
    }
}
