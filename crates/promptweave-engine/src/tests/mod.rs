//! The method's oracles: properties that every version of it must keep. Those of one part alone are with
//! that part.

mod cache;
mod composition;
mod cuda;
mod methods;
mod sharding;
mod solver;
mod tune;
