//! promptweave: a registry for visual prompts, with workers that learn which of them help a new task, and how much each
//! one helps.
//!
//! ```text
//! HTTP request ─► http/ ─► registry/ or jobs/ ─► Postgres ◄─ jobs/ ◄─ worker/ ─► engine/ ─► α + composed prompt ─► registry/
//!                                    (the offline commands enter at engine/ directly: no HTTP, no Postgres)
//! ```

#![cfg_attr(
    test,
    allow(clippy::disallowed_methods, reason = "tests make ids of their own")
)]

pub mod blobs;
pub mod cli;
pub mod client;
pub mod config;
pub mod db;
pub mod failpoints;
pub mod gc;
pub mod healthcheck;
pub mod http;
pub mod jobs;
pub mod keys;
#[cfg(feature = "torch")]
pub mod offline;
pub mod plot;
pub mod private_postgres;
pub mod registry;
pub mod remote;
pub mod roles;
pub mod shutdown;
pub mod supervisor;
pub mod telemetry;
pub mod up;
pub mod webhooks;
pub mod worker;
