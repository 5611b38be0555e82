//! The labelled samples a composition, a tuning or an evaluation runs on.

use std::fs;
use std::path::PathBuf;

use tch::Tensor;

use super::EngineError;
use super::images;
use super::vit::Vit;
use crate::domain::backbone::Preprocessing;
use crate::domain::dataset::{LabelledImages, Split, stratified_subset};
use crate::domain::digest::{Digest, DigestBuilder};
use crate::domain::image::{decode, resize};

/// Decoded images, at least one, at the backbone's input size, with their labels. Every image is decoded once; at
/// 98 px it takes 29 KB here, at 224 px 150 KB.
pub struct Samples {
    preprocessing: Preprocessing,
    pixels: Vec<Vec<u8>>,
    /// Index into the data set's classes.
    pub labels: Vec<usize>,
    /// Positions in the list file, in row order.
    pub indices: Vec<usize>,
    /// Unreadable images that were left out.
    pub skipped: usize,
    /// Over the images' file bytes and labels, in order.
    pub digest: Digest,
}

/// Which images of a split.
pub struct Selection {
    pub split: Split,
    /// `None` takes all.
    pub max_samples: Option<usize>,
    pub seed: u64,
    pub skip_bad: bool,
}

impl Samples {
    pub fn load(
        dataset: &LabelledImages,
        selection: &Selection,
        preprocessing: &Preprocessing,
    ) -> Result<Self, EngineError> {
        let images = dataset.split(selection.split)?;
        let all_labels: Vec<usize> = images.iter().map(|image| image.label).collect();
        let max_samples = selection.max_samples.unwrap_or(images.len());
        let chosen = stratified_subset(&all_labels, max_samples, selection.seed);

        let mut digest = DigestBuilder::default();
        let mut samples = Self {
            preprocessing: preprocessing.clone(),
            pixels: Vec::with_capacity(chosen.len()),
            labels: Vec::with_capacity(chosen.len()),
            indices: Vec::with_capacity(chosen.len()),
            skipped: 0,
            digest: Digest::of(b""),
        };
        let mut bad: Vec<PathBuf> = Vec::new();
        for index in chosen {
            let image = &images[index];
            let path = dataset.image_path(image);
            let decoded = fs::read(&path).map(|bytes| (decode(&bytes), bytes));
            match decoded {
                Ok((Ok(decoded), bytes)) => {
                    digest.update(&bytes);
                    digest.update(&(image.label as u64).to_le_bytes());
                    samples.pixels.push(resize(&decoded, preprocessing));
                    samples.labels.push(image.label);
                    samples.indices.push(index);
                }
                Ok((Err(_), _)) | Err(_) => bad.push(path),
            }
        }
        if let Some(first) = bad.first().filter(|_| !selection.skip_bad) {
            return Err(EngineError::UnreadableImages {
                first: first.clone(),
                count: bad.len(),
            });
        }
        if samples.labels.is_empty() {
            return Err(EngineError::NoSamples(selection.split.name()));
        }
        samples.skipped = bad.len();
        samples.digest = digest.finish();
        Ok(samples)
    }

    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// These rows alone.
    pub fn only(&self, rows: &[usize]) -> Self {
        Self {
            preprocessing: self.preprocessing.clone(),
            pixels: rows.iter().map(|row| self.pixels[*row].clone()).collect(),
            labels: rows.iter().map(|row| self.labels[*row]).collect(),
            indices: rows.iter().map(|row| self.indices[*row]).collect(),
            skipped: 0,
            digest: self.digest,
        }
    }

    /// The normalised images at these rows, [B, 3, s, s].
    pub fn images(&self, rows: &[usize], vit: &Vit) -> Tensor {
        let pixels: Vec<&[u8]> = rows
            .iter()
            .map(|row| self.pixels[*row].as_slice())
            .collect();
        images::to_tensor(&pixels, &self.preprocessing, vit.device, vit.kind)
    }

    /// Rows in order, cut into micro-batches of at most `size`.
    pub fn micro_batches(&self, size: usize) -> impl Iterator<Item = Vec<usize>> {
        let len = self.len();
        (0..len)
            .step_by(size)
            .map(move |start| (start..len.min(start + size)).collect())
    }
}
