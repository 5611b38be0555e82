//! From a request for an ensemble to its specification: every reference resolved, everything that
//! cannot be composed refused before it is queued, with the place in the request.

use std::collections::BTreeSet;

use sqlx::PgConnection;
use uuid::Uuid;

pub use crate::jobs::refusals::PlanError;
use crate::jobs::refusals::{Refusal, Refusals, refuse};
use crate::registry::RegistryError;
use crate::registry::backbones;
use crate::registry::backbones::RegisteredBackbone;
use crate::registry::datasets;
use crate::registry::datasets::DatasetVersion;
use crate::registry::prompt_versions;
use crate::registry::prompt_versions::{Depth, PromptVersion};
use crate::registry::prompts;
use promptweave_domain::composition::TargetSamples;
use promptweave_domain::digest::Digest;
use promptweave_domain::early_stopping::EarlyStopping;
use promptweave_domain::job::{BackboneSpec, EnsembleSpec, SourceSpec, TargetSpec};
use promptweave_domain::method::{NO_ANCHOR, Scale, UniformMix, common_seed};
use promptweave_domain::objective::{Objective, TradeOffRule, Weighing};
use promptweave_domain::reference::{Reference, ResourceName};
use promptweave_domain::split::Split;

/// Gradient statistics grow with the square of the pairs of sources; the method's own paper ends at 11.
pub const MAX_SOURCES: usize = 64;
/// More images than this are a dataset to be sampled from.
pub const MAX_SAMPLES: usize = 1_000_000;
/// Features of all sources and samples, as they are held in memory and stored; gradients and solver
/// need a few times that.
pub const MAX_FEATURE_BYTES: usize = 4 << 30;

/// What was asked for, in names.
#[derive(Clone, Debug)]
pub struct EnsembleRequest {
    pub dataset: Reference,
    pub samples: TargetSamples,
    pub sources: Vec<Reference>,
    /// May be left out where only one backbone fits the prompts.
    pub backbone: Option<ResourceName>,
    pub objective: Objective,
    pub early_stopping: Option<EarlyStopping>,
    /// `<dataset>-<short id of the job>` by default.
    pub output: Option<ResourceName>,
}

fn check_early_stopping(
    asked: Option<EarlyStopping>,
    objective: &Objective,
) -> Result<(), Refusal> {
    let method = objective.method();
    let Some(EarlyStopping { max_standard_error }) = asked else {
        return Ok(());
    };
    let refused = |pointer: &str, detail| refuse("invalid_early_stopping", pointer, detail);
    if !(max_standard_error > 0.0 && max_standard_error <= 1.0) {
        let detail = format!("is {max_standard_error}; it must lie above 0 and not above 1");
        return refused("/early_stopping/max_standard_error", detail);
    }
    if !method.takes_gradients() {
        let detail = format!("is about gradients, and `{method}` takes none");
        return refused("/early_stopping", detail);
    }
    if matches!(objective.experimental.uniform_mix, UniformMix::Chosen(_)) || objective.falls_back()
    {
        let detail = "cannot be watched with `experimental.uniform_mix: \"auto\"` or a `fallback`, which know α at the end only; use a \
                      number, and no fallback";
        return refused("/early_stopping", detail.to_owned());
    }
    if objective.weighing() == Weighing::Rule(TradeOffRule::Validation) {
        let detail = "cannot be watched with `trade_off: \"validation\"`, which knows α at the end \
                      only; use `knee` or a number";
        return refused("/early_stopping", detail.to_owned());
    }
    Ok(())
}

/// Resolves and checks a project's request for the job `job_id`.
pub async fn plan(
    conn: &mut PgConnection,
    project_id: Uuid,
    job_id: Uuid,
    request: &EnsembleRequest,
) -> Result<EnsembleSpec, PlanError> {
    let mut refusals = Refusals::default();
    refusals.of_objective(request.objective.mistakes());
    refusals.note(check_early_stopping(
        request.early_stopping,
        &request.objective,
    ));
    refusals.note(check_output(request.output.as_ref()));
    let named = NamedInputs {
        dataset: &request.dataset,
        samples: &request.samples,
        sources: &request.sources,
        backbone: request.backbone.as_ref(),
    };
    let resolved = named
        .resolve(conn, project_id, &request.objective, &mut refusals)
        .await?;
    let ResolvedInputs {
        target,
        sources,
        backbone,
    } = refusals.finish(resolved)?;
    Ok(EnsembleSpec {
        sources: sources.iter().map(source_spec).collect(),
        backbone: backbone_spec(backbone),
        objective: request.objective.settled(request.early_stopping.is_none()),
        output: output_name(request.output.as_ref(), &target, job_id),
        target: target_spec(&target, &request.samples),
        early_stopping: request.early_stopping,
        solved_from: None,
    })
}

/// What a request says, in names, of all that features are computed of.
pub(super) struct NamedInputs<'a> {
    pub dataset: &'a Reference,
    pub samples: &'a TargetSamples,
    pub sources: &'a [Reference],
    pub backbone: Option<&'a ResourceName>,
}

/// What the names stand for now.
pub(super) struct ResolvedInputs {
    pub target: DatasetVersion,
    pub sources: Vec<PromptVersion>,
    pub backbone: RegisteredBackbone,
}

impl NamedInputs<'_> {
    /// Finds the inputs, and checks that they fit each other and the objective. `None` if something is wrong, which is
    /// noted.
    pub(super) async fn resolve(
        &self,
        conn: &mut PgConnection,
        project_id: Uuid,
        objective: &Objective,
        refusals: &mut Refusals,
    ) -> Result<Option<ResolvedInputs>, RegistryError> {
        let target = target(conn, project_id, self.dataset, self.samples, refusals).await?;
        let (sources, all) = find_sources(conn, project_id, self.sources, refusals).await?;
        // The backbone that all sources share is known only if all of them were found.
        let backbone = match all || self.backbone.is_some() {
            true => {
                let of_sources: Vec<&PromptVersion> = sources.iter().map(|(_, it)| it).collect();
                backbone(conn, project_id, self.backbone, &of_sources, refusals).await?
            }
            false => None,
        };
        if all {
            refusals.note(check_anchor(objective, &sources));
        }
        let Some(backbone) = backbone else {
            return Ok(None);
        };
        for (index, source) in &sources {
            refusals.note(check_fits(source, &backbone, &source_pointer(*index)));
        }
        let Some(target) = target else {
            return Ok(None);
        };
        let images: u64 = target.class_counts[&self.samples.split].iter().sum();
        let num_samples = self.samples.max_samples.min(images as usize);
        let embed_dim = backbone.config.embed_dim;
        refusals.note(check_size(self.sources.len(), num_samples, embed_dim));
        refusals.of_objective(
            objective
                .h_score
                .check_samples(num_samples, embed_dim)
                .err(),
        );
        Ok(Some(ResolvedInputs {
            target,
            sources: sources.into_iter().map(|(_, source)| source).collect(),
            backbone,
        }))
    }
}

pub(super) fn target_spec(target: &DatasetVersion, samples: &TargetSamples) -> TargetSpec {
    TargetSpec {
        dataset: target.name.to_string(),
        version: target.version,
        digest: target.digest,
        samples: samples.clone(),
    }
}

pub(super) fn source_spec(source: &PromptVersion) -> SourceSpec {
    SourceSpec {
        id: source.id,
        prompt: source.prompt.to_string(),
        version: source.version,
        digest: source.digest,
    }
}

pub(super) fn backbone_spec(backbone: RegisteredBackbone) -> BackboneSpec {
    BackboneSpec {
        name: backbone.name.to_string(),
        digest: backbone.digest,
        preprocessing_id: backbone.preprocessing_id,
        model_digest: backbone.model_digest,
        config: backbone.config,
    }
}

/// The name that was asked for, or the default.
pub(super) fn output_name(
    asked: Option<&ResourceName>,
    target: &DatasetVersion,
    job_id: Uuid,
) -> String {
    match asked {
        Some(name) => name.to_string(),
        None => default_output(target.name.as_str(), job_id),
    }
}

/// Refuses a name that no prompt could be published under later.
pub(super) fn check_output(name: Option<&ResourceName>) -> Result<(), Refusal> {
    match name.map(prompts::check_name) {
        Some(Err(error)) => refuse("reserved_name", "/output/name", error.to_string()),
        Some(Ok(())) | None => Ok(()),
    }
}

/// `<dataset>-<short id>`: the end of the id, since its beginning is the time.
pub fn default_output(dataset: &str, job_id: Uuid) -> String {
    let id = job_id.simple().to_string();
    let dataset: String = dataset.chars().take(128 - 9).collect();
    format!("{dataset}-{}", &id[id.len() - 8..])
}

// ---- Numbers -------------------------------------------------------------------------------

/// Refuses features of M sources and N samples in d dimensions that are too large for memory.
fn check_size(m: usize, n: usize, d: usize) -> Result<(), Refusal> {
    let bytes_a_sample = m * d * size_of::<f32>();
    if n * bytes_a_sample <= MAX_FEATURE_BYTES {
        return Ok(());
    }
    let detail = format!(
        "features of {m} sources and {n} images in {d} dimensions take {:.1} GiB; at most {} GiB are \
         held: set it to {} or less, or name fewer sources",
        (n * bytes_a_sample) as f64 / f64::from(1 << 30),
        MAX_FEATURE_BYTES >> 30,
        MAX_FEATURE_BYTES / bytes_a_sample,
    );
    refuse("too_large", "/target/max_samples", detail)
}

// ---- The target ----------------------------------------------------------------------------

/// The dataset, if it can be learned from with these samples; `None` otherwise.
pub(super) async fn target(
    conn: &mut PgConnection,
    project_id: Uuid,
    reference: &Reference,
    samples: &TargetSamples,
    refusals: &mut Refusals,
) -> Result<Option<DatasetVersion>, RegistryError> {
    let Some(dataset) = datasets::resolve(conn, project_id, reference).await? else {
        refusals.note::<()>(refuse(
            "unknown_dataset",
            "/target/dataset",
            format!("there is no dataset `{reference}`"),
        ));
        return Ok(None);
    };
    let checked = [
        check_split(&dataset, samples),
        check_eval_split(&dataset, samples),
    ];
    let sound = checked.map(|checked| refusals.note(checked).is_some());
    Ok((sound == [true; 2]).then_some(dataset))
}

/// Checks that there are at least two classes, and no fewer samples than classes.
fn check_split(dataset: &DatasetVersion, samples: &TargetSamples) -> Result<(), Refusal> {
    const POINTER: &str = "/target/split";
    let split = samples.split.name();
    let classes = classes_in(dataset, samples.split, POINTER)?;
    match classes.as_slice() {
        [] => {
            let detail = format!("split `{split}` holds no images");
            return refuse("empty_target", POINTER, detail);
        }
        [class] => {
            let detail = format!(
                "all images of split `{split}` are of class `{class}`; at least two classes are needed"
            );
            return refuse("one_class", POINTER, detail);
        }
        _ => {}
    }
    if !(classes.len()..=MAX_SAMPLES).contains(&samples.max_samples) {
        let detail = format!(
            "is {}; it must be at least the number of classes, {}, and at most {MAX_SAMPLES}",
            samples.max_samples,
            classes.len()
        );
        return refuse("invalid_max_samples", "/target/max_samples", detail);
    }
    Ok(())
}

/// Checks that evaluation, if any, is on other images.
fn check_eval_split(dataset: &DatasetVersion, samples: &TargetSamples) -> Result<(), Refusal> {
    const POINTER: &str = "/target/eval_split";
    let Some(eval) = samples.eval_split else {
        return Ok(());
    };
    if eval == samples.split {
        let detail = "is the split that is learned from; evaluate on another";
        return refuse("same_split", POINTER, detail);
    }
    if classes_in(dataset, eval, POINTER)?.is_empty() {
        let detail = format!("split `{}` holds no images", eval.name());
        return refuse("empty_split", POINTER, detail);
    }
    Ok(())
}

/// The classes that a split has images of.
fn classes_in<'a>(
    dataset: &'a DatasetVersion,
    split: Split,
    pointer: &str,
) -> Result<Vec<&'a str>, Refusal> {
    let Some(counts) = dataset.class_counts.get(&split) else {
        let there: Vec<_> = dataset
            .class_counts
            .keys()
            .map(|split| format!("`{}`", split.name()))
            .collect();
        let detail = format!(
            "`{}:{}` has no split `{}`; it has {}",
            dataset.name,
            dataset.version,
            split.name(),
            there.join(", ")
        );
        return refuse("unknown_split", pointer, detail);
    };
    let classes = dataset.classes.iter().zip(counts);
    Ok(classes
        .filter(|(_, count)| **count > 0)
        .map(|(class, _)| class.as_str())
        .collect())
}

// ---- The sources ---------------------------------------------------------------------------

pub fn source_pointer(index: usize) -> String {
    format!("/sources/{index}/prompt")
}

pub(super) fn no_sources<T>() -> Result<T, Refusal> {
    refuse(
        "no_sources",
        "/sources",
        "names no prompt; at least one is needed",
    )
}

/// Resolves prompts that can be summed, in the order they were named.
pub async fn sources(
    conn: &mut PgConnection,
    project_id: Uuid,
    references: &[Reference],
) -> Result<Vec<PromptVersion>, PlanError> {
    let mut refusals = Refusals::default();
    let (found, _) = find_sources(conn, project_id, references, &mut refusals).await?;
    refusals.finish(Some(found.into_iter().map(|(_, source)| source).collect()))
}

/// The sources that exist, each with its place in the request, and whether all of them exist and are alike.
async fn find_sources(
    conn: &mut PgConnection,
    project_id: Uuid,
    references: &[Reference],
    refusals: &mut Refusals,
) -> Result<(Vec<(usize, PromptVersion)>, bool), RegistryError> {
    let mut found: Vec<(usize, PromptVersion)> = Vec::with_capacity(references.len());
    let counted = match references.len() {
        0 => no_sources(),
        1..=MAX_SOURCES => Ok(()),
        many => refuse(
            "too_many_sources",
            "/sources",
            format!("names {many} prompts; at most {MAX_SOURCES}"),
        ),
    };
    // If there are too many, none is looked up.
    if refusals.note(counted).is_none() {
        return Ok((found, false));
    }
    let mut sound = true;
    for (index, reference) in references.iter().enumerate() {
        let version = prompt_versions::resolve(conn, project_id, reference).await?;
        let checked = check_source(reference, version, &found, &source_pointer(index));
        match refusals.note(checked) {
            Some((source, alike)) => {
                sound &= refusals.note(alike).is_some();
                found.push((index, source));
            }
            None => sound = false,
        }
    }
    Ok((found, sound))
}

/// The version of a source, if it exists and is not among those found before; and whether it is like them.
fn check_source(
    reference: &Reference,
    version: Option<PromptVersion>,
    found: &[(usize, PromptVersion)],
    pointer: &str,
) -> Result<(PromptVersion, Result<(), Refusal>), Refusal> {
    let Some(source) = version else {
        let detail = format!("there is no prompt version `{reference}`");
        return refuse("unknown_prompt", pointer, detail);
    };
    if source.depth == Depth::Deep {
        let detail =
            format!("`{reference}` is a deep prompt; only shallow prompts can be composed");
        return refuse("deep_prompt_not_composable", pointer, detail);
    }
    let mut others = found.iter().map(|(_, other)| other);
    if let Some(other) = others.find(|other| other.digest == source.digest) {
        let detail = format!(
            "`{reference}` has the same bytes as `{}:{}`; name each prompt once",
            other.prompt, other.version
        );
        return refuse("same_source", pointer, detail);
    }
    let alike = match found.first() {
        Some((_, first)) => check_alike(first, &source, pointer),
        None => Ok(()),
    };
    Ok((source, alike))
}

/// Checks that the initial prompt is known, which a scale other than 1 needs.
fn check_anchor(objective: &Objective, sources: &[(usize, PromptVersion)]) -> Result<(), Refusal> {
    let shared = common_seed(sources.iter().map(|(_, source)| source.init_seed));
    let experimental = &objective.experimental;
    if experimental.scale == Scale::default() || experimental.anchor_seed.or(shared).is_some() {
        return Ok(());
    }
    refuse(
        "invalid_objective",
        "/objective/experimental/scale",
        NO_ANCHOR,
    )
}

/// Checks that prompts have one shape, because they are summed number by number.
fn check_alike(
    first: &PromptVersion,
    source: &PromptVersion,
    pointer: &str,
) -> Result<(), Refusal> {
    if source.embed_dim != first.embed_dim {
        let detail = format!(
            "`{}` is {} wide and `{}` is {}; prompts of one width can be composed",
            source.prompt, source.embed_dim, first.prompt, first.embed_dim
        );
        return refuse("width_mismatch", pointer, detail);
    }
    if source.num_tokens != first.num_tokens {
        let detail = format!(
            "`{}` has {} tokens and `{}` has {}; prompts of one length can be composed",
            source.prompt, source.num_tokens, first.prompt, first.num_tokens
        );
        return refuse("length_mismatch", pointer, detail);
    }
    Ok(())
}

// ---- The backbone --------------------------------------------------------------------------

/// The backbone of this name, or the one that the prompts were made for.
pub(super) async fn backbone(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: Option<&ResourceName>,
    sources: &[&PromptVersion],
    refusals: &mut Refusals,
) -> Result<Option<RegisteredBackbone>, RegistryError> {
    let (fitting, unknown) = match name {
        Some(name) => {
            let found = backbones::find(conn, project_id, name).await?;
            let unknown = format!("there is no backbone `{name}`");
            (found.into_iter().collect(), unknown)
        }
        None => {
            let Some(digest) = refusals.note(common_backbone(sources)) else {
                return Ok(None);
            };
            let mut fitting = backbones::find_by_digest(conn, project_id, &digest).await?;
            if fitting.len() > 1 {
                let ids: Vec<_> = (sources.iter())
                    .filter_map(|source| source.preprocessing_id.as_ref())
                    .collect();
                fitting.retain(|backbone| ids.iter().all(|id| **id == backbone.preprocessing_id));
            }
            let unknown = format!("no registered backbone is the sources' {digest}; register it");
            (fitting, unknown)
        }
    };
    Ok(refusals.note(only(fitting, unknown)))
}

/// The digest of the backbone that all sources which name one were made for.
fn common_backbone(sources: &[&PromptVersion]) -> Result<Digest, Refusal> {
    let digests: BTreeSet<Digest> = sources.iter().filter_map(|s| s.backbone_digest).collect();
    let mut digests = digests.into_iter();
    match (digests.next(), digests.next()) {
        (Some(digest), None) => Ok(digest),
        (None, _) => {
            let detail = "no source says which backbone it was made for; name one";
            refuse("backbone_required", "/backbone", detail)
        }
        (Some(_), Some(_)) => {
            let detail = "the sources were made for different backbones and cannot be composed";
            refuse("backbone_mismatch", "/sources", detail)
        }
    }
}

fn only(
    mut fitting: Vec<RegisteredBackbone>,
    unknown: String,
) -> Result<RegisteredBackbone, Refusal> {
    const POINTER: &str = "/backbone";
    if fitting.len() > 1 {
        let names: Vec<_> = fitting.iter().map(|b| format!("`{}`", b.name)).collect();
        let detail = format!("several backbones fit; name one of {}", names.join(", "));
        return refuse("backbone_ambiguous", POINTER, detail);
    }
    match fitting.pop() {
        Some(backbone) => Ok(backbone),
        None => refuse("unknown_backbone", POINTER, unknown),
    }
}

pub(super) fn check_fits(
    source: &PromptVersion,
    backbone: &RegisteredBackbone,
    pointer: &str,
) -> Result<(), Refusal> {
    let (prompt, name) = (&source.prompt, &backbone.name);
    if source.embed_dim != backbone.embed_dim {
        let detail = format!(
            "`{prompt}` is {} wide and backbone `{name}` is {}",
            source.embed_dim, backbone.embed_dim
        );
        return refuse("width_mismatch", pointer, detail);
    }
    if let Some(digest) = source
        .backbone_digest
        .filter(|digest| *digest != backbone.digest)
    {
        let detail = format!(
            "`{prompt}` was made for backbone {digest}, and `{name}` is {}",
            backbone.digest
        );
        return refuse("backbone_mismatch", pointer, detail);
    }
    match &source.preprocessing_id {
        Some(id) if *id != backbone.preprocessing_id => {
            let detail = format!(
                "`{prompt}` was made with preprocessing `{id}`, and backbone `{name}` has `{}`",
                backbone.preprocessing_id
            );
            refuse("preprocessing_mismatch", pointer, detail)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_name_is_always_a_name() {
        let id = Uuid::now_v7();
        for dataset in ["food", &"d".repeat(128)] {
            let name = default_output(dataset, id);
            assert!(name.parse::<ResourceName>().is_ok(), "{name}");
            assert!(name.ends_with(&id.simple().to_string()[24..]));
        }
    }

    #[test]
    fn the_largest_number_of_samples_that_fits_is_named() {
        let most = MAX_FEATURE_BYTES / (64 * 1024 * 4);
        assert!(check_size(64, most, 1024).is_ok());
        let refusal = check_size(64, most + 1, 1024).unwrap_err();
        assert_eq!(refusal.code, "too_large");
        assert_eq!(refusal.pointer, "/target/max_samples");
        let detail = refusal.detail;
        assert!(
            detail.contains(&format!("set it to {most} or less")),
            "{detail}"
        );
    }
}
