//! Features and gradients of single sources, kept between compositions. A composition with one more
//! source, or with other options, computes only what is new.
//!
//! An entry's key is the digest of everything its numbers depend on. So a composition with the
//! cache gives the same as one without, to the last bit on the CPU. The cut into micro-batches (by
//! a limit on them, or by shards) is not in the key: it changes features by rounding only.

pub mod result_files;
pub(crate) mod row_file;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;
use tch::{Device, Tensor};

use crate::cache::result_files::{ResultFiles, UnusableDirectory};
use crate::cache::row_file::{Layout, RowFile};
use crate::device::LIBTORCH;
use crate::error::EngineError;
use crate::samples::Samples;
use crate::vit::Vit;
use promptweave_domain::backbone::BackboneConfig;
use promptweave_domain::digest::{Digest, DigestBuilder};
use promptweave_domain::objective::{HeadKind, HeadOptions};
use promptweave_domain::precision::Precision;
use promptweave_domain::tensor::{Element as _, Tensor as PlainTensor};
use promptweave_formats::backbone::Backbone;

/// Format of the entries. Raise it whenever the engine computes other numbers from the same input
/// within a version.
const FORMAT: u32 = 1;

/// The results that an engine keeps.
pub struct ResultCache {
    files: ResultFiles,
    /// Whether gradients are kept. They are m times as large as features.
    gradients: bool,
}

impl ResultCache {
    /// A cache of at most `max_bytes` in the folder `results` of a directory; `None` for 0. The folder is the cache's own,
    /// since the cache evicts whatever lies in it. With `gradients` false it keeps features alone.
    pub fn open(
        dir: &Path,
        max_bytes: u64,
        gradients: bool,
    ) -> Result<Option<Self>, UnusableDirectory> {
        if max_bytes == 0 {
            return Ok(None);
        }
        let files = ResultFiles::new(&dir.join("results"), max_bytes)?;
        Ok(Some(Self { files, gradients }))
    }
}

// ---- Keys ------------------------------------------------------------------------------------

#[derive(Serialize)]
struct FeaturesKey<'a> {
    kind: &'static str,
    format: u32,
    version: &'static str,
    libtorch: &'static str,
    backbone: Digest,
    /// The configuration that the digest of the weights does not cover: heads, epsilons,
    /// preprocessing.
    config: &'a BackboneConfig,
    preprocessing: String,
    /// Digest of images and labels.
    samples: Digest,
    precision: Precision,
    plain: bool,
    device: &'static str,
    /// Number of threads, for the plain path: its results agree to the last bit only at the same
    /// number.
    threads: Option<i32>,
    prompt: Digest,
}

#[derive(Serialize)]
struct GradientsKey<'a> {
    kind: &'static str,
    features: Digest,
    head: &'a HeadOptions,
    /// Digest of the cross-fit folds of the heads.
    folds: Digest,
    num_classes: usize,
    /// Digests of all sources, if one head is fitted on all.
    fitted_on: &'a [Digest],
}

fn digest_of(key: &impl Serialize) -> Digest {
    Digest::of(&serde_json::to_vec(key).expect("plain data"))
}

/// Digest of a prompt as it enters the backbone, with its tokens in the common order.
fn digest_of_prompt(prompt: &PlainTensor<f32>) -> Digest {
    let mut digest = DigestBuilder::default();
    for size in &prompt.shape {
        digest.update(&(*size as u64).to_le_bytes());
    }
    digest.update(&f32::bytes(&prompt.values));
    digest.finish()
}

fn digest_of_folds(folds: &[usize]) -> Digest {
    let bytes: Vec<u8> = folds
        .iter()
        .flat_map(|fold| (*fold as u64).to_le_bytes())
        .collect();
    Digest::of(&bytes)
}

// ---- One composition's results ------------------------------------------------------------------

/// The cache with the keys of one composition's sources.
pub struct CachedSources<'a> {
    cache: Option<&'a mut ResultCache>,
    vit: &'a Vit,
    num_samples: usize,
    /// Keys of the sources' features.
    keys: Vec<Digest>,
}

impl<'a> CachedSources<'a> {
    pub fn new(
        cache: Option<&'a mut ResultCache>,
        backbone: &Backbone,
        vit: &'a Vit,
        samples: &Samples,
        prompts: &[PlainTensor<f32>],
    ) -> Self {
        let on_cpu = vit.device == Device::Cpu;
        let key_of = |prompt: &PlainTensor<f32>| {
            digest_of(&FeaturesKey {
                kind: "features",
                format: FORMAT,
                version: env!("CARGO_PKG_VERSION"),
                libtorch: LIBTORCH,
                backbone: backbone.digest,
                config: &backbone.config,
                preprocessing: backbone.config.preprocessing.id(),
                samples: samples.digest,
                precision: vit.compute.precision,
                plain: vit.compute.plain,
                device: if on_cpu { "cpu" } else { "cuda" },
                threads: (on_cpu && vit.compute.plain).then(tch::get_num_threads),
                prompt: digest_of_prompt(prompt),
            })
        };
        Self {
            cache,
            vit,
            num_samples: samples.len(),
            keys: prompts.iter().map(key_of).collect(),
        }
    }

    /// Features [M, N, d]. `extract` computes [M', N, d] for the prompts that are not in the cache,
    /// if any.
    pub fn features(
        &mut self,
        prompts: &[Tensor],
        extract: impl FnOnce(&[Tensor]) -> Result<Tensor, EngineError>,
    ) -> Result<Tensor, EngineError> {
        let Some(cache) = self.cache.as_deref_mut() else {
            return extract(prompts);
        };
        let d = self.vit.config.embed_dim;
        let layout = Layout::new("features", self.num_samples, &[d], self.vit.kind);
        let mut features: Vec<Option<Tensor>> = (self.keys.iter())
            .map(|key| {
                let rows = cache.find(key, &layout)?;
                logged(rows.read(0, self.num_samples))
            })
            .collect();
        let unknown: Vec<usize> = (0..prompts.len())
            .filter(|i| features[*i].is_none())
            .collect();
        tracing::debug!(known = prompts.len() - unknown.len(), "features");
        if !unknown.is_empty() {
            let of_unknown: Vec<Tensor> = (unknown.iter())
                .map(|i| prompts[*i].shallow_clone())
                .collect();
            let computed = extract(&of_unknown)?;
            for (at, i) in unknown.into_iter().enumerate() {
                let of_source = computed.get(at as i64);
                let kept = cache.make(&layout);
                if kept
                    .as_ref()
                    .and_then(|rows| logged(rows.write(0, &of_source)))
                    .is_some()
                {
                    cache.put(&self.keys[i], kept.as_ref().expect("it was written"));
                }
                features[i] = Some(of_source);
            }
        }
        Ok(Tensor::stack(
            &features.into_iter().flatten().collect::<Vec<_>>(),
            0,
        ))
    }

    /// The files from which each source's gradients are read, or to which they are written.
    pub fn gradients(
        &mut self,
        num_tokens: usize,
        head: &HeadOptions,
        folds: &[usize],
        num_classes: usize,
    ) -> CachedGradients {
        let sources = self.keys.len();
        let Some(cache) = self.cache.as_deref_mut().filter(|cache| cache.gradients) else {
            return CachedGradients::none(sources);
        };
        let fitted_on: &[Digest] = match head.kind {
            HeadKind::Shared => &self.keys,
            HeadKind::Lda | HeadKind::Ridge => &[],
        };
        let folds = digest_of_folds(folds);
        let key_of = |features: &Digest| {
            digest_of(&GradientsKey {
                kind: "gradients",
                features: *features,
                head,
                folds,
                num_classes,
                fitted_on,
            })
        };
        let keys: Vec<Digest> = self.keys.iter().map(key_of).collect();
        let row = [num_tokens, self.vit.config.embed_dim];
        let layout = Layout::new("gradients", self.num_samples, &row, self.vit.kind);
        let sources = keys
            .iter()
            .map(|key| match cache.find(key, &layout) {
                Some(rows) => SourceRows::Known(rows),
                None => cache.make(&layout).map_or(SourceRows::Nowhere, |rows| {
                    let written = AtomicUsize::new(0);
                    SourceRows::New { rows, written }
                }),
            })
            .collect();
        CachedGradients { keys, sources }
    }

    /// Keeps the computed gradients, after they turned out to be finite.
    pub fn keep(&mut self, gradients: &CachedGradients) {
        let Some(cache) = self.cache.as_deref_mut() else {
            return;
        };
        for (key, source) in gradients.keys.iter().zip(&gradients.sources) {
            match source {
                SourceRows::New { rows, written }
                    if written.load(Ordering::Acquire) == rows.num_rows() =>
                {
                    cache.put(key, rows);
                }
                _ => {}
            }
        }
    }
}

impl ResultCache {
    fn find(&mut self, key: &Digest, layout: &Layout) -> Option<RowFile> {
        logged(RowFile::open(self.files.get(key)?, layout.clone())).flatten()
    }

    fn make(&mut self, layout: &Layout) -> Option<RowFile> {
        logged(RowFile::create(self.files.scratch()?, layout.clone()))
    }

    fn put(&mut self, key: &Digest, rows: &RowFile) {
        self.files.put(key, rows.file());
    }
}

/// The sources' gradients on disk while they are accumulated. Several streams may share it.
pub struct CachedGradients {
    keys: Vec<Digest>,
    sources: Vec<SourceRows>,
}

enum SourceRows {
    Known(RowFile),
    New {
        rows: RowFile,
        /// Number of rows written. The file is whole only when it is that of all rows.
        written: AtomicUsize,
    },
    Nowhere,
}

impl CachedGradients {
    /// A value for this many sources of which none are cached, and none will be.
    pub fn none(sources: usize) -> Self {
        Self {
            keys: Vec::new(),
            sources: (0..sources).map(|_| SourceRows::Nowhere).collect(),
        }
    }

    /// The sources whose gradients must be computed.
    pub fn unknown(&self) -> Vec<usize> {
        let is_known = |i: &usize| matches!(self.sources[*i], SourceRows::Known(_));
        (0..self.sources.len()).filter(|i| !is_known(i)).collect()
    }

    /// All sources' gradients [M, B, m·d] of consecutive samples. `computed` has [B, m·d] for each
    /// unknown source, and is written to the cache; the others are read from it.
    ///
    /// # Errors
    /// [`EngineError::Cache`] if a file that was readable no longer is.
    pub fn complete(
        &self,
        samples: &[usize],
        computed: Vec<Tensor>,
    ) -> Result<Tensor, EngineError> {
        let start = samples.first().copied().unwrap_or(0);
        let mut computed = computed.into_iter();
        let device = computed
            .as_slice()
            .first()
            .map_or(Device::Cpu, Tensor::device);
        let of_source = |source: &SourceRows| {
            if let SourceRows::Known(rows) = source {
                let read = rows.read(start, samples.len());
                return Ok(read.map_err(EngineError::Cache)?.to_device(device));
            }
            let gradients = computed.next().expect("one for each unknown source");
            if let SourceRows::New { rows, written } = source
                && logged(rows.write(start, &gradients)).is_some()
            {
                written.fetch_add(samples.len(), Ordering::Release);
            }
            Ok(gradients)
        };
        let all: Vec<Tensor> = (self.sources.iter())
            .map(of_source)
            .collect::<Result<_, EngineError>>()?;
        Ok(Tensor::stack(&all, 0))
    }
}

/// Logs a failure of the cache. It costs time and nothing else.
fn logged<T>(result: std::io::Result<T>) -> Option<T> {
    result
        .inspect_err(|error| tracing::warn!(%error, "a file of the cache cannot be used"))
        .ok()
}
