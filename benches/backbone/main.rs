//! The backbone's part of a composition, and what this machine could do: promptweave's side of `make bench-engine`.
//!
//! `benches/bench_engine.py` builds this, starts it once a figure and reads one line of JSON; it says what is compared
//! and how. By hand: `cargo bench --bench backbone -- job --help`.

mod gemm;
mod job;
mod prepare;

use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// `cargo bench` says so.
    #[arg(long, global = true, hide = true)]
    bench: bool,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Write a backbone folder with random weights.
    Backbone(prepare::BackboneArgs),
    /// Write images, labels, prompts and a head for a backbone, for both sides.
    Inputs(prepare::InputsArgs),
    /// The rate of matrix products at the shapes of a backbone's linear maps.
    Gemm(gemm::Args),
    /// Features and gradients as a composition computes them.
    Job(job::Args),
    /// The same, one sample and one prompt at a time.
    Naive(job::Args),
    /// Write features and what gradients come to into a file, for comparison.
    Dump(job::DumpArgs),
}

fn main() -> anyhow::Result<()> {
    let Some(command) = Cli::parse().command else {
        // A plain `cargo bench` comes along here too.
        println!("backbone: `make bench-engine` and `make bench-growth` run this");
        return Ok(());
    };
    let line = match command {
        Command::Backbone(args) => prepare::backbone(&args)?,
        Command::Inputs(args) => prepare::inputs(&args)?,
        Command::Gemm(args) => gemm::measure(&args)?,
        Command::Job(args) => job::whole(&args)?,
        Command::Naive(args) => job::naive(&args)?,
        Command::Dump(args) => job::dump(&args)?,
    };
    println!("{line}");
    Ok(())
}
