//! HTTP to hosts that a client of this service named: checked addresses, no proxy, few redirects, limits.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use reqwest::dns::Resolve;
use reqwest::header::{HeaderMap, LOCATION};
use reqwest::redirect::Policy;
use reqwest::{Method, Request, Response, StatusCode};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use url::Url;

use crate::remote::network::{Guarded, Network, NotPublic, SystemNames, Verdict};

/// The most redirects, all on one host; further ones are refused.
pub const MAX_REDIRECTS: usize = 5;
const CONNECT: Duration = Duration::from_secs(10);
/// How long to wait for the next piece of an answer.
const SILENCE: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    #[error(transparent)]
    NotPublic(#[from] NotPublic),
    #[error("`{host}` did not answer in time")]
    Timeout { host: String },
    #[error("`{host}` answered {status}")]
    Status { host: String, status: StatusCode },
    #[error("`{host}` redirects to `{to}`, and only redirects within one host are followed")]
    Redirect { host: String, to: String },
    #[error("`{0}` redirects more than {MAX_REDIRECTS} times")]
    Redirects(String),
    #[error("`{host}` sends more than {limit} bytes, which is the most taken")]
    TooLarge { host: String, limit: u64 },
    #[error("the connection to `{host}` failed")]
    Failed {
        host: String,
        source: reqwest::Error,
    },
    #[error("what came cannot be written")]
    Write(#[source] std::io::Error),
}

/// The limits of one download.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub bytes: u64,
    /// Time from the first request to the last byte.
    pub time: Duration,
}

/// An HTTP client; clones share their connections.
#[derive(Clone, Debug)]
pub struct Client {
    network: Arc<Network>,
    /// Connects only to what [`Network`] admits.
    guarded: reqwest::Client,
    /// Connects to anything; used for what the operator opened.
    open: reqwest::Client,
}

impl Client {
    pub fn new(network: Network) -> Result<Self, reqwest::Error> {
        Self::with_names(network, Arc::new(SystemNames))
    }

    /// A client with another resolver than the machine's.
    pub fn with_names(network: Network, names: Arc<dyn Resolve>) -> Result<Self, reqwest::Error> {
        // A process has one provider; it is fine if it was installed before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let network = Arc::new(network);
        let checked = Guarded {
            network: network.clone(),
            names: names.clone(),
        };
        Ok(Self {
            network,
            guarded: build(Arc::new(checked))?,
            open: build(names)?,
        })
    }

    /// Sends one request and returns its answer, whatever the status; a redirect is an answer too.
    pub async fn execute(&self, request: Request) -> Result<Response, RemoteError> {
        let host = host(request.url());
        let client = match self.network.verdict(request.url()) {
            Verdict::Open => &self.open,
            Verdict::Check => &self.guarded,
            Verdict::Refused => return Err(NotPublic(host).into()),
        };
        client
            .execute(request)
            .await
            .map_err(|error| failed(host, error))
    }

    /// Follows redirects on the same host, and returns a successful answer.
    pub async fn get(
        &self,
        url: &Url,
        headers: &HeaderMap,
        time: Duration,
    ) -> Result<Response, RemoteError> {
        let mut url = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::new(Method::GET, url.clone());
            *request.headers_mut() = headers.clone();
            *request.timeout_mut() = Some(time);
            let response = self.execute(request).await?;
            let status = response.status();
            match target(&response) {
                Some(next) if stays(&url, &next) => url = next,
                Some(next) => {
                    let (host, to) = (host(&url), host(&next));
                    return Err(RemoteError::Redirect { host, to });
                }
                None if status.is_success() => return Ok(response),
                None => {
                    let host = host(&url);
                    return Err(RemoteError::Status { host, status });
                }
            }
        }
        Err(RemoteError::Redirects(host(&url)))
    }

    /// Downloads a URL, and returns the number of bytes.
    pub async fn download(
        &self,
        url: &Url,
        headers: &HeaderMap,
        limits: Limits,
        out: &mut (impl AsyncWrite + Unpin),
    ) -> Result<u64, RemoteError> {
        let get = async {
            let response = self.get(url, headers, limits.time).await?;
            save(response, limits.bytes, out).await
        };
        // This limit covers all redirects; a request's own limit covers only that request.
        let in_time = tokio::time::timeout(limits.time, get).await;
        in_time.unwrap_or_else(|_| Err(RemoteError::Timeout { host: host(url) }))
    }
}

fn build(names: Arc<dyn Resolve>) -> Result<reqwest::Client, reqwest::Error> {
    reqwest::Client::builder()
        .user_agent(concat!("promptweave/", env!("CARGO_PKG_VERSION")))
        .no_proxy()
        .redirect(Policy::none())
        .referer(false)
        .connect_timeout(CONNECT)
        .read_timeout(SILENCE)
        .dns_resolver(names)
        .build()
}

/// Writes the body of an answer, piece by piece, up to `limit`.
pub async fn save(
    mut response: Response,
    limit: u64,
    out: &mut (impl AsyncWrite + Unpin),
) -> Result<u64, RemoteError> {
    let host = host(response.url());
    let too_large = || RemoteError::TooLarge {
        host: host.clone(),
        limit,
    };
    if response.content_length().is_some_and(|size| size > limit) {
        return Err(too_large());
    }
    let mut size = 0;
    loop {
        let piece = response.chunk().await;
        let Some(piece) = piece.map_err(|error| failed(host.clone(), error))? else {
            break;
        };
        size += piece.len() as u64;
        if size > limit {
            return Err(too_large());
        }
        out.write_all(&piece).await.map_err(RemoteError::Write)?;
    }
    out.flush().await.map_err(RemoteError::Write)?;
    Ok(size)
}

/// The URL that an answer redirects to.
pub fn target(response: &Response) -> Option<Url> {
    if !response.status().is_redirection() {
        return None;
    }
    let location = response.headers().get(LOCATION)?.to_str().ok()?;
    response.url().join(location).ok()
}

/// Whether a redirect stays on the same server. It may change from `http` to `https`, but not back.
fn stays(from: &Url, to: &Url) -> bool {
    let ports = (from.port_or_known_default(), to.port_or_known_default());
    from.host() == to.host()
        && match (from.scheme(), to.scheme()) {
            (a, b) if a == b => ports.0 == ports.1,
            ("http", "https") => ports == (Some(80), Some(443)),
            _ => false,
        }
}

/// The host of a URL, for messages: a URL's path or query may be a secret.
pub(super) fn host(url: &Url) -> String {
    url.host_str().unwrap_or_default().to_owned()
}

fn failed(host: String, error: reqwest::Error) -> RemoteError {
    let mut cause: Option<&dyn Error> = Some(&error);
    while let Some(error) = cause {
        if let Some(refused) = error.downcast_ref::<NotPublic>() {
            return refused.clone().into();
        }
        cause = error.source();
    }
    if error.is_timeout() {
        return RemoteError::Timeout { host };
    }
    let source = error.without_url();
    RemoteError::Failed { host, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_stays_with_one_server_and_never_leaves_https() {
        let stays = |from: &str, to: &str| {
            let from = Url::parse(from).unwrap();
            super::stays(&from, &from.join(to).unwrap())
        };
        for (from, to) in [
            ("https://a.org/x", "/y"),
            ("https://a.org/x", "https://a.org:443/y"),
            ("http://a.org/x", "https://a.org/x"),
            ("http://a.org:81/x", "//A.org:81/y?z"),
        ] {
            assert!(stays(from, to), "{from} {to}");
        }
        for (from, to) in [
            ("https://a.org/x", "http://a.org/x"),
            ("https://a.org/x", "https://b.org/x"),
            ("https://a.org/x", "https://www.a.org/x"),
            ("https://a.org/x", "https://a.org:444/x"),
            ("http://a.org:81/x", "https://a.org/x"),
            ("https://a.org/x", "//a.org.evil.org/"),
            ("https://a.org/x", "file:///etc/passwd"),
            ("https://a.org/x", "https://a.org@evil.org/"),
        ] {
            assert!(!stays(from, to), "{from} {to}");
        }
    }
}
