//! `reproduce`: every method on every task of a suite, leave-one-out, and the paper's four tables.
//!
//! ```text
//! suite ─► for each seed: a source prompt a task ─► for each target: the other tasks' prompts, by every method
//!                                                        └─► results.jsonl, a row a cell ─► report
//! ```
//!
//! A cell that has its row is not computed again. So a run can be stopped at any time, and the
//! report can be made of the rows so far.

mod cells;
mod layouts;
mod measures;
mod plots;
mod rankings;
mod report;
mod results;
mod runner;
mod scalability;
mod settings;
mod suite;
mod tsne;

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use serde::Serialize;

use self::cells::{Cell, cells};
use self::report::Report;
use self::results::Results;
use self::runner::Runner;
use self::suite::Suite;
use promptweave::offline::EngineOptions;
use promptweave::offline::progress::bar;
use promptweave_domain::tuning::TuningOptions;
use promptweave_formats::backbone::Backbone;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub engine: EngineOptions,
    /// Folder of tasks. Each task is a folder in the layout of VTAB-1k (train800val200.txt,
    /// test.txt), or an image folder with train and test.
    #[arg(long, value_name = "DIR")]
    pub suite: PathBuf,
    /// Folder for results.jsonl, the source prompts and the report. An earlier run in it is
    /// continued.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How composed prompts are used. `zero-shot`: every prompt unchanged, with a closed-form head.
    /// `small`: prompt and head are tuned on the target from there, for five epochs; meant for a
    /// backbone of six blocks at 70 pixels. `full`: the same with 50 tokens, ten epochs and up to
    /// 2000 images, as far as the paper's protocol is known; it takes hours on a GPU.
    #[arg(long, value_enum, default_value_t = Profile::ZeroShot)]
    pub profile: Profile,
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "main,ablation,spearman,scalability,tsne"
    )]
    pub tables: Vec<Table>,
    /// Only these tasks, as sources and as targets [default: all].
    #[arg(long, value_delimiter = ',')]
    pub tasks: Option<Vec<String>>,
    /// Only these of the tasks as targets, so that several machines can share the work. --merge
    /// combines their results.jsonl [default: all].
    #[arg(long, value_delimiter = ',')]
    pub targets: Option<Vec<String>>,
    /// Take over the rows of these results.jsonl, made with the same settings, before anything is
    /// computed.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub merge: Vec<PathBuf>,
    /// Seeds. Each is a whole run with its own initial prompt, choice of images and order of
    /// batches.
    #[arg(long, value_delimiter = ',', default_value = "0,1,2")]
    pub seeds: Vec<u64>,
    /// GiB of features and gradients kept in OUT/cache while a target's methods are computed.
    #[arg(long, default_value_t = 8)]
    pub cache_gib: u32,
    /// Only tune the prompts of the targets, which are the other targets' sources.
    #[arg(long)]
    pub prompts_only: bool,
    /// Compute nothing, and make the report of the rows that exist.
    #[arg(long)]
    pub report_only: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    ZeroShot,
    Small,
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Table {
    Main,
    Ablation,
    Spearman,
    Scalability,
    /// HGPrompt with other settings, from which its default is chosen.
    Settings,
    /// No table, but a picture of features before and after, for the first seed.
    Tsne,
}

/// The settings that all numbers of a results file depend on, beside the seeds.
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    pub profile: &'static str,
    /// Digest of the tasks' names, classes and lists of images.
    pub suite: String,
    pub backbone: String,
    pub precision: String,
    /// Options for tuning every source prompt; `init_seed` and `seed` are the cell's seed.
    pub source_tuning: TuningOptions,
    /// The most images that a source prompt is tuned on.
    pub source_samples: usize,
    /// The most target samples, N.
    pub target_samples: usize,
    /// Epochs of the short tuning in `spot` and `panda`.
    pub target_epochs: u32,
    /// Options for tuning prompt and head from the composed prompt, on the same images; `None` with
    /// `zero-shot`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_tuning: Option<TuningOptions>,
}

impl Settings {
    fn of(args: &Args, suite: &Suite, backbone: &Backbone) -> Self {
        let five_epochs = TuningOptions {
            epochs: 5,
            ..TuningOptions::default()
        };
        // The known part of the paper's protocol. The rest is as in the other profiles.
        let as_the_paper = TuningOptions {
            num_tokens: 50,
            epochs: 10,
            ..TuningOptions::default()
        };
        let (profile, source_tuning, samples) = match args.profile {
            Profile::ZeroShot => ("zero-shot", five_epochs, 400),
            Profile::Small => ("small", five_epochs, 400),
            Profile::Full => ("full", as_the_paper, 2000),
        };
        let on_target = TuningOptions {
            sketch_samples: 0,
            ..source_tuning.clone()
        };
        Self {
            profile,
            suite: suite.digest.to_string(),
            backbone: backbone.digest.to_string(),
            precision: args.engine.precision.to_string(),
            target_epochs: source_tuning.epochs as u32,
            source_tuning,
            source_samples: samples,
            target_samples: samples,
            target_tuning: (args.profile != Profile::ZeroShot).then_some(on_target),
        }
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let suite = Suite::open(&args.suite, args.tasks.as_deref(), args.targets.as_deref())?;
    let backbone = Backbone::open(&args.engine.backbone)
        .with_context(|| format!("cannot use `{}`", args.engine.backbone.display()))?;
    let settings = Settings::of(args, &suite, &backbone);
    if args.prompts_only {
        return tune_prompts(args, &suite, &settings);
    }
    let path = args.out.join("results.jsonl");
    let reads = args.report_only && args.merge.is_empty();
    let mut results = Results::open(&path, &settings, reads)?;
    for file in &args.merge {
        // Opening the results for reading would create the file if it is missing.
        ensure!(
            file.is_file(),
            "`{}` is no file of rows to merge",
            file.display()
        );
        results.merge(&Results::open(file, &settings, true)?)?;
    }
    let cells = cells(&suite, &args.seeds, &args.tables);
    if !args.report_only {
        let missing: Vec<Cell> = cells
            .iter()
            .filter(|cell| !results.has(cell))
            .cloned()
            .collect();
        compute(args, &suite, &settings, &missing, &mut results)?;
        if let (true, Some(seed)) = (args.tables.contains(&Table::Tsne), args.seeds.first()) {
            layouts::compute(args, &suite, &settings, *seed)?;
        }
    }
    let missing = missing(args, &suite, &results);
    let report = Report {
        suite: &suite,
        seeds: &args.seeds,
        settings: &settings,
        rows: results.rows(),
        missing: &missing,
    };
    report.write(&args.out, &args.tables)
}

/// Number of cells of each table that have no row yet.
fn missing(args: &Args, suite: &Suite, results: &Results) -> Vec<(Table, usize)> {
    let of_table = |table: &Table| {
        let cells = cells(suite, &args.seeds, std::slice::from_ref(table));
        let missing = cells.iter().filter(|cell| !results.has(cell)).count();
        (*table, missing)
    };
    let tables = args.tables.iter().map(of_table);
    tables.filter(|(_, missing)| *missing > 0).collect()
}

fn tune_prompts(args: &Args, suite: &Suite, settings: &Settings) -> anyhow::Result<()> {
    let mut runner = Runner::new(args, suite, settings)?;
    for seed in &args.seeds {
        for target in &suite.targets {
            runner.source(*seed, target)?;
        }
    }
    Ok(())
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
            let accuracy = 100.0 * row.accuracy();
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use clap::{Args as _, FromArgMatches as _};

    use super::*;
    use promptweave_domain::stratified::stratified_subset;
    use promptweave_engine::testing::{write_backbone, write_dataset};

    fn args(dir: &Path, more: &[&str]) -> Args {
        let at = |name: &str| dir.join(name).display().to_string();
        let (backbone, suite, out) = (at("backbone"), at("suite"), at("out"));
        let paths = ["--backbone", &backbone, "--suite", &suite, "--out", &out];
        let device = ["--device", "cpu", "--seeds", "3"];
        let all = ["reproduce"]
            .iter()
            .chain(&paths)
            .chain(&device)
            .chain(more);
        let matches = Args::augment_args(clap::Command::new("reproduce")).get_matches_from(all);
        Args::from_arg_matches(&matches).unwrap()
    }

    /// A suite of tasks that differ in their number of images, and so in their images.
    fn suite(dir: &Path, tasks: usize) {
        write_backbone(&dir.join("backbone"));
        for task in 0..tasks {
            let name = format!("suite/task{task}");
            write_dataset(&dir.join(name), 30 + 3 * task, 12);
        }
    }

    #[test]
    fn every_cell_is_computed_once_and_all_tables_are_made_of_them() {
        let dir = tempfile::tempdir().unwrap();
        suite(dir.path(), 3);
        let small = args(dir.path(), &["--profile", "small"]);
        run(&small).unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join("out").join(name)).unwrap();
        let rows = read("results.jsonl");
        let report = read("report.md");
        for title in [
            "Accuracy",
            "Differences",
            "Ablation",
            "foretell",
            "More sources",
            "before and after",
        ] {
            assert!(report.contains(title), "{title}: {report}");
        }
        assert!(!report.contains("Not finished"), "{report}");
        for picture in [
            "accuracies.svg",
            "weights.svg",
            "spearman.svg",
            "scalability.svg",
            "tsne.svg",
        ] {
            assert!(read(picture).contains("</svg>"), "{picture}");
        }
        let table = read("cells.csv");
        assert_eq!(table.lines().count(), rows.lines().count());
        // The row of HGPrompt, tuned on the target.
        let row: results::Row = rows
            .lines()
            .find(|line| line.contains("\"method\":\"hgprompt\""))
            .map(|line| serde_json::from_str(line).unwrap())
            .unwrap();
        assert!(
            row.tuned_accuracy
                .is_some_and(|accuracy| (0.0..=1.0).contains(&accuracy))
        );
        assert_eq!((row.sources.len(), row.weights.len()), (2, 2));

        // A report can be made of a single row.
        let out = dir.path().join("out/results.jsonl");
        let first: String = rows.split_inclusive('\n').take(2).collect();
        fs::write(&out, first).unwrap();
        let report_only = ["--profile", "small", "--report-only"];
        run(&args(dir.path(), &report_only)).unwrap();
        assert!(
            read("report.md").contains("Not finished"),
            "{}",
            read("report.md")
        );
        fs::write(&out, &rows).unwrap();

        // The settings table uses the rows that exist. What was not computed has a dash.
        let settings = [
            "--profile",
            "small",
            "--tables",
            "settings",
            "--report-only",
        ];
        run(&args(dir.path(), &settings)).unwrap();
        let compared = read("report.md");
        let row = |label: &str| {
            let start = format!("| {label} ");
            let found = compared.lines().find(|line| line.starts_with(&start));
            found.unwrap_or_else(|| panic!("{compared}")).to_owned()
        };
        // The cells are name, held out, cross-fitted, test. Of 30 images none is held out.
        let cells = |label: &str| -> Vec<bool> {
            let row = row(label);
            let cells = row.split('|').skip(2).take(6);
            cells.map(|cell| cell.trim() != "–").collect()
        };
        assert_eq!(cells("average"), [false, false, false, true, true, true]);
        assert_eq!(cells("scale 0.5"), [false; 6]);
        row("cross-fitted loss");

        // A second run computes nothing, and the report is the same.
        run(&small).unwrap();
        assert_eq!((read("results.jsonl"), read("report.md")), (rows, report));
    }

    #[test]
    fn rows_of_several_machines_come_together() {
        let dir = tempfile::tempdir().unwrap();
        suite(dir.path(), 3);
        let ablation = ["--tables", "ablation"];
        let mut files = Vec::new();
        for target in ["task0", "task1,task2"] {
            let mut part = args(
                dir.path(),
                &[&ablation[..], &["--targets", target]].concat(),
            );
            part.out = dir.path().join(target);
            let prompts = Args {
                prompts_only: true,
                ..part.clone()
            };
            run(&prompts).unwrap();
            let tuned = fs::read_dir(part.out.join("prompts")).unwrap().count();
            assert_eq!(tuned, target.split(',').count());
            assert!(!part.out.join("results.jsonl").exists());
            run(&part).unwrap();
            files.push(part.out.join("results.jsonl").display().to_string());
        }
        // The second time there is nothing to take over.
        let merge = ["--report-only", "--merge", &files[0], &files[1]];
        let all = args(dir.path(), &[&ablation[..], &merge].concat());
        for _ in 0..2 {
            run(&all).unwrap();
            let read = |name: &str| fs::read_to_string(all.out.join(name)).unwrap();
            assert_eq!(read("results.jsonl").lines().count(), 1 + 3 * 5);
            assert!(!read("report.md").contains("Not finished"));
        }

        let none = args(dir.path(), &["--merge", "nowhere/results.jsonl"]);
        let refused = format!("{:#}", run(&none).unwrap_err());
        assert!(
            refused.contains("`nowhere/results.jsonl` is no file"),
            "{refused}"
        );
        let other = args(dir.path(), &["--profile", "small", "--merge", &files[0]]);
        let other = Args {
            out: dir.path().join("other"),
            ..other
        };
        let refused = format!("{:#}", run(&other).unwrap_err());
        assert!(
            refused.contains("holds results of other settings"),
            "{refused}"
        );
        let unknown = args(dir.path(), &["--targets", "pets"]);
        let refused = format!("{:#}", run(&unknown).unwrap_err());
        assert!(refused.contains("has no task `pets`"), "{refused}");
    }

    #[test]
    fn training_images_that_are_no_samples_are_held_out() {
        let dir = tempfile::tempdir().unwrap();
        suite(dir.path(), 3);
        let args = args(dir.path(), &[]);
        let suite = Suite::open(&args.suite, None, None).unwrap();
        let backbone = Backbone::open(&args.engine.backbone).unwrap();
        let all = Settings::of(&args, &suite, &backbone);
        let few = Settings {
            source_samples: 20,
            target_samples: 20,
            ..all.clone()
        };
        let cell = Cell {
            seed: 3,
            target: "task0".into(),
            method: cells::NONE,
            sources: Vec::new(),
        };
        let mut runner = Runner::new(&args, &suite, &few).unwrap();
        let row = runner.compute(&cell).unwrap();
        assert!(row.held_out_accuracy.is_some() && row.held_out_loss.is_some());
        // Of 30 images 10 are left, and none of them is a sample.
        let held_out = runner.load_unseen("task0", 3).unwrap().held_out.unwrap();
        let samples = stratified_subset(&[[0; 10], [1; 10], [2; 10]].concat(), 20, 3);
        assert_eq!(held_out.len(), 10);
        assert!(
            held_out
                .indices
                .iter()
                .all(|index| !samples.contains(index))
        );

        let mut runner = Runner::new(&args, &suite, &all).unwrap();
        assert_eq!(runner.compute(&cell).unwrap().held_out_accuracy, None);
    }

    #[test]
    fn a_suite_that_is_none_is_refused_with_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        suite(dir.path(), 2);
        let refused = |more: &[&str]| format!("{:#}", run(&args(dir.path(), more)).unwrap_err());
        let few = refused(&[]);
        assert!(
            few.contains("has 2 tasks; leave-one-out needs at least 3"),
            "{few}"
        );
        let unknown = refused(&["--tasks", "task0,pets"]);
        assert!(
            unknown.contains("has no task `pets`; it has task0, task1"),
            "{unknown}"
        );
        fs::create_dir(dir.path().join("suite/empty")).unwrap();
        let empty = refused(&[]);
        assert!(empty.contains("suite/empty` is no task"), "{empty}");
    }
}
