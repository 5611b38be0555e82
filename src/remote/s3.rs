//! Object stores that speak S3, reached through the guarded client.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use async_trait::async_trait;
use http_body_util::BodyExt as _;
use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use object_store::client::{
    ClientOptions, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use object_store::path::Path as Key;
use object_store::prefix::PrefixStore;

use crate::remote::client::{Client, RemoteError};

/// `s3://bucket/prefix`; the prefix may be empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct S3Url {
    pub bucket: String,
    pub prefix: Key,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not `s3://bucket` or `s3://bucket/prefix`")]
pub struct InvalidS3Url(String);

impl FromStr for S3Url {
    type Err = InvalidS3Url;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidS3Url(text.to_owned());
        let rest = text.strip_prefix("s3://").ok_or_else(invalid)?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        // This is AWS's rule, but with underscores and upper case, which other stores allow; a bucket is part of a URL.
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if !(3..=63).contains(&bucket.len())
            || !bucket.chars().all(allowed)
            || !bucket.starts_with(|c: char| c.is_ascii_alphanumeric())
        {
            return Err(invalid());
        }
        Ok(Self {
            bucket: bucket.to_owned(),
            prefix: Key::parse(prefix).map_err(|_| invalid())?,
        })
    }
}

impl fmt::Display for S3Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.prefix)
    }
}

impl S3Url {
    /// Opens the store below this URL. Endpoint, region and credentials come from the environment, under AWS's names:
    /// `AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, …
    pub fn open(&self, client: Client) -> object_store::Result<Arc<dyn ObjectStore>> {
        self.open_with(AmazonS3Builder::from_env(), client)
    }

    /// Opens the store with a given endpoint and credentials.
    pub fn open_with(
        &self,
        builder: AmazonS3Builder,
        client: Client,
    ) -> object_store::Result<Arc<dyn ObjectStore>> {
        let store = builder
            .with_bucket_name(&self.bucket)
            .with_http_connector(Connector(client))
            .build()?;
        Ok(Arc::new(PrefixStore::new(store, self.prefix.clone())))
    }
}

/// Gives `object_store`, which is built without a client of its own, the guarded one.
#[derive(Debug)]
struct Connector(Client);

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Service(self.0.clone())))
    }
}

#[derive(Debug)]
struct Service(Client);

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let url = parts.uri.to_string().parse();
        let url =
            url.map_err(|error: url::ParseError| HttpError::new(HttpErrorKind::Unknown, error))?;
        let mut request = reqwest::Request::new(parts.method, url);
        *request.headers_mut() = parts.headers;
        *request.body_mut() = Some(reqwest::Body::wrap(body));
        let response = self.0.execute(request).await.map_err(failed)?;

        let (status, headers) = (response.status(), response.headers().clone());
        let body = reqwest::Body::from(response).map_err(interrupted);
        let mut answer = HttpResponse::new(HttpResponseBody::new(body));
        *answer.status_mut() = status;
        *answer.headers_mut() = headers;
        Ok(answer)
    }
}

/// Classifies an error, which decides whether another try makes sense.
fn failed(error: RemoteError) -> HttpError {
    let kind = match &error {
        RemoteError::Timeout { .. } => HttpErrorKind::Timeout,
        RemoteError::Failed { source, .. } if source.is_connect() => HttpErrorKind::Connect,
        RemoteError::Failed { source, .. } if source.is_request() => HttpErrorKind::Interrupted,
        _ => HttpErrorKind::Unknown,
    };
    HttpError::new(kind, error)
}

fn interrupted(error: reqwest::Error) -> HttpError {
    let kind = match error.is_timeout() {
        true => HttpErrorKind::Timeout,
        false => HttpErrorKind::Interrupted,
    };
    HttpError::new(kind, error.without_url())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_a_bucket_and_a_prefix() {
        for (text, bucket, prefix) in [
            ("s3://bucket", "bucket", ""),
            ("s3://bucket/", "bucket", ""),
            ("s3://My_bucket.2/a/b", "My_bucket.2", "a/b"),
            ("s3://bucket/a/b/", "bucket", "a/b"),
        ] {
            let url: S3Url = text.parse().unwrap();
            assert_eq!((url.bucket.as_str(), url.prefix.as_ref()), (bucket, prefix));
        }
        for text in [
            "",
            "bucket",
            "/var/blobs",
            "s3:bucket",
            "s3://",
            "s3://ab",
            "s3:///a",
            "s3://-bucket",
            "s3://bucket/../other",
            "s3://bucket/a//b",
            "s3://user@host/a",
            "s3://bucket?x",
            "S3://bucket",
            "https://bucket",
        ] {
            assert!(text.parse::<S3Url>().is_err(), "{text}");
        }
    }
}
