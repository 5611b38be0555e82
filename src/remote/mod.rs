//! The connections that this service opens to others; all of them are made here.
//!
//! ```text
//! URL ─► host:port opened by the operator? ─► connect
//!          └─ no ─► every address of the name, looked up once ─► those that are public ─► connect
//! ```
//! A URL from a client must not reach what only this machine can reach: metadata services, databases, neighbours. The
//! address that is checked is also the one that is connected to.

pub mod client;
pub mod hub;
pub mod network;
pub mod s3;
pub mod sources;
pub mod uri;
