//! What a job is to do, by kind: compose (see [`crate::job`]), tune, rank or predict. Everything in a
//! specification is resolved.

use std::fmt::Debug;

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::composition::CompositionResult;
use crate::digest::Digest;
use crate::job::{BackboneSpec, EnsembleSpec, SourceSpec, TargetSpec};
use crate::prediction::{PredictionResult, TableFormat};
use crate::ranking::{Ranking, RankingObjective};
use crate::split::Split;
use crate::tuning::{Grid, TuningOptions, TuningResult};

/// The specification of one kind of job, with the type of its result.
pub trait Specification:
    Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static
{
    type Result: Clone + Debug + Serialize + DeserializeOwned + Send + Sync;

    /// The kind's name in the job's row and in its URL.
    const KIND: &'static str;

    /// The digest of what is computed, without any name, and of the version that computes it. Equal
    /// digests mean equal answers.
    fn digest(&self) -> Digest;
}

/// The names of all kinds.
pub const KINDS: &[&str] = &[
    EnsembleSpec::KIND,
    TuningSpec::KIND,
    RankingSpec::KIND,
    PredictionSpec::KIND,
];

/// A specification of any kind, as a worker claims it.
#[derive(Clone, Debug, PartialEq)]
pub enum JobSpec {
    Ensemble(EnsembleSpec),
    Tuning(TuningSpec),
    Ranking(RankingSpec),
    Prediction(PredictionSpec),
}

impl JobSpec {
    /// Reads a specification from a job's row.
    pub fn read(kind: &str, spec: Value) -> Result<Self, serde_json::Error> {
        match kind {
            EnsembleSpec::KIND => serde_json::from_value(spec).map(Self::Ensemble),
            TuningSpec::KIND => serde_json::from_value(spec).map(Self::Tuning),
            RankingSpec::KIND => serde_json::from_value(spec).map(Self::Ranking),
            PredictionSpec::KIND => serde_json::from_value(spec).map(Self::Prediction),
            unknown => Err(serde_json::Error::unknown_variant(unknown, KINDS)),
        }
    }
}

impl Specification for EnsembleSpec {
    type Result = CompositionResult;
    const KIND: &'static str = "ensemble";

    fn digest(&self) -> Digest {
        // `json!` sorts keys, so the text is canonical.
        let mut computed = json!({
            "target": self.target.digest,
            "samples": self.target.samples,
            "sources": digests(&self.sources),
            "backbone": self.backbone.digest,
            "preprocessing_id": self.backbone.preprocessing_id,
            "objective": self.objective,
            "promptweave": env!("CARGO_PKG_VERSION"),
        });
        if let Some(early_stopping) = &self.early_stopping {
            computed["early_stopping"] = json!(early_stopping);
        }
        // The earlier ensemble's id is only a name, so it is left out. A whole composition keeps
        // the digest it always had.
        if let Some(from) = &self.solved_from {
            computed["statistics"] = json!(from.statistics);
        }
        Digest::of(computed.to_string().as_bytes())
    }
}

fn digests(sources: &[SourceSpec]) -> Vec<Digest> {
    sources.iter().map(|source| source.digest).collect()
}

/// What a tuning trains, on what data, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TuningSpec {
    pub target: TargetSpec,
    /// The prompt to start from; null starts from the initial prompt of `options.init_seed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<SourceSpec>,
    pub backbone: BackboneSpec,
    pub options: TuningOptions,
    pub grid: Grid,
    /// Name of the prompt under which the result is published.
    pub output: String,
}

impl Specification for TuningSpec {
    type Result = TuningResult;
    const KIND: &'static str = "tuning";

    fn digest(&self) -> Digest {
        let computed = json!({
            "target": self.target.digest,
            // The dataset's name counts here: the prompt file states what it was tuned for.
            "task": self.target.dataset,
            "samples": self.target.samples,
            "start": self.start.as_ref().map(|start| start.digest),
            "backbone": self.backbone.digest,
            "preprocessing_id": self.backbone.preprocessing_id,
            "options": self.options,
            "grid": self.grid,
            "promptweave": env!("CARGO_PKG_VERSION"),
        });
        Digest::of(computed.to_string().as_bytes())
    }
}

/// The prompts that a ranking scores, and the target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RankingSpec {
    pub target: TargetSpec,
    /// The source prompts in the order of the request.
    pub sources: Vec<SourceSpec>,
    pub backbone: BackboneSpec,
    pub objective: RankingObjective,
}

impl Specification for RankingSpec {
    type Result = Ranking;
    const KIND: &'static str = "ranking";

    fn digest(&self) -> Digest {
        // The prompts' names count here: the table contains them.
        let names: Vec<_> = self.sources.iter().map(|source| &source.prompt).collect();
        let computed = json!({
            "target": self.target.digest,
            "samples": self.target.samples,
            "sources": digests(&self.sources),
            "names": names,
            "backbone": self.backbone.digest,
            "preprocessing_id": self.backbone.preprocessing_id,
            "objective": self.objective,
            "promptweave": env!("CARGO_PKG_VERSION"),
        });
        Digest::of(computed.to_string().as_bytes())
    }
}

/// What predicts, and for which images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PredictionSpec {
    pub images: ImagesSpec,
    /// The prompt with a head, or the ensemble.
    pub model: SourceSpec,
    pub backbone: BackboneSpec,
    /// How many of the most probable classes the table has for each image.
    pub top_k: usize,
    pub format: TableFormat,
}

/// All images of a split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ImagesSpec {
    pub dataset: String,
    pub version: i32,
    /// Digest of the packed images in the blob store.
    #[schema(value_type = String, example = "sha256:…")]
    pub digest: Digest,
    pub split: Split,
    /// Leave out unreadable images and count them, instead of failing.
    pub skip_unreadable: bool,
}

impl Specification for PredictionSpec {
    type Result = PredictionResult;
    const KIND: &'static str = "prediction";

    fn digest(&self) -> Digest {
        let computed = json!({
            "images": self.images.digest,
            "split": self.images.split,
            "skip_unreadable": self.images.skip_unreadable,
            "model": self.model.digest,
            "backbone": self.backbone.digest,
            "preprocessing_id": self.backbone.preprocessing_id,
            "top_k": self.top_k,
            "format": self.format,
            "promptweave": env!("CARGO_PKG_VERSION"),
        });
        Digest::of(computed.to_string().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::tests::spec;

    fn prediction() -> PredictionSpec {
        let TuningSpec {
            target, backbone, ..
        } = tuning();
        PredictionSpec {
            images: ImagesSpec {
                dataset: target.dataset,
                version: target.version,
                digest: target.digest,
                split: Split::Test,
                skip_unreadable: false,
            },
            model: spec().sources[0].clone(),
            backbone,
            top_k: 3,
            format: TableFormat::Csv,
        }
    }

    #[test]
    fn a_prediction_is_the_same_whatever_its_dataset_is_called() {
        let mut renamed = prediction();
        renamed.images.dataset = "other".into();
        renamed.model.prompt = "other".into();
        assert_eq!(renamed.digest(), prediction().digest());
        let changes: [fn(&mut PredictionSpec); 4] = [
            |it| it.images.split = Split::Val,
            |it| it.top_k = 2,
            |it| it.format = TableFormat::Parquet,
            |it| it.model.digest = Digest::of(b"another model"),
        ];
        for change in changes {
            let mut other = prediction();
            change(&mut other);
            assert_ne!(other.digest(), prediction().digest());
        }
    }

    fn tuning() -> TuningSpec {
        let ensemble = spec();
        TuningSpec {
            target: ensemble.target,
            start: None,
            backbone: ensemble.backbone,
            options: TuningOptions::default(),
            grid: Grid::default(),
            output: "emoji-1".into(),
        }
    }

    fn ranking() -> RankingSpec {
        let ensemble = spec();
        RankingSpec {
            target: ensemble.target,
            sources: ensemble.sources,
            backbone: ensemble.backbone,
            objective: RankingObjective::default(),
        }
    }

    #[test]
    fn every_kind_reads_back_from_its_row_and_no_other_kind_is_known() {
        let read = |kind, spec: Value| JobSpec::read(kind, spec).unwrap();
        assert_eq!(read("ensemble", json!(spec())), JobSpec::Ensemble(spec()));
        assert_eq!(read("tuning", json!(tuning())), JobSpec::Tuning(tuning()));
        let ranked = JobSpec::Ranking(ranking());
        assert_eq!(read("ranking", json!(ranking())), ranked);
        let predicted = JobSpec::Prediction(prediction());
        assert_eq!(read("prediction", json!(prediction())), predicted);
        let error = JobSpec::read("other", json!({})).unwrap_err();
        assert!(error.to_string().contains("`other`"), "{error}");
    }

    #[test]
    fn a_tuning_is_the_same_whatever_its_output_is_called() {
        let renamed = TuningSpec {
            output: "other".into(),
            ..tuning()
        };
        assert_eq!(renamed.digest(), tuning().digest());
        let begun = TuningSpec {
            start: Some(spec().sources[0].clone()),
            ..tuning()
        };
        let longer = TuningSpec {
            options: TuningOptions {
                epochs: 11,
                ..TuningOptions::default()
            },
            ..tuning()
        };
        let chosen = TuningSpec {
            grid: Grid {
                weight_decays: vec![0.1, 0.2],
                ..Grid::default()
            },
            ..tuning()
        };
        for other in [begun, longer, chosen] {
            assert_ne!(other.digest(), tuning().digest());
        }
        let mut fewer = ranking();
        fewer.sources.pop();
        assert_ne!(fewer.digest(), ranking().digest());
    }
}
