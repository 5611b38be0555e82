//! Everything that reads strangers' bytes: archives, datasets, checkpoints, adapters, images.
//!
//! ```text
//! error ◄─ files ◄─ archive        image
//!            ▲         ▲             ▲
//!         dataset   backbone ◄─ checkpoint ─► tensor_file
//!            ▲
//!         parquet                  peft
//! ```

pub mod archive;
pub mod backbone;
pub mod checkpoint;
pub mod dataset;
pub mod error;
pub mod files;
pub mod image;
pub mod parquet;
pub mod peft;
pub mod tensor_file;
