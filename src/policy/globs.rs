//! Globs of paths in a rule: what stands in the file, and what it is compiled to. A plan is asked at each call, so a
//! list is compiled when the first call needs it and kept; it is stored and read as the texts alone.

use std::sync::{Arc, OnceLock};

use globset::{GlobBuilder, GlobMatcher};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A list of globs. Copies share what was compiled.
#[derive(Clone, Default)]
pub struct Globs {
    texts: Vec<String>,
    compiled: Arc<OnceLock<Vec<GlobMatcher>>>,
}

impl Globs {
    /// The globs as they were written.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// True where there is none.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// True where one of them fits.
    pub(super) fn fit(&self, path: &str) -> bool {
        // What cannot be compiled was refused when the file was read.
        let compile = || self.texts.iter().filter_map(|text| glob(text).ok()).collect();
        self.compiled.get_or_init(compile).iter().any(|glob| glob.is_match(path))
    }
}

/// Compiles one glob: `*` stays within one name, `\` takes the next character as it is.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn glob(text: &str) -> Result<GlobMatcher, String> {
    let glob = GlobBuilder::new(text).literal_separator(true).backslash_escape(true).build();
    glob.map(|glob| glob.compile_matcher()).map_err(|error| error.kind().to_string())
}

impl From<Vec<String>> for Globs {
    fn from(texts: Vec<String>) -> Self {
        Self { texts, compiled: Arc::default() }
    }
}

impl PartialEq for Globs {
    fn eq(&self, other: &Self) -> bool {
        self.texts == other.texts
    }
}

impl std::fmt::Debug for Globs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.texts.fmt(f)
    }
}

impl Serialize for Globs {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.texts.serialize(to)
    }
}

impl<'de> Deserialize<'de> for Globs {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        super::rule::one_or_many(from).map(Self::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_are_stored_as_their_texts_and_compiled_once_for_all_copies() {
        let globs: Globs = serde_json::from_str(r#"["/a/*","/b/**"]"#).expect("list");
        let copy = globs.clone();
        assert!(globs.compiled.get().is_none());
        assert!(globs.fit("/a/x") && !globs.fit("/a/x/y") && globs.fit("/b/x/y"));
        assert_eq!(copy.compiled.get().map(Vec::len), Some(2));
        assert_eq!(serde_json::to_string(&globs).expect("JSON"), r#"["/a/*","/b/**"]"#);
        let one: Globs = serde_json::from_str(r#""/a/*""#).expect("one");
        assert_eq!(one.texts(), ["/a/*"]);
        assert_ne!(one, globs);
    }
}
