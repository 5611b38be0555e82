//! The roles that need a database: `serve`, `worker`, `migrate`. Each reads its options, builds what it needs and runs
//! until it is told to stop.

use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use sqlx::PgPool;
use tokio::net::TcpListener;

use crate::cli::{ServeArgs, WorkerArgs};
use crate::config::{DatabaseOptions, HttpOptions, RetentionOptions, StorageOptions};
use crate::db::MIGRATOR;
use crate::gc;
use crate::http::rate_limit::RateLimit;
use crate::http::{AppState, HttpSettings, router};
use crate::jobs::reaper;
use crate::jobs::watch::JobWatch;
use crate::registry::roots::AllowedRoots;
use crate::remote::client::Client;
use crate::shutdown::Shutdown;
use crate::webhooks::deliverer;
use crate::worker;
use crate::worker::composer_thread::NewComposer;
use crate::worker::{SEEN_EVERY, WorkerSettings};
use promptweave_domain::clock::{SystemClock, new_id};

/// Runs `promptweave serve`.
pub async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    args.http.validate()?;
    let shutdown = Shutdown::on_signals(args.shutdown.grace())?;
    let pool = args.database.pool()?;
    let state = app_state(&args.http, &args.storage, pool, &shutdown)?;
    serve_until(bind(&args.http).await?, state, args.retention, &shutdown).await
}

/// Runs `promptweave worker` with the given engine.
pub async fn worker(args: WorkerArgs, new_composer: NewComposer) -> anyhow::Result<()> {
    args.worker.queue.validate()?;
    let shutdown = Shutdown::on_signals(args.shutdown.grace())?;
    if args.stop_with_stdin {
        stop_with_stdin(shutdown.clone());
    }
    let settings = WorkerSettings {
        id: args.id.unwrap_or_else(new_id),
        device: args.worker.device.clone(),
        seen_every: SEEN_EVERY,
        lease: args.worker.queue.lease(),
        stall: args.worker.queue.stall(),
        min_shard_pairs: args.worker.queue.min_shard_pairs,
        cache_dir: args.storage.cache_dir(),
        cache_bytes: u64::from(args.worker.input_cache_gib) << 30,
    };
    let blobs = args.storage.blobs()?;
    worker::run(
        settings,
        args.database.worker_pool()?,
        blobs,
        new_composer,
        shutdown,
    )
    .await?;
    Ok(())
}

/// Runs `promptweave migrate`.
pub async fn migrate(options: DatabaseOptions) -> anyhow::Result<()> {
    let pool = options.pool()?;
    MIGRATOR
        .run(&pool)
        .await
        .context("the database cannot be brought up to date")?;
    tracing::info!("the database is up to date");
    Ok(())
}

/// The state that the API's handlers share.
pub(crate) fn app_state(
    http: &HttpOptions,
    storage: &StorageOptions,
    pool: PgPool,
    shutdown: &Shutdown,
) -> anyhow::Result<AppState> {
    let scratch_dir = storage.scratch_dir();
    std::fs::create_dir_all(&scratch_dir)
        .with_context(|| format!("cannot make `{}`", scratch_dir.display()))?;
    let settings = HttpSettings {
        max_upload_bytes: http.max_body_mib << 20,
        max_dataset_bytes: http.max_dataset_mib << 20,
        request_timeout: http.request_timeout(),
        max_queued: http.max_queued,
        max_wait: Duration::from_secs(http.max_wait_s),
        authentication: !http.no_auth,
        rate_limit: (http.rate_limit > 0.0).then_some(RateLimit {
            per_second: http.rate_limit,
            burst: http.rate_burst,
        }),
        dataset_roots: AllowedRoots::new(http.dataset_root.clone()),
        backbone_roots: AllowedRoots::new(http.backbone_root.clone()),
        sources: http.sources(storage)?,
        network: storage.network(),
        scratch_dir,
    };
    Ok(AppState {
        watch: JobWatch::new(pool.clone(), shutdown.soft.clone()),
        pool,
        blobs: storage.blobs()?,
        clock: Arc::new(SystemClock),
        settings: Arc::new(settings),
    })
}

pub(crate) async fn bind(http: &HttpOptions) -> anyhow::Result<TcpListener> {
    TcpListener::bind(http.listen).await.with_context(|| {
        format!(
            "cannot listen on {}; name another address with --listen",
            http.listen
        )
    })
}

/// Answers requests, reaps, delivers webhook messages and collects garbage until told to stop.
pub(crate) async fn serve_until(
    listener: TcpListener,
    state: AppState,
    retention: RetentionOptions,
    shutdown: &Shutdown,
) -> anyhow::Result<()> {
    // This one line tells people, and programs that asked for port 0, the actual address.
    println!(
        "promptweave is listening on http://{}",
        listener.local_addr()?
    );
    let reaper = tokio::spawn(reaper::run(state.pool.clone(), shutdown.soft.clone()));
    let client = Client::new(state.settings.network.clone()).context("cannot set up HTTP")?;
    let deliverer = deliverer::run(state.pool.clone(), client, shutdown.soft.clone());
    let deliverer = tokio::spawn(deliverer);
    let (pool, blobs) = (state.pool.clone(), state.blobs.clone());
    let collector = gc::run_daily(pool, blobs, retention, shutdown.soft.clone());
    let collector = tokio::spawn(collector);
    let service = router(state).into_make_service_with_connect_info::<SocketAddr>();
    let served = axum::serve(listener, service)
        .with_graceful_shutdown(shutdown.soft.clone().cancelled_owned());
    tokio::select! {
        served = served => served.context("the server failed")?,
        () = shutdown.hard.cancelled() => tracing::warn!("requests were cut off"),
    }
    reaper.await?;
    deliverer.await?;
    // The collector may be interrupted at any point.
    collector.abort();
    Ok(())
}

/// Shuts down when stdin ends, which happens when the process at the other end is gone, however it ended.
fn stop_with_stdin(shutdown: Shutdown) {
    thread::spawn(move || {
        let mut byte = [0];
        while matches!(std::io::stdin().read(&mut byte), Ok(1..)) {}
        tracing::info!("stopping with the process that started this one");
        shutdown.soft.cancel();
    });
}
