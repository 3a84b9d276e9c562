//! What of a workspace is protected while an agent works on it in place: what git and coding agents obey or run on the
//! host. Such paths are mounts of their own in the cell: read-only, or (the directories that hold them) onto
//! themselves, so that they cannot be moved away. What an agent makes anew is set aside after the job. Which paths
//! these are is decided here, purely; nothing here is ever followed.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::look::{Found, Kind, Looked};
use super::{WorkspaceError, io_at};
use crate::change::TreePath;
use crate::job::JobId;

/// Most paths of one workspace that are protected: each is a mount in the cell.
pub const GUARDS_MAX: usize = 128;
/// Names that are tried for what is set aside.
const NAMES_MAX: u32 = 100;

/// How a path is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// It cannot be moved or removed; what is in it can be written.
    Stays,
    /// Nothing in it can be written.
    ReadOnly,
}

/// How `path` has to be protected, if at all. Pure.
pub fn guard_of(path: &TreePath, kind: Kind) -> Option<Protection> {
    let parts: Vec<&[u8]> = path.parts().collect();
    let (name, above) = parts.split_last()?;
    let is_dir = kind == Kind::Dir;
    if matches!(kind, Kind::Link | Kind::Special) {
        return None;
    }
    if is_git(name) {
        return Some(if is_dir { Protection::Stays } else { Protection::ReadOnly });
    }
    if let Some(at) = above.iter().rposition(|part| is_git(part)) {
        return in_git(&above[at + 1..], name).then_some(Protection::ReadOnly);
    }
    match (*name, above.last().copied()) {
        (b".mcp.json", _) => (!is_dir).then_some(Protection::ReadOnly),
        (b".claude" | b".gemini" | b".codex", _) => is_dir.then_some(Protection::Stays),
        (b"settings.json" | b"settings.local.json" | b"hooks", Some(b".claude"))
        | (b"settings.json", Some(b".gemini"))
        | (b"config.toml", Some(b".codex")) => Some(Protection::ReadOnly),
        _ => None,
    }
}

fn is_git(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b".git")
}

/// Whether git obeys `name` below a repository's directory, in `above` of it.
fn in_git(above: &[&[u8]], name: &[u8]) -> bool {
    let obeyed =
        matches!(name, b"config" | b"config.worktree" | b"hooks" | b"info" | b"commondir" | b"gitdir");
    match above {
        [] => obeyed,
        [first, ..] => match *first {
            b"worktrees" => above.len() == 2 && obeyed,
            // Branches can be called anything: what looks like one of these in them is none.
            b"modules" => {
                obeyed
                    && !above
                        .iter()
                        .any(|p| matches!(*p, b"objects" | b"refs" | b"logs" | b"hooks" | b"info"))
            }
            _ => false,
        },
    }
}

/// What was protected when a job began: what else is there afterwards is the job's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guarded {
    /// Paths and kinds.
    pub paths: Vec<(TreePath, Kind)>,
}

impl Guarded {
    /// All such paths. Pure.
    ///
    /// # Errors
    /// Their number, where it is above [`GUARDS_MAX`].
    pub fn of(looked: &Looked) -> Result<Self, usize> {
        let wanted = |f: &&Found| guard_of(&f.path, f.kind).is_some() || is_git(f.path.name());
        let paths: Vec<_> = looked.found.iter().filter(wanted).map(|f| (f.path.clone(), f.kind)).collect();
        if paths.len() > GUARDS_MAX { Err(paths.len()) } else { Ok(Self { paths }) }
    }

    /// What appeared since, the topmost paths only. Pure.
    pub fn appeared<'a>(&self, now: &'a Looked) -> Vec<&'a TreePath> {
        let before: BTreeSet<(&[u8], u8)> =
            self.paths.iter().map(|(path, kind)| (path.as_bytes(), *kind as u8)).collect();
        let mut new: Vec<&TreePath> = Vec::new();
        for found in &now.found {
            let named = guard_of(&found.path, found.kind).is_some()
                // A link in its place leads git and agents as well.
                || guard_of(&found.path, Kind::File).is_some()
                || guard_of(&found.path, Kind::Dir) == Some(Protection::ReadOnly);
            // A directory that may hold settings is none itself.
            let harmless = found.kind == Kind::Dir
                && guard_of(&found.path, Kind::Dir) == Some(Protection::Stays)
                && !is_git(found.path.name());
            let known = before.contains(&(found.path.as_bytes(), found.kind as u8));
            if named && !harmless && !known && !new.iter().any(|top| found.path.is_at_or_below(top)) {
                new.push(&found.path);
            }
        }
        new
    }
}

/// Renames `path` below `dir` beside itself, with the caller's rights: the new name. `None` where it is gone. Never
/// follows a link, never replaces anything.
///
/// # Errors
/// [`WorkspaceError::Io`].
pub fn set_aside(
    dir: BorrowedFd<'_>,
    path: &TreePath,
    job: &JobId,
) -> Result<Option<TreePath>, WorkspaceError> {
    let shown = path.as_path();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let above = path.parent();
    let parent = above.as_ref().map_or(Path::new("."), |parent| parent.as_path());
    let parent = match rustix::fs::openat2(dir, parent, flags, Mode::empty(), resolve) {
        Ok(parent) => parent,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        Err(errno) => return Err(io_at("open the directory of", shown)(errno)),
    };
    let old = std::ffi::CString::new(path.name())
        .map_err(|e| io_at("set aside", shown)(std::io::Error::other(e)))?;
    for number in 0..NAMES_MAX {
        let more = if number == 0 { String::new() } else { format!("-{number}") };
        let mut name = path.name().to_vec();
        name.extend_from_slice(format!(".quarantined-{job}{more}").as_bytes());
        let renamed =
            rustix::fs::renameat_with(&parent, &old, &parent, name.as_slice(), RenameFlags::NOREPLACE);
        match renamed {
            Ok(()) => {
                let joined = match &above {
                    Some(above) => above.join(&name),
                    None => TreePath::new(name),
                };
                return joined.map(Some).map_err(|e| io_at("name", shown)(std::io::Error::other(e)));
            }
            Err(Errno::EXIST) => {}
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(io_at("set aside", shown)(errno)),
        }
    }
    let _ = rustix::fs::statat(parent.as_fd(), &old, AtFlags::SYMLINK_NOFOLLOW);
    Err(io_at("set aside", shown)(std::io::Error::from(std::io::ErrorKind::AlreadyExists)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::look::{LookLimits, look};
    use super::*;

    const LIMITS: LookLimits = LookLimits { entries_max: 1000, time_max: std::time::Duration::from_secs(10) };

    fn path(text: &str) -> TreePath {
        TreePath::new(text).expect("path")
    }

    #[test]
    fn what_git_and_agents_obey_is_protected_and_the_rest_is_not() {
        use Protection::{ReadOnly, Stays};
        for (text, kind, guard) in [
            (".git", Kind::Dir, Some(Stays)),
            (".git", Kind::File, Some(ReadOnly)),
            ("sub/.git", Kind::Dir, Some(Stays)),
            (".git/config", Kind::File, Some(ReadOnly)),
            (".git/hooks", Kind::Dir, Some(ReadOnly)),
            (".git/info", Kind::Dir, Some(ReadOnly)),
            (".git/worktrees/w/gitdir", Kind::File, Some(ReadOnly)),
            (".git/modules/a/b/config", Kind::File, Some(ReadOnly)),
            (".git/modules/a/refs/heads/config", Kind::File, None),
            (".git/refs/heads/config", Kind::File, None),
            (".git/HEAD", Kind::File, None),
            (".git/index", Kind::File, None),
            (".claude", Kind::Dir, Some(Stays)),
            (".claude/settings.json", Kind::File, Some(ReadOnly)),
            (".claude/settings.local.json", Kind::File, Some(ReadOnly)),
            ("sub/.claude/hooks", Kind::Dir, Some(ReadOnly)),
            (".claude/skills", Kind::Dir, None),
            (".mcp.json", Kind::File, Some(ReadOnly)),
            ("src/settings.json", Kind::File, None),
            ("src/config", Kind::File, None),
            (".gitignore", Kind::File, None),
        ] {
            assert_eq!(guard_of(&path(text), kind), guard, "{text}");
        }
    }

    #[test]
    fn what_appeared_is_set_aside_where_it_lies_and_nothing_else() {
        let dir = tempfile::tempdir().expect("directory");
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at(".git/refs")).expect("made");
        std::fs::write(at(".git/config"), "[core]").expect("written");
        std::fs::create_dir_all(at("src")).expect("made");
        let fd = std::fs::File::open(dir.path()).expect("open");
        let looked = |()| look(fd.as_fd(), &LIMITS, &|_| true);
        let before = Guarded::of(&looked(())).expect("few");
        assert!(before.appeared(&looked(())).is_empty());
        // What an agent may do.
        std::fs::create_dir_all(at(".git/hooks")).expect("made");
        std::fs::create_dir_all(at("src/.git/hooks")).expect("made");
        std::fs::create_dir_all(at("src/.claude")).expect("made");
        std::fs::write(at("src/.claude/settings.json"), "{}").expect("written");
        std::fs::write(at("src/.claude/notes"), "").expect("written");
        symlink("/etc/passwd", at(".mcp.json")).expect("link");
        std::fs::write(at(".git/index"), "").expect("written");
        let now = looked(());
        let mut appeared: Vec<String> =
            before.appeared(&now).iter().map(|p| p.as_path().display().to_string()).collect();
        appeared.sort();
        assert_eq!(appeared, [".git/hooks", ".mcp.json", "src/.claude/settings.json", "src/.git"]);
        let job = JobId::new(1, 2);
        for path in before.appeared(&now) {
            let name = set_aside(fd.as_fd(), path, &job).expect("renamed").expect("there");
            assert!(name.as_path().display().to_string().contains(&format!(".quarantined-{job}")));
            assert_eq!(set_aside(fd.as_fd(), path, &job).expect("gone"), None);
        }
        assert!(before.appeared(&looked(())).is_empty());
        assert!(at("src/.claude/notes").exists() && !at(".mcp.json").exists());
        // A link on the way leads nowhere.
        symlink("/etc", at("out")).expect("link");
        assert_eq!(set_aside(fd.as_fd(), &path("out/.git"), &job).expect("not followed"), None);
    }
}
