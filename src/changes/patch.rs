//! A change set as a person reads it: a patch that plain `git apply` takes, figures, names. Git compares two trees
//! that hold nothing but the changed paths, in a repository of ours, as a user that owns nothing. It must never read
//! the workspace, nor leave out in silence what a patch cannot say.

use std::io::{self, Write};
use std::path::Path;

use super::choose::{Include, chosen};
use super::only::{BadGlob, Only};
use super::shelf::{JobShelf, ShelfError};
use super::sparse::{self, Change, NewCommit, Sorted, shown};
use crate::change::{ChangeSet, Entry, Node};
use crate::git::head::Format;
use crate::git::{Borrowed, Bounds, Git, GitError, Who};

/// How it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// What `git apply` takes; what it cannot take stands in comments before it.
    Patch,
    /// Files and how much of them changed.
    Stat,
    /// Added and removed lines of each file, for programs.
    NumStat,
    /// Paths, one a line.
    NameOnly,
    /// A letter (A, D, M, T) and the path.
    NameStatus,
}

/// What is wanted.
#[derive(Debug, Clone)]
pub struct Render<'a> {
    /// How.
    pub form: Form,
    /// Which paths; empty: all.
    pub only: &'a [String],
    /// Which verdicts.
    pub include: Include,
    /// With escapes for a terminal.
    pub colour: bool,
    /// Columns of [`Form::Stat`].
    pub width: u16,
    /// Most bytes.
    pub bytes_max: u64,
    /// Where the temporary repository is made, [`crate::git::temporary`] for example.
    pub temporary: &'a Path,
}

/// What was rendered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text; names and contents are the agent's.
    pub bytes: Vec<u8>,
    /// What it cannot say, in sentences; a patch has them in its comments too.
    pub notes: Vec<String>,
}

/// Why nothing was rendered.
#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    /// A pattern is none.
    #[error(transparent)]
    Pattern(#[from] BadGlob),
    /// The contents cannot be read.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// It is longer than was asked for.
    #[error(
        "the change is longer than {bytes_max} bytes as text: ask for --stat, --only, or an export as tar"
    )]
    TooLong {
        /// The limit.
        bytes_max: u64,
    },
    /// Git.
    #[error(transparent)]
    Git(GitError),
}

/// Renders `changes`. Blocks.
///
/// # Errors
/// [`RenderError`]; nothing is left.
pub fn render(shelf: &JobShelf, changes: &ChangeSet, wanted: &Render<'_>) -> Result<Rendered, RenderError> {
    let entries = chosen(changes, wanted.include, &Only::new(wanted.only)?);
    let sorted = sparse::sort(&entries, true);
    let mut out = Rendered { bytes: Vec::new(), notes: sorted.notes.clone() };
    match wanted.form {
        Form::NameOnly => {
            out.bytes = names(&entries, false);
            return Ok(out);
        }
        Form::NameStatus => {
            out.bytes = names(&entries, true);
            return Ok(out);
        }
        Form::Patch | Form::Stat | Form::NumStat => {}
    }
    if wanted.form == Form::Patch {
        for note in &sorted.notes {
            out.bytes.extend(format!("# {note}\n").bytes());
        }
    }
    if !sorted.changes.is_empty() || !sorted.git.is_empty() {
        with_trees(shelf, &sorted, wanted, &mut out)?;
    }
    for entry in &sorted.untold {
        let path = shown(&entry.path);
        match wanted.form {
            Form::Stat => out.bytes.extend(format!(" {path} | not shown\n").bytes()),
            Form::NumStat => out.bytes.extend(format!("-\t-\t{path}\n").bytes()),
            Form::Patch | Form::NameOnly | Form::NameStatus => {}
        }
    }
    if out.bytes.len() as u64 > wanted.bytes_max {
        return Err(RenderError::TooLong { bytes_max: wanted.bytes_max });
    }
    Ok(out)
}

/// The part that needs git.
fn with_trees(
    shelf: &JobShelf,
    sorted: &Sorted<'_>,
    wanted: &Render<'_>,
    out: &mut Rendered,
) -> Result<(), RenderError> {
    let git = Git::new(wanted.temporary, &Who::Nobody, Format::Sha1, &Borrowed::default());
    let git = git.map_err(RenderError::Git)?;
    let made = compare(&git, shelf, sorted, wanted, out);
    let destroyed = git.destroy();
    made?;
    destroyed.map_err(RenderError::Git)
}

fn compare(
    git: &Git,
    shelf: &JobShelf,
    sorted: &Sorted<'_>,
    wanted: &Render<'_>,
    out: &mut Rendered,
) -> Result<(), RenderError> {
    let commits = [
        tree("refs/heads/before", &sorted.changes, false),
        tree("refs/heads/after", &sorted.changes, true),
        tree("refs/heads/git-before", &sorted.git, false),
        tree("refs/heads/git-after", &sorted.git, true),
    ];
    let bounds = Bounds { output_bytes_max: wanted.bytes_max, ..Bounds::default() };
    let mut feed = |to: &mut dyn Write| sparse::write(to, shelf, &commits);
    import(git, &mut feed, &bounds).map_err(RenderError::Git)?;
    let width = format!("--stat={}", wanted.width.clamp(20, 1000));
    let form: &[&str] = match wanted.form {
        Form::Stat => &[&width],
        Form::NumStat => &["--numstat"],
        // `--binary` alone would bring the patch along with the figures.
        Form::Patch | Form::NameOnly | Form::NameStatus => &["-p", "--binary"],
    };
    let colour = if wanted.colour { "--color=always" } else { "--no-color" };
    let diff = |before: &str, after: &str, into: &mut Vec<u8>| {
        let common = ["--full-index", "-M", "--no-ext-diff", "--no-textconv", "--ignore-submodules=all"];
        let rest = ["--src-prefix=a/", "--dst-prefix=b/", colour, before, after, "--"];
        let args = [&["diff-tree", "-r"][..], form, &common, &rest].concat();
        git.run(&args, None, into, &bounds).map_err(|error| match error {
            GitError::TooMuch { bytes_max, .. } => RenderError::TooLong { bytes_max },
            error => RenderError::Git(error),
        })
    };
    if !sorted.git.is_empty() {
        let mut inside = Vec::new();
        diff("refs/heads/git-before", "refs/heads/git-after", &mut inside)?;
        if wanted.form == Form::Patch {
            out.bytes.extend(b"# not in it: changes inside of .git, which git takes from nobody:\n");
            for line in inside.split_inclusive(|byte| *byte == b'\n') {
                out.bytes.extend([b"#  ", line].concat());
            }
        } else {
            out.bytes.extend(inside);
        }
    }
    diff("refs/heads/before", "refs/heads/after", &mut out.bytes)
}

/// One side of the changes, and nothing else.
fn tree<'a>(name: &'a str, changes: &[Change<'a>], after: bool) -> NewCommit<'a> {
    let leaf = |change: &Change<'a>| if after { change.after } else { change.before };
    let there = changes.iter().filter_map(|change| Some((change.path, leaf(change)?))).collect();
    let (ident, message, prefix) = ("hotcell <hotcell@localhost> 0 +0000", "", &b""[..]);
    NewCommit { name, from: None, ident, message, prefix, gone: Vec::new(), there }
}

/// Feeds `git fast-import`.
pub(super) fn import(
    git: &Git,
    feed: &mut (dyn FnMut(&mut dyn Write) -> io::Result<()> + Send),
    bounds: &Bounds,
) -> Result<(), GitError> {
    let args = ["fast-import", "--quiet", "--done", "--force", "--date-format=raw"];
    git.run(&args, Some(feed), &mut io::sink(), bounds)
}

fn names(entries: &[&Entry], status: bool) -> Vec<u8> {
    let mut out = String::new();
    for entry in entries {
        if status {
            out.push_str(letter(entry));
            out.push('\t');
        }
        out.push_str(&shown(&entry.path));
        out.push('\n');
    }
    out.into_bytes()
}

fn letter(entry: &Entry) -> &'static str {
    let kind = |node: &Node| match node {
        Node::File { .. } => 0,
        Node::Symlink { .. } => 1,
        Node::Dir { .. } => 2,
        Node::Special { .. } => 3,
    };
    match (&entry.before, &entry.after) {
        (None, _) => "A",
        (_, None) => "D",
        (Some(before), Some(after)) if kind(before) != kind(after) => "T",
        (Some(_), Some(_)) => "M",
    }
}

#[cfg(test)]
#[path = "patch/tests.rs"]
mod tests;
