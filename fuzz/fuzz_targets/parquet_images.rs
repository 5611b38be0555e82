#![no_main]
//! A dataset's Parquet file: its description, its labels and the bytes of its images.

use std::io::Write as _;

use libfuzzer_sys::fuzz_target;
use promptweave_domain::split::Split;
use promptweave_formats::parquet::{ParquetImages, Shard};

fuzz_target!(|bytes: &[u8]| {
    // The reader's own panics are caught and refused (libFuzzer's hook would end at them).
    std::panic::set_hook(Box::new(|_| {}));
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    let shard = Shard {
        split: Split::Train,
        name: "it".to_owned(),
        file,
    };
    let Ok(images) = ParquetImages::open(vec![shard]) else {
        return;
    };
    for shard in images.shards {
        assert!(shard.labels.iter().all(|label| *label < images.classes.len()));
        if let Ok(found) = shard.images() {
            let whole = found.take_while(Result::is_ok).count();
            assert!(whole <= shard.labels.len());
        }
    }
});
