//! A tiny backbone, a tiny task and prompts for them: what the engine's tests run on.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::alignment::AlignmentStatistics;
use super::vit::{Compute, Pass, Vit};
use crate::domain::backbone::{
    Backbone, BackboneConfig, CONFIG_FILE, Filter, MODEL_FILE, Preprocessing, expected_tensors,
};
use crate::domain::composition::{CompositionInput, Observer, Phase, Source, TargetSamples};
use crate::domain::dataset::Split;
use crate::domain::digest::Digest;
use crate::domain::objective::{HScoreOptions, Objective, Shrinkage};
use crate::domain::precision::Precision;
use crate::domain::prompt_file::{FORMAT, Origin, PromptFile, PromptMetadata};
use crate::domain::tensor::{Stored, Tensor as PlainTensor};

pub const D: usize = 32;
pub const TOKENS: usize = 3;

/// Numbers in -1..1 that depend on the seed and nothing else.
pub fn noise(len: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    (0..len)
        .map(|_| {
            // splitmix64
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect()
}

pub fn noise_tensor(shape: &[i64], seed: u64) -> Tensor {
    let len = shape.iter().product::<i64>() as usize;
    Tensor::from_slice(&noise(len, seed)).view(shape)
}

/// The statistics of gradients [M, N, P] as their definition says, in one go.
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

/// A ViT with d = 32, 3 blocks, LayerScale and a position grid that must be resampled (5 → 4).
pub fn write_backbone(dir: &Path) -> Backbone {
    let config = BackboneConfig {
        architecture: "vit_tiny_for_tests".into(),
        embed_dim: D,
        depth: 3,
        num_heads: 4,
        patch_size: 4,
        pos_grid: 5,
        norm_eps: 1e-6,
        preprocessing: Preprocessing {
            size: 16,
            filter: Filter::Bicubic,
            antialias: true,
            mean: [0.5; 3],
            std: [0.5; 3],
        },
    };
    let tensors: BTreeMap<String, Stored> = expected_tensors(&config, 2 * D, true)
        .into_iter()
        .enumerate()
        .map(|(seed, (name, shape))| {
            let fan_in = if shape.len() > 1 {
                shape[1..].iter().product()
            } else {
                4
            };
            let offset = if name.contains("norm") && name.ends_with("weight") {
                1.0
            } else {
                0.0
            };
            let scale = if name.ends_with("gamma") {
                1.0
            } else {
                (2.0 / fan_in as f64).sqrt()
            };
            let values = noise(shape.iter().product(), seed as u64);
            let values = values
                .into_iter()
                .map(|v| (offset + scale * v) as f32)
                .collect();
            (name, Stored::from(&PlainTensor::new(shape, values)))
        })
        .collect();
    fs::create_dir_all(dir).unwrap();
    fs::write(
        dir.join(MODEL_FILE),
        safetensors::serialize(tensors, None).unwrap(),
    )
    .unwrap();
    fs::write(dir.join(CONFIG_FILE), serde_json::to_vec(&config).unwrap()).unwrap();
    Backbone::open(dir).unwrap()
}

/// A CPU stream's way through it, in f64.
pub fn tiny_pass(dir: &Path) -> Box<dyn Pass> {
    let compute = Compute::on(Device::Cpu, Precision::F64);
    let vit = Vit::load(&write_backbone(dir), &compute).unwrap();
    vit.streams.into_inner().swap_remove(0).pass
}

/// `train` and `test` images of three classes that differ in colour, with noise.
pub fn write_dataset(dir: &Path, train: usize, test: usize) {
    for (split, count) in [("train", train), ("test", test)] {
        for i in 0..count {
            let class = i % 3;
            let pixels = noise(20 * 20 * 3, (i + 1000 * split.len()) as u64);
            let image = image::RgbImage::from_fn(20, 20, |x, y| {
                let at = 3 * (20 * y + x) as usize;
                image::Rgb(std::array::from_fn(|channel| {
                    let own = if channel == class { 60.0 } else { 0.0 };
                    (110.0 + own + 60.0 * pixels[at + channel]) as u8
                }))
            });
            let folder = dir.join(split).join(["blue", "green", "red"][class]);
            fs::create_dir_all(&folder).unwrap();
            image.save(folder.join(format!("{i:04}.png"))).unwrap();
        }
    }
}

pub fn prompt(backbone: &Backbone, seed: u64) -> PromptFile {
    let values = noise(TOKENS * D, 7000 + seed)
        .into_iter()
        .map(|v| v as f32)
        .collect();
    PromptFile {
        metadata: Some(PromptMetadata {
            format: FORMAT,
            backbone_digest: Some(backbone.digest),
            preprocessing_id: Some(backbone.config.preprocessing.id()),
            init_seed: Some(0),
            task: None,
            classes: None,
            origin: Origin::Tuned,
            training: None,
        }),
        prompt_embeddings: PlainTensor::new([TOKENS, D], values),
        deep_prompt_embeddings: None,
        head: None,
        sketch: None,
        dtype: "f32",
    }
}

/// A whole composition of `m` sources in `dir`.
pub fn input(dir: &Path, m: usize) -> CompositionInput {
    let backbone = write_backbone(&dir.join("backbone"));
    write_dataset(&dir.join("target"), 60, 30);
    let sources = (0..m)
        .map(|i| {
            let file = prompt(&backbone, i as u64);
            let digest = Digest::of(&file.to_bytes());
            Source {
                prompt: format!("p{i}"),
                version: None,
                digest,
                file,
            }
        })
        .collect();
    CompositionInput {
        backbone_dir: dir.join("backbone"),
        target_dir: dir.join("target"),
        target: TargetSamples {
            split: Split::Train,
            eval_split: None,
            max_samples: 2000,
            seed: 0,
            skip_bad: false,
        },
        sources,
        objective: Objective::default(),
        stop_when: None,
    }
}

/// Notes what it is told and stops when told to.
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

/// Features [M, N, d] with class signal of the given strength a source.
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

/// `inv` with a fixed ρ.
pub fn inv(rho: f64) -> HScoreOptions {
    HScoreOptions {
        shrinkage: Shrinkage::Fixed(rho),
        ..HScoreOptions::default()
    }
}
