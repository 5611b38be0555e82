//! The backbone of a request: the one that is named, or the one that the prompts were made for.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::jobs::plan::sources::NamedPrompt;
use crate::jobs::refusals::{Refusal, Refusals, compatible, refuse};
use crate::registry::RegistryError;
use crate::registry::backbones;
use crate::registry::backbones::RegisteredBackbone;
use promptweave_domain::compatibility;
use promptweave_domain::digest::Digest;
use promptweave_domain::reference::ResourceName;

/// The backbone of this name, or the one that the prompts were made for.
pub(super) async fn backbone(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: Option<&ResourceName>,
    prompts: &[NamedPrompt],
    refusals: &mut Refusals,
) -> Result<Option<RegisteredBackbone>, RegistryError> {
    let (fitting, unknown) = match name {
        Some(name) => {
            let found = backbones::find(conn, project_id, name).await?;
            let unknown = format!("there is no backbone `{name}`");
            (found.into_iter().collect(), unknown)
        }
        None => {
            let Some(digest) = refusals.note(common_backbone(prompts)) else {
                return Ok(None);
            };
            let mut fitting = backbones::find_by_digest(conn, project_id, &digest).await?;
            if fitting.len() > 1 {
                let ids: Vec<_> = (prompts.iter())
                    .filter_map(|prompt| prompt.version.preprocessing_id.as_ref())
                    .collect();
                fitting.retain(|backbone| ids.iter().all(|id| **id == backbone.preprocessing_id));
            }
            let unknown = format!("no registered backbone is the sources' {digest}; register it");
            (fitting, unknown)
        }
    };
    Ok(refusals.note(only(fitting, unknown)))
}

/// The digest of the backbone that all prompts which name one were made for.
fn common_backbone(prompts: &[NamedPrompt]) -> Result<Digest, Refusal> {
    let facts: Vec<_> = prompts
        .iter()
        .map(|prompt| prompt.version.facts())
        .collect();
    match compatibility::common_backbone(&facts) {
        Ok(Some(digest)) => Ok(digest),
        Ok(None) => {
            let detail = "no source says which backbone it was made for; name one";
            refuse("backbone_required", "/backbone", detail)
        }
        Err((index, refused)) => compatible(&prompts[index].pointer, Err(refused)),
    }
}

fn only(
    mut fitting: Vec<RegisteredBackbone>,
    unknown: String,
) -> Result<RegisteredBackbone, Refusal> {
    const POINTER: &str = "/backbone";
    if fitting.len() > 1 {
        let names: Vec<_> = fitting.iter().map(|b| format!("`{}`", b.name)).collect();
        let detail = format!("several backbones fit; name one of {}", names.join(", "));
        return refuse("backbone_ambiguous", POINTER, detail);
    }
    match fitting.pop() {
        Some(backbone) => Ok(backbone),
        None => refuse("unknown_backbone", POINTER, unknown),
    }
}

/// Checks that a prompt fits the backbone.
pub(super) fn check_fits(
    prompt: &NamedPrompt,
    backbone: &RegisteredBackbone,
) -> Result<(), Refusal> {
    let fits = compatibility::check_fits(&prompt.version.facts(), &backbone.facts());
    compatible(&prompt.pointer, fits)
}
