//! Errors as clients see them: RFC 9457 problem documents with a stable `code`.
//!
//! A handler returns a [`Problem`]; the [boundary](crate::http::boundary) adds the request's id and path,
//! logs the chain of causes once, and writes the body.

use std::borrow::Cow;
use std::error::Error;
use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::blobs::BlobError;
use crate::db::DbError;
use crate::http::problem_codes::ProblemCode;
use crate::registry::RegistryError;
use promptweave_domain::error_chain::chain;

/// An error, as `application/problem+json`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ProblemDocument {
    /// A URN that ends with `code`.
    #[serde(rename = "type")]
    #[schema(example = "urn:promptweave:problem:prompt_not_found")]
    type_uri: String,
    /// The status in words.
    #[schema(example = "Not Found")]
    title: String,
    /// The HTTP status code.
    #[schema(example = 404)]
    status: u16,
    #[schema(value_type = ProblemCode, example = "prompt_not_found")]
    code: Cow<'static, str>,
    /// What went wrong with what, and how to fix it; written for people.
    #[schema(example = "there is no prompt `dtd`")]
    detail: String,
    /// The path of the request.
    #[schema(example = "/v1/prompts/dtd")]
    instance: String,
    /// The request's id, which is also in the `x-request-id` header and the server's log.
    request_id: String,
    /// The parts of the request that are wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<FieldError>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FieldError {
    /// Where the mistake is: a JSON pointer into the body; for a file, `/` and the tensor's name; else `/` and the
    /// parameter's name.
    #[schema(example = "/prompt_embeddings")]
    pub(super) pointer: String,
    /// The mistake's code; a problem with only this mistake has the same code.
    #[schema(example = "invalid_body")]
    code: Cow<'static, str>,
    detail: String,
}

impl FieldError {
    pub(super) fn new(
        code: impl Into<Cow<'static, str>>,
        pointer: impl Into<String>,
        detail: impl Into<String>,
    ) -> Self {
        Self {
            pointer: pointer.into(),
            code: code.into(),
            detail: detail.into(),
        }
    }
}

/// The code of a request that has several kinds of mistakes.
const SEVERAL: &str = "invalid_request";

/// The error type of handlers. It is boxed, so that `Result<_, Problem>` stays small.
#[derive(Clone, Debug)]
pub struct Problem(Box<Parts>);

#[derive(Clone, Debug)]
struct Parts {
    status: StatusCode,
    code: Cow<'static, str>,
    detail: String,
    errors: Vec<FieldError>,
    /// Headers to send with it, e.g. `retry-after`.
    headers: HeaderMap,
    /// The cause for the log, never for the client.
    cause: Option<Arc<dyn Error + Send + Sync>>,
}

impl Problem {
    pub fn new(
        status: StatusCode,
        code: impl Into<Cow<'static, str>>,
        detail: impl Into<String>,
    ) -> Self {
        Self(Box::new(Parts {
            status,
            code: code.into(),
            detail: detail.into(),
            errors: Vec::new(),
            headers: HeaderMap::new(),
            cause: None,
        }))
    }

    /// 422: the request was understood but cannot be accepted.
    pub fn unprocessable(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, code, detail)
    }

    /// 404, e.g. `not_found("prompt_not_found", "there is no prompt `dtd`")`.
    pub fn not_found(code: impl Into<Cow<'static, str>>, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, detail)
    }

    /// 409: the current state forbids it.
    pub fn conflict(code: impl Into<Cow<'static, str>>, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, detail)
    }

    /// 500: a bug or failure of this server. The cause is logged and not sent.
    pub fn internal(cause: impl Error + Send + Sync + 'static) -> Self {
        Self::of_status(StatusCode::INTERNAL_SERVER_ERROR).caused_by(cause)
    }

    /// 422 for one part of the request, which `pointer` names.
    pub fn field(
        code: &'static str,
        pointer: impl Into<String>,
        detail: impl Into<String>,
    ) -> Self {
        let detail = detail.into();
        Self::unprocessable(code, detail.clone()).with_error(pointer, detail)
    }

    pub fn with_error(mut self, pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        let error = FieldError::new(self.0.code.clone(), pointer, detail);
        self.0.errors.push(error);
        self
    }

    /// 422 for all mistakes of a request, of which there is at least one. The code is theirs if all have the same one.
    pub(super) fn of_mistakes(errors: Vec<FieldError>) -> Self {
        let Some(first) = errors.first() else {
            return Self::unprocessable(SEVERAL, "the request has mistakes");
        };
        let alike = errors.iter().all(|error| error.code == first.code);
        let code = if alike {
            first.code.clone()
        } else {
            SEVERAL.into()
        };
        let FieldError {
            pointer, detail, ..
        } = first;
        let detail = match errors.len() {
            1 => detail.clone(),
            several => format!("{several} mistakes; the first, at `{pointer}`: {detail}"),
        };
        let mut problem = Self::new(StatusCode::UNPROCESSABLE_ENTITY, code, detail);
        problem.0.errors = errors;
        problem
    }

    /// The mistakes that this problem reports, if it reports any.
    pub(super) fn into_mistakes(self) -> Result<Vec<FieldError>, Self> {
        match self.0.status {
            StatusCode::UNPROCESSABLE_ENTITY if !self.0.errors.is_empty() => Ok(self.0.errors),
            _ => Err(self),
        }
    }

    /// Tells the client to try again after so many seconds.
    pub fn retry_after(self, seconds: u32) -> Self {
        self.header(header::RETRY_AFTER, seconds.into())
    }

    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.insert(name, value);
        self
    }

    pub fn caused_by(mut self, cause: impl Error + Send + Sync + 'static) -> Self {
        self.0.cause = Some(Arc::new(cause));
        self
    }

    /// A problem for a status that a library answered without an explanation.
    pub(super) fn of_status(status: StatusCode) -> Self {
        let (code, detail) = match status {
            StatusCode::NOT_FOUND => (
                "route_not_found",
                "there is nothing at this path; see /docs",
            ),
            StatusCode::METHOD_NOT_ALLOWED => (
                "method_not_allowed",
                "this path has other methods; see the `allow` header",
            ),
            StatusCode::PAYLOAD_TOO_LARGE => ("body_too_large", "the request's body is too large"),
            StatusCode::SERVICE_UNAVAILABLE => (
                "request_timeout",
                "the server did not finish in the time it gives a request",
            ),
            status if status.is_client_error() => ("bad_request", "the request cannot be read"),
            _ => (
                "internal_error",
                "the server failed; its log has the reason under this request id",
            ),
        };
        Self::new(status, code, detail)
    }

    pub(super) fn status(&self) -> StatusCode {
        self.0.status
    }

    pub(super) fn code(&self) -> &str {
        &self.0.code
    }

    /// The causes, outermost first, on one line.
    pub(super) fn causes(&self) -> Option<String> {
        let cause: &(dyn Error + 'static) = self.0.cause.as_deref()?;
        Some(chain(cause))
    }

    pub(super) fn document(&self, instance: &str, request_id: &str) -> ProblemDocument {
        ProblemDocument {
            type_uri: format!("urn:promptweave:problem:{}", self.0.code),
            title: self
                .0
                .status
                .canonical_reason()
                .unwrap_or("Error")
                .to_owned(),
            status: self.0.status.as_u16(),
            code: self.0.code.clone(),
            detail: self.0.detail.clone(),
            instance: instance.to_owned(),
            request_id: request_id.to_owned(),
            errors: self.0.errors.clone(),
        }
    }
}

/// Passes status, headers and the problem itself to the boundary, which writes the document.
impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.0.status.into_response();
        response.headers_mut().extend(self.0.headers.clone());
        response.extensions_mut().insert(self);
        response
    }
}

impl From<RegistryError> for Problem {
    fn from(error: RegistryError) -> Self {
        let detail = error.to_string();
        match error {
            RegistryError::Db(error) => error.into(),
            RegistryError::Blob(error) => error.into(),
            RegistryError::NameTaken { .. } => {
                Self::conflict("name_taken", format!("{detail}; choose another name"))
            }
            RegistryError::ReservedName(_) => Self::field("reserved_name", "/name", detail),
            RegistryError::BackboneExists(_) => {
                Self::conflict("backbone_exists", format!("{detail}; use that name"))
            }
            RegistryError::AlreadyProduced(_) => Self::conflict("already_produced", detail),
            RegistryError::AliasProtected { version, .. } => {
                let way_out = format!("put {{\"version\": {version}, \"protected\": false}} first");
                Self::conflict("alias_protected", format!("{detail}; {way_out}"))
            }
            RegistryError::PromptDeleted(name) => {
                let way_out = format!("bring it back with POST /v1/prompts/{name}/restore");
                let detail = format!("{detail}, and names are not given again; {way_out}");
                Self::conflict("prompt_deleted", detail)
            }
            // The file existed, old and unused, when it was uploaded again.
            RegistryError::BlobGone(_) => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "blob_gone",
                "the file was deleted while it was being registered; send it again",
            )
            .retry_after(1),
            RegistryError::PromptInUse { .. } => Self::conflict("prompt_in_use", detail),
            RegistryError::UnknownVersion { .. } => {
                Self::field("unknown_version", "/version", detail)
            }
        }
    }
}

impl From<DbError> for Problem {
    fn from(error: DbError) -> Self {
        match error {
            DbError::Unavailable(_) => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "database_unavailable",
                "the database is not available; try again, with the `Idempotency-Key` it came with where it \
                 is a POST; without one, look first whether what it asked for is there",
            )
            .retry_after(5)
            .caused_by(error),
            DbError::NulCharacter(_) => Self::unprocessable(
                "nul_character",
                "a text holds the character U+0000, which cannot be stored; leave it out",
            ),
            error => Self::internal(error),
        }
    }
}

impl From<sqlx::Error> for Problem {
    fn from(error: sqlx::Error) -> Self {
        DbError::from(error).into()
    }
}

impl From<BlobError> for Problem {
    fn from(error: BlobError) -> Self {
        match error {
            BlobError::Changed(_) => Self::conflict(
                "file_changed",
                "a file changed while it was read; try again when nobody writes to it",
            )
            .caused_by(error),
            error => Self::internal(error),
        }
    }
}
