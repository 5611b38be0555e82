//! Measures of the sources on the target: transferability, gradient alignment, and the results of
//! heads.

pub mod alignment;
pub mod assignment;
pub mod evaluate;
pub mod gradients;
pub mod h_score;
pub mod head;
pub mod transferability;
