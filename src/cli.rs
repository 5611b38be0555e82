//! The command line: one binary whose roles are subcommands.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use uuid::Uuid;

use crate::config::{
    DatabaseOptions, HttpOptions, LogOptions, PoolOptions, PrivatePostgresOptions,
    RetentionOptions, ShutdownOptions, StorageOptions, WorkerOptions,
};
use promptweave_domain::api_key::{KeyName, Scope};
use promptweave_domain::reference::ResourceName;

/// A registry for visual prompts, with workers that learn which of them help a new task.
#[derive(Debug, Parser)]
#[command(name = "promptweave", version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub log: LogOptions,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run everything: a private database, the API and one worker.
    #[cfg(feature = "torch")]
    Up(UpArgs),
    /// Run the API against a database.
    Serve(ServeArgs),
    /// Run a worker against a database.
    #[cfg(feature = "torch")]
    Worker(WorkerArgs),
    /// Update a database's tables to this version.
    Migrate(DatabaseOptions),
    /// Create, list and revoke API keys directly in a database, for example the first key.
    Keys(KeysArgs),
    #[command(flatten)]
    Client(crate::client::Command),
    /// Delete files that nothing refers to, and statistics past their retention. A server does this once a day.
    Gc(GcArgs),
    /// Print the OpenAPI document.
    Openapi,
    /// Train one visual prompt on a labelled image set with a frozen backbone (VPT).
    #[cfg(feature = "torch")]
    Tune(crate::offline::tune::Args),
    /// Learn source weights for a target task from local files, and compose the prompt.
    #[cfg(feature = "torch")]
    Compose(crate::offline::compose::Args),
    /// Solve for source weights again from an earlier composition's statistics, without the backbone.
    #[cfg(feature = "torch")]
    Solve(crate::offline::solve::Args),
    /// Print every transferability metric of some prompts for a target task, in one table.
    #[cfg(feature = "torch")]
    Rank(crate::offline::rank::Args),
    /// Measure the accuracy of a prompt on a labelled image set with its closed-form head, or of an ensemble.
    #[cfg(feature = "torch")]
    Evaluate(crate::offline::evaluate::Args),
    /// Predict the classes of images with a prompt or an ensemble.
    #[cfg(feature = "torch")]
    Predict(crate::offline::predict::Args),
    /// Report what the engine finds here (libtorch, CUDA, driver, devices, memory, matrix rates), and what to do if
    /// something is missing.
    #[cfg(feature = "torch")]
    Doctor(crate::offline::doctor::Args),
    /// Ask a running server whether it is ready. For health checks of containers.
    Healthcheck(HealthcheckArgs),
    /// Draw a result's weights and its path of trade-offs.
    Plot(PlotArgs),
}

#[derive(Clone, Debug, Args)]
pub struct UpArgs {
    #[command(flatten)]
    pub http: HttpOptions,
    #[command(flatten)]
    pub storage: StorageOptions,
    #[command(flatten)]
    pub worker: WorkerOptions,
    #[command(flatten)]
    pub retention: RetentionOptions,
    #[command(flatten)]
    pub postgres: PrivatePostgresOptions,
    #[command(flatten)]
    pub pool: PoolOptions,
    #[command(flatten)]
    pub shutdown: ShutdownOptions,
}

#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub http: HttpOptions,
    #[command(flatten)]
    pub database: DatabaseOptions,
    #[command(flatten)]
    pub storage: StorageOptions,
    #[command(flatten)]
    pub retention: RetentionOptions,
    #[command(flatten)]
    pub shutdown: ShutdownOptions,
}

#[derive(Clone, Debug, Args)]
pub struct WorkerArgs {
    #[command(flatten)]
    pub worker: WorkerOptions,
    #[command(flatten)]
    pub database: DatabaseOptions,
    #[command(flatten)]
    pub storage: StorageOptions,
    #[command(flatten)]
    pub shutdown: ShutdownOptions,
    /// Id of the worker's row in `/v1/workers`, by which `up` recognises the worker that it started.
    #[arg(long, env = "PROMPTWEAVE_WORKER_ID", hide = true, value_name = "UUID")]
    pub id: Option<Uuid>,
    /// Stop when stdin ends, so that no worker outlives the `up` that started it.
    #[arg(long, hide = true)]
    pub stop_with_stdin: bool,
}

#[derive(Clone, Debug, Args)]
pub struct KeysArgs {
    #[command(flatten)]
    pub database: DatabaseOptions,
    #[command(subcommand)]
    pub command: KeysCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum KeysCommand {
    /// Create a key and print it; it cannot be shown again.
    Create {
        /// The key's scopes: `read`, `write`, `run`, `admin`, or several with `,` between them. No scope includes
        /// another.
        #[arg(long, required = true, value_delimiter = ',')]
        scope: Vec<Scope>,
        /// The project whose prompts, backbones, datasets and jobs the key opens.
        #[arg(long, default_value = "default")]
        project: ResourceName,
        /// Create the project if it does not exist.
        #[arg(long)]
        create_project: bool,
        /// What the key is for.
        #[arg(long, default_value = "made by promptweave keys create")]
        name: KeyName,
    },
    /// List a project's keys, newest first: id, state, scopes, name.
    List {
        #[arg(long, default_value = "default")]
        project: ResourceName,
    },
    /// Revoke a key, immediately and permanently.
    Revoke {
        /// The key's id, as `keys list` shows it. It is also the part of the key between `pr_` and the next `_`.
        id: Uuid,
        #[arg(long, default_value = "default")]
        project: ResourceName,
    },
}

#[derive(Clone, Debug, Args)]
pub struct GcArgs {
    #[command(flatten)]
    pub database: DatabaseOptions,
    #[command(flatten)]
    pub storage: StorageOptions,
    #[command(flatten)]
    pub retention: RetentionOptions,
    /// Only print how much would be deleted.
    #[arg(long, env = "PROMPTWEAVE_DRY_RUN")]
    pub dry_run: bool,
}

#[derive(Clone, Debug, Args)]
pub struct HealthcheckArgs {
    /// Address that the server listens on.
    #[arg(long, env = "PROMPTWEAVE_LISTEN", default_value = "127.0.0.1:8080")]
    pub address: SocketAddr,
    /// Path to request.
    #[arg(long, env = "PROMPTWEAVE_HEALTHCHECK_PATH", default_value = "/readyz")]
    pub path: String,
}

#[derive(Clone, Debug, Args)]
pub struct PlotArgs {
    /// The `result.json` of `promptweave compose`, or the result from the API.
    #[arg(value_name = "RESULT.json")]
    pub result: PathBuf,
    /// Folder for `weights.svg` and `pareto_path.svg`.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub out: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_every_option_has_a_variable() {
        let command = Cli::command();
        command.clone().debug_assert();
        // People type the options of these commands; the options of the others are configured by variables.
        let typed = [
            "tune", "compose", "solve", "evaluate", "predict", "rank", "doctor", "plot", "push",
            "pull", "ls", "verify", "ensemble",
        ];
        let serving = |c: &&clap::Command| !typed.contains(&c.get_name());
        for sub in command.get_subcommands().filter(serving) {
            for option in sub.get_arguments().filter(|a| !a.is_hide_set()) {
                let env = option
                    .get_env()
                    .and_then(|e| e.to_str())
                    .unwrap_or_default();
                let named = env == "DATABASE_URL" || env.starts_with("PROMPTWEAVE_");
                assert!(named, "{} --{}", sub.get_name(), option.get_id());
            }
        }
    }
}
