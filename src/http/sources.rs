//! The source of a registration: one of the operator's directories, or a URI that the operator allows.

use std::fs::File;

use axum::http::StatusCode;
use tempfile::TempDir;

use crate::http::AppState;
use crate::http::error::Problem;
use crate::remote::client::{Limits, RemoteError};
use crate::remote::hub::HubError;
use crate::remote::sources::{FetchError, Sources};
use crate::remote::uri::SourceUri;
use promptweave_domain::error_chain::chain;

pub(super) enum Named {
    Directory(String),
    Uri(SourceUri),
}

impl Named {
    /// The source that the client named; exactly one of the two must be given.
    pub fn of(directory: Option<String>, uri: Option<String>) -> Result<Self, Problem> {
        match (directory, uri) {
            (Some(directory), None) => Ok(Self::Directory(directory)),
            (None, Some(uri)) => {
                let uri = uri.parse::<SourceUri>();
                let wrong = |error: _| Problem::field("invalid_uri", "/uri", chain(&error));
                Ok(Self::Uri(uri.map_err(wrong)?))
            }
            _ => {
                let detail = "give a `directory` or a `uri`, one of them".to_owned();
                Err(Problem::field("directory_or_uri", "", detail))
            }
        }
    }
}

pub(super) fn is_repository(uri: &SourceUri) -> bool {
    uri.url().scheme() == "hf"
}

/// Fetches the one file that a URI points to.
pub(super) async fn fetch_file(
    state: &AppState,
    uri: &SourceUri,
    max_bytes: u64,
) -> Result<File, Problem> {
    let dir = scratch(state)?;
    let path = dir.path().join("file");
    let fetched = sources(state, uri)?.file(uri, limits(state, max_bytes), &path);
    fetched.await.map_err(refuse)?;
    // The open file stays readable after its name is deleted with the folder.
    File::open(&path).map_err(Problem::internal)
}

/// Fetches those files of a repository that `choose` picks; see [`Sources::repository`].
pub(super) async fn fetch_repository<T>(
    state: &AppState,
    uri: &SourceUri,
    max_bytes: u64,
    choose: impl FnOnce(&[String]) -> Vec<(T, String, String)>,
) -> Result<(TempDir, Vec<(T, String, String)>), Problem> {
    let dir = scratch(state)?;
    let limits = limits(state, max_bytes);
    let fetched = sources(state, uri)?.repository(uri, limits, dir.path(), choose);
    let fetched = fetched.await.map_err(refuse)?;
    Ok((dir, fetched))
}

fn sources<'a>(state: &'a AppState, uri: &SourceUri) -> Result<&'a Sources, Problem> {
    let sources = state.settings.sources.as_ref();
    sources.ok_or_else(|| refuse(FetchError::NotAllowed(uri.clone())))
}

fn limits(state: &AppState, bytes: u64) -> Limits {
    Limits {
        bytes,
        time: state.settings.request_timeout,
    }
}

fn scratch(state: &AppState) -> Result<TempDir, Problem> {
    tempfile::Builder::new()
        .prefix("promptweave-fetch-")
        .tempdir_in(&state.settings.scratch_dir)
        .map_err(Problem::internal)
}

fn refuse(error: FetchError) -> Problem {
    let detail = chain(&error);
    match error {
        FetchError::Io(_) | FetchError::Hub(HubError::Io(_)) => Problem::internal(error),
        FetchError::NotAllowed(_)
        | FetchError::Remote(RemoteError::NotPublic(_))
        | FetchError::Hub(HubError::Remote(RemoteError::NotPublic(_))) => {
            Problem::new(StatusCode::FORBIDDEN, "uri_not_allowed", detail)
        }
        FetchError::TooLarge(_)
        | FetchError::Remote(RemoteError::TooLarge { .. })
        | FetchError::Hub(HubError::Remote(RemoteError::TooLarge { .. })) => {
            Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "archive_too_large", detail)
        }
        FetchError::NoObject(_) | FetchError::Hub(HubError::Repository(_)) => {
            Problem::field("invalid_uri", "/uri", detail)
        }
        _ => Problem::field("uri_failed", "/uri", detail),
    }
}
