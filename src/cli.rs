//! The command line: one binary, its roles are subcommands.

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
    /// Bring a database's tables up to date.
    Migrate(DatabaseOptions),
    /// Make, list and revoke API keys, directly in a database: the first one, say.
    Keys(KeysArgs),
    #[command(flatten)]
    Client(crate::client::Command),
    /// Delete files that nothing refers to, and statistics after their time; a server does so once a day.
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
    /// Every transferability metric of any set of prompts for a target task, in one table.
    #[cfg(feature = "torch")]
    Rank(crate::offline::rank::Args),
    /// Accuracy of a prompt on a labelled image set with its closed-form head.
    #[cfg(feature = "torch")]
    Evaluate(crate::offline::evaluate::Args),
    /// Say what the engine finds here (libtorch, CUDA, driver, devices, memory, matrix rates), and what to do
    /// where something is missing.
    #[cfg(feature = "torch")]
    Doctor(crate::offline::doctor::Args),
    /// Ask a running server whether it is ready; for containers.
    Healthcheck(HealthcheckArgs),
    /// Draw a result: its weights, and its path of trade-offs.
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
    /// Of its row in `/v1/workers`: how `up` knows which worker is the one that it started.
    #[arg(long, env = "PROMPTWEAVE_WORKER_ID", hide = true, value_name = "UUID")]
    pub id: Option<Uuid>,
    /// Stop when stdin ends: how `up` makes sure that no worker outlives it.
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
    /// Make a key and print it; it cannot be shown again.
    Create {
        /// What it may be used for: `read`, `write`, `run`, `admin`, several with `,` between them.
        /// None includes another.
        #[arg(long, required = true, value_delimiter = ',')]
        scope: Vec<Scope>,
        /// Whose prompts, backbones, datasets and jobs it opens.
        #[arg(long, default_value = "default")]
        project: ResourceName,
        /// Make the project where there is none of that name.
        #[arg(long)]
        create_project: bool,
        /// What it is for.
        #[arg(long, default_value = "made by promptweave keys create")]
        name: KeyName,
    },
    /// List a project's keys, the newest first: id, state, scopes, name.
    List {
        #[arg(long, default_value = "default")]
        project: ResourceName,
    },
    /// Revoke a key, at once and for ever.
    Revoke {
        /// As `keys list` shows it; also the part of the key between `pr_` and the next `_`.
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
    /// Only say how much there is.
    #[arg(long, env = "PROMPTWEAVE_DRY_RUN")]
    pub dry_run: bool,
}

#[derive(Clone, Debug, Args)]
pub struct HealthcheckArgs {
    /// Where the server listens.
    #[arg(long, env = "PROMPTWEAVE_LISTEN", default_value = "127.0.0.1:8080")]
    pub address: SocketAddr,
    /// What is asked.
    #[arg(long, env = "PROMPTWEAVE_HEALTHCHECK_PATH", default_value = "/readyz")]
    pub path: String,
}

#[derive(Clone, Debug, Args)]
pub struct PlotArgs {
    /// `result.json` of `promptweave compose`, or the API's result.
    #[arg(value_name = "RESULT.json")]
    pub result: PathBuf,
    /// Where `weights.svg` and `pareto_path.svg` go.
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
        // What works on local files is typed by people; what serves is configured.
        let typed = [
            "tune", "compose", "solve", "evaluate", "rank", "doctor", "plot", "push", "pull", "ls",
            "verify", "ensemble",
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
