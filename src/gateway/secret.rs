//! Secret texts: they print as nothing and never leave but in the request that they are for. [`Secrets`] are all
//! that one request goes out with, so that an answer that repeats any of them can be told.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use memchr::memmem::Finder;

/// Shortest piece of base64 that is looked for in an answer, in bytes: shorter ones stand there by chance.
const CODED_BYTES_MIN: usize = 8;

/// A secret text; prints as nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes a text.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// All secret texts that one request goes out with, in every form in which an answer may repeat them: as they
/// are, and in base64, which is how Bedrock's event stream wraps text.
#[derive(Clone, Default)]
pub struct Secrets(Arc<[Needle]>);

/// A text and how to find it: made once for all requests of a credential.
struct Needle {
    text: Secret,
    finder: Finder<'static>,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|needle| &needle.text)).finish()
    }
}

impl Secrets {
    /// Of these texts.
    pub fn of<'a>(texts: impl IntoIterator<Item = &'a Secret>) -> Self {
        let mut all: Vec<Secret> = Vec::new();
        for secret in texts {
            let coded = in_base64(secret.bytes()).filter(|form| form.len() >= CODED_BYTES_MIN);
            all.extend(std::iter::once(secret.expose().to_owned()).chain(coded).map(Secret));
        }
        all.retain(|secret| !secret.0.is_empty());
        // The longest first: what holds another one is blotted out whole.
        all.sort_by_key(|secret| std::cmp::Reverse(secret.0.len()));
        let needle = |text: Secret| Needle { finder: Finder::new(text.bytes()).into_owned(), text };
        Self(all.into_iter().map(needle).collect())
    }

    /// Whether `bytes` contain any of them.
    pub fn are_in(&self, bytes: &[u8]) -> bool {
        self.0.iter().any(|needle| needle.finder.find(bytes).is_some())
    }

    /// Their bytes.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|needle| needle.text.bytes())
    }
}

/// What of a text's base64 does not depend on its neighbours, for each of the three places it may begin at.
fn in_base64(text: &[u8]) -> impl Iterator<Item = String> {
    (0..3usize).map(move |before| {
        let padded = [&b"\0\0"[..before], text].concat();
        let coded = base64::engine::general_purpose::STANDARD_NO_PAD.encode(&padded);
        let (from, to) = ((before * 8).div_ceil(6), padded.len() * 8 / 6);
        coded.get(from..to).unwrap_or_default().to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_found_in_base64_wherever_it_begins() {
        let secret = Secret::new("sk-canary-0123456789".into());
        let secrets = Secrets::of([&secret]);
        for before in 0..7 {
            for after in 0..4 {
                let text = format!("{}{}{}", "x".repeat(before), secret.expose(), "y".repeat(after));
                let coded = base64::engine::general_purpose::STANDARD.encode(text);
                assert!(secrets.are_in(coded.as_bytes()), "{before} {after}");
            }
        }
        assert!(!secrets.are_in(b"something else") && !format!("{secret:?}{secrets:?}").contains("canary"));
    }
}
