//! Test data: a small spec whose prompts are in the registry, and its result.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use promptweave::jobs;
use promptweave::jobs::Job;
use promptweave::jobs::requests;
use promptweave::jobs::requests::NewJob;
use promptweave::jobs::workers;
use promptweave::jobs::workers::NewWorker;
use promptweave::registry::DEFAULT_PROJECT;
use promptweave::registry::prompt_versions;
use promptweave::registry::prompt_versions::{NewVersion, VersionFile};
use promptweave::registry::prompts;
use promptweave::worker::composer_thread::NewComposer;
use promptweave_domain::backbone::BackboneConfig;
use promptweave_domain::composer::{Composer, Composition, CompositionError, Observer, Platform};
use promptweave_domain::composition::{CompositionInput, SolveInput, TargetSamples};
use promptweave_domain::digest::Digest;
use promptweave_domain::job::{
    BackboneSpec, DEFAULT_PRIORITY, EnsembleSpec, SourceSpec, TargetSpec,
};
use promptweave_domain::objective::Objective;
use promptweave_domain::phase::Phase;
use promptweave_domain::prediction::{Predicted, PredictionInput};
use promptweave_domain::prompt_file::Origin;
use promptweave_domain::ranking::Ranking;
use promptweave_domain::sharding::{Next, Shard, ShardInput};
use promptweave_domain::split::Split;
use promptweave_domain::tuning::{Checkpoints, Curves, Tuned, TuningInput};
use promptweave_domain::words::JobErrorCode;
use sqlx::PgConnection;
use uuid::Uuid;

pub use crate::composition::{EMBED_DIM, composition, preprocessing, prompt_file};
use crate::composition::{predicted, ranking, tuned};

pub fn backbone_config() -> BackboneConfig {
    BackboneConfig {
        architecture: "vit_tiny_test".into(),
        embed_dim: EMBED_DIM,
        depth: 1,
        num_heads: 1,
        patch_size: 14,
        pos_grid: 1,
        norm_eps: 1e-6,
        preprocessing: preprocessing(),
    }
}

/// Publishes a source prompt.
pub async fn publish(db: &mut PgConnection, name: &str, value: f32) -> SourceSpec {
    let file = prompt_file(Origin::Tuned, value);
    let bytes = file.to_bytes();
    let name = name.parse().unwrap();
    let prompt = prompts::find_or_create(db, DEFAULT_PROJECT, &name, "")
        .await
        .unwrap();
    let new = NewVersion {
        prompt_id: prompt.id,
        bytes: &bytes,
        file: VersionFile::Prompt {
            file: &file,
            metadata: file.metadata.as_ref().unwrap(),
        },
        produced_by_job: None,
        parents: &[],
    };
    let (version, _) = prompt_versions::insert(db, DEFAULT_PROJECT, new)
        .await
        .unwrap();
    SourceSpec {
        id: version.id,
        prompt: name.to_string(),
        version: version.version,
        digest: version.digest,
    }
}

/// An ensemble of two published prompts; the target and the backbone exist only by name.
pub async fn spec(db: &mut PgConnection) -> EnsembleSpec {
    EnsembleSpec {
        target: TargetSpec {
            dataset: "emoji".into(),
            version: 1,
            digest: Digest::of(b"emoji"),
            samples: TargetSamples {
                split: Split::Train,
                eval_split: None,
                max_samples: 2000,
                seed: 0,
                skip_unreadable: false,
            },
        },
        sources: vec![
            publish(db, "digits", 1.0).await,
            publish(db, "flowers", 2.0).await,
        ],
        backbone: BackboneSpec {
            name: "tiny".into(),
            digest: Digest::of(b"backbone"),
            preprocessing_id: preprocessing().id(),
            model_digest: Digest::of(b"model"),
            config: backbone_config(),
        },
        objective: Objective::default(),
        output: "emoji-composed".into(),
        early_stopping: None,
        solved_from: None,
    }
}

/// A registered worker that does nothing.
pub async fn worker(db: &mut PgConnection) -> Uuid {
    let id = Uuid::now_v7();
    let new = NewWorker {
        id,
        host: "test",
        pid: 1,
        device: "fake",
        ..NewWorker::default()
    };
    workers::register(db, &new).await.unwrap();
    id
}

pub async fn enqueue(db: &mut PgConnection, spec: &EnsembleSpec) -> Uuid {
    enqueue_with_priority(db, spec, DEFAULT_PRIORITY).await
}

pub async fn enqueue_with_priority(
    db: &mut PgConnection,
    spec: &EnsembleSpec,
    priority: i32,
) -> Uuid {
    let id = Uuid::now_v7();
    let new = NewJob {
        id,
        project_id: DEFAULT_PROJECT,
        priority,
        spec,
        replay_of: None,
    };
    requests::enqueue(db, new).await.unwrap();
    id
}

pub async fn job(db: &mut PgConnection, id: Uuid) -> Job {
    jobs::find(db, DEFAULT_PROJECT, id)
        .await
        .unwrap()
        .expect("the job exists")
}

/// The sources of a spec, as [`composition`] takes them.
pub fn sources_of(spec: &EnsembleSpec) -> Vec<(String, i32, Digest)> {
    spec.sources
        .iter()
        .map(|s| (s.prompt.clone(), s.version, s.digest))
        .collect()
}

/// One of these sources, from an engine's input.
fn weighed(prompt: &str, version: Option<i32>, digest: Digest) -> (String, i32, Digest) {
    let version = version.expect("from the registry");
    (prompt.to_owned(), version, digest)
}

/// What the fake engine should do with a job.
#[derive(Clone, Copy, Debug)]
pub enum Script {
    Succeed,
    Refuse,
    Retry,
    DeviceFailed,
    Panic,
    /// Report progress until told to stop.
    UntilStopped,
    /// Report progress until stopped or until the gate opens, then succeed.
    UntilOpened,
}

/// An engine without libtorch: it plays its scripts one by one, then always succeeds.
#[derive(Clone, Default)]
pub struct FakeComposer {
    pub scripts: Arc<Mutex<VecDeque<Script>>>,
    pub gate: Arc<AtomicBool>,
    /// Number of compositions begun, and of those that were stopped.
    pub begun: Arc<AtomicUsize>,
    pub stopped: Arc<AtomicUsize>,
    /// Number of composers made.
    pub made: Arc<AtomicUsize>,
    /// Number of shards that gradients are divided into, if the work can be shared.
    pub shards: usize,
    /// The shards that were computed here.
    pub computed: Arc<Mutex<Vec<usize>>>,
    /// Set once the device no longer computes.
    pub broken: Arc<AtomicBool>,
    /// Number of self-tests asked for.
    pub tested: Arc<AtomicUsize>,
    /// Epochs that were computed here, over all tunings.
    pub epochs: Arc<Mutex<Vec<usize>>>,
}

impl FakeComposer {
    pub fn playing(scripts: impl IntoIterator<Item = Script>) -> Self {
        let scripts = Arc::new(Mutex::new(scripts.into_iter().collect()));
        Self {
            scripts,
            ..Self::default()
        }
    }

    pub fn factory(&self) -> NewComposer {
        let fake = self.clone();
        Box::new(move || {
            fake.made.fetch_add(1, Ordering::SeqCst);
            Ok(Box::new(fake.clone()))
        })
    }
}

impl FakeComposer {
    fn begin(&self) -> Script {
        self.begun.fetch_add(1, Ordering::SeqCst);
        let next = self.scripts.lock().unwrap().pop_front();
        next.unwrap_or(Script::Succeed)
    }

    fn report(
        &self,
        observer: &mut dyn Observer,
        phase: Phase,
        done: u64,
    ) -> Result<(), CompositionError> {
        if observer.progress(phase, done, u64::MAX >> 1).is_break() {
            self.stopped.fetch_add(1, Ordering::SeqCst);
            return Err(CompositionError::Stopped);
        }
        Ok(())
    }

    fn file_of(&self, shard: Shard) -> Vec<u8> {
        self.computed.lock().unwrap().push(shard.index);
        format!("shard {}", shard.index).into_bytes()
    }

    /// Computes gradients by shards, as the engine does.
    fn share(&self, script: Script, observer: &mut dyn Observer) -> Result<(), CompositionError> {
        let shards = observer.shards().expect("a job's are given");
        let phase = Phase::Gradients;
        let count = shards.lay_out(phase, self.shards).unwrap();
        let features = b"features".to_vec();
        shards.give_whole(Phase::Features, features).unwrap();
        let mut merged = 0;
        while merged < count {
            let shards = observer.shards().unwrap();
            let (next, done) = shards.next(phase).unwrap();
            match next {
                Next::Compute(shard) => {
                    self.play(script, phase, observer)?;
                    let shards = observer.shards().unwrap();
                    shards.give(shard, self.file_of(shard)).unwrap();
                }
                Next::There(file) => {
                    assert_eq!(file, format!("shard {merged}").into_bytes());
                    merged += 1;
                }
                Next::Wait => {}
            }
            self.report(observer, phase, (done * 100.0) as u64)?;
        }
        Ok(())
    }

    /// Plays the script in the one phase in which scripts differ.
    fn play(
        &self,
        script: Script,
        phase: Phase,
        observer: &mut dyn Observer,
    ) -> Result<(), CompositionError> {
        match script {
            Script::Succeed => {}
            Script::Refuse => {
                let detail = "sample 3 has NaN".to_owned();
                return Err(CompositionError::Refused {
                    code: JobErrorCode::NotFinite,
                    detail,
                });
            }
            Script::Retry => {
                let detail = "no room".to_owned();
                return Err(CompositionError::Retry {
                    code: JobErrorCode::Libtorch,
                    detail,
                });
            }
            Script::DeviceFailed => {
                let detail = "CUDA error: an illegal memory access was encountered".to_owned();
                return Err(CompositionError::device_failed(detail));
            }
            Script::Panic => panic!("a kernel failed"),
            Script::UntilStopped | Script::UntilOpened => {
                let open =
                    || matches!(script, Script::UntilOpened) && self.gate.load(Ordering::SeqCst);
                let mut done = 0;
                while !open() {
                    done += 1;
                    self.report(observer, phase, done)?;
                    // To the worker, this is a batch of work.
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
        }
        Ok(())
    }
}

impl Composer for FakeComposer {
    fn compose(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Composition, CompositionError> {
        let script = self.begin();
        // The files exist, and are what the engine reads.
        assert!(input.backbone_dir.join("config.json").is_file());
        assert!(input.target_dir.join("meta.json").is_file());
        for phase in Phase::OF_COMPOSITION {
            self.report(observer, phase, 0)?;
            if phase == Phase::Gradients {
                if self.shards > 1 {
                    self.share(script, observer)?;
                }
                self.play(script, phase, observer)?;
            }
        }
        let sources = input.sources.iter();
        let sources: Vec<_> = sources
            .map(|s| weighed(&s.prompt, s.version, s.digest))
            .collect();
        let rest = 0.75 / (sources.len() - 1) as f64;
        let weights: Vec<f64> = (0..sources.len())
            .map(|i| if i == 0 { 0.25 } else { rest })
            .collect();
        Ok(composition(&sources, &weights))
    }

    fn solve(
        &mut self,
        input: &SolveInput,
        observer: &mut dyn Observer,
    ) -> Result<Composition, CompositionError> {
        let script = self.begin();
        assert_eq!(input.statistics, b"statistics");
        self.report(observer, Phase::Solve, 0)?;
        self.play(script, Phase::Solve, observer)?;
        let sources = input.sources.iter();
        let sources: Vec<_> = sources
            .map(|s| weighed(&s.prompt, s.version, s.digest))
            .collect();
        let weights = vec![1.0 / sources.len() as f64; sources.len()];
        let mut resolved = composition(&sources, &weights);
        resolved.result.provenance.solved_from = Some(Digest::of(&input.statistics));
        resolved.result.diagnostics.composed_score = None;
        resolved.result.diagnostics.surrogate_gap = None;
        Ok(resolved)
    }

    fn shard(
        &mut self,
        input: &ShardInput,
        observer: &mut dyn Observer,
    ) -> Result<Vec<u8>, CompositionError> {
        let script = self.begin();
        assert_eq!(input.features, [b"features"]);
        self.report(observer, input.shard.phase, 0)?;
        self.play(script, input.shard.phase, observer)?;
        Ok(self.file_of(input.shard))
    }

    /// Runs two epochs, of which the second plays the script. With a checkpoint, the first is not repeated.
    fn tune(
        &mut self,
        input: &TuningInput,
        checkpoints: &mut dyn Checkpoints,
        observer: &mut dyn Observer,
    ) -> Result<Tuned, CompositionError> {
        let script = self.begin();
        assert!(input.backbone_dir.join("config.json").is_file());
        assert!(input.target_dir.join("meta.json").is_file());
        let mut curves = match checkpoints.last()? {
            Some(bytes) => serde_json::from_slice(&bytes).unwrap(),
            None => Curves::default(),
        };
        while curves.cross_entropy.len() < 2 {
            let epoch = curves.cross_entropy.len() + 1;
            self.report(observer, Phase::Tune, epoch as u64 - 1)?;
            if epoch == 2 {
                self.play(script, Phase::Tune, observer)?;
            }
            self.epochs.lock().unwrap().push(epoch);
            curves.cross_entropy.push(1.0 / epoch as f64);
            let bytes = serde_json::to_vec(&curves).unwrap();
            checkpoints.keep(&curves.last().unwrap(), &bytes);
        }
        Ok(tuned(&input.options, curves))
    }

    fn rank(
        &mut self,
        input: &CompositionInput,
        observer: &mut dyn Observer,
    ) -> Result<Ranking, CompositionError> {
        let script = self.begin();
        self.report(observer, Phase::Features, 0)?;
        self.play(script, Phase::Features, observer)?;
        let sources = input.sources.iter();
        Ok(ranking(sources.map(|it| (it.prompt.clone(), it.digest))))
    }

    fn predict(
        &mut self,
        input: &PredictionInput,
        observer: &mut dyn Observer,
    ) -> Result<Predicted, CompositionError> {
        let script = self.begin();
        self.report(observer, Phase::Features, 0)?;
        self.play(script, Phase::Features, observer)?;
        Ok(predicted(input))
    }

    fn self_test(&mut self) -> Result<(), CompositionError> {
        self.tested.fetch_add(1, Ordering::SeqCst);
        match self.broken.load(Ordering::SeqCst) {
            true => Err(CompositionError::device_failed(
                "the self-test failed: fake computes wrongly".to_owned(),
            )),
            false => Ok(()),
        }
    }

    fn platform(&self) -> Platform {
        Platform {
            device: "fake".to_owned(),
            driver: Some("580.65.06".to_owned()),
            memory_bytes: Some(80 << 30),
            libtorch: None,
            arithmetic: "fake".to_owned(),
        }
    }
}
