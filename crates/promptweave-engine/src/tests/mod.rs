//! The method's oracles: properties that every version of it must keep. Oracles of a single part
//! are beside that part.

mod cache;
mod composition;
mod cuda;
mod inference;
mod methods;
mod sharding;
mod solver;
mod tune;
