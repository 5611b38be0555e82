//! Connections that this service opens to others: the one way out.
//!
//! ```text
//! URL ─► host:port opened by the operator? ─► connect
//!          └─ no ─► every address of the name, looked up once ─► those that are public ─► connect
//! ```
//! What a client names must not reach what only this machine reaches: metadata services, databases,
//! the neighbours. The address that is checked is the one that is connected to.

pub mod client;
pub mod hub;
pub mod network;
pub mod s3;
pub mod sources;
pub mod uri;
