//! Paths below a workspace, and bytes that need not be UTF-8. A [`TreePath`] cannot be absolute, climb, or be empty.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest path, in bytes (PATH_MAX of Linux, without its NUL).
const PATH_BYTES_MAX: usize = 4095;

/// Bytes: a string in JSON where they are UTF-8, else `{"hex": "…"}`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(from = "Form", into = "Form")]
pub struct Raw(pub Vec<u8>);

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
enum Form {
    Text(String),
    Bytes { hex: Hex },
}

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
struct Hex(#[schemars(with = "String")] Vec<u8>);

impl TryFrom<String> for Hex {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let bad = || format!("{text:?} is not hex");
        if !text.len().is_multiple_of(2) || !text.is_ascii() {
            return Err(bad());
        }
        let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| bad());
        (0..text.len()).step_by(2).map(byte).collect::<Result<_, _>>().map(Self)
    }
}

impl From<Hex> for String {
    fn from(hex: Hex) -> Self {
        hex.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl From<Form> for Raw {
    fn from(form: Form) -> Self {
        match form {
            Form::Text(text) => Self(text.into_bytes()),
            Form::Bytes { hex } => Self(hex.0),
        }
    }
}

impl From<Raw> for Form {
    fn from(raw: Raw) -> Self {
        match String::from_utf8(raw.0) {
            Ok(text) => Self::Text(text),
            Err(error) => Self::Bytes { hex: Hex(error.into_bytes()) },
        }
    }
}

impl Raw {
    /// As a path.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }
}

impl fmt::Display for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

/// Bytes that are no path below a workspace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a path below a workspace: relative, without `.`, `..`, empty parts and NUL, at most 4095 bytes"
)]
pub struct PathError(pub String);

/// A path below a workspace: parts joined by `/`, never empty, never `.` or `..`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Raw", into = "Raw")]
pub struct TreePath(Vec<u8>);

impl TreePath {
    /// Checks bytes.
    ///
    /// # Errors
    /// [`PathError`].
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, PathError> {
        let bytes = bytes.into();
        let fits = (1..=PATH_BYTES_MAX).contains(&bytes.len()) && !bytes.contains(&0);
        let part = |part: &[u8]| !matches!(part, b"" | b"." | b"..");
        if fits && bytes.split(|byte| *byte == b'/').all(part) {
            return Ok(Self(bytes));
        }
        Err(PathError(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As a path.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// Its parts, from the top.
    pub fn parts(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/')
    }

    /// Its last part.
    pub fn name(&self) -> &[u8] {
        self.parts().next_back().unwrap_or_default()
    }

    /// The path of what holds it; none at the top.
    pub fn parent(&self) -> Option<Self> {
        let at = self.0.iter().rposition(|byte| *byte == b'/')?;
        Some(Self(self.0[..at].to_vec()))
    }

    /// The path of `name` in it.
    ///
    /// # Errors
    /// [`PathError`].
    pub fn join(&self, name: &[u8]) -> Result<Self, PathError> {
        Self::new([&self.0, &b"/"[..], name].concat())
    }

    /// Whether it is `other` or lies below it.
    pub fn is_at_or_below(&self, other: &Self) -> bool {
        self.0.strip_prefix(&other.0[..]).is_some_and(|rest| rest.first().is_none_or(|byte| *byte == b'/'))
    }
}

impl TryFrom<Raw> for TreePath {
    type Error = PathError;
    fn try_from(raw: Raw) -> Result<Self, PathError> {
        Self::new(raw.0)
    }
}

impl From<TreePath> for Raw {
    fn from(path: TreePath) -> Self {
        Self(path.0)
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_below_a_workspace_are_paths() {
        for good in ["a", "a/b", "..a/b..", ".git/config", "sp ace/ü\n"] {
            assert_eq!(TreePath::new(good).map(|p| p.to_string()), Ok(good.to_owned()));
        }
        let long = "x/".repeat(2048);
        for bad in ["", "/", "/a", "a/", "a//b", ".", "a/./b", "..", "a/../b", "a\0b", &long] {
            assert!(TreePath::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn any_bytes_survive_json() {
        for bytes in [&b"plain"[..], b"\xff\xfe/x", "ümlaut\n".as_bytes()] {
            let path = TreePath::new(bytes).expect("a path");
            let json = serde_json::to_string(&path).expect("JSON");
            assert_eq!(serde_json::from_str::<TreePath>(&json).expect("read back"), path);
            assert_eq!(json.contains("hex"), std::str::from_utf8(bytes).is_err());
        }
        for bad in [r#""../x""#, r#"{"hex":"zz"}"#, r#"{"hex":"2f61"}"#, r#"{"hex":"6"}"#] {
            assert!(serde_json::from_str::<TreePath>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn below_means_below() {
        let path = |text: &str| TreePath::new(text).expect("a path");
        assert!(path("a/b").is_at_or_below(&path("a")) && path("a").is_at_or_below(&path("a")));
        assert!(!path("ab").is_at_or_below(&path("a")) && !path("a").is_at_or_below(&path("a/b")));
        assert_eq!((path("a/b").parent(), path("a").parent()), (Some(path("a")), None));
        assert_eq!(path("a/b").name(), b"b");
    }
}
