use super::*;
use crate::samples::Selection;
use crate::score::transferability::matrix;
use crate::testing::{write_backbone, write_dataset};
use crate::tune::select::select;
use crate::vit::Compute;
use promptweave_domain::precision::Precision;
use promptweave_domain::split::Split;
use promptweave_domain::tuning::{
    CheckpointUnavailable, Epoch, Grid, NoCheckpoints, OptimizerKind,
};
use promptweave_formats::dataset::LabelledImages;

/// The tiny task: 30 images of three classes.
pub struct Problem {
    _dir: tempfile::TempDir,
    pub backbone: Backbone,
    pub vit: Vit,
    pub train: Samples,
    pub test: Samples,
    pub classes: Vec<String>,
}

pub fn problem() -> Problem {
    let dir = tempfile::tempdir().unwrap();
    let backbone = write_backbone(&dir.path().join("backbone"));
    write_dataset(&dir.path().join("target"), 30, 12);
    let vit = Vit::load(&backbone, &Compute::on(Device::Cpu, Precision::F32)).unwrap();
    let dataset = LabelledImages::read(&dir.path().join("target")).unwrap();
    let load = |split| {
        let selection = Selection {
            split,
            max_samples: None,
            seed: 0,
            skip_unreadable: false,
        };
        Samples::load(&dataset, &selection, &backbone.config.preprocessing).unwrap()
    };
    Problem {
        train: load(Split::Train),
        test: load(Split::Test),
        classes: dataset.classes.clone(),
        backbone,
        vit,
        _dir: dir,
    }
}

impl Problem {
    pub fn tuning<'a>(&'a self, options: &'a TuningOptions) -> Tuning<'a> {
        Tuning {
            backbone: &self.backbone,
            vit: &self.vit,
            train: &self.train,
            held_out: None,
            task: "tiny",
            classes: &self.classes,
            start: None,
            takes_head: true,
            teachers: &[],
            options,
        }
    }
}

pub fn source(file: &PromptFile) -> Source {
    Source {
        prompt: "tuned".into(),
        version: None,
        digest: Digest::of(&file.to_bytes()),
        file: file.clone(),
    }
}

pub fn options() -> TuningOptions {
    TuningOptions {
        num_tokens: 3,
        epochs: 4,
        batch_size: 8,
        sketch_samples: 6,
        ..TuningOptions::default()
    }
}

pub fn go_on(_: TuningProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn run(tuning: &Tuning<'_>) -> PromptFile {
    tuning.run(&mut NoCheckpoints, go_on).unwrap()
}

fn record(file: &PromptFile) -> TrainingRecord {
    TrainingRecord::of(file.metadata.as_ref().unwrap()).unwrap()
}

fn curves(file: &PromptFile) -> (Vec<f64>, usize) {
    let curves = record(file).curves;
    (curves.cross_entropy, curves.held_out.len())
}

/// A checkpoint in memory.
#[derive(Default)]
struct Kept(Option<Vec<u8>>);

impl Checkpoints for Kept {
    fn last(&mut self) -> Result<Option<Vec<u8>>, CheckpointUnavailable> {
        Ok(self.0.clone())
    }
    fn keep(&mut self, _: &Epoch, bytes: &[u8]) {
        self.0 = Some(bytes.to_vec());
    }
}

#[test]
fn the_initial_prompt_is_a_function_of_its_seed_and_within_bounds() {
    let prompt = initial_prompt(3, 384, 14, 7);
    assert_eq!(prompt, initial_prompt(3, 384, 14, 7));
    assert_ne!(prompt, initial_prompt(3, 384, 14, 8));
    let bound = (6.0f64 / (3.0 * 196.0 + 384.0)).sqrt() as f32;
    assert!(prompt.iter().all(|v| v.abs() <= bound));
    assert!(prompt.iter().any(|v| v.abs() > 0.9 * bound));
}

#[test]
fn tuning_lowers_the_loss_by_either_optimizer_and_writes_a_whole_file() {
    let problem = problem();
    for optimizer in [OptimizerKind::AdamW, OptimizerKind::Sgd] {
        let options = TuningOptions {
            optimizer,
            prompt_dropout: 0.1,
            ..options()
        };
        let file = run(&problem.tuning(&options));
        let (losses, _) = curves(&file);
        assert_eq!(losses.len(), 4);
        assert!(losses[3] < losses[0], "{optimizer:?}: {losses:?}");
        let sketch = file.sketch.as_ref().unwrap();
        assert_eq!(sketch.features.shape[0], 6);
        let read = PromptFile::parse(&file.to_bytes()).unwrap();
        assert_eq!(read, file);
        assert_eq!(file.to_bytes(), run(&problem.tuning(&options)).to_bytes());
    }
}

/// The prompts agree to the last bit, wherever the tuning was killed.
#[test]
fn a_tuning_goes_on_from_its_checkpoint_as_if_it_had_not_been_killed() {
    let problem = problem();
    for optimizer in [OptimizerKind::AdamW, OptimizerKind::Sgd] {
        let options = TuningOptions {
            optimizer,
            prompt_dropout: 0.2,
            ..options()
        };
        let tuning = Tuning {
            held_out: Some(&problem.test),
            ..problem.tuning(&options)
        };
        let whole = run(&tuning);
        let mut kept = Kept::default();
        let killed = tuning.run(&mut kept, |at| match at.epoch {
            2 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
        assert!(matches!(killed, Err(EngineError::Stopped)));
        let mut epochs = Vec::new();
        let finished = tuning.run(&mut kept, |at| {
            epochs.push(at.epoch);
            ControlFlow::Continue(())
        });
        assert_eq!(finished.unwrap().to_bytes(), whole.to_bytes());
        epochs.dedup();
        assert_eq!(epochs, [2, 3], "what was done is not done again");

        // A checkpoint of another tuning, or half a file: the tuning begins anew.
        let other = TuningOptions {
            seed: 1,
            ..options.clone()
        };
        let other = Tuning {
            options: &other,
            ..tuning
        };
        assert_eq!(
            other.run(&mut kept, go_on).unwrap().to_bytes(),
            run(&other).to_bytes()
        );
        let mut half = Kept(kept.0.map(|bytes| bytes[..bytes.len() / 2].to_vec()));
        assert_eq!(
            tuning.run(&mut half, go_on).unwrap().to_bytes(),
            whole.to_bytes()
        );
    }
}

#[test]
fn a_start_is_gone_on_from_with_its_head() {
    let problem = problem();
    let first = run(&problem.tuning(&options()));
    let standing = TuningOptions {
        prompt_learning_rate: 0.0,
        head_learning_rate: 0.0,
        sketch_samples: 0,
        epochs: 1,
        ..options()
    };
    // The digest is the one that the prompt is known by, whatever its file's bytes.
    let start = Source {
        digest: Digest::of(b"in f16"),
        ..source(&first)
    };
    let tuning = Tuning {
        start: Some(&start),
        ..problem.tuning(&standing)
    };
    let again = run(&tuning);
    assert_eq!(again.prompt_embeddings, first.prompt_embeddings);
    assert_eq!(again.head, first.head);
    assert_eq!(record(&again).start, Some(start.digest));
    assert_eq!(again.metadata.as_ref().unwrap().init_seed, Some(0));
    let headless = run(&Tuning {
        takes_head: false,
        ..tuning
    });
    let none = vec![0.0; problem.classes.len() * first.embed_dim()];
    assert_eq!(headless.head.unwrap().weight.values, none);
    // The head belongs to other classes, and is not used.
    let two = &problem.classes[..2];
    let few: Vec<usize> = (0..problem.train.len())
        .filter(|n| problem.train.labels[*n] < 2)
        .collect();
    let few = problem.train.only(&few);
    let other = run(&Tuning {
        classes: two,
        train: &few,
        ..tuning
    });
    assert_eq!(
        other.head.unwrap().weight.values,
        vec![0.0; 2 * first.embed_dim()]
    );
}

#[test]
fn patience_ends_a_tuning_and_takes_its_best_epoch() {
    let problem = problem();
    // The rate is far too high, so that the loss rises at some time.
    let options = TuningOptions {
        epochs: 40,
        prompt_learning_rate: 0.5,
        head_learning_rate: 0.5,
        patience: Some(2),
        ..options()
    };
    let tuning = Tuning {
        held_out: Some(&problem.test),
        ..problem.tuning(&options)
    };
    let file = run(&tuning);
    let (losses, held_out) = curves(&file);
    assert!(losses.len() < 40 && held_out == losses.len(), "{losses:?}");
    let of_epochs = record(&file).curves.held_out;
    let lowest = of_epochs
        .iter()
        .map(|score| score.cross_entropy)
        .fold(f64::INFINITY, f64::min);
    let head = file.head.as_ref().unwrap();
    let parameters = [&file.prompt_embeddings, &head.weight, &head.bias].map(matrix);
    let alive = &mut || ControlFlow::Continue(());
    let found = shallow::score(&problem.vit, &problem.test, &parameters, alive).unwrap();
    assert!(
        (found.cross_entropy - lowest).abs() < 1e-9,
        "{found:?} {of_epochs:?}"
    );
}

#[test]
fn the_grid_takes_the_pair_that_does_best_on_what_is_held_out() {
    let problem = problem();
    let grid = Grid {
        prompt_learning_rates: vec![1e-9, 5e-2],
        weight_decays: vec![0.0, 0.1],
    };
    let base = options();
    let tuning = problem.tuning(&base);
    let (chosen, candidates) = select(
        &grid,
        tuning,
        (&problem.train, &problem.test),
        &mut NoCheckpoints,
        go_on,
    )
    .unwrap();
    assert_eq!(candidates.len(), 4);
    let accuracies = candidates.iter().map(|c| c.accuracy.unwrap());
    let best = accuracies.fold(0.0, f64::max);
    let of_chosen = candidates.iter().find(|c| {
        c.prompt_learning_rate == chosen.prompt_learning_rate
            && c.weight_decay == chosen.weight_decay
    });
    assert_eq!(of_chosen.unwrap().accuracy, Some(best));
    assert_eq!(
        (chosen.epochs, chosen.sketch_samples),
        (base.epochs, base.sketch_samples)
    );
}

#[test]
fn dropout_leaves_out_its_share_and_keeps_the_mean() {
    let kept = |step, place| {
        let values = Tensor::ones([100, 100], (Kind::Float, Device::Cpu));
        crate::tune::train::kept(&values, 0.3, 7, step, place)
    };
    let first = kept(5, 0);
    let left_out = f64::try_from(first.eq(0.0).to_kind(Kind::Double).mean(Kind::Double)).unwrap();
    assert!((left_out - 0.3).abs() < 0.02, "{left_out}");
    assert!((f64::try_from(first.mean(Kind::Double)).unwrap() - 1.0).abs() < 0.03);
    assert!(kept(5, 0) == first && kept(6, 0) != first && kept(5, 1) != first);
}

#[test]
fn a_pair_whose_losses_do_not_stay_finite_loses_and_a_single_pair_is_taken() {
    let problem = problem();
    let base = TuningOptions {
        optimizer: OptimizerKind::Sgd,
        ..options()
    };
    let held_out = (&problem.train, &problem.test);
    let select = |rates: &[f64]| {
        let grid = Grid {
            prompt_learning_rates: rates.to_vec(),
            weight_decays: vec![],
        };
        let tuning = problem.tuning(&base);
        select(&grid, tuning, held_out, &mut NoCheckpoints, go_on)
    };
    let (chosen, candidates) = select(&[1e30, 1e-3]).unwrap();
    assert_eq!(chosen.prompt_learning_rate, 1e-3);
    assert_eq!(
        (candidates[0].accuracy, candidates[0].cross_entropy),
        (None, None)
    );
    assert!(matches!(
        select(&[1e30, 1e31]),
        Err(EngineError::NotFinite(_))
    ));

    let grid = Grid {
        prompt_learning_rates: vec![0.0],
        weight_decays: vec![0.25],
    };
    let images = Images {
        all: problem
            .train
            .only(&(0..problem.train.len()).collect::<Vec<_>>()),
        part: problem.train.only(&[0]),
        held_out: problem.train.only(&[1]),
        whose: "of nobody",
    };
    let course = TuningRun {
        tuning: problem.tuning(&base),
        grid: &grid,
        images: &images,
    };
    let outcome = course
        .run(&mut NoCheckpoints, &mut |_, _| ControlFlow::Continue(()))
        .unwrap();
    let options = outcome.options;
    assert_eq!(
        (options.prompt_learning_rate, options.weight_decay),
        (0.0, 0.25)
    );
}

#[test]
fn a_head_of_as_many_other_classes_is_not_taken() {
    let problem = problem();
    let mut first = run(&problem.tuning(&options()));
    let standing = TuningOptions {
        head_learning_rate: 0.0,
        sketch_samples: 0,
        epochs: 1,
        ..options()
    };
    let head_after = |start: &PromptFile| {
        let start = source(start);
        let tuning = Tuning {
            start: Some(&start),
            ..problem.tuning(&standing)
        };
        run(&tuning).head.unwrap().weight
    };
    let own = first.head.clone().unwrap().weight;
    assert_eq!(head_after(&first), own);
    let names = ["x", "y", "z"].map(str::to_owned).to_vec();
    first.metadata.as_mut().unwrap().classes = Some(names);
    assert_eq!(head_after(&first).values, vec![0.0; own.values.len()]);
}

#[test]
fn scores_that_are_not_finite_are_an_error() {
    let logits = |value: f64| Tensor::from_slice(&[value, 1.0]).view([1, 2]);
    assert!(score_of(&logits(0.5), &[0]).is_ok());
    for value in [f64::NAN, f64::INFINITY] {
        let refused = score_of(&logits(value), &[1]);
        assert!(matches!(refused, Err(EngineError::NotFinite(_))), "{value}");
    }
}
