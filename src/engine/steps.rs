//! Where a composition is: told to its observer, and timed.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Instant;

use super::EngineError;
use crate::domain::composition::{Observer, Phase};

/// `Break` from the observer as an error.
pub fn stop_on(flow: ControlFlow<()>) -> Result<(), EngineError> {
    if flow.is_break() {
        Err(EngineError::Stopped)
    } else {
        Ok(())
    }
}

/// Tells the observer where the work is, and times the phases.
pub struct Steps<'a> {
    observer: &'a mut dyn Observer,
    started: Instant,
    current: Option<Phase>,
    timings: BTreeMap<String, f64>,
}

impl<'a> Steps<'a> {
    pub fn new(observer: &'a mut dyn Observer) -> Self {
        Self {
            observer,
            started: Instant::now(),
            current: None,
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

    /// A sign of life where nothing can be counted.
    pub fn tick(&mut self, phase: Phase) -> ControlFlow<()> {
        self.observer.progress(phase, 0, 1)
    }

    /// Counts finished units of the current phase up to `total`; where nothing is to be done, it is done.
    pub fn counter(&mut self, total: u64) -> impl FnMut(u64) -> ControlFlow<()> {
        let phase = self.current.expect("a phase has begun");
        let observer = &mut *self.observer;
        let (mut done, total) = if total == 0 { (1, 1) } else { (0, total) };
        move |finished| {
            done += finished;
            observer.progress(phase, done, total)
        }
    }

    pub fn finish(mut self) -> BTreeMap<String, f64> {
        self.close();
        self.timings
    }
}
