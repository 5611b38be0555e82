//! The cost of the solve on synthetic features and gradients: building statistics, one evaluation of the objective with
//! its gradient, a solve, and a whole path.
//!
//!     cargo bench --bench engine [-- <filter>]
//!
//! The sizes (M sources, d dimensions, N samples) are those of the demo's backbone, and of the paper's (ViT-B/16,
//! eleven sources). Anything that takes more than five seconds is timed once and printed, not sampled.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use promptweave_domain::objective::{
    AlignmentVariant, GradientNormalization, HScoreMode, HScoreOptions, Pool,
};
use promptweave_engine::pool;
use promptweave_engine::pool::solver::Predictions;
use promptweave_engine::score::alignment::GradientAlignment;
use promptweave_engine::score::gradients::{GradientStatistics, sample_folds};
use promptweave_engine::score::h_score::HScore;
use promptweave_engine::solve::solver::{Solution, Solver, Terms};
use tch::{Device, Kind, Tensor};

/// (M, d, N)
const SIZES: [(i64, i64, i64); 2] = [(4, 384, 500), (11, 768, 2000)];
const CLASSES: i64 = 20;
/// m, the number of tokens per prompt: the gradients have m·d entries.
const TOKENS: i64 = 10;
const SAMPLED_BELOW: Duration = Duration::from_secs(5);

struct Problem {
    name: String,
    /// [M, N, d] in f32
    features: Tensor,
    labels: Vec<usize>,
    /// [M, N, m·d] in f32
    gradients: Tensor,
}

impl Problem {
    /// Makes sources that share most of what they know: common class directions, and noise of their own.
    fn new((m, d, n): (i64, i64, i64)) -> Self {
        tch::manual_seed(1);
        let on_cpu = (Kind::Float, Device::Cpu);
        let labels: Vec<i64> = (0..n).map(|i| i % CLASSES).collect();
        let rows = Tensor::from_slice(&labels);
        let common = Tensor::randn([CLASSES, d], on_cpu).index_select(0, &rows);
        let own = Tensor::randn([m, CLASSES, d], on_cpu).index_select(1, &rows);
        let shared_noise = Tensor::randn([1, n, d], on_cpu) * 2.0;
        let features = common * 0.2 + own * 0.2 + shared_noise + Tensor::randn([m, n, d], on_cpu);
        let sizes = Tensor::linspace(0.5, 1.5, m, on_cpu).view([m, 1, 1]);
        let shared = Tensor::randn([1, n, TOKENS * d], on_cpu);
        let gradients = (Tensor::randn([m, n, TOKENS * d], on_cpu) + shared) * sizes * 1e-2;
        Self {
            name: format!("M={m} d={d} N={n}"),
            features,
            labels: labels.into_iter().map(|label| label as usize).collect(),
            gradients,
        }
    }

    fn h_score(&self, mode: HScoreMode) -> HScore {
        let options = HScoreOptions {
            mode: Some(mode),
            ..HScoreOptions::default()
        };
        HScore::new(&self.features, &self.labels, &options).expect("it is sound")
    }

    /// Γ and the other statistics, from micro-batches of 32 samples.
    fn alignment(&self) -> GradientAlignment {
        let (m, n, p) = self.gradients.size3().expect("three axes");
        let folds = sample_folds(&self.labels);
        let num_folds = 1 + folds.iter().max().copied().unwrap_or(0);
        let mut statistics = GradientStatistics::new(m as usize, p, num_folds, Device::Cpu);
        for start in (0..n).step_by(32) {
            let size = 32.min(n - start);
            let rows = start as usize..(start + size) as usize;
            let batch = self.gradients.narrow(1, start, size);
            statistics.add(&batch, &folds[rows]).expect("it is sound");
        }
        let summary = statistics
            .finish(GradientNormalization::None)
            .expect("it is finite");
        GradientAlignment::new(AlignmentVariant::MixtureWeighted, summary.whole)
    }
}

fn solve(terms: Terms<'_>) -> Solution {
    let mut solver = Solver::new(terms);
    let explored = solver.explore(&mut || Ok(())).expect("it solves");
    let scale = explored.ranges.at(0.5);
    solver
        .choose(explored, scale, 0.0, &mut || Ok(()))
        .expect("it solves")
}

/// Samples a function if it is quick; a slow one was timed already.
fn measure<T>(criterion: &mut Criterion, name: &str, run: impl Fn() -> T) -> T {
    let start = Instant::now();
    let result = run();
    let once = start.elapsed();
    if once > SAMPLED_BELOW {
        println!("{name:48} once: {:.1} s", once.as_secs_f64());
    } else {
        criterion.bench_function(name, |bencher| bencher.iter(|| black_box(run())));
    }
    result
}

fn engine(criterion: &mut Criterion) {
    let modes = [HScoreMode::Standard, HScoreMode::CrossValidated];
    for (size, mode) in SIZES
        .iter()
        .flat_map(|size| modes.map(|mode| (*size, mode)))
    {
        let problem = Problem::new(size);
        let name = |what: &str| format!("{mode}, {what} {}", problem.name);
        let h_score = measure(criterion, &name("second moments"), || problem.h_score(mode));
        let alignment = measure(criterion, &name("gradient statistics"), || {
            problem.alignment()
        });
        let terms = Terms {
            h_score: &h_score,
            alignment: &alignment,
        };
        let m = size.0 as usize;
        let uniform = vec![1.0 / m as f64; m];
        measure(criterion, &name("evaluation, all weights"), || {
            let h = h_score.value_and_gradient(&uniform).expect("it is finite");
            (h, alignment.value_and_gradient(&uniform))
        });
        let mut sparse = vec![0.0; m];
        (sparse[0], sparse[1]) = (0.6, 0.4);
        measure(criterion, &name("evaluation, two weights"), || {
            let h = h_score.value_and_gradient(&sparse).expect("it is finite");
            (h, alignment.value_and_gradient(&sparse))
        });
        measure(criterion, &name("path of 21 trade-offs"), || {
            Solver::new(terms)
                .explore(&mut || Ok(()))
                .expect("it solves")
                .path()
        });
        let solution = measure(criterion, &name("solve with its path"), || solve(terms));
        println!(
            "{:48} {} evaluations, {} optima",
            name("solve with its path"),
            solution.report.map_or(0, |report| report.evaluations),
            solution.optima.len()
        );
    }
}

/// (M, N, K) of a pool of predictions.
const POOLS: [(i64, i64, i64); 4] = [
    (10, 400, 16),
    (16, 2000, 100),
    (64, 2000, 100),
    (16, 2000, 1000),
];

/// The weights of a pool, without its standard errors and with them. Every source knows something of its own.
fn pools(criterion: &mut Criterion) {
    for (m, n, k) in POOLS {
        tch::manual_seed(2);
        let on_cpu = (Kind::Float, Device::Cpu);
        let labels: Vec<i64> = (0..n).map(|i| i % k).collect();
        let right = Tensor::from_slice(&labels).one_hot(k).to_kind(Kind::Float);
        let strengths = Tensor::linspace(0.0, 3.0, m, on_cpu).view([m, 1, 1]);
        let logits = Tensor::randn([m, n, k], on_cpu) + strengths * right;
        let predictions = logits.log_softmax(-1, Kind::Float);
        let labels: Vec<usize> = labels.into_iter().map(|label| label as usize).collect();
        let predictions = Predictions::new(predictions, &labels);
        let name = |what: &str| format!("pool, {what} M={m} N={n} K={k}");
        measure(criterion, &name("solve"), || {
            pool::solve(&predictions, 10.0, &mut || Ok(())).expect("it solves")
        });
        measure(criterion, &name("solve and standard errors"), || {
            let options = Pool::default();
            pool::fit(&predictions, &labels, &options, &mut || Ok(())).expect("it solves")
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).without_plots();
    targets = pools, engine
}
criterion_main!(benches);
