//! Outgoing connections: where they may lead, and the limits of redirects and sizes.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Path;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Redirect;
use axum::routing::get;
use futures::StreamExt as _;
use promptweave::remote::client::{Client, Limits, RemoteError};
use promptweave::remote::network::Network;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::net::TcpListener;
use url::Url;

/// A resolver that answers each lookup with the next of these; the last one stays.
pub struct Names {
    answers: Mutex<VecDeque<Vec<IpAddr>>>,
    lookups: AtomicUsize,
}

impl Names {
    pub fn new(answers: &[&[&str]]) -> Arc<Self> {
        let parse = |answer: &&[&str]| answer.iter().map(|ip| ip.parse().unwrap()).collect();
        Arc::new(Self {
            answers: Mutex::new(answers.iter().map(parse).collect()),
            lookups: AtomicUsize::new(0),
        })
    }
}

impl Resolve for Names {
    fn resolve(&self, _: Name) -> Resolving {
        self.lookups.fetch_add(1, Ordering::SeqCst);
        let mut answers = self.answers.lock().unwrap();
        let answer = answers.pop_front().unwrap();
        if answers.is_empty() {
            answers.push_back(answer.clone());
        }
        let found = answer.into_iter().map(|ip| SocketAddr::new(ip, 0));
        Box::pin(async { Ok(Box::new(found) as Addrs) })
    }
}

/// Serves a router until the test ends.
pub async fn serve(address: &str, router: Router) -> SocketAddr {
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async { axum::serve(listener, router).await.unwrap() });
    address
}

/// A router that says who answers and closes the connection, so that each request makes a new one.
fn greeter(words: &'static str) -> Router {
    let headers = [(header::CONNECTION, "close")];
    Router::new().route("/", get(move || async move { (headers, words) }))
}

pub fn network(openings: &[&str]) -> Network {
    let openings = openings.iter().map(|text| text.parse().unwrap());
    openings.collect()
}

const LIMITS: Limits = Limits {
    bytes: 1000,
    time: Duration::from_secs(5),
};

async fn fetch(client: &Client, url: &str, limits: Limits) -> Result<String, RemoteError> {
    let url = Url::parse(url).unwrap();
    let mut out = Vec::new();
    let size = client
        .download(&url, &HeaderMap::new(), limits, &mut out)
        .await?;
    assert_eq!(size, out.len() as u64);
    Ok(String::from_utf8(out).unwrap())
}

#[tokio::test]
async fn the_address_that_is_checked_is_the_one_connected_to() {
    let at = serve("127.0.0.1:0", greeter("public")).await;
    serve(&format!("127.0.0.2:{}", at.port()), greeter("secret")).await;
    let names = Names::new(&[
        &["127.0.0.1"],
        &["127.0.0.2"],
        &["127.0.0.2", "::1", "127.0.0.1"],
        &["10.0.0.1", "127.0.0.2", "::ffff:127.0.0.1", "fe80::1"],
    ]);
    // 127.0.0.1 stands for a public address, 127.0.0.2 for an internal one.
    let client = Client::with_names(network(&["127.0.0.1/32"]), names.clone()).unwrap();
    let url = format!("http://rebinding.test:{}/", at.port());

    assert_eq!(fetch(&client, &url, LIMITS).await.unwrap(), "public");
    assert_eq!(names.lookups.load(Ordering::SeqCst), 1);
    let error = fetch(&client, &url, LIMITS).await.unwrap_err();
    assert!(matches!(error, RemoteError::NotPublic(_)), "{error:?}");
    assert_eq!(error.to_string(), "`rebinding.test` has no public address");
    assert_eq!(fetch(&client, &url, LIMITS).await.unwrap(), "public");
    let error = fetch(&client, &url, LIMITS).await.unwrap_err();
    assert!(matches!(error, RemoteError::NotPublic(_)), "{error:?}");

    // Addresses in the URL itself are not looked up.
    let lookups = names.lookups.load(Ordering::SeqCst);
    for host in [
        "127.0.0.2",
        "2130706434",
        "0x7f.2",
        "[::1]",
        "[::ffff:127.0.0.1]",
    ] {
        let url = format!("http://{host}:{}/", at.port());
        let error = fetch(&client, &url, LIMITS).await.unwrap_err();
        assert!(
            matches!(error, RemoteError::NotPublic(_)),
            "{host}: {error:?}"
        );
    }
    assert_eq!(names.lookups.load(Ordering::SeqCst), lookups);
}

#[tokio::test]
async fn an_operator_opens_one_port_of_one_host() {
    let at = serve("127.0.0.1:0", greeter("inside")).await;
    let other = serve("127.0.0.1:0", greeter("secret")).await;
    let names = Names::new(&[&["127.0.0.1"]]);
    let opened = format!("minio.test:{}", at.port());
    let client = Client::with_names(network(&[&opened]), names).unwrap();
    let url = format!("http://{opened}/");
    assert_eq!(fetch(&client, &url, LIMITS).await.unwrap(), "inside");
    for closed in [
        format!("http://minio.test:{}/", other.port()),
        format!("http://other.test:{}/", at.port()),
        format!("http://{at}/"),
    ] {
        let error = fetch(&client, &closed, LIMITS).await.unwrap_err();
        assert!(
            matches!(error, RemoteError::NotPublic(_)),
            "{closed}: {error:?}"
        );
    }
    // This uses the machine's own resolver.
    let client = Client::new(Network::default()).unwrap();
    let url = format!("http://localhost:{}/", at.port());
    let error = fetch(&client, &url, LIMITS).await.unwrap_err();
    assert!(matches!(error, RemoteError::NotPublic(_)), "{error:?}");
}

#[tokio::test]
async fn redirects_are_followed_on_one_host_and_five_times() {
    let secret = serve("127.0.0.1:0", greeter("secret")).await;
    let hop = |Path(left): Path<u32>| async move {
        match left {
            0 => Err("here"),
            left => Ok(Redirect::temporary(&format!("/hop/{}", left - 1))),
        }
    };
    let away = move || async move { Redirect::permanent(&format!("http://{secret}/")) };
    let gone = || async { (StatusCode::GONE, "words of a stranger") };
    let router = Router::new()
        .route("/hop/{left}", get(hop))
        .route("/away", get(away))
        .route("/gone", get(gone));
    let at = serve("127.0.0.1:0", router).await;
    let client = Client::new(network(&["127.0.0.1/32"])).unwrap();
    let fetch = async |path: &str| fetch(&client, &format!("http://{at}{path}"), LIMITS).await;

    assert_eq!(fetch("/hop/5").await.unwrap(), "here");
    let error = fetch("/hop/6").await.unwrap_err();
    assert!(matches!(error, RemoteError::Redirects(_)), "{error:?}");
    // Another port is another server, whether opened or not.
    let error = fetch("/away").await.unwrap_err();
    assert!(matches!(error, RemoteError::Redirect { .. }), "{error:?}");
    let error = fetch("/gone").await.unwrap_err();
    assert_eq!(error.to_string(), "`127.0.0.1` answered 410 Gone");
}

#[tokio::test]
async fn bytes_and_time_are_bounded() {
    let endless = || async {
        let piece = || async { Ok::<_, std::io::Error>(Bytes::from_static(&[b'x'; 100])) };
        Body::from_stream(futures::stream::repeat_with(piece).then(|piece| piece))
    };
    let stalled = || async {
        let start = futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"x"))]);
        Body::from_stream(start.chain(futures::stream::pending()))
    };
    let router = Router::new()
        .route("/said", get(|| async { "x".repeat(1001) }))
        .route("/fits", get(|| async { "x".repeat(1000) }))
        .route("/endless", get(endless))
        .route("/stalled", get(stalled))
        .route("/silent", get(std::future::pending::<&str>));
    let at = serve("127.0.0.1:0", router).await;
    let client = Client::new(network(&["127.0.0.0/8"])).unwrap();
    let fetch =
        async |path: &str, limits| fetch(&client, &format!("http://{at}{path}"), limits).await;

    assert_eq!(fetch("/fits", LIMITS).await.unwrap().len(), 1000);
    for path in ["/said", "/endless"] {
        let error = fetch(path, LIMITS).await.unwrap_err();
        assert!(
            matches!(error, RemoteError::TooLarge { limit: 1000, .. }),
            "{path}: {error:?}"
        );
    }
    let limits = Limits {
        time: Duration::from_millis(50),
        ..LIMITS
    };
    for path in ["/stalled", "/silent"] {
        let error = fetch(path, limits).await.unwrap_err();
        assert!(
            matches!(error, RemoteError::Timeout { .. }),
            "{path}: {error:?}"
        );
    }
    // A server without TLS is not spoken to in the clear.
    let url = Url::parse(&format!("https://{at}/fits")).unwrap();
    let error = client
        .get(&url, &HeaderMap::new(), LIMITS.time)
        .await
        .unwrap_err();
    assert!(matches!(error, RemoteError::Failed { .. }), "{error:?}");
}
