//! `promptweave reproduce`: every method on every task of a suite, leave-one-out, and the paper's four tables.
//!
//! ```text
//! suite ─► for each seed: a source prompt a task ─► for each target: the other tasks' prompts, by every method
//!                                                        └─► results.jsonl, a row a cell ─► report
//! ```
//!
//! A cell that has its row is not computed again, so that a run can be stopped at any time, and the report can be made
//! of what there is.

mod cells;
mod measures;
mod plots;
mod report;
mod results;
mod runner;
mod suite;

use std::path::PathBuf;

use anyhow::Context as _;
use clap::ValueEnum;
use serde::Serialize;

use self::cells::{Cell, cells};
use self::report::Report;
use self::results::Results;
use self::runner::Runner;
use self::suite::Suite;
use super::EngineOptions;
use super::progress::bar;
use crate::domain::backbone::Backbone;
use crate::engine::tuning::TuningOptions;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub engine: EngineOptions,
    /// Folder of tasks, each a folder in the layout of VTAB-1k (train800val200.txt, test.txt) or an image folder with
    /// train and test.
    #[arg(long, value_name = "DIR")]
    pub suite: PathBuf,
    /// Where results.jsonl, the source prompts and the report go; what is there is gone on with.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// `zero-shot`: no target tuning, every composed prompt with a closed-form head.
    #[arg(long, value_enum, default_value_t = Profile::ZeroShot)]
    pub profile: Profile,
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "main,ablation,spearman,scalability"
    )]
    pub tables: Vec<Table>,
    /// Only these tasks, as sources and as targets [default: all].
    #[arg(long, value_delimiter = ',')]
    pub tasks: Option<Vec<String>>,
    /// Each seed is a whole run of its own: initial prompt, choice of images, order of batches.
    #[arg(long, value_delimiter = ',', default_value = "0,1,2")]
    pub seeds: Vec<u64>,
    /// GiB of features and gradients kept in OUT/cache while a target's methods are computed.
    #[arg(long, default_value_t = 8)]
    pub cache_gib: u32,
    /// Compute nothing: make the report of the rows that there are.
    #[arg(long)]
    pub report_only: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    ZeroShot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Table {
    Main,
    Ablation,
    Spearman,
    Scalability,
}

/// What all numbers of a results file depend on, beside the seeds.
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    pub profile: &'static str,
    pub backbone: String,
    pub precision: String,
    /// Of every source prompt; `init_seed` and `seed` are the cell's seed.
    pub source_tuning: TuningOptions,
    /// Images a source prompt is tuned on, at most.
    pub source_samples: usize,
    /// N of the target, at most.
    pub target_samples: usize,
    /// Of `spot` and `panda`.
    pub target_epochs: u32,
}

impl Settings {
    fn of(args: &Args, backbone: &Backbone) -> Self {
        Self {
            profile: match args.profile {
                Profile::ZeroShot => "zero-shot",
            },
            backbone: backbone.digest.to_string(),
            precision: args.engine.precision.to_string(),
            source_tuning: TuningOptions {
                epochs: 5,
                ..TuningOptions::default()
            },
            source_samples: 400,
            target_samples: 400,
            target_epochs: 5,
        }
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let suite = Suite::open(&args.suite, args.tasks.as_deref())?;
    let backbone = Backbone::open(&args.engine.backbone)
        .with_context(|| format!("cannot use `{}`", args.engine.backbone.display()))?;
    let settings = Settings::of(args, &backbone);
    let mut results = Results::open(&args.out.join("results.jsonl"), &settings)?;
    let cells = cells(&suite, &args.seeds, &args.tables);
    if !args.report_only {
        let missing: Vec<Cell> = cells
            .iter()
            .filter(|cell| !results.has(cell))
            .cloned()
            .collect();
        compute(args, &suite, &settings, &missing, &mut results)?;
    }
    let report = Report {
        suite: &suite,
        seeds: &args.seeds,
        settings: &settings,
        rows: results.rows(),
        missing: cells.iter().filter(|cell| !results.has(cell)).count(),
    };
    report.write(&args.out, &args.tables)
}

fn compute(
    args: &Args,
    suite: &Suite,
    settings: &Settings,
    missing: &[Cell],
    results: &mut Results,
) -> anyhow::Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let mut runner = Runner::new(args, suite, settings)?;
    let bar = bar("cells", missing.len() as u64);
    for (done, cell) in missing.iter().enumerate() {
        bar.set_message(cell.to_string());
        let row = runner.compute(cell).with_context(|| cell.to_string())?;
        if bar.is_hidden() {
            let accuracy = 100.0 * row.eval_accuracy;
            eprintln!(
                "{}/{} {cell}: {accuracy:.1} %, {:.1} s",
                done + 1,
                missing.len(),
                row.seconds
            );
        }
        results.add(row)?;
        bar.inc(1);
    }
    bar.finish();
    Ok(())
}
