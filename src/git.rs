//! Hand on git: runs the git program for hotcell's own ends, and reads what a repository says of itself without it.
//! Never in a directory that an agent wrote, never with a repository's own configuration, hooks, filters, attributes
//! or helpers, and never as anybody but the person whose repository it is, or as a user that owns nothing.
//!
//! **Every function here blocks**: call it inside `spawn_blocking`.

pub mod config;
pub mod head;
pub mod refs;
#[cfg(test)]
pub(crate) mod testing;
