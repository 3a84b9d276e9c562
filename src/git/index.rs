//! A repository's index, read and written without git: what of it lies outside of one directory is marked as not
//! checked out (`skip-worktree`), so that git does not take it for deleted where only that directory is shown. The
//! index is the user's own, but it is read like a stranger's: bounded, and what is odd is refused by its name. Pure.

use sha2::{Digest, Sha256};

use super::head::Format;

/// Longest index that is read, in bytes.
pub const INDEX_BYTES_MAX: u64 = 128 << 20;
/// Times, device, inode, mode, owner and size, before the name of the content.
const STAT_BYTES: usize = 40;
const EXTENDED: u16 = 0x4000;
const STAGE: u16 = 0x3000;
const SKIP_WORKTREE: u16 = 0x4000;
/// Parts that stay right whatever is marked: trees that are known, conflicts that were resolved, and that directories
/// may stand for what is in them. Others hold offsets, or what was seen on the host's file system.
const KEPT: [&[u8]; 3] = [b"TREE", b"REUC", b"sdir"];

/// `index` with everything marked that is not below `dir` (`a/b`), in a form that every git reads.
///
/// # Errors
/// Why it is not read, in words.
pub fn only_below(index: &[u8], dir: &[u8], format: Format) -> Result<Vec<u8>, &'static str> {
    const SHORT: &str = "its index is cut short";
    let hash_bytes = match format {
        Format::Sha1 => 20,
        Format::Sha256 => 32,
    };
    let end = index.len().checked_sub(hash_bytes).ok_or(SHORT)?;
    let body = index.get(..end).ok_or(SHORT)?;
    let (version, count) = (word(body, 4).ok_or(SHORT)?, word(body, 8).ok_or(SHORT)? as usize);
    if body.get(..4) != Some(b"DIRC") || !(2..=4).contains(&version) {
        return Err("its index has a form that is not known here");
    }
    let fixed = STAT_BYTES + hash_bytes;
    let mut out = Vec::with_capacity(index.len() + index.len() / 8);
    out.extend_from_slice(b"DIRC");
    // The second version has no place for marks.
    out.extend_from_slice(&version.max(3).to_be_bytes());
    out.extend_from_slice(body.get(8..12).ok_or(SHORT)?);
    let (mut at, mut name) = (12, Vec::new());
    for _ in 0..count {
        let flags = half(body, at + fixed).ok_or(SHORT)?;
        let mut rest = at + fixed + 2;
        let more = if flags & EXTENDED == 0 {
            0
        } else {
            rest += 2;
            half(body, rest - 2).ok_or(SHORT)?
        };
        let begin = rest;
        if version == 4 {
            let cut = strip_length(body, &mut rest).ok_or(SHORT)?;
            name.truncate(name.len().checked_sub(cut).ok_or("its index names paths that cannot be")?);
        } else {
            name.clear();
        }
        let tail = body.get(rest..).ok_or(SHORT)?;
        let length = memchr::memchr(0, tail).ok_or(SHORT)?;
        name.extend_from_slice(&tail[..length]);
        let stop = rest + length;
        let inside = name.strip_prefix(dir).is_some_and(|below| below.first() == Some(&b'/'));
        // What is in conflict has no place of its own yet.
        let marked = if inside || flags & STAGE != 0 { more } else { more | SKIP_WORKTREE };
        out.extend_from_slice(body.get(at..at + fixed).ok_or(SHORT)?);
        let from = out.len() - fixed;
        let flags = if marked == 0 { flags & !EXTENDED } else { flags | EXTENDED };
        out.extend_from_slice(&flags.to_be_bytes());
        if marked != 0 {
            out.extend_from_slice(&marked.to_be_bytes());
        }
        out.extend_from_slice(body.get(begin..stop).ok_or(SHORT)?);
        // At least one NUL; the older forms fill up to a multiple of eight.
        let (read, wrote) = (stop - at, out.len() - from);
        let fill = |length: usize| if version == 4 { 1 } else { 8 - length % 8 };
        out.resize(out.len() + fill(wrote), 0);
        at = stop + fill(read);
    }
    extensions(body.get(at..).ok_or(SHORT)?, &mut out)?;
    let hash = match format {
        Format::Sha1 => ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, &out).as_ref().to_vec(),
        Format::Sha256 => Sha256::digest(&out).to_vec(),
    };
    out.extend_from_slice(&hash);
    Ok(out)
}

fn extensions(mut rest: &[u8], out: &mut Vec<u8>) -> Result<(), &'static str> {
    while !rest.is_empty() {
        let length = word(rest, 4).ok_or("its index is cut short")? as usize;
        let whole = rest.get(..8 + length).ok_or("its index is cut short")?;
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

/// Git's variable-length number, in which each further byte also adds one.
fn strip_length(index: &[u8], at: &mut usize) -> Option<usize> {
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
