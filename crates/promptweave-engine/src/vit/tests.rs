use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::*;
use crate::samples::images;
use crate::testing::{D, TOKENS, noise_tensor, write_backbone};
use promptweave_formats::image;

const CLASSES: i64 = 5;

fn largest(difference: &Tensor) -> f64 {
    f64::try_from(difference.abs().max()).unwrap()
}

fn relative(found: &Tensor, expected: &Tensor) -> f64 {
    let (found, expected) = (found.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    largest(&(found - &expected)) / largest(&expected)
}

/// Weights in f64 or f32.
fn weights(backbone: &Backbone, kind: Kind) -> Weights {
    Weights::load(backbone, Device::Cpu, kind).unwrap()
}

/// A loss that couples the features of a sample: Σ log Σ exp of a few linear forms.
fn slope(features: &Tensor) -> Tensor {
    let leaf = features.detach().copy().set_requires_grad(true);
    let forms = noise_tensor(&[CLASSES, D as i64], 40).to_kind(features.kind());
    let loss = leaf
        .linear(&forms, None::<Tensor>)
        .logsumexp([1i64].as_slice(), false)
        .sum(features.kind());
    Tensor::run_backward(&[loss], &[&leaf], false, false).swap_remove(0)
}

/// f [M, B, d] and ∂ℓ/∂P [M, B, m, d] for random images and prompts.
fn results(pass: &mut dyn Pass, kind: Kind, num_images: i64) -> (Tensor, Tensor) {
    let prompts: Vec<Tensor> = (0..3)
        .map(|i| noise_tensor(&[TOKENS as i64, D as i64], 20 + i).to_kind(kind))
        .collect();
    pass.take_prompts(&prompts);
    pass.take_images(&noise_tensor(&[num_images, 3, 16, 16], 30).to_kind(kind));
    let features = pass.features(0..3);
    // Some prompts at once, then the others.
    let mut gradients = Vec::new();
    for prompts in [0..2, 2..3] {
        gradients.push(pass.gradients(prompts, &mut |_, f| Ok(slope(f))).unwrap());
    }
    (features, Tensor::cat(&gradients, 0))
}

#[test]
fn fast_paths_equal_the_definition() {
    let dir = tempfile::tempdir().unwrap();
    let backbone = write_backbone(dir.path());
    let mut plain = Plain::new(weights(&backbone, Kind::Double));
    let (features, gradients) = results(&mut plain, Kind::Double, 4);
    assert_eq!(features.size(), [3, 4, D as i64]);
    assert_eq!(gradients.size(), [3, 4, TOKENS as i64, D as i64]);
    for (precision, kind, tolerance) in [
        (Precision::F64, Kind::Double, 1e-12),
        (Precision::F32, Kind::Float, 1e-5),
        // Eight bits allow only a plausibility check. docs/performance.md tells the effect on α.
        (Precision::Bf16, Kind::Float, 0.05),
    ] {
        for (name, mut pass) in all_paths(&backbone, precision) {
            let (f, g) = results(pass.as_mut(), kind, 4);
            assert_eq!((f.kind(), g.kind()), (kind, kind));
            for (found, expected) in [(f, &features), (g, &gradients)] {
                let off = relative(&found, expected);
                assert!(off < tolerance, "{name} in {precision} is off by {off}");
            }
        }
    }
}

/// The block is first and last at once.
#[test]
fn a_single_block_takes_the_path_of_gpus() {
    let dir = tempfile::tempdir().unwrap();
    let backbone = write_backbone(dir.path());
    let single = || {
        let mut weights = weights(&backbone, Kind::Double);
        weights.blocks.truncate(1);
        weights
    };
    let (features, gradients) = results(&mut Plain::new(single()), Kind::Double, 2);
    let compute = Compute::on(Device::Cpu, Precision::F64);
    let mut pass = passes(single(), Device::Cpu, &compute).swap_remove(0);
    let (f, g) = results(pass.as_mut(), Kind::Double, 2);
    assert!(relative(&f, &features) < 1e-12);
    assert!(relative(&g, &gradients) < 1e-12);
}

#[test]
fn the_order_of_a_prompts_tokens_changes_no_feature() {
    let dir = tempfile::tempdir().unwrap();
    let backbone = write_backbone(dir.path());
    let mut pass = Fused::<f64>::new(&weights(&backbone, Kind::Double));
    let prompt = noise_tensor(&[TOKENS as i64, D as i64], 2);
    let none = Tensor::zeros([0, D as i64], (Kind::Double, Device::Cpu));
    pass.take_prompts(&[prompt.shallow_clone(), prompt.flip([0]), none]);
    pass.take_images(&noise_tensor(&[2, 3, 16, 16], 1));
    let features = pass.features(0..3);
    assert!(largest(&(features.get(0) - features.get(1))) < 1e-12);
    assert!(largest(&(features.get(0) - features.get(2))) > 1e-3);
}

#[test]
fn a_batch_gives_what_its_samples_give_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let backbone = write_backbone(dir.path());
    let images = noise_tensor(&[3, 3, 16, 16], 1);
    let prompt = noise_tensor(&[TOKENS as i64, D as i64], 2);
    let mut pass = Fused::<f64>::new(&weights(&backbone, Kind::Double));
    pass.take_prompts(&[prompt]);
    pass.take_images(&images);
    let batch = pass.features(0..1);
    for i in 0..3 {
        pass.take_images(&images.narrow(0, i, 1));
        let one = pass.features(0..1);
        assert!(largest(&(batch.narrow(1, i, 1) - one)) < 1e-12);
    }
}

/// The demo backbone against onnxruntime on the graph its weights came from, and against a numpy
/// forward pass with a prompt (scripts/reference/vit_features.py made the numbers). It reads the
/// real weights, which `make setup` puts under .assets.
#[test]
fn the_demo_backbone_agrees_with_its_original_graph() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let backbone = Backbone::open(&root.join(".assets/vit_s14_focus"))
        .expect("`make setup` makes the demo backbone");
    let fixtures = root.join("tests/fixtures/vit_s14_focus");
    let read = |name: &str| image::decode(&std::fs::read(fixtures.join(name)).unwrap()).unwrap();

    let preprocessing = &backbone.config.preprocessing;
    let pixels = image::resize(&read("image.png"), preprocessing);
    let by_pillow = read("resized.png").into_raw();
    let off = pixels
        .iter()
        .zip(&by_pillow)
        .map(|(a, b)| a.abs_diff(*b))
        .max()
        .unwrap();
    assert!(
        off <= 1,
        "resized pixels differ from Pillow's by up to {off} levels"
    );

    #[derive(serde::Deserialize)]
    struct Reference {
        features: Vec<f64>,
        prompted: Vec<f64>,
    }
    let json = std::fs::read(fixtures.join("features.json")).unwrap();
    let reference: Reference = serde_json::from_slice(&json).unwrap();
    let input = images::to_tensor(&[&by_pillow], preprocessing, Device::Cpu, Kind::Float);
    let prompt: Vec<f32> = (0..2 * 384)
        .map(|i| (1.0 + i as f32).sin() / 16.0)
        .collect();
    let prompt = Tensor::from_slice(&prompt).view([2, 384]);
    let of = |precision, tolerance: f64| {
        all_paths(&backbone, precision)
            .into_iter()
            .map(move |(name, pass)| (name, pass, tolerance))
    };
    for (name, mut pass, tolerance) in of(Precision::F32, 1e-4).chain(of(Precision::Bf16, 0.2)) {
        pass.take_prompts(&[prompt.narrow(0, 0, 0), prompt.shallow_clone()]);
        pass.take_images(&input);
        for (i, expected) in [&reference.features, &reference.prompted]
            .iter()
            .enumerate()
        {
            let features = pass.features(i..i + 1).to_kind(Kind::Double);
            let off = largest(&(features.flatten(0, -1) - Tensor::from_slice(expected)));
            assert!(off < tolerance, "{name} is off by {off}");
        }
    }
}

#[test]
fn a_micro_batch_is_a_second_of_work_and_far_less_than_a_gigabyte() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let backbone = Backbone::open(&root.join(".assets/vit_s14_focus")).unwrap();
    let vit = Vit::load(&backbone, &Compute::on(Device::Cpu, Precision::F32)).unwrap();
    let prompts = [Tensor::zeros([10, 384], (Kind::Float, Device::Cpu))];
    let Batch { images, prompts } = vit.batch(&prompts);
    assert_eq!((images, prompts), (16, 1));
    let widths = Widths {
        depth: 12,
        d: 384,
        hidden: 1536,
        num_heads: 6,
    };
    assert!(images * 60 * bytes_a_token(widths, 60, 4) < 256 << 20);
}
