//! Brings a job's files to this machine: prompts from the database, backbone and images from the
//! blob store into a cache by digest, statistics to solve again from into memory. A worker needs
//! those two and nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use sqlx::PgPool;
use tempfile::TempDir;

use super::composer_thread::Work;
use crate::blobs::{BlobError, BlobStore};
use crate::db::DbError;
use crate::domain::backbone::{CONFIG_FILE, MODEL_FILE};
use crate::domain::composition::{CompositionInput, ResolveInput, Source, SourceRef};
use crate::domain::digest::Digest;
use crate::domain::job::{BackboneSpec, EnsembleSpec, SourceSpec, TargetSpec};
use crate::domain::prompt_file::{PromptFile, PromptFileError};
use crate::registry::datasets::{self, PackError};
use crate::registry::{RegistryError, prompt_versions};

#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error("cannot use the cache directory `{}`", .path.display())]
    Cache {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("the images of `{dataset}` cannot be unpacked")]
    Unpack { dataset: String, source: PackError },
    #[error("prompt `{prompt}:{version}` is not in the registry any more")]
    MissingPrompt { prompt: String, version: i32 },
    #[error("prompt `{prompt}` cannot be read")]
    Prompt {
        prompt: String,
        source: PromptFileError,
    },
}

impl InputError {
    /// Whether another try may help: a full disk or a lost database may, missing bytes will not.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Cache { .. } | Self::Unpack { .. } => true,
            Self::Blob(error) | Self::Registry(RegistryError::Blob(error)) => {
                !matches!(error, BlobError::Missing(_) | BlobError::Corrupt { .. })
            }
            Self::Registry(error) => {
                matches!(error, RegistryError::Db(DbError::Unavailable(_)))
            }
            Self::MissingPrompt { .. } | Self::Prompt { .. } => false,
        }
    }
}

/// Where inputs come from and go to.
#[derive(Clone, Debug)]
pub struct Inputs {
    pub pool: PgPool,
    pub blobs: BlobStore,
    /// Files by digest; several workers may share it.
    pub cache_dir: PathBuf,
}

impl Inputs {
    /// Everything `spec` names, at hand.
    pub async fn fetch(&self, spec: &EnsembleSpec) -> Result<Work, InputError> {
        if let Some(from) = &spec.resolved_from {
            let statistics = self.blobs.get_bytes(&from.statistics).await?;
            return Ok(Work::Resolve(ResolveInput {
                statistics: statistics.into(),
                sources: spec.sources.iter().map(named).collect(),
                objective: spec.objective.clone(),
            }));
        }
        let mut sources = Vec::with_capacity(spec.sources.len());
        for source in &spec.sources {
            sources.push(self.source(source).await?);
        }
        Ok(Work::Compose(CompositionInput {
            backbone_dir: self.backbone(&spec.backbone).await?,
            target_dir: self.images(&spec.target).await?,
            target: spec.target.samples.clone(),
            sources,
            objective: spec.objective.clone(),
        }))
    }

    async fn source(&self, source: &SourceSpec) -> Result<Source, InputError> {
        let mut connection = self.pool.acquire().await.map_err(RegistryError::from)?;
        let bytes = prompt_versions::content(&mut connection, &source.digest)
            .await?
            .ok_or_else(|| InputError::MissingPrompt {
                prompt: source.prompt.clone(),
                version: source.version,
            })?;
        let file = PromptFile::parse(&bytes).map_err(|error| InputError::Prompt {
            prompt: source.prompt.clone(),
            source: error,
        })?;
        Ok(Source {
            prompt: source.prompt.clone(),
            version: Some(source.version),
            digest: source.digest,
            file,
        })
    }

    async fn backbone(&self, backbone: &BackboneSpec) -> Result<PathBuf, InputError> {
        let config = serde_json::to_vec_pretty(&backbone.config).expect("plain data");
        // The same weights may be registered with another preprocessing.
        let key = format!(
            "{}-{}",
            backbone.model_digest.hex(),
            &Digest::of(&config).hex()[..12]
        );
        let entry = match self.cached("backbones", &key)? {
            Cached::There(dir) => return Ok(dir),
            Cached::Missing(entry) => entry,
        };
        let path = entry.unfinished.join(CONFIG_FILE);
        tokio::fs::write(&path, config).await.map_err(at(&path))?;
        let path = entry.unfinished.join(MODEL_FILE);
        self.blobs
            .get_to_file(&backbone.model_digest, &path)
            .await?;
        entry.keep()
    }

    async fn images(&self, target: &TargetSpec) -> Result<PathBuf, InputError> {
        let entry = match self.cached("datasets", &target.digest.hex())? {
            Cached::There(dir) => return Ok(dir),
            Cached::Missing(entry) => entry,
        };
        let pack = entry.aside.path().join("pack.tar");
        self.blobs.get_to_file(&target.digest, &pack).await?;
        let dir = entry.unfinished.clone();
        tokio::task::spawn_blocking(move || datasets::unpack(&pack, &dir))
            .await
            .expect("unpacking does not panic")
            .map_err(|source| InputError::Unpack {
                dataset: target.dataset.clone(),
                source,
            })?;
        entry.keep()
    }

    /// `cache/<kind>/<key>`, or a place to make it.
    fn cached(&self, kind: &str, key: &str) -> Result<Cached, InputError> {
        let parent = self.cache_dir.join(kind);
        let dir = parent.join(key);
        if dir.is_dir() {
            return Ok(Cached::There(dir));
        }
        fs::create_dir_all(&parent).map_err(at(&parent))?;
        let aside = tempfile::Builder::new()
            .prefix(".unfinished-")
            .tempdir_in(&parent)
            .map_err(at(&parent))?;
        let unfinished = aside.path().join("content");
        fs::create_dir(&unfinished).map_err(at(&unfinished))?;
        Ok(Cached::Missing(NewEntry {
            dir,
            unfinished,
            aside,
        }))
    }
}

/// The statistics have the prompts.
fn named(source: &SourceSpec) -> SourceRef {
    SourceRef {
        prompt: source.prompt.clone(),
        version: Some(source.version),
        digest: source.digest,
    }
}

enum Cached {
    There(PathBuf),
    Missing(NewEntry),
}

/// An entry in the making; it appears whole, or not at all.
struct NewEntry {
    dir: PathBuf,
    /// What becomes `dir`.
    unfinished: PathBuf,
    /// Goes away with whatever is left in it.
    aside: TempDir,
}

impl NewEntry {
    fn keep(self) -> Result<PathBuf, InputError> {
        match fs::rename(&self.unfinished, &self.dir) {
            // Another worker was quicker, with the same bytes.
            Err(_) if self.dir.is_dir() => Ok(self.dir),
            renamed => renamed.map(|()| self.dir.clone()).map_err(at(&self.dir)),
        }
    }
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> InputError {
    let path = path.to_owned();
    move |source| InputError::Cache { path, source }
}
