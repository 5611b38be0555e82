//! Errors of the engine.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use tch::TchError;

use crate::statistics::StatisticsError;
use promptweave_domain::compatibility::Incompatible;
use promptweave_domain::composer::{CompositionError, blames_the_device};
use promptweave_domain::error_chain::chain;
use promptweave_domain::objective::InvalidObjective;
use promptweave_domain::sharding::ShardingError;
use promptweave_domain::tuning::CheckpointUnavailable;
use promptweave_domain::tuning_method::TuningMethod;
use promptweave_domain::words::JobErrorCode;
use promptweave_formats::backbone::BackboneError;
use promptweave_formats::dataset::DatasetError;

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("stopped")]
    Stopped,
    #[error("the backbone cannot be used")]
    Backbone(#[from] BackboneError),
    #[error("the dataset cannot be used")]
    Dataset(#[from] DatasetError),
    #[error(
        "{count} of the images cannot be read, the first is `{first}`; leave them out with \
         --skip-unreadable (`skip_unreadable` in a request), or repair them"
    )]
    UnreadableImages { first: PathBuf, count: usize },
    #[error(
        "decoded images ({mib} MiB) cannot be kept in `{}`; free space there, or name another \
         directory in TMPDIR", .dir.display()
    )]
    PixelFile {
        dir: PathBuf,
        mib: u64,
        source: Arc<io::Error>,
    },
    #[error("no thread can be started to {0}")]
    NoThread(&'static str, #[source] io::Error),
    #[error("the split `{0}` has no readable images")]
    NoSamples(&'static str),
    #[error("the target's samples are all of class `{0}`; at least two classes are needed")]
    OneClass(String),
    #[error("one image is too few to hold any out; give more, or choose nothing by them")]
    NoneToHoldOut,
    #[error("`{0}` makes no prompt; tune by `vpt-shallow` or `vpt-deep`")]
    MakesNoPrompt(TuningMethod),
    #[error(
        "the backbone has one block, and `vpt-deep` prompts those after the first; tune by `vpt-shallow`"
    )]
    OneBlock,
    #[error("no source prompts were given")]
    NoSources,
    #[error("source `{prompt}` is not in the statistics; they are of {known}")]
    UnknownSource { prompt: String, known: String },
    #[error("the statistics cannot be used")]
    Statistics(#[from] StatisticsError),
    #[error(transparent)]
    Incompatible(#[from] Incompatible),
    #[error(transparent)]
    Objective(#[from] InvalidObjective),
    #[error("{0} are not finite")]
    NotFinite(&'static str),
    #[error("a file of the cache cannot be read")]
    Cache(#[source] io::Error),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointUnavailable),
    #[error(transparent)]
    Sharing(#[from] ShardingError),
    #[error("libtorch failed")]
    Torch(#[from] TchError),
}

impl EngineError {
    /// The code that clients branch on.
    pub fn code(&self) -> JobErrorCode {
        match self {
            Self::Stopped => JobErrorCode::Stopped,
            Self::Backbone(_) => JobErrorCode::BackboneUnusable,
            Self::Dataset(_) => JobErrorCode::DatasetUnusable,
            Self::UnreadableImages { .. } => JobErrorCode::UnreadableImage,
            Self::PixelFile { .. } => JobErrorCode::PixelFile,
            Self::NoThread(..) => JobErrorCode::NoThread,
            Self::NoSamples(_) => JobErrorCode::EmptySplit,
            Self::OneClass(_) => JobErrorCode::OneClass,
            Self::NoneToHoldOut => JobErrorCode::TooFewImages,
            Self::MakesNoPrompt(_) => JobErrorCode::MakesNoPrompt,
            Self::OneBlock => JobErrorCode::OneBlock,
            Self::NoSources => JobErrorCode::NoSources,
            Self::UnknownSource { .. } => JobErrorCode::UnknownSource,
            Self::Statistics(_) => JobErrorCode::StatisticsUnusable,
            Self::Incompatible(refused) => refused.code,
            Self::Objective(_) => JobErrorCode::InvalidObjective,
            Self::NotFinite(_) => JobErrorCode::NotFinite,
            Self::Cache(_) => JobErrorCode::CacheUnreadable,
            Self::Checkpoint(_) => JobErrorCode::CheckpointUnavailable,
            Self::Sharing(_) => JobErrorCode::SharingFailed,
            Self::Torch(_) => JobErrorCode::Libtorch,
        }
    }
}

impl From<EngineError> for CompositionError {
    fn from(error: EngineError) -> Self {
        let (code, detail) = (error.code(), chain(&error));
        match error {
            EngineError::Stopped => Self::Stopped,
            EngineError::Checkpoint(unavailable) => unavailable.into(),
            EngineError::Torch(_) if blames_the_device(&detail) => Self::device_failed(detail),
            // Memory or disk ran out, or a device failed. The next attempt may get a better
            // machine.
            EngineError::Torch(_)
            | EngineError::Cache(_)
            | EngineError::Sharing(_)
            | EngineError::PixelFile { .. }
            | EngineError::NoThread(..) => Self::Retry { code, detail },
            _ => Self::Refused { code, detail },
        }
    }
}
