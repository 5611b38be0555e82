//! `promptweave push`: publishes a file as a version, and points an alias to it.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::TryStreamExt;
use reqwest::{Body, Method, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;

use crate::client::server;
use crate::client::server::{Server, ServerError, ServerOptions, Version};
use crate::client::{digest_of, progress};
use promptweave_domain::digest::Digest;
use promptweave_domain::reference::{
    AliasName, InvalidReference, Reference, ResourceName, VersionSelector,
};

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The prompt file (safetensors).
    file: PathBuf,
    /// The prompt, which is created if it does not exist, and the alias to point to the version.
    #[arg(value_name = "NAME[:ALIAS]")]
    target: Target,
    #[command(flatten)]
    missing: Missing,
    #[command(flatten)]
    server: ServerOptions,
}

/// Metadata that the registry requires if the file lacks it (files of VPT and PEFT do).
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "What the file does not say")]
struct Missing {
    /// Digest of the backbone that the prompt was trained for.
    #[arg(long, value_name = "DIGEST")]
    backbone_digest: Option<Digest>,
    /// Id of the preprocessing, e.g. `98-bicubic-imagenet`.
    #[arg(long, value_name = "ID")]
    preprocessing_id: Option<String>,
    /// Seed of the initial prompt.
    #[arg(long, value_name = "SEED")]
    init_seed: Option<u64>,
    /// The task that the prompt was trained on.
    #[arg(long, value_name = "NAME")]
    task: Option<String>,
}

#[derive(Clone, Debug)]
struct Target {
    name: ResourceName,
    alias: Option<AliasName>,
}

#[derive(Debug, thiserror::Error)]
enum InvalidTarget {
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    #[error("the registry numbers versions itself: push to `{0}` or to `{0}:ALIAS`")]
    Version(ResourceName),
}

impl FromStr for Target {
    type Err = InvalidTarget;

    fn from_str(text: &str) -> Result<Self, InvalidTarget> {
        let Reference { name, version } = text.parse()?;
        match version {
            VersionSelector::Newest => Ok(Self { name, alias: None }),
            VersionSelector::Alias(alias) => Ok(Self {
                name,
                alias: Some(alias),
            }),
            VersionSelector::Number(_) | VersionSelector::Digest(_) => {
                Err(InvalidTarget::Version(name))
            }
        }
    }
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let server = args.server.server()?;
    let Target { name, alias } = &args.target;
    let upload = || upload(&server, &args.file, name, &args.missing);
    // The upload is tried first: it needs no right to read, and a refused file leaves no empty prompt.
    let (version, created) = match upload().await {
        Err(error) if is(&error, "prompt_not_found") => {
            create(&server, name).await?;
            upload().await?
        }
        outcome => outcome?,
    };
    let number = version.version;
    match created {
        true => println!("{name}: created version {number}"),
        false => println!("{name}: these bytes are version {number} already"),
    }
    match alias {
        Some(alias) => point(&server, name, alias, number).await,
        None => Ok(()),
    }
}

fn is(error: &anyhow::Error, expected: &str) -> bool {
    let error = error.downcast_ref();
    matches!(error, Some(ServerError::Refused { code, .. }) if code == expected)
}

/// Uploads the file; returns the version with its bytes, and whether that is new.
async fn upload(
    server: &Server,
    path: &Path,
    name: &ResourceName,
    missing: &Missing,
) -> anyhow::Result<(Version, bool)> {
    // The file is read twice rather than held in memory: first for the digest, which is sent before the bytes.
    let (digest, size) = digest_of(path).await?;
    let file = tokio::fs::File::open(path).await;
    let file = file.with_context(|| format!("cannot read `{}`", path.display()))?;
    let bar = progress::bytes(&format!("uploading {}", path.display()), size);
    let seen = bar.clone();
    let pieces = ReaderStream::with_capacity(file.take(size), 1 << 16)
        .inspect_ok(move |piece| seen.inc(piece.len() as u64));
    let content_digest = format!("sha-256=:{}:", STANDARD.encode(digest.as_bytes()));
    let request = server
        .request_with(
            Method::POST,
            &["prompts", name.as_str(), "versions"],
            &missing.parameters(),
        )
        .header(header::CONTENT_TYPE, "application/vnd.prompt+safetensors")
        .header(header::CONTENT_LENGTH, size)
        .header("content-digest", content_digest)
        .body(Body::wrap_stream(pieces));
    let answer = server.send(request).await;
    bar.finish_and_clear();
    let answer = answer?;
    let created = answer.status() == StatusCode::CREATED;
    Ok((server::read(server, answer).await?, created))
}

impl Missing {
    fn parameters(&self) -> Vec<(&'static str, String)> {
        let all = [
            (
                "backbone_digest",
                self.backbone_digest.map(|it| it.to_string()),
            ),
            ("preprocessing_id", self.preprocessing_id.clone()),
            ("init_seed", self.init_seed.map(|it| it.to_string())),
            ("task", self.task.clone()),
        ];
        let given = all.into_iter();
        given.filter_map(|(key, it)| Some((key, it?))).collect()
    }
}

async fn create(server: &Server, name: &ResourceName) -> Result<(), ServerError> {
    let request = server.request_json(Method::POST, &["prompts"], &json!({ "name": name }));
    // If somebody else created the prompt meanwhile, that is as good.
    let made: Option<Value> = server.json_unless("name_taken", request).await?;
    if made.is_some() {
        println!("{name}: created the prompt");
    }
    Ok(())
}

/// Points an alias to a version, unless somebody else moves it at the same time.
async fn point(
    server: &Server,
    name: &ResourceName,
    alias: &AliasName,
    version: i32,
) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct Alias {
        version: i32,
    }
    let path = ["prompts", name.as_str(), "aliases", alias.as_str()];
    let set = server.request_json(Method::PUT, &path, &json!({ "version": version }));
    let (from, set) = match server.send(server.request(Method::GET, &path)).await {
        Ok(found) => {
            let etag = found.headers().get(header::ETAG).cloned();
            let etag = etag.context("the registry gives the alias no ETag")?;
            let at: Alias = server::read(server, found).await?;
            if at.version == version {
                println!("{name}:{alias}: points to version {version} already");
                return Ok(());
            }
            let from = format!("moved from version {} to", at.version);
            (from, set.header(header::IF_MATCH, etag))
        }
        Err(ServerError::Refused { code, .. }) if code == "alias_not_found" => {
            let from = "points to".to_owned();
            (from, set.header(header::IF_NONE_MATCH, "*"))
        }
        Err(error) => return Err(error.into()),
    };
    match server.send(set).await {
        Ok(_) => println!("{name}:{alias}: {from} version {version}"),
        Err(ServerError::Refused { code, .. }) if code == "precondition_failed" => {
            let detail = format!(
                "somebody else has moved `{name}:{alias}` just now; see where it points, and push again"
            );
            return Err(ServerError::Refused { code, detail }.into());
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
