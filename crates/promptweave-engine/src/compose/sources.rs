//! Source prompts: checks that they can be combined, and their weighted sum.

use crate::error::EngineError;
use crate::statistics::Metadata;
use promptweave_domain::compatibility::{PromptFacts, check_composable, check_fits, check_start};
use promptweave_domain::composition::Source;
use promptweave_domain::method::common_seed;
use promptweave_domain::mixture::mix;
use promptweave_domain::prompt_file::{FORMAT, Origin, PromptFile, PromptMetadata, WeighedPrompt};
use promptweave_domain::tensor::Tensor;
use promptweave_domain::tuning_method::TuningMethod;
use promptweave_formats::backbone::Backbone;

/// Refuses sources that cannot be summed, or do not fit the backbone, by name.
pub fn check_sources(sources: &[Source], backbone: &Backbone) -> Result<(), EngineError> {
    if sources.is_empty() {
        return Err(EngineError::NoSources);
    }
    let facts: Vec<PromptFacts> = sources.iter().map(Source::facts).collect();
    check_composable(&facts).map_err(|(_, refused)| refused)?;
    for source in &facts {
        check_fits(source, &backbone.facts())?;
    }
    Ok(())
}

/// Refuses a prompt that a tuning cannot start from, or that does not fit the backbone. Only a method that makes deep
/// prompts can start from one.
pub fn check_start_of(
    method: TuningMethod,
    start: &Source,
    backbone: &Backbone,
) -> Result<(), EngineError> {
    let facts = start.facts();
    if method != TuningMethod::VptDeep {
        check_start(&facts)?;
    }
    Ok(check_fits(&facts, &backbone.facts())?)
}

/// The init seed that all sources state, if it is one and the same.
pub fn common_init_seed(sources: &[Source]) -> Option<u64> {
    let of = |source: &Source| source.file.metadata.as_ref()?.init_seed;
    common_seed(sources.iter().map(of))
}

/// P₀ + β Σ αᵢ (Pᵢ - P₀) for α on the simplex. Without P₀, or at β = 1, it is Σ αᵢ Pᵢ.
pub fn anchored(
    prompts: &[Tensor<f32>],
    alpha: &[f64],
    anchor: Option<&Tensor<f32>>,
    scale: f64,
) -> Tensor<f32> {
    let Some(anchor) = anchor.filter(|_| scale != 1.0) else {
        return mix(prompts, alpha);
    };
    let all = [prompts, std::slice::from_ref(anchor)].concat();
    let scaled = alpha.iter().map(|weight| scale * weight);
    mix(&all, &scaled.chain([1.0 - scale]).collect::<Vec<_>>())
}

/// The composed prompt's file, still without a head. It names the sources with a weight.
pub fn composed_prompt(
    metadata: &Metadata,
    versions: &[Option<i32>],
    alpha: &[f64],
    prompt_embeddings: Tensor<f32>,
) -> PromptFile {
    let sources = metadata.sources.iter().zip(versions).zip(alpha);
    let sources = sources.map(|((source, version), weight)| WeighedPrompt {
        prompt: Some(source.prompt.clone()),
        version: *version,
        digest: Some(source.digest),
        weight: *weight,
    });
    PromptFile {
        metadata: Some(PromptMetadata {
            format: FORMAT,
            backbone_digest: Some(metadata.backbone_digest),
            preprocessing_id: Some(metadata.preprocessing_id.clone()),
            init_seed: metadata.common_init_seed(),
            task: None,
            classes: Some(metadata.classes.clone()),
            origin: Origin::Composed,
            training: None,
            sources: WeighedPrompt::with_weight(sources),
        }),
        prompt_embeddings,
        deep_prompt_embeddings: None,
        head: None,
        sketch: None,
        dtype: "f32",
    }
}
