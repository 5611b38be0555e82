//! The one integration binary: a module per area.

mod access;
mod aliases;
mod api_keys;
mod app;
mod archives;
mod backbones;
mod content;
mod dataset_uploads;
mod datasets;
mod ensembles;
mod fixtures;
mod formats;
mod idempotency;
mod layers;
mod lineage;
mod links;
mod openapi;
mod private_postgres;
mod problems;
mod prompt_changes;
mod prompts;
mod queue;
mod resolve;
mod up;
mod worker;
