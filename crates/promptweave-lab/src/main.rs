//! promptweave's laboratory: compares the methods on a suite of tasks, and makes tables and
//! pictures of the results.

mod reproduce;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "promptweave-lab", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compare all methods on a suite of tasks, leave-one-out, as the paper's tables do.
    Reproduce(reproduce::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Reproduce(args) => reproduce::run(&args),
    }
}
