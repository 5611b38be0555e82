//! The sources of a request: the prompt versions that its names stand for, checked to go together.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::jobs::plan::PlanError;
use crate::jobs::refusals::{Refusal, Refusals, compatible, refuse};
use crate::registry::RegistryError;
use crate::registry::prompt_versions;
use crate::registry::prompt_versions::{PromptVersion, VersionKind};
use promptweave_domain::compatibility::check_joins;
use promptweave_domain::reference::Reference;

/// Gradient statistics grow with the square of the pairs of sources; the method's own paper ends at 11.
pub const MAX_SOURCES: usize = 64;

pub fn source_pointer(index: usize) -> String {
    format!("/sources/{index}/prompt")
}

pub(super) fn no_sources<T>() -> Result<T, Refusal> {
    refuse(
        "no_sources",
        "/sources",
        "names no prompt; at least one is needed",
    )
}

/// A prompt version, and its place in the request as a JSON pointer.
pub struct NamedPrompt {
    pub version: PromptVersion,
    pub pointer: String,
}

/// Resolves prompts that can be summed, in the order they were named.
pub async fn sources(
    conn: &mut PgConnection,
    project_id: Uuid,
    references: &[Reference],
) -> Result<Vec<NamedPrompt>, PlanError> {
    let mut refusals = Refusals::default();
    let (found, _) = find_sources(conn, project_id, references, &mut refusals).await?;
    refusals.finish(Some(found))
}

/// The sources that exist and join each other, and whether all of them do.
pub(super) async fn find_sources(
    conn: &mut PgConnection,
    project_id: Uuid,
    references: &[Reference],
    refusals: &mut Refusals,
) -> Result<(Vec<NamedPrompt>, bool), RegistryError> {
    let mut found: Vec<NamedPrompt> = Vec::with_capacity(references.len());
    let counted = match references.len() {
        0 => no_sources(),
        1..=MAX_SOURCES => Ok(()),
        many => refuse(
            "too_many_sources",
            "/sources",
            format!("names {many} prompts; at most {MAX_SOURCES}"),
        ),
    };
    // If there are too many, none is looked up.
    if refusals.note(counted).is_none() {
        return Ok((found, false));
    }
    for (index, reference) in references.iter().enumerate() {
        let version = prompt_versions::resolve(conn, project_id, reference).await?;
        let facts: Vec<_> = found.iter().map(|other| other.version.facts()).collect();
        let source = existing(reference, version, source_pointer(index)).and_then(|source| {
            let joins = check_joins(&source.version.facts(), &facts);
            compatible(&source.pointer, joins).map(|()| source)
        });
        found.extend(refusals.note(source));
    }
    let all = found.len() == references.len();
    Ok((found, all))
}

/// The prompt that a reference means, if there is one.
pub(super) fn existing(
    reference: &Reference,
    version: Option<PromptVersion>,
    pointer: String,
) -> Result<NamedPrompt, Refusal> {
    match version {
        Some(version) if version.kind == VersionKind::Ensemble => {
            let detail = format!(
                "`{}:{}` is an ensemble, which holds several prompts; name a prompt",
                version.prompt, version.version
            );
            refuse("not_a_prompt", pointer, detail)
        }
        Some(version) => Ok(NamedPrompt { version, pointer }),
        None => {
            let detail = format!("there is no prompt version `{reference}`");
            refuse("unknown_prompt", pointer, detail)
        }
    }
}
