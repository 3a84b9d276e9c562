//! `.dockerignore`: which paths of a context are left out. Pure. Patterns are anchored at the context; the last one that
//! fits a path or a directory above it holds.

use globset::{GlobBuilder, GlobMatcher};

/// Most patterns; more are an error.
const PATTERNS_MAX: usize = 1_000;

/// The patterns, in order.
#[derive(Debug, Default)]
pub(super) struct Ignored(Vec<(GlobMatcher, bool)>);

impl Ignored {
    /// Reads the file.
    ///
    /// # Errors
    /// Words for a pattern that cannot be read.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut patterns = Vec::new();
        for line in text.trim_start_matches('\u{feff}').lines() {
            // Comments begin at the very beginning.
            if line.starts_with('#') || line.trim().is_empty() {
                continue;
            }
            let line = line.trim();
            let (out, pattern) = line.strip_prefix('!').map_or((true, line), |rest| (false, rest.trim()));
            let parts =
                pattern.split('/').filter(|part| !part.is_empty() && *part != ".").collect::<Vec<_>>();
            if parts.is_empty() || patterns.len() >= PATTERNS_MAX {
                continue;
            }
            let glob =
                GlobBuilder::new(&parts.join("/")).literal_separator(true).backslash_escape(true).build();
            let glob = glob.map_err(|e| format!(".dockerignore: {pattern:?}: {}", e.kind()))?;
            patterns.push((glob.compile_matcher(), out));
        }
        Ok(Self(patterns))
    }

    /// True where `path` is left out.
    pub(super) fn leaves_out(&self, path: &str) -> bool {
        let fits = |glob: &GlobMatcher| {
            let mut part = Some(path);
            while let Some(here) = part {
                if glob.is_match(here) {
                    return true;
                }
                part = here.rsplit_once('/').map(|(above, _)| above);
            }
            false
        };
        self.0.iter().rev().find(|(glob, _)| fits(glob)).is_some_and(|(_, out)| *out)
    }

    /// True where a directory that is left out need not be looked into.
    pub(super) fn is_final(&self) -> bool {
        self.0.iter().all(|(_, out)| *out)
    }
}
