//! What looks like a secret in a content: tokens that begin as their makers begin them, and private keys. Pure. It
//! names kinds and places, never the secret.

use std::ops::Range;

use memchr::memmem;

/// The kind of what begins with a line of dashes.
const PRIVATE_KEY: &str = "private key";

/// Characters of a token.
#[derive(Clone, Copy)]
enum Of {
    /// Capitals and digits.
    Upper,
    /// Letters and digits.
    Alnum,
    /// Letters, digits, `_` and `-`.
    Word,
    /// What base64 has, and dots: tokens of several parts.
    Dotted,
}

impl Of {
    fn has(self, byte: u8) -> bool {
        match self {
            Self::Upper => byte.is_ascii_uppercase() || byte.is_ascii_digit(),
            Self::Alnum => byte.is_ascii_alphanumeric(),
            Self::Word => byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'),
            Self::Dotted => {
                byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'+' | b'/' | b'=')
            }
        }
    }
}

/// Kind, beginning, fewest characters after it, and which.
const TOKENS: &[(&str, &str, usize, Of)] = &[
    ("AWS access key", "AKIA", 16, Of::Upper),
    ("AWS access key", "ASIA", 16, Of::Upper),
    ("GitHub token", "ghp_", 36, Of::Alnum),
    ("GitHub token", "gho_", 36, Of::Alnum),
    ("GitHub token", "ghu_", 36, Of::Alnum),
    ("GitHub token", "ghs_", 36, Of::Alnum),
    ("GitHub token", "ghr_", 36, Of::Alnum),
    ("GitHub token", "github_pat_", 22, Of::Word),
    ("GitLab token", "glpat-", 20, Of::Word),
    ("Anthropic key", "sk-ant-", 20, Of::Word),
    ("API key", "sk-", 32, Of::Word),
    ("Stripe key", "sk_live_", 20, Of::Alnum),
    ("Stripe key", "rk_live_", 20, Of::Alnum),
    ("Slack token", "xoxb-", 10, Of::Word),
    ("Slack token", "xoxa-", 10, Of::Word),
    ("Slack token", "xoxp-", 10, Of::Word),
    ("Slack token", "xoxr-", 10, Of::Word),
    ("Slack token", "xoxs-", 10, Of::Word),
    ("Slack token", "xapp-", 20, Of::Word),
    ("Google API key", "AIza", 35, Of::Word),
    ("Google token", "ya29.", 30, Of::Word),
    ("npm token", "npm_", 36, Of::Alnum),
    ("PyPI token", "pypi-AgE", 50, Of::Word),
    ("Hugging Face token", "hf_", 30, Of::Alnum),
    ("DigitalOcean token", "dop_v1_", 64, Of::Alnum),
    ("SendGrid key", "SG.", 40, Of::Dotted),
    ("age key", "AGE-SECRET-KEY-1", 50, Of::Upper),
    ("JSON Web Token", "eyJ", 40, Of::Dotted),
];

/// Different characters that a token has at least: `xxxx…` and `0000…` are examples.
const DIFFERENT_MIN: usize = 6;
/// Tokens of one beginning that are looked at.
const HITS_MAX: usize = 1000;

/// Kinds and places of what looks like a secret in `content`: enough of them to warn.
pub fn secrets(content: &[u8]) -> Vec<(&'static str, Range<usize>)> {
    find(content, HITS_MAX)
}

/// The same, each one, to take them out: of a private key what stands up to the end of its block, or of `content`.
pub fn every_secret(content: &[u8]) -> Vec<(&'static str, Range<usize>)> {
    let mut found = find(content, usize::MAX);
    for (_, place) in found.iter_mut().filter(|(kind, _)| *kind == PRIVATE_KEY) {
        let rest = &content[place.end..];
        let end = memmem::find(rest, b"-----END ").map(|end| {
            let footer = memmem::find(&rest[end..], b"PRIVATE KEY-----").map(|at| end + at + b"PRIVATE KEY-----".len());
            footer.unwrap_or(end)
        });
        place.end += end.unwrap_or(rest.len());
    }
    found
}

fn find(content: &[u8], hits_max: usize) -> Vec<(&'static str, Range<usize>)> {
    let mut found = Vec::new();
    for (kind, beginning, least, of) in TOKENS {
        for at in memmem::find_iter(content, beginning.as_bytes()).take(hits_max) {
            let tail = at + beginning.len();
            let length = content[tail..].iter().take_while(|byte| of.has(**byte)).count();
            let token = &content[tail..tail + length];
            let stands_alone = at == 0 || !Of::Word.has(content[at - 1]);
            if stands_alone && length >= *least && is_token(kind, token) {
                found.push((*kind, at..tail + length));
            }
        }
    }
    let header = b"PRIVATE KEY-----";
    for at in memmem::find_iter(content, header).take(hits_max) {
        let line = content[..at].iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
        if at - line <= 64
            && let Some(begin) = memmem::find(&content[line..at], b"-----BEGIN ")
        {
            found.push((PRIVATE_KEY, line + begin..at + header.len()));
        }
    }
    found
}

fn is_token(kind: &str, token: &[u8]) -> bool {
    let mut seen = [false; 256];
    token.iter().for_each(|byte| seen[usize::from(*byte)] = true);
    let different = seen.iter().filter(|seen| **seen).count();
    // Three parts, of which the second begins like the first: header and claims are JSON objects.
    let shape = kind != "JSON Web Token"
        || memmem::find(token, b".eyJ").is_some_and(|at| token[at + 4..].contains(&b'.'));
    different >= DIFFERENT_MIN && shape && memmem::find(token, b"EXAMPLE").is_none()
}

/// Whether `after` has a secret that `before` had not.
pub(super) fn has_news(before: &[u8], after: &[u8]) -> bool {
    let news = secrets(after);
    if news.is_empty() {
        return false;
    }
    news.into_iter().any(|(kind, at)| {
        // All headers of keys are alike: the line that follows tells them apart.
        let next = || after[at.end..].iter().skip(1).take_while(|byte| **byte != b'\n').count() + 1;
        let until = if kind == PRIVATE_KEY { (at.end + next()).min(after.len()) } else { at.end };
        memmem::find(before, &after[at.start..until]).is_none()
    })
}
