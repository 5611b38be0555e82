//! The load of `make bench-api` (benches/bench_api.py): clients that repeat the same requests for a while, each sending
//! its next request as soon as its last one is answered.
//!
//! It reads a plan as JSON from standard input and prints one line of JSON. It is a Rust process of its own, so that on
//! two cores the load takes little from the service that it measures.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde::Deserialize;
use serde_json::json;

/// The steps that every client repeats in order, timed together.
#[derive(Deserialize)]
struct Plan {
    clients: usize,
    /// Whether a connection serves more than one request.
    keep_alive: bool,
    seconds: f64,
    authorization: Option<String>,
    steps: Vec<Step>,
    /// Number of the first round; no two rounds against one service have the same number.
    first: u64,
}

/// A request; `{n}` in its URL and its text is the number of the round.
#[derive(Clone, Deserialize)]
struct Step {
    method: String,
    url: String,
    content_type: Option<String>,
    text: Option<String>,
    /// A file to send as the body. Its last four bytes become the number of the round, so that no two bodies are the
    /// same.
    file: Option<String>,
}

async fn round(
    client: &reqwest::Client,
    plan: &Plan,
    files: &[Vec<u8>],
    n: u64,
) -> Result<(), String> {
    for (step, file) in plan.steps.iter().zip(files) {
        let fill = |text: &str| text.replace("{n}", &n.to_string());
        let method: Method = step.method.parse().expect("a method");
        let mut request = client.request(method, fill(&step.url));
        if let Some(value) = &plan.authorization {
            request = request.header("authorization", value);
        }
        if !plan.keep_alive {
            request = request.header("connection", "close");
        }
        if let Some(kind) = &step.content_type {
            request = request.header("content-type", kind);
        }
        if let Some(text) = &step.text {
            request = request.body(fill(text));
        } else if !file.is_empty() {
            let mut body = file.clone();
            let end = body.len() - 4;
            // Read as a float, this is tiny and finite.
            body[end..].copy_from_slice(&(n as u32 & 0x7f_ffff).to_le_bytes());
            request = request.body(body);
        }
        let answer = request.send().await.map_err(|error| format!("{error:?}"))?;
        let status = answer.status();
        let body = answer.bytes().await.map_err(|error| format!("{error:?}"))?;
        if !status.is_success() {
            return Err(format!(
                "{} {status}: {}",
                step.url,
                String::from_utf8_lossy(&body)
            ));
        }
    }
    Ok(())
}

async fn client(
    plan: Arc<Plan>,
    files: Arc<Vec<Vec<u8>>>,
    next: Arc<AtomicU64>,
    end: Instant,
) -> (Vec<f64>, Vec<String>) {
    let idle = if plan.keep_alive { 1 } else { 0 };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .pool_max_idle_per_host(idle)
        .timeout(Duration::from_secs(60))
        .build()
        .expect("a client");
    let (mut took, mut errors) = (Vec::new(), Vec::new());
    while Instant::now() < end {
        let n = next.fetch_add(1, Ordering::Relaxed);
        let started = Instant::now();
        match round(&client, &plan, &files, n).await {
            Ok(()) => took.push(started.elapsed().as_secs_f64()),
            Err(error) => errors.push(error),
        }
    }
    (took, errors)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    if text.is_empty() {
        // `cargo bench` starts this program without a plan.
        return Ok(());
    }
    let plan: Arc<Plan> = Arc::new(serde_json::from_str(&text)?);
    let read = |step: &Step| step.file.as_ref().map_or(Ok(Vec::new()), std::fs::read);
    let files = Arc::new(plan.steps.iter().map(read).collect::<Result<Vec<_>, _>>()?);
    let next = Arc::new(AtomicU64::new(plan.first));
    let started = Instant::now();
    let end = started + Duration::from_secs_f64(plan.seconds);
    let clients: Vec<_> = (0..plan.clients)
        .map(|_| tokio::spawn(client(plan.clone(), files.clone(), next.clone(), end)))
        .collect();
    let (mut took, mut errors) = (Vec::new(), Vec::new());
    for one in clients {
        let (more, failed) = one.await?;
        took.extend(more);
        errors.extend(failed);
    }
    let seconds = started.elapsed().as_secs_f64();
    took.sort_by(f64::total_cmp);
    let quantile = |q: f64| took.get((q * took.len() as f64) as usize).map(|s| s * 1e3);
    let report = json!({
        "per_second": took.len() as f64 / seconds,
        "p50_ms": quantile(0.5),
        "p95_ms": quantile(0.95),
        "rounds": took.len(),
        "errors": errors.len(),
        "error": errors.first(),
        "next": next.load(Ordering::Relaxed),
    });
    println!("{report}");
    Ok(())
}
