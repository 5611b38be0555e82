//! An engine that computes nothing, and takes a given time for it. It reports progress, stops when told to, and answers
//! with random weights, so that two attempts at a job never have the same result.

use std::thread;
use std::time::Duration;

use promptweave::failpoints;
use promptweave::worker::composer_thread::NewComposer;
use promptweave_domain::clock::jitter;
use promptweave_domain::composer::{Composer, Composition, CompositionError, Observer, Platform};
use promptweave_domain::composition::{CompositionInput, SolveInput};
use promptweave_domain::digest::Digest;
use promptweave_domain::phase::Phase;
use promptweave_domain::prediction::{Predicted, PredictionInput};
use promptweave_domain::ranking::Ranking;
use promptweave_domain::sharding::{Next, Shard, ShardInput, ShardingError};
use promptweave_domain::tuning::{Checkpoints, Curves, Tuned, TuningInput};
use promptweave_domain::words::JobErrorCode;

use crate::composition::{composition, predicted, ranking, tuned};

/// Steps of each phase.
const STEPS: u64 = 10;
/// Shards of features and of gradients, if they are shared.
const SHARDS: usize = 4;
/// The answer at a failpoint that makes the attempt fail.
const FAIL: &str = "fail";

/// Returns what makes an engine whose compositions take `time`, and are shared or not.
pub fn factory(time: Duration, shares: bool) -> NewComposer {
    let step = time / (Phase::OF_COMPOSITION.len() as u32 * STEPS as u32);
    Box::new(move || Ok(Box::new(Pretending { step, shares })))
}

struct Pretending {
    step: Duration,
    shares: bool,
}

impl Pretending {
    /// Pretends to work; in the middle is a failpoint with the phase's name.
    fn work(
        &self,
        phase: Phase,
        step: Duration,
        observer: &mut dyn Observer,
    ) -> Result<(), CompositionError> {
        for done in 0..STEPS {
            if done == STEPS / 2 && failpoints::ask(phase.name(), None) == FAIL {
                return Err(CompositionError::Retry {
                    code: JobErrorCode::Libtorch,
                    detail: "it was told to fail".to_owned(),
                });
            }
            if observer.progress(phase, done, STEPS).is_break() {
                return Err(CompositionError::Stopped);
            }
            thread::sleep(step);
        }
        Ok(())
    }

    /// Runs a phase in shards, with helpers. The merged shards must be those that were laid out, in order.
    fn share(&self, phase: Phase, observer: &mut dyn Observer) -> Result<(), CompositionError> {
        let failed = |error: ShardingError| CompositionError::Retry {
            code: JobErrorCode::SharingFailed,
            detail: error.to_string(),
        };
        let shards = observer.shards().expect("a worker gives them");
        let count = shards.lay_out(phase, SHARDS).map_err(failed)?;
        let mut merged = 0;
        while merged < count {
            let shards = observer.shards().expect("a worker gives them");
            let (next, done) = shards.next(phase).map_err(failed)?;
            match next {
                Next::Compute(shard) => {
                    self.work(phase, self.step / SHARDS as u32, observer)?;
                    let shards = observer.shards().expect("a worker gives them");
                    shards.give(shard, file_of(shard)).map_err(failed)?;
                }
                Next::There(file) => {
                    let (index, of) = (
                        merged,
                        file_of(Shard {
                            phase,
                            index: merged,
                            count,
                        }),
                    );
                    assert_eq!(file, of, "shard {index}");
                    merged += 1;
                }
                Next::Wait => {}
            }
            if observer
                .progress(phase, done as u64, count as u64)
                .is_break()
            {
                return Err(CompositionError::Stopped);
            }
        }
        Ok(())
    }
}

fn file_of(shard: Shard) -> Vec<u8> {
    format!("{shard:?}").into_bytes()
}

/// Name, version and digest of a source.
type Source = (String, i32, Digest);

fn answer(sources: &[Source]) -> Composition {
    let drawn: Vec<f64> = sources.iter().map(|_| jitter(0.1..1.0)).collect();
    let total: f64 = drawn.iter().sum();
    let weights: Vec<f64> = drawn.iter().map(|weight| weight / total).collect();
    Composition {
        // The bytes differ in every attempt, as the composed prompt's do.
        statistics: format!("{weights:?}").into_bytes(),
        ..composition(sources, &weights)
    }
}

fn source(prompt: &str, version: Option<i32>, digest: Digest) -> Source {
    // Only an offline source has no version, and no worker is offline.
    (prompt.to_owned(), version.unwrap_or_default(), digest)
}

impl Composer for Pretending {
    fn compose(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Composition, CompositionError> {
        for phase in Phase::OF_COMPOSITION {
            if self.shares && [Phase::Features, Phase::Gradients].contains(&phase) {
                self.share(phase, observer)?;
            } else {
                self.work(phase, self.step, observer)?;
            }
        }
        let sources = input.sources.iter();
        let sources: Vec<_> = sources
            .map(|it| source(&it.prompt, it.version, it.digest))
            .collect();
        Ok(answer(&sources))
    }

    fn solve(
        &mut self,
        input: &SolveInput,
        observer: &mut dyn Observer,
    ) -> Result<Composition, CompositionError> {
        self.work(Phase::Solve, self.step, observer)?;
        let sources = input.sources.iter();
        let sources: Vec<_> = sources
            .map(|it| source(&it.prompt, it.version, it.digest))
            .collect();
        Ok(answer(&sources))
    }

    fn shard(
        &mut self,
        input: &ShardInput,
        observer: &mut dyn Observer,
    ) -> Result<Vec<u8>, CompositionError> {
        self.work(input.shard.phase, self.step / SHARDS as u32, observer)?;
        Ok(file_of(input.shard))
    }

    fn tune(
        &mut self,
        input: &TuningInput,
        checkpoints: &mut dyn Checkpoints,
        observer: &mut dyn Observer,
    ) -> Result<Tuned, CompositionError> {
        let mut curves = Curves::default();
        if let Some(there) = checkpoints.last()? {
            curves = serde_json::from_slice(&there).expect("a checkpoint of ours");
        }
        while curves.cross_entropy.len() < input.options.epochs {
            self.work(Phase::Tune, self.step, observer)?;
            curves.cross_entropy.push(jitter(0.0..1.0));
            let epoch = curves.last().expect("one is over");
            let bytes = serde_json::to_vec(&curves).expect("plain data");
            checkpoints.keep(&epoch, &bytes);
        }
        Ok(tuned(&input.options, curves))
    }

    fn rank(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Ranking, CompositionError> {
        self.work(Phase::Features, self.step, observer)?;
        let sources = input.sources.iter();
        Ok(ranking(sources.map(|it| (it.prompt.clone(), it.digest))))
    }

    fn predict(
        &mut self,
        input: &PredictionInput,
        observer: &mut dyn Observer,
    ) -> Result<Predicted, CompositionError> {
        self.work(Phase::Features, self.step, observer)?;
        Ok(predicted(input))
    }

    fn self_test(&mut self) -> Result<(), CompositionError> {
        Ok(())
    }

    fn platform(&self) -> Platform {
        Platform {
            device: "none".to_owned(),
            ..Platform::default()
        }
    }
}
