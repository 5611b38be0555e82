//! Fetching what a client named: one file from a web server or an object store, or a repository's files.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use futures::TryStreamExt as _;
use object_store::ObjectStoreExt as _;
use object_store::aws::AmazonS3Builder;
use object_store::path::Path as Key;
use reqwest::header::HeaderMap;
use tokio::io::AsyncWriteExt as _;
use url::Url;

use crate::remote::client::{Client, Limits, RemoteError};
use crate::remote::hub::{Hub, HubError, Repository};
use crate::remote::s3::S3Url;
use crate::remote::uri::{AllowedUris, SourceUri};

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("`{0}` is not among the sources that the operator allows (--allow-uri)")]
    NotAllowed(SourceUri),
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error("`{0}` is no object of a bucket: expected `s3://bucket/key`")]
    NoObject(SourceUri),
    #[error("the object store does not give it out")]
    Object(#[from] object_store::Error),
    #[error("it is larger than {0} bytes, which is the most taken")]
    TooLarge(u64),
    #[error("what came cannot be kept")]
    Io(#[from] std::io::Error),
}

/// The allowed sources, and the clients for them.
#[derive(Clone)]
pub struct Sources {
    allowed: AllowedUris,
    client: Client,
    hub: Hub,
    s3: AmazonS3Builder,
}

/// Leaves the credentials out.
impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let allowed = &self.allowed;
        f.debug_struct("Sources")
            .field("allowed", allowed)
            .finish_non_exhaustive()
    }
}

impl Sources {
    /// The allowed sources; `s3` has endpoint, region and credentials.
    pub fn new(
        allowed: AllowedUris,
        client: Client,
        hub: Url,
        token: Option<&str>,
        s3: AmazonS3Builder,
    ) -> Self {
        Self {
            hub: Hub::new(client.clone(), hub, token),
            allowed,
            client,
            s3,
        }
    }

    pub fn check(&self, uri: &SourceUri) -> Result<(), FetchError> {
        match self.allowed.allow(uri) {
            true => Ok(()),
            false => Err(FetchError::NotAllowed(uri.clone())),
        }
    }

    /// Fetches one file to `out`.
    pub async fn file(
        &self,
        uri: &SourceUri,
        limits: Limits,
        out: &Path,
    ) -> Result<(), FetchError> {
        self.check(uri)?;
        let mut file = tokio::fs::File::create(out).await?;
        if uri.url().scheme() != "s3" {
            let headers = HeaderMap::new();
            self.client
                .download(uri.url(), &headers, limits, &mut file)
                .await?;
            return Ok(());
        }
        let url = uri.url();
        let wrong = || FetchError::NoObject(uri.clone());
        let bucket: S3Url = format!("s3://{}", url.host_str().unwrap_or_default())
            .parse()
            .map_err(|_| wrong())?;
        let key = Key::from_url_path(url.path()).map_err(|_| wrong())?;
        if key.as_ref().is_empty() {
            return Err(wrong());
        }
        let get = async {
            let store = bucket.open_with(self.s3.clone(), self.client.clone())?;
            let object = store.get(&key).await?;
            if object.meta.size > limits.bytes {
                return Err(FetchError::TooLarge(limits.bytes));
            }
            let mut pieces = object.into_stream();
            let mut size = 0;
            while let Some(piece) = pieces.try_next().await? {
                size += piece.len() as u64;
                if size > limits.bytes {
                    return Err(FetchError::TooLarge(limits.bytes));
                }
                file.write_all(&piece).await?;
            }
            Ok(file.flush().await?)
        };
        let host = url.host_str().unwrap_or_default().to_owned();
        let in_time = tokio::time::timeout(limits.time, get).await;
        in_time.unwrap_or(Err(RemoteError::Timeout { host }.into()))
    }

    /// Fetches those files of a repository that `choose` picks, each with its name in `dir`. `limits` apply to all of
    /// them together.
    pub async fn repository<T>(
        &self,
        uri: &SourceUri,
        limits: Limits,
        dir: &Path,
        choose: impl FnOnce(&[String]) -> Vec<(T, String, String)>,
    ) -> Result<Vec<(T, String, String)>, FetchError> {
        self.check(uri)?;
        let repository = Repository::of(uri)?;
        let get = async {
            let listed = self.hub.list(&repository, limits.time).await?;
            let chosen = choose(&listed.files);
            let mut left = limits;
            for (_, file, name) in &chosen {
                left.bytes -= self
                    .hub
                    .download(&listed, file, left, &dir.join(name))
                    .await?;
            }
            Ok(chosen)
        };
        let time = Duration::from_secs(1) + limits.time;
        let host = "the hub".to_owned();
        let in_time = tokio::time::timeout(time, get).await;
        in_time.unwrap_or(Err(RemoteError::Timeout { host }.into()))
    }
}
