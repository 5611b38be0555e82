//! The one integration binary: a module per area.

mod private_postgres;
