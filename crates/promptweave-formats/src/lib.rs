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
//!
//! One module only writes: `prediction_table`.

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
pub mod prediction_table;
pub mod tensor_file;
