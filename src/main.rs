use promptweave_domain::error_chain::chain;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use promptweave::cli::{Cli, Command};
use promptweave::http::openapi::openapi;
use promptweave::worker::WorkerError;
use promptweave::{client, gc, healthcheck, keys, plot, roles, telemetry};
#[cfg(feature = "torch")]
use promptweave::{offline, up, worker};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let is_client = matches!(cli.command, Command::Client(_));
    let outcome = telemetry::init(&cli.log).and_then(|()| dispatch(cli));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // On a terminal, this is the answer to a command, not a log record.
            eprintln!("error: {}", chain(error.as_ref()));
            match is_client {
                true => client::exit_status(&error).into(),
                false => match error.downcast_ref::<WorkerError>() {
                    Some(error) => error.exit_status().into(),
                    None => ExitCode::FAILURE,
                },
            }
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        #[cfg(feature = "torch")]
        Command::Up(args) => block_on(up::run(args, &cli.log)),
        Command::Serve(args) => block_on(roles::serve(args)),
        #[cfg(feature = "torch")]
        Command::Worker(args) => {
            let engine = worker::engine::factory(&args.worker, &args.storage);
            block_on(roles::worker(args, engine))
        }
        Command::Migrate(options) => block_on(roles::migrate(options)),
        Command::Keys(args) => block_on(keys::run(args)),
        Command::Client(command) => block_on(client::run(command)),
        Command::Gc(args) => block_on(gc::run(args)),
        Command::Openapi => {
            println!("{}", openapi().to_pretty_json()?);
            Ok(())
        }
        #[cfg(feature = "torch")]
        Command::Tune(args) => offline::tune::run(&args),
        #[cfg(feature = "torch")]
        Command::Compose(args) => offline::compose::run(&args),
        #[cfg(feature = "torch")]
        Command::Solve(args) => offline::solve::run(&args),
        #[cfg(feature = "torch")]
        Command::Rank(args) => offline::rank::run(&args),
        #[cfg(feature = "torch")]
        Command::Evaluate(args) => offline::evaluate::run(&args),
        #[cfg(feature = "torch")]
        Command::Predict(args) => offline::predict::run(&args),
        #[cfg(feature = "torch")]
        Command::Doctor(args) => offline::doctor::run(&args),
        Command::Healthcheck(args) => healthcheck::check(args.address, &args.path),
        Command::Plot(args) => {
            for path in plot::plot(&args.result, &args.out)? {
                println!("{}", path.display());
            }
            Ok(())
        }
    }
}

fn block_on(role: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let outcome = runtime.block_on(role);
    // Dropping the runtime would wait for blocking work (an unfinished pack, for example) however long that takes.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}
