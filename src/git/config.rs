//! A repository's configuration, read as git reads it, without git: `read` gives its variables, [`masked`] the text
//! without what opens other doors (credentials, helpers, files of the host). Pure. What git would not parse is never
//! handed on.

use std::borrow::Cow;
use std::ops::Range;

/// Longest configuration that is read, in bytes.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// A configuration without its credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masked {
    /// The configuration; lines stay where they were.
    pub text: String,
    /// What was taken out, by the names of the variables (`remote.origin.url`), without values.
    pub what: Vec<String>,
}

/// One variable of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Variable {
    /// Lower case.
    pub(super) section: String,
    /// As it stands.
    pub(super) subsection: Option<String>,
    /// Lower case.
    pub(super) key: String,
    /// Without quotes and escapes; none: `key` alone, which means true.
    pub(super) value: Option<String>,
}

/// The variables of a configuration, in its order; `None` where git would not parse it.
pub(super) fn read(text: &str) -> Option<Vec<Variable>> {
    let (pieces, whole) = pieces(text);
    let variable = |piece: Piece| match piece.kind {
        Kind::Variable { variable, .. } => Some(variable),
        Kind::Header { .. } | Kind::Space | Kind::Comment => None,
    };
    whole.then(|| pieces.into_iter().filter_map(variable).collect())
}

/// `text`, the configuration of a repository, without credentials: users and passwords in addresses, headers and
/// cookies, helpers, passwords and tokens, everything included from elsewhere, and all comments. From where on git
/// would not parse it, nothing is kept.
pub fn masked(text: &str) -> Masked {
    let (pieces, whole) = pieces(text);
    let (mut out, mut what) = (String::with_capacity(text.len()), Vec::new());
    for piece in &pieces {
        let source = &text[piece.span.clone()];
        match &piece.kind {
            Kind::Space => out.push_str(source),
            Kind::Comment => {}
            Kind::Header { section, subsection } => {
                let clean = subsection.as_deref().map(without_userinfo);
                if dropped(section) {
                    what.push(section.clone());
                    // Its variables are dropped too, and what follows brings its own header.
                    blank(&mut out, source);
                } else if let (Some(name), Some(Cow::Owned(clean))) = (subsection, &clean)
                    && name != clean
                {
                    what.push(format!("{section}.{clean}"));
                    out.push_str(&format!("[{section} {}]", quoted(clean)));
                } else {
                    out.push_str(source);
                }
            }
            Kind::Variable { variable, comment } => {
                let name = name_of(variable);
                match judge(variable) {
                    Judged::Drop => {
                        what.push(name);
                        blank(&mut out, source);
                    }
                    Judged::Cleaned(value) => {
                        what.push(name);
                        out.push_str(&format!("{} = {}", variable.key, quoted(&value)));
                        blank(&mut out, source);
                    }
                    Judged::Same => match &variable.value {
                        Some(value) if *comment => {
                            out.push_str(&format!("{} = {}", variable.key, quoted(value)));
                            blank(&mut out, source);
                        }
                        None if *comment => {
                            out.push_str(&variable.key);
                            blank(&mut out, source);
                        }
                        Some(_) | None => out.push_str(source),
                    },
                }
            }
        }
    }
    if !whole {
        what.push("what git cannot parse".to_owned());
    }
    what.sort();
    what.dedup();
    Masked { text: out, what }
}

/// Keeps the lines of what is taken out.
fn blank(out: &mut String, source: &str) {
    out.extend(source.chars().filter(|c| *c == '\n'));
}

fn name_of(variable: &Variable) -> String {
    match &variable.subsection {
        Some(name) => format!("{}.{}.{}", variable.section, without_userinfo(name), variable.key),
        None => format!("{}.{}", variable.section, variable.key),
    }
}

/// What becomes of a variable.
enum Judged {
    Same,
    /// It stays, with this value.
    Cleaned(String),
    Drop,
}

/// Sections that go as a whole: helpers of credentials, and files that a cell does not have.
fn dropped(section: &str) -> bool {
    let first = section.split('.').next().unwrap_or(section);
    matches!(first, "credential" | "credentialcache" | "include" | "includeif")
}

/// Keys whose values are credentials, or name files that hold some.
const SECRET_PARTS: [&str; 14] = [
    "password",
    "passwd",
    "passphrase",
    "token",
    "secret",
    "apikey",
    "api-key",
    "privatekey",
    "private-key",
    "accesskey",
    "access-key",
    "extraheader",
    "cookie",
    "authorization",
];
const SECRET_KEYS: [&str; 9] = [
    "pass",
    "smtppass",
    "smtpuser",
    "sslkey",
    "sslcert",
    "proxysslkey",
    "proxysslcert",
    "auth",
    "credential",
];
/// What stands in values that carry a credential, in lower case.
const SECRET_VALUES: [&str; 16] = [
    "authorization:",
    "bearer ",
    "basic ",
    "sshpass",
    "ghp_",
    "gho_",
    "ghs_",
    "ghu_",
    "github_pat_",
    "glpat-",
    "xoxb-",
    "xoxp-",
    "sk-ant-",
    "password=",
    "token=",
    "-----begin",
];

fn judge(variable: &Variable) -> Judged {
    let key = variable.key.as_str();
    if dropped(&variable.section)
        || SECRET_KEYS.contains(&key)
        || SECRET_PARTS.iter().any(|part| key.contains(part))
    {
        return Judged::Drop;
    }
    let Some(value) = &variable.value else { return Judged::Same };
    let clean = without_userinfo(value);
    let lower = clean.to_ascii_lowercase();
    if SECRET_VALUES.iter().any(|part| lower.contains(part)) {
        return Judged::Drop;
    }
    match clean {
        Cow::Owned(clean) if clean != *value => Judged::Cleaned(clean),
        Cow::Owned(_) | Cow::Borrowed(_) => Judged::Same,
    }
}

/// Text without what stands before the `@` in each address of it. A user of ssh stays, its password does not.
fn without_userinfo(text: &str) -> Cow<'_, str> {
    if !text.contains("://") {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = (&rest[..at], &rest[at + 3..]);
        out.push_str(before);
        out.push_str("://");
        let scheme = before.rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '+').next().unwrap_or("");
        let end = after.find(|c: char| c.is_whitespace() || matches!(c, '\'' | '"')).unwrap_or(after.len());
        // The next address begins with its scheme: up to there nothing is looked at twice.
        let end = after[..end].find("://").map_or(end, |next| {
            let start = after[..next].rfind(|c: char| !c.is_ascii_alphanumeric() && c != '+');
            start.map_or(0, |start| start + 1)
        });
        let address = &after[..end];
        let user = userinfo(address);
        if scheme.to_ascii_lowercase().ends_with("ssh") && !user.is_empty() {
            out.push_str(user.split(':').next().unwrap_or(""));
            out.push('@');
        }
        let skip = if user.is_empty() { 0 } else { user.len() + 1 };
        out.push_str(&address[skip..]);
        rest = &after[end..];
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// What stands before the `@` of an address, without it. A slash in a password counts as one: rather a path too
/// little than a password too much.
pub fn userinfo(address: &str) -> &str {
    let host = address.find(['/', '?', '#']).unwrap_or(address.len());
    if let Some(at) = address[..host].rfind('@') {
        return &address[..at];
    }
    let odd_port = |(_, port): (&str, &str)| port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit());
    match address.rfind('@') {
        Some(at) if address[..host].split_once(':').is_some_and(odd_port) => &address[..at],
        Some(_) | None => "",
    }
}

fn quoted(value: &str) -> String {
    let mut out = String::from("\"");
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

struct Piece {
    span: Range<usize>,
    kind: Kind,
}

enum Kind {
    /// One character of white space.
    Space,
    /// Up to the end of its line, without it.
    Comment,
    Header {
        section: String,
        subsection: Option<String>,
    },
    Variable {
        variable: Variable,
        /// A comment follows its value.
        comment: bool,
    },
}

/// The parts of a configuration, and whether all of it was understood.
fn pieces(text: &str) -> (Vec<Piece>, bool) {
    let mut reader = Reader { text, at: 0 };
    let mut pieces: Vec<Piece> = Vec::new();
    let mut section: Option<(String, Option<String>)> = None;
    if text.starts_with('\u{feff}') {
        reader.at = '\u{feff}'.len_utf8();
    }
    loop {
        let start = reader.at;
        let kind = match reader.peek() {
            None => return (pieces, true),
            Some(c) if c.is_ascii_whitespace() => {
                reader.next();
                Some(Kind::Space)
            }
            Some('#' | ';') => {
                reader.skip_line();
                Some(Kind::Comment)
            }
            Some('[') => reader.header().map(|(name, sub)| {
                section = Some((name.clone(), sub.clone()));
                Kind::Header { section: name, subsection: sub }
            }),
            Some(c) if c.is_ascii_alphabetic() => section.clone().and_then(|(section, subsection)| {
                let (key, value, comment) = reader.variable()?;
                Some(Kind::Variable { variable: Variable { section, subsection, key, value }, comment })
            }),
            Some(_) => None,
        };
        match kind {
            Some(kind) => pieces.push(Piece { span: start..reader.at, kind }),
            None => return (pieces, false),
        }
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl Reader<'_> {
    /// The next character; a carriage return before a line feed is none.
    fn peek(&self) -> Option<char> {
        let rest = &self.text[self.at..];
        if rest.starts_with("\r\n") { Some('\n') } else { rest.chars().next() }
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += if self.text[self.at..].starts_with("\r\n") { 2 } else { c.len_utf8() };
        Some(c)
    }

    fn skip_line(&mut self) {
        while self.peek().is_some_and(|c| c != '\n') {
            self.next();
        }
    }

    /// `[section]`, `[section.sub]` or `[section "sub"]`.
    fn header(&mut self) -> Option<(String, Option<String>)> {
        self.next();
        let mut name = String::new();
        loop {
            match self.next()? {
                ']' if name.is_empty() => return None,
                ']' => return Some((name, None)),
                ' ' | '\t' => break,
                c if c.is_ascii_alphanumeric() || matches!(c, '-' | '.') => name.push(c.to_ascii_lowercase()),
                _ => return None,
            }
        }
        while matches!(self.peek()?, ' ' | '\t') {
            self.next();
        }
        if self.next()? != '"' {
            return None;
        }
        let mut sub = String::new();
        loop {
            match self.next()? {
                '\n' => return None,
                '"' => break,
                '\\' => match self.next()? {
                    '\n' => return None,
                    c => sub.push(c),
                },
                c => sub.push(c),
            }
        }
        (self.next()? == ']').then_some((name, Some(sub)))
    }

    /// `key`, or `key = value`, up to the end of the line, which is not part of it.
    fn variable(&mut self) -> Option<(String, Option<String>, bool)> {
        let mut key = String::new();
        while let Some(c) = self.peek().filter(|c| c.is_ascii_alphanumeric() || *c == '-') {
            key.push(c.to_ascii_lowercase());
            self.next();
        }
        while matches!(self.peek(), Some(' ' | '\t')) {
            self.next();
        }
        match self.peek() {
            None | Some('\n') => Some((key, None, false)),
            Some('=') => {
                self.next();
                let (value, comment) = self.value()?;
                Some((key, Some(value), comment))
            }
            Some(_) => None,
        }
    }

    fn value(&mut self) -> Option<(String, bool)> {
        let (mut value, mut kept, mut quote, mut comment) = (String::new(), 0, false, false);
        loop {
            match self.peek() {
                None | Some('\n') if quote => return None,
                None | Some('\n') => break,
                Some('#' | ';') if !quote => {
                    comment = true;
                    self.skip_line();
                }
                Some(c) if c.is_ascii_whitespace() && !quote => {
                    self.next();
                    if !value.is_empty() {
                        value.push(c);
                    }
                }
                Some('"') => {
                    self.next();
                    quote = !quote;
                    kept = value.len();
                }
                Some('\\') => {
                    self.next();
                    match self.next()? {
                        '\n' => continue,
                        'n' => value.push('\n'),
                        't' => value.push('\t'),
                        'b' => value.push('\u{8}'),
                        c @ ('"' | '\\') => value.push(c),
                        _ => return None,
                    }
                    kept = value.len();
                }
                Some(c) => {
                    self.next();
                    value.push(c);
                    kept = value.len();
                }
            }
        }
        value.truncate(kept);
        Some((value, comment))
    }
}

#[cfg(test)]
#[path = "config/tests.rs"]
mod tests;
