//! The choice of held-out images: VTAB-1k's val200, a split `val`, or every fifth image.

use std::collections::HashSet;

use crate::error::EngineError;
use crate::samples::{Samples, Selection};
use promptweave_domain::backbone::Preprocessing;
use promptweave_domain::split::Split;
use promptweave_domain::stratified::stratified_subset;
use promptweave_formats::dataset::LabelledImages;

/// The images of the split: all of them, and the same in two parts.
pub struct Images {
    pub all: Samples,
    /// The images that are not held out. Empty if there is only one image.
    pub part: Samples,
    pub held_out: Samples,
    /// Describes which images are held out.
    pub whose: &'static str,
}

impl Images {
    pub fn load(
        dataset: &LabelledImages,
        selection: &Selection,
        preprocessing: &Preprocessing,
    ) -> Result<Self, EngineError> {
        let all = Samples::load(dataset, selection, preprocessing)?;
        // VTAB-1k's val200 is a part of train800val200.
        let paths = |split: Split| -> HashSet<&str> {
            let images = dataset.splits.get(&split).into_iter().flatten();
            images.map(|image| image.path.as_str()).collect()
        };
        let val = paths(Split::Val);
        let listed = &dataset.splits[&selection.split];
        let is_val = |row: &usize| val.contains(listed[all.indices[*row]].path.as_str());
        let (mut held_out, mut part): (Vec<usize>, Vec<usize>) = (0..all.len()).partition(is_val);
        let mut whose = "of the split val";
        if held_out.is_empty() && !val.is_empty() && selection.split != Split::Val {
            // The dataset has a separate split `val`, as image folders do.
            let of_val = Selection {
                split: Split::Val,
                max_samples: None,
                ..*selection
            };
            let held_out = Samples::load(dataset, &of_val, preprocessing)?;
            return Ok(Self {
                part: all.only(&part),
                whose,
                held_out,
                all,
            });
        }
        if held_out.is_empty() || part.is_empty() {
            whose = "every fifth of the images";
            held_out = stratified_subset(&all.labels, all.len().div_ceil(5), selection.seed);
            part = (0..all.len())
                .filter(|row| !held_out.contains(row))
                .collect();
        }
        Ok(Self {
            part: all.only(&part),
            held_out: all.only(&held_out),
            whose,
            all,
        })
    }
}
