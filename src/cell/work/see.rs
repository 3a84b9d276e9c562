//! What of one workspace a cell is to see, and what of it is protected: found by looking through it once, as its
//! submitter. It decides nothing: the policy's `hide`, git's own masks and the rules of protection do.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::super::beside::beside;
use crate::change::TreePath;
use crate::change::hide::{HideError, HideRules};
use crate::changes::listing::What;
use crate::changes::{self, JobShelf, ListLimits, Listing, ShelfError};
use crate::git::config::{self, CONFIG_BYTES_MAX};
use crate::git::head::{Head, Repository};
use crate::git::index::INDEX_BYTES_MAX;
use crate::job::Identity;
use crate::workspace::{
    self, GUARDS_MAX, Guarded, HIDDEN_MAX, Hidden, Kind, LookLimits, Mask, Mode, Protection, Replaced,
    WorkspaceError, WorkspaceRecord, guard_of,
};

/// Most paths of a workspace, and the longest look at them.
const LOOK: LookLimits = LookLimits { entries_max: 5_000_000, time_max: Duration::from_secs(120) };
/// Most configurations of repositories in one workspace.
const CONFIGS_MAX: usize = 1000;
/// Most of them that are named in a note.
const NAMED_MAX: usize = 10;

/// What to look for.
pub(super) struct Sight<'a> {
    pub(super) hide: &'a [String],
    pub(super) mode: Mode<'a>,
    /// Where the listing of the workspace is kept, where changes to it will be wanted.
    pub(super) shelf: Option<JobShelf>,
    /// Files that are replaced whatever is found.
    pub(super) replaced: Vec<Replaced>,
    /// What is added to the configuration of the repository that the workspace is; empty: nothing.
    pub(super) settings: &'static str,
}

/// What was found.
pub(super) struct Looked {
    pub(super) mask: Mask,
    /// Paths to be mounts of their own, and whether each is read-only.
    pub(super) guards: Vec<(PathBuf, bool)>,
    /// What of that kind was there at all.
    pub(super) guarded: Guarded,
    pub(super) notes: Vec<String>,
    /// How long the listing that is kept took.
    pub(super) snapshot: Option<Duration>,
}

impl Sight<'_> {
    /// Looks through the workspace of `record`, opened as `fd`.
    pub(super) fn look(
        self,
        identity: &Identity,
        record: &WorkspaceRecord,
        fd: &OwnedFd,
    ) -> Result<Looked, WorkspaceError> {
        let thread = |source| io(record, source);
        let compile = || HideRules::new(self.hide);
        let compiled = |rules: Result<HideRules, HideError>| {
            rules.map_err(|e| too_large(record, format!("`hide`: {e}")))
        };
        let (found, looked, snapshot) = match &self.shelf {
            Some(shelf) => {
                let walk = || timed(|| walked(identity, record, fd));
                let (rules, (walk, took)) = beside("hotcell-rules", compile, walk).map_err(thread)?;
                let rules = compiled(rules)?;
                let search = |listing: &Listing| Names::Kept(listing).search(&rules, identity, record, fd);
                let (found, more) = kept(record, shelf, walk?, search)?;
                (found, None, Some(took + more))
            }
            None => {
                let looked = everything(identity, record, fd)?;
                if !looked.complete {
                    let most =
                        format!("more than {} paths, or {} s", LOOK.entries_max, LOOK.time_max.as_secs());
                    return Err(too_large(record, most));
                }
                let found = Names::Looked(&looked).search(&compiled(compile())?, identity, record, fd)?;
                (found, Some(looked), None)
            }
        };
        let Found { mut hidden, configs } = found;
        let (mut replaced, mut notes) = (self.replaced, Vec::new());
        notes.extend(mask_configs(configs, self.settings, &mut replaced));
        let (mut guarded, mut guards) = (Guarded::default(), Vec::new());
        // What cannot be written in place needs no protection.
        if let Some(looked) = &looked
            && self.mode != Mode::ReadOnly
        {
            guarded = Guarded::of(looked).map_err(|count| {
                let hint = "use the copy mode";
                let path = record.path.clone();
                WorkspaceError::TooMany { path, count, what: "protected", max: GUARDS_MAX, hint }
            })?;
            guards = guards_of(looked, self.mode, &hidden, &replaced);
            notes.extend(without_links(looked, &mut hidden));
        }
        if !hidden.is_empty() {
            notes.push(format!(
                "{} paths of the workspace are hidden from the agent: {}",
                hidden.len(),
                named(&hidden)
            ));
        }
        Ok(Looked { mask: Mask { hidden, replaced }, guards, guarded, notes, snapshot })
    }
}

/// What is in a workspace.
enum Names<'a> {
    /// As it is kept.
    Kept(&'a Listing),
    /// By names only.
    Looked(&'a workspace::Looked),
}

/// What was found in it.
struct Found {
    hidden: Vec<Hidden>,
    /// Configurations of repositories that are not hidden, and what stands in them.
    configs: Vec<(TreePath, Option<String>)>,
}

impl Names<'_> {
    fn search(
        &self,
        rules: &HideRules,
        identity: &Identity,
        record: &WorkspaceRecord,
        fd: &OwnedFd,
    ) -> Result<Found, WorkspaceError> {
        let hidden = Mask::hidden_of(self.iter().map(|(path, kind)| (path, kind == Kind::Dir)), rules);
        let hidden = hidden.map_err(|count| {
            let (path, hint) = (record.path.clone(), "hide whole directories instead");
            WorkspaceError::TooMany { path, count, what: "hidden", max: HIDDEN_MAX, hint }
        })?;
        let is_hidden = |path: &TreePath| hidden.iter().any(|h| path.is_at_or_below(&h.path));
        let configs: Vec<TreePath> = configs(self).into_iter().filter(|path| !is_hidden(path)).collect();
        if configs.len() > CONFIGS_MAX {
            return Err(too_large(record, format!("more than {CONFIGS_MAX} git configurations")));
        }
        let configs = workspace::read_texts(identity, record, fd, configs, CONFIG_BYTES_MAX)?;
        Ok(Found { hidden, configs })
    }

    fn kind(&self, name: &[u8]) -> Option<Kind> {
        match self {
            Self::Kept(listing) => listing.get(&TreePath::new(name).ok()?).map(|seen| kind_of(&seen.what)),
            Self::Looked(_) => self.iter().find(|(path, _)| path.as_bytes() == name).map(|(_, kind)| kind),
        }
    }

    /// A directory always before what is below it.
    fn iter(&self) -> Box<dyn Iterator<Item = (&TreePath, Kind)> + '_> {
        match self {
            Self::Kept(listing) => Box::new(listing.iter().map(|(path, seen)| (path, kind_of(&seen.what)))),
            Self::Looked(looked) => Box::new(looked.found.iter().map(|found| (&found.path, found.kind))),
        }
    }
}

fn kind_of(what: &What) -> Kind {
    match what {
        What::Dir => Kind::Dir,
        What::File => Kind::File,
        What::Symlink { .. } => Kind::Link,
        What::Special { .. } => Kind::Special,
    }
}

/// The workspace before its job.
struct Walked {
    listing: Listing,
    /// What was checked out.
    origin: Head,
    /// Git's index, and when it was written.
    index: Option<(Vec<u8>, i64)>,
}

fn walked(identity: &Identity, record: &WorkspaceRecord, fd: &OwnedFd) -> Result<Walked, WorkspaceError> {
    let limits = ListLimits::default();
    let dir = fd.try_clone().map_err(|source| io(record, source))?;
    let wait_max = limits.time_max + Duration::from_secs(10);
    let (path, uid) = (record.path.clone(), identity.uid);
    let (listing, head, index) = workspace::as_submitter(identity, &record.path, wait_max, move || {
        // The index first: what it says of files was so before they are listed.
        let here = Repository::at(dir.as_fd()).ok().flatten();
        let repository = here.or_else(|| Repository::holding(&path, uid).ok().flatten());
        let head = repository.as_ref().and_then(|repository| repository.head().ok());
        let index = repository.and_then(|repository| repository.index(INDEX_BYTES_MAX).ok().flatten());
        Ok::<_, WorkspaceError>((changes::list(dir.as_fd(), &limits), head, index))
    })?;
    let listing = listing.map_err(|error| too_large(record, error.to_string()))?;
    Ok(Walked { listing, origin: head.unwrap_or_default(), index })
}

/// Keeps it as what the job's changes are against; what `search` finds in the listing, and how long the keeping took.
/// What is kept of an earlier attempt stays: what that changed is in the copy. The listing is searched while it is
/// encoded and written, and freed beside that too: with many paths, each takes milliseconds.
fn kept<T: Send>(
    record: &WorkspaceRecord,
    shelf: &JobShelf,
    walked: Walked,
    search: impl FnOnce(&Listing) -> Result<T, WorkspaceError> + Send,
) -> Result<(T, Duration), WorkspaceError> {
    let Walked { listing, origin, index } = walked;
    let (hand_over, encoded) = mpsc::sync_channel(1);
    let listing = Arc::new(listing);
    let searched = listing.clone();
    let search = move || {
        let found = search(&searched);
        // Nobody else has it any more then.
        drop((encoded.recv(), searched));
        found
    };
    let keep = move || -> Result<(), ShelfError> {
        if shelf.base()?.is_some() {
            return Ok(());
        }
        shelf.create()?;
        index.map_or(Ok(()), |(index, written_ns)| shelf.put_index(&index, written_ns))?;
        let stored = listing.encode();
        let _ = hand_over.send(listing);
        shelf.put_base(&stored, &origin)
    };
    let both = beside("hotcell-search", search, || timed(keep));
    let (found, (kept, took)) = both.map_err(|source| io(record, source))?;
    kept.map_err(|error| io(record, std::io::Error::other(error)))?;
    Ok((found?, took))
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    (work(), begun.elapsed())
}

fn too_large(record: &WorkspaceRecord, limit: String) -> WorkspaceError {
    WorkspaceError::TooLarge { path: record.path.clone(), limit }
}

fn io(record: &WorkspaceRecord, source: std::io::Error) -> WorkspaceError {
    WorkspaceError::Io { doing: "list", path: record.path.clone(), source }
}

/// Everything in the workspace, by names.
pub(super) fn everything(
    identity: &Identity,
    record: &WorkspaceRecord,
    fd: &OwnedFd,
) -> Result<workspace::Looked, WorkspaceError> {
    let dir = fd.try_clone().map_err(|source| io(record, source))?;
    workspace::as_submitter(identity, &record.path, LOOK.time_max + Duration::from_secs(10), move || {
        // Objects have no names that mean anything.
        let enter = |path: &TreePath| {
            let in_git = path.parts().any(|part| part == b".git");
            !(path.name() == b"objects" && in_git)
        };
        Ok(workspace::look(dir.as_fd(), &LOOK, &enter))
    })
}

/// Configurations of repositories: in `.git` directories, and of the workspace itself where it is a repository.
fn configs(names: &Names<'_>) -> Vec<TreePath> {
    let has = |name: &[u8], kind| names.kind(name) == Some(kind);
    let bare = has(b"HEAD", Kind::File) && has(b"objects", Kind::Dir) && has(b"refs", Kind::Dir);
    let wanted = |path: &TreePath, kind| {
        let named = matches!(path.name(), b"config" | b"config.worktree") && kind == Kind::File;
        let own = || {
            let parts = path.parts().count();
            bare && (parts == 1 || path.as_bytes().starts_with(b"worktrees/") && parts == 3)
        };
        named && (own() || guard_of(path, kind) == Some(Protection::ReadOnly))
    };
    names.iter().filter(|(path, kind)| wanted(path, *kind)).map(|(path, _)| path.clone()).collect()
}

/// What is to be seen instead of configurations with credentials; the words about it.
fn mask_configs(
    texts: Vec<(TreePath, Option<String>)>,
    settings: &str,
    replaced: &mut Vec<Replaced>,
) -> Option<String> {
    let mut said = Vec::new();
    for (path, text) in texts {
        let shown = path.as_path().display().to_string();
        let settings = if path.parts().count() == 1 { settings } else { "" };
        let text = match text {
            Some(text) => {
                let masked = config::masked(&text);
                if masked.what.is_empty() && settings.is_empty() {
                    continue;
                }
                if !masked.what.is_empty() {
                    said.push(format!("{shown} ({})", masked.what.join(", ")));
                }
                masked.text
            }
            // Not to be read by its own submitter, too long, or no text: nothing of it is shown.
            None => String::new(),
        };
        // Settings that come later win.
        replaced.push(Replaced { path, content: (text + settings).into_bytes(), made: false });
    }
    let more = said.len().saturating_sub(NAMED_MAX);
    said.truncate(NAMED_MAX);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!said.is_empty()).then(|| format!("credentials are left out of {}{more}", said.join(", ")))
}

/// What is protected by a mount of its own: nothing that is covered anyway, and nothing that cannot be written anyway.
fn guards_of(
    looked: &workspace::Looked,
    mode: Mode<'_>,
    hidden: &[Hidden],
    replaced: &[Replaced],
) -> Vec<(PathBuf, bool)> {
    let writable = |path: &TreePath| match mode {
        Mode::Bind => true,
        Mode::Partly(parts) => {
            parts.iter().any(|part| path.as_path().starts_with(part) && path.as_path() != part)
        }
        Mode::ReadOnly => false,
    };
    let covered = |path: &TreePath| {
        hidden.iter().any(|h| path.is_at_or_below(&h.path)) || replaced.iter().any(|r| r.path == *path)
    };
    let guard = |found: &workspace::Found| {
        let guard = guard_of(&found.path, found.kind)?;
        (writable(&found.path) && !covered(&found.path))
            .then(|| (found.path.as_path().to_owned(), guard == Protection::ReadOnly))
    };
    looked.found.iter().filter_map(guard).collect()
}

/// A mount on a link would cover what it leads to, wherever that is: links stay to be seen in place.
fn without_links(looked: &workspace::Looked, hidden: &mut Vec<Hidden>) -> Option<String> {
    if hidden.is_empty() {
        return None;
    }
    let plain = |kind: Kind| matches!(kind, Kind::Dir | Kind::File);
    let others = looked.found.iter().filter(|f| !plain(f.kind)).map(|f| f.path.as_bytes());
    let others: std::collections::HashSet<&[u8]> = others.collect();
    let links: Vec<Hidden> = hidden.extract_if(.., |h| others.contains(h.path.as_bytes())).collect();
    (!links.is_empty()).then(|| {
        format!("links cannot be hidden in place, and neither can what they lead to: {}", named(&links))
    })
}

fn named(hidden: &[Hidden]) -> String {
    let shown = hidden.iter().take(NAMED_MAX).map(|h| h.path.as_path().display().to_string());
    let more = if hidden.len() > NAMED_MAX { ", …" } else { "" };
    format!("{}{more}", shown.collect::<Vec<_>>().join(", "))
}

/// The `.git` file of a worktree, as the cell has to see it.
pub(super) fn link_to(repository: &str, name: &str) -> Option<Replaced> {
    replaced(".git", format!("gitdir: {repository}/worktrees/{name}\n"))
}

/// What its repository says of the worktree, as the cell has to see it.
pub(super) fn link_back(name: &str, at: &str) -> Option<Replaced> {
    replaced(&format!("worktrees/{name}/gitdir"), format!("{at}/.git\n"))
}

fn replaced(path: &str, content: String) -> Option<Replaced> {
    Some(Replaced { path: TreePath::new(path).ok()?, content: content.into_bytes(), made: false })
}
