//! Hand on git: runs the git program for hotcell's own ends, and reads what a repository says of itself without it.
//! Never in a directory that an agent wrote, never with a repository's own configuration, hooks, filters, attributes
//! or helpers, and never as anybody but the person whose repository it is, or as a user that owns nothing.
//!
//! **Every function here blocks**: call it inside `spawn_blocking`. (`identity` is the exception: it waits.)

pub mod above;
pub mod commit_hook;
pub mod config;
pub mod head;
pub mod identity;
pub mod index;
pub mod refs;
mod run;
#[cfg(test)]
pub(crate) mod testing;

pub use run::{Borrowed, Bounds, Feed, Git, GitError, Who, sweep, temporary};

/// Bytes in double quotes, as git reads them: everything that is not plain ASCII as an octal escape.
pub fn quote(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![b'"'];
    for byte in bytes {
        match byte {
            b'"' | b'\\' => out.extend([b'\\', *byte]),
            b'\n' => out.extend(*b"\\n"),
            b'\t' => out.extend(*b"\\t"),
            0x20..=0x7e => out.push(*byte),
            other => out.extend(format!("\\{other:03o}").bytes()),
        }
    }
    out.push(b'"');
    out
}
