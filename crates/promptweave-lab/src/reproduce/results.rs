//! The results file: JSON lines with a row for each cell. The first line has the settings that all
//! rows depend on.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::reproduce::Settings;
use crate::reproduce::cells::Cell;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub seed: u64,
    pub target: String,
    pub method: String,
    pub sources: Vec<String>,
    /// The weights α, in the order of `sources`.
    pub weights: Vec<f64>,
    /// Scores of each source on its own, by the name of the metric, in the order of `sources`.
    pub scores: Vec<(String, Vec<f64>)>,
    /// γ; `None` in rows from before it could be chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uniform_mix: Option<f64>,
    /// The scale β.
    pub scale: f64,
    /// Share of the test images that the closed-form head on the composed prompt's features gets right.
    pub eval_accuracy: f64,
    pub train_accuracy: f64,
    /// Cross-fitted accuracy on the training samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_accuracy: Option<f64>,
    /// Cross-fitted loss on the same samples, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// Accuracy of the same head on training images that are not among the samples, if there are
    /// any. A default may be chosen by it: no method has seen these images, and they are not test
    /// images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_accuracy: Option<f64>,
    /// Loss on the same images in nats, at the temperature that is best for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_loss: Option<f64>,
    /// Accuracy of prompt and head on the test images after the target tuning, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuned_accuracy: Option<f64>,
    /// Duration of that tuning and its test, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuning_seconds: Option<f64>,
    /// H of the composed prompt's features.
    pub h_score: f64,
    /// H of the composed prompt's features minus H of the mixed features, divided by the latter.
    pub surrogate_gap: Option<f64>,
    /// Duration of the composition in seconds, with what the cache provided.
    /// `target_tuning_seconds` is that of the target's tuning, even if another method ran it.
    pub seconds: f64,
    pub target_tuning_seconds: Option<f64>,
}

impl Row {
    /// The accuracy that the tables show.
    pub fn accuracy(&self) -> f64 {
        self.tuned_accuracy.unwrap_or(self.eval_accuracy)
    }

    /// The cell that the row belongs to.
    fn cell(&self) -> (u64, &str, &str, &[String]) {
        (self.seed, &self.target, &self.method, &self.sources)
    }
}

pub struct Results {
    path: PathBuf,
    file: File,
    rows: Vec<Row>,
}

impl Results {
    /// Opens a file to continue it, or creates it. Until it is dropped, no other process may do so.
    /// With `reads` it only reads the existing rows, even while another process computes.
    pub fn open(path: &Path, settings: &Settings, reads: bool) -> anyhow::Result<Self> {
        let settings = json!({ "settings": settings });
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(|| format!("cannot make `{}`", dir.display()))?;
        }
        let named = || format!("cannot use `{}`", path.display());
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .with_context(named)?;
        if !reads && file.try_lock().is_err() {
            bail!(
                "another process computes into `{}`; let it end, or name another --out",
                path.display()
            );
        }
        let mut bytes = fs::read(path).with_context(named)?;
        // A run that was killed while writing leaves the beginning of a row. That cell is computed
        // again.
        let whole = bytes
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        if whole < bytes.len() && !reads {
            file.set_len(whole as u64).with_context(named)?;
        }
        bytes.truncate(whole);
        let text = String::from_utf8(bytes).with_context(named)?;
        let mut lines = text.lines();
        match lines.next() {
            None if reads => {}
            None => {
                writeln!(file, "{settings}").with_context(named)?;
            }
            Some(first) => {
                let found: Value = serde_json::from_str(first).with_context(named)?;
                // The settings go through text, as the file's numbers have.
                let asked: Value = serde_json::from_str(&settings.to_string())?;
                if found != asked {
                    bail!(
                        "`{}` holds results of other settings; name another --out\n  there: {found}\n  asked: {asked}",
                        path.display()
                    );
                }
            }
        }
        let rows = lines.map(|line| serde_json::from_str(line).with_context(named));
        Ok(Self {
            path: path.to_owned(),
            file,
            rows: rows.collect::<anyhow::Result<_>>()?,
        })
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    pub fn has(&self, cell: &Cell) -> bool {
        let cell = (cell.seed, &*cell.target, cell.method, &*cell.sources);
        self.rows.iter().any(|row| row.cell() == cell)
    }

    /// Takes over the rows that are missing here.
    pub fn merge(&mut self, other: &Self) -> anyhow::Result<()> {
        for row in &other.rows {
            if !self.rows.iter().any(|own| own.cell() == row.cell()) {
                self.add(row.clone())?;
            }
        }
        Ok(())
    }

    /// Adds a row. It is on the disk when this returns.
    pub fn add(&mut self, row: Row) -> anyhow::Result<()> {
        let line = format!("{}\n", serde_json::to_string(&row)?);
        let written = self
            .file
            .write_all(line.as_bytes())
            .and_then(|()| self.file.sync_data());
        written.with_context(|| format!("cannot write `{}`", self.path.display()))?;
        self.rows.push(row);
        Ok(())
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use promptweave_domain::tuning::TuningOptions;

    pub fn settings(target_samples: usize) -> Settings {
        Settings {
            profile: "zero-shot",
            backbone: "sha256:0".into(),
            precision: "f32".into(),
            source_tuning: TuningOptions::default(),
            source_samples: 400,
            target_samples,
            target_epochs: 5,
            target_tuning: None,
            suite: "sha256:1".into(),
        }
    }

    pub fn row(seed: u64, target: &str, method: &str, sources: &[&str], eval_accuracy: f64) -> Row {
        Row {
            seed,
            target: target.into(),
            method: method.into(),
            sources: sources.iter().map(|name| (*name).to_owned()).collect(),
            weights: vec![1.0 / sources.len().max(1) as f64; sources.len()],
            scores: Vec::new(),
            uniform_mix: None,
            scale: 1.0,
            eval_accuracy,
            train_accuracy: 1.0,
            validation_accuracy: None,
            validation_loss: None,
            held_out_accuracy: None,
            held_out_loss: None,
            tuned_accuracy: None,
            tuning_seconds: None,
            h_score: 2.0,
            surrogate_gap: None,
            seconds: 0.5,
            target_tuning_seconds: None,
        }
    }

    #[test]
    fn rows_outlast_a_kill_and_only_their_own_settings_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out/results.jsonl");
        let of = |row: &Row| Cell {
            seed: row.seed,
            target: row.target.clone(),
            method: "average",
            sources: row.sources.clone(),
        };
        let first = row(1, "a", "average", &["b", "c"], 0.1 + 0.2);
        let second = row(2, "a", "average", &["b", "c"], 0.5);
        let mut results = Results::open(&path, &settings(400), false).unwrap();
        let busy = Results::open(&path, &settings(400), false)
            .err()
            .unwrap()
            .to_string();
        assert!(busy.contains("another process computes"), "{busy}");
        results.add(first.clone()).unwrap();
        results.add(second.clone()).unwrap();
        drop(results);
        // The run was killed within a row.
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() - 9]).unwrap();

        let length = || fs::metadata(&path).unwrap().len();
        let before = length();
        let read = Results::open(&path, &settings(400), true).unwrap();
        assert_eq!(
            (read.rows(), length()),
            (std::slice::from_ref(&first), before)
        );
        let mut again = Results::open(&path, &settings(400), false).unwrap();
        assert_eq!(again.rows(), std::slice::from_ref(&first));
        assert!(again.has(&of(&first)) && !again.has(&of(&second)));
        again.add(second.clone()).unwrap();
        drop(again);
        let again = Results::open(&path, &settings(400), true).unwrap();
        assert_eq!(again.rows(), [first, second]);
        let other = Results::open(&path, &settings(401), true)
            .err()
            .unwrap()
            .to_string();
        assert!(
            other.contains("other settings; name another --out"),
            "{other}"
        );
    }
}
