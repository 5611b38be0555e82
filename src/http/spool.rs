//! Bodies that are too large for memory: they are written to a file as they arrive.

use std::path::Path;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use futures::StreamExt as _;
use tempfile::NamedTempFile;
use tokio::io::AsyncWriteExt as _;

use crate::http::content_digest;
use crate::http::error::Problem;
use crate::http::extract::body_interrupted;

/// Writes the body to a temporary file, and checks it against its `Content-Digest`. The file is deleted with the
/// request, however that ends. A body above `limit` is 413, immediately if it declares its length.
pub(super) async fn spool(
    headers: &HeaderMap,
    body: Body,
    limit: u64,
    dir: &Path,
) -> Result<NamedTempFile, Problem> {
    let mut expected = content_digest::Expected::of(headers)?;
    let declared = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > limit) {
        return Err(too_large(limit));
    }
    let file = tempfile::Builder::new()
        .prefix("promptweave-upload-")
        .tempfile_in(dir)
        .map_err(Problem::internal)?;
    let mut out = tokio::fs::File::from_std(file.reopen().map_err(Problem::internal)?);
    let mut pieces = body.into_data_stream();
    let mut size = 0;
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(body_interrupted)?;
        size += piece.len() as u64;
        if size > limit {
            return Err(too_large(limit));
        }
        expected.update(&piece);
        out.write_all(&piece).await.map_err(Problem::internal)?;
    }
    out.flush().await.map_err(Problem::internal)?;
    expected.check()?;
    Ok(file)
}

fn too_large(limit: u64) -> Problem {
    let detail =
        format!("the request's body is larger than {limit} bytes, which is the most taken");
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", detail)
}
