//! A cache changes the cost of a composition, and nothing in its answer.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use tch::Device;

use crate::Engine;
use crate::cache::ResultCache;
use crate::testing::{Recorder, cache_files, input};
use promptweave_domain::composer::{Composer as _, Composition, Observer};
use promptweave_domain::composition::CompositionInput;
use promptweave_domain::phase::Phase;
use promptweave_domain::split::Split;

/// Number of samples of [`input`].
const SAMPLES: u64 = 60;

/// A new engine on the cache that earlier ones left in this directory.
fn engine(dir: &Path, gradients: bool) -> Engine {
    let cache = ResultCache::open(dir, 1 << 30, gradients).unwrap();
    Engine::new(Device::Cpu).with_cache(cache.unwrap())
}

/// Everything in an answer that must not depend on a cache.
fn answer(mut composition: Composition) -> (String, Vec<u8>, Vec<u8>) {
    composition.result.timings.clear();
    let result = serde_json::to_string(&composition.result).unwrap();
    (result, composition.composed, composition.statistics)
}

/// The answer, and how many sample × prompt pairs features and gradients went through the backbone
/// for.
fn compose(
    engine: &mut Engine,
    input: &CompositionInput,
) -> ((String, Vec<u8>, Vec<u8>), [u64; 2]) {
    let mut recorder = Recorder::default();
    let composition = engine.compose(input, &mut recorder).unwrap();
    let pairs = [Phase::Features, Phase::Gradients].map(|phase| {
        let of_phase = recorder.seen.iter().filter(|seen| seen.0 == phase);
        let counted = of_phase.filter(|(_, _, total)| *total > 1);
        counted.map(|(_, done, _)| *done).max().unwrap_or(0)
    });
    for phase in Phase::OF_COMPOSITION
        .into_iter()
        .filter(|phase| *phase != Phase::Solve)
    {
        let (_, done, total) = recorder.seen.iter().rfind(|seen| seen.0 == phase).unwrap();
        let nothing_to_do = phase == Phase::Features && pairs[0] == 0;
        assert!(
            done == total || nothing_to_do,
            "{phase:?}: {done} of {total}"
        );
    }
    (answer(composition), pairs)
}

fn with(input: &CompositionInput, objective: &str) -> CompositionInput {
    CompositionInput {
        objective: serde_json::from_str(objective).unwrap(),
        ..input.clone()
    }
}

/// The files of the cache.
fn entries(dir: &Path) -> Vec<PathBuf> {
    cache_files(&dir.join("results"))
}

#[test]
fn cold_warm_and_without_a_cache_the_answer_is_the_same_bit_by_bit() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(dir.path(), 2);
    input.target.eval_split = Some(Split::Test);
    for (i, objective) in [
        r#"{}"#,
        r#"{"align_tokens": "hungarian", "alignment": {"gradient_normalization": "rms"}, "experimental": {"refine": 1}}"#,
        r#"{"head": {"kind": "shared"}}"#,
        r#"{"head": {"kind": "ridge"}, "trade_off": "validation"}"#,
    ]
    .into_iter()
    .enumerate()
    {
        let input = with(&input, objective);
        let cache = dir.path().join(i.to_string());
        let (plain, all) = compose(&mut Engine::new(Device::Cpu), &input);
        assert_eq!(all, [2 * SAMPLES; 2]);
        assert_eq!(
            compose(&mut engine(&cache, true), &input),
            (plain.clone(), all)
        );
        assert_eq!(
            compose(&mut engine(&cache, true), &input),
            (plain.clone(), [0, 0])
        );
        // The same with one source cached.
        let cache = dir.path().join(format!("{i}-one"));
        let mut one = input.clone();
        one.sources = vec![input.sources[1].clone()];
        compose(&mut engine(&cache, true), &one);
        assert_eq!(compose(&mut engine(&cache, true), &input).0, plain);
    }
}

#[test]
fn a_source_more_costs_what_it_alone_costs() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 4);
    let mut fewer = input.clone();
    let new = fewer.sources.remove(1);
    assert_eq!(new.prompt, "p1");
    let mut engine = engine(dir.path(), true);
    assert_eq!(compose(&mut engine, &fewer).1, [3 * SAMPLES; 2]);
    assert_eq!(compose(&mut engine, &input).1, [SAMPLES; 2]);
    assert_eq!(compose(&mut engine, &fewer).1, [0; 2]);
    // Other samples, or another order of them, give other numbers.
    let mut others = fewer.clone();
    others.target.max_samples = 40;
    assert_eq!(compose(&mut engine, &others).1, [3 * 40; 2]);
}

#[test]
fn other_options_cost_what_depends_on_them() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 2);
    let mut engine = engine(dir.path(), true);
    let mut pairs = |objective: &str| compose(&mut engine, &with(&input, objective)).1;
    let all = 2 * SAMPLES;
    assert_eq!(pairs("{}"), [all, all]);
    for nothing in [
        r#"{"trade_off": "knee"}"#,
        r#"{"alignment": {"variant": "fishr", "gradient_normalization": "rms"}}"#,
        r#"{"h_score": {"mode": "trace_ratio"}}"#,
        r#"{"experimental": {"entropy": 0.1}}"#,
    ] {
        assert_eq!(pairs(nothing), [0, 0], "{nothing}");
    }
    for head in [
        r#"{"head": {"shrinkage": 0.2}}"#,
        r#"{"head": {"kind": "ridge"}}"#,
        r#"{"head": {"kind": "shared"}}"#,
    ] {
        assert_eq!(pairs(head), [0, all], "{head}");
        assert_eq!(pairs(head), [0, 0], "{head}");
    }
    // A head fitted on all sources changes if there are fewer.
    let mut one = with(&input, r#"{"head": {"kind": "shared"}}"#);
    one.sources.truncate(1);
    assert_eq!(compose(&mut engine, &one).1, [0, SAMPLES]);
}

#[test]
fn gradients_are_kept_where_that_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 2);
    let mut engine = engine(dir.path(), false);
    let (first, _) = compose(&mut engine, &input);
    assert_eq!(compose(&mut engine, &input), (first, [0, 2 * SAMPLES]));
    // Two sources' features, and those without a prompt.
    assert_eq!(entries(dir.path()).len(), 3);
}

#[test]
fn damaged_files_are_computed_again() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 2);
    let mut engine = engine(dir.path(), true);
    let (first, all) = compose(&mut engine, &input);
    assert_eq!(entries(dir.path()).len(), 5);
    for path in entries(dir.path()) {
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    assert_eq!(compose(&mut engine, &input), (first.clone(), all));
    for path in entries(dir.path()) {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_len(100).unwrap();
    }
    assert_eq!(compose(&mut engine, &input), (first.clone(), all));
    assert_eq!(compose(&mut engine, &input), (first, [0, 0]));
}

#[test]
fn what_was_stopped_halfway_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 2);
    let mut engine = engine(dir.path(), true);
    let mut stopped = Recorder {
        stop_at: Some(Phase::Gradients),
        ..Recorder::default()
    };
    assert!(engine.compose(&input, &mut stopped).is_err());
    assert_eq!(entries(dir.path()).len(), 3, "features alone");
    assert_eq!(compose(&mut engine, &input).1, [0, 2 * SAMPLES]);
}

/// Truncates every file as soon as gradients are being read.
struct CutsOff<'a>(&'a Path);

impl Observer for CutsOff<'_> {
    fn progress(&mut self, phase: Phase, done: u64, _: u64) -> ControlFlow<()> {
        if phase == Phase::Gradients && done == 1 {
            for path in entries(self.0) {
                let file = fs::File::options().write(true).open(path).unwrap();
                file.set_len(100).unwrap();
            }
        }
        ControlFlow::Continue(())
    }
}

#[test]
fn files_that_go_bad_while_they_are_read_are_computed_again() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path(), 2);
    let mut engine = engine(dir.path(), true);
    let (first, _) = compose(&mut engine, &input);
    let again = engine.compose(&input, &mut CutsOff(dir.path())).unwrap();
    assert_eq!(answer(again), first);
}
