//! `promptweave up`: starts everything, and stops it in order.
//!
//! ```text
//! private database ─► migrations ─► API (this process) + one worker (a child)
//! ```
//! The worker is a separate process, because a CUDA fault or an out-of-memory kill must never take the API down. It
//! holds the other end of a pipe: when `up` is gone, even after `kill -9`, it stops.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use clap::ValueEnum;
use secrecy::ExposeSecret;
use sqlx::PgPool;
use tokio::process::Command;

use crate::cli::UpArgs;
use crate::config::{LogOptions, PoolOptions, WorkerOptions};
use crate::db::{MIGRATOR, pool};
use crate::keys;
use crate::private_postgres::PrivatePostgres;
use crate::remote::network::Opening;
use crate::roles::{app_state, bind, serve_until};
use crate::shutdown::Shutdown;
use crate::supervisor::Supervisor;

/// How long to wait for busy connections; after that they end with the database.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// Runs `promptweave up` with `promptweave worker` as its worker.
pub async fn run(args: UpArgs, log: &LogOptions) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut worker = Command::new(program);
    worker.args(["worker", "--stop-with-stdin"]);
    set_options(&mut worker, &args, log);
    let shutdown = Shutdown::on_signals(args.shutdown.grace())?;
    run_with(args, worker, shutdown).await
}

/// Passes the options of `up` on to the worker as environment variables.
fn set_options(worker: &mut Command, args: &UpArgs, log: &LogOptions) {
    let WorkerOptions {
        device,
        libtorch_cuda,
        threads,
        precision,
        backbone_cache_gib,
        input_cache_gib,
        cache,
        queue,
    } = &args.worker;
    let PoolOptions {
        database_connections,
        database_wait_s,
    } = &args.pool;
    if let Some(format) = log.log_format.to_possible_value() {
        worker.env("PROMPTWEAVE_LOG_FORMAT", format.get_name());
    }
    if let Some(url) = &args.storage.blob_store {
        worker.env("PROMPTWEAVE_BLOB_STORE", url.to_string());
    }
    if !args.storage.allow_network.is_empty() {
        let openings = args.storage.allow_network.iter().map(Opening::to_string);
        let openings: Vec<_> = openings.collect();
        worker.env("PROMPTWEAVE_ALLOW_NETWORK", openings.join(","));
    }
    if let Some(dir) = libtorch_cuda {
        worker.env("PROMPTWEAVE_LIBTORCH_CUDA", dir);
    }
    worker
        .env("PROMPTWEAVE_LOG", &log.log)
        .env(
            "PROMPTWEAVE_DATABASE_CONNECTIONS",
            database_connections.to_string(),
        )
        .env("PROMPTWEAVE_DATABASE_WAIT_S", database_wait_s.to_string())
        .env("PROMPTWEAVE_DATA_DIR", args.storage.data_dir())
        .env("PROMPTWEAVE_DEVICE", device)
        .env("PROMPTWEAVE_THREADS", threads.to_string())
        .env("PROMPTWEAVE_PRECISION", precision.name())
        .env(
            "PROMPTWEAVE_BACKBONE_CACHE_GIB",
            backbone_cache_gib.to_string(),
        )
        .env("PROMPTWEAVE_INPUT_CACHE_GIB", input_cache_gib.to_string())
        .env("PROMPTWEAVE_CACHE_GIB", cache.cache_gib.to_string())
        .env(
            "PROMPTWEAVE_CACHE_GRADIENTS",
            cache.cache_gradients.to_string(),
        )
        .env("PROMPTWEAVE_LEASE_S", queue.lease_s.to_string())
        .env(
            "PROMPTWEAVE_STALL_TIMEOUT_S",
            queue.stall_timeout_s.to_string(),
        )
        .env(
            "PROMPTWEAVE_MIN_SHARD_PAIRS",
            queue.min_shard_pairs.to_string(),
        )
        .env("PROMPTWEAVE_GRACE_S", args.shutdown.grace_s.to_string());
}

/// Like [`run`], with any worker program; it finds the database in `DATABASE_URL`.
pub async fn run_with(args: UpArgs, mut worker: Command, shutdown: Shutdown) -> anyhow::Result<()> {
    args.http.validate()?;
    args.worker.queue.validate()?;
    // This comes first, because it fails most often and costs nothing.
    let listener = bind(&args.http).await?;
    let data_dir = args.storage.data_dir();
    let start = PrivatePostgres::start(&data_dir, args.postgres.postgres_bin.as_deref());
    let mut postgres = match shutdown.soft.run_until_cancelled(start).await {
        Some(started) => started.context("cannot start the private database")?,
        None => return Ok(()),
    };
    let pool = pool(postgres.url().parse()?, &args.pool.settings());
    MIGRATOR
        .run(&pool)
        .await
        .context("the private database cannot be brought up to date")?;
    let state = app_state(&args.http, &args.storage, pool.clone(), &shutdown)?;
    if !args.http.no_auth {
        tell_key(&pool, &args.storage.key_file()).await?;
    }
    if let Ok(address) = listener.local_addr() {
        tracing::info!(
            data_dir = %data_dir.display(),
            "the API's description is at http://{address}/docs"
        );
    }
    worker.env("DATABASE_URL", postgres.url());
    let supervisor = Supervisor {
        program: worker,
        pool: pool.clone(),
        device: args.worker.device.clone(),
        shutdown: shutdown.clone(),
    };
    let supervised = tokio::spawn(supervisor.run());

    let served = tokio::select! {
        served = serve_until(listener, state, args.retention.clone(), &shutdown) => served,
        status = postgres.exited() => {
            let status = status?;
            Err(anyhow::anyhow!("the private database has ended by itself ({status})"))
        }
    };
    shutdown.soft.cancel();
    supervised.await?;
    if tokio::time::timeout(CLOSE_TIMEOUT, pool.close())
        .await
        .is_err()
    {
        tracing::warn!("connections to the database are cut off");
    }
    postgres
        .stop()
        .await
        .context("the private database did not stop")?;
    served
}

/// Prints where the user finds an API key, and the key itself if it is new.
async fn tell_key(pool: &PgPool, file: &Path) -> anyhow::Result<()> {
    let new = keys::keep(&mut *pool.acquire().await?, file).await?;
    println!("an API key with every scope is in {}", file.display());
    if let Some(key) = new {
        println!("it is new: {}", key.expose_secret());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Options {
        #[command(flatten)]
        up: UpArgs,
        #[command(flatten)]
        log: LogOptions,
    }

    #[test]
    fn the_worker_gets_the_options_of_up() {
        let given = Options::parse_from([
            "up",
            "--data-dir",
            "/data",
            "--blob-store",
            "s3://bucket/prefix",
            "--allow-network",
            "10.0.0.0/8",
            "--allow-network",
            "minio:9000",
            "--device",
            "cpu",
            "--libtorch-cuda",
            "/torch/lib",
            "--threads",
            "3",
            "--precision",
            "bf16",
            "--backbone-cache-gib",
            "8",
            "--input-cache-gib",
            "10",
            "--cache-gib",
            "9",
            "--cache-gradients",
            "false",
            "--lease-s",
            "5",
            "--stall-timeout-s",
            "50",
            "--min-shard-pairs",
            "70",
            "--grace-s",
            "4",
            "--database-connections",
            "6",
            "--database-wait-s",
            "7",
            "--log",
            "debug",
            "--log-format",
            "json",
        ]);
        let mut worker = Command::new("worker");
        set_options(&mut worker, &given.up, &given.log);
        let passed: BTreeMap<_, _> = worker
            .as_std()
            .get_envs()
            .filter_map(|(name, value)| Some((name.to_str()?, value?.to_str()?)))
            .collect();
        let expected = BTreeMap::from([
            ("PROMPTWEAVE_ALLOW_NETWORK", "10.0.0.0/8,minio:9000"),
            ("PROMPTWEAVE_BACKBONE_CACHE_GIB", "8"),
            ("PROMPTWEAVE_BLOB_STORE", "s3://bucket/prefix"),
            ("PROMPTWEAVE_CACHE_GIB", "9"),
            ("PROMPTWEAVE_CACHE_GRADIENTS", "false"),
            ("PROMPTWEAVE_DATABASE_CONNECTIONS", "6"),
            ("PROMPTWEAVE_DATABASE_WAIT_S", "7"),
            ("PROMPTWEAVE_DATA_DIR", "/data"),
            ("PROMPTWEAVE_DEVICE", "cpu"),
            ("PROMPTWEAVE_GRACE_S", "4"),
            ("PROMPTWEAVE_INPUT_CACHE_GIB", "10"),
            ("PROMPTWEAVE_LEASE_S", "5"),
            ("PROMPTWEAVE_LIBTORCH_CUDA", "/torch/lib"),
            ("PROMPTWEAVE_LOG", "debug"),
            ("PROMPTWEAVE_LOG_FORMAT", "json"),
            ("PROMPTWEAVE_PRECISION", "bf16"),
            ("PROMPTWEAVE_MIN_SHARD_PAIRS", "70"),
            ("PROMPTWEAVE_STALL_TIMEOUT_S", "50"),
            ("PROMPTWEAVE_THREADS", "3"),
        ]);
        assert_eq!(passed, expected);
    }
}
