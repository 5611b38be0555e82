//! Immutable files over HTTP: with an ETag, whole or in part (RFC 9110, sections 13 and 14).

use std::ops::Range;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::TryStreamExt;

use crate::blobs::{BlobError, BlobStore};
use crate::http::conditional::Preconditions;
use crate::http::content_digest;
use crate::http::content_digest::{CONTENT_DIGEST, REPR_DIGEST};
use crate::http::error::Problem;
use promptweave_domain::digest::Digest;
use promptweave_domain::error_chain::chain;

/// A file's description, known before the file is read.
#[derive(Clone, Debug)]
pub(super) struct File {
    pub digest: Digest,
    /// Size in bytes.
    pub size: u64,
    /// Media type.
    pub kind: &'static str,
    /// File name for a client that saves it, made only of names and ids.
    pub name: String,
    /// Whether this path always means these bytes.
    pub immutable: bool,
    /// Whether range requests are answered.
    pub ranges: bool,
}

impl File {
    fn etag(&self) -> String {
        format!("\"{}\"", self.digest)
    }

    /// 304, if the client has these bytes.
    pub fn not_modified(&self, request: &HeaderMap) -> Option<Response> {
        let has_copy = Preconditions::of(request).has_copy(&self.etag());
        has_copy.then(|| (StatusCode::NOT_MODIFIED, self.caching()).into_response())
    }

    /// The range that is asked for, if it can be served. Several ranges at once, other units, ranges that cannot be
    /// parsed, and ranges of outdated bytes get None: the whole file is the answer.
    ///
    /// # Errors
    /// 416 `range_not_satisfiable` if the file ends before the range begins.
    pub fn range(
        &self,
        method: &Method,
        request: &HeaderMap,
    ) -> Result<Option<Range<u64>>, Problem> {
        let if_range = request.get(header::IF_RANGE);
        let still_these = if_range.is_none_or(|value| value.as_bytes() == self.etag().as_bytes());
        let asked = request
            .get(header::RANGE)
            .and_then(|value| value.to_str().ok())
            .filter(|_| self.ranges && *method == Method::GET && still_these)
            .and_then(parse);
        let Some(asked) = asked else {
            return Ok(None);
        };
        let range = match asked {
            Asked::FromTo(from, to) => {
                from..to.map_or(self.size, |to| self.size.min(to.saturating_add(1)))
            }
            Asked::Last(count) => self.size.saturating_sub(count)..self.size,
        };
        if range.is_empty() {
            let detail = format!(
                "the file has {} bytes, and the range none of them",
                self.size
            );
            let size = format!("bytes */{}", self.size);
            let size = HeaderValue::try_from(size).expect("plain characters");
            let status = StatusCode::RANGE_NOT_SATISFIABLE;
            return Err(Problem::new(status, "range_not_satisfiable", detail)
                .header(header::CONTENT_RANGE, size));
        }
        Ok(Some(range))
    }

    /// The whole file with 200. HEAD gets the same without the body and its digest.
    pub fn whole(&self, method: &Method, body: impl Into<Body>) -> Response {
        let mut response = (self.caching(), self.description(), body.into()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_LENGTH, self.size.into());
        if *method != Method::HEAD {
            headers.insert(CONTENT_DIGEST, content_digest::value(&self.digest));
        }
        response
    }

    /// A part of the file, which is at hand, with 206.
    pub fn part(&self, range: Range<u64>, bytes: &Bytes) -> Response {
        let part = bytes.slice(range.start as usize..range.end as usize);
        let digest = content_digest::value(&Digest::of(&part));
        let mut response = self.partial(&range, part.into());
        response.headers_mut().insert(CONTENT_DIGEST, digest);
        response
    }

    fn partial(&self, range: &Range<u64>, body: Body) -> Response {
        let place = format!("bytes {}-{}/{}", range.start, range.end - 1, self.size);
        let place = HeaderValue::try_from(place).expect("plain characters");
        let headers = [(header::CONTENT_RANGE, place)];
        let status = StatusCode::PARTIAL_CONTENT;
        (status, self.caching(), self.description(), headers, body).into_response()
    }

    /// The answer to a request for a file in the blob store: 304, a range, or the whole file. A range has no
    /// `Content-Digest`, because its bytes are sent while they are read.
    pub async fn serve(
        self,
        blobs: &BlobStore,
        method: &Method,
        request: &HeaderMap,
    ) -> Result<Response, Problem> {
        if let Some(not_modified) = self.not_modified(request) {
            return Ok(not_modified);
        }
        if *method == Method::HEAD {
            return Ok(self.whole(method, Body::empty()));
        }
        // The status is sent before the bytes are read; after that, all that is left is to break off and log why.
        let log = |error: &BlobError| {
            tracing::error!(error = chain(error), "a file could not be sent whole")
        };
        match self.range(method, request)? {
            None => {
                let (_, pieces) = blobs.stream(&self.digest).await?;
                Ok(self.whole(method, Body::from_stream(pieces.inspect_err(log))))
            }
            Some(range) => {
                let pieces = blobs.stream_range(&self.digest, range.clone()).await?;
                let body = Body::from_stream(pieces.inspect_err(log));
                let mut response = self.partial(&range, body);
                let length = range.end - range.start;
                response
                    .headers_mut()
                    .insert(header::CONTENT_LENGTH, length.into());
                Ok(response)
            }
        }
    }

    fn caching(&self) -> HeaderMap {
        let control = match self.immutable {
            true => "private, max-age=31536000, immutable",
            // An alias may move: the client may keep the copy, but must ask each time.
            false => "private, no-cache",
        };
        let etag = HeaderValue::try_from(self.etag()).expect("plain characters");
        HeaderMap::from_iter([
            (header::ETAG, etag),
            (header::CACHE_CONTROL, HeaderValue::from_static(control)),
        ])
    }

    fn description(&self) -> HeaderMap {
        let ranges = if self.ranges { "bytes" } else { "none" };
        let name = format!("attachment; filename=\"{}\"", self.name);
        let name = HeaderValue::try_from(name).expect("names are plain characters");
        HeaderMap::from_iter([
            (header::CONTENT_TYPE, HeaderValue::from_static(self.kind)),
            (header::CONTENT_DISPOSITION, name),
            (header::ACCEPT_RANGES, HeaderValue::from_static(ranges)),
            (REPR_DIGEST, content_digest::value(&self.digest)),
        ])
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// `3-` or `3-5`; both ends are inclusive.
    FromTo(u64, Option<u64>),
    /// `-5`.
    Last(u64),
}

/// Parses one range of bytes.
fn parse(value: &str) -> Option<Asked> {
    let (unit, range) = value.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (from, to) = range.trim().split_once('-')?;
    match (number(from), number(to)) {
        (Some(from), Some(to)) if from <= to => Some(Asked::FromTo(from, Some(to))),
        (Some(from), None) if to.is_empty() => Some(Asked::FromTo(from, None)),
        (None, Some(count)) if from.is_empty() => Some(Asked::Last(count)),
        _ => None,
    }
}

/// Parses digits only; a number too large for u64 is beyond every file.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_of_bytes_is_read_and_nothing_else() {
        assert_eq!(parse("bytes=0-0"), Some(Asked::FromTo(0, Some(0))));
        assert_eq!(parse("Bytes= 5-"), Some(Asked::FromTo(5, None)));
        assert_eq!(parse("bytes=-7"), Some(Asked::Last(7)));
        let huge = "99999999999999999999999";
        let beyond = Some(Asked::FromTo(u64::MAX - 1, None));
        assert_eq!(parse(&format!("bytes={huge}-")), beyond);
        for other in [
            "bytes=5-4",
            "bytes=-",
            "bytes=1-2,4-5",
            "bytes=+1-2",
            "bytes=--1",
            "bytes=a-b",
            "items=1-2",
            "bytes",
            "",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
