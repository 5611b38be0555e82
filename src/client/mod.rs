//! The registry from the shell: `promptweave push | pull | ls | verify | ensemble`, as clients of the HTTP API.
//!
//! | exit status | means |
//! |---|---|
//! | 0 | done; `verify`: the same bytes |
//! | 1 | `verify`: other bytes; `ensemble watch`: it has failed or was cancelled |
//! | 2 | it could not be done here: a local file, a damaged download, the command itself |
//! | 3 | the registry refused |
//! | 4 | the registry cannot be reached |

mod ensemble;
mod ls;
mod progress;
mod pull;
mod push;
mod server;
mod table;
mod verify;

use std::path::Path;

use anyhow::Context;
use clap::Subcommand;

use promptweave_domain::digest::{Digest, digest_of_file};
use server::ServerError;

#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Upload a prompt file as a version of a prompt, and point an alias to it.
    Push(push::Args),
    /// Download a version's file, checking its digest.
    Pull(pull::Args),
    /// List prompts, or the versions of one.
    Ls(ls::Args),
    /// Check that a local file is a version in the registry.
    Verify(verify::Args),
    /// Post, watch and stop ensembles, and show their weights.
    #[command(subcommand)]
    Ensemble(ensemble::Command),
}

/// Runs a command. The answer goes to stdout, progress to stderr.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Push(args) => push::run(args).await,
        Command::Pull(args) => pull::run(args).await,
        Command::Ls(args) => ls::run(args).await,
        Command::Verify(args) => verify::run(args).await,
        Command::Ensemble(command) => ensemble::run(command).await,
    }
}

/// The exit status for this error.
pub fn exit_status(error: &anyhow::Error) -> u8 {
    if error.is::<verify::Differs>() || error.is::<ensemble::Unsuccessful>() {
        return 1;
    }
    match error.downcast_ref::<ServerError>() {
        None => 2,
        Some(ServerError::Refused { .. }) => 3,
        Some(ServerError::Unreachable { .. } | ServerError::NotARegistry { .. }) => 4,
    }
}

/// The digest and size in bytes of a local file.
async fn digest_of(path: &Path) -> anyhow::Result<(Digest, u64)> {
    let file = path.to_owned();
    let read = tokio::task::spawn_blocking(move || digest_of_file(&file)).await?;
    read.with_context(|| format!("cannot read `{}`", path.display()))
}
