//! What is measured of sources on the target: transferability, gradient alignment, and how well heads do.

pub mod alignment;
pub mod assignment;
pub mod evaluate;
pub mod gradients;
pub mod h_score;
pub mod head;
pub mod transferability;
