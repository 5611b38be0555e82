//! The last pass over the API's document: it adds what the library leaves out, and rewrites what tools refuse.
//!
//! It runs once, when the routes are built, after every other layer has added its answers. `tests/it/openapi.rs` checks
//! the result against the schema of OpenAPI 3.1, and `make fuzz-api` generates a client from it.

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
