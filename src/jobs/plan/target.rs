//! The target of a request: the dataset that its name stands for, checked to be learned from.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::jobs::refusals::{Refusal, Refusals, refuse};
use crate::registry::RegistryError;
use crate::registry::datasets;
use crate::registry::datasets::DatasetVersion;
use promptweave_domain::composition::TargetSamples;
use promptweave_domain::reference::Reference;
use promptweave_domain::split::Split;

/// More images than this are a dataset to be sampled from.
pub const MAX_SAMPLES: usize = 1_000_000;

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
pub(super) fn classes_in<'a>(
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
