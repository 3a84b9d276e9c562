//! Hand on change sets: the listing of a workspace before a job, what a job changed in it, and where that is kept
//! until a person decides. It must never run a program on what an agent wrote, follow a link in it, or lose a change
//! set once it is written.
//!
//! **Every function here blocks**: call it inside `spawn_blocking`.

pub mod apply;
pub mod branch;
mod build;
mod choose;
pub mod commits;
mod durable;
pub mod export;
pub mod extract;
mod ignore;
pub mod listing;
mod note;
mod only;
pub mod patch;
mod shelf;
mod sparse;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tracked;
#[cfg(test)]
pub(crate) mod trees;

pub use choose::Include;
pub use extract::{Bases, ExtractError, ExtractLimits, Extraction, Tree, extract};
pub use ignore::Outer;
pub use listing::{ListError, ListLimits, Listing, Seen, list};
pub use only::{BadGlob, Only};
pub use shelf::{Batch, JobShelf, Shelf, ShelfError};
