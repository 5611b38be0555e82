//! The sizes of a column's pages, read before any page is. The library reserves the memory that a
//! page declares, and a small file may declare much.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// The largest size that one page may unpack to, in bytes.
pub const MAX_PAGE: u64 = 256 << 20;
/// The most bytes of a page's header that are read. Minima and maxima of its values are in it.
const MAX_HEADER: usize = 1 << 20;
const FIRST_LOOK: usize = 4 << 10;
/// The deepest nesting of structures in a header.
const MAX_DEPTH: usize = 8;

#[derive(Debug, PartialEq, Eq)]
pub struct PageSizes {
    pub pages: usize,
    /// The largest unpacked size in bytes.
    pub largest: u64,
}

/// Walks over the headers of the pages in `start..start + length`, at most `most` of them. `None`
/// if a header cannot be read.
pub fn sizes(file: &File, start: u64, length: u64, most: usize) -> io::Result<Option<PageSizes>> {
    let end = start.saturating_add(length);
    let mut at = start;
    let mut sizes = PageSizes {
        pages: 0,
        largest: 0,
    };
    while at < end && sizes.pages < most {
        let Some(header) = header(file, at, end)? else {
            return Ok(None);
        };
        sizes.pages += 1;
        sizes.largest = sizes.largest.max(header.unpacked);
        at = at
            .saturating_add(header.length)
            .saturating_add(header.packed);
    }
    Ok((at == end || sizes.pages == most).then_some(sizes))
}

struct Header {
    length: u64,
    packed: u64,
    unpacked: u64,
}

fn header(file: &File, at: u64, end: u64) -> io::Result<Option<Header>> {
    for look in [FIRST_LOOK, MAX_HEADER] {
        let mut bytes = vec![0; look.min((end - at) as usize)];
        file.read_exact_at(&mut bytes, at)?;
        if let Some(header) = parse(&bytes) {
            return Ok(Some(header));
        }
    }
    Ok(None)
}

/// Parses a `PageHeader` in Thrift's compact protocol. Its second field is the page's size
/// unpacked, the third its size in the file.
/// (<https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift>)
fn parse(bytes: &[u8]) -> Option<Header> {
    let mut rest = bytes;
    let mut sizes = [None; 2];
    structure(&mut rest, 0, &mut |field, value| {
        if let Some(size) = (field as usize)
            .checked_sub(2)
            .and_then(|i| sizes.get_mut(i))
        {
            *size = u64::try_from(value).ok();
        }
    })?;
    Some(Header {
        length: (bytes.len() - rest.len()) as u64,
        unpacked: sizes[0]?,
        packed: sizes[1]?,
    })
}

/// Reads over a structure. `found` gets the integers that are directly in it.
fn structure(rest: &mut &[u8], depth: usize, found: &mut dyn FnMut(i64, i64)) -> Option<()> {
    let mut field = 0;
    loop {
        let byte = take(rest, 1)?[0];
        let kind = byte & 0x0f;
        if kind == 0 {
            return Some(());
        }
        field = match byte >> 4 {
            0 => zigzag(rest)?,
            step => field + i64::from(step),
        };
        match kind {
            4..=6 => found(field, zigzag(rest)?),
            kind => skip(rest, kind, depth)?,
        }
    }
}

/// Reads over a value in a structure's field.
fn skip(rest: &mut &[u8], kind: u8, depth: usize) -> Option<()> {
    if depth == MAX_DEPTH {
        return None;
    }
    match kind {
        // True and false are kinds of their own.
        1 | 2 => {}
        3 => drop(take(rest, 1)?),
        4..=6 => drop(zigzag(rest)?),
        7 => drop(take(rest, 8)?),
        8 => {
            let length = usize::try_from(varint(rest)?).ok()?;
            take(rest, length)?;
        }
        9 | 10 => {
            let byte = take(rest, 1)?[0];
            let length = match byte >> 4 {
                15 => varint(rest)?,
                length => u64::from(length),
            };
            for _ in 0..length {
                match byte & 0x0f {
                    1 | 2 => drop(take(rest, 1)?),
                    kind => skip(rest, kind, depth + 1)?,
                }
            }
        }
        12 => structure(rest, depth + 1, &mut |_, _| {})?,
        // Maps and unknown kinds do not occur in a page's header.
        _ => return None,
    }
    Some(())
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(taken)
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = take(rest, 1)?[0];
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn zigzag(rest: &mut &[u8]) -> Option<i64> {
    let number = varint(rest)?;
    Some((number >> 1) as i64 ^ -((number & 1) as i64))
}
