//! The progress of a composition: reported to its observer, and timed.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Instant;

use crate::error::EngineError;
use promptweave_domain::composer::Observer;
use promptweave_domain::phase::Phase;
use promptweave_domain::sharding::Shards;

/// Turns the observer's `Break` into an error.
pub fn stop_on(flow: ControlFlow<()>) -> Result<(), EngineError> {
    if flow.is_break() {
        Err(EngineError::Stopped)
    } else {
        Ok(())
    }
}

/// Reports progress to the observer, and times the phases.
pub struct Steps<'a> {
    observer: &'a mut dyn Observer,
    started: Instant,
    current: Option<Phase>,
    /// The units done and in total at which the last counter began.
    at: (u64, u64),
    timings: BTreeMap<String, f64>,
}

impl<'a> Steps<'a> {
    pub fn new(observer: &'a mut dyn Observer) -> Self {
        Self {
            observer,
            started: Instant::now(),
            current: None,
            at: (0, 1),
            timings: BTreeMap::new(),
        }
    }

    pub fn begin(&mut self, phase: Phase) -> Result<(), EngineError> {
        self.close();
        self.current = Some(phase);
        stop_on(self.tick(phase))
    }

    fn close(&mut self) {
        if let Some(phase) = self.current.take() {
            self.timings.insert(
                phase.name().to_owned(),
                self.started.elapsed().as_secs_f64(),
            );
        }
        self.started = Instant::now();
    }

    /// Reports a sign of life when nothing can be counted.
    pub fn tick(&mut self, phase: Phase) -> ControlFlow<()> {
        self.observer.progress(phase, 0, 1)
    }

    /// The other workers that may share the work.
    pub fn shards(&mut self) -> Option<&mut dyn Shards> {
        self.observer.shards()
    }

    /// Reports how far the current phase is.
    pub fn count(&mut self, done: u64, total: u64) -> ControlFlow<()> {
        let phase = self.current.expect("a phase has begun");
        self.observer.progress(phase, done, total)
    }

    /// Counts finished units of the current phase up to `total`. With nothing to do, the phase
    /// counts as done.
    pub fn counter(&mut self, total: u64) -> impl FnMut(u64) -> ControlFlow<()> {
        let (done, total) = if total == 0 { (1, 1) } else { (0, total) };
        self.counter_from(done, total)
    }

    /// Like [`Self::counter`], with `done` units finished already.
    pub fn counter_from(&mut self, done: u64, total: u64) -> impl FnMut(u64) -> ControlFlow<()> {
        let phase = self.current.expect("a phase has begun");
        self.at = (done, total);
        let observer = &mut *self.observer;
        let mut done = done;
        move |finished| {
            done += finished;
            observer.progress(phase, done, total)
        }
    }

    /// Runs work inside the current phase that has steps of its own. The observer gets them as
    /// signs of life.
    pub fn aside<T>(&mut self, work: impl FnOnce(&mut Steps<'_>) -> T) -> T {
        let mut aside = Aside {
            phase: self.current.expect("a phase has begun"),
            at: self.at,
            observer: &mut *self.observer,
        };
        work(&mut Steps::new(&mut aside))
    }

    pub fn finish(mut self) -> BTreeMap<String, f64> {
        self.close();
        self.timings
    }
}

/// Receives the steps of the work inside, and reports the outer phase instead.
struct Aside<'a> {
    observer: &'a mut dyn Observer,
    phase: Phase,
    at: (u64, u64),
}

impl Observer for Aside<'_> {
    fn progress(&mut self, _: Phase, _: u64, _: u64) -> ControlFlow<()> {
        self.observer.progress(self.phase, self.at.0, self.at.1)
    }
}
