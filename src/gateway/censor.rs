//! Takes the credential out of an answer's body on its way to the cell: a provider, or a proxy before it, may
//! repeat what it got in the text of an error. The length of the body stays. It must never hold back more than
//! what may be the beginning of a credential.

use bytes::{Bytes, BytesMut};
use memchr::memmem;

use super::secret::Secrets;

/// See the module.
pub(super) struct Censor {
    secrets: Secrets,
    /// The end of what came so far, if it may be the beginning of a secret.
    held: BytesMut,
}

impl Censor {
    pub(super) fn new(secrets: Secrets) -> Self {
        Self { secrets, held: BytesMut::new() }
    }

    /// What may go on to the client now.
    pub(super) fn pass(&mut self, data: Bytes) -> Bytes {
        if self.held.is_empty() && !self.secrets.are_in(&data) && self.begun(&data) == 0 {
            return data;
        }
        let mut text = std::mem::take(&mut self.held);
        text.extend_from_slice(&data);
        for secret in self.secrets.iter() {
            while let Some(at) = memmem::find(&text, secret) {
                text[at..at + secret.len()].fill(b'*');
            }
        }
        self.held = text.split_off(text.len() - self.begun(&text));
        text.freeze()
    }

    /// What was held back, once the body is over.
    pub(super) fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.held).freeze()
    }

    /// How many bytes at the end of `text` are a beginning of a secret.
    fn begun(&self, text: &[u8]) -> usize {
        self.secrets.iter().map(|secret| begun(text, secret)).max().unwrap_or(0)
    }
}

fn begun(text: &[u8], secret: &[u8]) -> usize {
    let most = text.len().min(secret.len().saturating_sub(1));
    (1..=most).rev().find(|n| text.ends_with(&secret[..*n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::secret::Secret;
    use super::*;
    use proptest::prelude::*;

    fn secrets(text: &str) -> Secrets {
        Secrets::of([&Secret::new(text.to_owned())])
    }

    fn through(pieces: &[&[u8]], secret: &str) -> Vec<u8> {
        let mut censor = Censor::new(secrets(secret));
        let mut out = Vec::new();
        for piece in pieces {
            out.extend_from_slice(&censor.pass(Bytes::copy_from_slice(piece)));
        }
        out.extend_from_slice(&censor.rest());
        out
    }

    #[test]
    fn a_secret_is_blotted_out_wherever_it_is_cut() {
        let text = b"your key sk-aab has no credit, sk-aa, sk-aab";
        for cut in 0..text.len() {
            let out = through(&[&text[..cut], &text[cut..]], "sk-aab");
            assert_eq!(out, b"your key ****** has no credit, sk-aa, ******", "{cut}");
        }
        assert_eq!(through(&[b"s", b"k", b"-", b"a", b"a", b"b", b"!"], "sk-aab"), b"******!");
    }

    #[test]
    fn what_is_no_beginning_is_not_held_back() {
        let mut censor = Censor::new(secrets("sk-aab"));
        assert_eq!(censor.pass(Bytes::from_static(b"data: x\n\n")), "data: x\n\n");
        assert_eq!(censor.pass(Bytes::from_static(b"task")), "ta");
        assert_eq!(censor.pass(Bytes::from_static(b"s\n\n")), "sks\n\n");
    }

    proptest! {
        #[test]
        fn other_text_passes_unchanged(text in "[abc]{0,60}", cuts in prop::collection::vec(0usize..60, 0..5)) {
            let secret = "abcabca";
            prop_assume!(!text.contains(secret));
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|w| &text.as_bytes()[w[0]..w[1]]).collect();
            prop_assert_eq!(through(&pieces, secret), text.as_bytes());
        }
    }
}
