//! A repository's index, read and written without git: what of it lies outside of one directory is marked as not
//! checked out (`skip-worktree`), so that git does not take it for deleted where only that directory is shown. The
//! index is the user's own, but it is read like a stranger's: bounded, and what is odd is refused by its name. Pure.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

use super::head::Format;

/// Longest index that is read, in bytes.
pub const INDEX_BYTES_MAX: u64 = 128 << 20;
/// Times, device, inode, mode, owner and size, before the name of the content.
const STAT_BYTES: usize = 40;
const EXTENDED: u16 = 0x4000;
const STAGE: u16 = 0x3000;
const SKIP_WORKTREE: u16 = 0x4000;
const SHORT: &str = "its index is cut short";
/// Parts that stay right whatever is marked: trees that are known, conflicts that were resolved, and that directories
/// may stand for what is in them. Others hold offsets, or what was seen on the host's file system.
const KEPT: [&[u8]; 3] = [b"TREE", b"REUC", b"sdir"];

/// A file as the index has it, with what it was when git last saw the two to be the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracked {
    /// The name of its content.
    pub id: String,
    /// Kind and executable bit.
    pub mode: u32,
    /// Length, modulo 2³².
    pub bytes: u32,
    /// Last change of the content, in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Last change at all, in nanoseconds since 1970.
    pub ctime_ns: i64,
    /// Inode, modulo 2³².
    pub ino: u32,
}

/// What `index` has of files that are not in conflict, by their whole paths.
///
/// # Errors
/// Why it is not read, in words.
pub fn tracked(index: &[u8], format: Format) -> Result<HashMap<Vec<u8>, Tracked>, &'static str> {
    let mut entries = Entries::new(index, format)?;
    let mut all = HashMap::new();
    while let Some(entry) = entries.next()? {
        if entry.flags & STAGE != 0 {
            continue;
        }
        let at = |offset: usize| word(entries.body, entry.at + offset).ok_or(SHORT);
        let time = |offset: usize| {
            Ok::<_, &'static str>(i64::from(at(offset)?) * 1_000_000_000 + i64::from(at(offset + 4)?))
        };
        let id = entries.body.get(entry.at + STAT_BYTES..entry.at + entries.fixed).ok_or(SHORT)?;
        let file = Tracked {
            id: id.iter().map(|byte| format!("{byte:02x}")).collect(),
            ctime_ns: time(0)?,
            mtime_ns: time(8)?,
            ino: at(20)?,
            mode: at(24)?,
            bytes: at(36)?,
        };
        all.insert(entries.name.clone(), file);
    }
    Ok(all)
}

/// `index` with everything marked that is not below `dir` (`a/b`), in a form that every git reads.
///
/// # Errors
/// Why it is not read, in words.
pub fn only_below(index: &[u8], dir: &[u8], format: Format) -> Result<Vec<u8>, &'static str> {
    let mut entries = Entries::new(index, format)?;
    let (body, version, fixed) = (entries.body, entries.version, entries.fixed);
    let mut out = Vec::with_capacity(index.len() + index.len() / 8);
    out.extend_from_slice(b"DIRC");
    // The second version has no place for marks.
    out.extend_from_slice(&version.max(3).to_be_bytes());
    out.extend_from_slice(body.get(8..12).ok_or(SHORT)?);
    while let Some(Entry { at, flags, more, begin, stop }) = entries.next()? {
        let inside = entries.name.strip_prefix(dir).is_some_and(|below| below.first() == Some(&b'/'));
        // What is in conflict has no place of its own yet.
        let marked = if inside || flags & STAGE != 0 { more } else { more | SKIP_WORKTREE };
        let from = out.len();
        out.extend_from_slice(body.get(at..at + fixed).ok_or(SHORT)?);
        let flags = if marked == 0 { flags & !EXTENDED } else { flags | EXTENDED };
        out.extend_from_slice(&flags.to_be_bytes());
        if marked != 0 {
            out.extend_from_slice(&marked.to_be_bytes());
        }
        out.extend_from_slice(body.get(begin..stop).ok_or(SHORT)?);
        out.resize(out.len() + fill(version, out.len() - from), 0);
    }
    extensions(body.get(entries.at..).ok_or(SHORT)?, &mut out)?;
    let hash = match format {
        Format::Sha1 => ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, &out).as_ref().to_vec(),
        Format::Sha256 => Sha256::digest(&out).to_vec(),
    };
    out.extend_from_slice(&hash);
    Ok(out)
}

/// The entries, one after the other, and the name of the last one.
struct Entries<'a> {
    body: &'a [u8],
    version: u32,
    /// Bytes before an entry's flags.
    fixed: usize,
    left: u32,
    /// Where the next one begins.
    at: usize,
    name: Vec<u8>,
}

/// Where it begins, its two flags, and where what is stored of its name begins and ends.
struct Entry {
    at: usize,
    flags: u16,
    more: u16,
    begin: usize,
    stop: usize,
}

impl<'a> Entries<'a> {
    fn new(index: &'a [u8], format: Format) -> Result<Self, &'static str> {
        let hash_bytes = match format {
            Format::Sha1 => 20,
            Format::Sha256 => 32,
        };
        let body = index.len().checked_sub(hash_bytes).and_then(|end| index.get(..end)).ok_or(SHORT)?;
        let (version, left) = (word(body, 4).ok_or(SHORT)?, word(body, 8).ok_or(SHORT)?);
        if body.get(..4) != Some(b"DIRC") || !(2..=4).contains(&version) {
            return Err("its index has a form that is not known here");
        }
        Ok(Self { body, version, fixed: STAT_BYTES + hash_bytes, left, at: 12, name: Vec::new() })
    }

    fn next(&mut self) -> Result<Option<Entry>, &'static str> {
        let Some(left) = self.left.checked_sub(1) else { return Ok(None) };
        self.left = left;
        let (body, at) = (self.body, self.at);
        let flags = half(body, at + self.fixed).ok_or(SHORT)?;
        let mut rest = at + self.fixed + 2;
        let mut more = 0;
        if flags & EXTENDED != 0 {
            more = half(body, rest).ok_or(SHORT)?;
            rest += 2;
        }
        let begin = rest;
        if self.version == 4 {
            let cut = strip_length(body, &mut rest).ok_or(SHORT)?;
            let length = self.name.len().checked_sub(cut).ok_or("its index names paths that cannot be")?;
            self.name.truncate(length);
        } else {
            self.name.clear();
        }
        let tail = body.get(rest..).ok_or(SHORT)?;
        let length = memchr::memchr(0, tail).ok_or(SHORT)?;
        self.name.extend_from_slice(&tail[..length]);
        let stop = rest + length;
        self.at = stop + fill(self.version, stop - at);
        Ok(Some(Entry { at, flags, more, begin, stop }))
    }
}

/// NULs behind an entry: at least one; the older forms fill up to a multiple of eight.
fn fill(version: u32, length: usize) -> usize {
    if version == 4 { 1 } else { 8 - length % 8 }
}

fn extensions(mut rest: &[u8], out: &mut Vec<u8>) -> Result<(), &'static str> {
    while !rest.is_empty() {
        let length = word(rest, 4).ok_or(SHORT)? as usize;
        let whole = rest.get(..8 + length).ok_or(SHORT)?;
        let name = &whole[..4];
        if KEPT.contains(&name) {
            out.extend_from_slice(whole);
        } else if name == b"link" {
            return Err("its index is split (`git update-index --no-split-index` puts it together)");
        } else if !name[0].is_ascii_uppercase() {
            return Err("its index has a part that is not known here");
        }
        rest = &rest[8 + length..];
    }
    Ok(())
}

/// What is to be checked out, as `info/sparse-checkout` has it: `dir` and nothing else.
pub fn pattern_of(dir: &str) -> String {
    let mut line = String::from("/");
    for c in dir.chars() {
        if matches!(c, '\\' | '*' | '?' | '[' | ']' | ' ') {
            line.push('\\');
        }
        line.push(c);
    }
    line + "/\n"
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_be_bytes)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_be_bytes)
}

/// Git's variable-length number at `at`, which is moved behind it: each further byte also adds one.
pub fn strip_length(index: &[u8], at: &mut usize) -> Option<usize> {
    let mut value = 0usize;
    for _ in 0..5 {
        let byte = *index.get(*at)?;
        *at += 1;
        value = (value << 7) | usize::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            return Some(value);
        }
        value += 1;
    }
    None
}

#[cfg(test)]
#[path = "index/tests.rs"]
mod tests;
