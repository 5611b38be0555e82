//! The job: features of every sample under every prompt, then per-sample gradients into their statistics, by the same
//! functions that a composition calls. The head is given, so that nothing is fitted in between.

use std::collections::HashMap;
use std::ops::{ControlFlow, Range};
use std::path::PathBuf;
use std::time::Instant;

use promptweave_domain::objective::GradientNormalization;
use promptweave_domain::precision::Precision;
use promptweave_domain::split::Split;
use promptweave_engine::cache::CachedGradients;
use promptweave_engine::samples::{Samples, Selection};
use promptweave_engine::score::gradients::{GradientStatistics, Sources, accumulate, sample_folds};
use promptweave_engine::score::head::{ClosedFormHead, SourceHead};
use promptweave_engine::vit::features::extract;
use promptweave_engine::vit::flops::{FlopCounter, Part, spent};
use promptweave_engine::vit::{Compute, Vit};
use promptweave_formats::backbone::Backbone;
use promptweave_formats::dataset::LabelledImages;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

#[derive(clap::Args)]
pub struct Args {
    #[arg(long)]
    backbone: PathBuf,
    /// Folder that `inputs` wrote.
    #[arg(long)]
    inputs: PathBuf,
    #[arg(long)]
    samples: usize,
    #[arg(long, default_value_t)]
    precision: Precision,
    /// Number of streams [default: one per core].
    #[arg(long)]
    threads: Option<usize>,
    /// Use one stream whose products take all threads.
    #[arg(long)]
    wide: bool,
    /// Compute by the definition, with all threads on one stream.
    #[arg(long)]
    plain: bool,
}

#[derive(clap::Args)]
pub struct DumpArgs {
    #[command(flatten)]
    job: Args,
    #[arg(long)]
    out: PathBuf,
}

struct Job {
    vit: Vit,
    samples: Samples,
    prompts: Vec<Tensor>,
    heads: Vec<SourceHead>,
    sample_folds: Vec<usize>,
    threads: usize,
}

struct Run {
    features: Tensor,
    gradients: GradientStatistics,
    feature_seconds: f64,
    gradient_seconds: f64,
}

impl Job {
    fn load(args: &Args) -> anyhow::Result<Self> {
        let backbone = Backbone::open(&args.backbone)?;
        let mut compute = Compute::on(Device::Cpu, args.precision);
        compute.plain = args.plain;
        compute.wide = args.wide;
        compute.threads = args.threads.unwrap_or(compute.threads);
        let vit = Vit::load(&backbone, &compute)?;
        let dataset = LabelledImages::read(&args.inputs.join("dataset"))?;
        let selection = Selection {
            split: Split::Train,
            max_samples: None,
            seed: 0,
            skip_unreadable: false,
        };
        let all = Samples::load(&dataset, &selection, &backbone.config.preprocessing)?;
        // Decoding is not measured: the other side has its pixels in memory.
        all.wait()?;
        // These are the first samples, as the other side takes them, not a stratified choice.
        let samples = all.only(&(0..args.samples).collect::<Vec<_>>());
        let inputs = Tensor::read_safetensors(args.inputs.join("inputs.safetensors"))?;
        let inputs: HashMap<String, Tensor> = inputs.into_iter().collect();
        let prompts = inputs["prompts"].to_kind(vit.kind).unbind(0);
        let head = ClosedFormHead::given(&inputs["head.weight"], &inputs["head.bias"])?;
        Ok(Self {
            heads: prompts
                .iter()
                .map(|_| SourceHead::given(head.clone()))
                .collect(),
            sample_folds: sample_folds(&samples.labels),
            threads: compute.threads,
            vit,
            samples,
            prompts,
        })
    }

    /// Runs both passes over some samples and prompts, and measures their seconds.
    fn run(&self, rows: Range<usize>, prompts: Range<usize>) -> anyhow::Result<Run> {
        let samples = self.samples.only(&rows.clone().collect::<Vec<_>>());
        let go_on = |_| ControlFlow::Continue(());
        let start = Instant::now();
        let pairs = self.vit.pairs(&samples, &self.prompts[prompts.clone()]);
        let features = extract(&self.vit, &pairs, go_on)?;
        let feature_seconds = start.elapsed().as_secs_f64();
        let gradients = accumulate(
            &self.vit,
            &pairs,
            &Sources {
                heads: &self.heads[prompts.clone()],
                known: &CachedGradients::none(prompts.len()),
            },
            &vec![0; samples.len()],
            &self.sample_folds[rows],
            go_on,
        )?;
        Ok(Run {
            features,
            gradients,
            feature_seconds,
            gradient_seconds: start.elapsed().as_secs_f64() - feature_seconds,
        })
    }

    fn line(&self, feature_seconds: f64, gradient_seconds: f64) -> Value {
        json!({
            "seconds": feature_seconds + gradient_seconds,
            "features": feature_seconds,
            "gradients": gradient_seconds,
            "pairs": self.samples.len() * self.prompts.len(),
            "threads": self.threads,
        })
    }
}

pub fn whole(args: &Args) -> anyhow::Result<Value> {
    let job = Job::load(args)?;
    let (samples, prompts) = (job.samples.len(), job.prompts.len());
    // A stream's first products pay for choosing kernels and for fresh memory. Half of the samples are enough to give
    // every stream some.
    job.run(0..samples.div_ceil(2), 0..prompts)?;
    let before = PARTS.map(|(_, part)| spent(part));
    let run = job.run(0..samples, 0..prompts)?;
    let mut line = job.line(run.feature_seconds, run.gradient_seconds);
    for ((name, part), before) in PARTS.into_iter().zip(before) {
        let FlopCounter {
            seconds,
            operations,
        } = spent(part);
        line["spent"][name] = json!({
            "seconds": seconds - before.seconds,
            "gflop": (operations - before.operations) * 1e-9,
        });
    }
    Ok(line)
}

/// The parts of the fast path, each summed over all streams.
const PARTS: [(&str, Part); 3] = [
    ("pass", Part::Pass),
    ("linear", Part::Linear),
    ("attention", Part::Attention),
];

/// Runs without sharing or batching: one image forward under one prompt, then again forward and backward.
pub fn naive(args: &Args) -> anyhow::Result<Value> {
    let job = Job::load(args)?;
    job.run(0..1, 0..1)?;
    let (mut features, mut gradients) = (0.0, 0.0);
    for row in 0..job.samples.len() {
        for prompt in 0..job.prompts.len() {
            let run = job.run(row..row + 1, prompt..prompt + 1)?;
            features += run.feature_seconds;
            gradients += run.gradient_seconds;
        }
    }
    Ok(job.line(features, gradients))
}

/// Writes features [M, N, d], Γ and the gradients' root mean squares [M], computed by the code that is timed.
pub fn dump(args: &DumpArgs) -> anyhow::Result<Value> {
    let job = Job::load(&args.job)?;
    let run = job.run(0..job.samples.len(), 0..job.prompts.len())?;
    let summary = run.gradients.finish(GradientNormalization::None)?;
    let single = |values: &[f64]| Tensor::from_slice(values).to_kind(Kind::Float);
    let tensors = [
        ("features", run.features.to_kind(Kind::Float)),
        ("gram", single(&summary.whole.gram)),
        ("rms", single(&summary.rms)),
    ];
    Tensor::write_safetensors(&tensors, &args.out)?;
    Ok(json!({"samples": job.samples.len()}))
}
