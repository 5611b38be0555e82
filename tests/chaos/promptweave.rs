//! promptweave as `make chaos` runs it: the roles that need a database, with failpoints in their code, and a worker
//! whose engine computes nothing. It is a program of its own, so that it cannot be mistaken for the real one.

#[path = "../it/composition.rs"]
mod composition;
mod engine;

use promptweave_domain::error_chain::chain;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use promptweave::cli::{KeysArgs, ServeArgs, WorkerArgs};
use promptweave::config::{DatabaseOptions, LogOptions};
use promptweave::{keys, roles, telemetry};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogOptions,
}

#[derive(Subcommand)]
enum Command {
    Serve(ServeArgs),
    Worker(PretendingArgs),
    Migrate(DatabaseOptions),
    Keys(KeysArgs),
}

#[derive(Args)]
struct PretendingArgs {
    #[command(flatten)]
    worker: WorkerArgs,
    /// Milliseconds that a composition takes.
    #[arg(long, default_value_t = 1000)]
    compose_ms: u64,
    /// Share compositions with other workers.
    #[arg(long)]
    shared: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match telemetry::init(&cli.log) {
        Ok(()) => run(cli.command).await,
        Err(error) => Err(error),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => roles::serve(args).await,
        Command::Worker(args) => {
            let engine = engine::factory(Duration::from_millis(args.compose_ms), args.shared);
            roles::worker(args.worker, engine).await
        }
        Command::Migrate(options) => roles::migrate(options).await,
        Command::Keys(args) => keys::run(args).await,
    }
}
