//! Prompts, jobs, compositions and their rules, as plain data.
//!
//! Nothing here knows files, images, SQL, HTTP, an async runtime or libtorch. Every other crate
//! depends on this one.

#![cfg_attr(
    test,
    allow(clippy::disallowed_methods, reason = "tests make ids of their own")
)]

pub mod api_key;
pub mod backbone;
pub mod clock;
pub mod compatibility;
pub mod composer;
pub mod composition;
pub mod digest;
pub mod early_stopping;
pub mod ensemble_file;
pub mod error_chain;
pub mod foreign_format;
pub mod job;
pub mod json;
pub mod merge_patch;
pub mod method;
pub mod mixture;
pub mod objective;
pub mod phase;
pub mod precision;
pub mod prediction;
pub mod prompt_description;
pub mod prompt_file;
pub mod proportions;
pub mod ranking;
pub mod reference;
pub mod sharding;
pub mod specification;
pub mod split;
pub mod stratified;
pub mod tensor;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod training_record;
pub mod tuning;
pub mod tuning_method;
pub mod webhook;
pub mod words;
