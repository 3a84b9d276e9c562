//! All that has to be done to a directory, found by looking at it and writing nothing: what every path needs, what
//! depends on what, and the order of steps. It must never plan anything where one path is in conflict.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::OFlags;

use super::judge::{Act, Judge, New, unreachable};
use super::look::{Now, Root, What};
use super::moves::Op;
use super::select::Selection;
use super::{Applied, Conflict, LeftOut};
use crate::change::{Node, TreePath};
use crate::workspace;

const OWNER_WRITES: u32 = 0o300;
const SET_GROUP: u32 = 0o2000;

/// A node to be made in the staging directory.
#[derive(Debug)]
pub(super) struct Fresh {
    /// Its slot, and where below it.
    pub(super) slot: u32,
    pub(super) below: Option<TreePath>,
    pub(super) new: New,
    /// The group that it should have, where the submitter may give it that one.
    pub(super) group: Option<u32>,
}

/// What is to be done, in order.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) fresh: Vec<Fresh>,
    pub(super) ops: Vec<Op>,
    pub(super) outline: Applied,
}

/// Looks at everything. Conflicts, all of them, or the plan.
pub(super) fn plan(judge: &Judge<'_>, uid: u32, selection: &Selection) -> Result<Plan, Vec<Conflict>> {
    let mut planner =
        Planner { judge, uid, selection, acts: BTreeMap::new(), left_out: Vec::new(), conflicts: Vec::new() };
    planner.look();
    planner.parents();
    planner.directories();
    planner.rights();
    if !planner.conflicts.is_empty() {
        planner.conflicts.sort_by(|a, b| a.path.cmp(&b.path));
        return Err(planner.conflicts);
    }
    Ok(planner.steps())
}

struct Planner<'a> {
    judge: &'a Judge<'a>,
    uid: u32,
    selection: &'a Selection,
    acts: BTreeMap<&'a TreePath, Act>,
    left_out: Vec<LeftOut>,
    conflicts: Vec<Conflict>,
}

enum No {
    Left(String),
    Conflict(String),
    /// Something above it is told already.
    Silent,
}

impl<'a> Planner<'a> {
    fn look(&mut self) {
        for (path, entry) in &self.selection.chosen {
            match self.judge.act(entry, self.nothing_at(path)) {
                Ok(act) => {
                    self.acts.insert(path, act);
                }
                Err(why) => self.close(path, No::Conflict(why)),
            }
        }
    }

    /// What is above `path` is no directory, and the change set knows it.
    fn nothing_at(&self, path: &TreePath) -> bool {
        let Some(above) = path.parent() else { return false };
        let dir_after = || {
            let entry = self.selection.chosen.get(&above);
            matches!(entry.and_then(|entry| entry.after.as_ref()), Some(Node::Dir { .. }))
        };
        match self.acts.get(&above) {
            Some(Act::Put { new: New::Dir { .. }, .. }) => true,
            Some(Act::Keep) => !dir_after(),
            Some(Act::Stay | Act::Closed | Act::Gone(_) | Act::Put { .. } | Act::Mode { .. }) | None => false,
        }
    }

    fn close(&mut self, path: &'a TreePath, no: No) {
        self.acts.insert(path, Act::Closed);
        match no {
            No::Left(why) => self.left_out.push(LeftOut { path: path.clone(), why }),
            No::Conflict(why) => self.conflicts.push(Conflict { path: path.clone(), why }),
            No::Silent => {}
        }
    }

    /// What is put needs a directory to be put in; what is deleted because its directory becomes something else
    /// stays where that is left out.
    fn parents(&mut self) {
        let paths: Vec<&'a TreePath> = self.acts.keys().copied().collect();
        for path in paths {
            let no = match self.acts.get(path) {
                Some(Act::Put { .. }) => self.holder(path),
                Some(Act::Gone(_)) => self.belongs(path),
                Some(Act::Keep | Act::Stay | Act::Closed | Act::Mode { .. }) | None => None,
            };
            if let Some(no) = no {
                self.close(path, no);
            }
        }
    }

    fn holder(&self, path: &TreePath) -> Option<No> {
        let above = path.parent()?;
        match self.acts.get(&above) {
            Some(Act::Put { new: New::Dir { .. }, .. }) => return None,
            Some(Act::Closed) if self.is_conflict(&above) => return Some(No::Silent),
            Some(Act::Gone(_) | Act::Put { .. }) => {
                return Some(No::Conflict(format!(
                    "the change set makes {above} something else than a directory"
                )));
            }
            Some(Act::Keep | Act::Stay | Act::Closed | Act::Mode { .. }) | None => {}
        }
        match self.judge.root.look(&above) {
            Err(errno) => Some(No::Conflict(unreachable(errno))),
            Ok(Some(Now { what: What::Dir, .. })) => None,
            Ok(_) => Some(match self.closed_above(path) {
                Some(dir) => No::Left(format!("it lies in {dir}, which is left out")),
                None => No::Conflict(format!("{above} is not a directory any more")),
            }),
        }
    }

    /// Deleted as part of a directory's replacement that is left out.
    fn belongs(&self, path: &TreePath) -> Option<No> {
        let dir = self.closed_above(path)?;
        let replaced = self.selection.closed.get(&dir).copied().unwrap_or(false);
        replaced.then(|| No::Left(format!("it belongs to the replacement of {dir}, which is left out")))
    }

    fn is_conflict(&self, path: &TreePath) -> bool {
        self.conflicts.iter().any(|conflict| conflict.path == *path)
    }

    /// The directory above `path` that is left out, if one is.
    fn closed_above(&self, path: &TreePath) -> Option<TreePath> {
        let mut above = path.parent();
        while let Some(dir) = above {
            if self.selection.closed.contains_key(&dir) || matches!(self.acts.get(&dir), Some(Act::Closed)) {
                return Some(dir);
            }
            above = dir.parent();
        }
        None
    }

    /// A directory that goes must hold nothing but what goes too.
    fn directories(&mut self) {
        let paths: Vec<&'a TreePath> = self.acts.keys().rev().copied().collect();
        for path in paths {
            let replaced = match self.acts.get(path) {
                Some(Act::Gone(now)) if now.what == What::Dir => false,
                Some(Act::Put { now: Some(now), .. }) if now.what == What::Dir => true,
                _ => continue,
            };
            match self.others_in(path) {
                Ok(None) => {}
                Ok(Some(_)) if !replaced => {
                    self.acts.insert(path, Act::Stay);
                }
                Ok(Some(other)) if self.selection.closed.contains_key(&other) => {
                    let why = format!("it still holds {other}, which is left out");
                    self.close(path, No::Left(why.clone()));
                    self.leave_below(path);
                }
                Ok(Some(other)) => {
                    let why =
                        format!("it still holds {other}, which the change set does not know: move that away");
                    self.close(path, No::Conflict(why));
                }
                Err(error) => self.close(path, No::Conflict(format!("it cannot be listed: {error}"))),
            }
        }
    }

    /// Something in the directory `path` that stays.
    fn others_in(&self, path: &TreePath) -> std::io::Result<Option<TreePath>> {
        for name in self.judge.root.list(path.as_path())? {
            let Ok(child) = path.join(name.to_bytes()) else { continue };
            if !matches!(self.acts.get(&child), Some(Act::Gone(_))) {
                return Ok(Some(child));
            }
        }
        Ok(None)
    }

    fn leave_below(&mut self, dir: &TreePath) {
        let below = |path: &&TreePath| path.is_at_or_below(dir) && **path != *dir;
        let gone = self.acts.iter().filter(|(path, act)| below(path) && matches!(act, Act::Gone(_)));
        for path in gone.map(|(path, _)| *path).collect::<Vec<_>>() {
            self.close(path, No::Left(format!("it belongs to the replacement of {dir}, which is left out")));
        }
    }

    /// What the kernel would refuse is named now, not in the middle.
    fn rights(&mut self) {
        let root = self.judge.root;
        let mut holders: BTreeMap<Option<TreePath>, Option<String>> = BTreeMap::new();
        let mut denied = Vec::new();
        for (path, act) in &self.acts {
            match act {
                Act::Mode { now, .. } if now.uid != self.uid && self.uid != 0 => {
                    let why = format!("it belongs to user {}: only its owner changes its mode", now.uid);
                    denied.push((*path, why));
                }
                Act::Gone(now) | Act::Put { now: Some(now), .. }
                    if now.what == What::Dir && now.uid != self.uid && self.uid != 0 =>
                {
                    denied.push((*path, format!("the directory belongs to user {}", now.uid)));
                }
                Act::Gone(_) | Act::Put { .. } => {
                    let holder = path.parent();
                    if let Some(Act::Put { new: New::Dir { .. }, .. }) =
                        holder.as_ref().and_then(|h| self.acts.get(h))
                    {
                        continue;
                    }
                    let uid = self.uid;
                    let word =
                        holders.entry(holder).or_insert_with_key(|dir| barred(root, uid, dir.as_ref()));
                    if let Some(why) = word {
                        denied.push((*path, why.clone()));
                    }
                }
                Act::Keep | Act::Stay | Act::Closed | Act::Mode { .. } => {}
            }
        }
        for (path, why) in denied {
            self.close(path, No::Conflict(why));
        }
    }

    /// Puts everything into its order.
    fn steps(mut self) -> Plan {
        let mut plan = Plan::default();
        let acts = std::mem::take(&mut self.acts);
        let (opened, mut last) = self.chmods(&acts);
        plan.ops.extend(opened);
        let mut slots = 0..;
        for (path, act) in acts.iter().rev() {
            if let (Act::Gone(now), Some(slot)) = (act, slots.next()) {
                plan.ops.push(Op::Out { path: (*path).clone(), slot, old: now.print, mode: now.mode });
            }
        }
        let mut top: Option<(&TreePath, u32, Option<u32>)> = None;
        for (path, act) in &acts {
            let Act::Put { new, now, .. } = act else { continue };
            if let Some((above, slot, group)) = top.filter(|(above, ..)| path.is_at_or_below(above)) {
                let below = path.as_bytes().get(above.as_bytes().len() + 1..).unwrap_or_default();
                let below = TreePath::new(below).ok();
                plan.fresh.push(Fresh { slot, below, new: new.clone(), group });
                continue;
            }
            let Some(slot) = slots.next() else { continue };
            let group = self.group(path, now.as_ref());
            let (at, mut new) = ((*path).clone(), new.clone());
            plan.ops.push(match now {
                Some(now) => Op::Swap { path: at.clone(), slot, old: now.print, mode: now.mode, new_ino: 0 },
                None => Op::In { path: at.clone(), slot, new_ino: 0 },
            });
            if let New::Dir { mode } = &mut new {
                top = Some((path, slot, group));
                // It must be writable to be moved.
                if *mode & OWNER_WRITES != OWNER_WRITES {
                    last.push(Op::Chmod { path: at, from: *mode | OWNER_WRITES, to: *mode, ino: None });
                    *mode |= OWNER_WRITES;
                }
            }
            plan.fresh.push(Fresh { slot, below: None, new, group });
        }
        // What lies deeper first: a directory may become one that cannot be entered.
        last.sort_by(|a, b| b.path().cmp(a.path()));
        plan.ops.extend(last);
        plan.outline = self.outline(&acts);
        plan
    }

    /// Directories of the submitter's that have to be writable for a while, and the modes that things get at the end.
    fn chmods(&self, acts: &BTreeMap<&'a TreePath, Act>) -> (Vec<Op>, Vec<Op>) {
        let mut touched = BTreeSet::new();
        let mut goes = BTreeSet::new();
        for (path, act) in acts {
            let (Act::Gone(now) | Act::Put { now: Some(now), .. }) = act else {
                if matches!(act, Act::Put { .. }) {
                    touched.extend(path.parent());
                }
                continue;
            };
            touched.extend(path.parent());
            if now.what == What::Dir {
                touched.insert((*path).clone());
                goes.insert((*path).clone());
            }
        }
        let (mut opened, mut last) = (Vec::new(), Vec::new());
        for dir in touched {
            let Ok(Some(now)) = self.judge.root.look(&dir) else { continue };
            let wide = now.mode | OWNER_WRITES;
            if now.what != What::Dir || now.uid != self.uid || self.uid == 0 || now.mode == wide {
                continue;
            }
            let ino = Some(now.print.ino);
            opened.push(Op::Chmod { path: dir.clone(), from: now.mode, to: wide, ino });
            let to = match acts.get(&dir) {
                Some(Act::Mode { to, .. }) => *to,
                _ => now.mode,
            };
            if to != wide && !goes.contains(&dir) {
                last.push(Op::Chmod { path: dir, from: wide, to, ino });
            }
        }
        let done: BTreeSet<TreePath> = opened.iter().map(|op: &Op| op.path().clone()).collect();
        for (path, act) in acts {
            if let Act::Mode { now, to } = act
                && !done.contains(*path)
            {
                let ino = Some(now.print.ino);
                last.push(Op::Chmod { path: (*path).clone(), from: now.mode, to: *to, ino });
            }
        }
        (opened, last)
    }

    /// The group of what comes: that of what it replaces, or of a directory that hands its group down.
    fn group(&self, path: &TreePath, now: Option<&Now>) -> Option<u32> {
        if let Some(now) = now {
            return Some(now.gid);
        }
        let root = self.judge.root;
        let above = path.parent();
        let dir = root.open(above.as_ref().map_or(Path::new("."), TreePath::as_path), OFlags::PATH).ok()?;
        let dir = super::look::now(&dir).ok()?;
        (dir.mode & SET_GROUP != 0).then_some(dir.gid)
    }

    fn outline(&self, acts: &BTreeMap<&'a TreePath, Act>) -> Applied {
        let mut told = Applied { left_out: self.selection.left_out.clone(), ..Applied::default() };
        told.left_out.extend(self.left_out.iter().cloned());
        told.left_out.sort_by(|a, b| a.path.cmp(&b.path));
        for (path, act) in acts {
            let path = || (*path).clone();
            match act {
                Act::Keep => told.already.push(path()),
                Act::Stay => told.kept_dirs.push(path()),
                Act::Closed => {}
                Act::Put { merged, .. } => {
                    told.applied.push(path());
                    if *merged {
                        told.merged.push(path());
                    }
                }
                Act::Gone(_) | Act::Mode { .. } => told.applied.push(path()),
            }
        }
        told
    }
}

/// Why nothing can be put into or taken from a directory; none: it can.
fn barred(root: &Root, uid: u32, dir: Option<&TreePath>) -> Option<String> {
    let name = dir.map_or(Path::new("."), TreePath::as_path);
    let fd: OwnedFd = match root.open(name, OFlags::PATH | OFlags::DIRECTORY) {
        Ok(fd) => fd,
        Err(errno) => return Some(unreachable(errno)),
    };
    let owner = super::look::now(&fd).map(|now| now.uid).ok()?;
    // A directory of the submitter's own is made writable for a while.
    if (owner == uid && dir.is_some()) || workspace::may_write(fd.as_fd(), true).is_ok() {
        return None;
    }
    let dir = root.path.join(name.strip_prefix(".").unwrap_or(name));
    Some(format!("you may not write in {dir:?} (it belongs to user {owner}): change its permissions"))
}
