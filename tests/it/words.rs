//! One public word for one thing: a renamed word must not come back in code, API, docs or results.

use std::fs;
use std::path::{Path, PathBuf};

/// A word that is gone, and the word that replaced it.
const GONE: [(&str, &str); 29] = [
    ("hgprompt_paper", "hgprompt"),
    ("resolved_from", "solved_from"),
    ("/resolve`", "/solve`"),
    ("ResolveEnsemble", "SolveEnsemble"),
    ("AlignmentReading", "AlignmentVariant"),
    ("\"reading\"", "alignment.variant"),
    ("`anchor`", "anchor_seed"),
    ("`inv`", "standard"),
    ("\"inv\"", "standard"),
    ("weight_se", "early_stopping.max_standard_error"),
    ("stop_when", "early_stopping"),
    ("uniform_share", "uniform_mix"),
    ("`gradient_norm`", "gradient_normalization"),
    ("\"gradient_norm\"", "gradient_normalization"),
    ("log_me\"", "logme"),
    ("`log_me`", "logme"),
    ("seconds_left", "eta_seconds"),
    ("skip_bad", "skip_unreadable"),
    ("--skip-bad", "--skip-unreadable"),
    ("data set", "dataset"),
    ("--reading", "--alignment-variant"),
    ("--plain", "--reference-path"),
    ("\"--shard-pairs", "--min-shard-pairs"),
    ("`--shard-pairs", "--min-shard-pairs"),
    ("--inputs-gib", "--input-cache-gib"),
    ("--backbones-gib", "--backbone-cache-gib"),
    ("--stall-s", "--stall-timeout-s"),
    ("PROMPTWEAVE_STALL_S", "PROMPTWEAVE_STALL_TIMEOUT_S"),
    ("is_passing", "is_transient"),
];

/// Folders and files of the repository that people read, and the endings of text files.
const PLACES: [&str; 14] = [
    "src",
    "crates",
    "tests",
    "benches",
    "fuzz/fuzz_targets",
    "scripts",
    "demo",
    "docker",
    "docs",
    "openapi",
    "reproduction",
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
];
const TEXT: [&str; 12] = [
    "rs",
    "py",
    "sh",
    "toml",
    "md",
    "json",
    "jsonl",
    "csv",
    "yaml",
    "mjs",
    "Dockerfile",
    "",
];

fn text_files(path: &Path, out: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            text_files(&entry.unwrap().path(), out);
        }
    } else if path.is_file() {
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        if TEXT.contains(&ending) {
            out.push(path.to_owned());
        }
    }
}

#[test]
fn no_public_word_that_was_renamed_is_left() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for place in PLACES {
        text_files(&root.join(place), &mut files);
    }
    assert!(files.len() > 300, "{} files", files.len());
    let mut left = Vec::new();
    for file in files
        .iter()
        .filter(|file| !file.ends_with("words.rs") && !file.ends_with("migrations.rs"))
    {
        let Ok(text) = fs::read_to_string(file) else {
            continue;
        };
        for (number, line) in text.lines().enumerate() {
            for (gone, now) in GONE.iter().filter(|(gone, _)| line.contains(gone)) {
                let file = file.strip_prefix(root).unwrap().display();
                left.push(format!("{file}:{}: `{gone}` is `{now}` now", number + 1));
            }
        }
    }
    assert!(left.is_empty(), "{}", left.join("\n"));
}
