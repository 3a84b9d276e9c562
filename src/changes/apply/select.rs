//! Which entries of a change set are to be applied, by the policy's verdict and the person's wish. Pure. Never selects
//! what was refused, a special file, or setuid, setgid and sticky bits of a file.

use std::collections::BTreeMap;

use super::{ApplyError, LeftOut, Only, Wish};
use crate::change::{ChangeSet, Entry, Flag, Node, TreePath, Verdict};

/// Bits of a file that are never set.
const SPECIAL_BITS: u32 = 0o7000;

/// What is to be applied.
#[derive(Debug, Default)]
pub(super) struct Selection {
    /// By path.
    pub(super) chosen: BTreeMap<TreePath, Entry>,
    /// What the wish meant and what cannot be.
    pub(super) left_out: Vec<LeftOut>,
    /// Changed paths that are not applied, and whether something would have come in a directory's place: what depends
    /// on them is left out too.
    pub(super) closed: BTreeMap<TreePath, bool>,
}

/// Chooses.
pub(super) fn select(changes: &ChangeSet, wish: &Wish) -> Result<Selection, ApplyError> {
    let only = Only::new(&wish.only)?;
    let mut selection = Selection::default();
    let mut meant = 0_u64;
    for entry in &changes.entries {
        let wanted = only.matches(&entry.path);
        meant += u64::from(wanted);
        let why = closed(entry, wish);
        match why {
            Some(why) => {
                if wanted {
                    selection.left_out.push(LeftOut { path: entry.path.clone(), why });
                }
                selection.closed.insert(entry.path.clone(), replaces(entry));
            }
            None if wanted => {
                selection.chosen.insert(entry.path.clone(), entry.clone());
            }
            None => {
                selection.closed.insert(entry.path.clone(), replaces(entry));
            }
        }
    }
    if meant == 0 {
        let why = if changes.entries.is_empty() {
            "the change set is empty"
        } else {
            "--only matches no path of it"
        };
        return Err(ApplyError::Nothing { why });
    }
    for entry in changes.git_state.iter().filter(|entry| !selection.chosen.contains_key(&entry.path)) {
        selection.closed.entry(entry.path.clone()).or_insert_with(|| replaces(entry));
    }
    directories_too(changes, wish, &mut selection);
    Ok(selection)
}

/// New directories that chosen entries lie in come along.
fn directories_too(changes: &ChangeSet, wish: &Wish, selection: &mut Selection) {
    let made = changes.entries.iter().filter(|entry| matches!(entry.after, Some(Node::Dir { .. })));
    let made: BTreeMap<&TreePath, &Entry> =
        made.filter(|entry| closed(entry, wish).is_none()).map(|entry| (&entry.path, entry)).collect();
    let files: Vec<TreePath> =
        selection.chosen.values().filter(|entry| entry.after.is_some()).map(|e| e.path.clone()).collect();
    for path in files {
        let mut above = path.parent();
        while let Some(dir) = above {
            let new = |entry: &&&Entry| !matches!(entry.before, Some(Node::Dir { .. }));
            if let Some(entry) = made.get(&dir).filter(new) {
                selection.closed.remove(&dir);
                selection.chosen.entry(dir.clone()).or_insert_with(|| (*entry).clone());
            }
            above = dir.parent();
        }
    }
}

/// Whether something else comes in a directory's place.
fn replaces(entry: &Entry) -> bool {
    let dir = |node: &Option<Node>| matches!(node, Some(Node::Dir { .. }));
    dir(&entry.before) && entry.after.is_some() && !dir(&entry.after)
}

/// Why an entry is not applied; none: it is.
fn closed(entry: &Entry, wish: &Wish) -> Option<String> {
    match &entry.after {
        Some(Node::Special { .. }) => return Some("a device, FIFO or socket is never applied".to_owned()),
        Some(Node::File { mode, .. }) if mode & SPECIAL_BITS != 0 => {
            return Some("a setuid, setgid or sticky file is never applied".to_owned());
        }
        Some(Node::File { blob: None, .. }) => return Some("its content was not kept".to_owned()),
        Some(Node::File { .. } | Node::Symlink { .. } | Node::Dir { .. }) | None => {}
    }
    match entry.verdict {
        Verdict::Plain => None,
        Verdict::Flagged if wish.include_flagged => None,
        Verdict::Flagged => {
            Some(format!("flagged ({}): look at it, then say --include-flagged", named(&entry.flags)))
        }
        Verdict::Refused => Some(format!("refused by the policy ({})", named(&entry.flags))),
    }
}

fn named(flags: &[Flag]) -> String {
    let name = |flag: &Flag| {
        let json = serde_json::to_value(flag).ok();
        json.as_ref().and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
    };
    flags.iter().map(name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Base, Ignored, VERSION};

    fn entry(path: &str, after: Node, flags: &[Flag], verdict: Verdict) -> Entry {
        let path = TreePath::new(path).expect("a path");
        Entry { path, before: None, after: Some(after), base_changed: false, flags: flags.to_vec(), verdict }
    }

    fn set(entries: Vec<Entry>) -> ChangeSet {
        let (base, ignored) = (Base::default(), Ignored::default());
        ChangeSet {
            version: VERSION,
            base,
            entries,
            git_state: Vec::new(),
            ignored,
            commits: None,
            notes: Vec::new(),
        }
    }

    fn chosen(changes: &ChangeSet, wish: &Wish) -> Vec<String> {
        let selection = select(changes, wish).expect("something");
        selection.chosen.keys().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_flagged_needs_a_word_and_what_is_refused_has_none() {
        let link = || Node::Symlink { target: crate::change::Raw(b"x".to_vec()) };
        let suid =
            Node::File { mode: 0o4755, bytes: 0, blob: Some(crate::change::BlobId::of_digest([0; 32])) };
        let changes = set(vec![
            entry("a", link(), &[], Verdict::Plain),
            entry("b", link(), &[Flag::AgentSettings], Verdict::Flagged),
            entry("c", link(), &[Flag::SymlinkOutside], Verdict::Refused),
            entry("d", suid, &[], Verdict::Plain),
            entry("e", Node::Special { what: crate::change::Special::Fifo }, &[], Verdict::Plain),
        ]);
        assert_eq!(chosen(&changes, &Wish::default()), ["a"]);
        let wish = Wish { include_flagged: true, ..Wish::default() };
        assert_eq!(chosen(&changes, &wish), ["a", "b"]);
        let left = select(&changes, &Wish::default()).expect("some").left_out;
        assert_eq!(left.len(), 4);
        assert!(
            left[0].why.contains("agent-settings") && left[1].why.contains("symlink-outside"),
            "{left:?}"
        );
        let wish = Wish { only: vec!["nothing".to_owned()], ..Wish::default() };
        assert!(matches!(select(&changes, &wish), Err(ApplyError::Nothing { .. })));
    }

    #[test]
    fn new_directories_come_along_with_what_lies_in_them() {
        let dir = || Node::Dir { mode: 0o755 };
        let link = Node::Symlink { target: crate::change::Raw(b"x".to_vec()) };
        let changes = set(vec![
            entry("n", dir(), &[], Verdict::Plain),
            entry("n/m", dir(), &[], Verdict::Plain),
            entry("n/m/a.rs", link, &[], Verdict::Plain),
            entry("n/other", dir(), &[], Verdict::Plain),
        ]);
        let wish = Wish { only: vec!["*.rs".to_owned()], ..Wish::default() };
        assert_eq!(chosen(&changes, &wish), ["n", "n/m", "n/m/a.rs"]);
    }
}
