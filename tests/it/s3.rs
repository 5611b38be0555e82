//! The blob store over the S3 protocol, with a test server (`s3s-fs`).

use std::net::SocketAddr;
use std::path::Path;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::aws::AmazonS3Builder;
use object_store::{ObjectStore, ObjectStoreExt as _};
use promptweave::blobs::{BlobError, BlobStore};
use promptweave::remote::client::Client;
use promptweave::remote::network::Network;
use promptweave::remote::s3::S3Url;
use promptweave_domain::digest::Digest;
use promptweave_domain::error_chain::chain;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use std::sync::Arc;
use tower::ServiceExt as _;

use crate::remote::{network, serve};

const KEY: &str = "an-access-key";
pub const SECRET: &str = "a-secret-key";

/// Serves buckets, which are the directories of `root`.
pub async fn server(root: &Path) -> SocketAddr {
    let files = s3s_fs::FileSystem::new(root).unwrap();
    let mut service = S3ServiceBuilder::new(files);
    service.set_auth(SimpleAuth::from_single(KEY, SECRET));
    let service = service.build();
    let answer = move |request: Request| {
        let service = service.clone();
        async move { service.oneshot(request).await.unwrap().map(Body::new) }
    };
    serve("127.0.0.1:0", Router::new().fallback(answer)).await
}

fn store(at: SocketAddr, secret: &str, network: Network) -> Arc<dyn ObjectStore> {
    let url: S3Url = "s3://bucket/some/prefix".parse().unwrap();
    url.open_with(builder(at, secret), Client::new(network).unwrap())
        .unwrap()
}

/// A builder of clients of the server at `at`.
pub fn builder(at: SocketAddr, secret: &str) -> AmazonS3Builder {
    AmazonS3Builder::new()
        .with_endpoint(format!("http://{at}"))
        .with_region("us-east-1")
        .with_access_key_id(KEY)
        .with_secret_access_key(secret)
        .with_allow_http(true)
}

#[tokio::test]
async fn blobs_are_kept_over_s3() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("bucket")).unwrap();
    let at = server(dir.path()).await;
    let store = store(at, SECRET, network(&[&at.to_string()]));
    let blobs = BlobStore::over(store.clone());

    let missing = Digest::of(b"never stored");
    assert!(!blobs.exists(&missing).await.unwrap());
    let error = blobs.get_bytes(&missing).await.unwrap_err();
    assert!(matches!(error, BlobError::Missing(d) if d == missing));

    let small = blobs.put_bytes("abc").await.unwrap();
    assert_eq!(blobs.put_bytes("abc").await.unwrap(), small);
    assert_eq!(blobs.get_bytes(&small.digest).await.unwrap(), "abc");
    let hex = small.digest.hex();
    let place = format!("bucket/some/prefix/sha256/{}/{hex}", &hex[..2]);
    assert_eq!(std::fs::read(dir.path().join(place)).unwrap(), b"abc");

    // This is a multipart upload in three parts.
    let source = dir.path().join("large");
    let bytes: Vec<u8> = (0..(16 << 20) + 5).map(|i: u32| (i % 251) as u8).collect();
    std::fs::write(&source, &bytes).unwrap();
    let large = blobs.put_file(&source).await.unwrap();
    assert_eq!(large.size, bytes.len() as u64);
    assert_eq!(blobs.put_file(&source).await.unwrap(), large);
    let copy = dir.path().join("copy");
    blobs.get_to_file(&large.digest, &copy).await.unwrap();
    assert!(std::fs::read(&copy).unwrap() == bytes);
    let (size, pieces) = blobs.stream(&large.digest).await.unwrap();
    let pieces: Vec<Bytes> = pieces.try_collect().await.unwrap();
    assert!(size == large.size && pieces.concat() == bytes);
    let hex = large.digest.hex();
    let key = format!("sha256/{}/{hex}", &hex[..2]).into();
    let range = store.get_range(&key, 1000..1300).await.unwrap();
    assert!(range[..] == bytes[1000..1300]);

    let empty = dir.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let empty = blobs.put_file(&empty).await.unwrap();
    assert_eq!(blobs.get_bytes(&empty.digest).await.unwrap(), "");

    // These bytes do not have their key's digest.
    let place = format!("bucket/some/prefix/sha256/{}/{hex}", &hex[..2]);
    std::fs::write(dir.path().join(place), "other").unwrap();
    let error = blobs.get_to_file(&large.digest, &copy).await.unwrap_err();
    assert!(matches!(error, BlobError::Corrupt { .. }), "{error:?}");
}

#[tokio::test]
async fn a_store_is_reached_with_its_key_and_where_the_operator_opened_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("bucket")).unwrap();
    let at = server(dir.path()).await;
    let closed = BlobStore::over(store(at, SECRET, Network::default()));
    let error = closed.put_bytes("abc").await.unwrap_err();
    assert!(chain(&error).contains("no public address"), "{error:?}");
    let opened = network(&[&at.to_string()]);
    let stranger = BlobStore::over(store(at, "another-secret", opened));
    stranger.put_bytes("abc").await.unwrap_err();
    assert_eq!(
        std::fs::read_dir(dir.path().join("bucket"))
            .unwrap()
            .count(),
        0
    );
}
