//! Everything that reads strangers' bytes: archives, datasets, checkpoints, adapters, images. The
//! cache on disk that their files are unpacked to is here too.
//!
//! ```text
//! error ◄─ files ◄─ archive        image
//!            ▲         ▲             ▲
//!         dataset   backbone ◄─ checkpoint ─► tensor_file
//!            ▲
//!         parquet                  peft             directory_cache
//! ```

pub mod archive;
pub mod backbone;
pub mod checkpoint;
pub mod dataset;
pub mod directory_cache;
pub mod error;
pub mod files;
pub mod image;
pub mod parquet;
pub mod peft;
pub mod tensor_file;
