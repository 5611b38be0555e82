//! From a request for a tuning to its specification.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::jobs::plan::backbone::{backbone, check_fits};
use crate::jobs::plan::sources::{NamedPrompt, existing};
use crate::jobs::plan::target::target;
use crate::jobs::plan::{
    PlanError, backbone_spec, check_output, output_name, source_spec, target_spec,
};
use crate::jobs::refusals::{Refusal, Refusals, compatible, refuse};
use crate::registry::datasets::DatasetVersion;
use crate::registry::prompt_versions;
use crate::registry::prompt_versions::PromptVersion;
use promptweave_domain::backbone::BackboneConfig;
use promptweave_domain::compatibility::check_start;
use promptweave_domain::composition::TargetSamples;
use promptweave_domain::reference::{Reference, ResourceName};
use promptweave_domain::specification::TuningSpec;
use promptweave_domain::split::Split;
use promptweave_domain::tuning::{Grid, InvalidTuning, TuningOptions};
use promptweave_domain::tuning_method::TuningMethod;

const START: &str = "/start/prompt";
/// The largest prompt that a tuning may make: the default limit of an uploaded file.
const MAX_PROMPT_BYTES: u64 = 64 << 20;

/// A request, with names that are not looked up yet.
#[derive(Clone, Debug)]
pub struct TuningRequest {
    pub dataset: Reference,
    pub samples: TargetSamples,
    pub start: Option<Reference>,
    /// May be left out where only one backbone fits the start.
    pub backbone: Option<ResourceName>,
    pub options: TuningOptions,
    pub grid: Grid,
    /// `<dataset>-<short id of the job>` by default.
    pub output: Option<ResourceName>,
}

/// Resolves and checks a project's request for the job `job_id`.
pub async fn plan(
    conn: &mut PgConnection,
    project_id: Uuid,
    job_id: Uuid,
    request: &TuningRequest,
) -> Result<TuningSpec, PlanError> {
    let invalid = |place: &'static str| {
        move |invalid: InvalidTuning| Refusal {
            code: "invalid_options",
            pointer: format!("/{place}/{}", invalid.field),
            detail: invalid.to_string(),
        }
    };
    let mut refusals = Refusals::default();
    for mistake in request.options.mistakes() {
        refusals.add(invalid("options")(mistake));
    }
    refusals.note(check_method(&request.options));
    refusals.note(request.grid.check().map_err(invalid("grid")));
    refusals.note(check_output(request.output.as_ref()));
    let (dataset, samples) = (&request.dataset, &request.samples);
    let target = target(conn, project_id, dataset, samples, &mut refusals).await?;
    if let Some(target) = &target {
        refusals.note(check_held_out(request, target));
    }
    let start = match &request.start {
        Some(reference) => {
            let version = prompt_versions::resolve(conn, project_id, reference).await?;
            refusals.note(start(reference, version))
        }
        None => None,
    };
    let name = request.backbone.as_ref();
    // The backbone that the start was made for is known only if the start was found.
    let backbone = match name.is_some() || start.is_some() || request.start.is_none() {
        true => backbone(conn, project_id, name, start.as_slice(), &mut refusals).await?,
        false => None,
    };
    let mut options = request.options.clone();
    if let Some(NamedPrompt { version: start, .. }) = &start {
        // The length and seed of the prompt that it starts from cannot change.
        options.num_tokens = start.facts().num_tokens;
        options.init_seed = start.init_seed.unwrap_or_default();
    }
    if let Some(backbone) = &backbone {
        if let Some(start) = &start {
            refusals.note(check_fits(start, backbone));
        }
        refusals.note(check_deep(&options, &backbone.config));
    }
    let (target, backbone) = refusals.finish(target.zip(backbone))?;
    Ok(TuningSpec {
        start: start.as_ref().map(|start| source_spec(&start.version)),
        backbone: backbone_spec(backbone),
        options,
        grid: request.grid.clone(),
        output: output_name(request.output.as_ref(), &target, job_id),
        target: target_spec(&target, &request.samples),
    })
}

/// Checks that the method makes a prompt, and has no teachers.
fn check_method(options: &TuningOptions) -> Result<(), Refusal> {
    if !options.method.makes_prompt() {
        let detail = format!(
            "`{}` makes no prompt; give `vpt-shallow` or `vpt-deep`, or run `promptweave tune`",
            options.method
        );
        return refuse("invalid_options", "/options/method", detail);
    }
    if options.distillation_weight != 0.0 {
        let detail = "weighs teachers, and a job has none; run `promptweave tune --teacher`";
        return refuse("invalid_options", "/options/distillation_weight", detail);
    }
    Ok(())
}

/// Checks that a deep prompt has tokens for later blocks, and is no larger than an upload may be.
fn check_deep(options: &TuningOptions, config: &BackboneConfig) -> Result<(), Refusal> {
    if options.method != TuningMethod::VptDeep {
        return Ok(());
    }
    let BackboneConfig {
        depth, embed_dim, ..
    } = config;
    if *depth < 2 {
        let detail =
            "prompts the blocks after the first, and the backbone has one; give `vpt-shallow`";
        return refuse("invalid_options", "/options/method", detail);
    }
    let bytes = (size_of::<f32>() * depth * embed_dim * options.num_tokens) as u64;
    if bytes > MAX_PROMPT_BYTES {
        let detail = format!(
            "makes {} MiB of prompts for {depth} blocks; {} MiB are the most",
            bytes >> 20,
            MAX_PROMPT_BYTES >> 20
        );
        return refuse("invalid_options", "/options/num_tokens", detail);
    }
    Ok(())
}

/// The prompt to start from, if it exists and a tuning can start from it.
fn start(reference: &Reference, version: Option<PromptVersion>) -> Result<NamedPrompt, Refusal> {
    let start = existing(reference, version, START.to_owned())?;
    compatible(START, check_start(&start.version.facts()))?;
    Ok(start)
}

/// Checks that there are images to hold out (the split `val`, or every fifth image) if something is chosen by them.
fn check_held_out(request: &TuningRequest, target: &DatasetVersion) -> Result<(), Refusal> {
    let TuningRequest {
        samples,
        options,
        grid,
        ..
    } = request;
    if grid.pairs(options).len() == 1 && options.patience.is_none() {
        return Ok(());
    }
    let images = |split| {
        target
            .class_counts
            .get(&split)
            .map_or(0, |of| of.iter().sum::<u64>())
    };
    if images(Split::Val) > 0 && samples.split != Split::Val {
        if samples.eval_split == Some(Split::Val) {
            let detail = "is the split that something is chosen by; evaluate on another";
            return refuse("same_split", "/target/eval_split", detail);
        }
        return Ok(());
    }
    let classes = target.class_counts[&samples.split].iter();
    let classes = classes.filter(|count| **count > 0).count() as u64;
    let there = images(samples.split).min(samples.max_samples as u64);
    if there >= 2 * classes {
        return Ok(());
    }
    let detail = format!(
        "{there} images of {classes} classes are too few to hold some out, which `grid` and `patience` choose by; \
         {} are the fewest",
        2 * classes
    );
    refuse("too_few_images", "/target/max_samples", detail)
}
