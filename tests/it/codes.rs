//! Words that programs branch on: code, database and API document must have the same ones.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use promptweave::db::MIGRATOR;
use promptweave::http::problem_codes::PROBLEM_CODES;
use promptweave_domain::compatibility;
use promptweave_domain::specification::KINDS;
use promptweave_domain::words::{
    AliasEventKind, DeliveryState, EventKind, JobErrorCode, PromptDtype, WarningCode, WorkerState,
};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::contract::DOCUMENT;
use crate::openapi::operations;

/// Words in the API's code that are not problem codes: names of fields, parameters, files and headers.
const OTHER_WORDS: &[&str] = &[
    "api_key",
    "backbone",
    "backbone_digest",
    "bearer",
    "bin",
    "bytes",
    "ckpt",
    "converted",
    "dtd",
    "f32",
    "file",
    "folder",
    "grid",
    "hf",
    "init_seed",
    "name",
    "no",
    "none",
    "npz",
    "ok",
    "options",
    "preprocessing",
    "preprocessing_id",
    "progress",
    "prompt_embeddings",
    "pt",
    "pth",
    "ratelimit",
    "ref",
    "request",
    "safetensors",
    "task",
    "true",
];

fn words(text: &str, quote: char) -> impl Iterator<Item = &str> {
    // Every second piece is between two quotes.
    let is_word = |it: &&str| {
        it.starts_with(|first: char| first.is_ascii_lowercase())
            && it
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    text.split(quote).filter(is_word)
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let files = entries.flat_map(|path| match path.is_dir() {
        true => rust_files(&path),
        false => vec![path],
    });
    files.collect()
}

/// The code that answers requests, without tests, comments and the document's parts.
fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = rust_files(&root.join("src/http"));
    files.extend(rust_files(&root.join("src/jobs/plan")));
    files.push(root.join("src/jobs/refusals.rs"));
    let apart = ["document", "links.rs", "problem_codes.rs"];
    files.retain(|path| !path.iter().any(|part| apart.iter().any(|it| part == *it)));
    let code = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]").next().unwrap();
        let mut kept = String::new();
        let mut attribute = 0_i32;
        for line in text
            .lines()
            .map(str::trim)
            .filter(|line| !line.starts_with("//"))
        {
            if attribute == 0 && !line.starts_with("#[") {
                kept.push_str(line);
                kept.push('\n');
                continue;
            }
            let count = |brackets: [char; 2]| line.matches(brackets).count() as i32;
            attribute += count(['[', '(']) - count([']', ')']);
        }
        (path, kept)
    };
    files.into_iter().map(code).collect()
}

/// A new code must be added to `PROBLEM_CODES`, and an unused one removed.
#[test]
fn the_list_of_problem_codes_is_what_the_code_has() {
    assert!(PROBLEM_CODES.is_sorted_by(|a, b| a < b));
    let mut found = BTreeSet::from(compatibility::CODES.map(|code| code.name().to_owned()));
    let mut unknown = Vec::new();
    for (path, text) in sources() {
        for word in words(&text, '"') {
            let of_jobs = text.contains(&format!("code::<S>(\"{word}\")"));
            if of_jobs {
                found.extend(KINDS.iter().map(|kind| format!("{kind}_{word}")));
            } else if PROBLEM_CODES.contains(&word) {
                found.insert(word.to_owned());
            } else if !OTHER_WORDS.contains(&word) && !KINDS.contains(&word) {
                unknown.push(format!("{word} in {}", path.display()));
            }
        }
    }
    assert!(
        unknown.is_empty(),
        "codes belong into PROBLEM_CODES, other words into OTHER_WORDS: {unknown:#?}"
    );
    let listed: BTreeSet<_> = PROBLEM_CODES
        .iter()
        .map(|code| (*code).to_owned())
        .collect();
    let unused: Vec<_> = listed.difference(&found).collect();
    assert!(unused.is_empty(), "used nowhere: {unused:?}");
    let unlisted: Vec<_> = found.difference(&listed).collect();
    assert!(unlisted.is_empty(), "not in PROBLEM_CODES: {unlisted:?}");
}

#[test]
fn what_the_document_says_of_refusals_are_codes() {
    // These are the other words between backticks.
    let others = ["config", "default", "replay", "skip_unreadable"];
    let document = &*DOCUMENT;
    for (method, path, operation) in operations(document) {
        for (status, response) in operation["responses"].as_object().unwrap() {
            let description = response["description"].as_str().unwrap();
            if !status.starts_with(['4', '5']) {
                continue;
            }
            // `POST /v1/…` is not such a word.
            for word in words(description, '`').filter(|word| !others.contains(word)) {
                assert!(
                    PROBLEM_CODES.contains(&word),
                    "{method} {path} {status}: {word}"
                );
            }
        }
    }
}

#[test]
fn the_document_lists_the_words_of_the_code() {
    let document = &*DOCUMENT;
    let listed = |name: &str| document["components"]["schemas"][name]["enum"].clone();
    assert_eq!(listed("ProblemCode"), json!(PROBLEM_CODES));
    assert_eq!(listed("EventKind"), json!(EventKind::ALL));
    assert_eq!(listed("AliasEventKind"), json!(AliasEventKind::ALL));
    assert_eq!(listed("WorkerState"), json!(WorkerState::ALL));
    assert_eq!(listed("DeliveryState"), json!(DeliveryState::ALL));
    assert_eq!(listed("PromptDtype"), json!(PromptDtype::ALL));
    assert_eq!(listed("WarningCode"), json!(WarningCode::ALL));
    assert_eq!(listed("JobErrorCode"), json!(JobErrorCode::ALL));
    for kind in EventKind::ALL {
        let schema = &document["components"]["schemas"][format!("{kind:?}Event")];
        assert_eq!(
            schema["properties"]["kind"]["enum"],
            json!([kind]),
            "{kind:?}"
        );
    }
}

/// The quoted words of a constraint, as the database has it.
async fn constraint(pool: &PgPool, name: &str) -> BTreeSet<String> {
    let text: String = sqlx::query_scalar(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = $1",
    )
    .bind(name)
    .fetch_one(pool)
    .await
    .unwrap();
    words(&text, '\'').map(str::to_owned).collect()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn the_database_has_the_words_of_the_code(pool: PgPool) {
    let of = |values: Value| -> BTreeSet<String> { serde_json::from_value(values).unwrap() };
    for (name, words) in [
        ("job_event_kind_check", json!(EventKind::ALL)),
        ("alias_event_kind_check", json!(AliasEventKind::ALL)),
        ("worker_state_check", json!(WorkerState::ALL)),
        ("webhook_delivery_state_check", json!(DeliveryState::ALL)),
        ("prompt_version_dtype_check", json!(PromptDtype::ALL)),
    ] {
        assert_eq!(constraint(&pool, name).await, of(words), "{name}");
    }
}
