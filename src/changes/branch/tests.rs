//! Branches in real repositories.

use super::*;
use crate::change::{ChangeSet, Verdict};
use crate::changes::choose::Include;
use crate::changes::commits::{BundleLimits, import_bundle};
use crate::changes::shelf::JobShelf;
use crate::changes::testing::{between, entry, file, set, shelf, tree};
use crate::git::identity::GitIdentity;
use crate::git::testing::Place;
use crate::job::JobId;

fn author() -> GitIdentity {
    GitIdentity::new("Ann Lee", "ann@example.com", "ann", "box")
}

fn branch(
    place: &Place,
    path: &Path,
    shelf: &JobShelf,
    changes: &ChangeSet,
    include: Include,
) -> Result<Created, BranchError> {
    branch_with(place, path, shelf, changes, include, Arc::new(|| Ok(())))
}

fn branch_with(
    place: &Place,
    path: &Path,
    shelf: &JobShelf,
    changes: &ChangeSet,
    include: Include,
    step: Step,
) -> Result<Created, BranchError> {
    let (job, author) = (JobId::new(1, 1), author());
    let temporary = crate::git::temporary();
    let wanted = Build {
        shelf,
        changes,
        job: &job,
        path,
        identity: &place.who,
        author: &author,
        message: None,
        include,
        only: &[],
        now_s: 1_700_000_000,
        temporary: &temporary,
    };
    stepwise("agent/made", &wanted, step)
}

/// What can be different in a repository.
fn state(place: &Place, path: &Path) -> String {
    place.sh(path, "find . -type f -not -path './.git/objects/*' -not -path './.git/refs/heads/agent/*' | sort | xargs -d '\\n' sha256sum; git status --porcelain")
}

#[test]
fn a_branch_holds_what_the_agent_left_and_nothing_else_is_touched() {
    let place = Place::new();
    for (name, init) in [("r", &[][..]), ("long", &["--object-format=sha256"])] {
        let (path, commit) = place.repository_with(name, init);
        place.sh(&path, "echo untracked > mine; rm -rf ../after; cp -a . ../after; rm -r ../after/.git");
        place.sh(&place.path("after"), "printf 'one\\n2\\n' > a.txt; rm -r dir; mkdir dir2; echo x > \"dir2/o d\nd\"; ln -s a.txt l; chmod +x mine");
        let (_dir, shelf) = shelf();
        let changes = set(between(&shelf, &path, &place.path("after")), Some(&commit));
        let before = state(&place, &path);
        let made = branch(&place, &path, &shelf, &changes, Include::Plain).expect("made");
        assert_eq!(state(&place, &path), before, "work tree, index, HEAD, configuration");
        assert_eq!(place.git(&path, &["rev-parse", "agent/made"]), made.commit);
        assert_eq!(place.git(&path, &["rev-parse", "agent/made^"]), commit);
        let log = place.git(&path, &["log", "-1", "--format=%an %ae %ct %B", "agent/made"]);
        assert!(log.starts_with("Ann Lee ann@example.com 1700000000 "), "{log}");
        assert!(log.contains(&format!("Hotcell-Job: {}", JobId::new(1, 1))), "{log}");
        place.git(&path, &["fsck", "--strict"]);
        place.sh(&path, "test -z \"$(find .git/objects .git/refs -not -user $(id -u))\"; test -z \"$(find .git -name 'tmp_*')\"");
        place.git(&path, &["clone", "-q", "-b", "agent/made", ".", &format!("../out-{name}")]);
        assert_eq!(tree(&shelf, &place.path(&format!("out-{name}"))), tree(&shelf, &place.path("after")));
        let again = branch(&place, &path, &shelf, &changes, Include::Plain);
        assert!(matches!(again, Err(BranchError::Ref(RefError::Exists { .. }))), "{again:?}");
    }
}

#[test]
fn work_trees_and_directories_below_the_top_work() {
    let place = Place::new();
    let (path, commit) = place.repository("r");
    place.git(&path, &["worktree", "add", "-q", "--detach", "../tree"]);
    let (_dir, shelf) = shelf();
    let new = |content: &[u8]| Some(file(&shelf, content, 0o644));
    let changes =
        set(vec![entry("b.txt", new(b"b\n"), new(b"B\n")), entry("new/c", None, new(b"c"))], Some(&commit));
    branch(&place, &place.path("tree/dir"), &shelf, &changes, Include::Plain).expect("made");
    let names = place.git(&path, &["diff", "--name-status", "main", "agent/made"]);
    assert_eq!(names, "M\tdir/b.txt\nA\tdir/new/c");
}

#[test]
fn without_a_commit_to_build_on_it_says_so() {
    let place = Place::new();
    let (path, commit) = place.repository("r");
    let (_dir, shelf) = shelf();
    let entries = || vec![entry("x", None, Some(file(&shelf, b"x", 0o644)))];
    let made = branch(&place, &path, &shelf, &set(entries(), None), Include::Plain);
    assert!(matches!(made, Err(BranchError::Build(BuildError::NoBase { .. }))), "{made:?}");
    let made = branch(&place, &path, &shelf, &set(entries(), Some(&"0".repeat(40))), Include::Plain);
    assert!(matches!(made, Err(BranchError::Build(BuildError::BaseGone { .. }))), "{made:?}");
    let made = branch(&place, &path, &shelf, &set(Vec::new(), Some(&commit)), Include::Plain);
    assert!(matches!(made, Err(BranchError::Build(BuildError::Nothing))), "{made:?}");
    place.sh(&place.path(""), "mkdir plain");
    let made = branch(&place, &place.path("plain"), &shelf, &set(entries(), Some(&commit)), Include::Plain);
    assert!(matches!(made, Err(BranchError::Build(BuildError::Source(_)))), "{made:?}");
    let evil = set(
        vec![entry(
            ".gitmodules",
            None,
            Some(file(&shelf, b"[submodule \"a\"]\n\tpath = -x\n\turl = -x\n", 0o644)),
        )],
        Some(&commit),
    );
    let made = branch(&place, &path, &shelf, &evil, Include::Plain);
    assert!(matches!(made, Err(BranchError::Build(BuildError::Check(_)))), "{made:?}");
    assert_eq!(place.git(&path, &["branch", "--format=%(refname:short)"]), "main", "nothing was made");
}

#[test]
fn submodules_stay_what_they_are() {
    let place = Place::new();
    let (inner, _) = place.repository("inner");
    let (path, _) = place.repository("r");
    place.git(&path, &["submodule", "--quiet", "add", inner.to_str().expect("text"), "sub"]);
    place.git(&path, &["commit", "-q", "-m", "with a submodule"]);
    let commit = place.git(&path, &["rev-parse", "HEAD"]);
    let (_dir, shelf) = shelf();
    let new = |content: &[u8]| Some(file(&shelf, content, 0o644));
    let changes =
        set(vec![entry("sub/a.txt", new(b"1"), new(b"2")), entry("x", None, new(b"x"))], Some(&commit));
    let made = branch(&place, &path, &shelf, &changes, Include::Plain).expect("made");
    assert!(made.notes.iter().any(|note| note.contains("submodules")), "{made:?}");
    assert_eq!(place.git(&path, &["diff", "--name-only", "main", "agent/made"]), "x");
}

#[test]
fn the_agents_own_commits_come_along_unless_they_touch_what_is_kept_out() {
    let place = Place::new();
    let (path, commit) = place.repository("r");
    place.sh(&path, "cp -a . ../cell; cd ../cell; echo 2 >> a.txt; git commit -qam two; echo x > ci.yml; git add .; git commit -qm three; echo 4 >> a.txt");
    let cell = place.path("cell");
    let into = place.path("bundle");
    let argv = super::super::commits::bundle_command(
        cell.to_str().expect("text"),
        Some(&commit),
        into.to_str().expect("text"),
        1 << 20,
    );
    let output = place.command(&argv[0], &path).args(&argv[1..]).output().expect("ran");
    assert!(output.status.success(), "{output:?}");
    let (_dir, shelf) = shelf();
    let mut changes = set(between(&shelf, &path, &cell), Some(&commit));
    let mut bundle = std::fs::File::open(&into).expect("made");
    let (temporary, limits) = (crate::git::temporary(), BundleLimits::default());
    let commits = import_bundle(&mut bundle, &shelf, &path, &place.who, Some(&commit), &temporary, &limits);
    let commits = commits.expect("taken in").expect("new ones");
    assert_eq!((commits.tip.as_str(), commits.count), (place.git(&cell, &["rev-parse", "HEAD"]).as_str(), 2));
    changes.commits = Some(commits.clone());
    let made = branch(&place, &path, &shelf, &changes, Include::Plain).expect("made");
    assert!(made.notes.is_empty(), "{made:?}");
    let log = place.git(&path, &["log", "--format=%s", "main..agent/made"]);
    assert_eq!(log, "What the agent left without a commit\nthree\ntwo");
    assert_eq!(place.git(&path, &["rev-parse", "agent/made~1"]), commits.tip);
    place.git(&path, &["branch", "-D", "-q", "agent/made"]);
    changes
        .entries
        .iter_mut()
        .filter(|e| e.path.as_bytes() == b"ci.yml")
        .for_each(|e| e.verdict = Verdict::Flagged);
    let made = branch(&place, &path, &shelf, &changes, Include::Plain).expect("made");
    assert!(made.notes.iter().any(|note| note.contains("ci.yml")), "{made:?}");
    assert_eq!(place.git(&path, &["log", "--format=%s", "main..agent/made"]), "Work of an agent");
    assert_eq!(place.git(&path, &["diff", "--name-only", "main", "agent/made"]), "a.txt");
}

const DIE: &str = "HOTCELL_TEST_BRANCH_DIES";

/// Not a test of its own: what the next one runs in processes that die.
#[test]
fn child_that_dies_while_it_makes_a_branch() {
    let Ok(order) = std::env::var(DIE) else { return };
    let (die_at, top) = order.split_once(':').expect("step:dir");
    let (die_at, top) = (die_at.parse::<u32>().expect("a number"), Path::new(top));
    let shelf = crate::changes::Shelf::new(top.join("shelf")).of(&JobId::new(1, 1));
    let (changes, _) = shelf.changes().expect("read").expect("there");
    let who = crate::git::testing::somebody();
    let count = std::sync::atomic::AtomicU32::new(0);
    let step: Step = Arc::new(move || {
        if count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == die_at {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
        Ok(())
    });
    let (job, author) = (JobId::new(1, 1), author());
    let wanted = Build {
        shelf: &shelf,
        changes: &changes,
        job: &job,
        path: &top.join("r"),
        identity: &who,
        author: &author,
        message: None,
        include: Include::Plain,
        only: &[],
        now_s: 1_700_000_000,
        temporary: &top.join("temporary"),
    };
    stepwise("agent/made", &wanted, step).expect("dies before");
}

#[test]
fn a_process_killed_at_any_step_leaves_a_branch_or_none_and_no_lock() {
    let (mut none, mut whole) = (0, 0);
    for die_at in 0.. {
        let place = Place::new();
        let (path, commit) = place.repository("r");
        let top = place.path("");
        // Only the submitter's repository is theirs.
        std::fs::create_dir(top.join("temporary")).expect("made");
        std::fs::create_dir(top.join("shelf")).expect("made");
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(top.join("temporary"), open).expect("opened");
        let shelf = crate::changes::Shelf::new(top.join("shelf")).of(&JobId::new(1, 1));
        shelf.create().expect("made");
        let new = Some(file(&shelf, b"one\n2\nthree\n", 0o644));
        let old = Some(file(&shelf, b"one\ntwo\nthree\n", 0o644));
        let changes = set(vec![entry("a.txt", old, new)], Some(&commit));
        shelf.put_changes(&changes).expect("kept");
        let before = state(&place, &path);
        let child = std::process::Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "changes::branch::tests::child_that_dies_while_it_makes_a_branch"])
            .env(DIE, format!("{die_at}:{}", top.display()))
            .output()
            .expect("ran");
        let signal = std::os::unix::process::ExitStatusExt::signal(&child.status);
        assert!(child.status.success() || signal == Some(libc::SIGKILL), "{child:?}");
        let died = signal.is_some();
        assert_eq!(recover(&shelf).expect("put right"), usize::from(died), "step {die_at}");
        let left = place.sh(&path, "find .git -name '*.lock' -o -name 'tmp_*'; for p in .git/objects/pack/*.pack; do [ ! -e $p ] || [ -e ${p%.pack}.idx ] || echo $p; done");
        assert_eq!(left, "", "step {die_at}");
        let notes = std::fs::read_dir(shelf.dir()).expect("listed");
        assert!(notes.flatten().all(|entry| !entry.file_name().to_string_lossy().starts_with(PREFIX)));
        assert_eq!(state(&place, &path), before, "step {die_at}");
        match place.git(&path, &["branch", "--list", "agent/made"]).is_empty() {
            true => {
                none += 1;
                branch(&place, &path, &shelf, &changes, Include::Plain).expect("again");
            }
            false => whole += 1,
        }
        assert_eq!(place.git(&path, &["show", "agent/made:a.txt"]), "one\n2\nthree");
        place.git(&path, &["fsck", "--strict"]);
        if !died {
            break;
        }
    }
    assert!(none > 5 && whole > 0, "{none} {whole}");
}

#[test]
fn a_lock_of_somebody_elses_stays() {
    let place = Place::new();
    let (path, commit) = place.repository("r");
    let (_dir, shelf) = shelf();
    let new = Some(file(&shelf, b"new\n", 0o644));
    let changes = set(vec![entry("new.txt", None, new)], Some(&commit));
    place.sh(&path, "mkdir -p .git/refs/heads/agent; echo theirs >.git/refs/heads/agent/made.lock");
    let made = branch(&place, &path, &shelf, &changes, Include::Plain);
    assert!(matches!(made, Err(BranchError::Ref(RefError::Locked { .. }))), "{made:?}");
    assert_eq!(place.sh(&path, "cd .git/refs/heads/agent; ls; cat made.lock"), "made.lock\ntheirs");
}
