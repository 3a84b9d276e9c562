//! A listing as bytes: a mark, a version, the entries with each path told by what it shares with the one before, and
//! a SHA-256 over all of it. Reading must never panic, and never take more memory than the bytes justify.

use sha2::{Digest, Sha256};

use super::{Listing, Seen, What};
use crate::change::{BlobId, Raw, Special, TreePath};

const MARK: &[u8; 15] = b"hotcell-listing";
const VERSION: u8 = 1;
const DIGEST_BYTES: usize = 32;
/// Longest path or target in bytes; longer ones are no Linux paths.
const TEXT_BYTES_MAX: u64 = 4096;
/// Fewest bytes that an entry takes.
const ENTRY_BYTES_MIN: usize = 8;

/// Why bytes are no listing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoredError {
    /// Another mark or version.
    #[error("it is no listing of this version")]
    Version,
    /// The checksum does not fit.
    #[error("its checksum does not fit: the disk lies, or it was cut off")]
    Checksum,
    /// The checksum fits, but what it covers cannot be.
    #[error("its {0} cannot be")]
    Form(&'static str),
}

impl Listing {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + self.len() * 48);
        out.extend_from_slice(MARK);
        out.push(VERSION);
        number(&mut out, self.entries.len() as u64);
        let mut last: &[u8] = &[];
        for (path, seen) in &self.entries {
            text_after(&mut out, last, path.as_bytes());
            last = path.as_bytes();
            entry(&mut out, seen);
        }
        for list in [&self.unreadable, &self.mounts] {
            number(&mut out, list.len() as u64);
            list.iter().for_each(|path| text_after(&mut out, &[], path.as_bytes()));
        }
        let digest: [u8; DIGEST_BYTES] = Sha256::digest(&out).into();
        out.extend_from_slice(&digest);
        // Only the first one is kept; both are the same.
        let _ = self.digest.set(digest);
        out
    }

    /// SHA-256 over all that is in it, in hex.
    pub fn hash(&self) -> String {
        if self.digest.get().is_none() {
            self.encode();
        }
        BlobId::of_digest(self.digest.get().copied().unwrap_or_default()).as_str().to_owned()
    }

    /// Reads what [`Listing::encode`] wrote.
    ///
    /// # Errors
    /// [`StoredError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StoredError> {
        let rest = bytes.strip_prefix(MARK).ok_or(StoredError::Version)?;
        let (version, _) = rest.split_first().ok_or(StoredError::Version)?;
        if *version != VERSION {
            return Err(StoredError::Version);
        }
        let (all, digest) = bytes.split_last_chunk::<DIGEST_BYTES>().ok_or(StoredError::Checksum)?;
        if <[u8; DIGEST_BYTES]>::from(Sha256::digest(all)) != *digest {
            return Err(StoredError::Checksum);
        }
        let body = all.get(MARK.len() + 1..).ok_or(StoredError::Checksum)?;
        let listing = decode_body(body)?;
        let _ = listing.digest.set(*digest);
        Ok(listing)
    }
}

/// What stands between version and checksum.
fn decode_body(body: &[u8]) -> Result<Listing, StoredError> {
    let mut from = From(body);
    let count = from.count()?;
    let mut listing = Listing { entries: Vec::with_capacity(count), ..Listing::default() };
    let mut last = Vec::new();
    for _ in 0..count {
        from.text_after(&mut last)?;
        let path = TreePath::new(last.clone()).map_err(|_| StoredError::Form("path"))?;
        if listing.entries.last().is_some_and(|(before, _)| *before >= path) {
            return Err(StoredError::Form("order"));
        }
        listing.entries.push((path, from.entry()?));
    }
    for list in [&mut listing.unreadable, &mut listing.mounts] {
        for _ in 0..from.number()? {
            let mut text = Vec::new();
            from.text_after(&mut text)?;
            list.push(TreePath::new(text).map_err(|_| StoredError::Form("path"))?);
        }
    }
    if from.0.is_empty() { Ok(listing) } else { Err(StoredError::Form("end")) }
}

/// Seven bits a byte, the lowest first.
fn number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Near zero is short, whatever its sign.
fn signed(out: &mut Vec<u8>, value: i64) {
    number(out, ((value << 1) ^ (value >> 63)) as u64);
}

fn text_after(out: &mut Vec<u8>, last: &[u8], text: &[u8]) {
    let shared = last.iter().zip(text).take_while(|(one, other)| one == other).count();
    number(out, shared as u64);
    number(out, (text.len() - shared) as u64);
    out.extend_from_slice(&text[shared..]);
}

fn entry(out: &mut Vec<u8>, seen: &Seen) {
    out.push(match &seen.what {
        What::File => 0,
        What::Dir => 1,
        What::Symlink { .. } => 2,
        What::Special(Special::Device) => 3,
        What::Special(Special::Fifo) => 4,
        What::Special(Special::Socket) => 5,
    });
    number(out, seen.mode.into());
    number(out, seen.bytes);
    out.extend_from_slice(&seen.mtime_ns.to_le_bytes());
    // Most files have both times alike.
    signed(out, seen.ctime_ns.wrapping_sub(seen.mtime_ns));
    number(out, seen.ino);
    if let What::Symlink { target } = &seen.what {
        text_after(out, &[], &target.0);
    }
}

struct From<'a>(&'a [u8]);

impl From<'_> {
    fn byte(&mut self) -> Result<u8, StoredError> {
        let (first, rest) = self.0.split_first().ok_or(StoredError::Form("length"))?;
        self.0 = rest;
        Ok(*first)
    }

    fn number(&mut self) -> Result<u64, StoredError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(StoredError::Form("number"))
    }

    /// How many entries follow; never more than there are bytes for.
    fn count(&mut self) -> Result<usize, StoredError> {
        let count = usize::try_from(self.number()?).map_err(|_| StoredError::Form("count"))?;
        if count > self.0.len() / ENTRY_BYTES_MIN { Err(StoredError::Form("count")) } else { Ok(count) }
    }

    fn text_after(&mut self, last: &mut Vec<u8>) -> Result<(), StoredError> {
        let (shared, more) = (self.number()?, self.number()?);
        let fits = shared <= last.len() as u64 && more <= TEXT_BYTES_MAX && more <= self.0.len() as u64;
        if !fits {
            return Err(StoredError::Form("text"));
        }
        last.truncate(shared as usize);
        let (text, rest) = self.0.split_at(more as usize);
        last.extend_from_slice(text);
        self.0 = rest;
        Ok(())
    }

    fn entry(&mut self) -> Result<Seen, StoredError> {
        let kind = self.byte()?;
        let mode = u32::try_from(self.number()?).ok().filter(|mode| *mode <= 0o7777);
        let mode = mode.ok_or(StoredError::Form("mode"))?;
        let bytes = self.number()?;
        let (time, rest) = self.0.split_first_chunk::<8>().ok_or(StoredError::Form("time"))?;
        self.0 = rest;
        let mtime_ns = i64::from_le_bytes(*time);
        let folded = self.number()?;
        let ctime_ns = mtime_ns.wrapping_add((folded >> 1) as i64 ^ -((folded & 1) as i64));
        let ino = self.number()?;
        let what = match kind {
            0 => What::File,
            1 => What::Dir,
            2 => {
                let mut target = Vec::new();
                self.text_after(&mut target)?;
                What::Symlink { target: Raw(target) }
            }
            3 => What::Special(Special::Device),
            4 => What::Special(Special::Fifo),
            5 => What::Special(Special::Socket),
            _ => return Err(StoredError::Form("kind")),
        };
        Ok(Seen { what, mode, bytes, mtime_ns, ctime_ns, ino })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_what() -> impl Strategy<Value = What> {
        prop_oneof![
            Just(What::File),
            Just(What::Dir),
            prop::collection::vec(any::<u8>(), 0..20)
                .prop_map(|target| What::Symlink { target: Raw(target) }),
            Just(What::Special(Special::Device)),
            Just(What::Special(Special::Fifo)),
            Just(What::Special(Special::Socket)),
        ]
    }

    fn any_listing() -> impl Strategy<Value = Listing> {
        let seen = (any_what(), 0u32..0o10000, any::<u64>(), any::<i64>(), any::<i64>(), any::<u64>());
        let seen = seen.prop_map(|(what, mode, bytes, mtime_ns, ctime_ns, ino)| Seen {
            what,
            mode,
            bytes,
            mtime_ns,
            ctime_ns,
            ino,
        });
        let path =
            prop::collection::vec(any::<u8>(), 1..12).prop_filter_map("a path", |b| TreePath::new(b).ok());
        (prop::collection::btree_map(path.clone(), seen, 0..20), prop::collection::vec(path, 0..3)).prop_map(
            |(entries, unreadable)| Listing {
                entries: entries.into_iter().collect(),
                mounts: unreadable.clone(),
                unreadable,
                digest: Default::default(),
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(listing in any_listing()) {
            let bytes = listing.encode();
            let read = Listing::decode(&bytes).expect("decoded");
            prop_assert_eq!(&read.entries, &listing.entries);
            prop_assert_eq!((&read.unreadable, &read.mounts), (&listing.unreadable, &listing.mounts));
            prop_assert_eq!(read.hash(), listing.hash());
            prop_assert_eq!(read.encode(), bytes);
        }

        #[test]
        fn garbage_is_an_error_and_no_panic(garbage in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Listing::decode(&garbage).is_err());
            // As if the checksum had been made by whoever wrote the garbage.
            let _ = decode_body(&garbage);
        }

        #[test]
        fn a_flipped_bit_or_a_cut_is_seen(listing in any_listing(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = listing.encode();
            let at = at.index(bytes.len());
            prop_assert!(Listing::decode(&bytes[..at]).is_err());
            let body = MARK.len() + 1..bytes.len() - DIGEST_BYTES;
            bytes[at] ^= 1 << bit;
            prop_assert!(Listing::decode(&bytes).is_err());
            let _ = decode_body(&bytes[body]);
        }
    }
}
