//! Change sets of real directories and real overlays.

mod random;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use rustix::fs::{FileType, XattrFlags};

use super::super::listing::{ListLimits, list};
use super::super::shelf::Shelf;
use super::super::testing::unmount;
use super::*;
use crate::change::{Entry, Flag, Node, Special, Verdict};
use crate::job::JobId;

/// A base, what a job may write over it, and a shelf.
struct World {
    dir: tempfile::TempDir,
    shelf: JobShelf,
    hide: HideRules,
    changes: Changes,
    keep_ignored: bool,
    limits: ExtractLimits,
}

impl World {
    /// In memory where that is possible: overlays and marks work there too.
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let dir = dir.expect("tempdir");
        for name in ["base", "upper", "work", "ws", "whole"] {
            fs::create_dir(dir.path().join(name)).expect("mkdir");
        }
        let shelf = Shelf::new(dir.path().join("changes")).of(&JobId::new(1, 1));
        shelf.create().expect("shelf");
        let limits = ExtractLimits::default();
        Self {
            dir,
            shelf,
            hide: HideRules::default(),
            changes: Changes::default(),
            keep_ignored: false,
            limits,
        }
    }

    fn at(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    fn write(&self, below: &str, text: impl AsRef<[u8]>) {
        let at = self.at(below);
        fs::create_dir_all(at.parent().expect("parent")).expect("mkdir");
        fs::write(at, text).expect("write");
    }

    fn listing(&self) -> Listing {
        list(fs::File::open(self.at("base")).expect("open").as_fd(), &ListLimits::default()).expect("listed")
    }

    fn extract_as(
        &self,
        tree: Tree<'_>,
        listing: &Listing,
        identity: &Identity,
    ) -> Result<ChangeSet, ExtractError> {
        let original = fs::File::open(self.at("base")).expect("open");
        extract(&Extraction {
            tree,
            original: Some(original.as_fd()),
            listing,
            shelf: &self.shelf,
            hide: &self.hide,
            changes: &self.changes,
            keep_ignored: self.keep_ignored,
            bases: None,
            outer: None,
            identity,
            limits: &self.limits,
        })
    }

    fn try_upper(&self, listing: &Listing) -> Result<ChangeSet, ExtractError> {
        let root = Identity { uid: 0, gid: 0, groups: Vec::new() };
        self.extract_as(Tree::Upper { upper: &self.at("upper") }, listing, &root)
    }

    fn upper(&self, listing: &Listing) -> ChangeSet {
        self.try_upper(listing).expect("extracted")
    }

    fn whole(&self, listing: &Listing) -> ChangeSet {
        let root = Identity { uid: 0, gid: 0, groups: Vec::new() };
        self.extract_as(Tree::Whole { tree: &self.at("whole") }, listing, &root).expect("extracted")
    }

    /// Runs `edit` on a real overlay of base and upper, then unmounts it.
    fn overlay<T>(&self, edit: impl FnOnce(&Path) -> T) -> T {
        assert!(rustix::process::geteuid().is_root(), "this test mounts: run it as root");
        let options = format!(
            "lowerdir={},upperdir={},workdir={},redirect_dir=off,metacopy=off,index=off",
            self.at("base").display(),
            self.at("upper").display(),
            self.at("work").display()
        );
        let options = std::ffi::CString::new(options).expect("no NUL");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("overlay", self.at("ws"), "overlay", flags, &*options).expect("mount");
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| edit(&self.at("ws"))));
        unmount(&self.at("ws"));
        assert_eq!(fs::read_dir(self.at("ws")).expect("list").count(), 0, "unmounted");
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn whiteout(&self, below: &str) {
        let at = self.at("upper").join(below);
        fs::create_dir_all(at.parent().expect("parent")).expect("mkdir");
        rustix::fs::mknodat(CWD, at, FileType::CharacterDevice, Mode::empty(), 0).expect("mknod");
    }

    fn mark(&self, below: &str, name: &str, value: &[u8]) {
        rustix::fs::setxattr(self.at("upper").join(below), name, value, XattrFlags::empty()).expect("mark");
    }

    fn text(&self, node: Option<&Node>) -> Option<String> {
        let Some(Node::File { blob: Some(blob), .. }) = node else { return None };
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut self.shelf.blob(blob).expect("blob"), &mut text).expect("read");
        Some(String::from_utf8_lossy(&text).into_owned())
    }
}

fn find<'a>(entries: &'a [Entry], at: &str) -> &'a Entry {
    entries
        .iter()
        .find(|e| e.path.as_bytes() == at.as_bytes())
        .unwrap_or_else(|| panic!("no entry {at}: {entries:#?}"))
}

fn names(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|e| e.path.to_string()).collect()
}

#[test]
fn each_kind_of_change_is_one_entry_with_what_was_and_what_is() {
    let w = World::new();
    for (name, text) in [
        ("keep", "k"),
        ("edit", "old"),
        ("gone", "g"),
        ("d/one", "1"),
        ("d/two", "2"),
        ("kind", "f"),
        ("mode", "m"),
    ] {
        w.write(&format!("base/{name}"), text);
    }
    symlink("edit", w.at("base/link")).expect("symlink");
    let listing = w.listing();
    w.overlay(|ws| {
        let at = |name: &str| ws.join(name);
        fs::write(at("edit"), "new").expect("write");
        fs::remove_file(at("gone")).expect("rm");
        fs::remove_dir_all(at("d")).expect("rm");
        fs::remove_file(at("kind")).expect("rm");
        fs::create_dir(at("kind")).expect("mkdir");
        fs::write(at("kind/x\ny"), b"\0\xff").expect("write");
        fs::set_permissions(at("mode"), fs::Permissions::from_mode(0o751)).expect("chmod");
        fs::remove_file(at("link")).expect("rm");
        symlink("../out", at("link")).expect("symlink");
        fs::create_dir_all(at("empty/deep")).expect("mkdir");
        // Written, and put back as it was.
        fs::write(at("keep"), "other").expect("write");
        fs::write(at("keep"), "k").expect("write");
    });
    let set = w.upper(&listing);
    let expected =
        ["d", "d/one", "d/two", "edit", "empty", "empty/deep", "gone", "kind", "kind/x\ny", "link", "mode"];
    assert_eq!(names(&set.entries), expected);
    let edit = find(&set.entries, "edit");
    assert_eq!(w.text(edit.before.as_ref()).as_deref(), Some("old"));
    assert_eq!((w.text(edit.after.as_ref()).as_deref(), edit.base_changed), (Some("new"), false));
    assert_eq!(w.text(find(&set.entries, "d/two").before.as_ref()).as_deref(), Some("2"));
    assert!(matches!(find(&set.entries, "kind").after, Some(Node::Dir { .. })));
    let mode = find(&set.entries, "mode");
    assert!(matches!(&mode.after, Some(Node::File { mode: 0o751, blob: Some(_), .. })));
    assert_eq!((&mode.flags[..], mode.verdict), (&[Flag::Executable][..], Verdict::Flagged));
    assert_eq!(find(&set.entries, "link").verdict, Verdict::Refused);
    assert_eq!((set.base.entries, set.base.snapshot), (listing.len() as u64, listing.hash()));
    assert!(set.git_state.is_empty() && set.ignored.count == 0);
}

#[test]
fn whiteouts_and_opaque_directories_hide_the_base_and_foreign_marks_are_corrupt() {
    let w = World::new();
    for name in ["a/one", "a/two", "b/x", "c/y"] {
        w.write(&format!("base/{name}"), "x");
    }
    let listing = w.listing();
    w.whiteout("b");
    w.whiteout("nothing-was-here");
    w.write("upper/a/two", "new");
    w.mark("a", "trusted.overlay.opaque", b"y");
    // An agent can set this; to a mount like ours it means nothing.
    fs::create_dir(w.at("upper/c")).expect("mkdir");
    w.mark("c", "user.overlay.opaque", b"y");
    assert_eq!(names(&w.upper(&listing).entries), ["a/one", "a/two", "b", "b/x"]);
    for (at, name, value) in [
        ("a", "trusted.overlay.redirect", &b"/etc"[..]),
        ("a/two", "trusted.overlay.metacopy", b""),
        ("a", "trusted.overlay.opaque", b"x"),
    ] {
        w.mark(at, name, value);
        assert!(matches!(w.try_upper(&listing), Err(ExtractError::Corrupt { .. })), "{name}");
        rustix::fs::removexattr(w.at("upper").join(at), name).expect("unmark");
        w.mark("a", "trusted.overlay.opaque", b"y");
    }
    assert!(w.try_upper(&listing).is_ok());
}

#[test]
fn what_somebody_else_did_to_the_original_is_not_the_agents() {
    let w = World::new();
    for name in ["both", "copied", "theirs", "gone", "mine"] {
        w.write(&format!("base/{name}"), "base");
    }
    let listing = w.listing();
    w.overlay(|ws| {
        fs::write(ws.join("both"), "the agent's").expect("write");
        fs::write(ws.join("mine"), "the agent's").expect("write");
        fs::write(ws.join("new"), "the agent's").expect("write");
        fs::remove_file(ws.join("gone")).expect("rm");
        // Only copied up.
        fs::OpenOptions::new().append(true).open(ws.join("copied")).expect("open");
    });
    for name in ["both", "copied", "theirs", "gone", "new"] {
        w.write(&format!("base/{name}"), "the user's own");
    }
    let set = w.upper(&listing);
    assert_eq!(names(&set.entries), ["both", "gone", "mine", "new"]);
    for entry in &set.entries {
        assert_eq!(entry.base_changed, entry.path.as_bytes() != b"mine", "{entry:?}");
        assert!(entry.path.as_bytes() == b"mine" || w.text(entry.before.as_ref()).is_none());
    }
    assert!(
        set.notes.iter().any(|note| note.contains("somebody else") && note.contains("both")),
        "{:?}",
        set.notes
    );
}

#[test]
fn hidden_paths_are_never_deleted_and_what_appears_there_is_refused() {
    let mut w = World::new();
    w.hide = HideRules::new(&[".env*".into(), "secrets/".into()]).expect("rules");
    for name in ["d/.env", "d/x", "e/secrets/key", "e/y", "f/z"] {
        w.write(&format!("base/{name}"), "x");
    }
    let listing = w.listing();
    for name in ["d", "e", "f"] {
        w.whiteout(name);
    }
    w.write("upper/.env.local", "x");
    let set = w.upper(&listing);
    assert_eq!(names(&set.entries), [".env.local", "d/x", "e/y", "f", "f/z"]);
    let env = find(&set.entries, ".env.local");
    assert!(env.flags.contains(&Flag::Hidden) && env.verdict == Verdict::Refused);
    // The same of a copy in which they are missing.
    w.write("whole/.env.local", "x");
    assert_eq!(names(&w.whole(&listing).entries), names(&set.entries));
    // A file in the place of a directory that holds one.
    fs::remove_file(w.at("upper/d")).expect("rm");
    w.write("upper/d", "x");
    let set = w.upper(&listing);
    assert!(find(&set.entries, "d").flags.contains(&Flag::Hidden));
}

#[test]
fn git_state_goes_apart_and_what_runs_there_is_refused() {
    let w = World::new();
    for name in [".git/HEAD", ".git/config", ".git/index", "a", "sub/.git/HEAD", "sub/f"] {
        w.write(&format!("base/{name}"), "x");
    }
    let listing = w.listing();
    for name in [
        ".git/index",
        ".git/hooks/pre-commit",
        ".git/config",
        "sub/.git/HEAD",
        "sub/f",
        "new/.git/config",
        "new/f",
        ".GIT/config",
    ] {
        w.write(&format!("upper/{name}"), "changed");
    }
    let set = w.upper(&listing);
    let git = [
        ".git/config",
        ".git/hooks",
        ".git/hooks/pre-commit",
        ".git/index",
        "new/.git",
        "new/.git/config",
        "sub/.git/HEAD",
    ];
    assert_eq!(names(&set.git_state), git);
    let refused = [
        ".GIT",
        ".GIT/config",
        ".git/config",
        ".git/hooks",
        ".git/hooks/pre-commit",
        "new/.git",
        "new/.git/config",
    ];
    for entry in &set.entries {
        let name = entry.path.to_string();
        assert_eq!(entry.verdict == Verdict::Refused, refused.contains(&name.as_str()), "{entry:?}");
    }
    assert_eq!(find(&set.entries, "new").flags, [Flag::Submodule]);
    assert_eq!(names(&set.entries).len(), refused.len() + 3);
    assert_eq!(
        w.text(find(&set.git_state, ".git/config").before.as_ref()),
        None,
        "the base's own stays where it is"
    );
    assert!(w.text(find(&set.git_state, ".git/index").after.as_ref()).is_some());
}

#[test]
fn a_configuration_without_its_credentials_is_no_change() {
    let w = World::new();
    let text = "[remote \"origin\"]\n\turl = https://me:word@example.com/x.git\n";
    w.write("base/.git/config", text);
    let listing = w.listing();
    let masked = crate::git::config::masked(text).text;
    assert!(!masked.contains("word"));
    w.write("upper/.git/config", &masked);
    w.write("whole/.git/config", &masked);
    let (upper, whole) = (w.upper(&listing), w.whole(&listing));
    assert!(upper.entries.is_empty() && upper.git_state.is_empty(), "{upper:#?}");
    assert_eq!(upper, whole);
    w.write("upper/.git/config", format!("{masked}[core]\n\tfsmonitor = x\n"));
    let set = w.upper(&listing);
    assert_eq!(
        (names(&set.entries), names(&set.git_state)),
        (vec![".git/config".to_owned()], vec![".git/config".to_owned()])
    );
    assert!(
        std::fs::read_dir(w.shelf.dir().join("blobs")).expect("list").count() == 1,
        "the base's own is not kept"
    );
}

#[test]
fn ignored_paths_are_listed_and_kept_on_request() {
    let mut w = World::new();
    w.write("base/.gitignore", "target/\n*.log\n");
    w.write("base/.git/info/exclude", "private\n");
    for name in ["old.log", "src/a", "tracked"] {
        w.write(&format!("base/{name}"), "x");
    }
    let listing = w.listing();
    w.write("upper/.gitignore", "target/\nout/\ntracked\n");
    for name in ["target/a/b", "target/c", "old.log", "new.log", "out/x", "tracked", "private"] {
        w.write(&format!("upper/{name}"), "changed");
    }
    let set = w.upper(&listing);
    // A path of the base goes by the base's rules, a new one by those of the result.
    assert_eq!(names(&set.entries), [".gitignore", "new.log", "tracked"]);
    let paths: Vec<String> = set.ignored.paths.iter().map(ToString::to_string).collect();
    assert_eq!(paths, ["old.log", "out", "private", "target"]);
    assert_eq!((set.ignored.count, set.ignored.bytes, set.ignored.kept), (5, 35, false));
    w.keep_ignored = true;
    let set = w.upper(&listing);
    assert_eq!((set.entries.len(), set.ignored.kept), (3 + 8, true));
    assert!(w.text(find(&set.entries, "target/a/b").after.as_ref()).is_some());
}

#[test]
fn what_git_tracks_is_not_ignored() {
    let w = World::new();
    w.write("base/.gitignore", "dist/\n");
    for name in ["dist/forced", "dist/loose"] {
        w.write(&format!("base/{name}"), "x");
    }
    // An index of one entry.
    let name = b"dist/forced";
    let index = [&b"DIRC\0\0\0\x02\0\0\0\x01"[..], &[0; 60], &[0, 11], name, &[0; 7]].concat();
    w.write("base/.git/index", index);
    let listing = w.listing();
    for name in ["dist/forced", "dist/loose", "dist/new"] {
        w.write(&format!("upper/{name}"), "changed");
    }
    let set = w.upper(&listing);
    assert_eq!((names(&set.entries), set.ignored.count), (vec!["dist/forced".to_owned()], 2));
}

#[test]
fn names_that_differ_by_case_are_flagged() {
    let w = World::new();
    for name in ["README", "dir/x", "Gone"] {
        w.write(&format!("base/{name}"), "x");
    }
    let listing = w.listing();
    w.whiteout("Gone");
    for name in ["readme", "DIR/y", "gone", "Ärger", "ärger", "dir/z"] {
        w.write(&format!("upper/{name}"), "new");
    }
    let set = w.upper(&listing);
    let clashing: Vec<String> = set
        .entries
        .iter()
        .filter(|e| e.flags.contains(&Flag::CaseClash))
        .map(|e| e.path.to_string())
        .collect();
    assert_eq!(clashing, ["DIR", "DIR/y", "readme", "Ärger", "ärger"]);
}

#[test]
fn hostile_trees_hold_nobody_up() {
    let mut w = World::new();
    w.limits.blob_bytes_max = 1000;
    let listing = w.listing();
    let at = |name: &str| w.at("upper").join(name);
    rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).expect("fifo");
    rustix::fs::mknodat(CWD, at("null"), FileType::CharacterDevice, Mode::RUSR, rustix::fs::makedev(1, 3))
        .expect("dev");
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("socket");
    fs::File::create(at("huge")).and_then(|f| f.set_len(1 << 40)).expect("sparse");
    w.write("upper/setuid", "x");
    fs::set_permissions(at("setuid"), fs::Permissions::from_mode(0o4755)).expect("chmod");
    fs::hard_link(at("setuid"), at("hard")).expect("link");
    symlink("/etc", at("etc")).expect("symlink");
    let set = w.upper(&listing);
    assert_eq!(names(&set.entries), ["etc", "fifo", "hard", "huge", "null", "setuid", "socket"]);
    assert!(set.entries.iter().all(|entry| entry.verdict == Verdict::Refused), "{:#?}", set.entries);
    assert_eq!(find(&set.entries, "fifo").after, Some(Node::Special { what: Special::Fifo }));
    assert!(matches!(find(&set.entries, "huge").after, Some(Node::File { blob: None, .. })));
    assert!(set.notes.iter().any(|note| note.contains("huge")), "{:?}", set.notes);
    w.limits.entries_max = 6;
    assert!(matches!(w.try_upper(&listing), Err(ExtractError::TooMany { limit: 6 })));
    w.limits.entries_max = 100;
    w.limits.time_max = Duration::ZERO;
    assert!(matches!(w.try_upper(&listing), Err(ExtractError::TooSlow)));
}

#[test]
fn a_tree_deeper_than_paths_reach_is_taken_as_far_as_they_do() {
    let w = World::new();
    let mut here: std::os::fd::OwnedFd = fs::File::open(w.at("upper")).expect("open").into();
    for _ in 0..2500 {
        rustix::fs::mkdirat(&here, c"d", Mode::RWXU).expect("mkdir");
        here = super::super::listing::open_dir(here.as_fd(), b"d").expect("open");
    }
    drop(here);
    let set = w.upper(&Listing::default());
    assert_eq!(set.entries.len(), 2048);
    assert!(set.notes.iter().any(|note| note.contains("longer than 4095 bytes")), "{:?}", set.notes);
}

#[test]
fn the_original_is_read_with_its_users_rights_and_never_through_what_appeared_there() {
    let w = World::new();
    fs::set_permissions(w.dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    for name in ["open", "closed", "swapped"] {
        w.write(&format!("base/{name}"), "base");
    }
    fs::set_permissions(w.at("base/closed"), fs::Permissions::from_mode(0o600)).expect("chmod");
    let listing = w.listing();
    fs::remove_file(w.at("base/swapped")).expect("rm");
    w.write("secret", "host");
    symlink(w.at("secret"), w.at("base/swapped")).expect("symlink");
    for name in ["open", "closed", "swapped"] {
        w.write(&format!("upper/{name}"), "new text");
    }
    let who = Identity { uid: 4242, gid: 4242, groups: Vec::new() };
    let set = w.extract_as(Tree::Upper { upper: &w.at("upper") }, &listing, &who).expect("extracted");
    assert_eq!(w.text(find(&set.entries, "open").before.as_ref()).as_deref(), Some("base"));
    for name in ["closed", "swapped"] {
        let entry = find(&set.entries, name);
        assert!(entry.base_changed && w.text(entry.before.as_ref()).is_none(), "{entry:?}");
    }
}

#[test]
fn a_repository_under_another_name_is_flagged_where_it_appears_and_where_it_runs_something() {
    let mut w = World::new();
    w.changes = Changes::default();
    for name in ["HEAD", "config", "hooks/post-commit", "refs/heads/main", "objects/a"] {
        w.write(&format!("base/tests/old.git/{name}"), "base");
        w.write(&format!("upper/tests/old.git/{name}"), "changed");
        w.write(&format!("upper/deep/new/{name}"), "new");
        w.write(&format!("upper/lacking/{name}"), "new");
    }
    fs::remove_file(w.at("upper/lacking/HEAD")).expect("rm");
    w.write("upper/deep/new/README", "plain");
    w.write("base/half/HEAD", "base");
    w.write("base/half/objects/a", "base");
    w.write("upper/half/refs/heads/main", "new");
    w.write("upper/half/config", "new");
    w.write("upper/config", "new");
    let set = w.upper(&w.listing());
    let mut flagged: Vec<String> = Vec::new();
    for entry in &set.entries {
        if entry.flags.contains(&Flag::Git) {
            assert_eq!(entry.verdict, Verdict::Refused, "{entry:?}");
            flagged.push(entry.path.to_string());
        }
    }
    let expected = [
        "deep/new/HEAD",
        "deep/new/config",
        "deep/new/hooks",
        "deep/new/hooks/post-commit",
        "deep/new/objects",
        "deep/new/objects/a",
        "deep/new/refs",
        "deep/new/refs/heads",
        "deep/new/refs/heads/main",
        "half/config",
        "half/refs",
        "half/refs/heads",
        "half/refs/heads/main",
        "tests/old.git/config",
        "tests/old.git/hooks/post-commit",
    ];
    assert_eq!(flagged, expected);
    // Where one of its parts goes, it is none.
    w.whiteout("half/objects");
    let set = w.upper(&w.listing());
    assert!(!find(&set.entries, "half/refs/heads/main").flags.contains(&Flag::Git));
}

#[test]
fn what_a_tracked_file_was_is_known_from_gits_objects_though_its_user_wrote_it_meanwhile() {
    let w = World::new();
    fs::set_permissions(w.dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    let place = crate::git::testing::Place::new();
    let (top, _) = place.repository("app");
    place.sh(&top, "echo staged >dir/staged; git add dir; git commit -qm more; echo dirty >>dir/staged; echo new >dir/new");
    // An index that is written in the same moment as a file vouches for nothing.
    place.sh(&top, "touch -d '1 hour ago' dir/b.txt; git add dir/b.txt");
    for below in ["", "dir"] {
        let dir = top.join(below);
        let repository =
            crate::git::head::Repository::holding(&dir, place.who.uid).expect("read").expect("there");
        let (index, written_ns) = repository.index(1 << 20).expect("read").expect("there");
        let listing =
            list(fs::File::open(&dir).expect("open").as_fd(), &ListLimits::default()).expect("listed");
        let upper = w.at(&format!("upper-{}", below.len()));
        for name in ["b.txt", "staged", "new"] {
            let at = upper.join(if below.is_empty() { "dir" } else { "" }).join(name);
            fs::create_dir_all(at.parent().expect("parent")).expect("mkdir");
            fs::write(at, "the agent's").expect("written");
        }
        let was = fs::read_to_string(top.join("dir/b.txt")).expect("read");
        place.sh(&top, "for f in b.txt staged new; do echo mine >>dir/$f; done");
        let original = fs::File::open(&dir).expect("open");
        let bases =
            Bases { index: &index, written_ns, path: &dir, temporary: crate::changes::export::temporary() };
        let set = extract(&Extraction {
            tree: Tree::Upper { upper: &upper },
            original: Some(original.as_fd()),
            listing: &listing,
            shelf: &w.shelf,
            hide: &w.hide,
            changes: &w.changes,
            keep_ignored: false,
            bases: Some(&bases),
            outer: None,
            identity: &place.who,
            limits: &w.limits,
        })
        .expect("extracted");
        let text = |name: &str| {
            let path = if below.is_empty() { format!("dir/{name}") } else { name.to_owned() };
            let entry = find(&set.entries, &path);
            assert!(entry.base_changed, "{entry:?}");
            w.text(entry.before.as_ref())
        };
        assert_eq!(text("b.txt").as_deref(), Some(&*was), "{:?}", set.notes);
        // Not as git has it, or not known to git: nobody says what it was.
        assert_eq!((text("staged"), text("new")), (None, None));
        let told = set.notes.iter().find(|note| note.contains("--3way cannot merge")).expect("told");
        assert!(told.contains("staged") && told.contains("new") && !told.contains("b.txt"), "{told}");
        place.sh(&top, "git checkout -q dir/b.txt; touch -d '2 hours ago' dir/b.txt; git add dir/b.txt");
    }
    drop(place);
}

/// A tree as it is: kind, mode, content.
fn snapshot(root: &Path) -> BTreeMap<Vec<u8>, (u32, Vec<u8>)> {
    fn enter(root: &Path, dir: &Path, out: &mut BTreeMap<Vec<u8>, (u32, Vec<u8>)>) {
        for entry in fs::read_dir(dir).expect("list") {
            let path = entry.expect("entry").path();
            let meta = fs::symlink_metadata(&path).expect("stat");
            let content = match meta.file_type() {
                t if t.is_dir() => Vec::new(),
                t if t.is_symlink() => fs::read_link(&path).expect("link").as_os_str().as_bytes().to_vec(),
                _ => fs::read(&path).expect("read"),
            };
            let name = path.strip_prefix(root).expect("below").as_os_str().as_bytes().to_vec();
            out.insert(name, (meta.mode(), content));
            if meta.is_dir() {
                enter(root, &path, out);
            }
        }
    }
    let mut out = BTreeMap::new();
    enter(root, root, &mut out);
    out
}
