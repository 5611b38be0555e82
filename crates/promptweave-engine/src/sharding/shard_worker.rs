//! Computing a shard of a composition that another worker owns.

use uuid::Uuid;

use crate::compose::sources::check_sources;
use crate::compose::steps::{Steps, stop_on};
use crate::compose::token_alignment::align;
use crate::error::EngineError;
use crate::samples::{Samples, Selection};
use crate::score::head::{SourceHead, fit_heads, folds};
use crate::sharding::Shared;
use crate::tensors::prompt_tensor;
use crate::vit::Vit;
use promptweave_domain::composer::Observer;
use promptweave_domain::composition::CompositionInput;
use promptweave_domain::phase::Phase;
use promptweave_domain::sharding::{Shard, ShardInput};
use promptweave_domain::tensor::Tensor as PlainTensor;
use promptweave_formats::backbone::Backbone;
use promptweave_formats::dataset::LabelledImages;

/// The inputs of the last shard, prepared for the next one of the same job.
pub struct Prepared {
    job: Uuid,
    samples: Samples,
    num_classes: usize,
    prompts: Vec<PlainTensor<f32>>,
    /// The sources' heads, once gradients were requested.
    heads: Option<Vec<SourceHead>>,
}

impl Prepared {
    fn for_job(
        job: Uuid,
        input: &CompositionInput,
        backbone: &Backbone,
    ) -> Result<Self, EngineError> {
        check_sources(&input.sources, backbone)?;
        let (prompts, _) = align(&input.sources, input.objective.align_tokens)?;
        let dataset = LabelledImages::read(&input.target_dir)?;
        let selection = Selection::of_target(&input.target);
        Ok(Self {
            job,
            samples: Samples::load(&dataset, &selection, &backbone.config.preprocessing)?,
            num_classes: dataset.classes.len(),
            prompts,
            heads: None,
        })
    }
}

/// Computes the file of a shard. `prepared` is what an earlier shard left, if any.
pub fn shard(
    backbone: &Backbone,
    vit: &Vit,
    prepared: &mut Option<Prepared>,
    input: &ShardInput,
    observer: &mut dyn Observer,
) -> Result<Vec<u8>, EngineError> {
    let file = compute(backbone, vit, prepared, input, observer);
    if !matches!(file, Ok(_) | Err(EngineError::Stopped)) {
        // The prepared inputs may be the cause of the failure.
        *prepared = None;
    }
    file
}

fn compute(
    backbone: &Backbone,
    vit: &Vit,
    prepared: &mut Option<Prepared>,
    input: &ShardInput,
    observer: &mut dyn Observer,
) -> Result<Vec<u8>, EngineError> {
    let mut steps = Steps::new(observer);
    steps.begin(input.shard.phase)?;
    let of_job = prepared.take().filter(|it| it.job == input.job);
    let it = match of_job {
        Some(it) => prepared.insert(it),
        None => prepared.insert(Prepared::for_job(input.job, &input.composition, backbone)?),
    };
    let tensors: Vec<_> = it.prompts.iter().map(|p| prompt_tensor(p, vit)).collect();
    let shared = Shared {
        vit,
        samples: &it.samples,
        prompts: &tensors,
    };
    let Shard { phase, count, .. } = input.shard;
    let pairs = shared.pairs() / count as u64;
    if phase == Phase::Features {
        return shared.features_of(input.shard, steps.counter(pairs));
    }
    let heads = match it.heads.take() {
        Some(heads) => it.heads.insert(heads),
        None => it
            .heads
            .insert(heads_of(&shared, it.num_classes, input, &mut steps)?),
    };
    shared.gradients_of(input.shard, heads, steps.counter(pairs))
}

/// Fits the heads as the job's owner did: on the same features, in the same way.
fn heads_of(
    shared: &Shared<'_>,
    num_classes: usize,
    input: &ShardInput,
    steps: &mut Steps<'_>,
) -> Result<Vec<SourceHead>, EngineError> {
    let mut merged = shared.merge_features();
    for bytes in &input.features {
        merged.add(bytes, input.features.len())?;
    }
    let labels = &shared.samples.labels;
    let mut count = steps.counter(shared.prompts.len() as u64);
    fit_heads(
        &merged.whole(),
        labels,
        &folds(labels, shared.vit.config.embed_dim),
        num_classes,
        &input.composition.objective.head,
        &mut || stop_on(count(0)),
    )
}
