//! axum's extractors, with problems for rejections.

use std::error::Error;

use axum::RequestPartsExt;
use axum::body::Bytes;
use axum::extract::path::ErrorKind;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{FromRequest, FromRequestParts, OptionalFromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header, request};
use serde::de::DeserializeOwned;

use crate::http::content_digest;
use crate::http::error::Problem;
use crate::http::mistakes;

pub use crate::http::mistakes::{Draft, read_value};
pub use promptweave_domain::json::escape;

/// A JSON body. Unreadable JSON is 400; JSON of the wrong shape is 422 with a pointer to each mistake. A handler that
/// reports further mistakes beside these takes a [`Draft`].
pub struct Json<T>(pub T);

/// Parameters of the path.
pub struct Path<T>(pub T);

/// Parameters of the query.
pub struct Query<T>(pub T);

/// The whole body, within the route's limit, and checked against its `Content-Digest` if there is one.
pub struct Body(pub Bytes);

/// The media type without its parameters, in lower case.
pub fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next()?.trim().to_ascii_lowercase())
}

pub fn unsupported_media_type(found: Option<&str>, expected: &str) -> Problem {
    let found = found.map_or("none".to_owned(), |found| format!("`{found}`"));
    Problem::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "unsupported_media_type",
        format!("the content type is {found}, expected {expected}"),
    )
}

/// 400: the client's part ended too early.
pub fn body_interrupted(cause: impl Error + Send + Sync + 'static) -> Problem {
    Problem::new(
        StatusCode::BAD_REQUEST,
        "body_interrupted",
        "the request's body ended before it was complete",
    )
    .caused_by(cause)
}

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let mut expected = content_digest::Expected::of(request.headers())?;
        match Bytes::from_request(request, state).await {
            Ok(bytes) => {
                expected.update(&bytes);
                expected.check()?;
                Ok(Self(bytes))
            }
            Err(BytesRejection::FailedToBufferBody(error))
                if error.status() == StatusCode::PAYLOAD_TOO_LARGE =>
            {
                Err(Problem::of_status(StatusCode::PAYLOAD_TOO_LARGE))
            }
            Err(error) => Err(body_interrupted(error)),
        }
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Draft<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let kind = media_type(request.headers());
        let is_json = kind
            .as_deref()
            .is_some_and(|k| k == "application/json" || k.ends_with("+json"));
        if !is_json {
            return Err(unsupported_media_type(
                kind.as_deref(),
                "`application/json`",
            ));
        }
        let Body(bytes) = Body::from_request(request, state).await?;
        mistakes::read(bytes)
    }
}

/// A request may also have no body at all: no content type and no bytes.
impl<T: DeserializeOwned, S: Send + Sync> OptionalFromRequest<S> for Draft<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Option<Self>, Problem> {
        if request.headers().contains_key(header::CONTENT_TYPE) {
            return <Self as FromRequest<S>>::from_request(request, state)
                .await
                .map(Some);
        }
        let Body(bytes) = Body::from_request(request, state).await?;
        if bytes.is_empty() {
            Ok(None)
        } else {
            Err(unsupported_media_type(None, "`application/json`"))
        }
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let draft = <Draft<T> as FromRequest<S>>::from_request(request, state).await?;
        draft.sound().map(Self)
    }
}

impl<T: DeserializeOwned + Send + 'static, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, _: &S) -> Result<Self, Problem> {
        match parts.extract::<axum::extract::Path<T>>().await {
            Ok(axum::extract::Path(value)) => Ok(Self(value)),
            Err(PathRejection::FailedToDeserializePathParams(error)) => {
                let (pointer, detail) = match error.into_kind() {
                    ErrorKind::DeserializeError { key, message, .. } => {
                        (format!("/{}", escape(&key)), message)
                    }
                    kind => (String::new(), kind.to_string()),
                };
                Err(Problem::field("invalid_path", pointer, detail))
            }
            Err(error) => Err(Problem::internal(error)),
        }
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, _: &S) -> Result<Self, Problem> {
        let query = parts.uri.query().unwrap_or_default();
        // Forms send empty fields like this, and they would count as left out.
        let mut pairs = form_urlencoded::parse(query.as_bytes());
        if let Some((name, _)) = pairs.find(|(_, value)| value.is_empty()) {
            let detail = "is empty; give it a value, or leave it out";
            return Err(Problem::field(
                "invalid_query",
                format!("/{}", escape(&name)),
                detail,
            ));
        }
        // axum's own extractor does not read a parameter that is given several times.
        serde_html_form::from_str(query)
            .map(Self)
            .map_err(|error| Problem::unprocessable("invalid_query", error.to_string()))
    }
}
