//! Repositories of a Hugging Face Hub, or of a server with its protocol (<https://huggingface.co/docs/hub/api>).
//!
//! The Hub's own crate makes connections that are not checked; here all of them go through [`Client`].

use std::path::Path;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Method, Request, Response};
use serde::Deserialize;
use url::Url;

use crate::remote::client::{Client, Limits, RemoteError, host, save, target};
use crate::remote::uri::SourceUri;
use promptweave_domain::digest::{Digest, digest_of_file};

/// The largest list of a repository's files, in bytes.
const MAX_LIST: u64 = 64 << 20;
/// A short word for the branch with the Hub's own conversion of a dataset, and the branch's name.
const CONVERTED: (&str, &str) = ("~parquet", "refs/convert/parquet");

#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error(
        "`{0}` is neither `hf://org/name` nor `hf://datasets/org/name`, each with `@revision` and a folder behind it or not"
    )]
    Repository(String),
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error("the hub's list of files cannot be understood")]
    List(#[source] serde_json::Error),
    #[error("`{file}` came with the digest {found}, and the hub names {expected}")]
    Digest {
        file: String,
        found: Digest,
        expected: Digest,
    },
    #[error("what came cannot be kept")]
    Io(#[from] std::io::Error),
}

/// `hf://org/name@revision/folder`, or `hf://datasets/org/name…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    pub is_dataset: bool,
    id: [String; 2],
    revision: String,
    /// A folder that ends with `/`, or empty.
    folder: String,
}

impl Repository {
    pub fn of(uri: &SourceUri) -> Result<Self, HubError> {
        let wrong = || HubError::Repository(uri.to_string());
        let text = uri.to_string();
        let rest = text.strip_prefix("hf://").ok_or_else(wrong)?;
        let (is_dataset, rest) = match rest.strip_prefix("datasets/") {
            Some(rest) => (true, rest),
            None => (false, rest),
        };
        let parts: Vec<&str> = rest.trim_end_matches('/').split('/').collect();
        let [org, name, folders @ ..] = &parts[..] else {
            return Err(wrong());
        };
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let revision = match revision {
            short if short == CONVERTED.0 => CONVERTED.1,
            revision if is_word(revision) => revision,
            _ => return Err(wrong()),
        };
        if ![org, name]
            .iter()
            .chain(&folders.to_vec())
            .all(|part| is_word(part))
        {
            return Err(wrong());
        }
        Ok(Self {
            is_dataset,
            id: [(*org).to_owned(), name.to_owned()],
            revision: revision.to_owned(),
            folder: folders.iter().map(|part| format!("{part}/")).collect(),
        })
    }
}

fn is_word(part: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=96).contains(&part.len()) && part.chars().all(known) && !part.starts_with('.')
}

/// A repository's files at one commit.
#[derive(Debug)]
pub struct Listed<'a> {
    repository: &'a Repository,
    commit: String,
    /// Paths below the repository's folder, without that folder.
    pub files: Vec<String>,
}

#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

#[derive(Clone, Debug)]
pub struct Hub {
    client: Client,
    endpoint: Url,
    /// The token's header, sent only to the endpoint's host.
    authorization: Option<HeaderValue>,
}

impl Hub {
    /// A Hub; `token` is one of its access tokens, for repositories that are not public.
    pub fn new(client: Client, endpoint: Url, token: Option<&str>) -> Self {
        let authorization = token.and_then(|token| {
            let mut value = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
            value.set_sensitive(true);
            Some(value)
        });
        Self {
            client,
            endpoint,
            authorization,
        }
    }

    /// The current files of a repository.
    pub async fn list<'a>(
        &self,
        repository: &'a Repository,
        time: Duration,
    ) -> Result<Listed<'a>, HubError> {
        let kind = if repository.is_dataset {
            "datasets"
        } else {
            "models"
        };
        let [org, name] = &repository.id;
        let url = self.url(&["api", kind, org, name, "revision", &repository.revision]);
        let response = self.client.get(&url, &self.headers(), time).await?;
        let mut bytes = Vec::new();
        save(response, MAX_LIST, &mut bytes).await?;
        let info: Info = serde_json::from_slice(&bytes).map_err(HubError::List)?;
        let files = info.siblings.into_iter().filter_map(|sibling| {
            let below = sibling.rfilename.strip_prefix(&repository.folder)?;
            Some(below.to_owned())
        });
        Ok(Listed {
            repository,
            commit: info.sha,
            files: files.collect(),
        })
    }

    /// Writes one of the files to `out`, and checks it against the digest if the Hub gives one.
    pub async fn download(
        &self,
        listed: &Listed<'_>,
        file: &str,
        limits: Limits,
        out: &Path,
    ) -> Result<u64, HubError> {
        let Repository { id, folder, .. } = listed.repository;
        let kind = listed.repository.is_dataset.then_some("datasets");
        let path = format!("{folder}{file}");
        let parts = kind.into_iter().chain(id.iter().map(String::as_str));
        let parts = parts
            .chain(["resolve", &listed.commit])
            .chain(path.split('/'));
        let url = self.url(&parts.collect::<Vec<_>>());
        let (response, expected) = self.open(&url, limits.time).await?;
        let mut written = tokio::fs::File::create(out).await?;
        let size = save(response, limits.bytes, &mut written).await?;
        if let Some(expected) = expected {
            let path = out.to_owned();
            let read = tokio::task::spawn_blocking(move || digest_of_file(&path));
            let (found, _) = read.await.expect("reading does not panic")?;
            if found != expected {
                let file = file.to_owned();
                return Err(HubError::Digest {
                    file,
                    found,
                    expected,
                });
            }
        }
        Ok(size)
    }

    /// Opens a file. The Hub keeps large files elsewhere: it answers with their sha256 and redirects there. That one
    /// redirect may lead to another host, and is followed without the token.
    async fn open(
        &self,
        url: &Url,
        time: Duration,
    ) -> Result<(Response, Option<Digest>), HubError> {
        let mut request = Request::new(Method::GET, url.clone());
        *request.headers_mut() = self.headers();
        *request.timeout_mut() = Some(time);
        let response = self.client.execute(request).await?;
        let linked = response.headers().get("x-linked-etag");
        let expected = linked
            .and_then(|etag| etag.to_str().ok())
            .and_then(|etag| format!("sha256:{}", etag.trim_matches('"')).parse().ok());
        let status = response.status();
        let response = match target(&response) {
            Some(next) if next.scheme() == url.scheme() || next.scheme() == "https" => {
                self.client.get(&next, &HeaderMap::new(), time).await?
            }
            Some(next) => {
                let (host, to) = (host(url), host(&next));
                return Err(RemoteError::Redirect { host, to }.into());
            }
            None if status.is_success() => response,
            None => {
                let host = host(url);
                return Err(RemoteError::Status { host, status }.into());
            }
        };
        Ok((response, expected))
    }

    fn url(&self, parts: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        url.path_segments_mut()
            .expect("the endpoint has a host")
            .pop_if_empty()
            .extend(parts);
        url
    }

    fn headers(&self) -> HeaderMap {
        let authorization = self.authorization.iter();
        authorization
            .map(|value| (AUTHORIZATION, value.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_is_named_with_revision_and_folder_or_without() {
        let of = |text: &str| Repository::of(&text.parse().unwrap());
        let food = of("hf://datasets/org/food@~parquet/default/").unwrap();
        assert!(food.is_dataset);
        assert_eq!(food.id, ["org", "food"]);
        assert_eq!(
            (food.revision.as_str(), food.folder.as_str()),
            (CONVERTED.1, "default/")
        );
        let vit = of("hf://google/vit-base").unwrap();
        assert!(!vit.is_dataset);
        assert_eq!((vit.revision.as_str(), vit.folder.as_str()), ("main", ""));
        for text in [
            "hf://org",
            "hf://org/.name",
            "hf://org/na%20me",
            "hf://org/name@",
            "hf://org/name@a:b",
        ] {
            assert!(of(text).is_err(), "{text}");
        }
    }
}
