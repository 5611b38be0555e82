//! A tiny backbone, a tiny task and prompts for it, all made of fixed numbers. The self-test
//! composes them, and the engine's tests run on them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use promptweave_domain::backbone::{BackboneConfig, Filter, Preprocessing};
use promptweave_domain::composition::{CompositionInput, Source, TargetSamples};
use promptweave_domain::digest::Digest;
use promptweave_domain::objective::{BothTerms, MethodOptions, Objective};
use promptweave_domain::prompt_file::{FORMAT, Origin, PromptFile, PromptMetadata};
use promptweave_domain::split::Split;
use promptweave_domain::tensor::{Stored, Tensor};
use promptweave_formats::backbone::{Backbone, CONFIG_FILE, MODEL_FILE, expected_tensors};

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

/// Writes a ViT with d = 32, 3 blocks, LayerScale and a position grid that must be resampled (5 →
/// 4).
pub fn write_backbone(dir: &Path) -> io::Result<()> {
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
            (name, Stored::from(&Tensor::new(shape, values)))
        })
        .collect();
    fs::create_dir_all(dir)?;
    let model = safetensors::serialize(tensors, None).map_err(io::Error::other)?;
    fs::write(dir.join(MODEL_FILE), model)?;
    fs::write(dir.join(CONFIG_FILE), serde_json::to_vec(&config)?)
}

/// Writes `train` and `test` images of three classes that differ in colour by `signal` levels of
/// grey, with noise of 60.
pub fn write_dataset(dir: &Path, signal: f64, train: usize, test: usize) -> io::Result<()> {
    for (split, count) in [("train", train), ("test", test)] {
        for i in 0..count {
            let class = i % 3;
            let pixels = noise(20 * 20 * 3, (i + 1000 * split.len()) as u64);
            let image = image::RgbImage::from_fn(20, 20, |x, y| {
                let at = 3 * (20 * y + x) as usize;
                image::Rgb(std::array::from_fn(|channel| {
                    let own = if channel == class { signal } else { 0.0 };
                    (110.0 + own + 60.0 * pixels[at + channel]) as u8
                }))
            });
            let folder = dir.join(split).join(["blue", "green", "red"][class]);
            fs::create_dir_all(&folder)?;
            let file = folder.join(format!("{i:04}.png"));
            image.save(file).map_err(io::Error::other)?;
        }
    }
    Ok(())
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
            sources: Vec::new(),
        }),
        prompt_embeddings: Tensor::new([TOKENS, D], values),
        deep_prompt_embeddings: None,
        head: None,
        sketch: None,
        dtype: "f32",
    }
}

/// The input of a whole composition of `m` sources in `dir`.
pub fn input(dir: &Path, m: usize, signal: f64) -> io::Result<CompositionInput> {
    write_backbone(&dir.join("backbone"))?;
    let backbone = Backbone::open(&dir.join("backbone")).map_err(io::Error::other)?;
    write_dataset(&dir.join("target"), signal, 60, 30)?;
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
    Ok(CompositionInput {
        backbone_dir: dir.join("backbone"),
        target_dir: dir.join("target"),
        target: TargetSamples {
            split: Split::Train,
            eval_split: None,
            max_samples: 2000,
            seed: 0,
            skip_unreadable: false,
        },
        sources,
        // The objective as published: the answer depends on all weights, and no fallback replaces
        // it.
        objective: Objective {
            options: MethodOptions::Hgprompt(BothTerms::default()),
            ..Objective::default()
        },
        early_stopping: None,
    })
}
