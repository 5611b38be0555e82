//! The labelled samples of a composition, a tuning or an evaluation.

pub(crate) mod classes;
pub mod images;
pub mod pixels;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::error::EngineError;
use crate::samples::pixels::PixelFile;
use promptweave_domain::backbone::Preprocessing;
use promptweave_domain::composition::TargetSamples;
use promptweave_domain::digest::{Digest, DigestBuilder};
use promptweave_domain::split::Split;
use promptweave_domain::stratified::stratified_subset;
use promptweave_formats::dataset::LabelledImages;
use promptweave_formats::image::{decode, resize};

/// Images, at least one, with their labels if they have any, that are decoded in the background to pixels at the backbone's
/// input size. Every image is decoded once. Its pixels take 29 KB on disk at 98 px and 150 KB at
/// 224 px, and no memory.
pub struct Samples {
    preprocessing: Preprocessing,
    pixels: Arc<PixelFile>,
    /// Position of each row's image in the pixel file.
    images: Vec<usize>,
    /// Each row's label, as an index into the dataset's classes; empty for images without labels.
    pub labels: Vec<usize>,
    /// Each row's position in the list file.
    pub indices: Vec<usize>,
    /// Number of unreadable images that were left out.
    pub skipped: usize,
    /// Digest over the images' file bytes and labels, in order.
    pub digest: Digest,
}

/// Which images of a split to take.
pub struct Selection {
    pub split: Split,
    /// The most images to take; `None` takes all.
    pub max_samples: Option<usize>,
    pub seed: u64,
    pub skip_unreadable: bool,
}

impl Selection {
    pub fn of_target(target: &TargetSamples) -> Self {
        Self {
            split: target.split,
            max_samples: Some(target.max_samples),
            seed: target.seed,
            skip_unreadable: target.skip_unreadable,
        }
    }

    /// All images of a split, otherwise with the same options.
    pub fn whole(&self, split: Split) -> Self {
        Self {
            split,
            max_samples: None,
            ..*self
        }
    }
}

impl Samples {
    /// Refuses samples of a single class. `classes` are the dataset's names.
    pub fn check_classes(&self, classes: &[String]) -> Result<(), EngineError> {
        let first = self.labels[0];
        match self.labels.iter().all(|label| *label == first) {
            true => Err(EngineError::OneClass(classes[first].clone())),
            false => Ok(()),
        }
    }

    /// Starts to decode, and returns as soon as every file was read once for the digest. Only with
    /// `skip_unreadable` it waits for the last image, since the rows are not known before.
    pub fn load(
        dataset: &LabelledImages,
        selection: &Selection,
        preprocessing: &Preprocessing,
    ) -> Result<Self, EngineError> {
        let listed = dataset.split(selection.split)?;
        let all_labels: Vec<usize> = listed.iter().map(|image| image.label).collect();
        let max_samples = selection.max_samples.unwrap_or(listed.len());
        let chosen = stratified_subset(&all_labels, max_samples, selection.seed);
        if chosen.is_empty() {
            return Err(EngineError::NoSamples(selection.split.name()));
        }

        let path = |index: &usize| dataset.image_path(&listed[*index]);
        let paths: Vec<PathBuf> = chosen.iter().map(path).collect();
        let pixels = decoding(paths, selection.skip_unreadable, preprocessing)?;
        let images: Vec<usize> = if selection.skip_unreadable {
            pixels.wait()?
        } else {
            (0..chosen.len()).collect()
        };
        if images.is_empty() {
            return Err(EngineError::NoSamples(selection.split.name()));
        }

        let indices: Vec<usize> = images.iter().map(|image| chosen[*image]).collect();
        let labels: Vec<usize> = indices.iter().map(|index| all_labels[*index]).collect();
        let mut digest = DigestBuilder::default();
        for (index, label) in indices.iter().zip(&labels) {
            let path = path(index);
            let Ok(bytes) = fs::read(&path) else {
                // A decoder has the same trouble, and its error counts how many images have it.
                pixels.wait()?;
                return Err(EngineError::UnreadableImages {
                    first: path,
                    count: 1,
                });
            };
            digest.update(&bytes);
            digest.update(&(*label as u64).to_le_bytes());
        }
        Ok(Self {
            preprocessing: preprocessing.clone(),
            pixels: Arc::new(pixels),
            skipped: chosen.len() - images.len(),
            images,
            labels,
            indices,
            digest: digest.finish(),
        })
    }

    /// Images of these files without labels; `indices` are their positions in the list. Starts to decode, and returns at
    /// once. Only with `skip_unreadable` it waits for the last image.
    pub fn unlabelled(
        paths: Vec<PathBuf>,
        skip_unreadable: bool,
        preprocessing: &Preprocessing,
    ) -> Result<Self, EngineError> {
        let (listed, first) = (paths.len(), paths.first().cloned());
        let pixels = decoding(paths, skip_unreadable, preprocessing)?;
        let images: Vec<usize> = match skip_unreadable {
            true => pixels.wait()?,
            false => (0..listed).collect(),
        };
        if images.is_empty() {
            return Err(EngineError::UnreadableImages {
                first: first.unwrap_or_default(),
                count: listed,
            });
        }
        Ok(Self {
            preprocessing: preprocessing.clone(),
            pixels: Arc::new(pixels),
            skipped: listed - images.len(),
            indices: images.clone(),
            images,
            labels: Vec::new(),
            digest: DigestBuilder::default().finish(),
        })
    }

    /// Waits until every image is decoded. The first unreadable one is refused here, with their
    /// number, unless it was skipped.
    pub fn wait(&self) -> Result<(), EngineError> {
        self.pixels.wait().map(drop)
    }

    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// These rows alone, with the same pixel file.
    pub fn only(&self, rows: &[usize]) -> Self {
        Self {
            preprocessing: self.preprocessing.clone(),
            pixels: Arc::clone(&self.pixels),
            images: rows.iter().map(|row| self.images[*row]).collect(),
            labels: rows.iter().map(|row| self.labels[*row]).collect(),
            indices: rows.iter().map(|row| self.indices[*row]).collect(),
            skipped: 0,
            digest: self.digest,
        }
    }

    /// The normalised images at these rows, [B, 3, s, s], once they are decoded. An unreadable
    /// image that has been found by now is an error, whichever row it is in.
    pub fn images(
        &self,
        rows: &[usize],
        device: Device,
        kind: Kind,
    ) -> Result<Tensor, EngineError> {
        let images: Vec<usize> = rows.iter().map(|row| self.images[*row]).collect();
        let pixels = self.pixels.read(&images)?;
        let pixels: Vec<&[u8]> = pixels
            .chunks_exact(image_bytes(&self.preprocessing))
            .collect();
        Ok(images::to_tensor(
            &pixels,
            &self.preprocessing,
            device,
            kind,
        ))
    }
}

fn decoding(
    paths: Vec<PathBuf>,
    skip_unreadable: bool,
    preprocessing: &Preprocessing,
) -> Result<PixelFile, EngineError> {
    let (size, preprocessing) = (image_bytes(preprocessing), preprocessing.clone());
    let decoded = move |path: &Path| {
        let image = decode(&fs::read(path).ok()?).ok()?;
        Some(resize(&image, &preprocessing))
    };
    PixelFile::start(paths, size, skip_unreadable, Box::new(decoded))
}

/// Size of an image's pixels, in bytes.
fn image_bytes(preprocessing: &Preprocessing) -> usize {
    preprocessing.size * preprocessing.size * 3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{write_backbone, write_dataset};

    fn selection(skip_unreadable: bool) -> Selection {
        Selection {
            split: Split::Train,
            max_samples: None,
            seed: 0,
            skip_unreadable,
        }
    }

    #[test]
    fn images_are_those_decoded_one_by_one_and_the_digest_is_over_their_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let backbone = write_backbone(&dir.path().join("backbone"));
        let preprocessing = &backbone.config.preprocessing;
        write_dataset(&dir.path().join("target"), 30, 3);
        let dataset = LabelledImages::read(&dir.path().join("target")).unwrap();
        let samples = Samples::load(&dataset, &selection(false), preprocessing).unwrap();
        samples.wait().unwrap();

        let mut digest = DigestBuilder::default();
        let mut eager = Vec::new();
        for image in dataset.split(Split::Train).unwrap() {
            let bytes = fs::read(dataset.image_path(image)).unwrap();
            eager.push(resize(&decode(&bytes).unwrap(), preprocessing));
            digest.update(&bytes);
            digest.update(&(image.label as u64).to_le_bytes());
        }
        assert_eq!(samples.digest, digest.finish());
        let expect = |samples: &Samples, rows: &[usize], of: &[usize]| {
            let pixels: Vec<&[u8]> = of.iter().map(|row| eager[*row].as_slice()).collect();
            let expected = images::to_tensor(&pixels, preprocessing, Device::Cpu, Kind::Float);
            assert_eq!(
                samples.images(rows, Device::Cpu, Kind::Float).unwrap(),
                expected
            );
        };
        let all: Vec<usize> = (0..30).collect();
        expect(&samples, &all, &all);
        expect(&samples, &[29, 4, 4], &[29, 4, 4]);
        // A selection reads the same file, even after the whole is dropped.
        let few = samples.only(&[7, 2]);
        assert!(Arc::ptr_eq(&few.pixels, &samples.pixels));
        drop(samples);
        expect(&few, &[1, 0], &[2, 7]);
    }

    #[test]
    fn unreadable_images_are_refused_by_name_and_number_or_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let backbone = write_backbone(&dir.path().join("backbone"));
        let preprocessing = &backbone.config.preprocessing;
        let target = dir.path().join("target");
        write_dataset(&target, 12, 3);
        // Rows are in the order of their paths: 4 blue, 4 green, 4 red.
        let good = LabelledImages::read(&target).unwrap();
        let whole = Samples::load(&good, &selection(false), preprocessing).unwrap();
        let rows: Vec<usize> = (0..12).filter(|row| ![2, 5].contains(row)).collect();
        let expected = whole.images(&rows, Device::Cpu, Kind::Float).unwrap();
        for row in [2, 5] {
            let image = &good.split(Split::Train).unwrap()[row];
            fs::write(good.image_path(image), "no image").unwrap();
        }

        let samples = Samples::load(&good, &selection(false), preprocessing).unwrap();
        let refused = samples.wait().unwrap_err();
        let EngineError::UnreadableImages { first, count } = &refused else {
            panic!("{refused}");
        };
        assert_eq!(
            (first, *count),
            (
                &good.image_path(&good.split(Split::Train).unwrap()[2]),
                2usize
            )
        );
        assert!(samples.images(&[0], Device::Cpu, Kind::Float).is_err());

        let samples = Samples::load(&good, &selection(true), preprocessing).unwrap();
        assert_eq!((samples.len(), samples.skipped), (10, 2));
        assert_eq!(samples.indices, rows);
        assert_eq!(
            samples
                .images(&(0..10).collect::<Vec<_>>(), Device::Cpu, Kind::Float)
                .unwrap(),
            expected
        );

        // A missing image is named likewise, and a set of missing images is empty.
        for image in good.split(Split::Train).unwrap() {
            fs::remove_file(good.image_path(image)).unwrap();
        }
        let refused = Samples::load(&good, &selection(false), preprocessing).err();
        assert!(matches!(
            refused,
            Some(EngineError::UnreadableImages { count: 12, .. })
        ));
        let refused = Samples::load(&good, &selection(true), preprocessing).err();
        assert!(matches!(refused, Some(EngineError::NoSamples("train"))));
    }

    #[test]
    fn several_threads_may_use_them() {
        fn shared<T: Send + Sync>() {}
        shared::<Samples>();
    }
}
