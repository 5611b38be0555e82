//! promptweave's side of `make bench-queue` (benches/bench_queue.py): workers without an engine. They take jobs from
//! the queue by the library's own functions, and store a made-up composition in the real transaction.
//!
//! It reads a plan as JSON from standard input and prints one line of JSON, as benches/queue_graphile.mjs and
//! benches/queue_procrastinate.py do.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use promptweave::blobs::BlobStore;
use promptweave::db;
use promptweave::db::PoolSettings;
use promptweave::jobs::finish::{Finished, NewPrompt, finish};
use promptweave::jobs::listener::WorkListener;
use promptweave::jobs::queue;
use promptweave::jobs::queue::Claimed;
use promptweave::jobs::workers;
use promptweave::jobs::workers::NewWorker;
use promptweave_domain::clock::new_id;
use promptweave_domain::composition::CompositionResult;
use promptweave_domain::digest::Digest;
use promptweave_domain::job::EnsembleSpec;
use promptweave_domain::prompt_file::{FORMAT, Origin, PromptFile, PromptMetadata};
use promptweave_domain::specification::JobSpec;
use promptweave_domain::tensor::Tensor;
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::sync::mpsc;
use uuid::Uuid;

type Error = Box<dyn std::error::Error + Send + Sync>;

const LEASE: Duration = Duration::from_secs(30);
/// The number of clients that fill the queue; they are not measured.
const FILLERS: usize = 16;
/// The time between two measured pickups, so that the worker waits again.
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Deserialize)]
struct Plan {
    database: String,
    url: String,
    authorization: String,
    /// Body of a POST; `{n}` in it is replaced by the number of the job.
    text: String,
    /// Number of the first job; no two jobs of one service have the same number.
    first: usize,
    blobs: PathBuf,
    /// Length of the sources' prompts, and so of the composed one.
    num_tokens: usize,
    #[serde(flatten)]
    measure: Measure,
}

#[derive(Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
enum Measure {
    /// Claim and complete so many jobs, which are queued before the clock starts.
    Complete { workers: usize, jobs: usize },
    /// Measure so often the time from just before a job is posted until an idle worker has it.
    Pickup { samples: usize },
}

struct Bench {
    plan: Plan,
    pool: PgPool,
    blobs: BlobStore,
    statistics: Digest,
    client: reqwest::Client,
}

impl Bench {
    async fn new(plan: Plan) -> Result<Self, Error> {
        let pool = db::pool(plan.database.parse()?, &PoolSettings::default());
        let blobs = BlobStore::directory(&plan.blobs)?;
        let statistics = blobs.put_bytes(&b"statistics"[..]).await?.digest;
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::new();
        Ok(Self {
            plan,
            pool,
            blobs,
            statistics,
            client,
        })
    }

    async fn post(&self, n: usize) -> Result<(), Error> {
        let request = self.client.post(&self.plan.url);
        let request = request.header("authorization", &self.plan.authorization);
        let request = request.header("content-type", "application/json");
        let number = (self.plan.first + n).to_string();
        let answer = request
            .body(self.plan.text.replace("{n}", &number))
            .send()
            .await?;
        // The status is 200 if a worker finished the job before the answer was written.
        if answer.status().is_success() {
            answer.bytes().await?;
            Ok(())
        } else {
            Err(format!("{}: {}", answer.status(), answer.text().await?).into())
        }
    }

    async fn register(&self) -> Result<Uuid, Error> {
        let id = new_id();
        let new = NewWorker {
            id,
            host: "bench",
            pid: std::process::id(),
            device: "none",
            ..NewWorker::default()
        };
        workers::register(&mut *self.pool.acquire().await?, &new).await?;
        Ok(id)
    }

    async fn claim(&self, worker: Uuid) -> Result<Option<Claimed>, Error> {
        Ok(queue::claim(&mut *self.pool.acquire().await?, worker, LEASE).await?)
    }

    /// Stores a result as a worker does, but not the statistics, which exist already.
    async fn complete(&self, claimed: &Claimed) -> Result<(), Error> {
        let composed = composed(claimed, self.plan.num_tokens);
        let file = PromptFile::parse(&composed)?;
        let spec = ensemble(claimed);
        let result = result(spec, &composed)?;
        let finished = Finished::Ensemble {
            spec,
            result: &result,
            composed: NewPrompt {
                bytes: &composed,
                metadata: file.metadata.as_ref().ok_or("no metadata")?,
                file: &file,
                output: &spec.output.parse()?,
            },
            ensemble: None,
            statistics: self.statistics,
        };
        let mut conn = self.pool.acquire().await?;
        Ok(finish(&mut conn, &self.blobs, claimed, finished).await?)
    }
}

fn ensemble(claimed: &Claimed) -> &EnsembleSpec {
    match &claimed.spec {
        JobSpec::Ensemble(spec) => spec,
        _ => unreachable!("only ensembles are posted"),
    }
}

/// A composed prompt for the claimed job; no two have the same bytes.
fn composed(claimed: &Claimed, num_tokens: usize) -> Vec<u8> {
    let spec = ensemble(claimed);
    let embed_dim = spec.backbone.config.embed_dim;
    let seed = spec.target.samples.seed as f32;
    let metadata = PromptMetadata {
        format: FORMAT,
        backbone_digest: Some(spec.backbone.digest),
        preprocessing_id: Some(spec.backbone.preprocessing_id.clone()),
        init_seed: None,
        task: None,
        classes: None,
        origin: Origin::Composed,
        training: None,
        sources: Vec::new(),
    };
    let file = PromptFile {
        metadata: Some(metadata),
        prompt_embeddings: Tensor::new([num_tokens, embed_dim], vec![seed; num_tokens * embed_dim]),
        deep_prompt_embeddings: None,
        head: None,
        sketch: None,
        dtype: "f32",
    };
    file.to_bytes()
}

/// A result of the usual size with meaningless numbers.
fn result(spec: &EnsembleSpec, composed: &[u8]) -> Result<CompositionResult, serde_json::Error> {
    let sources = &spec.sources;
    let weights = vec![1.0 / sources.len() as f64; sources.len()];
    let of_sources = |of: &dyn Fn(&str) -> Value| -> Value {
        sources.iter().map(|source| of(&source.prompt)).collect()
    };
    let source_weights: Value = sources
        .iter()
        .map(|source| {
            json!({"prompt": source.prompt, "version": source.version, "digest": source.digest,
                   "weight": weights[0], "standard_error": 0.01})
        })
        .collect();
    let point = |i| {
        json!({"trade_off": f64::from(i) / 20.0, "alignment_weight": 0.3, "h_score": 3.2,
               "gradient_alignment": 0.1, "weights": weights})
    };
    serde_json::from_value(json!({
        "source_weights": source_weights,
        "objective": {"h_score": 3.2, "h_score_adjusted": 0.4, "gradient_alignment": 0.1, "alignment_weight": 0.3,
                      "trade_off": 0.5, "total": -3.17},
        "pareto_path": (0..=20).map(point).collect::<Vec<_>>(),
        "local_optima": [{"weights": weights, "value": -0.9, "h_score": 3.2, "gradient_alignment": 0.1, "starts": 16}],
        "solver": {"starts": 16, "iterations": 40, "evaluations": 3000, "stop_reason": "converged"},
        "diagnostics": {
            "num_samples": 600, "num_classes": 7, "skipped_images": 0, "head_folds": 2, "h_score_shrinkage": 0.1,
            "per_source": of_sources(&|prompt| json!({"prompt": prompt, "h_score": 3.0, "head_temperature": 1.0,
                                                      "head_loss": 0.7, "gradient_rms": 0.02})),
            "conflict_rate": 0.0, "gradient_cosines": vec![&weights; sources.len()],
            "composed_score": {"h_score": 3.2, "train_accuracy": 0.9, "eval_accuracy": null},
            "surrogate_gap": 0.01, "baselines": null
        },
        "composed_prompt": {"prompt": null, "version": null, "digest": Digest::of(composed)},
        "provenance": {"backbone_digest": spec.backbone.digest, "preprocessing_id": spec.backbone.preprocessing_id,
                       "sample_digest": spec.target.digest, "seed": 0, "device": "none", "num_threads": 1,
                       "libtorch": "none", "version": "0"},
        "warnings": [],
        "timings": {"features": 1.0, "heads": 0.1, "gradients": 2.0, "solve": 0.1, "verify": 0.5}
    }))
}

// ---- Measurements --------------------------------------------------------------------------

async fn complete(bench: &Bench, workers: usize, jobs: usize) -> Result<Value, Error> {
    let next = AtomicUsize::new(0);
    let filling = (0..FILLERS).map(|_| async {
        loop {
            match next.fetch_add(1, Ordering::Relaxed) {
                n if n < jobs => bench.post(n).await?,
                _ => return Ok::<_, Error>(()),
            }
        }
    });
    try_join_all(filling).await?;
    let ids = try_join_all((0..workers).map(|_| bench.register())).await?;
    let started = Instant::now();
    let working = ids.into_iter().map(|id| async move {
        let mut done = 0;
        while let Some(claimed) = bench.claim(id).await? {
            bench.complete(&claimed).await?;
            done += 1;
        }
        Ok::<usize, Error>(done)
    });
    let done: usize = try_join_all(working).await?.into_iter().sum();
    let seconds = started.elapsed().as_secs_f64();
    if done != jobs {
        return Err(format!("{done} jobs were completed, not {jobs}").into());
    }
    Ok(json!({"per_second": done as f64 / seconds}))
}

async fn pickup(bench: Arc<Bench>, samples: usize) -> Result<Value, Error> {
    let (has, mut picked_up) = mpsc::unbounded_channel();
    let worker = tokio::spawn(wait_and_work(bench.clone(), has));
    let mut took = Vec::with_capacity(samples);
    for n in 0..=samples {
        tokio::time::sleep(PAUSE).await;
        let sent = Instant::now();
        let (posted, at) = tokio::join!(bench.post(n), picked_up.recv());
        posted?;
        let Some(at) = at else {
            return Err(worker.await?.err().unwrap_or("the worker ended".into()));
        };
        // The first job may find a worker that does not listen yet.
        if n > 0 {
            took.push((at - sent).as_secs_f64() * 1e3);
        }
    }
    tokio::time::sleep(PAUSE).await;
    worker.abort();
    Ok(json!({"took_ms": took}))
}

/// Waits and works as a worker's loop does.
async fn wait_and_work(
    bench: Arc<Bench>,
    has: mpsc::UnboundedSender<Instant>,
) -> Result<(), Error> {
    let id = bench.register().await?;
    let mut listener = WorkListener::new(bench.pool.clone());
    loop {
        match bench.claim(id).await? {
            Some(claimed) => {
                has.send(Instant::now())?;
                bench.complete(&claimed).await?;
            }
            None => listener.wait().await,
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    if text.is_empty() {
        // `cargo bench` starts this program without a plan.
        return Ok(());
    }
    let bench = Arc::new(Bench::new(serde_json::from_str(&text)?).await?);
    let report = match bench.plan.measure {
        Measure::Complete { workers, jobs } => complete(&bench, workers, jobs).await?,
        Measure::Pickup { samples } => pickup(bench, samples).await?,
    };
    println!("{report}");
    Ok(())
}
