//! A tuning as a job: from files to a prompt file, its curves, and its result on images that it
//! never saw.

use std::cell::RefCell;
use std::ops::ControlFlow;

use crate::compose::sources::check_start_of;
use crate::compose::steps::{Steps, stop_on};
use crate::device;
use crate::device::LIBTORCH;
use crate::error::EngineError;
use crate::samples::{Samples, Selection};
use crate::tune::{Images, Trained, Tuning, TuningRun};
use crate::vit::Vit;
use promptweave_domain::composer::Observer;
use promptweave_domain::composition::Provenance;
use promptweave_domain::digest::Digest;
use promptweave_domain::phase::Phase;
use promptweave_domain::tuning::{
    Checkpoints, HeldOut, Tuned, TunedPrompt, TuningInput, TuningResult,
};
use promptweave_formats::backbone::Backbone;
use promptweave_formats::dataset::LabelledImages;

/// Number of images between two signs of life while the prompt is evaluated.
const EVALUATED_AT_ONCE: usize = 256;

pub fn tune(
    backbone: &Backbone,
    vit: &Vit,
    input: &TuningInput,
    checkpoints: &mut dyn Checkpoints,
    observer: &mut dyn Observer,
) -> Result<Tuned, EngineError> {
    // Both the training and the evaluation after it report to these steps.
    let steps = RefCell::new(Steps::new(observer));
    if let Some(start) = &input.start {
        check_start_of(input.options.method, start, backbone)?;
    }
    let dataset = LabelledImages::read(&input.target_dir)?;
    let selection = Selection::of_target(&input.target);
    let preprocessing = &backbone.config.preprocessing;
    let images = Images::load(&dataset, &selection, preprocessing)?;
    images.all.check_classes(&dataset.classes)?;
    // The images are loaded now, so that errors in them do not show only after hours.
    let load = |split| Samples::load(&dataset, &selection.whole(split), preprocessing);
    let eval = input.target.eval_split.map(load).transpose()?;
    let course = TuningRun {
        tuning: Tuning {
            backbone,
            vit,
            train: &images.all,
            held_out: None,
            task: &input.task,
            classes: &dataset.classes,
            start: input.start.as_ref(),
            takes_head: true,
            teachers: &[],
            options: &input.options,
        },
        grid: &input.grid,
        images: &images,
    };
    let mut current = None;
    let mut done = 0;
    let outcome = course.make(
        checkpoints,
        &mut |phase, at| {
            let mut steps = steps.borrow_mut();
            let total = course.total(phase);
            if current != Some(phase) {
                if steps.begin(phase).is_err() {
                    return ControlFlow::Break(());
                }
                current = Some(phase);
                // Epochs that an earlier attempt finished count as done.
                let epochs = input.options.epochs as u64;
                done = match phase {
                    Phase::Tune => at.epoch as u64 * (total / epochs),
                    _ => 0,
                };
            }
            done += at.samples;
            steps.count(done, total)
        },
        &mut |trained| {
            let total = course.total(Phase::Tune);
            let file = trained.prompt_file(&mut || steps.borrow_mut().count(total, total))?;
            let mut score = None;
            if let Some(samples) = &eval {
                let mut steps = steps.borrow_mut();
                steps.begin(Phase::Verify)?;
                score = Some(evaluated(trained, samples, &mut steps)?);
            }
            Ok((file, trained.record()?, score))
        },
    )?;
    let (file, record, evaluation) = outcome.made;
    let num_held_out = match course.holds_out() {
        true => images.held_out.len(),
        false => 0,
    };
    let bytes = file.to_bytes();
    let result = TuningResult {
        num_samples: record.num_samples,
        distance_from_init: record.distance_from_init,
        curves: record.curves,
        options: outcome.options,
        candidates: outcome.candidates,
        evaluation,
        num_classes: dataset.classes.len(),
        num_held_out,
        skipped_images: images.all.skipped,
        tuned: TunedPrompt {
            prompt: None,
            version: None,
            digest: Digest::of(&bytes),
        },
        provenance: Provenance {
            backbone_digest: backbone.digest,
            preprocessing_id: preprocessing.id(),
            sample_digest: images.all.digest,
            seed: input.options.seed,
            device: device::name_of(vit.device),
            num_threads: tch::get_num_threads() as usize,
            precision: vit.compute.precision,
            libtorch: LIBTORCH.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            solved_from: None,
        },
        timings: steps.into_inner().finish(),
    };
    Ok(Tuned {
        result,
        file: bytes,
    })
}

/// Scores all samples, some images at a time.
fn evaluated(
    trained: &Trained<'_>,
    samples: &Samples,
    steps: &mut Steps<'_>,
) -> Result<HeldOut, EngineError> {
    let n = samples.len();
    let rows: Vec<usize> = (0..n).collect();
    let mut mean = HeldOut {
        cross_entropy: 0.0,
        accuracy: 0.0,
    };
    let mut count = steps.counter(n as u64);
    for rows in rows.chunks(EVALUATED_AT_ONCE) {
        let go_on = &mut || ControlFlow::Continue(());
        let score = trained.score(&samples.only(rows), go_on)?;
        let share = rows.len() as f64 / n as f64;
        mean.cross_entropy += share * score.cross_entropy;
        mean.accuracy += share * score.accuracy;
        stop_on(count(rows.len() as u64))?;
    }
    Ok(mean)
}
