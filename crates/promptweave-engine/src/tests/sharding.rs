//! A shared composition has the same answer as one that is not shared, whoever computed which
//! shard.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use tch::Device;
use uuid::Uuid;

use crate::Engine;
use crate::compose::self_test::job;
use crate::vit::Compute;
use promptweave_domain::composer::{Composer as _, Composition, Observer};
use promptweave_domain::composition::CompositionInput;
use promptweave_domain::early_stopping::EarlyStopping;
use promptweave_domain::phase::Phase;
use promptweave_domain::precision::Precision;
use promptweave_domain::sharding::{Estimate, Next, Shard, ShardInput, ShardingError, Shards};

fn engine() -> Engine {
    Engine::with(Compute {
        largest_micro_batch: 4,
        ..Compute::on(Device::Cpu, Precision::F64)
    })
}

/// A job's owner, and a helper for every shard that `helps` selects.
struct Team<'a> {
    helper: Engine,
    helps: fn(usize) -> bool,
    input: &'a CompositionInput,
    min_shard_pairs: u64,
    laid_out: BTreeMap<Phase, usize>,
    files: BTreeMap<(Phase, usize), Vec<u8>>,
    merged: BTreeMap<Phase, usize>,
    helped: usize,
    estimates: Vec<Estimate>,
    ended: bool,
    seen: Vec<(Phase, u64, u64)>,
}

impl<'a> Team<'a> {
    fn new(input: &'a CompositionInput, helps: fn(usize) -> bool) -> Self {
        Self {
            helper: engine(),
            helps,
            input,
            min_shard_pairs: 40,
            laid_out: BTreeMap::new(),
            files: BTreeMap::new(),
            merged: BTreeMap::new(),
            helped: 0,
            estimates: Vec::new(),
            ended: false,
            seen: Vec::new(),
        }
    }

    fn compose(&mut self) -> Composition {
        engine().compose(self.input, self).unwrap()
    }
}

impl Observer for Team<'_> {
    fn progress(&mut self, phase: Phase, done: u64, total: u64) -> ControlFlow<()> {
        self.seen.push((phase, done, total));
        ControlFlow::Continue(())
    }

    fn shards(&mut self) -> Option<&mut dyn Shards> {
        Some(self)
    }
}

impl Shards for Team<'_> {
    fn min_shard_pairs(&self) -> u64 {
        self.min_shard_pairs
    }

    fn lay_out(&mut self, phase: Phase, count: usize) -> Result<usize, ShardingError> {
        if count > 1 {
            self.laid_out.entry(phase).or_insert(count);
        }
        Ok(self.laid_out.get(&phase).copied().unwrap_or(1))
    }

    fn next(&mut self, phase: Phase) -> Result<(Next, f64), ShardingError> {
        let count = self.laid_out[&phase];
        let there = |index: &usize| self.files.contains_key(&(phase, *index));
        let done = (0..count).filter(there).count() as f64;
        let merged = self.merged.entry(phase).or_insert(0);
        if let Some(file) = self.files.get(&(phase, *merged)) {
            *merged += 1;
            return Ok((Next::There(file.clone()), done));
        }
        // Shards are computed from the end, so that they are not finished in order.
        let index = (0..count).rfind(|index| !self.files.contains_key(&(phase, *index)));
        let shard = Shard {
            phase,
            index: index.expect("one is missing"),
            count,
        };
        if !(self.helps)(shard.index) {
            return Ok((Next::Compute(shard), done));
        }
        let features = self
            .files
            .iter()
            .filter(|((of, _), _)| *of == Phase::Features);
        let input = ShardInput {
            job: Uuid::nil(),
            composition: self.input.clone(),
            shard,
            features: match phase {
                Phase::Features => Vec::new(),
                _ => features.map(|(_, file)| file.clone()).collect(),
            },
        };
        struct Alone;
        impl Observer for Alone {
            fn progress(&mut self, _: Phase, _: u64, _: u64) -> ControlFlow<()> {
                ControlFlow::Continue(())
            }
        }
        let file = self.helper.shard(&input, &mut Alone).unwrap();
        self.helped += 1;
        self.files.insert((phase, shard.index), file);
        Ok((Next::Wait, done))
    }

    fn give_whole(&mut self, phase: Phase, bytes: Vec<u8>) -> Result<(), ShardingError> {
        self.files.retain(|(of, _), _| *of != phase);
        self.laid_out.insert(phase, 1);
        self.files.insert((phase, 0), bytes);
        Ok(())
    }

    fn give(&mut self, shard: Shard, bytes: Vec<u8>) -> Result<(), ShardingError> {
        self.laid_out.entry(shard.phase).or_insert(shard.count);
        self.files.insert((shard.phase, shard.index), bytes);
        Ok(())
    }

    fn end(&mut self, _: Phase) -> Result<(), ShardingError> {
        self.ended = true;
        Ok(())
    }

    fn estimate(&mut self, estimate: &Estimate) {
        self.estimates.push(estimate.clone());
    }
}

fn weights(composition: &Composition) -> Vec<f64> {
    let weights = composition.result.source_weights.iter();
    weights.map(|source| source.weight).collect()
}

fn difference(a: &[f64], b: &[f64]) -> f64 {
    let pairs = a.iter().zip(b);
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn whoever_computes_the_shards_the_answer_is_that_of_one_alone() {
    let dir = tempfile::tempdir().unwrap();
    let input = job(dir.path()).unwrap();
    let mut alone = Team::new(&input, |_| false);
    alone.min_shard_pairs = 0;
    let whole = alone.compose();
    assert!(alone.laid_out.is_empty() && alone.estimates.is_empty());
    let mut shared = Vec::new();
    for (helps, helped) in [
        ((|_| false) as fn(usize) -> bool, 0),
        (|index| index % 2 == 1, 2),
        (|_| true, 6),
    ] {
        let mut team = Team::new(&input, helps);
        let composition = team.compose();
        // 60 samples are enough for three shards, and 3 · 60 pairs make four.
        assert_eq!(
            team.laid_out,
            BTreeMap::from([(Phase::Features, 3), (Phase::Gradients, 3)])
        );
        assert_eq!(team.helped, helped);
        assert!(difference(&weights(&composition), &weights(&whole)) < 1e-9);
        let errors = |it: &Composition| {
            let errors = it.result.source_weights.iter();
            errors
                .map(|source| source.standard_error.unwrap())
                .collect::<Vec<_>>()
        };
        assert!(difference(&errors(&composition), &errors(&whole)) < 1e-7);
        // There is something to merge.
        assert!(
            errors(&whole).iter().all(|error| *error > 1e-3),
            "{:?}",
            errors(&whole)
        );
        let of_phase = team
            .seen
            .iter()
            .filter(|seen| seen.0 == Phase::Gradients && seen.2 > 1);
        assert!(
            of_phase
                .clone()
                .all(|(_, done, total)| done <= total && *total == 180)
        );
        assert!(
            of_phase.is_sorted_by_key(|(_, done, _)| *done),
            "{:?}",
            team.seen
        );
        shared.push((composition.statistics, composition.composed));
    }
    // The same shards give the same to the last bit.
    assert!(shared[0] == shared[1] && shared[1] == shared[2]);
}

#[test]
fn enough_is_enough_where_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = job(dir.path()).unwrap();
    let whole = Team::new(&input, |_| false).compose();
    assert_eq!(whole.result.early_stop, None);
    // A small job can stop early too, though its features are computed at once.
    input.early_stopping = Some(EarlyStopping {
        max_standard_error: 1.0,
    });
    let mut team = Team::new(&input, |_| true);
    team.min_shard_pairs = 0;
    let stopped = team.compose();
    assert!(team.ended);
    let early = stopped.result.early_stop.clone().unwrap();
    let [_, estimate] = &team.estimates[..] else {
        panic!("{:?}", team.estimates);
    };
    assert_eq!(
        (early.samples, early.total_samples, early.requested),
        (estimate.samples, 60, 1.0)
    );
    assert!((30..=50).contains(&early.samples), "{early:?}");
    assert_eq!((estimate.shards_done, estimate.shards), (2, 3));
    let estimated: Vec<f64> = estimate.source_weights.iter().map(|it| it.weight).collect();
    assert_eq!(estimated, weights(&stopped));
    assert!((estimated.iter().sum::<f64>() - 1.0).abs() < 1e-9);

    input.early_stopping = Some(EarlyStopping {
        max_standard_error: 1e-12,
    });
    let mut team = Team::new(&input, |index| index == 0);
    let never = team.compose();
    assert_eq!((never.result.early_stop, team.ended), (None, false));
    assert_eq!(team.estimates.len(), 2);
    let (a, b) = (&never.result.source_weights, &whole.result.source_weights);
    let of = |all: &[promptweave_domain::composition::SourceWeight]| -> Vec<f64> {
        all.iter().map(|source| source.weight).collect()
    };
    assert!(difference(&of(a), &of(b)) < 1e-9);
}
