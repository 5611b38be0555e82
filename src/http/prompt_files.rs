//! Uploaded prompt files: the metadata that the request adds, and the checks that refuse a file.

use std::error::Error;

use axum::Json as JsonResponse;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde::Deserialize;
use sqlx::PgConnection;
use utoipa::IntoParams;
use uuid::Uuid;

use crate::http::error::Problem;
use crate::http::extract::escape;
use crate::http::prompt_versions::PublishedVersion;
use crate::registry::backbones;
use crate::registry::backbones::RegisteredBackbone;
use crate::registry::prompt_versions::{PromptVersion, VersionFile};
use promptweave_domain::compatibility::{Incompatible, PromptFacts, check_fits};
use promptweave_domain::digest::Digest;
use promptweave_domain::ensemble_file::{EnsembleFile, EnsembleFileError};
use promptweave_domain::prediction::Model;
use promptweave_domain::prompt_file::{PromptFile, PromptFileError, PromptMetadata};
use promptweave_domain::words::JobErrorCode;

/// What a file without promptweave's own metadata (PEFT, VPT) does not record. A field that the file does record must
/// agree.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct MissingMetadata {
    /// Digest of the backbone that the prompt was trained for, as `GET /v1/backbones` gives it.
    #[param(value_type = Option<String>, example = "sha256:…")]
    pub backbone_digest: Option<Digest>,
    /// Id of the preprocessing that it was trained with, e.g. `98-bicubic-imagenet`.
    pub preprocessing_id: Option<String>,
    /// Seed of the initial prompt.
    pub init_seed: Option<u64>,
    /// The task it was trained on.
    pub task: Option<String>,
}

impl MissingMetadata {
    pub(super) fn complete(self, file: Option<&PromptMetadata>) -> Result<PromptMetadata, Problem> {
        let file = file.cloned().unwrap_or_else(PromptMetadata::unknown);
        Ok(PromptMetadata {
            backbone_digest: agree(
                "backbone_digest",
                file.backbone_digest,
                self.backbone_digest,
            )?,
            preprocessing_id: agree(
                "preprocessing_id",
                file.preprocessing_id,
                self.preprocessing_id,
            )?,
            init_seed: agree("init_seed", file.init_seed, self.init_seed)?,
            task: agree("task", file.task, self.task)?,
            ..file
        })
    }

    /// Checks that a request agrees with an ensemble file, which lacks nothing.
    pub(super) fn agree_with(self, file: &EnsembleFile) -> Result<(), Problem> {
        let metadata = &file.metadata;
        let preprocessing_id = Some(metadata.preprocessing_id.clone());
        agree(
            "backbone_digest",
            Some(metadata.backbone_digest),
            self.backbone_digest,
        )?;
        agree("preprocessing_id", preprocessing_id, self.preprocessing_id)?;
        let is_given = [
            ("init_seed", self.init_seed.is_some()),
            ("task", self.task.is_some()),
        ];
        match is_given.iter().find(|(_, given)| *given) {
            Some((field, _)) => {
                let detail =
                    format!("the file is an ensemble, which has no `{field}`; leave it out");
                Err(Problem::field(
                    "metadata_conflict",
                    format!("/{field}"),
                    detail,
                ))
            }
            None => Ok(()),
        }
    }
}

fn agree<T: PartialEq + std::fmt::Display>(
    field: &str,
    file: Option<T>,
    request: Option<T>,
) -> Result<Option<T>, Problem> {
    match (file, request) {
        (Some(file), Some(request)) if file != request => Err(Problem::field(
            "metadata_conflict",
            format!("/{field}"),
            format!("`{field}` is `{file}` in the file and `{request}` in the request"),
        )),
        (file, request) => Ok(file.or(request)),
    }
}

/// Reads and checks a prompt file, off the runtime's threads, and returns `bytes` with it.
pub(super) async fn read<B: AsRef<[u8]> + Send + 'static>(
    bytes: B,
) -> Result<(B, PromptFile), Problem> {
    let reading = tokio::task::spawn_blocking(move || (PromptFile::parse(bytes.as_ref()), bytes));
    let (file, bytes) = reading.await.map_err(Problem::internal)?;
    Ok((bytes, file.map_err(refuse)?))
}

/// Reads and checks a prompt file or an ensemble file, off the runtime's threads, and returns `bytes` with it.
pub(super) async fn read_any<B: AsRef<[u8]> + Send + 'static>(
    bytes: B,
) -> Result<(B, Model), Problem> {
    let reading = tokio::task::spawn_blocking(move || (Model::parse(bytes.as_ref()), bytes));
    let (file, bytes) = reading.await.map_err(Problem::internal)?;
    Ok((bytes, file.map_err(refuse_any)?))
}

fn refuse_any(error: EnsembleFileError) -> Problem {
    match error {
        EnsembleFileError::File(error) => refuse(error),
        error => Problem::unprocessable("invalid_metadata", with_cause(&error)),
    }
}

fn refuse(error: PromptFileError) -> Problem {
    use PromptFileError as E;
    let code = match &error {
        E::Foreign(_) => return unsupported_format(error.to_string()),
        E::NotSafetensors(_) => "not_safetensors",
        E::HeaderTooLong => "header_too_long",
        E::UnknownTensor { .. } => "unknown_tensor",
        E::MissingTensor(_) => "missing_tensor",
        E::Dtype { .. } => "wrong_dtype",
        E::Shape { .. } => "wrong_shape",
        E::NotFinite { .. } => "not_finite",
        E::Label { .. } => "wrong_label",
        E::Metadata(_) | E::MetadataTooLong(_) => "invalid_metadata",
        E::Format(_) => "unsupported_format_version",
    };
    let detail = with_cause(&error);
    match error.subject() {
        Some(subject) => Problem::field(code, format!("/{}", escape(subject)), detail),
        None => Problem::unprocessable(code, detail),
    }
}

/// The text of an error about a client's file, with the reader's own words (which byte, which key): the client may see
/// them. Only the first cause is added, because safetensors repeats its own cause in its text.
pub(super) fn with_cause(error: &dyn Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// The answer to a publication: 201, or 200 if these bytes were already a version.
pub(super) fn published(version: PromptVersion, created: bool) -> impl IntoResponse {
    let etag = format!("\"{}\"", version.digest);
    let version = PublishedVersion::from(version);
    let headers = [
        (header::LOCATION, version.location().to_owned()),
        (header::ETAG, etag),
    ];
    let status = if created {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    (status, headers, JsonResponse(version))
}

/// 415: the file's first bytes show a format that is recognised but not parsed.
pub(super) fn unsupported_format(detail: String) -> Problem {
    Problem::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "unsupported_format",
        detail,
    )
}

/// Checks that a file fits its backbone, if that one is registered: its width, its blocks, and the preprocessing of one
/// of the backbones with these weights.
pub(super) async fn check_backbone(
    conn: &mut PgConnection,
    project_id: Uuid,
    file: VersionFile<'_>,
) -> Result<(), Problem> {
    let (facts, deep) = match file {
        VersionFile::Prompt { file, metadata } => {
            let facts = PromptFacts {
                backbone_digest: metadata.backbone_digest,
                preprocessing_id: metadata.preprocessing_id.as_deref(),
                ..file.facts("prompt_embeddings".to_owned(), Digest::of(&[]))
            };
            (facts, file.deep_prompt_embeddings.as_ref())
        }
        VersionFile::Ensemble(file) => (
            file.facts("0.head.weight".to_owned(), Digest::of(&[])),
            None,
        ),
    };
    let Some(digest) = &facts.backbone_digest else {
        return Ok(());
    };
    let known = backbones::find_by_digest(conn, project_id, digest).await?;
    let Some(backbone) = known.first() else {
        return Ok(());
    };
    let fits = |backbone: &RegisteredBackbone| check_fits(&facts, &backbone.facts());
    // Backbones with these weights differ in their preprocessing, and one of them must fit.
    if let (Err(Incompatible { code, detail }), false) = (
        fits(backbone),
        known.iter().any(|other| fits(other).is_ok()),
    ) {
        let pointer = match code {
            JobErrorCode::PreprocessingMismatch => "/preprocessing_id".to_owned(),
            _ => format!("/{}", escape(&facts.name)),
        };
        return Err(Problem::field(code.name(), pointer, detail));
    }
    let blocks = backbone.config.depth;
    if let Some(deep) = deep
        && deep.shape[0] + 1 != blocks
    {
        let detail = format!(
            "`deep_prompt_embeddings` has prompts for {} blocks, and backbone `{}` has {blocks} \
             blocks, of which all but the first take one: expected {}",
            deep.shape[0],
            backbone.name,
            blocks - 1,
        );
        return Err(Problem::field(
            "depth_mismatch",
            "/deep_prompt_embeddings",
            detail,
        ));
    }
    Ok(())
}
