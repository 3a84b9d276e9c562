//! Globs over the paths of a change set, as in gitignore: without a slash a name at any depth, with one a path from
//! the top; what matches a directory matches everything below it. Pure.

use globset::{Glob, GlobBuilder, GlobSet, GlobSetBuilder};

use crate::change::TreePath;

/// Most globs at once.
const GLOBS_MAX: usize = 256;

/// Text that is no glob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{glob:?} is no pattern of paths: {why}")]
pub struct BadGlob {
    /// As given.
    pub glob: String,
    /// What is wrong with it.
    pub why: String,
}

/// Which paths are meant; all of them where no glob is given.
#[derive(Debug, Clone)]
pub struct Only {
    set: Option<GlobSet>,
}

impl Only {
    /// Understands globs: `*` and `?` within a name, `**` over directories, `[…]`, `{a,b}`.
    ///
    /// # Errors
    /// [`BadGlob`], the first one.
    pub fn new(globs: &[String]) -> Result<Self, BadGlob> {
        if globs.is_empty() {
            return Ok(Self { set: None });
        }
        let mut set = GlobSetBuilder::new();
        if let Some(glob) = globs.get(GLOBS_MAX) {
            return Err(BadGlob { glob: glob.clone(), why: format!("more than {GLOBS_MAX} at once") });
        }
        for glob in globs {
            set.add(one(glob)?);
        }
        let set = set.build();
        let set = set.map_err(|error| BadGlob { glob: globs.join(" "), why: error.to_string() })?;
        Ok(Self { set: Some(set) })
    }

    /// Whether `path`, or a directory that it lies in, is meant.
    pub fn matches(&self, path: &TreePath) -> bool {
        let Some(set) = &self.set else { return true };
        path.as_path().ancestors().any(|above| !above.as_os_str().is_empty() && set.is_match(above))
    }
}

fn one(glob: &str) -> Result<Glob, BadGlob> {
    let bad = |why: &str| BadGlob { glob: glob.to_owned(), why: why.to_owned() };
    let bare = glob.strip_prefix("./").unwrap_or(glob).trim_end_matches('/');
    if bare.is_empty() || bare.split('/').any(|part| part == "..") {
        return Err(bad("it names nothing below the workspace"));
    }
    let text = match bare.strip_prefix('/') {
        Some(anchored) => anchored.to_owned(),
        None if bare.contains('/') => bare.to_owned(),
        None => format!("**/{bare}"),
    };
    let glob = GlobBuilder::new(&text).literal_separator(true).backslash_escape(true).build();
    glob.map_err(|error| bad(&error.kind().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(globs: &[&str], path: &[u8]) -> bool {
        let globs: Vec<String> = globs.iter().map(|glob| (*glob).to_owned()).collect();
        Only::new(&globs).expect("globs").matches(&TreePath::new(path).expect("a path"))
    }

    #[test]
    fn globs_mean_what_they_mean_to_git() {
        for (globs, path) in [
            (&[][..], &b"any"[..]),
            (&["*.rs"], b"src/deep/a.rs"),
            (&["src"], b"src/deep/a.rs"),
            (&["src/"], b"src/a.rs"),
            (&["src/*.rs"], b"src/a.rs"),
            (&["src/**/*.rs"], b"src/x/y/a.rs"),
            (&["/a"], b"a/b"),
            (&["./a/b"], b"a/b"),
            (&["x", "b"], b"a/b"),
            (&["*.bin"], b"\xff.bin"),
            (&["deep"], b"src/deep/a.rs"),
        ] {
            assert!(matches(globs, path), "{globs:?} {path:?}");
        }
        for (glob, path) in
            [("*.rs", &b"a.rsx"[..]), ("src/*.rs", b"src/x/a.rs"), ("/b", b"a/b"), ("a/b", b"x/a/b")]
        {
            assert!(!matches(&[glob], path), "{glob:?} {path:?}");
        }
        for bad in ["", "/", "..", "a/../b", "[", "{a"] {
            assert!(Only::new(&[bad.to_owned()]).is_err(), "{bad:?}");
        }
    }
}
