//! Brings a job's files to this machine: prompts from the database, backbone and images from the blob store into a
//! cache by digest, statistics to solve again from into memory. A worker needs only database and blob store.

use sqlx::PgPool;

use crate::blobs::{BlobError, BlobStore};
use crate::db::DbError;
use crate::jobs::shards::ClaimedShard;
use crate::registry::datasets;
use crate::registry::datasets::PackError;
use crate::registry::{RegistryError, prompt_versions};
use crate::worker::composer_thread::Task;
use promptweave_domain::composition::{CompositionInput, SolveInput, Source, SourceRef};
use promptweave_domain::digest::Digest;
use promptweave_domain::early_stopping::EarlyStopping;
use promptweave_domain::ensemble_file::EnsembleFileError;
use promptweave_domain::job::{BackboneSpec, EnsembleSpec, SourceSpec, TargetSpec};
use promptweave_domain::objective::Objective;
use promptweave_domain::prediction::{Model, PredictionInput};
use promptweave_domain::prompt_file::{PromptFile, PromptFileError};
use promptweave_domain::sharding::ShardInput;
use promptweave_domain::specification::{JobSpec, PredictionSpec, TuningSpec};
use promptweave_domain::tuning::TuningInput;
use promptweave_formats::backbone::{CONFIG_FILE, MODEL_FILE};
use promptweave_formats::directory_cache::{DirectoryCache, Entry, InUse, NewEntry};

#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error("the worker's cache directory cannot be used")]
    Cache(#[source] std::io::Error),
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
    #[error("model `{prompt}` cannot be read")]
    Model {
        prompt: String,
        source: EnsembleFileError,
    },
}

impl InputError {
    /// Whether another attempt may help: after a full disk or a lost database it may, without the bytes it will not.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Cache(_) | Self::Unpack { .. } => true,
            Self::Blob(error) | Self::Registry(RegistryError::Blob(error)) => {
                !matches!(error, BlobError::Missing(_) | BlobError::Corrupt { .. })
            }
            Self::Registry(error) => {
                matches!(error, RegistryError::Db(DbError::Unavailable(_)))
            }
            Self::MissingPrompt { .. } | Self::Prompt { .. } | Self::Model { .. } => false,
        }
    }
}

/// The inputs of sources' features, in ensembles and rankings.
struct Needed<'a> {
    sources: &'a [SourceSpec],
    backbone: &'a BackboneSpec,
    target: &'a TargetSpec,
    objective: &'a Objective,
    early_stopping: Option<EarlyStopping>,
}

impl<'a> From<&'a EnsembleSpec> for Needed<'a> {
    fn from(spec: &'a EnsembleSpec) -> Self {
        Self {
            sources: &spec.sources,
            backbone: &spec.backbone,
            target: &spec.target,
            objective: &spec.objective,
            early_stopping: spec.early_stopping,
        }
    }
}

/// Fetches inputs.
#[derive(Clone, Debug)]
pub struct Inputs {
    pub pool: PgPool,
    pub blobs: BlobStore,
    /// The cache of backbones and images, by digest.
    pub files: DirectoryCache,
}

impl Inputs {
    /// The work that `spec` asks for, with all its files. They stay while the returned directories are held.
    pub async fn fetch(&self, spec: &JobSpec) -> Result<(Task, Vec<InUse>), InputError> {
        match spec {
            JobSpec::Ensemble(spec) => self.ensemble(spec).await,
            JobSpec::Tuning(spec) => self.tuning(spec).await,
            JobSpec::Ranking(spec) => {
                let needed = Needed {
                    sources: &spec.sources,
                    backbone: &spec.backbone,
                    target: &spec.target,
                    objective: &spec.objective.objective(),
                    early_stopping: None,
                };
                let (input, in_use) = self.composition(needed).await?;
                Ok((Task::Rank(input), in_use))
            }
            JobSpec::Prediction(spec) => self.prediction(spec).await,
        }
    }

    async fn ensemble(&self, spec: &EnsembleSpec) -> Result<(Task, Vec<InUse>), InputError> {
        if let Some(from) = &spec.solved_from {
            let statistics = self.blobs.get_bytes(&from.statistics).await?;
            let work = Task::Solve(SolveInput {
                statistics: statistics.into(),
                sources: spec.sources.iter().map(named).collect(),
                objective: spec.objective.clone(),
            });
            return Ok((work, Vec::new()));
        }
        let (input, in_use) = self.composition(spec.into()).await?;
        Ok((Task::Compose(input), in_use))
    }

    async fn tuning(&self, spec: &TuningSpec) -> Result<(Task, Vec<InUse>), InputError> {
        let start = match &spec.start {
            Some(start) => Some(self.source(start).await?),
            None => None,
        };
        let backbone = self.backbone(&spec.backbone).await?;
        let images = self
            .images(&spec.target.dataset, &spec.target.digest)
            .await?;
        let input = TuningInput {
            backbone_dir: backbone.dir.clone(),
            target_dir: images.dir.clone(),
            target: spec.target.samples.clone(),
            task: spec.target.dataset.clone(),
            start,
            options: spec.options.clone(),
            grid: spec.grid.clone(),
        };
        Ok((Task::Tune(Box::new(input)), vec![backbone, images]))
    }

    async fn prediction(&self, spec: &PredictionSpec) -> Result<(Task, Vec<InUse>), InputError> {
        let (model, images) = (&spec.model, &spec.images);
        let bytes = self.content(model).await?;
        let file = Model::parse(&bytes).map_err(|error| InputError::Model {
            prompt: model.prompt.clone(),
            source: error,
        })?;
        let backbone = self.backbone(&spec.backbone).await?;
        let unpacked = self.images(&images.dataset, &images.digest).await?;
        let input = PredictionInput {
            backbone_dir: backbone.dir.clone(),
            dataset_dir: unpacked.dir.clone(),
            split: images.split,
            skip_unreadable: images.skip_unreadable,
            name: format!("{}:{}", model.prompt, model.version),
            digest: model.digest,
            model: file,
            top_k: spec.top_k,
            format: spec.format,
        };
        Ok((Task::Predict(Box::new(input)), vec![backbone, unpacked]))
    }

    /// The work of a shard of another worker's job, with all its files.
    pub async fn fetch_shard(
        &self,
        claimed: &ClaimedShard,
    ) -> Result<(Task, Vec<InUse>), InputError> {
        let (composition, in_use) = self.composition((&claimed.spec).into()).await?;
        let mut features = Vec::with_capacity(claimed.features.len());
        for file in &claimed.features {
            features.push(self.blobs.get_bytes(file).await?.into());
        }
        let input = ShardInput {
            job: claimed.lease.job_id,
            composition,
            shard: claimed.shard,
            features,
        };
        Ok((Task::Shard(input), in_use))
    }

    async fn composition(
        &self,
        spec: Needed<'_>,
    ) -> Result<(CompositionInput, Vec<InUse>), InputError> {
        let mut sources = Vec::with_capacity(spec.sources.len());
        for source in spec.sources {
            sources.push(self.source(source).await?);
        }
        let backbone = self.backbone(spec.backbone).await?;
        let images = self
            .images(&spec.target.dataset, &spec.target.digest)
            .await?;
        let input = CompositionInput {
            backbone_dir: backbone.dir.clone(),
            target_dir: images.dir.clone(),
            target: spec.target.samples.clone(),
            sources,
            objective: spec.objective.clone(),
            early_stopping: spec.early_stopping,
        };
        Ok((input, vec![backbone, images]))
    }

    async fn source(&self, source: &SourceSpec) -> Result<Source, InputError> {
        let bytes = self.content(source).await?;
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

    /// The bytes of a version's file.
    async fn content(&self, version: &SourceSpec) -> Result<Vec<u8>, InputError> {
        let mut connection = self.pool.acquire().await.map_err(RegistryError::from)?;
        prompt_versions::content(&mut connection, &version.digest)
            .await?
            .ok_or_else(|| InputError::MissingPrompt {
                prompt: version.prompt.clone(),
                version: version.version,
            })
    }

    async fn backbone(&self, backbone: &BackboneSpec) -> Result<InUse, InputError> {
        let config = serde_json::to_vec_pretty(&backbone.config).expect("plain data");
        // The same weights may be registered with another preprocessing, so both are in the key.
        let key = format!(
            "{}-{}",
            backbone.model_digest.hex(),
            &Digest::of(&config).hex()[..12]
        );
        let entry = match self.entry("backbones", &key)? {
            Entry::There(in_use) => return Ok(in_use),
            Entry::Missing(entry) => entry,
        };
        let path = entry.unfinished.join(CONFIG_FILE);
        tokio::fs::write(&path, config)
            .await
            .map_err(InputError::Cache)?;
        let path = entry.unfinished.join(MODEL_FILE);
        self.blobs
            .get_to_file(&backbone.model_digest, &path)
            .await?;
        keep(entry).await
    }

    async fn images(&self, dataset: &str, digest: &Digest) -> Result<InUse, InputError> {
        let entry = match self.entry("datasets", &digest.hex())? {
            Entry::There(in_use) => return Ok(in_use),
            Entry::Missing(entry) => entry,
        };
        let pack = entry.aside.path().join("pack.tar");
        self.blobs.get_to_file(digest, &pack).await?;
        let dir = entry.unfinished.clone();
        tokio::task::spawn_blocking(move || datasets::unpack(&pack, &dir))
            .await
            .expect("unpacking does not panic")
            .map_err(|source| InputError::Unpack {
                dataset: dataset.to_owned(),
                source,
            })?;
        keep(entry).await
    }

    fn entry(&self, kind: &str, key: &str) -> Result<Entry, InputError> {
        self.files.entry(kind, key).map_err(InputError::Cache)
    }
}

/// Keeps an entry off the runtime's threads, because it may evict others, which takes a while.
async fn keep(entry: NewEntry) -> Result<InUse, InputError> {
    tokio::task::spawn_blocking(move || entry.keep())
        .await
        .expect("keeping an entry does not panic")
        .map_err(InputError::Cache)
}

/// The source's name only: its prompt is in the statistics.
fn named(source: &SourceSpec) -> SourceRef {
    SourceRef {
        prompt: source.prompt.clone(),
        version: Some(source.version),
        digest: source.digest,
    }
}
