//! Other formats that people upload instead of safetensors, recognised by their first bytes and
//! never parsed.
//!
//! Pickles, and the archives in which PyTorch and NumPy keep them, run code when they are loaded.
//! They are refused by name, with advice for converting them on a machine whose owner trusts them.

/// A format that is not safetensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForeignFormat {
    /// The format's name with its article, e.g. `a pickle`.
    pub name: &'static str,
    /// How to make a safetensors file of it.
    pub advice: &'static str,
}

/// The longest header that a file may have to count as safetensors here; prompts need a tenth of
/// it.
///
/// The limit also keeps the formats apart. Below 1 MiB the third byte is less than 0x10, and no
/// pickle has such a byte after its `\x80` and the protocol, whatever header length the first two
/// bytes spell.
pub const MAX_HEADER_BYTES: u64 = (1 << 20) - 1;

const TORCH: &str = "convert it where you trust it: `safetensors.torch.save_file(\
    {\"prompt_embeddings\": torch.load(path, weights_only=True)[…]}, \"prompt.safetensors\")`";
const PICKLE: &str = "a pickle runs code when it is loaded; load it where you trust it, and write its \
    tensors with `safetensors.torch.save_file` or `safetensors.numpy.save_file`";
const NUMPY: &str = "convert it: `safetensors.numpy.save_file({\"prompt_embeddings\": numpy.load(path)}, \
    \"prompt.safetensors\")`";
const NPZ: &str = "convert it: `safetensors.numpy.save_file({\"prompt_embeddings\": numpy.load(path)[…]}, \
    \"prompt.safetensors\")`";
const HDF5: &str = "convert it: `safetensors.numpy.save_file({\"prompt_embeddings\": \
    h5py.File(path)[…][()]}, \"prompt.safetensors\")`";
const UNPACK: &str = "unpack it, and send the safetensors file that is in it";
const TAR: &str = "a PEFT adapter in a tar goes to `POST /v1/prompts/import-peft`; of anything else, \
    send the safetensors file that is in it";
const LFS: &str = "it names a file and is not that file: fetch it with `git lfs pull`";
const PAGE: &str = "the download answered with a page; look at it, and download the file again";
const EXPORT: &str = "write the tensor `prompt_embeddings` with `safetensors.torch.save_file` or \
    `safetensors.numpy.save_file`";

/// Whether the bytes start like a safetensors file: the length of a JSON object, then its brace.
pub fn starts_as_safetensors(bytes: &[u8]) -> bool {
    let length = bytes.first_chunk().map(|b| u64::from_le_bytes(*b));
    length.is_some_and(|n| n <= MAX_HEADER_BYTES) && bytes.get(8) == Some(&b'{')
}

/// Recognises a format that people upload instead of safetensors; `None` for unknown bytes.
pub fn recognise(bytes: &[u8]) -> Option<ForeignFormat> {
    if starts_as_safetensors(bytes) {
        return None;
    }
    let format = |name, advice| Some(ForeignFormat { name, advice });
    if bytes.starts_with(b"PK\x03\x04") {
        return Some(zip(bytes));
    }
    if bytes.starts_with(b"\x93NUMPY") {
        return Some(numpy(bytes));
    }
    if let Some((_, name, advice)) = MAGIC.iter().find(|(magic, ..)| bytes.starts_with(magic)) {
        return format(name, advice);
    }
    if bytes.get(257..262) == Some(b"ustar") {
        return format("a tar archive", TAR);
    }
    if bytes.get(4..8) == Some(b"TFL3") {
        return format("a TensorFlow Lite model", EXPORT);
    }
    if is_text_pickle(bytes) {
        return format("a pickle (protocol 0 or 1)", PICKLE);
    }
    let text = bytes.trim_ascii_start();
    let begins = |word: &str| {
        let start = text.get(..word.len());
        start.is_some_and(|start| start.eq_ignore_ascii_case(word.as_bytes()))
    };
    if begins("<!doctype html") || begins("<html") {
        return format("an HTML page", PAGE);
    }
    None
}

const MAGIC: &[(&[u8], &str, &str)] = &[
    // The magic number 0x1950a86a20f9469cfc6c, which PyTorch before 1.6 pickles first.
    (
        b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19",
        "a PyTorch checkpoint (pickles, as before PyTorch 1.6)",
        TORCH,
    ),
    (b"\x80\x02", "a pickle (protocol 2)", PICKLE),
    (b"\x80\x03", "a pickle (protocol 3)", PICKLE),
    (b"\x80\x04", "a pickle (protocol 4)", PICKLE),
    (b"\x80\x05", "a pickle (protocol 5)", PICKLE),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", HDF5),
    (b"PK\x05\x06", "an empty zip archive", UNPACK),
    (b"PK\x07\x08", "a split zip archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (b"\x1f\x8b", "gzip data", UNPACK),
    (b"BZh", "bzip2 data", UNPACK),
    (b"\xfd7zXZ\x00", "xz data", UNPACK),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", UNPACK),
    (b"\x04\x22\x4d\x18", "LZ4 data", UNPACK),
    (b"GGUF", "a GGUF file", EXPORT),
    (b"PAR1", "a Parquet file", EXPORT),
    (b"ARROW1", "an Arrow file", EXPORT),
    (b"version https://git-lfs", "a Git LFS pointer", LFS),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", EXPORT),
    (b"\xff\xd8\xff", "a JPEG image", EXPORT),
];

/// Tells a zip archive's format by the name of its first entry, in plain text at byte 30.
fn zip(bytes: &[u8]) -> ForeignFormat {
    let length = bytes
        .get(26..28)
        .map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
    let end = 30 + usize::from(length);
    let name = bytes.get(30..end).unwrap_or_default();
    // PyTorch aligns its entries with an extra field of its own.
    let padded = bytes.get(end..end + 2) == Some(b"FB");
    let (name, advice) = if name.ends_with(b".npy") {
        ("a zip of NumPy arrays (.npz)", NPZ)
    } else if name.ends_with(b"data.pkl") || padded {
        ("a PyTorch checkpoint (a zip of pickles)", TORCH)
    } else {
        (
            "a zip archive (PyTorch's .pt and .pth are zips of pickles)",
            UNPACK,
        )
    };
    ForeignFormat { name, advice }
}

/// Describes a .npy file by its header, a Python literal of at most a few hundred bytes.
fn numpy(bytes: &[u8]) -> ForeignFormat {
    let header = &bytes[..bytes.len().min(512)];
    let objects = ["'descr': '|O'", "'descr': 'O'"];
    let (name, advice) = if objects.iter().any(|o| contains(header, o.as_bytes())) {
        ("a NumPy array of Python objects (a pickle inside)", PICKLE)
    } else {
        ("a NumPy array", NUMPY)
    };
    ForeignFormat { name, advice }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Whether the bytes are a pickle of protocol 0 or 1, which have no magic bytes. Such a program
/// ends with a stop. It begins by opening an empty or marked container, or by importing a name:
/// `c`, then a module and a name in lines.
fn is_text_pickle(bytes: &[u8]) -> bool {
    if !bytes.trim_ascii_end().ends_with(b".") {
        return false;
    }
    // An import may come first, or be put on a list, into a dictionary, or behind a mark.
    let marked = bytes.strip_prefix(b"(").unwrap_or(bytes);
    let opens = [
        &b"dp"[..],
        b"lp",
        b"(dp",
        b"(lp",
        b"}q",
        b"]q",
        b"(}q",
        b"(]q",
    ];
    imports(marked, b"c") || imports(marked, b"i") || opens.iter().any(|o| marked.starts_with(o))
}

fn imports(bytes: &[u8], opcode: &[u8]) -> bool {
    let Some(rest) = bytes.strip_prefix(opcode) else {
        return false;
    };
    let mut lines = rest.splitn(3, |b| *b == b'\n');
    let dotted = |line: Option<&[u8]>| {
        line.is_some_and(|line| {
            let part = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_' || *b == b'.';
            (1..=256).contains(&line.len()) && line.iter().all(part)
        })
    };
    dotted(lines.next()) && dotted(lines.next()) && lines.next().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn name(bytes: &[u8]) -> &'static str {
        recognise(bytes).map_or("", |format| format.name)
    }

    #[test]
    fn a_zip_is_known_by_its_first_entry() {
        let zip = |entry: &str| {
            let mut bytes = b"PK\x03\x04".to_vec();
            bytes.resize(26, 0);
            bytes.extend((entry.len() as u16).to_le_bytes());
            bytes.extend([0, 0]);
            bytes.extend(entry.as_bytes());
            bytes
        };
        assert!(name(&zip("archive/data.pkl")).contains("PyTorch checkpoint"));
        assert!(name(&zip("prompt_embeddings.npy")).contains(".npz"));
        assert!(name(&zip("README.md")).starts_with("a zip archive"));
        assert!(name(b"PK\x03\x04").starts_with("a zip archive"));
    }

    #[test]
    fn a_safetensors_file_whose_header_length_spells_a_pickle_is_safetensors() {
        for protocol in 2..=5u8 {
            let mut bytes = u64::to_le_bytes(0x80 | u64::from(protocol) << 8).to_vec();
            bytes.extend(b"{\"a\":");
            assert_eq!(recognise(&bytes), None);
            assert!(starts_as_safetensors(&bytes));
        }
        // The same bytes, but followed by the rest of a pickle.
        assert!(name(b"\x80\x02}q\x00.").contains("protocol 2"));
        assert!(name(b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00]\x94.").contains("protocol 4"));
    }

    #[test]
    fn no_pickle_starts_as_safetensors() {
        // The third byte of every safetensors file is below 0x10, and pickle opcodes are not.
        let longest = MAX_HEADER_BYTES.to_le_bytes();
        assert!(longest[2] < 0x10 && longest[3..].iter().all(|b| *b == 0));
        let mut long = (MAX_HEADER_BYTES + 1).to_le_bytes().to_vec();
        long.push(b'{');
        assert!(!starts_as_safetensors(&long));
    }

    #[test]
    fn text_pickles_are_told_from_text() {
        for pickle in [
            &b"(dp0\nS'a'\np1\nI1\ns."[..],
            b"(lp0\nI1\naI2\na.",
            b"cposix\nsystem\n(S'id'\ntR.",
            b"cnumpy.core.multiarray\n_reconstruct\np0\n(t.",
            b"(ios\nsystem\nS'id'\n.",
            b"]q\x00(K\x01K\x02e.",
            b"}q\x00.",
        ] {
            assert!(name(pickle).contains("protocol 0 or 1"), "{pickle:?}");
        }
        for text in [
            &b"classes: a, b.\nand more\nof it."[..],
            b"(see the manual).",
            b"it is\nnot a pickle\nbut a text.",
            b"{\"a\": 1}",
            b"",
        ] {
            assert_eq!(recognise(text), None, "{text:?}");
        }
    }
}
