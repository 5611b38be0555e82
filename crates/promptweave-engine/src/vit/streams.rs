//! Streams of work through the backbone: one for each GPU, or one for each CPU thread. Each free
//! stream gets the next micro-batch of samples, and the results are collected in order:
//!
//! ```text
//!             ┌─► stream 0: images, all prompts ─┐
//! batches ──► ├─► stream 1: …                    ├─► put back into order ─► collect, on the caller's thread
//!             └─► …                              ┘
//! ```
//!
//! Every micro-batch is computed by one stream alone and collected in its turn. So the result depends
//! neither on the number of streams nor on which was faster. On a CPU several narrow streams beat a wide
//! one: products are as fast on one thread each, and the passes between them need no fork and join.

use std::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::ops::{ControlFlow, Range};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::channel;
use std::sync::{Condvar, Mutex};

use rayon::{ThreadPool, ThreadPoolBuilder};
use tch::{Device, Kind, Tensor};

use crate::device::threads::OneThread;
use crate::error::EngineError;
use crate::samples::Samples;
use crate::vit::{FeatureGradient, Pass, Vit};

/// A stream: its own pass through the backbone, used by one thread at a time.
pub struct Stream {
    pub device: Device,
    /// The kind of the images.
    pub kind: Kind,
    /// Number of threads of libtorch within its operations.
    pub threads: usize,
    pub pass: Box<dyn Pass>,
}

/// A pool of threads that live as long as the streams. CUDA's libraries keep handles and plans for
/// each thread, and making them anew for every pass takes longer than a small pass.
pub fn threads_for(streams: usize) -> Result<ThreadPool, EngineError> {
    let threads = ThreadPoolBuilder::new().num_threads(streams);
    let named = threads.thread_name(|stream| format!("stream-{stream}"));
    let why = |error| EngineError::NoThread("compute on", io::Error::other(error));
    named.build().map_err(why)
}

/// All pairs of some samples and some prompts [m, d], in micro-batches.
pub struct Pairs<'a> {
    pub samples: &'a Samples,
    pub prompts: &'a [Tensor],
    /// The samples' rows, by micro-batch.
    pub batches: Vec<Vec<usize>>,
}

impl Pairs<'_> {
    pub fn num_samples(&self) -> usize {
        self.batches.iter().map(Vec::len).sum()
    }

    pub fn num_pairs(&self) -> u64 {
        (self.num_samples() * self.prompts.len()) as u64
    }
}

/// Some samples' images in a stream, with all prompts.
pub struct MicroBatch<'a> {
    pub rows: &'a [usize],
    pass: &'a mut dyn Pass,
    num_prompts: usize,
    at_once: usize,
    deal: &'a Deal,
    tell: &'a dyn Fn(u64),
}

impl MicroBatch<'_> {
    /// The features f, [M, B, d].
    pub fn features(&mut self) -> Result<Tensor, EngineError> {
        self.by_prompts(|pass, prompts| Ok(pass.features(prompts)))
    }

    /// ∂ℓ/∂P of every sample, [M, B, m, d].
    pub fn gradients(&mut self, slope: &mut FeatureGradient<'_>) -> Result<Tensor, EngineError> {
        self.by_prompts(|pass, prompts| pass.gradients(prompts, slope))
    }

    fn by_prompts(
        &mut self,
        mut work: impl FnMut(&mut dyn Pass, Range<usize>) -> Result<Tensor, EngineError>,
    ) -> Result<Tensor, EngineError> {
        let mut parts = Vec::new();
        for start in (0..self.num_prompts).step_by(self.at_once) {
            self.deal.go_on()?;
            let prompts = start..self.num_prompts.min(start + self.at_once);
            let pairs = prompts.len() * self.rows.len();
            parts.push(work(self.pass, prompts)?);
            (self.tell)(pairs as u64);
        }
        Ok(Tensor::cat(&parts, 0))
    }
}

/// The assignment of micro-batches to streams. No stream begins one far ahead of what was
/// collected.
struct Deal {
    state: Mutex<Dealt>,
    changed: Condvar,
    num_batches: usize,
    ahead: usize,
}

#[derive(Default)]
struct Dealt {
    begun: usize,
    collected: usize,
    stopped: bool,
}

impl Deal {
    fn next(&self) -> Option<usize> {
        let state = self.state.lock().expect("no holder panics");
        let far_ahead = |s: &mut Dealt| {
            !s.stopped && s.begun < self.num_batches && s.begun >= s.collected + self.ahead
        };
        let mut state = self
            .changed
            .wait_while(state, far_ahead)
            .expect("no holder panics");
        if state.stopped || state.begun == self.num_batches {
            return None;
        }
        state.begun += 1;
        Some(state.begun - 1)
    }

    fn change(&self, change: impl FnOnce(&mut Dealt)) {
        change(&mut self.state.lock().expect("no holder panics"));
        self.changed.notify_all();
    }

    fn go_on(&self) -> Result<(), EngineError> {
        match self.state.lock().expect("no holder panics").stopped {
            true => Err(EngineError::Stopped),
            false => Ok(()),
        }
    }
}

/// Stops the streams when the collector panics, so that none waits for it.
struct StopOnDrop<'a>(&'a Deal);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.change(|dealt| dealt.stopped = true);
    }
}

enum StreamEvent<T> {
    Pairs(u64),
    Done(usize, T),
    Failed(EngineError),
    Panicked(Box<dyn Any + Send>),
}

impl Vit {
    /// All pairs of every sample with every prompt, samples in order.
    pub fn pairs<'a>(&self, samples: &'a Samples, prompts: &'a [Tensor]) -> Pairs<'a> {
        let all: Vec<usize> = (0..samples.len()).collect();
        self.pairs_of(&all, samples, prompts)
    }

    /// All pairs of the samples at these rows, in this order.
    pub fn pairs_of<'a>(
        &self,
        rows: &[usize],
        samples: &'a Samples,
        prompts: &'a [Tensor],
    ) -> Pairs<'a> {
        let batches = rows.chunks(self.batch(prompts).images);
        Pairs {
            samples,
            prompts,
            batches: batches.map(<[usize]>::to_vec).collect(),
        }
    }

    /// Sends every micro-batch of `pairs` through `work` on some stream, which has a `state` of its
    /// own there. The results go to `collect`, in order. `progress` gets the number of finished
    /// sample × prompt pairs.
    pub fn each_micro_batch<S: Send, T: Send>(
        &self,
        pairs: &Pairs<'_>,
        state: impl Fn() -> S,
        work: impl Fn(&mut S, &mut MicroBatch<'_>) -> Result<T, EngineError> + Sync,
        mut collect: impl FnMut(&[usize], T) -> Result<(), EngineError>,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let Pairs {
            samples,
            prompts,
            batches,
        } = pairs;
        let mut streams = self.streams.borrow_mut();
        let at_once = self.batch(prompts).prompts;
        let num_prompts = prompts.len();
        let deal = Deal {
            state: Mutex::default(),
            changed: Condvar::new(),
            num_batches: batches.len(),
            ahead: 2 * streams.len(),
        };
        let (told, heard) = channel();
        // While the streams have the cores, this thread takes no more than one.
        let _alone = OneThread::begin();
        for stream in streams.iter_mut() {
            let there = |prompt: &Tensor| prompt.to_device(stream.device);
            let prompts: Vec<Tensor> = prompts.iter().map(there).collect();
            stream.pass.take_prompts(&prompts);
        }
        let outcome = self.threads.in_place_scope(|scope| {
            for stream in streams.iter_mut() {
                let mut state = state();
                let (told, deal, work) = (told.clone(), &deal, &work);
                scope.spawn(move |_| {
                    tch::set_num_threads(stream.threads as i32);
                    let run = || {
                        while let Some(index) = deal.next() {
                            let images =
                                samples.images(&batches[index], stream.device, stream.kind)?;
                            stream.pass.take_images(&images);
                            let mut batch = MicroBatch {
                                rows: &batches[index],
                                pass: stream.pass.as_mut(),
                                num_prompts,
                                at_once,
                                deal,
                                tell: &|pairs| drop(told.send(StreamEvent::Pairs(pairs))),
                            };
                            let done = work(&mut state, &mut batch)?;
                            let _ = told.send(StreamEvent::Done(index, done));
                        }
                        Ok(())
                    };
                    let ended = match catch_unwind(AssertUnwindSafe(run)) {
                        Ok(Ok(())) => return,
                        Ok(Err(error)) => StreamEvent::Failed(error),
                        Err(payload) => StreamEvent::Panicked(payload),
                    };
                    deal.change(|dealt| dealt.stopped = true);
                    let _ = told.send(ended);
                });
            }
            drop(told);
            let _stop = StopOnDrop(&deal);
            let mut early = BTreeMap::new();
            let mut next = 0;
            let mut outcome = Ok(());
            for told in heard {
                let so_far = match told {
                    StreamEvent::Pairs(pairs) => match progress(pairs) {
                        ControlFlow::Continue(()) => Ok(()),
                        ControlFlow::Break(()) => Err(EngineError::Stopped),
                    },
                    StreamEvent::Failed(error) => Err(error),
                    StreamEvent::Panicked(payload) => return Err(payload),
                    StreamEvent::Done(index, done) => {
                        early.insert(index, done);
                        let mut collected = Ok(());
                        while let (Ok(()), Some(done)) = (&collected, early.remove(&next)) {
                            collected = collect(&batches[next], done);
                            next += 1;
                        }
                        deal.change(|dealt| dealt.collected = next);
                        collected
                    }
                };
                if let Err(error) = so_far {
                    deal.change(|dealt| dealt.stopped = true);
                    // The first error is the cause; later ones only tell that others stopped.
                    if outcome.is_ok() {
                        outcome = Err(error);
                    }
                }
            }
            Ok(outcome)
        });
        outcome.unwrap_or_else(|payload| resume_unwind(payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::Selection;
    use crate::testing::{D, TOKENS, noise_tensor, write_backbone, write_dataset};
    use crate::vit::Compute;
    use crate::vit::features::extract;
    use promptweave_domain::precision::Precision;
    use promptweave_domain::split::Split;
    use promptweave_formats::dataset::LabelledImages;

    struct Problem {
        _dir: tempfile::TempDir,
        samples: Samples,
        prompts: Vec<Tensor>,
        vit: Vit,
    }

    /// Forty samples in micro-batches of three.
    fn problem(threads: usize) -> Problem {
        let dir = tempfile::tempdir().unwrap();
        let backbone = write_backbone(&dir.path().join("backbone"));
        write_dataset(&dir.path().join("target"), 40, 4);
        let dataset = LabelledImages::read(&dir.path().join("target")).unwrap();
        let selection = Selection {
            split: Split::Train,
            max_samples: None,
            seed: 0,
            skip_unreadable: false,
        };
        let preprocessing = &backbone.config.preprocessing;
        let compute = Compute {
            threads,
            largest_micro_batch: 3,
            ..Compute::on(Device::Cpu, Precision::F32)
        };
        Problem {
            samples: Samples::load(&dataset, &selection, preprocessing).unwrap(),
            prompts: (0..2)
                .map(|i| noise_tensor(&[TOKENS as i64, D as i64], i).to_kind(Kind::Float))
                .collect(),
            vit: Vit::load(&backbone, &compute).unwrap(),
            _dir: dir,
        }
    }

    fn go_on(_: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    #[test]
    fn the_number_of_streams_changes_no_bit() {
        let of = |threads| {
            let Problem {
                samples,
                prompts,
                vit,
                _dir,
            } = problem(threads);
            assert_eq!(vit.num_streams(), threads);
            let mut told = 0;
            let features = extract(&vit, &vit.pairs(&samples, &prompts), |pairs| {
                told += pairs;
                go_on(pairs)
            });
            assert_eq!(told, 80);
            let mut gradients = Vec::new();
            let slope = |_: usize, f: &Tensor| Ok(f.square());
            vit.each_micro_batch(
                &vit.pairs(&samples, &prompts),
                || (),
                |(), batch| batch.gradients(&mut { slope }),
                |rows, of_batch| {
                    assert_eq!(rows[0], gradients.len() * 3, "in order");
                    gradients.push(of_batch);
                    Ok(())
                },
                &mut go_on,
            )
            .unwrap();
            (features.unwrap(), Tensor::cat(&gradients, 1))
        };
        let one = of(1);
        assert_eq!(one.1.size(), [2, 40, TOKENS as i64, D as i64]);
        for threads in [2, 5] {
            let several = of(threads);
            assert!(several.0 == one.0 && several.1 == one.1);
        }
    }

    /// If a stream, the collector or the observer fails, the others stop, and the first error is
    /// reported.
    #[test]
    fn a_failure_ends_all_streams_and_is_reported() {
        let Problem {
            samples,
            prompts,
            vit,
            _dir,
        } = problem(3);
        let pairs = vit.pairs(&samples, &prompts);
        let run = |fail_at: usize, panic_at: usize, refuse_at: usize, stop_after: u64| {
            let mut told = 0;
            vit.each_micro_batch(
                &pairs,
                || (),
                |(), batch| match batch.rows[0] {
                    at if at == fail_at => Err(EngineError::NotFinite("these")),
                    at if at == panic_at => panic!("at {at}"),
                    _ => batch.features(),
                },
                |rows, _| match rows[0] == refuse_at {
                    true => Err(EngineError::NotFinite("those")),
                    false => Ok(()),
                },
                &mut |pairs| {
                    told += pairs;
                    match told > stop_after {
                        true => ControlFlow::Break(()),
                        false => ControlFlow::Continue(()),
                    }
                },
            )
        };
        let never = usize::MAX;
        assert!(run(never, never, never, u64::MAX).is_ok());
        let failed = run(6, never, never, u64::MAX).unwrap_err();
        assert!(matches!(failed, EngineError::NotFinite("these")));
        let refused = run(never, never, 9, u64::MAX).unwrap_err();
        assert!(matches!(refused, EngineError::NotFinite("those")));
        let stopped = run(never, never, never, 20).unwrap_err();
        assert!(matches!(stopped, EngineError::Stopped));
        let panicked = catch_unwind(AssertUnwindSafe(|| run(never, 12, never, u64::MAX)));
        let payload = panicked.unwrap_err();
        assert_eq!(payload.downcast_ref::<String>().unwrap(), "at 12");
        // The streams still work afterwards.
        assert!(run(never, never, never, u64::MAX).is_ok());
    }
}
