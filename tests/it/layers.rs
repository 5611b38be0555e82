//! Data runs one way: the engine and the domain know nothing of the layers above them.

use std::fs;
use std::path::{Path, PathBuf};

/// Every Rust file under a directory.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| match path.is_dir() {
            true => sources(&path),
            false => vec![path],
        })
        .collect()
}

fn assert_free_of(layer: &str, words: &[&str]) {
    let files = sources(
        &Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("src")
            .join(layer),
    );
    assert!(!files.is_empty());
    for file in files {
        for (number, line) in fs::read_to_string(&file).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            for word in words {
                assert!(
                    !code.contains(word),
                    "{}:{}: src/{layer} must not use `{word}`",
                    file.display(),
                    number + 1
                );
            }
        }
    }
}

const ABOVE: [&str; 9] = [
    "sqlx",
    "axum",
    "tokio",
    "crate::http",
    "crate::jobs",
    "crate::registry",
    "crate::worker",
    "crate::db",
    "crate::telemetry",
];

#[test]
fn the_engine_knows_the_domain_alone() {
    assert_free_of("engine", &ABOVE);
}

#[test]
fn the_domain_knows_no_layer_and_no_tensors() {
    assert_free_of("domain", &ABOVE);
    assert_free_of("domain", &["tch::", "crate::engine"]);
}
