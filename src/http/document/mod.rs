//! The last pass over the API's document: it mends what the library leaves out or writes in a way that tools refuse.
//!
//! It runs once, when the routes are made, after every other layer has said what it answers. `tests/it/openapi.rs` holds
//! the outcome against the schema of OpenAPI 3.1, and `make fuzz-api` makes a client of it.

mod answers;
mod events;
mod examples;
mod schemas;

use utoipa::openapi::{OpenApi, Server};

/// Mends the whole document.
pub(super) fn mend(document: &mut OpenApi) {
    // Relative, since a server does not know the address by which its clients reach it.
    document.servers = Some(vec![Server::new("/")]);
    answers::describe(document);
    answers::open(document);
    answers::require_values(document);
    events::describe(document);
    examples::add(document);
    schemas::name_items(document);
    schemas::register_formats(document);
}
