//! Where a path leads in a cell, seen from outside: `.` and `..` taken away, symbolic links followed as the cell
//! would follow them. It opens nothing but names, asks for no rights of the cell, and never leaves the cell's own
//! directories, whatever its links say. What it finds can be changed by the agent a moment later: it is for rules
//! and the audit, not a wall.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Most symbolic links on the way.
const LINKS_MAX: u32 = 40;
/// Most names of a path, those of its links included.
const NAMES_MAX: usize = 512;
/// Longest path, in bytes.
const PATH_BYTES_MAX: usize = 4096;
/// What a reader outside would see differently.
const NOT_FOLLOWED: [&str; 3] = ["proc", "sys", "dev"];

/// A cell's file systems, from outside.
#[derive(Debug)]
pub struct View {
    /// Where each is mounted in the cell, without its leading slash, and the host's directory. The longest name wins.
    rooms: Vec<(PathBuf, OwnedFd)>,
}

impl View {
    /// A view of `rooms`: paths in the cell and the host's directories. Those that cannot be opened are left out:
    /// what lies there is compared as it is written.
    pub fn new(rooms: &[(&str, PathBuf)]) -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |(at, dir): &(&str, PathBuf)| {
            let fd = rustix::fs::openat(CWD, dir, flags, Mode::empty()).ok()?;
            Some((PathBuf::from(at.trim_start_matches('/')), fd))
        };
        let mut rooms: Vec<(PathBuf, OwnedFd)> = rooms.iter().filter_map(open).collect();
        rooms.sort_by_key(|(at, _)| std::cmp::Reverse(at.as_os_str().len()));
        Self { rooms }
    }

    /// Where an absolute path leads. What does not exist is taken as it is written. `None` where it cannot be
    /// followed: too long, too many links, not UTF-8, or in a file system that looks different from outside.
    pub fn follow(&self, path: &str) -> Option<String> {
        if path.len() > PATH_BYTES_MAX || path.contains('\0') || !path.starts_with('/') {
            return None;
        }
        let mut todo: VecDeque<OsString> = names(Path::new(path)).collect();
        let mut done = PathBuf::new();
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            if todo.len() > NAMES_MAX {
                return None;
            }
            if name == ".." {
                done.pop();
                continue;
            }
            done.push(&name);
            if done.components().count() == 1 && NOT_FOLLOWED.iter().any(|dir| name == *dir) {
                return None;
            }
            let Some(target) = self.link(&done)? else { continue };
            links += 1;
            if links > LINKS_MAX {
                return None;
            }
            done.pop();
            if target.is_absolute() {
                done.clear();
            }
            for name in names(&target).collect::<Vec<_>>().into_iter().rev() {
                todo.push_front(name);
            }
        }
        Some(format!("/{}", done.to_str()?))
    }

    /// The target of a symbolic link; `Some(None)` for everything else and for what is not there.
    fn link(&self, path: &Path) -> Option<Option<PathBuf>> {
        // A directory that something is mounted on is no link.
        if self.rooms.iter().any(|(at, _)| at == path) {
            return Some(None);
        }
        let Some((at, dir)) = self.rooms.iter().find(|(at, _)| path.starts_with(at)) else {
            return Some(None);
        };
        let inner = path.strip_prefix(at).ok()?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let name = match rustix::fs::openat2(dir, inner, flags, Mode::empty(), resolve) {
            Ok(name) => name,
            Err(Errno::NOENT | Errno::NOTDIR) => return Some(None),
            Err(_) => return None,
        };
        match rustix::fs::readlinkat(&name, "", Vec::new()) {
            Ok(target) => Some(Some(PathBuf::from(OsString::from_vec(target.into_bytes())))),
            // No link.
            Err(Errno::INVAL | Errno::NOENT) => Some(None),
            Err(_) => None,
        }
    }
}

fn names(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsString::from_vec(b"..".to_vec())),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .filter(|name| !name.as_bytes().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct Cell {
        dir: tempfile::TempDir,
        view: View,
    }

    fn cell() -> Cell {
        let dir = tempfile::tempdir().expect("directory");
        let at = |name: &str| dir.path().join(name);
        for name in ["root/usr/bin", "root/workspace", "ws/src", "home"] {
            std::fs::create_dir_all(at(name)).expect("made");
        }
        std::fs::write(at("ws/src/a.rs"), "").expect("written");
        symlink("usr/bin", at("root/bin")).expect("link");
        symlink("/etc/shadow", at("ws/absolute")).expect("link");
        symlink("../../../../usr/bin/x", at("ws/src/up")).expect("link");
        symlink("loop", at("ws/loop")).expect("link");
        symlink("src", at("ws/dir")).expect("link");
        symlink("/workspace/dir", at("home/there")).expect("link");
        let rooms = [("/", at("root")), ("/workspace", at("ws")), ("/home/agent", at("home"))];
        let view = View::new(&rooms);
        Cell { dir, view }
    }

    #[test]
    fn links_are_followed_as_the_cell_would() {
        let cell = cell();
        for (path, leads) in [
            ("/workspace/src/a.rs", "/workspace/src/a.rs"),
            ("/workspace//src/./../src/a.rs", "/workspace/src/a.rs"),
            ("/workspace/absolute", "/etc/shadow"),
            ("/workspace/dir/a.rs", "/workspace/src/a.rs"),
            ("/workspace/dir/../new", "/workspace/new"),
            ("/workspace/src/up", "/usr/bin/x"),
            ("/home/agent/there/a.rs", "/workspace/src/a.rs"),
            ("/bin/sh", "/usr/bin/sh"),
            ("/../../bin", "/usr/bin"),
            ("/not/there/../x", "/not/x"),
            ("/", "/"),
        ] {
            assert_eq!(cell.view.follow(path).as_deref(), Some(leads), "{path}");
        }
        drop(cell.dir);
    }

    #[test]
    fn what_cannot_be_followed_is_said_to_be_so() {
        let cell = cell();
        let long = format!("/{}", "a/".repeat(3000));
        for path in ["/workspace/loop", "relative", "/proc/self/root/etc/passwd", "/a\0b", &long] {
            assert_eq!(cell.view.follow(path), None, "{path:?}");
        }
    }
}
