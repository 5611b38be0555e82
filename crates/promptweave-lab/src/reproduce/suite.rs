//! The tasks of a suite.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use promptweave_domain::digest::Digest;
use promptweave_domain::split::Split;
use promptweave_formats::dataset::LabelledImages;

/// The fewest tasks: leave-one-out needs two sources to weigh.
const FEWEST: usize = 3;

pub struct Suite {
    /// The tasks, sorted by name.
    pub tasks: Vec<Task>,
    /// The tasks that prompts are composed for.
    pub targets: Vec<String>,
    /// Digest of the tasks' names, classes and lists. It tells whether a suite is the same without
    /// reading all images.
    pub digest: Digest,
}

pub struct Task {
    pub name: String,
    pub dir: PathBuf,
    digest: Digest,
}

impl Suite {
    /// Opens the tasks: the folders in `dir` with these names that hold labelled images with a
    /// training and a test part. `targets` must be among them.
    pub fn open(
        dir: &Path,
        tasks: Option<&[String]>,
        targets: Option<&[String]>,
    ) -> anyhow::Result<Self> {
        let entries =
            fs::read_dir(dir).with_context(|| format!("cannot read `{}`", dir.display()))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.path().is_dir()
                && let Ok(name) = entry.file_name().into_string()
                && !name.starts_with('.')
            {
                names.push(name);
            }
        }
        names.sort();
        let names = chosen(&names, tasks, dir)?;
        let targets = chosen(&names, targets, dir)?;
        let tasks = names
            .into_iter()
            .map(|name| Task::open(dir.join(&name), name));
        let tasks = tasks.collect::<anyhow::Result<Vec<_>>>()?;
        if tasks.len() < FEWEST {
            bail!(
                "`{}` has {} tasks; leave-one-out needs at least {FEWEST}: a target, and two sources to weigh",
                dir.display(),
                tasks.len()
            );
        }
        let lists: Vec<_> = tasks.iter().map(|task| (&task.name, task.digest)).collect();
        let digest = Digest::of(&serde_json::to_vec(&lists)?);
        Ok(Self {
            tasks,
            targets,
            digest,
        })
    }

    pub fn task(&self, name: &str) -> &Task {
        let found = self.tasks.iter().find(|task| task.name == name);
        found.expect("cells are of the suite's tasks")
    }

    /// Names of all tasks but the target.
    pub fn others(&self, target: &str) -> Vec<String> {
        let others = self.tasks.iter().filter(|task| task.name != target);
        others.map(|task| task.name.clone()).collect()
    }
}

/// The tasks in `only`, or all tasks.
fn chosen(tasks: &[String], only: Option<&[String]>, dir: &Path) -> anyhow::Result<Vec<String>> {
    let unknown = |name: &&String| !tasks.contains(name);
    if let Some(unknown) = only.into_iter().flatten().find(unknown) {
        bail!(
            "`{}` has no task `{unknown}`; it has {}",
            dir.display(),
            tasks.join(", ")
        );
    }
    let chosen = tasks
        .iter()
        .filter(|task| only.is_none_or(|only| only.contains(task)));
    Ok(chosen.cloned().collect())
}

impl Task {
    fn open(dir: PathBuf, name: String) -> anyhow::Result<Self> {
        let dataset = LabelledImages::read(&dir)
            .with_context(|| format!("`{}` is no task", dir.display()))?;
        if dataset.splits.get(&Split::Test).is_none_or(Vec::is_empty) {
            bail!(
                "`{}` has no test images: put them into test.txt, or into test/",
                dir.display()
            );
        }
        let listed = |split: &Split| {
            let images = dataset.splits.get(split).into_iter().flatten();
            images
                .map(|image| (image.path.clone(), image.label))
                .collect::<Vec<_>>()
        };
        let lists = (
            &dataset.classes,
            Split::ALL.iter().map(listed).collect::<Vec<_>>(),
        );
        let digest = Digest::of(&serde_json::to_vec(&lists)?);
        Ok(Self { name, dir, digest })
    }
}
