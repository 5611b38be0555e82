//! Random weights and random images: the time of a matrix product does not depend on its numbers.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use image::RgbImage;
use promptweave_domain::backbone::{BackboneConfig, Filter, Preprocessing};
use promptweave_domain::prompt_file::PromptFile;
use promptweave_domain::tensor::Tensor as PlainTensor;
use promptweave_formats::backbone::{Backbone, CONFIG_FILE, MODEL_FILE, expected_tensors};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const ON_CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

#[derive(Clone, Copy, clap::ValueEnum)]
enum Preset {
    /// ViT-B/16 at 224 × 224.
    VitB16,
    /// d = 64 in two blocks on 32 × 32 pixels, so that ten thousand samples take little time.
    Tiny,
}

#[derive(clap::Args)]
pub struct BackboneArgs {
    #[arg(long)]
    preset: Preset,
    #[arg(long)]
    out: PathBuf,
}

pub fn backbone(args: &BackboneArgs) -> anyhow::Result<Value> {
    let (architecture, embed_dim, depth, num_heads, patch_size, size) = match args.preset {
        Preset::VitB16 => ("vit_base_patch16_224", 768, 12, 12, 16, 224),
        Preset::Tiny => ("vit_tiny_patch8_32", 64, 2, 4, 8, 32),
    };
    let config = BackboneConfig {
        architecture: architecture.to_owned(),
        embed_dim,
        depth,
        num_heads,
        patch_size,
        pos_grid: size / patch_size,
        norm_eps: 1e-6,
        preprocessing: Preprocessing {
            size,
            filter: Filter::Bicubic,
            antialias: true,
            mean: [0.5; 3],
            std: [0.5; 3],
        },
    };
    tch::manual_seed(1);
    let tensors: Vec<(String, Tensor)> = expected_tensors(&config, 4 * embed_dim, false)
        .into_iter()
        .map(|(name, shape)| {
            let tensor = Tensor::randn(signed(&shape), ON_CPU);
            let fan_in: usize = shape[1..].iter().product();
            let tensor = if name.contains("norm") && name.ends_with("weight") {
                tensor * 0.1 + 1.0
            } else if shape.len() > 1 && name.ends_with("weight") {
                tensor / (fan_in as f64).sqrt()
            } else {
                tensor * 0.1
            };
            (name, tensor)
        })
        .collect();
    fs::create_dir_all(&args.out)?;
    Tensor::write_safetensors(&tensors, args.out.join(MODEL_FILE))?;
    fs::write(args.out.join(CONFIG_FILE), serde_json::to_vec(&config)?)?;
    Ok(json!({"digest": Backbone::open(&args.out)?.digest}))
}

#[derive(clap::Args)]
pub struct InputsArgs {
    #[arg(long)]
    backbone: PathBuf,
    /// Output folder: dataset/ and prompts/ in promptweave's formats, and inputs.safetensors with the same data for
    /// other programs.
    #[arg(long)]
    out: PathBuf,
    #[arg(long)]
    samples: usize,
    #[arg(long)]
    prompts: usize,
    #[arg(long, default_value_t = 10)]
    tokens: usize,
    #[arg(long, default_value_t = 10)]
    classes: usize,
}

pub fn inputs(args: &InputsArgs) -> anyhow::Result<Value> {
    let config = Backbone::open(&args.backbone)?.config;
    let (d, size) = (config.embed_dim as i64, config.preprocessing.size as i64);
    let (m, k) = (args.tokens as i64, args.classes as i64);
    tch::manual_seed(2);
    let labels: Vec<i64> = (0..args.samples).map(|i| i as i64 % k).collect();
    // Each class is a coarse pattern under noise. If nothing could be learned, a composition would have nothing to
    // solve.
    let patterns = (Tensor::randn([k, 3, 4, 4], ON_CPU) * 30.0)
        .upsample_nearest2d([size, size], None, None)
        .permute([0, 2, 3, 1]);
    let mut pixels = Vec::with_capacity(args.samples);
    let folder = args.out.join("dataset");
    fs::create_dir_all(folder.join("images"))?;
    let mut list = String::new();
    for (i, label) in labels.iter().enumerate() {
        let noise = Tensor::randn([size, size, 3], ON_CPU) * 40.0 + 128.0;
        let image = (patterns.get(*label) + noise)
            .clamp(0.0, 255.0)
            .to_kind(Kind::Uint8);
        let bytes = Vec::<u8>::try_from(image.flatten(0, -1))?;
        let name = format!("images/{i:05}.png");
        RgbImage::from_raw(size as u32, size as u32, bytes)
            .context("three bytes a pixel")?
            .save(folder.join(&name))?;
        list.push_str(&format!("{name} {label}\n"));
        pixels.push(image);
    }
    fs::write(folder.join("train.txt"), list)?;

    let prompts: Vec<Tensor> = (0..args.prompts)
        .map(|_| Tensor::randn([m, d], ON_CPU) * 0.5)
        .collect();
    write_prompts(&args.out.join("prompts"), &prompts)?;
    let tensors = [
        ("pixels", Tensor::stack(&pixels, 0)),
        ("labels", Tensor::from_slice(&labels)),
        ("prompts", Tensor::stack(&prompts, 0)),
        (
            "head.weight",
            Tensor::randn([k, d], ON_CPU) / (d as f64).sqrt(),
        ),
        ("head.bias", Tensor::zeros([k], ON_CPU)),
    ];
    Tensor::write_safetensors(&tensors, args.out.join("inputs.safetensors"))?;
    Ok(json!({"samples": args.samples, "prompts": args.prompts}))
}

fn write_prompts(folder: &Path, prompts: &[Tensor]) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    for (i, prompt) in prompts.iter().enumerate() {
        let (m, d) = prompt.size2()?;
        let values = Vec::try_from(prompt.flatten(0, -1))?;
        let file = PromptFile {
            metadata: None,
            prompt_embeddings: PlainTensor::new([m as usize, d as usize], values),
            deep_prompt_embeddings: None,
            head: None,
            sketch: None,
            dtype: "f32",
        };
        fs::write(folder.join(format!("{i:02}.safetensors")), file.to_bytes())?;
    }
    Ok(())
}

fn signed(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|size| *size as i64).collect()
}
