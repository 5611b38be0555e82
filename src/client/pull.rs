//! `promptweave pull`: downloads a version's file, complete and checked, or leaves no file.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use futures::TryStreamExt;
use reqwest::Method;
use tempfile::NamedTempFile;
use tokio::io::AsyncWriteExt;

use crate::client::server::{Server, ServerOptions, Version};
use crate::client::{digest_of, progress};
use promptweave_domain::digest::{Digest, DigestBuilder};
use promptweave_domain::reference::{Reference, ResourceName};

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// `dtd`, `dtd:3`, `dtd:production` or `dtd@sha256:…`.
    #[arg(value_name = "REF")]
    reference: Reference,
    /// File to write, or an existing directory to write into (default: `<name>-<version>.safetensors` here).
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace an existing file that has other content.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    server: ServerOptions,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let server = args.server.server()?;
    let name = &args.reference.name;
    let version = server.resolve(&args.reference).await?;
    let default = format!("{name}-{}.safetensors", version.version);
    let path = match args.output {
        None => default.into(),
        Some(dir) if dir.is_dir() => dir.join(default),
        Some(file) => file,
    };
    let what = format!("version {} of `{name}`", version.version);
    // `exists` would not do: a dangling link is in the way too.
    if path.symlink_metadata().is_ok() && !args.force {
        let (found, _) = digest_of(&path).await?;
        if found == version.digest {
            println!("{} is {what} already", path.display());
            return Ok(());
        }
        anyhow::bail!(
            "`{}` is there and holds something else ({found}); name another file with -o, or replace \
             it with --force",
            path.display()
        );
    }
    let file = download(&server, name, &version, &path).await?;
    let persisted = match args.force {
        true => file.persist(&path),
        false => file.persist_noclobber(&path),
    };
    persisted.with_context(|| format!("cannot write `{}`", path.display()))?;
    println!("{} is {what}, {}", path.display(), version.digest);
    Ok(())
}

/// Downloads the version's bytes to a temporary file beside `path`, which is deleted unless they are right.
async fn download(
    server: &Server,
    name: &ResourceName,
    version: &Version,
    path: &Path,
) -> anyhow::Result<NamedTempFile> {
    let failed = || format!("cannot write `{}`", path.display());
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let file = tempfile::Builder::new()
        .prefix(".promptweave-pull-")
        // The user's umask applies: it is a file like others, not a secret.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(dir)
        .with_context(failed)?;
    // The version is asked for by number, which always means the same bytes, even if an alias moves meanwhile.
    let number = version.version.to_string();
    let segments = ["prompts", name.as_str(), "versions", &number, "content"];
    let answer = server.send(server.request(Method::GET, &segments)).await?;
    let mut pieces = answer.bytes_stream();
    let mut out = tokio::fs::File::from_std(file.reopen().with_context(failed)?);
    let mut found = DigestBuilder::default();
    let mut size = 0;
    let bar = progress::bytes(&format!("downloading {name}:{number}"), version.size);
    while let Some(piece) = pieces.try_next().await.map_err(|e| server.unreachable(e))? {
        size += piece.len() as u64;
        if size > version.size {
            break;
        }
        found.update(&piece);
        out.write_all(&piece).await.with_context(failed)?;
        bar.inc(piece.len() as u64);
    }
    bar.finish_and_clear();
    check(found.finish(), size, version)?;
    out.sync_all().await.with_context(failed)?;
    Ok(file)
}

fn check(found: Digest, size: u64, version: &Version) -> anyhow::Result<()> {
    anyhow::ensure!(
        found == version.digest && size == version.size,
        "what came is not version {}: {size} bytes with {found} in place of {} with {}; nothing was \
         written, try again",
        version.version,
        version.size,
        version.digest
    );
    Ok(())
}
