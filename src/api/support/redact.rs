//! Takes secrets out of what goes out to people. Looked for are: the daemon's own credentials, exactly, also in base64,
//! in hex, escaped as JSON and URLs are, broken over lines, and as pieces at the ends of a text; what looks like a
//! token or private key ([`every_secret`]); the values of headers that carry credentials; who stands before the `@` of
//! an address. Pure. It must rather take out too much than too little, and never repeat what it found.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use memchr::memmem::Finder;

use super::views::{View, views};
use crate::change::classify::every_secret;
use crate::gateway::secret::{Secret, Secrets};
use crate::git::config::userinfo;

/// Shortest credential that is looked for in all its forms, and shortest piece of one, in bytes.
pub(super) const SECRET_BYTES_MIN: usize = 8;
/// Shortest one that is looked for at all.
const ANY_BYTES_MIN: usize = 4;
/// How often a text is looked through: what is taken out may bring together what was apart.
const ROUNDS_MAX: usize = 4;
/// Shortest word after `Bearer` or `Basic` that is taken for a credential, in bytes.
const SCHEME_BYTES_MIN: usize = 16;
/// Shortest line within a private key whose beginning stood in a text before, in bytes.
const KEY_LINE_BYTES_MIN: usize = 24;

/// Headers whose values are credentials.
const HEADERS: [&str; 12] = [
    "authorization",
    "proxy-authorization",
    "cookie",
    "set-cookie",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "x-amz-security-token",
    "x-auth-token",
    "private-token",
    "x-gitlab-token",
    "x-vault-token",
];

/// What stands outside of strings in JSON: signs, numbers, and the letters of its three words.
const BARE: &[u8] = b" \t\r\n{}[]:,+-.0123456789Eaeflnrstu";

/// The kind of the daemon's own credentials.
const CREDENTIAL: &str = "credential of the daemon";
const HEADER: &str = "header";
const ADDRESS: &str = "user in an address";
const KEY_LINE: &str = "line of a private key";

/// What was taken out: how many, by kind.
pub(super) type Counts = BTreeMap<String, u64>;

/// See the module.
pub(super) struct Redactor {
    forms: Vec<Form>,
}

/// A form of a credential.
struct Form {
    finder: Finder<'static>,
    /// As it is, not coded: what may stand in pieces.
    plain: bool,
}

type Found = (&'static str, Range<usize>);

impl Redactor {
    /// One that knows these credentials. Those of less than four bytes are not looked for: they stand everywhere.
    pub(super) fn new(credentials: &[Secret]) -> Self {
        let mut forms: BTreeMap<Vec<u8>, bool> = BTreeMap::new();
        for secret in credentials {
            let plain = secret.bytes();
            if plain.len() < SECRET_BYTES_MIN {
                if plain.len() >= ANY_BYTES_MIN {
                    forms.insert(plain.to_owned(), true);
                }
                continue;
            }
            let hex = |upper: bool| -> String {
                plain.iter().map(|b| if upper { format!("{b:02X}") } else { format!("{b:02x}") }).collect()
            };
            for coded in [hex(false), hex(true)] {
                forms.entry(coded.into_bytes()).or_default();
            }
            for form in Secrets::of([secret]).iter() {
                let for_urls = form.iter().map(|byte| match byte {
                    b'+' => b'-',
                    b'/' => b'_',
                    other => *other,
                });
                forms.entry(for_urls.collect()).or_default();
                forms.entry(form.to_owned()).or_default();
            }
            forms.insert(plain.to_owned(), true);
        }
        let form = |(text, plain): (Vec<u8>, bool)| Form { finder: Finder::new(&text).into_owned(), plain };
        Self { forms: forms.into_iter().map(form).collect() }
    }

    /// A text without its secrets.
    pub(super) fn text<'a>(&self, text: &'a str, counts: &mut Counts) -> Cow<'a, str> {
        let mut text = Cow::Borrowed(text);
        for _ in 0..ROUNDS_MAX {
            let found = merged(self.find(text.as_bytes()));
            if found.is_empty() {
                break;
            }
            text = Cow::Owned(replaced(&text, &found, counts));
        }
        text
    }

    /// JSON, one value or one a line, with what is in its strings redacted: its form stays. What is no JSON is text.
    pub(super) fn json(&self, json: &str, counts: &mut Counts) -> String {
        let mut out = String::with_capacity(json.len());
        let mut within_key = false;
        for line in json.split_inclusive('\n') {
            let mut here = Counts::new();
            let written = self.line(line, &mut within_key, &mut here);
            if self.still_in(&written) {
                // It stands across strings or in what is none: the line as a whole goes.
                *here.entry(CREDENTIAL.to_owned()).or_default() += 1;
                out.push_str("{\"redacted\":\"line\"}\n");
            } else {
                out.push_str(&written);
            }
            here.into_iter().for_each(|(kind, n)| *counts.entry(kind).or_default() += n);
        }
        out
    }

    /// Whether a text still holds a credential of the daemon in a form that is looked for.
    pub(super) fn still_in(&self, text: &str) -> bool {
        let has = |view: &View| self.forms.iter().any(|form| form.finder.find(&view.bytes).is_some());
        !self.forms.is_empty()
            && views(text.as_bytes())
                .iter()
                .any(|view| has(view) || view.squeezed().as_ref().is_some_and(has))
    }

    fn line(&self, line: &str, within_key: &mut bool, counts: &mut Counts) -> String {
        let mut out = String::with_capacity(line.len());
        let (mut rest, mut key) = (line, String::new());
        while let Some(start) = rest.find('"') {
            let Some(length) = literal(&rest[start..]) else { break };
            out.push_str(&rest[..start]);
            let written = &rest[start..start + length];
            rest = &rest[start + length..];
            let Ok(text) = serde_json::from_str::<String>(written) else {
                out.push_str(&self.text(written, counts));
                continue;
            };
            let is_key = rest.trim_start().starts_with(':');
            let clean = self.string(&text, if is_key { "" } else { &key }, within_key, counts);
            match clean {
                Cow::Borrowed(_) => out.push_str(written),
                // A string is always JSON.
                Cow::Owned(clean) => out.push_str(&serde_json::to_string(&clean).unwrap_or_default()),
            }
            if is_key {
                key = text;
            }
        }
        if rest.bytes().all(|byte| BARE.contains(&byte)) {
            // A credential in a number is seen to by whoever reads the line as a whole.
            out.push_str(rest);
        } else {
            out.push_str(&self.text(rest, counts));
        }
        out
    }

    fn string<'a>(
        &self,
        text: &'a str,
        key: &str,
        within_key: &mut bool,
        counts: &mut Counts,
    ) -> Cow<'a, str> {
        let mut whole = |kind: &str| {
            *counts.entry(kind.to_owned()).or_default() += 1;
            Cow::Owned(marker(kind))
        };
        if HEADERS.iter().any(|name| name.eq_ignore_ascii_case(key)) && !ours(text) && !text.is_empty() {
            return whole(HEADER);
        }
        let trimmed = text.trim();
        if trimmed.contains("PRIVATE KEY-----") {
            *within_key = trimmed.rfind("-----BEGIN ") > trimmed.rfind("-----END ");
        } else if *within_key && trimmed.len() >= KEY_LINE_BYTES_MIN && trimmed.bytes().all(in_base64) {
            return whole(KEY_LINE);
        }
        self.text(text, counts)
    }

    fn find(&self, text: &[u8]) -> Vec<Found> {
        let mut found = Vec::new();
        for view in views(text) {
            let mut add = |view: &View, kind, range: Range<usize>| found.push((kind, view.place(&range)));
            for view in std::iter::once(&view).chain(&view.squeezed()) {
                for form in &self.forms {
                    let length = form.finder.needle().len();
                    form.finder.find_iter(&view.bytes).for_each(|at| add(view, CREDENTIAL, at..at + length));
                }
            }
            self.pieces(&view.bytes).into_iter().for_each(|range| add(&view, CREDENTIAL, range));
            every_secret(&view.bytes).into_iter().for_each(|(kind, range)| add(&view, kind, range));
            let lower = view.bytes.to_ascii_lowercase();
            headers(&view.bytes, &lower).into_iter().for_each(|range| add(&view, HEADER, range));
            users(&view.bytes).into_iter().for_each(|range| add(&view, ADDRESS, range));
        }
        found
    }

    /// The beginning of a credential at the end of a text, and the end of one at its beginning.
    fn pieces(&self, text: &[u8]) -> Vec<Range<usize>> {
        let (from, to) = (text.len() - text.trim_ascii_start().len(), text.trim_ascii_end().len());
        let mut found = Vec::new();
        for secret in self.forms.iter().filter(|form| form.plain).map(|form| form.finder.needle()) {
            let most = secret.len().min(to.saturating_sub(from));
            let lengths = || (SECRET_BYTES_MIN..most).rev();
            found.extend(lengths().find(|n| text[..to].ends_with(&secret[..*n])).map(|n| to - n..to));
            let begins = |n: &usize| text[from..].starts_with(&secret[secret.len() - n..]);
            found.extend(lengths().find(begins).map(|n| from..from + n));
        }
        found
    }
}

/// How long the string literal is that `text` begins with, quotes included.
fn literal(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut at = 1;
    loop {
        match bytes.get(at)? {
            b'\\' => at += 2,
            b'"' => return Some(at + 1),
            _ => at += 1,
        }
    }
}

fn in_base64(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=')
}

/// What stands in the place of a secret.
fn marker(kind: &str) -> String {
    format!("[redacted: {kind}]")
}

/// Whether a text is a marker of ours.
fn ours(text: &str) -> bool {
    text.starts_with("[redacted: ") || text.starts_with("[left out: ")
}

/// Places that overlap as one, with the kind that was found first; in order.
fn merged(found: Vec<Found>) -> Vec<Found> {
    let mut found: Vec<(usize, Found)> =
        found.into_iter().filter(|(_, r)| !r.is_empty()).enumerate().collect();
    found.sort_by_key(|(n, (_, range))| (range.start, *n));
    let mut out: Vec<(usize, Found)> = Vec::new();
    for (n, (kind, range)) in found {
        match out.last_mut() {
            Some((first, (named, last))) if range.start < last.end => {
                last.end = last.end.max(range.end);
                if n < *first {
                    (*first, *named) = (n, kind);
                }
            }
            _ => out.push((n, (kind, range))),
        }
    }
    out.into_iter().map(|(_, found)| found).collect()
}

fn replaced(text: &str, found: &[Found], counts: &mut Counts) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut from = 0;
    for (kind, range) in found {
        out.extend_from_slice(&text.as_bytes()[from..range.start]);
        out.extend_from_slice(marker(kind).as_bytes());
        *counts.entry((*kind).to_owned()).or_default() += 1;
        from = range.end;
    }
    out.extend_from_slice(&text.as_bytes()[from..]);
    String::from_utf8_lossy(&out).into_owned()
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

/// Values of headers, and words after the name of a scheme.
fn headers(text: &[u8], lower: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let alone = |at: usize| at == 0 || !is_word(text[at - 1]);
    for name in HEADERS {
        for at in memchr::memmem::find_iter(lower, name).filter(|at| alone(*at)) {
            let after = at + name.len();
            let skip = |from: usize, also: &[u8]| {
                let skipped =
                    |byte: &&u8| matches!(byte, b' ' | b'\t' | b'"' | b'\'' | b'\\') || also.contains(byte);
                from + text[from..].iter().take_while(skipped).count()
            };
            let separator = skip(after, b"");
            if !matches!(text.get(separator), Some(b':' | b'=')) {
                continue;
            }
            let value = skip(separator + 1, b"");
            let until =
                text[value..].iter().take_while(|byte| !matches!(byte, b'\n' | b'\r' | b'"' | b'\'')).count();
            found.push(value..value + until);
        }
    }
    for scheme in ["bearer ", "basic ", "bearer:", "token "] {
        for at in memchr::memmem::find_iter(lower, scheme).filter(|at| alone(*at)) {
            let value = at + scheme.len();
            let word = |byte: &&u8| is_word(**byte) || matches!(byte, b'.' | b'+' | b'/' | b'=' | b'~');
            let until = text[value..].iter().take_while(word).count();
            if until >= SCHEME_BYTES_MIN {
                found.push(value..value + until);
            }
        }
    }
    found.retain(|range| !std::str::from_utf8(&text[range.clone()]).is_ok_and(ours));
    found
}

/// Who stands in addresses; not the user of ssh, who has no password there.
fn users(text: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    for at in memchr::memmem::find_iter(text, "://") {
        let after = at + 3;
        let ends =
            |byte: &&u8| !byte.is_ascii_whitespace() && !matches!(byte, b'"' | b'\'' | b'<' | b'>' | b'`');
        let length = text[after..].iter().take_while(ends).count();
        let address = String::from_utf8_lossy(&text[after..after + length]);
        let user = userinfo(&address);
        let ssh = text[..at].to_ascii_lowercase().ends_with(b"ssh") && !user.contains(':');
        if !user.is_empty() && !ssh && !ours(user) && user.len() <= length {
            found.push(after..after + user.len());
        }
    }
    found
}

#[cfg(test)]
mod tests;
