//! The backbone's part of a composition, and the machine's limits: promptweave's side of `make bench-engine`.
//!
//! `benches/bench_engine.py` builds this, starts it once per figure and reads one line of JSON; its docstring says what
//! is compared, and how. To run it by hand: `cargo bench --bench backbone -- job --help`.

mod gemm;
mod job;
mod prepare;

use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// The flag that `cargo bench` passes.
    #[arg(long, global = true, hide = true)]
    bench: bool,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Write a backbone folder with random weights.
    Backbone(prepare::BackboneArgs),
    /// Write images, labels, prompts and a head for a backbone, for both sides.
    Inputs(prepare::InputsArgs),
    /// Measure matrix products at the shapes of a backbone's linear maps.
    Gemm(gemm::Args),
    /// Compute features and gradients as a composition does.
    Job(job::Args),
    /// Compute the same, one sample and one prompt at a time.
    Naive(job::Args),
    /// Write features and the gradients' statistics into a file, for comparison.
    Dump(job::DumpArgs),
}

fn main() -> anyhow::Result<()> {
    let Some(command) = Cli::parse().command else {
        // A plain `cargo bench` runs this too.
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
