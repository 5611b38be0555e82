//! CUDA against the CPU, on a machine that has both; `scripts/check_gpu.sh` runs it.

use std::path::PathBuf;

use tch::{Device, Kind, Tensor};

use crate::compose::self_test;
use crate::statistics::Statistics;
use crate::testing::Recorder;
use crate::vit::Compute;
use crate::{Engine, device};
use promptweave_domain::composer::Composer as _;
use promptweave_domain::precision::Precision;

/// Features, Γ and α of the self-test's task, whose gradients are not negligible.
struct Found {
    features: Tensor,
    gram: Tensor,
    alpha: Tensor,
}

fn composed(on: Device, tf32: bool) -> Found {
    let dir = tempfile::tempdir().unwrap();
    let input = self_test::job(dir.path()).unwrap();
    let mut engine = Engine::new(on);
    // Loading sets a device's defaults; this setting must come after it.
    engine.backbone(&input.backbone_dir).unwrap();
    device::allow_tf32(tf32).unwrap();
    let composition = engine.compose(&input, &mut Recorder::default()).unwrap();
    let (statistics, _) = Statistics::parse(&composition.statistics).unwrap();
    let weights = composition.result.source_weights.iter();
    let alpha: Vec<f64> = weights.map(|source| source.weight).collect();
    Found {
        features: statistics.features,
        gram: Tensor::from_slice(&statistics.gradients.unwrap().whole.gram),
        alpha: Tensor::from_slice(&alpha),
    }
}

/// The largest difference, as a share of the largest value.
fn off(a: &Tensor, b: &Tensor) -> f64 {
    let largest = |x: &Tensor| f64::try_from(x.abs().max()).unwrap();
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    largest(&(a - &b)) / largest(&b)
}

#[test]
#[ignore = "needs CUDA"]
fn cuda_gives_what_the_cpu_gives() {
    let library = std::env::var_os("PROMPTWEAVE_LIBTORCH_CUDA").map(PathBuf::from);
    let cuda = device::named("cuda:0", library.as_deref()).unwrap();
    let cpu = composed(Device::Cpu, false);
    let same = composed(cuda, false);
    let fast = composed(cuda, true);
    for (found, name) in [(&same, "f32"), (&fast, "tf32")] {
        println!(
            "{name}: features are off by {:.1e}, Γ by {:.1e}, α by {:.1e}",
            off(&found.features, &cpu.features),
            off(&found.gram, &cpu.gram),
            f64::try_from((&found.alpha - &cpu.alpha).abs().max()).unwrap(),
        );
    }
    // The sums are in another order, in f32.
    assert!(off(&same.features, &cpu.features) < 1e-4);
    assert!(off(&same.gram, &cpu.gram) < 1e-3);
    for (found, tolerance) in [(same, 1e-3), (fast, 5e-3)] {
        assert!(f64::try_from((found.alpha - &cpu.alpha).abs().max()).unwrap() <= tolerance);
    }
    // A worker that starts runs this self-test.
    for precision in [Precision::F32, Precision::Bf16] {
        let mut engine = Engine::with(Compute::on(cuda, precision));
        engine.self_test().unwrap();
    }
}
