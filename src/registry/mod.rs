//! The registry in Postgres: prompts, backbones and datasets, immutable and versioned.
//!
//! Functions take a connection, so that handlers and the worker compose transactions from them, and return `Ok(None)`
//! for what does not exist. Large files go to the [blob store](crate::blobs) before a row points to them.

pub mod aliases;
pub mod api_keys;
pub mod backbones;
pub mod datasets;
pub mod deletion;
pub mod idempotency;
pub mod lineage;
pub mod pack;
pub mod projects;
pub mod prompt_versions;
pub mod prompts;
pub mod references;
pub mod roots;

use uuid::Uuid;

use crate::blobs::BlobError;
use crate::db::DbError;
use promptweave_domain::digest::Digest;
use promptweave_domain::reference::{AliasName, ResourceName};

/// The project that always exists; the first migration creates it.
pub const DEFAULT_PROJECT: Uuid = Uuid::from_u128(0x0000_0000_0000_7000_8000_0000_0000_0001);

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error(transparent)]
    Db(#[from] DbError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error("a {kind} named `{name}` exists already")]
    NameTaken {
        kind: &'static str,
        name: ResourceName,
    },
    #[error("`{0}` is a path of the API and no prompt's name; choose another")]
    ReservedName(ResourceName),
    /// The same weights and preprocessing are registered under another name.
    #[error("these weights with this preprocessing are registered as `{0}` already")]
    BackboneExists(ResourceName),
    /// A job's result is published a second time: another attempt was faster than the caller's.
    #[error("job {0} has published its prompt already")]
    AlreadyProduced(Uuid),
    #[error("alias `{prompt}:{alias}` is protected")]
    AliasProtected {
        prompt: ResourceName,
        alias: AliasName,
        /// The version that the alias points to.
        version: i32,
    },
    /// `gc` deleted the file before a row referred to it.
    #[error("the blob store no longer has {0}")]
    BlobGone(Digest),
    #[error("prompt `{0}` was deleted")]
    PromptDeleted(ResourceName),
    #[error("prompt `{prompt}` is in use: {user}")]
    PromptInUse { prompt: ResourceName, user: String },
    #[error("prompt `{prompt}` has no version {version}")]
    UnknownVersion { prompt: ResourceName, version: i32 },
}

impl From<sqlx::Error> for RegistryError {
    fn from(error: sqlx::Error) -> Self {
        Self::Db(error.into())
    }
}

fn read_digest(table: &'static str, column: &'static str, bytes: &[u8]) -> Result<Digest, DbError> {
    match bytes.try_into() {
        Ok(bytes) => Ok(Digest::from_bytes(bytes)),
        Err(_) => Err(DbError::unreadable(table, column, bytes)),
    }
}

fn read_name(table: &'static str, name: String) -> Result<ResourceName, DbError> {
    name.parse()
        .map_err(|_| DbError::unreadable(table, "name", name))
}
