//! The one integration binary: a module per area.

mod fixtures;
mod private_postgres;
mod queue;
