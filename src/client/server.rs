//! A client's view of a registry: its address, the key for it, and its answers.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use reqwest::redirect::Policy;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url, header};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use promptweave_domain::digest::Digest;
use promptweave_domain::reference::{Reference, ResourceName, VersionSelector};

const CONNECT: Duration = Duration::from_secs(10);
/// How long to wait for the next piece of an answer; a server gives up earlier by itself.
const SILENCE: Duration = Duration::from_secs(120);
/// How long to keep asking a registry that answers 429.
const PATIENCE: Duration = Duration::from_secs(60);
/// The largest page that the API gives.
const PAGE_SIZE: &str = "200";
/// The variable that holds the key if no file is named. It is not an option, because options show in `ps`.
const KEY_VARIABLE: &str = "PROMPTWEAVE_API_KEY";

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Registry")]
pub struct ServerOptions {
    /// URL of the registry: `http://` or `https://`, host, port, and a path if a proxy serves it below one.
    #[arg(
        long,
        env = "PROMPTWEAVE_SERVER",
        value_name = "URL",
        default_value = "http://127.0.0.1:8080"
    )]
    server: Url,
    /// File with the API key, as `promptweave up` writes one. Default: the key itself in the variable
    /// PROMPTWEAVE_API_KEY; without either, no key is sent.
    #[arg(long, env = "PROMPTWEAVE_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
}

pub struct Server {
    url: Url,
    key: Option<SecretString>,
    http: reqwest::Client,
}

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot reach {url}; name the registry with --server or PROMPTWEAVE_SERVER")]
    Unreachable { url: Url, source: reqwest::Error },
    #[error("{detail} ({code})")]
    Refused { code: String, detail: String },
    #[error("{url} does not answer as a promptweave registry does (status {status})")]
    NotARegistry { url: Url, status: u16 },
}

/// The fields of an error that the client reads.
#[derive(Deserialize)]
struct Problem {
    code: String,
    detail: String,
    #[serde(default)]
    errors: Vec<Mistake>,
}

#[derive(Deserialize)]
struct Mistake {
    pointer: String,
    detail: String,
}

/// The fields of a prompt that the client reads.
#[derive(Deserialize)]
struct Prompt {
    newest_version: Option<i32>,
}

/// The fields of a version that the client reads.
#[derive(Debug, Deserialize)]
pub struct Version {
    pub version: i32,
    pub digest: Digest,
    pub size: u64,
}

#[derive(Deserialize)]
struct Page<T> {
    items: Vec<T>,
    next_page_token: Option<String>,
}

impl ServerOptions {
    pub fn server(self) -> anyhow::Result<Server> {
        anyhow::ensure!(
            ["http", "https"].contains(&self.server.scheme()) && self.server.has_host(),
            "--server `{}` is not http:// or https:// and a host",
            self.server
        );
        // A provider that is already installed is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut http = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .read_timeout(SILENCE)
            // The API never redirects, and a key and a body must not go where another server points.
            .redirect(Policy::none());
        if self.server.scheme() == "http" {
            // This lets a machine without certificates reach a server without TLS.
            http = http.tls_certs_only([]);
        }
        Ok(Server {
            key: key(self.api_key_file)?,
            http: http.build().context("cannot set up HTTP")?,
            url: self.server,
        })
    }
}

fn key(file: Option<PathBuf>) -> anyhow::Result<Option<SecretString>> {
    let text = match file {
        Some(file) => {
            let text = fs::read_to_string(&file);
            text.with_context(|| format!("cannot read the API key in `{}`", file.display()))?
        }
        None => std::env::var(KEY_VARIABLE).unwrap_or_default(),
    };
    let text = text.trim();
    Ok((!text.is_empty()).then(|| text.into()))
}

impl Server {
    /// A request for a path below `/v1`.
    pub fn request(&self, method: Method, path: &[&str]) -> RequestBuilder {
        self.request_with(method, path, &[])
    }

    /// A request for a path below `/v1`, with a query.
    pub fn request_with(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, String)],
    ) -> RequestBuilder {
        let mut url = self.url.clone();
        url.path_segments_mut()
            .expect("checked to have a host")
            .pop_if_empty()
            .push("v1")
            .extend(path);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let request = self.http.request(method, url);
        match &self.key {
            Some(key) => request.bearer_auth(key.expose_secret()),
            None => request,
        }
    }

    /// A request with a JSON body.
    pub fn request_json(&self, method: Method, path: &[&str], body: &Value) -> RequestBuilder {
        self.request(method, path)
            .header(header::CONTENT_TYPE, "application/json")
            .body(body.to_string())
    }

    /// Sends a request and returns a success, whose body is still to be read. After a 429 the request is sent again
    /// when the registry says, for a minute at most; not so a request whose body is a file stream.
    pub async fn send(&self, mut request: RequestBuilder) -> Result<Response, ServerError> {
        let mut patience = PATIENCE;
        let response = loop {
            let again = request.try_clone();
            let response = request.send().await.map_err(|e| self.unreachable(e))?;
            match (again, too_early(&response)) {
                (Some(again), Some(pause)) if pause <= patience => {
                    tokio::time::sleep(pause).await;
                    patience -= pause;
                    request = again;
                }
                _ => break response,
            }
        };
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let body = response.bytes().await.map_err(|e| self.unreachable(e))?;
        let problem = serde_json::from_slice(&body);
        let Ok(Problem {
            code,
            mut detail,
            errors,
        }) = problem
        else {
            return Err(self.not_a_registry(status));
        };
        if errors.len() > 1 {
            let of = |it: &Mistake| format!("\n  {}: {}", it.pointer, it.detail);
            let all: String = errors.iter().map(of).collect();
            detail = format!("{} mistakes:{all}\n", errors.len());
        }
        if status == 401 {
            detail +=
                &format!("; it comes from {KEY_VARIABLE}, or from the file of --api-key-file");
        }
        Err(ServerError::Refused { code, detail })
    }

    /// Sends a request and reads a success's JSON.
    pub async fn json<T: DeserializeOwned>(
        &self,
        request: RequestBuilder,
    ) -> Result<T, ServerError> {
        read(self, self.send(request).await?).await
    }

    /// Like `json`, but None if the registry refuses with this code.
    pub async fn json_unless<T: DeserializeOwned>(
        &self,
        code: &str,
        request: RequestBuilder,
    ) -> Result<Option<T>, ServerError> {
        match self.json(request).await {
            Ok(found) => Ok(Some(found)),
            Err(ServerError::Refused { code: other, .. }) if other == code => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads all pages of a list.
    pub async fn list<T: DeserializeOwned>(
        &self,
        path: &[&str],
        filters: &[(&str, String)],
    ) -> Result<Vec<T>, ServerError> {
        let mut query = filters.to_vec();
        query.push(("page_size", PAGE_SIZE.to_owned()));
        let (mut items, first) = (Vec::new(), query.len());
        loop {
            let request = self.request_with(Method::GET, path, &query);
            let page: Page<T> = self.json(request).await?;
            items.extend(page.items);
            query.truncate(first);
            match page.next_page_token {
                Some(token) => query.push(("page_token", token)),
                None => return Ok(items),
            }
        }
    }

    /// The version that a reference means now.
    pub async fn resolve(&self, reference: &Reference) -> anyhow::Result<Version> {
        let name = reference.name.as_str();
        let selector = match &reference.version {
            VersionSelector::Newest => {
                let request = self.request(Method::GET, &["prompts", name]);
                let prompt: Prompt = self.json(request).await?;
                let newest = prompt.newest_version.with_context(|| {
                    format!("prompt `{name}` has no version, or deprecated ones alone")
                })?;
                newest.to_string()
            }
            VersionSelector::Number(number) => number.to_string(),
            VersionSelector::Alias(alias) => alias.to_string(),
            VersionSelector::Digest(digest) => digest.to_string(),
        };
        let path = ["prompts", name, "versions", &selector];
        Ok(self.json(self.request(Method::GET, &path)).await?)
    }

    /// The prompt's version with these bytes, if there is one.
    pub async fn version_with(
        &self,
        name: &ResourceName,
        digest: &Digest,
    ) -> Result<Option<Version>, ServerError> {
        let path = ["prompts", name.as_str(), "versions", &digest.to_string()];
        let request = self.request(Method::GET, &path);
        self.json_unless("version_not_found", request).await
    }

    pub fn unreachable(&self, error: reqwest::Error) -> ServerError {
        ServerError::Unreachable {
            url: self.url.clone(),
            // The error's text names the URL; the message has the server already.
            source: error.without_url(),
        }
    }

    fn not_a_registry(&self, status: u16) -> ServerError {
        let url = self.url.clone();
        ServerError::NotARegistry { url, status }
    }
}

/// How long an answer 429 says to wait.
fn too_early(response: &Response) -> Option<Duration> {
    if response.status() != StatusCode::TOO_MANY_REQUESTS {
        return None;
    }
    let seconds = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
    Some(Duration::from_secs(seconds.parse().ok()?))
}

/// Reads the JSON of a success.
pub async fn read<T: DeserializeOwned>(
    server: &Server,
    response: Response,
) -> Result<T, ServerError> {
    let status = response.status().as_u16();
    let body = response.bytes().await.map_err(|e| server.unreachable(e))?;
    serde_json::from_slice(&body).map_err(|_| server.not_a_registry(status))
}
