//! What is wrong with a policy file, in fields: for people as `file:line: key: reason`, for programs as they are.
//! Never holds more of the file than the names and values that it is about.

use std::fmt;

use super::place;

/// A policy file that cannot be used: the first thing that is wrong in it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PolicyError {
    /// The file, as whoever reads it knows it.
    pub file: String,
    /// The line, counted from 1; none where the text as a whole is meant.
    pub line: Option<usize>,
    /// The character in that line, counted from 1.
    pub column: Option<usize>,
    /// The key, with dots for nesting; none where the text cannot be read so far.
    pub key: Option<String>,
    /// What is wrong, and what is allowed.
    pub reason: String,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(key) = &self.key {
            write!(f, ": {key}")?;
        }
        write!(f, ": {}", self.reason)
    }
}

impl std::error::Error for PolicyError {}

impl PolicyError {
    /// An error about a key, with the place it has in `text`.
    pub fn at(file: &str, text: &str, key: String, reason: String) -> Self {
        let (line, column) = place::place_of(text, &key).unzip();
        Self { file: file.to_owned(), line, column, key: Some(key), reason }
    }

    /// What the parser says: TOML, an unknown key, a missing key or a wrong type.
    pub(super) fn syntax(file: &str, text: &str, error: &toml::de::Error) -> Self {
        let span = error.span();
        let (line, column) = span.as_ref().map(|span| place::line_and_column(text, span.start)).unzip();
        let span = span.unwrap_or_default();
        // What is missing stands nowhere: its name is in the words only, and the place is that of its table.
        let missing = error.message().strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`'));
        let key = match missing.map(|name| (name, place::key_of(text, &span))) {
            Some((name, table)) if table.is_empty() => name.to_owned(),
            Some((name, table)) => format!("{table}.{name}"),
            None => place::key_at(text, &span),
        };
        let reason = error.message().trim().replace('\n', "; ");
        Self { file: file.to_owned(), line, column, key: Some(key).filter(|key| !key.is_empty()), reason }
    }

    /// The same, of a file that its reader knows by another name.
    #[must_use]
    pub fn in_file(self, file: impl fmt::Display) -> Self {
        Self { file: file.to_string(), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Narrowing, Policy};
    use super::*;

    fn of(text: &str) -> PolicyError {
        Narrowing::parse("n", text).expect_err(text)
    }

    #[test]
    fn errors_have_place_key_and_reason_of_their_own() {
        for (text, place, key, reason) in [
            ("\n[limits]\n cost = 1", (3, 2), Some("limits.cost"), "unknown field `cost`"),
            ("[limits]\ncost_usd = 'x'", (2, 12), Some("limits.cost_usd"), "invalid type"),
            ("[[rule]]\ntool = 'A'", (1, 1), Some("rule[0].action"), "missing field `action`"),
            ("[[rule]]\naction = 'maybe'", (2, 10), Some("rule[0].action"), "unknown variant `maybe`"),
            ("[[rule]]\naction = 'deny'", (1, 1), Some("rule[0].reason"), "is missing"),
            ("\n[tools\n", (2, 7), None, "unclosed table"),
            ("[tools]\nallow = ['é', 'A*b']", (2, 15), Some("tools.allow[1]"), "\"A*b\""),
        ] {
            let error = of(text);
            assert_eq!((error.line.unwrap_or(0), error.column.unwrap_or(0)), place, "{error}");
            assert_eq!(error.key.as_deref(), key, "{error}");
            assert!(error.reason.starts_with(reason), "{error}");
        }
        let error = Policy::parse("p", "permission_modes = ['plan']").expect_err("most is missing");
        assert_eq!(error.key.as_deref(), Some("description"), "{error}");
    }

    #[test]
    fn in_words_each_thing_is_said_once() {
        let error = of("[limits]\nwall_s = -1");
        assert!(error.to_string().starts_with("n:2: limits.wall_s: "), "{error}");
        let moved = error.in_file("/etc/p.toml").to_string();
        assert!(moved.starts_with("/etc/p.toml:2: limits.wall_s: "), "{moved}");
    }
}
