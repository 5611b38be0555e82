//! Source prompts: checks that they can be combined, and their weighted sum.

use std::collections::HashMap;

use crate::error::EngineError;
use crate::statistics::Metadata;
use promptweave_domain::composition::Source;
use promptweave_domain::digest::Digest;
use promptweave_domain::method::common_seed;
use promptweave_domain::mixture::mix;
use promptweave_domain::prompt_file::{FORMAT, Origin, PromptFile, PromptMetadata};
use promptweave_domain::tensor::Tensor;
use promptweave_formats::backbone::Backbone;

/// Refuses sources that cannot be summed, or that are the same, by name.
pub fn check_sources(sources: &[Source], backbone: &Backbone) -> Result<(), EngineError> {
    let first = sources.first().ok_or(EngineError::NoSources)?;
    let mut seen: HashMap<Digest, &str> = HashMap::new();
    let num_tokens = first.file.num_tokens();
    for source in sources {
        if let Some(earlier) = seen.insert(source.digest, &source.prompt) {
            return Err(EngineError::SameSource {
                first: earlier.to_owned(),
                second: source.prompt.clone(),
                digest: source.digest.to_string(),
            });
        }
        let refuse = |what: String, expected: String| {
            Err(EngineError::Incompatible {
                prompt: source.prompt.clone(),
                what,
                expected,
            })
        };
        let file = &source.file;
        if file.embed_dim() != backbone.config.embed_dim {
            return refuse(
                format!("{} wide", file.embed_dim()),
                format!("the backbone is {} wide", backbone.config.embed_dim),
            );
        }
        if file.num_tokens() != num_tokens {
            return refuse(
                format!("{} tokens long", file.num_tokens()),
                format!("`{}` has {num_tokens}", first.prompt),
            );
        }
        if file.deep_prompt_embeddings.is_some() {
            return refuse(
                "a deep prompt".into(),
                "only shallow prompts can be composed".into(),
            );
        }
        let Some(metadata) = &file.metadata else {
            continue;
        };
        if let Some(digest) = metadata.backbone_digest.filter(|d| *d != backbone.digest) {
            return refuse(
                format!("made for backbone {digest}"),
                format!("this one is {}", backbone.digest),
            );
        }
        let here = backbone.config.preprocessing.id();
        if let Some(id) = metadata.preprocessing_id.as_ref().filter(|id| **id != here) {
            return refuse(
                format!("made with preprocessing `{id}`"),
                format!("the backbone's is `{here}`"),
            );
        }
    }
    Ok(())
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

/// The composed prompt's file, still without a head.
pub fn composed_prompt(metadata: &Metadata, prompt_embeddings: Tensor<f32>) -> PromptFile {
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
        }),
        prompt_embeddings,
        deep_prompt_embeddings: None,
        head: None,
        sketch: None,
        dtype: "f32",
    }
}
