//! Backbones that stay loaded between compositions.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::error::EngineError;
use crate::vit::{Compute, Vit};
use promptweave_formats::backbone::{Backbone, BackboneError, CONFIG_FILE, MODEL_FILE};

/// Default limit of loaded backbones. A ViT-B takes 0.3 GiB, a ViT-L 1.1 GiB.
pub const DEFAULT_BYTES: u64 = 4 << 30;

pub struct Backbones {
    pub compute: Compute,
    /// The most bytes of all loaded backbones. The one in use stays loaded anyway.
    pub max_bytes: u64,
    /// The loaded backbones; the one used last is the last.
    loaded: Vec<Loaded>,
}

struct Loaded {
    stamp: Stamp,
    backbone: Backbone,
    vit: Vit,
}

/// Stamps of a folder's files, which change if the files are changed or replaced. Hashing a large
/// model takes seconds, and is done only if a stamp differs.
#[derive(Clone, PartialEq)]
struct Stamp([FileStamp; 2]);

#[derive(Clone, PartialEq)]
struct FileStamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Time of the last modification, in seconds and nanoseconds. `changed` is that of the status
    /// change, since a modification time can be set back.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(dir: &Path) -> io::Result<Self> {
        let of = |name| {
            let metadata = fs::metadata(dir.join(name))?;
            Ok::<_, io::Error>(FileStamp {
                device: metadata.dev(),
                inode: metadata.ino(),
                size: metadata.len(),
                modified: (metadata.mtime(), metadata.mtime_nsec()),
                changed: (metadata.ctime(), metadata.ctime_nsec()),
            })
        };
        Ok(Self([of(CONFIG_FILE)?, of(MODEL_FILE)?]))
    }
}

impl Loaded {
    /// Size of the weights in f32, in bytes. The streams share them.
    fn bytes(&self) -> u64 {
        4 * self.backbone.num_weights
    }
}

impl Backbones {
    pub fn new(compute: Compute) -> Self {
        Self {
            compute,
            max_bytes: DEFAULT_BYTES,
            loaded: Vec::new(),
        }
    }

    /// The backbone of a folder. It is read again only if the folder's content changed, or others
    /// took its place in memory.
    pub fn open(&mut self, dir: &Path) -> Result<(&Backbone, &Vit), EngineError> {
        // The stamp is taken before the files are read: a change meanwhile is noticed the next
        // time.
        let stamp = Stamp::of(dir).map_err(|source| BackboneError::Read {
            path: dir.to_owned(),
            source,
        })?;
        let unchanged = |loaded: &Loaded| loaded.stamp == stamp;
        let loaded = match self.loaded.iter().position(unchanged) {
            Some(at) => self.loaded.remove(at),
            None => self.load(dir, stamp)?,
        };
        self.loaded.push(loaded);
        let Loaded { backbone, vit, .. } = self.loaded.last().expect("just pushed");
        Ok((backbone, vit))
    }

    /// Takes a folder's backbone from those loaded, if the same one lay in other files, or loads
    /// it.
    fn load(&mut self, dir: &Path, stamp: Stamp) -> Result<Loaded, EngineError> {
        let backbone = Backbone::open(dir)?;
        let same = |loaded: &Loaded| {
            loaded.backbone.digest == backbone.digest && loaded.backbone.config == backbone.config
        };
        if let Some(at) = self.loaded.iter().position(same) {
            let vit = self.loaded.remove(at).vit;
            return Ok(Loaded {
                stamp,
                backbone,
                vit,
            });
        }
        // Room is made first, so that both are never in memory if only one fits.
        let bytes = 4 * backbone.num_weights;
        while !self.loaded.is_empty()
            && bytes + self.loaded.iter().map(Loaded::bytes).sum::<u64>() > self.max_bytes
        {
            self.loaded.remove(0);
        }
        let vit = Vit::load(&backbone, &self.compute)?;
        Ok(Loaded {
            stamp,
            backbone,
            vit,
        })
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::testing::write_backbone;
    use promptweave_domain::precision::Precision;

    /// Loads or finds a backbone; `true` if it was found. Loading runs with a limit of its own.
    fn found(backbones: &mut Backbones, dir: &Path) -> bool {
        backbones.open(dir).unwrap();
        let vit = &mut backbones.loaded.last_mut().unwrap().vit;
        std::mem::replace(&mut vit.compute.largest_micro_batch, 77) == 77
    }

    /// Three folders with the same weights and different configurations.
    fn folders(root: &Path) -> [std::path::PathBuf; 3] {
        [1e-6, 1e-5, 1e-4].map(|eps| {
            let dir = root.join(eps.to_string());
            let mut config = write_backbone(&dir).config;
            config.norm_eps = eps;
            fs::write(dir.join(CONFIG_FILE), serde_json::to_vec(&config).unwrap()).unwrap();
            dir
        })
    }

    #[test]
    fn what_was_used_longest_ago_makes_room_and_what_is_in_use_stays() {
        let root = tempfile::tempdir().unwrap();
        let [a, b, c] = folders(root.path());
        let mut backbones = Backbones::new(Compute::on(Device::Cpu, Precision::F32));
        assert!(!found(&mut backbones, &a));
        backbones.max_bytes = 2 * backbones.loaded[0].bytes();
        assert!(!found(&mut backbones, &b));
        assert!(found(&mut backbones, &a));
        assert!(!found(&mut backbones, &c));
        assert!(found(&mut backbones, &a));
        assert!(!found(&mut backbones, &b));
        assert_eq!(backbones.loaded.len(), 2);
        // The backbone in use stays, even if it is larger than the limit.
        backbones.max_bytes = 1;
        assert!(!found(&mut backbones, &c));
        assert!(found(&mut backbones, &c));
        assert_eq!(backbones.loaded.len(), 1);
    }

    #[test]
    fn a_folder_is_read_again_when_its_files_change_and_only_then() {
        let root = tempfile::tempdir().unwrap();
        let [a, b, _] = folders(root.path());
        let mut backbones = Backbones::new(Compute::on(Device::Cpu, Precision::F32));
        let digest = backbones.open(&a).unwrap().0.digest;
        // The answer is the remembered one.
        let remembered = promptweave_domain::digest::Digest::of(b"remembered");
        backbones.loaded[0].backbone.digest = remembered;
        assert_eq!(backbones.open(&a).unwrap().0.digest, remembered);
        backbones.loaded[0].backbone.digest = digest;

        // The same content in other files is read, and found to be loaded.
        assert!(!found(&mut backbones, &a));
        let copy = root.path().join("copy");
        fs::copy(a.join(MODEL_FILE), &copy).unwrap();
        fs::rename(&copy, a.join(MODEL_FILE)).unwrap();
        assert!(found(&mut backbones, &a));
        // Another content of the same size is another backbone, whatever its times.
        let model = a.join(MODEL_FILE);
        let modified = fs::metadata(&model).unwrap().modified().unwrap();
        let mut bytes = fs::read(&model).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&model, bytes).unwrap();
        let file = fs::File::options().write(true).open(&model).unwrap();
        file.set_modified(modified).unwrap();
        assert!(!found(&mut backbones, &a));
        assert_ne!(backbones.open(&a).unwrap().0.digest, digest);
        assert_eq!(backbones.open(&b).unwrap().0.digest, digest);
        assert!(backbones.open(root.path()).is_err());
    }
}
