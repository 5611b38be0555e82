//! An uploaded dataset as tar, tar.gz or zip. Every name in an archive must stay inside it. Every listed file must be
//! read or refused, and no more of it than was asked for.
#![no_main]

use std::fs::File;
use std::io::Write;

use libfuzzer_sys::fuzz_target;
use promptweave_formats::archive::Archive;
use promptweave_formats::dataset::Listing;
use promptweave_formats::files::stays_inside;
use promptweave_formats::files::Files;

/// The limit is small, so that inputs of the fuzzer's size come near it.
const MAX_UNPACKED: u64 = 1 << 20;
const MAX_FILE: u64 = 1 << 16;

fuzz_target!(|bytes: &[u8]| {
    let scratch_dir = std::env::temp_dir();
    let mut upload: File = tempfile::tempfile_in(&scratch_dir).expect("a temporary file");
    upload.write_all(bytes).expect("a temporary file");
    let Ok(archive) = Archive::open(upload, MAX_UNPACKED, &scratch_dir) else {
        return;
    };
    visit(&archive, "");
    let _ = Listing::read(&archive);
});

fn visit(archive: &Archive, folder: &str) {
    let inside = |name: &str| match folder {
        "" => name.to_owned(),
        folder => format!("{folder}/{name}"),
    };
    for name in archive.files(folder).expect("it was listed") {
        let path = inside(&name);
        assert!(stays_inside(&path), "{path:?}");
        assert!(archive.is_file(&path), "{path:?}");
        if let Ok(read) = archive.read(&path, MAX_FILE) {
            assert!(read.len() as u64 <= MAX_FILE);
        }
    }
    for name in archive.folders(folder).expect("it was listed") {
        let path = inside(&name);
        assert!(stays_inside(&path) && archive.is_folder(&path), "{path:?}");
        visit(archive, &path);
    }
}
