//! `promptweave verify`: checks that a local file is what the registry has.

use std::path::PathBuf;

use crate::client::digest_of;
use crate::client::server::ServerOptions;
use promptweave_domain::digest::Digest;
use promptweave_domain::reference::Reference;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The local file.
    file: PathBuf,
    /// `dtd`, `dtd:3`, `dtd:production` or `dtd@sha256:…`.
    #[arg(value_name = "REF")]
    reference: Reference,
    #[command(flatten)]
    server: ServerOptions,
}

/// The one error that is an answer rather than a failure.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{}` is not `{reference}`: the file has {local}, version {version} has {registered}{elsewhere}",
    file.display()
)]
pub struct Differs {
    file: PathBuf,
    reference: Reference,
    local: Digest,
    version: i32,
    registered: Digest,
    /// Where else the registry has the file.
    elsewhere: String,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let (local, _) = digest_of(&args.file).await?;
    let server = args.server.server()?;
    let Reference { name, .. } = &args.reference;
    let registered = server.resolve(&args.reference).await?;
    let version = registered.version;
    if local == registered.digest {
        println!(
            "{} is version {version} of `{name}`, {local}",
            args.file.display()
        );
        return Ok(());
    }
    let elsewhere = match server.version_with(name, &local).await? {
        Some(other) => format!("; it is version {}", other.version),
        None => format!("; no version of `{name}` has these bytes"),
    };
    Err(Differs {
        file: args.file,
        reference: args.reference,
        local,
        version,
        registered: registered.digest,
        elsewhere,
    }
    .into())
}
