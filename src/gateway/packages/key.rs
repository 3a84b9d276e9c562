//! What names an entry of the package cache: the policy, the credential, the URL, and the two headers of a request
//! that are passed on because answers differ by them. Pure. It must hold all that an answer can depend on, or jobs
//! could give each other answers that they would not have got.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Longest `Accept` and longest URL of an entry, in bytes; requests with longer ones are not kept.
const TEXT_BYTES_MAX: usize = 8 << 10;

/// A SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub(super) [u8; 32]);

impl Hash {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Reads what `Display` writes.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let plain = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() != 64 || !text.bytes().all(plain) {
            return None;
        }
        let mut hash = [0; 32];
        for (at, byte) in hash.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        Some(Self(hash))
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The credential that a request goes out with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Used {
    /// Its name.
    pub name: String,
    /// The user for whom it was read, where each user has another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Name of the job's policy.
    pub policy: String,
    /// The credential that is added, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<Used>,
    /// Scheme, host, port, path and query, in their one spelling.
    pub url: String,
    /// The request's `Accept`; empty where it has none.
    pub accept: String,
    /// Whether the answer may be compressed.
    pub gzip: bool,
}

impl Key {
    /// Whether it is short enough to be kept.
    pub fn is_bounded(&self) -> bool {
        self.accept.len() <= TEXT_BYTES_MAX && self.url.len() <= TEXT_BYTES_MAX
    }

    /// The name of its entry.
    pub(super) fn hash(&self) -> Hash {
        // JSON is one text for one key, and another one for every other.
        Hash::of(&serde_json::to_vec(self).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> Key {
        let (policy, url) = ("p".to_owned(), "https://a.example/x".to_owned());
        Key { policy, credential: None, url, accept: "*/*".into(), gzip: true }
    }

    #[test]
    fn each_part_makes_another_entry() {
        let used = |name: &str, uid| Some(Used { name: name.into(), uid });
        let others = [
            key(),
            Key { policy: "q".into(), ..key() },
            Key { credential: used("a", None), ..key() },
            Key { credential: used("b", None), ..key() },
            Key { credential: used("a", Some(0)), ..key() },
            Key { credential: used("a", Some(1)), ..key() },
            Key { url: "http://a.example/x".into(), ..key() },
            Key { url: "https://a.example/x?".into(), ..key() },
            Key { accept: String::new(), ..key() },
            Key { gzip: false, ..key() },
        ];
        let mut hashes: Vec<Hash> = others.iter().map(Key::hash).collect();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), others.len());
    }

    proptest! {
        #[test]
        fn parts_do_not_run_into_each_other(a in ".{0,12}", b in ".{0,12}", c in ".{0,12}", d in ".{0,12}") {
            let one = Key { policy: a.clone(), accept: b.clone(), ..key() };
            let other = Key { policy: c.clone(), accept: d.clone(), ..key() };
            prop_assert_eq!(one.hash() == other.hash(), (a, b) == (c, d));
        }

        #[test]
        fn a_hash_is_read_as_it_is_written(bytes in any::<[u8; 32]>()) {
            let text = Hash(bytes).to_string();
            prop_assert_eq!(Hash::parse(&text), Some(Hash(bytes)));
            prop_assert_eq!(Hash::parse(&text[1..]), None);
            prop_assert_eq!(Hash::parse(&text.replace(['a', 'b'], "A")).is_none(), text.contains(['a', 'b']));
        }
    }
}
