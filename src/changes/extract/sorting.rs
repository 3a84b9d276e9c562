//! Which paths changed, and to which part of a change set each belongs: the work tree, git's own state, or what git
//! ignores. It must never count as deleted what the cell did not see.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::Read;

use super::super::ignore::{FILE_BYTES_MAX, Rules};
use super::super::listing::{Listing, Seen, What};
use super::super::tracked::INDEX_BYTES_MAX;
use super::contents::Contents;
use super::walk::Walked;
use super::{Candidate, ExtractError, Extraction, Tree, some_of};
use crate::change::classify::{BarePart, GitPlace, bare_part, git_place};
use crate::change::{Entry, Flag, Ignored, Node, TreePath, Verdict};

/// The parts.
#[derive(Default)]
pub(super) struct Sorted {
    pub(super) entries: Vec<Candidate>,
    pub(super) git_state: Vec<Candidate>,
    pub(super) ignored: Ignored,
}

/// Every path that is new, gone, or not plainly the same as before; files may still prove to be unchanged. Sorted.
pub(super) fn candidates(from: &Extraction<'_>, walked: &Walked) -> Vec<Candidate> {
    let mut all = Vec::new();
    for (path, after) in &walked.found {
        let before = from.listing.get(path);
        if before.is_some_and(|before| plainly_same(before, after)) {
            continue;
        }
        all.push(Candidate { path: path.clone(), before: before.cloned(), after: Some(after.clone()) });
    }
    all.extend(deleted(from, walked));
    all.sort_unstable_by(|one, other| one.path.cmp(&other.path));
    all.dedup_by(|one, other| one.path == other.path);
    all
}

fn plainly_same(before: &Seen, after: &Seen) -> bool {
    match (&before.what, &after.what) {
        (What::File, _) | (_, What::File) => false,
        (What::Dir, What::Dir) => before.mode == after.mode,
        (was, is) => was == is,
    }
}

/// What the listing has and the tree has not. Hidden paths and the directories that hold them stay: the cell saw
/// neither, so emptying the rest is no word on them.
fn deleted(from: &Extraction<'_>, walked: &Walked) -> Vec<Candidate> {
    let mut gone: Vec<(&TreePath, &Seen)> = Vec::new();
    match from.tree {
        Tree::Whole { .. } => gone.extend(from.listing.iter()),
        Tree::Upper { .. } => {
            for path in &walked.gone {
                gone.extend(from.listing.get(path).map(|seen| (path, seen)));
                gone.extend(from.listing.below(path).iter().map(|(path, seen)| (path, seen)));
            }
            let replaced = walked.found.iter().filter(|(_, seen)| !seen.is_dir()).map(|(path, _)| path);
            for path in walked.opaque.iter().chain(replaced) {
                gone.extend(from.listing.below(path).iter().map(|(path, seen)| (path, seen)));
            }
        }
    }
    let there = |path: &TreePath| walked.found.binary_search_by(|(other, _)| other.cmp(path)).is_ok();
    gone.retain(|(path, _)| !there(path));
    let unseen = keeping(from, gone.iter().copied());
    gone.retain(|(path, _)| !unseen.contains(*path));
    let candidate = |(path, seen): (&TreePath, &Seen)| Candidate {
        path: path.clone(),
        before: Some(seen.clone()),
        after: None,
    };
    gone.into_iter().map(candidate).collect()
}

/// Which of `paths` the cell did not see, and all directories above those.
fn keeping<'a>(
    from: &Extraction<'_>,
    paths: impl Iterator<Item = (&'a TreePath, &'a Seen)>,
) -> HashSet<TreePath> {
    let mut unseen = HashSet::new();
    for (path, seen) in paths {
        let blind = from.listing.unreadable().contains(path) || from.listing.mounts().contains(path);
        if blind || (!from.hide.is_empty() && from.hide.hides(path, seen.is_dir())) {
            let mut at = Some(path.clone());
            while let Some(here) = at {
                at = here.parent();
                if !unseen.insert(here) {
                    break;
                }
            }
        }
    }
    unseen
}

/// Tells the parts apart.
pub(super) fn sort(
    from: &Extraction<'_>,
    candidates: Vec<Candidate>,
    walked: &Walked,
    contents: &mut Contents<'_>,
) -> Result<Sorted, ExtractError> {
    let mut sorted = Sorted::default();
    let exclude = TreePath::new(".git/info/exclude").ok();
    let exclude = exclude.filter(|path| from.listing.get(path).is_some());
    let exclude = exclude.and_then(|path| contents.original.read_now(&path, FILE_BYTES_MAX));
    let rules = || from.outer.map_or_else(|| Rules::new(exclude.as_deref()), Rules::of_part);
    let (mut base, mut result) = (rules(), rules());
    let mut tops: BTreeSet<TreePath> = BTreeSet::new();
    let mut index: Option<HashSet<Vec<u8>>> = None;
    for candidate in candidates {
        let Some(candidate) = outside_git(candidate, &mut sorted) else { continue };
        let is_dir = |seen: &Option<Seen>| seen.as_ref().is_some_and(Seen::is_dir);
        let top = if candidate.before.is_some() {
            let mut load = |path: &TreePath| load_base(from.listing, contents, path);
            base.ignored(&candidate.path, is_dir(&candidate.before), &mut load)
        } else {
            let mut load = |path: &TreePath| load_result(from.listing, walked, contents, path);
            result.ignored(&candidate.path, is_dir(&candidate.after), &mut load)
        };
        // What git tracks it does not ignore, whatever the rules say.
        let top = top.filter(|_| {
            let index = index.get_or_insert_with(|| tracked(from, contents));
            candidate.before.is_none() || !index.contains(candidate.path.as_bytes())
        });
        let Some(top) = top else {
            sorted.entries.push(candidate);
            continue;
        };
        // Only copied up: told apart by their times, since their contents are not read.
        let copied_up = match (&candidate.before, &candidate.after) {
            (Some(was), Some(is)) => same_times(was, is),
            (None, _) | (_, None) => false,
        };
        if copied_up {
            continue;
        }
        let after = candidate.after.as_ref();
        if !after.or(candidate.before.as_ref()).is_some_and(Seen::is_dir) {
            sorted.ignored.count += 1;
        }
        sorted.ignored.bytes += after.map_or(0, |seen| seen.bytes);
        if tops.len() < from.limits.ignored_listed_max {
            tops.extend(TreePath::new(&candidate.path.as_bytes()[..top]));
        }
        if from.keep_ignored {
            sorted.entries.push(candidate);
        }
    }
    sorted.ignored.paths = tops.into_iter().collect();
    Ok(sorted)
}

/// Gives back what is in no `.git`. The inside of one is git's own state; what runs there, leads elsewhere, or makes a
/// directory a repository is an entry as well, so that somebody sees it.
fn outside_git(candidate: Candidate, sorted: &mut Sorted) -> Option<Candidate> {
    let is_dir = |seen: &Option<Seen>| seen.as_ref().is_some_and(Seen::is_dir);
    let shown = match git_place(&candidate.path) {
        GitPlace::Outside | GitPlace::Disguised => return Some(candidate),
        GitPlace::Top => !(is_dir(&candidate.before) && is_dir(&candidate.after)),
        GitPlace::Runs => true,
        GitPlace::Inside => {
            candidate.after.as_ref().is_some_and(|seen| matches!(seen.what, What::Symlink { .. }))
        }
    };
    if shown {
        sorted.entries.push(candidate.clone());
    }
    sorted.git_state.push(candidate);
    None
}

/// What the repository at the top, or above it, tracks; nothing where that is not known.
fn tracked(from: &Extraction<'_>, contents: &mut Contents<'_>) -> HashSet<Vec<u8>> {
    if let Some((outer, bases)) = from.outer.zip(from.bases) {
        let below = [outer.below.as_bytes(), b"/"].concat();
        let all = super::super::tracked::paths(bases.index).unwrap_or_default();
        return all.iter().filter_map(|path| path.strip_prefix(&below[..])).map(<[u8]>::to_vec).collect();
    }
    let listing = from.listing;
    let path = TreePath::new(".git/index").ok().filter(|path| listing.get(path).is_some());
    let index = path.and_then(|path| contents.original.read_now(&path, INDEX_BYTES_MAX));
    index.and_then(|index| super::super::tracked::paths(&index)).unwrap_or_default()
}

/// Same length, mode and time of the last write.
pub(super) fn same_times(was: &Seen, is: &Seen) -> bool {
    was.what == is.what && (was.mode, was.bytes, was.mtime_ns) == (is.mode, is.bytes, is.mtime_ns)
}

fn load_base(listing: &Listing, contents: &mut Contents<'_>, path: &TreePath) -> Option<Vec<u8>> {
    listing.get(path).filter(|seen| seen.what == What::File)?;
    contents.original.read_now(path, FILE_BYTES_MAX)
}

fn load_result(
    listing: &Listing,
    walked: &Walked,
    contents: &mut Contents<'_>,
    path: &TreePath,
) -> Option<Vec<u8>> {
    if let Ok(at) = walked.found.binary_search_by(|(other, _)| other.cmp(path)) {
        let seen = &walked.found[at].1;
        if seen.what != What::File || seen.bytes > FILE_BYTES_MAX {
            return None;
        }
        let file = contents.open(path, seen).ok()?;
        let mut text = Vec::new();
        file.take(FILE_BYTES_MAX).read_to_end(&mut text).ok()?;
        return Some(text);
    }
    let hidden = walked.gone.iter().chain(&walked.opaque).any(|top| path.is_at_or_below(top));
    if hidden { None } else { load_base(listing, contents, path) }
}

/// What depends on more than one path: hidden names, nested repositories, names that differ by case only.
pub(super) fn finish(from: &Extraction<'_>, walked: &Walked, entries: &mut [Entry], git_state: &mut [Entry]) {
    let mut bare = Bare { from, walked, known: HashMap::new() };
    let repositories: HashSet<TreePath> = git_state
        .iter()
        .filter(|entry| entry.before.is_none() && git_place(&entry.path) == GitPlace::Top)
        .filter_map(|entry| entry.path.parent())
        .collect();
    let clashing = case_clashes(from.listing, entries);
    let holding = if from.hide.is_empty() {
        HashSet::new()
    } else {
        // Only what became another kind can stand where hidden paths are.
        let replaced = |entry: &&Entry| {
            matches!(entry.before, Some(Node::Dir { .. }))
                && !matches!(entry.after, Some(Node::Dir { .. }) | None)
        };
        let below = entries.iter().filter(replaced).flat_map(|entry| from.listing.below(&entry.path));
        keeping(from, below.map(|(path, seen)| (path, seen)))
    };
    for entry in entries.iter_mut().chain(git_state) {
        let is_dir = matches!(entry.after.as_ref().or(entry.before.as_ref()), Some(Node::Dir { .. }));
        let hidden = !from.hide.is_empty() && from.hide.hides(&entry.path, is_dir);
        let more = [
            (Flag::Hidden, hidden || holding.contains(&entry.path)),
            (Flag::Git, entry.after.is_some() && bare.is_part(&entry.path)),
            (Flag::Submodule, is_dir && entry.before.is_none() && repositories.contains(&entry.path)),
            (
                Flag::CaseClash,
                clashing.iter().any(|top| entry.after.is_some() && entry.path.is_at_or_below(top)),
            ),
        ];
        let more =
            more.into_iter().filter(|(flag, yes)| *yes && !entry.flags.contains(flag)).map(|(flag, _)| flag);
        entry.flags.extend(more.collect::<Vec<_>>());
        entry.flags.sort_unstable();
        entry.verdict = entry.verdict.max(from.changes.verdict(&entry.flags));
    }
}

/// Finds directories that git takes for repositories though they are not called `.git`.
struct Bare<'a> {
    from: &'a Extraction<'a>,
    walked: &'a Walked,
    /// By directory (the top: nothing): whether it was one, whether it is one.
    known: HashMap<Vec<u8>, (bool, bool)>,
}

impl Bare<'_> {
    /// Whether a path that is new or changed makes a directory above it a repository, or runs in one.
    fn is_part(&mut self, path: &TreePath) -> bool {
        if git_place(path) != GitPlace::Outside {
            return false;
        }
        let parts: Vec<&[u8]> = path.parts().collect();
        (0..parts.len()).any(|at| {
            let Some(part) = bare_part(&parts[at..]) else { return false };
            match (part, self.look(&parts[..at].join(&b'/'))) {
                (BarePart::Runs, (_, is)) => is,
                (BarePart::Makes, (was, is)) => is && !was,
            }
        })
    }

    fn look(&mut self, dir: &[u8]) -> (bool, bool) {
        if let Some(known) = self.known.get(dir) {
            return *known;
        }
        let at = |name: &str| {
            let path = if dir.is_empty() { name.into() } else { [dir, b"/", name.as_bytes()].concat() };
            TreePath::new(path).ok()
        };
        let whole = |there: &dyn Fn(&TreePath) -> bool| {
            let has = |name: &str| at(name).is_some_and(|path| there(&path));
            has("HEAD") && ((has("objects") && has("refs")) || has("commondir"))
        };
        let listing = self.from.listing;
        let found = (whole(&|path| listing.get(path).is_some()), whole(&|path| self.is_there(path)));
        self.known.insert(dir.to_vec(), found);
        found
    }

    /// Whether the tree has it now.
    fn is_there(&self, path: &TreePath) -> bool {
        if self.walked.found.binary_search_by(|(other, _)| other.cmp(path)).is_ok() {
            return true;
        }
        match self.from.tree {
            Tree::Whole { .. } => false,
            Tree::Upper { .. } => {
                let tops = self.walked.gone.iter().chain(&self.walked.opaque);
                let replaced =
                    self.walked.found.iter().filter(|(_, seen)| !seen.is_dir()).map(|(path, _)| path);
                self.from.listing.get(path).is_some()
                    && !tops.chain(replaced).any(|top| path.is_at_or_below(top))
            }
        }
    }
}

/// New paths that are the same as another one but for the case of their letters; only the topmost of each.
fn case_clashes(listing: &Listing, entries: &[Entry]) -> BTreeSet<TreePath> {
    let mut news: std::collections::HashMap<Vec<u8>, Vec<&TreePath>> = std::collections::HashMap::new();
    for entry in entries.iter().filter(|entry| entry.before.is_none() && entry.after.is_some()) {
        news.entry(folded(&entry.path)).or_default().push(&entry.path);
    }
    if news.is_empty() {
        return BTreeSet::new();
    }
    let mut clashing: BTreeSet<TreePath> = BTreeSet::new();
    for same in news.values().filter(|same| same.len() > 1) {
        clashing.extend(same.iter().map(|path| (*path).clone()));
    }
    let gone: HashSet<&TreePath> = entries.iter().filter(|e| e.after.is_none()).map(|e| &e.path).collect();
    for (path, _) in listing.iter().filter(|(path, _)| !gone.contains(path)) {
        if let Some(same) = news.get(&folded(path)) {
            clashing.extend(same.iter().filter(|other| **other != path).map(|other| (*other).clone()));
        }
    }
    let nested = |path: &TreePath| {
        let mut above = path.parent();
        while let Some(here) = above {
            if clashing.contains(&here) {
                return true;
            }
            above = here.parent();
        }
        false
    };
    clashing.iter().filter(|path| !nested(path)).cloned().collect()
}

fn folded(path: &TreePath) -> Vec<u8> {
    match std::str::from_utf8(path.as_bytes()) {
        Ok(text) if !text.is_ascii() => text.to_lowercase().into_bytes(),
        Ok(_) | Err(_) => path.as_bytes().to_ascii_lowercase(),
    }
}

/// What a person should know of the whole.
pub(super) fn notes(listing: &Listing, entries: &[Entry]) -> Vec<String> {
    let mut notes = Vec::new();
    let moved = || entries.iter().filter(|e| e.base_changed);
    let named: Vec<String> = moved().map(|e| e.path.to_string()).collect();
    if !named.is_empty() {
        notes.push(format!("the original was changed by somebody else meanwhile: {}", some_of(&named)));
    }
    let lost = moved().filter(|e| e.before.as_ref().is_some_and(Node::is_lost) && e.after.is_some());
    let lost: Vec<String> = lost.map(|e| e.path.to_string()).collect();
    if !lost.is_empty() {
        let names = some_of(&lost);
        notes.push(format!("what these were before is not known, so that --3way cannot merge them: {names}"));
    }
    let blind: Vec<String> =
        listing.unreadable().iter().chain(listing.mounts()).map(ToString::to_string).collect();
    if !blind.is_empty() {
        notes.push(format!("the base could not be looked at below {}", some_of(&blind)));
    }
    let refused = entries.iter().filter(|entry| entry.verdict == Verdict::Refused).count();
    if refused > 0 {
        notes.push(format!("{refused} entries are refused and are not applied"));
    }
    notes
}
