//! Which changes a person should look at before they take effect: by path, kind and content. Pure.

use super::{Flag, Node, TreePath};

/// What is known of one change.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// Where.
    pub path: &'a TreePath,
    /// What was there.
    pub before: Option<&'a Node>,
    /// What is there.
    pub after: Option<&'a Node>,
    /// The beginning of the new content, where it is a file.
    pub head: &'a [u8],
    /// Files above this many bytes that are no text are large.
    pub large_bytes: u64,
}

/// All that there is to say about it, in the order of [`Flag::ALL`].
pub fn flags(facts: &Facts<'_>) -> Vec<Flag> {
    let _ = facts;
    Vec::new()
}
