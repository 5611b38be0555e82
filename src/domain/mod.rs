//! Plain data and rules: what a prompt, a backbone, a dataset, a job and a composition *are*.
//!
//! Nothing here knows SQL, HTTP, an async runtime or tensors. The engine depends on this module
//! and on nothing else of the crate; so do the registry, the queue and the API.

pub mod api_key;
pub mod archive;
pub mod backbone;
pub mod cache;
pub mod composition;
pub mod dataset;
pub mod digest;
pub mod files;
pub mod foreign_format;
pub mod image;
pub mod import;
pub mod job;
pub mod json;
pub mod labels;
pub mod merge_patch;
pub mod method;
pub mod mixture;
pub mod objective;
pub mod parquet;
pub mod peft;
pub mod precision;
pub mod prompt_description;
pub mod prompt_file;
pub mod ranking;
pub mod reference;
pub mod sharding;
pub mod specification;
pub mod tensor;
pub mod tensor_file;
pub mod tuning;
pub mod tuning_method;
pub mod webdataset;
pub mod webhook;
pub mod words;
