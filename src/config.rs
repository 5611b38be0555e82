//! Every option, grouped. Each flag is also an environment variable (`PROMPTWEAVE_…`) and a line of `--help`. If a
//! number can be too low or too high, its text says what happens then.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{ArgAction, Args, ValueEnum};
use object_store::aws::AmazonS3Builder;
use secrecy::{ExposeSecret, SecretString};
use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;
use url::Url;

use crate::blobs::BlobStore;
use crate::db;
use crate::db::PoolSettings;
use crate::remote::client::Client;
use crate::remote::network::{Network, Opening};
use crate::remote::s3::S3Url;
use crate::remote::sources::Sources;
use crate::remote::uri::{AllowedUris, SourceUri};
use promptweave_domain::precision::Precision;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    #[default]
    Pretty,
    Json,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Logging")]
pub struct LogOptions {
    /// What to log, by module and level: `debug`, `info,sqlx=warn`, …
    #[arg(long, global = true, env = "PROMPTWEAVE_LOG", default_value = "info")]
    pub log: String,
    /// Log format: `pretty` for people, `json` for machines. The log always goes to stderr.
    #[arg(
        long,
        global = true,
        env = "PROMPTWEAVE_LOG_FORMAT",
        default_value = "pretty"
    )]
    pub log_format: LogFormat,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Database")]
pub struct DatabaseOptions {
    /// URL of the database, `postgres://user:password@host/database`; PostgreSQL 15 or newer.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: SecretString,
    #[command(flatten)]
    pub pool: PoolOptions,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Database")]
pub struct PoolOptions {
    /// The most database connections held open. Too low: requests wait for one another (503 after `--database-wait-s`).
    /// Too high: several servers together exceed PostgreSQL's `max_connections`.
    #[arg(long, env = "PROMPTWEAVE_DATABASE_CONNECTIONS", default_value_t = 10)]
    pub database_connections: u32,
    /// Seconds that a request waits for a database connection before it is answered 503. Too low: a short peak fails
    /// requests. Too high: clients hang while the database is gone.
    #[arg(long, env = "PROMPTWEAVE_DATABASE_WAIT_S", default_value_t = 3)]
    pub database_wait_s: u64,
}

impl DatabaseOptions {
    /// A pool that connects on first use.
    pub fn pool(&self) -> anyhow::Result<PgPool> {
        self.pool_with(&self.pool.settings())
    }

    /// The pool of a worker. Its transactions are short and so is their time limit: a worker that freezes inside one
    /// must not keep its job from being reaped for much longer than its lease.
    pub fn worker_pool(&self) -> anyhow::Result<PgPool> {
        self.pool_with(&PoolSettings {
            idle_in_transaction_timeout: Duration::from_secs(5),
            ..self.pool.settings()
        })
    }

    fn pool_with(&self, settings: &PoolSettings) -> anyhow::Result<PgPool> {
        let options: PgConnectOptions = self
            .database_url
            .expose_secret()
            .parse()
            .context("DATABASE_URL is not a postgres:// URL")?;
        Ok(db::pool(options, settings))
    }
}

impl PoolOptions {
    pub fn settings(&self) -> PoolSettings {
        PoolSettings {
            max_connections: self.database_connections.max(2),
            acquire_timeout: Duration::from_secs(self.database_wait_s),
            ..PoolSettings::default()
        }
    }
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Storage")]
pub struct StorageOptions {
    /// Directory for files: the blob store (`blobs/`, unless `--blob-store` is given), a worker's caches (`cache/` of
    /// inputs, `results/`) and, for `up`, the private database (`postgres/`) and a key to its API (`api-key`). Server
    /// and workers share the blob store. Default: `/var/lib/promptweave` as root, else `$XDG_DATA_HOME/promptweave`.
    #[arg(long, env = "PROMPTWEAVE_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Keep the blob store in S3, as `s3://bucket/prefix`, so that server and workers need no shared directory.
    /// Endpoint, region and credentials come from the environment, under AWS's names (`AWS_ENDPOINT_URL`, `AWS_REGION`,
    /// `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, …).
    #[arg(long, env = "PROMPTWEAVE_BLOB_STORE", value_name = "URL")]
    pub blob_store: Option<S3Url>,
    /// Addresses (`10.1.0.0/16`), or a host with its port (`minio.internal:9000`), that connections may go to besides
    /// public addresses: for example your own S3, or a receiver of webhooks. May be given several times (`,` between
    /// them in the environment).
    #[arg(
        long,
        env = "PROMPTWEAVE_ALLOW_NETWORK",
        value_name = "CIDR|HOST:PORT",
        value_delimiter = ','
    )]
    pub allow_network: Vec<Opening>,
}

/// How long files are kept.
#[derive(Clone, Debug, Args)]
pub struct RetentionOptions {
    /// Hours for which a file that nothing refers to is kept. Too low: an upload that takes longer fails. Too high:
    /// interrupted uploads take space.
    #[arg(long, env = "PROMPTWEAVE_GC_GRACE_HOURS", default_value_t = 24,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub gc_grace_hours: u32,
    /// Days for which an ensemble's statistics are kept after it ended; so long it can be solved again. Default: for
    /// ever.
    #[arg(long, env = "PROMPTWEAVE_STATISTICS_DAYS")]
    pub statistics_days: Option<u32>,
}

impl StorageOptions {
    /// The store of large files.
    pub fn blobs(&self) -> anyhow::Result<BlobStore> {
        let Some(url) = &self.blob_store else {
            return Ok(BlobStore::directory(&self.blob_dir())?);
        };
        let store = url
            .open(self.client()?)
            .with_context(|| format!("--blob-store {url} cannot be used"))?;
        Ok(BlobStore::over(store))
    }

    fn client(&self) -> anyhow::Result<Client> {
        Client::new(self.network()).context("cannot set up HTTP")
    }

    /// The addresses that connections may go to.
    pub fn network(&self) -> Network {
        self.allow_network.iter().cloned().collect()
    }

    pub fn data_dir(&self) -> PathBuf {
        if let Some(dir) = &self.data_dir {
            return dir.clone();
        }
        if rustix::process::geteuid().is_root() {
            return "/var/lib/promptweave".into();
        }
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
        std::env::var_os("XDG_DATA_HOME")
            .filter(|dir| !dir.is_empty())
            .map_or_else(|| home().join(".local/share"), PathBuf::from)
            .join("promptweave")
    }

    /// The blob store's directory (unless it is in S3).
    pub fn blob_dir(&self) -> PathBuf {
        self.data_dir().join("blobs")
    }

    /// The file with the API key that `up` keeps for its user.
    pub fn key_file(&self) -> PathBuf {
        self.data_dir().join("api-key")
    }

    /// The directory for unfinished packs.
    pub fn scratch_dir(&self) -> PathBuf {
        self.data_dir().join("scratch")
    }

    /// The directory of files that a worker fetched, by digest; it is safe to delete while no worker runs.
    pub fn cache_dir(&self) -> PathBuf {
        self.data_dir().join("cache")
    }
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "HTTP")]
pub struct HttpOptions {
    /// Address to listen on; port 0 takes a free one. The server has no TLS: put it behind a proxy that has, if others
    /// can reach it, or keys travel in the clear.
    #[arg(long, env = "PROMPTWEAVE_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Require no keys: everyone who reaches the server may do everything in the default project. Only for trying
    /// things out; refused on an address that others can reach.
    #[arg(long, env = "PROMPTWEAVE_NO_AUTH")]
    pub no_auth: bool,
    /// Requests per second that each API key, and each address without a key, may make in the long run (0.5 is one
    /// every two seconds); more are answered 429. 0, the default, sets no limit. Too low: honest scripts wait. Too
    /// high: one client slows down the others.
    #[arg(long, env = "PROMPTWEAVE_RATE_LIMIT", default_value_t = 0.0)]
    pub rate_limit: f64,
    /// Requests that a client may make at once after a pause, if `--rate-limit` is set. Too low: clients that work in
    /// parallel are refused. Too high: the limit takes effect late.
    #[arg(long, env = "PROMPTWEAVE_RATE_BURST", default_value = "100")]
    pub rate_burst: NonZeroU32,
    /// A directory whose sub-directories may be registered as datasets; may be given several times
    /// (`:` between them in the environment). Without one, no dataset can be registered.
    #[arg(
        long,
        env = "PROMPTWEAVE_DATASET_ROOT",
        value_name = "DIR",
        value_delimiter = ':'
    )]
    pub dataset_root: Vec<PathBuf>,
    /// A directory whose sub-directories may be registered as backbones; may be given several times (`:` between them
    /// in the environment). Without one, no backbone can be registered from a directory.
    #[arg(
        long,
        env = "PROMPTWEAVE_BACKBONE_ROOT",
        value_name = "DIR",
        value_delimiter = ':'
    )]
    pub backbone_root: Vec<PathBuf>,
    /// What datasets and backbones may be fetched from: `https://host/path`, `s3://bucket/prefix`, `hf://datasets/org`
    /// or `hf://org/name`, and everything below it. May be given several times (`,` between them in the environment).
    /// Without one, nothing is fetched. S3 is reached with the settings of `--blob-store`.
    #[arg(
        long,
        env = "PROMPTWEAVE_ALLOW_URI",
        value_name = "URI",
        value_delimiter = ','
    )]
    pub allow_uri: Vec<SourceUri>,
    /// URL of the Hugging Face Hub that `hf://` means.
    #[arg(
        long,
        env = "PROMPTWEAVE_HUB",
        value_name = "URL",
        default_value = "https://huggingface.co"
    )]
    pub hub: Url,
    /// Token for that Hub, for repositories that are not public.
    #[arg(
        long,
        env = "PROMPTWEAVE_HUB_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true
    )]
    pub hub_token: Option<SecretString>,
    /// Largest request body in MiB; a larger one is answered 413. Too low: prompts with many tokens are refused. Too
    /// high: a few uploads at once fill the memory.
    #[arg(long, env = "PROMPTWEAVE_MAX_BODY_MIB", default_value_t = 64)]
    pub max_body_mib: usize,
    /// Largest uploaded dataset in MiB, both as sent and as unpacked; a larger one is answered 413. While it is read,
    /// it takes up to three times its size on disk. Too low: datasets are refused. Too high: a few of them at once fill
    /// the disk.
    #[arg(long, env = "PROMPTWEAVE_MAX_DATASET_MIB", default_value_t = 8192)]
    pub max_dataset_mib: u64,
    /// The most jobs that may wait for a worker; more are answered 429. Too low: bursts are refused. Too high: clients
    /// learn late that the workers cannot keep up.
    #[arg(long, env = "PROMPTWEAVE_MAX_QUEUED", default_value_t = 10_000,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub max_queued: u32,
    /// The longest that `?wait=` of a job waits, in seconds; keep it below `--request-timeout-s`. Too low: clients ask
    /// more often. Too high: more requests are open at once.
    #[arg(long, env = "PROMPTWEAVE_MAX_WAIT_S", default_value_t = 60)]
    pub max_wait_s: u64,
    /// Seconds until an unanswered request ends with 503. Too low: a large dataset cannot be registered. Too high:
    /// stuck requests pile up.
    #[arg(long, env = "PROMPTWEAVE_REQUEST_TIMEOUT_S", default_value_t = 300)]
    pub request_timeout_s: u64,
}

impl HttpOptions {
    pub fn validate(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            !self.no_auth || self.listen.ip().is_loopback(),
            "--no-auth lets in everyone who reaches --listen {}, and that is more than this \
             machine; listen on 127.0.0.1, or leave --no-auth out and use API keys",
            self.listen
        );
        anyhow::ensure!(
            self.max_wait_s < self.request_timeout_s,
            "--max-wait-s {} is not below --request-timeout-s {}: who waits would be answered 503",
            self.max_wait_s,
            self.request_timeout_s
        );
        anyhow::ensure!(
            self.max_body_mib > 0,
            "--max-body-mib 0 would refuse every upload"
        );
        anyhow::ensure!(
            (1..=1 << 30).contains(&self.max_dataset_mib),
            "--max-dataset-mib {}: at least 1, at most 2^30",
            self.max_dataset_mib
        );
        anyhow::ensure!(
            self.request_timeout_s > 0,
            "--request-timeout-s 0 would end every request"
        );
        anyhow::ensure!(
            self.rate_limit == 0.0 || (0.001..=1e6).contains(&self.rate_limit),
            "--rate-limit {} is to lie between 0.001 and 1000000 requests a second, or be 0",
            self.rate_limit
        );
        for (option, roots) in [
            ("--dataset-root", &self.dataset_root),
            ("--backbone-root", &self.backbone_root),
        ] {
            for root in roots {
                anyhow::ensure!(
                    root.is_dir(),
                    "{option} {}: no such directory",
                    root.display()
                );
            }
        }
        Ok(())
    }

    /// The allowed sources of fetches; None if nothing is allowed.
    pub fn sources(&self, storage: &StorageOptions) -> anyhow::Result<Option<Sources>> {
        if self.allow_uri.is_empty() {
            return Ok(None);
        }
        let token = self.hub_token.as_ref().map(ExposeSecret::expose_secret);
        Ok(Some(Sources::new(
            AllowedUris::new(self.allow_uri.clone()),
            storage.client()?,
            self.hub.clone(),
            token,
            AmazonS3Builder::from_env(),
        )))
    }

    pub fn request_timeout(&self) -> Duration {
        Duration::from_secs(self.request_timeout_s)
    }
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Queue")]
pub struct QueueOptions {
    /// Seconds for which a worker owns a job without renewing its lease. Too low: a busy machine loses jobs that it is
    /// working on. Too high: a dead worker's job waits that long.
    #[arg(long, env = "PROMPTWEAVE_LEASE_S", default_value_t = 30)]
    pub lease_s: u32,
    /// Seconds without progress after which an attempt is given up. Too low: a slow step (a large backbone on few
    /// cores) is mistaken for a stall. Too high: a hung device goes unnoticed. The whole job has no limit, because
    /// honest jobs take hours on a CPU.
    #[arg(long, env = "PROMPTWEAVE_STALL_TIMEOUT_S", default_value_t = 600)]
    pub stall_timeout_s: u32,
    /// Size of a part of a job that is worth sharing with idle workers, in images times sources. A job of twice the
    /// size is cut into two parts, one of sixteen times or more into sixteen. Too low: small jobs spend their time on
    /// storing parts. Too high: machines stay idle beside a long job, and a crash loses more of it. 0 shares nothing,
    /// except the gradients of a job that may stop early (`early_stopping`).
    #[arg(long, env = "PROMPTWEAVE_MIN_SHARD_PAIRS", default_value_t = 2000)]
    pub min_shard_pairs: u64,
}

impl QueueOptions {
    pub fn validate(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.lease_s >= 1,
            "--lease-s 0: a lease must last at least 1 s"
        );
        anyhow::ensure!(
            self.stall_timeout_s >= self.lease_s,
            "--stall-timeout-s {} is shorter than --lease-s {}",
            self.stall_timeout_s,
            self.lease_s
        );
        Ok(())
    }

    pub fn lease(&self) -> Duration {
        Duration::from_secs(self.lease_s.into())
    }

    pub fn stall(&self) -> Duration {
        Duration::from_secs(self.stall_timeout_s.into())
    }
}

/// The cache of each source prompt's results between compositions.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Cache")]
pub struct CacheOptions {
    /// GiB of single prompts' features and gradients to keep between compositions (`results/` in the data directory);
    /// the least recently used go first, and 0 keeps none. Too low: an ensemble with one more source computes all of them again (the gradients of a
    /// prompt of 50 tokens on 2,000 samples take 0.3 GiB). Too high: the disk fills up.
    #[arg(long, env = "PROMPTWEAVE_CACHE_GIB", default_value_t = 20)]
    pub cache_gib: u32,
    /// Whether to keep gradients beside features. Gradients are larger by the number of a prompt's tokens. Without
    /// them, adding a source computes the gradients of all the others again.
    #[arg(
        long,
        env = "PROMPTWEAVE_CACHE_GRADIENTS",
        value_name = "BOOL",
        default_value_t = true,
        action = ArgAction::Set
    )]
    pub cache_gradients: bool,
}

impl CacheOptions {
    pub fn max_bytes(&self) -> u64 {
        u64::from(self.cache_gib) << 30
    }
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Worker")]
pub struct WorkerOptions {
    /// Device to compute on: `auto` (all GPUs there are, or the CPU), `cpu`, `cuda:N`, or several GPUs as
    /// `cuda:0,cuda:1`.
    #[arg(long, env = "PROMPTWEAVE_DEVICE", default_value = "auto")]
    pub device: String,
    /// Folder with libtorch_cuda.so: `torch/lib` of PyTorch 2.11.0 for CUDA. Default: the folder of libtorch_cpu.so, if
    /// it has one.
    #[arg(long, env = "PROMPTWEAVE_LIBTORCH_CUDA", value_name = "DIR")]
    pub libtorch_cuda: Option<PathBuf>,
    /// CPU threads of the engine; 0 takes one per core. More threads than cores are slower. Results are bit-identical
    /// only for the same number.
    #[arg(long, env = "PROMPTWEAVE_THREADS", default_value_t = 0)]
    pub threads: usize,
    /// Precision of the backbone's matrix products: `f32` (on CUDA with TensorFloat-32), `bf16` or `f64`. bf16 is about
    /// twice as fast if the processor has it; docs/performance.md shows how much it changes the weights.
    #[arg(long, env = "PROMPTWEAVE_PRECISION", default_value_t)]
    pub precision: Precision,
    /// GiB of backbones that stay loaded on the device between jobs; the one in use always stays. Too low: jobs that
    /// alternate between backbones load them again, which takes seconds. Too high: the samples lack that memory.
    #[arg(long, env = "PROMPTWEAVE_BACKBONE_CACHE_GIB", default_value_t = 4)]
    pub backbone_cache_gib: u32,
    /// GiB of backbones and datasets kept on the worker's own disk (`cache/` in the data directory); the least recently
    /// used go first, and a running job's always stay. Too low: jobs fetch and unpack them again. Too high: the disk
    /// fills up.
    #[arg(long, env = "PROMPTWEAVE_INPUT_CACHE_GIB", default_value_t = 50)]
    pub input_cache_gib: u32,
    #[command(flatten)]
    pub cache: CacheOptions,
    #[command(flatten)]
    pub queue: QueueOptions,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Stopping")]
pub struct ShutdownOptions {
    /// Seconds between the first signal and a hard stop. Too low: requests are cut off. Too high: a supervisor that
    /// waits less kills the process first.
    #[arg(long, env = "PROMPTWEAVE_GRACE_S", default_value_t = 20)]
    pub grace_s: u64,
}

impl ShutdownOptions {
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.grace_s)
    }
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Private database")]
pub struct PrivatePostgresOptions {
    /// Directory of `initdb` and `postgres`, version 15 or newer. Default: the newest of `/usr/lib/postgresql/*/bin`
    /// and PATH.
    #[arg(long, env = "PROMPTWEAVE_POSTGRES_BIN", value_name = "DIR")]
    pub postgres_bin: Option<PathBuf>,
}
