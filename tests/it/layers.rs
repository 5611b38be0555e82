//! Dependencies run one way: a crate's manifest says what it may know, and the compiler enforces that.

use std::fs;
use std::path::Path;

/// The packages that a crate must never depend on.
const WALLS: [(&str, &[&str]); 3] = [
    (
        "promptweave-domain",
        &[
            "sqlx",
            "axum",
            "tokio",
            "tch",
            "image",
            "parquet",
            "zip",
            "tar",
            "promptweave-formats",
            "promptweave-engine",
        ],
    ),
    (
        "promptweave-formats",
        &["sqlx", "axum", "tokio", "tch", "promptweave-engine"],
    ),
    (
        "promptweave-engine",
        &["sqlx", "axum", "reqwest", "tokio", "object_store"],
    ),
];

#[test]
fn no_crate_knows_a_layer_above_it() {
    for (name, forbidden) in WALLS {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let manifest = root.join("crates").join(name).join("Cargo.toml");
        let manifest = fs::read_to_string(manifest).unwrap();
        let mut dependencies = manifest.lines().filter_map(|line| line.split_once(" = "));
        let found = dependencies.find(|(key, _)| forbidden.contains(key));
        assert_eq!(found, None, "{name}");
        assert!(manifest.contains("\nserde = "), "{name} has a manifest");
    }
}
