//! Random trees, random edits: an overlay and a whole copy give the same change set, and a plain application of it to
//! a clone of the base gives the tree that was left, byte for byte and mode for mode.

use std::ffi::OsStr;

use proptest::prelude::*;

use super::*;

/// One edit; paths are chosen from few, so that edits meet.
#[derive(Debug, Clone)]
enum Edit {
    Write(Vec<u8>, Vec<u8>),
    MakeDir(Vec<u8>),
    Link(Vec<u8>, Vec<u8>),
    Remove(Vec<u8>),
    Rename(Vec<u8>, Vec<u8>),
    Mode(Vec<u8>, u32),
    /// A file becomes a directory with a file in it, a directory a file.
    Swap(Vec<u8>),
}

/// Never with `..`: no edit through a link leaves the tree.
fn any_path() -> impl Strategy<Value = Vec<u8>> {
    let part = prop::sample::select(vec![
        &b"a"[..],
        b"b",
        b"a-b",
        "\u{fc}".as_bytes(),
        b"n\nl",
        b"\xff\xfe",
        b"sp ace",
    ]);
    prop::collection::vec(part, 1..4).prop_map(|parts| parts.join(&b'/'))
}

fn any_content() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(Vec::new()),
        Just(b"text\n".to_vec()),
        Just(b"TEXT\n".to_vec()),
        prop::collection::vec(any::<u8>(), 0..40),
    ]
}

fn any_edit() -> impl Strategy<Value = Edit> {
    let mode = prop::sample::select(vec![0o644, 0o755, 0o600, 0o444, 0o000, 0o2755, 0o4711, 0o1777]);
    prop_oneof![
        4 => (any_path(), any_content()).prop_map(|(path, content)| Edit::Write(path, content)),
        1 => any_path().prop_map(Edit::MakeDir),
        1 => (any_path(), any_path()).prop_map(|(path, target)| Edit::Link(path, target)),
        3 => any_path().prop_map(Edit::Remove),
        2 => (any_path(), any_path()).prop_map(|(from, to)| Edit::Rename(from, to)),
        2 => (any_path(), mode).prop_map(|(path, mode)| Edit::Mode(path, mode)),
        1 => any_path().prop_map(Edit::Swap),
    ]
}

fn remove(at: &Path) {
    let _ = if at.is_symlink() || !at.is_dir() { fs::remove_file(at) } else { fs::remove_dir_all(at) };
}

fn copy(from: &Path, to: &Path) {
    let Ok(meta) = fs::symlink_metadata(from) else { return };
    if meta.is_symlink() {
        symlink(fs::read_link(from).expect("link"), to).expect("symlink");
        return;
    }
    if meta.is_dir() {
        if !to.is_dir() {
            fs::create_dir(to).expect("mkdir");
        }
        for entry in fs::read_dir(from).expect("list").flatten() {
            copy(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        fs::write(to, fs::read(from).expect("read")).expect("write");
    }
    fs::set_permissions(to, meta.permissions()).expect("chmod");
}

/// As an agent would: what cannot be done is not done.
fn perform(root: &Path, edit: &Edit) {
    let at = |path: &[u8]| root.join(OsStr::from_bytes(path));
    match edit {
        Edit::Write(path, content) => {
            if at(path).parent().is_some_and(|dir| fs::create_dir_all(dir).is_ok()) && !at(path).is_symlink()
            {
                let _ = fs::write(at(path), content);
            }
        }
        Edit::MakeDir(path) => drop(fs::create_dir_all(at(path))),
        Edit::Link(path, target) => drop(symlink(OsStr::from_bytes(target), at(path))),
        Edit::Remove(path) => remove(&at(path)),
        Edit::Rename(from, to) => {
            let (from, to) = (at(from), at(to));
            // Where they really are: a link may lead from one into the other, and a copy into itself has no end.
            let real = |at: &Path| Some(fs::canonicalize(at.parent()?).ok()?.join(at.file_name()?));
            let apart =
                real(&from).zip(real(&to)).is_some_and(|(a, b)| !a.starts_with(&b) && !b.starts_with(&a));
            let ready = to.parent().is_some_and(|dir| dir.is_dir() && !to.exists() && !to.is_symlink());
            if apart && ready && fs::symlink_metadata(&from).is_ok() {
                // A directory of the layer below cannot be renamed: as mv does.
                if fs::rename(&from, &to).is_err() {
                    copy(&from, &to);
                    remove(&from);
                }
            }
        }
        Edit::Mode(path, mode) => {
            if at(path).exists() && !at(path).is_symlink() {
                fs::set_permissions(at(path), fs::Permissions::from_mode(*mode)).expect("chmod");
            }
        }
        Edit::Swap(path) => {
            let was_dir = at(path).is_dir() && !at(path).is_symlink();
            if fs::symlink_metadata(at(path)).is_ok() {
                remove(&at(path));
                if was_dir {
                    fs::write(at(path), "was a directory").expect("write");
                } else {
                    fs::create_dir(at(path)).expect("mkdir");
                    fs::write(at(path).join("x"), "was a file").expect("write");
                }
            }
        }
    }
}

/// The plainest application there is.
fn apply(w: &World, set: &ChangeSet, root: &Path) {
    let at = |entry: &Entry| root.join(entry.path.as_path());
    let kind = |node: &Node| std::mem::discriminant(node);
    for entry in set.entries.iter().rev() {
        let stays = entry.before.as_ref().map(kind) == entry.after.as_ref().map(kind);
        match entry.before {
            Some(Node::Dir { .. }) if !stays => fs::remove_dir(at(entry)).expect("rmdir"),
            // A link is made anew.
            Some(Node::File { .. } | Node::Symlink { .. } | Node::Special { .. }) => {
                fs::remove_file(at(entry)).expect("rm");
            }
            Some(Node::Dir { .. }) | None => {}
        }
    }
    for entry in &set.entries {
        match &entry.after {
            Some(Node::File { blob, .. }) => {
                let blob = w.shelf.blob(blob.as_ref().expect("kept")).expect("blob");
                let mut file = fs::File::create_new(at(entry)).expect("create");
                std::io::copy(&mut &blob, &mut file).expect("write");
            }
            Some(Node::Symlink { target }) => symlink(target.as_path(), at(entry)).expect("symlink"),
            Some(Node::Dir { .. }) if !at(entry).is_dir() => fs::create_dir(at(entry)).expect("mkdir"),
            Some(Node::Dir { .. }) | None => {}
            Some(Node::Special { .. }) => panic!("{entry:?}"),
        }
    }
    for entry in &set.entries {
        if let Some(Node::File { mode, .. } | Node::Dir { mode }) = &entry.after {
            fs::set_permissions(at(entry), fs::Permissions::from_mode(*mode)).expect("chmod");
        }
    }
}

fn run(base: &[Edit], edits: &[Edit]) -> Result<(), TestCaseError> {
    let w = World::new();
    base.iter().for_each(|edit| perform(&w.at("base"), edit));
    let listing = w.listing();
    let before = snapshot(&w.at("base"));
    let left = w.overlay(|ws| {
        edits.iter().for_each(|edit| perform(ws, edit));
        copy(ws, &w.at("whole"));
        snapshot(ws)
    });
    prop_assert_eq!(&before, &snapshot(&w.at("base")), "the base is not touched");
    let set = w.upper(&listing);
    prop_assert_eq!(&set, &w.whole(&listing));
    prop_assert!(set.entries.iter().all(|entry| !entry.base_changed && entry.before != entry.after));
    prop_assert!(set.entries.windows(2).all(|pair| pair[0].path < pair[1].path));
    fs::create_dir(w.at("clone")).expect("mkdir");
    copy(&w.at("base"), &w.at("clone"));
    apply(&w, &set, &w.at("clone"));
    prop_assert_eq!(snapshot(&w.at("clone")), left);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, max_shrink_iters: 500, ..ProptestConfig::default() })]

    #[test]
    fn a_change_set_applied_to_a_clone_gives_the_tree_that_was_left(
        base in prop::collection::vec(any_edit(), 0..20), edits in prop::collection::vec(any_edit(), 0..15),
    ) {
        run(&base, &edits)?;
    }
}
