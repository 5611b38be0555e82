//! A known job with a known answer, to test that a device computes, and correctly. A driver that
//! loads or a thread that answers proves neither.

use std::io;
use std::path::Path;

use tch::Device;

use crate::compose::tiny;
use crate::vit::Compute;
use crate::{Engine, device};
use promptweave_domain::composer::{Composer as _, CompositionError, Unwatched};
use promptweave_domain::composition::CompositionInput;
use promptweave_domain::objective::Shrinkage;
use promptweave_domain::precision::Precision;

/// The α of [`job`], in f64 by the definition (`plain`) on a CPU. A test below computes it again.
const ALPHA: [f64; 3] = [0.713604198748, 0.228684295789, 0.057711505463];

/// Signal of the classes, so small that heads err and gradients are not negligible. With well
/// separated classes only the features would matter.
const SIGNAL: f64 = 8.0;

/// Passes if every device finds [`ALPHA`].
pub fn run(compute: &Compute) -> Result<(), CompositionError> {
    for device in &compute.devices {
        let one = Compute {
            devices: vec![*device],
            ..compute.clone()
        };
        check(*device, &weights(&one)?, tolerance(&one))?;
    }
    Ok(())
}

/// The largest deviation of a weight that counts as rounding. On a CPU rounding is 7e-7 in f32 and
/// 0.02 in bf16, which has three bits fewer than CUDA's TensorFloat-32. A broken device is off by
/// more, or gives NaN.
fn tolerance(compute: &Compute) -> f64 {
    match (compute.precision, compute.device()) {
        (Precision::Bf16, _) => 0.1,
        (Precision::F32, Device::Cuda(_)) => 0.02,
        _ => 1e-4,
    }
}

/// A job of three prompts that all have a share in the answer. The shrinkage keeps the answer's
/// rounding error small.
pub fn job(dir: &Path) -> io::Result<CompositionInput> {
    let mut input = tiny::input(dir, 4, SIGNAL)?;
    input.sources.remove(2);
    input.objective.h_score.shrinkage = Some(Shrinkage::Fixed(0.5));
    Ok(input)
}

fn weights(compute: &Compute) -> Result<Vec<f64>, CompositionError> {
    let no_file = |error: io::Error| {
        let place = std::env::temp_dir();
        failed(&format!(
            "its files cannot be written to `{}` ({error}); free space there, or name another directory in TMPDIR",
            place.display()
        ))
    };
    let dir = tempfile::tempdir().map_err(no_file)?;
    let job = job(dir.path()).map_err(no_file)?;
    // A new engine, so that it displaces no other backbone, and without a cache, so that everything
    // is computed.
    let composed = Engine::with(compute.clone()).compose(&job, &mut Unwatched);
    let composition = composed.map_err(|error| failed(&error.to_string()))?;
    let weights = composition.result.source_weights.iter();
    Ok(weights.map(|source| source.weight).collect())
}

fn check(on: Device, found: &[f64], tolerance: f64) -> Result<(), CompositionError> {
    let near = |(a, b): (&f64, f64)| (a - b).abs() <= tolerance;
    if found.len() == ALPHA.len() && found.iter().zip(ALPHA).all(near) {
        return Ok(());
    }
    Err(failed(&format!(
        "{} computes the weights {found:.6?} where {ALPHA:.6?} are right; ask `promptweave doctor` what it finds \
         there, or use another --device",
        device::name_of(on)
    )))
}

fn failed(what: &str) -> CompositionError {
    CompositionError::device_failed(format!("the self-test failed: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_cpu(precision: Precision) -> Compute {
        Compute::on(Device::Cpu, precision)
    }

    #[test]
    fn the_self_tests_answer_is_what_the_definition_gives_in_f64() {
        let definition = Compute {
            plain: true,
            ..on_cpu(Precision::F64)
        };
        let found = weights(&definition).unwrap();
        for (a, b) in found.iter().zip(ALPHA) {
            // The tolerance matches the digits of the constant.
            assert!((a - b).abs() < 1e-9, "{found:?}");
            // Rounding shows only in a weight that is free to move, not in one at a bound.
            assert!((0.05..0.95).contains(a), "{found:?}");
        }
        assert_eq!(found.len(), ALPHA.len());
    }

    #[test]
    fn a_device_that_computes_rightly_passes_the_self_test() {
        for precision in [Precision::F32, Precision::Bf16, Precision::F64] {
            let start = std::time::Instant::now();
            run(&on_cpu(precision)).unwrap();
            println!("{precision:?}: {:?}", start.elapsed());
        }
    }

    #[test]
    fn wrong_weights_fail_the_self_test_by_name() {
        let close = ALPHA.map(|weight| weight - 5e-5);
        assert!(check(Device::Cpu, &close, 1e-4).is_ok());
        let mut turned = ALPHA;
        turned.rotate_left(1);
        for wrong in [turned.as_slice(), &[f64::NAN; 3], &ALPHA[..2], &[]] {
            let error = check(Device::Cuda(3), wrong, 1e-3).unwrap_err();
            assert!(error.is_device_failure());
            let text = error.to_string();
            assert!(
                text.contains("the self-test failed: cuda:3 computes"),
                "{text}"
            );
        }
    }
}
