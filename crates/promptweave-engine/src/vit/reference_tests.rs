//! The forward and backward pass against timm and PyTorch's autograd
//! (scripts/reference/timm_vit.py made the numbers).

use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::samples::images;
use crate::score::head::{ClosedFormHead, SourceHead};
use crate::vit::all_paths;
use promptweave_domain::precision::Precision;
use promptweave_formats::backbone::Backbone;
use promptweave_formats::image;

/// timm's results for B samples: `features` [B, d] and `gradients` [B, m, d], flat.
#[derive(serde::Deserialize)]
struct Reference {
    labels: Vec<usize>,
    features: Vec<f64>,
    gradients: Vec<f64>,
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn read<T: serde::de::DeserializeOwned>(fixture: &str) -> T {
    let json = std::fs::read(root().join("tests/fixtures").join(fixture)).unwrap();
    serde_json::from_slice(&json).unwrap()
}

/// Largest ‖a - b‖/‖b‖ over the samples, the first axis of `a`; `b` is flat.
fn relative_error(a: &Tensor, b: &[f64]) -> f64 {
    let batch = a.size()[0];
    let (a, b) = (
        a.to_kind(Kind::Double).view([batch, -1]),
        Tensor::from_slice(b).view([batch, -1]),
    );
    let norm = |t: &Tensor| t.square().sum_dim_intlist(1, false, Kind::Double).sqrt();
    f64::try_from((norm(&(a - &b)) / norm(&b)).max()).unwrap()
}

/// Compares our features and gradients for `pixels` (one image each), a prompt [m, d] and a head
/// [K, d], [K].
fn check(
    backbone: &Backbone,
    pixels: &[&[u8]],
    prompt: &Tensor,
    (weight, bias): (&Tensor, &Tensor),
    reference: &Reference,
    (precision, tolerance): (Precision, f64),
) {
    let kind = match precision {
        Precision::F64 => Kind::Double,
        _ => Kind::Float,
    };
    let input = images::to_tensor(pixels, &backbone.config.preprocessing, Device::Cpu, kind);
    let head = SourceHead::given(ClosedFormHead::given(weight, bias).unwrap());
    let folds = vec![0; pixels.len()];
    for (name, mut pass) in all_paths(backbone, precision) {
        pass.take_prompts(&[prompt.to_kind(kind)]);
        pass.take_images(&input);
        let features = pass.features(0..1).get(0);
        let off = relative_error(&features, &reference.features);
        assert!(
            off < tolerance,
            "{name}'s features in {precision} are off by {off}"
        );

        let slope = |_, f: &Tensor| head.slopes(f, &reference.labels, &folds);
        let gradients = pass.gradients(0..1, &mut { slope }).unwrap().get(0);
        let off = relative_error(&gradients, &reference.gradients);
        assert!(
            off < tolerance,
            "{name}'s gradients in {precision} are off by {off}"
        );
    }
}

#[test]
fn a_random_vit_agrees_with_timm() {
    #[derive(serde::Deserialize)]
    struct Given {
        prompt: Vec<f64>,
        weight: Vec<f64>,
        bias: Vec<f64>,
    }
    let given: Given = read("timm_vit/reference.json");
    let matrix = |values: &[f64]| Tensor::from_slice(values).view([-1, 32]);
    let bytes: Vec<u8> = (0..3 * 32 * 32 * 3u64)
        .map(|i| ((i * 2_654_435_761 % (1 << 32)) >> 24) as u8)
        .collect();
    let pixels: Vec<&[u8]> = bytes.chunks(32 * 32 * 3).collect();
    for precision in [(Precision::F64, 1e-12), (Precision::F32, 1e-4)] {
        check(
            &Backbone::open(&root().join("tests/fixtures/timm_vit")).unwrap(),
            &pixels,
            &matrix(&given.prompt),
            (&matrix(&given.weight), &Tensor::from_slice(&given.bias)),
            &read("timm_vit/reference.json"),
            precision,
        );
    }
}

/// Reads the real weights, which `make setup` puts under .assets.
#[test]
fn the_demo_backbone_agrees_with_timm() {
    let backbone = Backbone::open(&root().join(".assets/vit_s14_focus"))
        .expect("`make setup` makes the demo backbone");
    let png = std::fs::read(root().join("tests/fixtures/vit_s14_focus/resized.png")).unwrap();
    let picture = image::decode(&png).unwrap();
    let mirrored = ::image::imageops::flip_horizontal(&picture);
    let wave = |first: usize, rows: usize| {
        let values: Vec<f64> = (first..first + rows * 384)
            .map(|i| (i as f64).sin() / 16.0)
            .collect();
        Tensor::from_slice(&values).view([rows as i64, 384])
    };
    // The reference has nine digits.
    for precision in [(Precision::F64, 1e-8), (Precision::F32, 1e-4)] {
        check(
            &backbone,
            &[picture.as_raw(), mirrored.as_raw()],
            &wave(1, 2),
            (&wave(2, 3), &Tensor::zeros([3], tch::kind::DOUBLE_CPU)),
            &read("vit_s14_focus/gradients.json"),
            precision,
        );
    }
}
