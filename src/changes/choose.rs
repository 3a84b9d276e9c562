//! Which entries of a change set are meant: by verdict, and by patterns. Pure.

use super::only::Only;
use crate::change::{ChangeSet, Entry, Verdict};

/// Which verdicts are meant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Include {
    /// What is applied without a further word.
    #[default]
    Plain,
    /// That, and what is flagged.
    Flagged,
    /// All, for a reader: what is refused too.
    All,
}

impl Include {
    fn has(self, verdict: Verdict) -> bool {
        match (self, verdict) {
            (_, Verdict::Plain) | (Self::Flagged | Self::All, Verdict::Flagged) => true,
            (Self::All, Verdict::Refused) => true,
            (Self::Plain, Verdict::Flagged) | (Self::Plain | Self::Flagged, Verdict::Refused) => false,
        }
    }
}

/// The entries that are meant, in their order.
pub(super) fn chosen<'a>(changes: &'a ChangeSet, include: Include, only: &Only) -> Vec<&'a Entry> {
    changes.entries.iter().filter(|e| include.has(e.verdict) && only.matches(&e.path)).collect()
}
