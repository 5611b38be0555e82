//! A tuning as a job: work done before a kill is not repeated, and the result agrees with the file.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use tch::Device;

use crate::Engine;
use crate::testing::{Recorder, write_backbone, write_dataset};
use promptweave_domain::composer::{Composer as _, CompositionError};
use promptweave_domain::composition::{Source, TargetSamples};
use promptweave_domain::digest::Digest;
use promptweave_domain::phase::Phase;
use promptweave_domain::prompt_file::PromptFile;
use promptweave_domain::split::Split;
use promptweave_domain::training_record::TrainingRecord;
use promptweave_domain::tuning::{
    CheckpointUnavailable, Checkpoints, Epoch, Grid, NoCheckpoints, Tuned, TuningInput,
    TuningOptions,
};

/// Checkpoints in memory, of the tuning and of each pair.
#[derive(Clone, Default)]
struct Kept {
    name: String,
    files: Rc<RefCell<HashMap<String, Vec<u8>>>>,
    epochs: Rc<RefCell<Vec<(String, usize)>>>,
}

impl Checkpoints for Kept {
    fn last(&mut self) -> Result<Option<Vec<u8>>, CheckpointUnavailable> {
        Ok(self.files.borrow().get(&self.name).cloned())
    }

    fn keep(&mut self, epoch: &Epoch, bytes: &[u8]) {
        let name = self.name.clone();
        self.epochs.borrow_mut().push((name.clone(), epoch.epoch));
        self.files.borrow_mut().insert(name, bytes.to_vec());
    }

    fn of_pair(&mut self, place: usize) -> Box<dyn Checkpoints + '_> {
        Box::new(Self {
            name: place.to_string(),
            ..self.clone()
        })
    }
}

fn input(dir: &Path) -> TuningInput {
    write_backbone(&dir.join("backbone"));
    write_dataset(&dir.join("target"), 30, 12);
    TuningInput {
        backbone_dir: dir.join("backbone"),
        target_dir: dir.join("target"),
        target: TargetSamples {
            split: Split::Train,
            eval_split: Some(Split::Test),
            max_samples: 30,
            seed: 0,
            skip_unreadable: false,
        },
        task: "tiny".into(),
        start: None,
        options: TuningOptions {
            num_tokens: 3,
            epochs: 3,
            batch_size: 8,
            sketch_samples: 6,
            ..TuningOptions::default()
        },
        grid: Grid {
            prompt_learning_rates: vec![1e-9, 5e-2],
            weight_decays: vec![],
        },
    }
}

fn tune(input: &TuningInput, checkpoints: &mut dyn Checkpoints, observer: &mut Recorder) -> Tuned {
    Engine::new(Device::Cpu)
        .tune(input, checkpoints, observer)
        .unwrap()
}

#[test]
fn a_killed_tuning_repeats_no_epoch_of_grid_or_prompt_and_ends_with_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path());
    let mut seen = Recorder::default();
    let whole = tune(&input, &mut NoCheckpoints, &mut seen);
    for (phase, total) in [
        (Phase::Select, 2 * 3 * 24),
        (Phase::Tune, 3 * 30),
        (Phase::Verify, 12),
    ] {
        let last = seen
            .seen
            .iter()
            .rfind(|(seen, _, _)| *seen == phase)
            .unwrap();
        assert_eq!((last.1, last.2), (total, total), "{phase:?}");
        assert!(whole.result.timings.contains_key(phase.name()));
    }

    let mut kept = Kept::default();
    for stop_at in [Phase::Select, Phase::Tune] {
        let mut killed = Recorder {
            stop_at: Some(stop_at),
            ..Recorder::default()
        };
        let stopped = Engine::new(Device::Cpu).tune(&input, &mut kept, &mut killed);
        assert!(matches!(stopped, Err(CompositionError::Stopped)));
    }
    // All pairs were finished before the second kill, and are not tuned again.
    let before = kept.epochs.borrow().len();
    let again = tune(&input, &mut kept, &mut Recorder::default());
    let mut after = kept.epochs.borrow()[before..].to_vec();
    after.dedup();
    let of_tuning = |epoch| (String::new(), epoch);
    assert_eq!(after, [of_tuning(1), of_tuning(2), of_tuning(3)]);
    assert_eq!(again.file, whole.file);
    assert_eq!(again.result.candidates, whole.result.candidates);
}

/// A checkpoint store that is unavailable.
struct Away;

impl Checkpoints for Away {
    fn last(&mut self) -> Result<Option<Vec<u8>>, CheckpointUnavailable> {
        Err(CheckpointUnavailable("no route to host".into()))
    }

    fn keep(&mut self, _: &Epoch, _: &[u8]) {}
}

#[test]
fn a_checkpoint_that_cannot_be_had_now_is_waited_for_and_not_done_without() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(dir.path());
    input.grid = Grid::default();
    let refused = Engine::new(Device::Cpu).tune(&input, &mut Away, &mut Recorder::default());
    match refused {
        Err(CompositionError::Retry { code, detail }) => {
            assert_eq!(code, "checkpoint_unavailable");
            assert!(detail.contains("no route to host"), "{detail}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_result_says_what_the_file_does_and_what_it_was_chosen_by() {
    let dir = tempfile::tempdir().unwrap();
    let input = input(dir.path());
    let tuned = tune(&input, &mut NoCheckpoints, &mut Recorder::default());
    let result = &tuned.result;
    assert_eq!(result.tuned.digest, Digest::of(&tuned.file));
    assert_eq!((result.num_samples, result.num_held_out), (30, 6));
    assert_eq!((result.num_classes, result.skipped_images), (3, 0));
    assert_eq!(result.candidates.len(), 2);
    assert_eq!(result.options.prompt_learning_rate, 5e-2);
    assert_eq!(result.curves.cross_entropy.len(), 3);
    let file = PromptFile::parse(&tuned.file).unwrap();
    let record = TrainingRecord::of(file.metadata.as_ref().unwrap()).unwrap();
    assert_eq!(result.distance_from_init, record.distance_from_init);
    assert!(record.distance_from_init.is_some());
    let evaluation = result.evaluation.unwrap();
    assert!(evaluation.accuracy > 0.5, "{evaluation:?}");

    // With learning rates of 0 nothing moves from that prompt and head, so that the result is the
    // same.
    let mut standing = input.clone();
    standing.grid = Grid::default();
    standing.options.epochs = 1;
    standing.options.prompt_learning_rate = 0.0;
    standing.options.head_learning_rate = 0.0;
    standing.start = Some(Source {
        prompt: "tiny".into(),
        version: Some(1),
        digest: Digest::of(&tuned.file),
        file,
    });
    let stood = tune(&standing, &mut NoCheckpoints, &mut Recorder::default());
    assert_eq!(stood.result.evaluation, result.evaluation);
    assert_eq!(stood.result.distance_from_init, Some(0.0));
    assert_eq!(stood.result.num_held_out, 0);
}

#[test]
fn a_start_of_another_width_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(dir.path());
    let tuned = tune(&input, &mut NoCheckpoints, &mut Recorder::default());
    let mut file = PromptFile::parse(&tuned.file).unwrap();
    file.prompt_embeddings.shape = vec![1, file.prompt_embeddings.values.len()];
    input.start = Some(Source {
        prompt: "wide".into(),
        version: Some(1),
        digest: Digest::of(&tuned.file),
        file,
    });
    let refused =
        Engine::new(Device::Cpu).tune(&input, &mut NoCheckpoints, &mut Recorder::default());
    let error = refused.unwrap_err();
    assert!(matches!(&error, CompositionError::Refused { code, .. } if *code == "width_mismatch"));
    assert!(error.to_string().contains("`wide:1`"), "{error}");
}
