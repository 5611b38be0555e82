//! Fixtures and references of the engine's tests, beside the tiny task of [`tiny`].

use std::fs;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use crate::compose::tiny;
use crate::score::alignment::AlignmentStatistics;
use crate::vit::{Compute, Pass, Vit};
use promptweave_domain::composer::Observer;
use promptweave_domain::composition::CompositionInput;
use promptweave_domain::objective::{HScoreMode, HScoreOptions, Shrinkage};
use promptweave_domain::phase::Phase;
use promptweave_domain::precision::Precision;
use promptweave_formats::backbone::Backbone;

pub use crate::compose::tiny::{D, TOKENS, noise};

/// Signal of classes that every head tells apart.
const SIGNAL: f64 = 60.0;

pub fn noise_tensor(shape: &[i64], seed: u64) -> Tensor {
    let len = shape.iter().product::<i64>() as usize;
    Tensor::from_slice(&noise(len, seed)).view(shape)
}

/// The statistics of gradients [M, N, P] by their definition, in one go.
pub fn alignment_statistics(gradients: &Tensor) -> AlignmentStatistics {
    let (m, n, _) = gradients.size3().unwrap();
    let centred = gradients - gradients.mean_dim(0, true, Kind::Double);
    let mut rows = Vec::new();
    for i in 0..m {
        for j in i..m {
            let product = centred.get(i) * centred.get(j);
            rows.push(product.sum_dim_intlist(0, false, Kind::Double) / (n - 1) as f64);
        }
    }
    let variances = gradients.var_dim([1i64].as_slice(), true, false);
    let own_gram = |rows: &Tensor| Vec::try_from(rows.matmul(&rows.tr()).flatten(0, -1)).unwrap();
    AlignmentStatistics {
        num_sources: m as usize,
        gram: own_gram(&Tensor::stack(&rows, 0)),
        variance_gram: own_gram(&variances),
    }
}

/// The files of a result cache in this directory.
pub fn cache_files(dir: &Path) -> Vec<PathBuf> {
    let mut paths = vec![dir.to_owned()];
    for _ in ["group", "key", "file"] {
        paths = (paths.iter())
            .flat_map(|dir| fs::read_dir(dir).unwrap())
            .map(|entry| entry.unwrap().path())
            .collect();
    }
    paths
}

pub fn write_backbone(dir: &Path) -> Backbone {
    tiny::write_backbone(dir).unwrap();
    Backbone::open(dir).unwrap()
}

/// The pass that a CPU stream makes, in f64.
pub fn tiny_pass(dir: &Path) -> Box<dyn Pass> {
    let compute = Compute::on(Device::Cpu, Precision::F64);
    let vit = Vit::load(&write_backbone(dir), &compute).unwrap();
    vit.streams.into_inner().swap_remove(0).pass
}

pub fn write_dataset(dir: &Path, train: usize, test: usize) {
    tiny::write_dataset(dir, SIGNAL, train, test).unwrap();
}

pub fn input(dir: &Path, m: usize) -> CompositionInput {
    tiny::input(dir, m, SIGNAL).unwrap()
}

/// An observer that records what it is told, and stops when told to.
#[derive(Default)]
pub struct Recorder {
    pub seen: Vec<(Phase, u64, u64)>,
    pub stop_at: Option<Phase>,
}

impl Observer for Recorder {
    fn progress(&mut self, phase: Phase, done: u64, total: u64) -> std::ops::ControlFlow<()> {
        self.seen.push((phase, done, total));
        if self.stop_at == Some(phase) && done > 0 {
            return std::ops::ControlFlow::Break(());
        }
        std::ops::ControlFlow::Continue(())
    }
}

/// Features [M, N, d] with a class signal of the given strength for each source.
pub fn features(strengths: &[f64], labels: &[usize], d: usize, seed: u64) -> Tensor {
    let (m, n) = (strengths.len(), labels.len());
    let classes = labels.iter().max().unwrap() + 1;
    let directions = noise(m * classes * d, seed);
    let values = noise(m * n * d, seed + 1);
    let all: Vec<f64> = (0..m * n * d)
        .map(|at| {
            let (i, row, c) = (at / (n * d), at / d % n, at % d);
            values[at] + strengths[i] * directions[(i * classes + labels[row]) * d + c]
        })
        .collect();
    Tensor::from_slice(&all).view([m as i64, n as i64, d as i64])
}

pub fn labels(n: usize, classes: usize) -> Vec<usize> {
    (0..n).map(|i| i % classes).collect()
}

pub fn assert_close(a: f64, b: f64, tolerance: f64) {
    assert!(
        (a - b).abs() <= tolerance * (1.0 + b.abs()),
        "{a} is not {b} (± {tolerance})"
    );
}

/// H-score options: `standard` with a fixed ρ.
pub fn standard(rho: f64) -> HScoreOptions {
    HScoreOptions {
        mode: Some(HScoreMode::Standard),
        shrinkage: Some(Shrinkage::Fixed(rho)),
        ..HScoreOptions::default()
    }
}
