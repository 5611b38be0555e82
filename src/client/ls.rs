//! `promptweave ls`: the prompts, or the versions of one, for people or as JSON.

use std::collections::BTreeMap;

use indicatif::HumanBytes;
use reqwest::Method;
use serde::Deserialize;
use serde_json::Value;

use crate::client::server::{Server, ServerOptions};
use crate::client::table::{print, table};
use promptweave_domain::reference::ResourceName;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// List the versions of this prompt; without it, list the prompts.
    name: Option<ResourceName>,
    /// List only prompts with this tag; if repeated, those with all of them.
    #[arg(long, value_name = "KEY[=VALUE]", conflicts_with = "name")]
    tag: Vec<String>,
    /// Print the items as one JSON array, as the API gives them.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerOptions,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    newest_version: Option<i32>,
    aliases: BTreeMap<String, i32>,
    tags: BTreeMap<String, String>,
    created_at: String,
}

#[derive(Deserialize)]
struct Version {
    version: i32,
    digest: String,
    size: u64,
    origin: String,
    num_tokens: Option<i32>,
    embed_dim: i32,
    depth: Option<String>,
    num_members: Option<i32>,
    created_at: String,
    deprecated_at: Option<String>,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let server = args.server.server()?;
    let tags: Vec<_> = args.tag.into_iter().map(|tag| ("tag", tag)).collect();
    let path = match &args.name {
        Some(name) => vec!["prompts", name.as_str(), "versions"],
        None => vec!["prompts"],
    };
    let out = if args.json {
        let items: Vec<Value> = server.list(&path, &tags).await?;
        format!("{}\n", serde_json::to_string_pretty(&items)?)
    } else if let Some(name) = &args.name {
        versions(&server, name, server.list(&path, &[]).await?).await?
    } else {
        prompts(server.list(&path, &tags).await?)
    };
    print(&out)
}

fn prompts(prompts: Vec<Prompt>) -> String {
    let rows = prompts.into_iter().map(|prompt| {
        let aliases = prompt
            .aliases
            .iter()
            .map(|(name, at)| format!("{name}={at}"));
        let tags = prompt
            .tags
            .iter()
            .map(|(key, value)| format!("{key}={value}"));
        let newest = prompt.newest_version.map(|it| it.to_string());
        [
            prompt.name,
            newest.unwrap_or_else(|| "-".to_owned()),
            joined(aliases),
            joined(tags),
            minute(&prompt.created_at),
        ]
    });
    table(["NAME", "NEWEST", "ALIASES", "TAGS", "CREATED"], rows)
}

async fn versions(
    server: &Server,
    name: &ResourceName,
    versions: Vec<Version>,
) -> anyhow::Result<String> {
    let request = server.request(Method::GET, &["prompts", name.as_str()]);
    let prompt: Prompt = server.json(request).await?;
    let rows = versions.into_iter().map(|version| {
        let aliases = prompt.aliases.iter();
        let aliases = aliases.filter(|(_, at)| **at == version.version);
        let state = match version.deprecated_at {
            Some(_) => "deprecated",
            None => "",
        };
        [
            version.version.to_string(),
            joined(aliases.map(|(name, _)| name.clone())),
            version.origin.clone(),
            shape(&version),
            HumanBytes(version.size).to_string(),
            version.digest,
            minute(&version.created_at),
            state.to_owned(),
        ]
    });
    let head = [
        "VERSION", "ALIASES", "ORIGIN", "SHAPE", "SIZE", "DIGEST", "CREATED", "",
    ];
    Ok(table(head, rows))
}

/// `10 × 384 shallow` for a prompt, `ensemble of 5 × 384` for an ensemble.
fn shape(version: &Version) -> String {
    let width = version.embed_dim;
    match (version.num_tokens, &version.depth, version.num_members) {
        (Some(tokens), Some(depth), _) => format!("{tokens} × {width} {depth}"),
        (_, _, Some(members)) => format!("ensemble of {members} × {width}"),
        _ => format!("× {width}"),
    }
}

fn joined(words: impl Iterator<Item = String>) -> String {
    match words.collect::<Vec<_>>().join(",") {
        none if none.is_empty() => "-".to_owned(),
        words => words,
    }
}

/// Shortens `2026-11-24T10:30:12.5Z` to `2026-11-24 10:30`.
fn minute(rfc3339: &str) -> String {
    rfc3339
        .chars()
        .take(16)
        .collect::<String>()
        .replace('T', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_to_the_minute_and_nothing_as_a_dash() {
        assert_eq!(minute("2026-11-24T10:30:12.5Z"), "2026-11-24 10:30");
        assert_eq!(joined(std::iter::empty()), "-");
    }
}
