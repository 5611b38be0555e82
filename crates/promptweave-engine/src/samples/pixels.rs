//! The pixels of decoded images on disk. Each image is decoded once, while others compute.
//!
//! ```text
//! image files ─► decoder threads, one a core, one image each at a time ─► unlinked temporary file ─► any rows, by position
//! ```
//!
//! Memory grows only with the images' paths. A reader of rows that are not decoded yet waits for
//! them. Images are decoded in the order of the list, which is also the order in which they are
//! first used.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle, available_parallelism};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};

use crate::error::EngineError;

/// Decodes an image file into its pixels, always the same number of bytes; `None` if it cannot be
/// read.
pub type Decode = dyn Fn(&Path) -> Option<Vec<u8>> + Send + Sync;

/// The pixels of listed image files, decoded in the background. Dropping it stops the decoding.
pub struct PixelFile {
    shared: Arc<Shared>,
    decoders: Vec<JoinHandle<()>>,
}

/// The state that decoders and readers share.
struct Shared {
    paths: Vec<PathBuf>,
    /// Size of an image's pixels, in bytes.
    image_bytes: usize,
    decode: Box<Decode>,
    /// Whether unreadable images are left out instead of being an error.
    skip_unreadable: bool,
    /// The pixels: the image at position i of `paths` lies at i · `image_bytes`.
    file: File,
    state: Mutex<State>,
    /// Signals that `state` changed.
    changed: Condvar,
}

struct State {
    /// The next image that no decoder has taken.
    next: usize,
    /// Whether each image was handled, successfully or not.
    done: Vec<bool>,
    num_done: usize,
    unreadable: BTreeSet<usize>,
    failed: Option<Arc<io::Error>>,
    stopped: bool,
}

impl PixelFile {
    /// Starts to decode `paths`, at least one, and returns at once.
    pub fn start(
        paths: Vec<PathBuf>,
        image_bytes: usize,
        skip_unreadable: bool,
        decode: Box<Decode>,
    ) -> Result<Self, EngineError> {
        let needed = (paths.len() as u64).saturating_mul(image_bytes as u64);
        let file = reserve(needed).map_err(|source| no_room(needed, Arc::new(source)))?;
        Self::start_in(file, paths, image_bytes, skip_unreadable, decode)
    }

    fn start_in(
        file: File,
        paths: Vec<PathBuf>,
        image_bytes: usize,
        skip_unreadable: bool,
        decode: Box<Decode>,
    ) -> Result<Self, EngineError> {
        let num_images = paths.len();
        let shared = Shared {
            paths,
            image_bytes,
            decode,
            skip_unreadable,
            file,
            state: Mutex::new(State {
                next: 0,
                done: vec![false; num_images],
                num_done: 0,
                unreadable: BTreeSet::new(),
                failed: None,
                stopped: false,
            }),
            changed: Condvar::new(),
        };
        let mut started = Self {
            shared: Arc::new(shared),
            decoders: Vec::new(),
        };
        for _ in 0..num_decoders(num_images) {
            let shared = Arc::clone(&started.shared);
            let decoder = thread::Builder::new().name("decoder".to_owned());
            let decoder = decoder
                .spawn(move || shared.decode_all())
                .map_err(|error| EngineError::NoThread("decode images", error))?;
            started.decoders.push(decoder);
        }
        Ok(started)
    }

    /// The pixels of these images one after the other, once they are decoded.
    pub fn read(&self, images: &[usize]) -> Result<Vec<u8>, EngineError> {
        drop(self.until(|state| images.iter().all(|image| state.done[*image]))?);
        let Shared {
            file, image_bytes, ..
        } = &*self.shared;
        let mut pixels = vec![0; images.len() * image_bytes];
        for (image, pixels) in images.iter().zip(pixels.chunks_exact_mut(*image_bytes)) {
            file.read_exact_at(pixels, (image * image_bytes) as u64)
                .map_err(|source| self.shared.no_room(Arc::new(source)))?;
        }
        Ok(pixels)
    }

    /// Waits until every image was handled. Returns the positions of those that can be read.
    pub fn wait(&self) -> Result<Vec<usize>, EngineError> {
        let all = self.shared.paths.len();
        let state = self.until(|state| state.num_done == all)?;
        let readable = |image: &usize| !state.unreadable.contains(image);
        Ok((0..all).filter(readable).collect())
    }

    /// Waits until the state is as wanted. If an image is found unreadable, every waiter gets that
    /// error once all unreadable images are counted, since the job cannot succeed.
    fn until(&self, wanted: impl Fn(&State) -> bool) -> Result<MutexGuard<'_, State>, EngineError> {
        let shared = &*self.shared;
        let mut state = shared.state();
        loop {
            if let Some(source) = &state.failed {
                return Err(shared.no_room(Arc::clone(source)));
            }
            let all_done = state.num_done == shared.paths.len();
            match state.unreadable.first().filter(|_| !shared.skip_unreadable) {
                Some(first) if all_done => {
                    return Err(EngineError::UnreadableImages {
                        first: shared.paths[*first].clone(),
                        count: state.unreadable.len(),
                    });
                }
                None if wanted(&state) => return Ok(state),
                _ => {}
            }
            state = shared.changed.wait(state).expect(UNPOISONED);
        }
    }

    /// Lets the decoders end after the images they have.
    fn stop(&self) {
        self.shared.state().stopped = true;
    }
}

impl Drop for PixelFile {
    fn drop(&mut self) {
        self.stop();
        for decoder in self.decoders.drain(..) {
            // A decoder has already reported its own errors.
            let _ = decoder.join();
        }
    }
}

const UNPOISONED: &str = "nobody panics with the lock held";

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(UNPOISONED)
    }

    /// A decoder's loop over images.
    fn decode_all(&self) {
        while let Some(image) = self.take() {
            // A decoder that panics counts its image as unreadable, so that nobody waits for it in
            // vain.
            let decoded = catch_unwind(AssertUnwindSafe(|| {
                let pixels = (self.decode)(&self.paths[image])?;
                assert_eq!(pixels.len(), self.image_bytes, "an image's pixels");
                Some(pixels)
            }));
            let written = decoded.ok().flatten().map(|pixels| {
                let at = (image * self.image_bytes) as u64;
                self.file.write_all_at(&pixels, at)
            });
            let mut state = self.state();
            state.done[image] = true;
            state.num_done += 1;
            match written {
                Some(Ok(())) => {}
                Some(Err(error)) => state.failed = Some(Arc::new(error)),
                None => {
                    state.unreadable.insert(image);
                }
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    fn take(&self) -> Option<usize> {
        let mut state = self.state();
        let goes_on = !state.stopped && state.failed.is_none() && state.next < self.paths.len();
        goes_on.then(|| {
            state.next += 1;
            state.next - 1
        })
    }

    fn no_room(&self, source: Arc<io::Error>) -> EngineError {
        no_room((self.paths.len() * self.image_bytes) as u64, source)
    }
}

/// Number of decoders: one for each core, but no more than images.
fn num_decoders(num_images: usize) -> usize {
    available_parallelism()
        .map_or(1, usize::from)
        .min(num_images)
}

/// An unnamed file with room for `bytes`, so that a full disk shows now and not after an hour.
fn reserve(bytes: u64) -> io::Result<File> {
    let file = tempfile::tempfile()?;
    match retry_on_intr(|| fallocate(&file, FallocateFlags::empty(), 0, bytes)) {
        // Some file systems cannot reserve room. There a full disk shows only when it is full.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(bytes)?,
        reserved => reserved?,
    }
    Ok(file)
}

fn no_room(bytes: u64, source: Arc<io::Error>) -> EngineError {
    EngineError::PixelFile {
        dir: std::env::temp_dir(),
        mib: bytes.div_ceil(1 << 20),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Paths whose names are numbers.
    fn paths(count: usize) -> Vec<PathBuf> {
        (0..count).map(|i| PathBuf::from(i.to_string())).collect()
    }

    /// The pixels of an image: four bytes that tell its name.
    fn pixels_of(path: &Path) -> Vec<u8> {
        let number: u32 = path.to_str().unwrap().parse().unwrap();
        number.to_le_bytes().to_vec()
    }

    fn started(
        count: usize,
        skip_unreadable: bool,
        decode: impl Fn(&Path) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> PixelFile {
        PixelFile::start(paths(count), 4, skip_unreadable, Box::new(decode)).unwrap()
    }

    fn odd(path: &Path) -> bool {
        pixels_of(path)[0] % 2 == 1
    }

    #[test]
    fn rows_are_read_in_any_order_and_by_several_threads() {
        let file = started(500, false, |path| Some(pixels_of(path)));
        let expect = |rows: &[usize]| {
            let numbers: Vec<u8> = rows
                .iter()
                .flat_map(|row| (*row as u32).to_le_bytes())
                .collect();
            assert_eq!(file.read(rows).unwrap(), numbers);
        };
        thread::scope(|scope| {
            scope.spawn(|| expect(&[499, 3, 3, 0]));
            scope.spawn(|| (0..500).rev().for_each(|row| expect(&[row])));
            scope.spawn(|| expect(&(0..500).collect::<Vec<_>>()));
        });
        assert_eq!(file.wait().unwrap().len(), 500);
    }

    #[test]
    fn a_row_is_waited_for_until_it_is_there() {
        let (let_go, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let file = started(1, false, move |path| {
            held.lock().unwrap().recv().unwrap();
            Some(pixels_of(path))
        });
        thread::scope(|scope| {
            let reader = scope.spawn(|| file.read(&[0]).unwrap());
            let_go.send(()).unwrap();
            assert_eq!(reader.join().unwrap(), [0; 4]);
        });
    }

    #[test]
    fn unreadable_images_are_all_counted_before_anyone_is_refused() {
        let file = started(9, false, |path| (!odd(path)).then(|| pixels_of(path)));
        let refused = file.wait().unwrap_err();
        assert!(
            matches!(refused, EngineError::UnreadableImages { first, count: 4 } if first == Path::new("1"))
        );
        assert!(file.read(&[0]).is_err());

        let file = started(9, true, |path| (!odd(path)).then(|| pixels_of(path)));
        assert_eq!(file.wait().unwrap(), [0, 2, 4, 6, 8]);
        assert_eq!(file.read(&[8]).unwrap(), pixels_of(Path::new("8")));
    }

    #[test]
    fn a_decoder_that_panics_has_met_an_unreadable_image() {
        let file = started(9, false, |path| {
            assert!(!odd(path), "a flaw of a decoder");
            Some(pixels_of(path))
        });
        assert!(matches!(
            file.wait(),
            Err(EngineError::UnreadableImages { count: 4, .. })
        ));
        // An image of the wrong size does not overwrite its neighbours.
        let file = started(2, true, |path| Some(vec![7; if odd(path) { 5 } else { 4 }]));
        assert_eq!(file.wait().unwrap(), [0]);
    }

    #[test]
    fn dropping_it_ends_the_decoders_with_the_images_they_have() {
        let (taken, takes) = mpsc::channel();
        let (let_go, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let file = started(1000, false, move |path| {
            taken.send(()).unwrap();
            // Returns when the other end is dropped.
            let _ = held.lock().unwrap().recv();
            Some(pixels_of(path))
        });
        let decoders = file.decoders.len();
        for _ in 0..decoders {
            takes.recv().unwrap();
        }
        file.stop();
        drop(let_go);
        let shared = Arc::clone(&file.shared);
        drop(file);
        assert_eq!(shared.state().num_done, decoders);
        assert_eq!(Arc::strong_count(&shared), 1);
    }

    #[test]
    fn a_full_disk_is_a_reason_to_try_again() {
        use promptweave_domain::composer::CompositionError;

        // More bytes than any file may have.
        let refused = PixelFile::start(paths(2), 1 << 62, false, Box::new(|_| None)).err();
        let CompositionError::Retry { code, detail } = refused.unwrap().into() else {
            panic!("it was refused for good");
        };
        assert_eq!(code, "pixel_file");
        assert!(
            detail.contains("TMPDIR") && detail.contains("MiB"),
            "{detail}"
        );

        // A file that cannot be written shows it only when something is written.
        let read_only = File::open("/dev/null").unwrap();
        let decode = Box::new(|path: &Path| Some(pixels_of(path)));
        let file = PixelFile::start_in(read_only, paths(9), 4, true, decode).unwrap();
        let refused = file.read(&[0]).unwrap_err();
        assert!(matches!(refused, EngineError::PixelFile { .. }));
    }
}
