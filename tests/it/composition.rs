//! The answers of an engine that computes nothing: numbers of the right shape without meaning, and a prompt file. The
//! fakes of these tests and of `tests/chaos` share them.

use std::collections::BTreeMap;

use promptweave_domain::backbone::{Filter, Preprocessing};
use promptweave_domain::composer::Composition;
use promptweave_domain::composition::{
    ComposedPrompt, CompositionResult, Diagnostics, MethodReport, ObjectiveValue, PromptScore,
    Provenance, SolverReport, SourceWeight, StopReason,
};
use promptweave_domain::digest::Digest;
use promptweave_domain::precision::Precision;
use promptweave_domain::prediction::{Predicted, PredictionInput, PredictionResult, TableFile};
use promptweave_domain::prompt_file::{FORMAT, Origin, PromptFile, PromptMetadata};
use promptweave_domain::ranking::{RankedSource, Ranking};
use promptweave_domain::tensor::Tensor;
use promptweave_domain::tuning::{Curves, Tuned, TunedPrompt, TuningOptions, TuningResult};

pub const EMBED_DIM: usize = 8;

/// A prompt file of two tokens of `value`, for the backbone of [`spec`].
pub fn prompt_file(origin: Origin, value: f32) -> PromptFile {
    PromptFile {
        metadata: Some(PromptMetadata {
            format: FORMAT,
            backbone_digest: Some(Digest::of(b"backbone")),
            preprocessing_id: Some(preprocessing().id()),
            init_seed: Some(0),
            task: None,
            classes: None,
            origin,
            training: None,
            sources: Vec::new(),
        }),
        prompt_embeddings: Tensor::new([2, EMBED_DIM], vec![value; 2 * EMBED_DIM]),
        deep_prompt_embeddings: None,
        head: None,
        sketch: None,
        dtype: "f32",
    }
}

pub fn preprocessing() -> Preprocessing {
    Preprocessing {
        size: 14,
        filter: Filter::Bicubic,
        antialias: true,
        mean: [0.5; 3],
        std: [0.5; 3],
    }
}

/// A result with these weights.
pub fn composition(input_sources: &[(String, i32, Digest)], weights: &[f64]) -> Composition {
    let score = PromptScore {
        h_score: 1.0,
        h_score_adjusted: 0.5,
        train_accuracy: 0.9,
        validation_accuracy: Some(0.8),
        validation_loss: Some(0.6),
        eval_accuracy: None,
    };
    let source_weights = input_sources
        .iter()
        .zip(weights)
        .map(|((prompt, version, digest), weight)| SourceWeight {
            prompt: prompt.clone(),
            version: Some(*version),
            digest: *digest,
            weight: *weight,
            standard_error: None,
        })
        .collect();
    let value = weights
        .iter()
        .zip(1..)
        .map(|(w, i)| *w as f32 * i as f32)
        .sum();
    let composed = prompt_file(Origin::Composed, value).to_bytes();
    Composition {
        result: CompositionResult {
            source_weights,
            token_alignment: None,
            objective: ObjectiveValue {
                h_score: 1.0,
                h_score_adjusted: 0.5,
                gradient_alignment: Some(0.1),
                alignment_weight: Some(1.0),
                trade_off: Some(0.5),
                trade_off_rule: None,
                total: Some(-0.9),
            },
            comparison: vec![],
            pool: None,
            pareto_path: vec![],
            local_optima: vec![],
            method: MethodReport {
                // It looks as if this had been chosen.
                uniform_mix: 0.25,
                ..MethodReport::default()
            },
            solver: Some(SolverReport {
                starts: 1,
                iterations: 1,
                evaluations: 1,
                stop_reason: StopReason::Converged,
            }),
            diagnostics: Diagnostics {
                num_samples: 4,
                num_classes: 2,
                skipped_images: 0,
                head_folds: 1,
                per_source: vec![],
                h_score_shrinkage: Some(0.01),
                conflict_rate: None,
                gradient_cosines: vec![],
                composed_score: Some(score),
                surrogate_gap: Some(0.0),
                refinement: None,
                baselines: None,
            },
            composed_prompt: ComposedPrompt {
                prompt: None,
                version: None,
                digest: Digest::of(&composed),
                weights: weights.to_vec(),
            },
            early_stop: None,
            provenance: provenance(),
            warnings: vec![],
            timings: BTreeMap::new(),
        },
        composed,
        ensemble: None,
        statistics: b"statistics".to_vec(),
    }
}

fn provenance() -> Provenance {
    Provenance {
        backbone_digest: Digest::of(b"backbone"),
        preprocessing_id: preprocessing().id(),
        sample_digest: Digest::of(b"samples"),
        seed: 0,
        device: "fake".into(),
        num_threads: 1,
        precision: Precision::F32,
        libtorch: "none".into(),
        version: "0".into(),
        solved_from: None,
    }
}

/// The result of a tuning with these losses.
pub fn tuned(options: &TuningOptions, curves: Curves) -> Tuned {
    let mut file = prompt_file(Origin::Tuned, options.seed as f32);
    file.metadata.as_mut().unwrap().training = Some(serde_json::json!(curves));
    let file = file.to_bytes();
    Tuned {
        result: TuningResult {
            options: options.clone(),
            candidates: vec![],
            curves,
            distance_from_init: Some(0.5),
            evaluation: None,
            num_samples: 4,
            num_classes: 2,
            num_held_out: 0,
            skipped_images: 0,
            tuned: TunedPrompt {
                prompt: None,
                version: None,
                digest: Digest::of(&file),
            },
            provenance: provenance(),
            timings: BTreeMap::new(),
        },
        file,
    }
}

/// One right prediction, in a file of one row.
pub fn predicted(input: &PredictionInput) -> Predicted {
    let file = format!(
        "image,label,class,probability\n{}.png,cat,cat,0.75\n",
        input.name
    );
    Predicted {
        result: PredictionResult {
            file: TableFile {
                digest: Digest::of(file.as_bytes()),
                size: file.len() as u64,
                format: input.format,
            },
            num_images: 1,
            skipped: 0,
            forward_passes: 1,
            classes: vec!["cat".to_owned()],
            score: None,
            no_score: Some("the fake computes none".to_owned()),
            device: "fake".to_owned(),
            seconds: 0.25,
        },
        file: file.into_bytes(),
    }
}

/// A table in which each source scores higher than the one before.
pub fn ranking(sources: impl IntoIterator<Item = (String, Digest)>) -> Ranking {
    let row = |(place, (prompt, digest)): (u32, _)| RankedSource {
        prompt,
        digest,
        h_score: f64::from(place),
        h_score_adjusted: 0.5,
        logme: -0.25,
        leep: None,
        nce: None,
        otce: None,
        h_score_cross_validated: 0.25,
        spot_token_mean: 0.9,
        spot_all_pairs: 0.8,
        panda: -0.1,
    };
    Ranking {
        sources: (0..).zip(sources).map(row).collect(),
        num_samples: 4,
        target_tuning_seconds: 0.5,
    }
}
