//! Repositories that make git run things, and every way of ours that reads one: nothing of theirs ever runs. By a
//! second uid where the tests run as root. Each poison is first shown to work on the person's own git.

use std::path::Path;

use crate::change::{ChangeSet, Flag, Verdict};
use crate::changes::apply::{Apply, Checkout, Wish, apply, checkout};
use crate::changes::branch::{Build, create};
use crate::changes::choose::Include;
use crate::changes::commits::{BundleLimits, import_bundle};
use crate::changes::export;
use crate::changes::patch::{Form, Render, render};
use crate::changes::shelf::JobShelf;
use crate::changes::testing::{entry, file, set, shelf};
use crate::git::head::head_of;
use crate::git::identity::GitIdentity;
use crate::git::testing::Place;
use crate::job::JobId;

/// Runs in the repository; `$mark` is a program that leaves the marker and passes its input on. The second part is
/// what the person would do for it to run; without one it lies in wait for something that is not done here.
const POISONS: [(&str, &str, &str); 24] = [
    ("fsmonitor", "git config core.fsmonitor $mark", "git status"),
    ("hooks", "for h in $hooks; do cp $mark .git/hooks/$h; done", "git commit -qm x --allow-empty"),
    (
        "hooks path",
        "mkdir h; for h in $hooks; do cp $mark h/$h; done; git config core.hooksPath $PWD/h",
        "git commit -qm x --allow-empty",
    ),
    (
        "clean filter",
        "git config filter.x.clean $mark; echo '* filter=x' > .git/info/attributes",
        "touch a.txt; git add --renormalize .",
    ),
    (
        "smudge filter",
        "git config filter.x.smudge $mark; echo '* filter=x' > .gitattributes; git add .; git commit -qm x",
        "rm a.txt; git checkout a.txt",
    ),
    (
        "process filter",
        "git config filter.x.process $mark; git config filter.x.required true; echo '* filter=x' > .gitattributes",
        "touch a.txt; git add --renormalize .",
    ),
    ("textconv", "git config diff.x.textconv $mark; echo '* diff=x' > .git/info/attributes", "git log -p"),
    (
        "diff command",
        "git config diff.x.command $mark; echo '* diff=x' > .gitattributes",
        "echo x >> a.txt; git diff",
    ),
    ("external diff", "git config diff.external $mark", "echo x >> a.txt; git diff"),
    (
        "merge driver",
        "git config merge.x.driver $mark; git config merge.default x; echo '* merge=x' > .git/info/attributes",
        "git checkout -qb s; echo s > a.txt; git commit -qam s; git checkout -q main; echo m > a.txt; git commit -qam m; git merge s",
    ),
    (
        "credential helper",
        "git config credential.helper \"!$mark\"; git config core.askPass $mark",
        "printf 'protocol=https\\nhost=x\\n\\n' | git credential fill",
    ),
    ("alias", "git config alias.fast-imports \"!$mark\"; git config alias.st \"!$mark\"", "git st"),
    (
        "pager",
        "git config core.pager $mark; git config pager.log $mark; git config pager.diff-tree $mark",
        // It needs a terminal.
        "",
    ),
    ("editor", "git config core.editor $mark; git config sequence.editor $mark", "git commit --allow-empty"),
    (
        "signing",
        "git config gpg.program $mark; git config commit.gpgSign true; git config log.showSignature true",
        "git commit -qm x --allow-empty",
    ),
    (
        "transport",
        "git config core.sshCommand $mark; git config core.gitProxy $mark; git remote add origin ssh://x/y; git config remote.origin.uploadpack $mark; git config remote.origin.receivepack $mark; git config uploadpack.packObjectsHook $mark",
        "sed -i /cat/d $mark; git fetch origin",
    ),
    (
        "include",
        "printf '[core]\\n\\tfsmonitor = %s\\n' $mark > ../inc; git config include.path $PWD/../inc; git config includeIf.gitdir:/.path $PWD/../inc",
        "git status",
    ),
    (
        "work tree config",
        "git config extensions.worktreeConfig true; git config --worktree core.fsmonitor $mark",
        "git status",
    ),
    (
        "trailer command",
        "git config trailer.x.command $mark; git config trailer.x.key x; git config trailer.ifexists replace",
        "echo x | git interpret-trailers",
    ),
    (
        "submodule",
        "git init -q sub; git -C sub commit -q --allow-empty -m s; git add sub 2>&-; git commit -qm sub; git -C sub config core.fsmonitor $mark",
        "git status",
    ),
    (
        "commondir",
        "cp -a .git ../common; git --git-dir=../common config core.fsmonitor $mark; echo ../../common > .git/commondir",
        "git status",
    ),
    (
        "git file",
        "mv .git ../elsewhere; echo gitdir: ../elsewhere > .git; git config core.fsmonitor $mark",
        "git status",
    ),
    (
        "alternates",
        "cp -a . ../lender; git -C ../lender config core.fsmonitor $mark; git config core.alternateRefsCommand $mark; echo $PWD/../lender/.git/objects > .git/objects/info/alternates",
        "",
    ),
    (
        "partial clone",
        "git config core.repositoryformatversion 1; git config extensions.partialClone origin; git config remote.origin.url ext::$mark; git config remote.origin.promisor true; git config protocol.ext.allow always",
        "sed -i /cat/d $mark; git cat-file -p 7777777777777777777777777777777777777777",
    ),
];
const HOOKS: &str = "applypatch-msg pre-applypatch post-applypatch pre-commit pre-merge-commit prepare-commit-msg \
    commit-msg post-commit pre-rebase post-checkout post-merge pre-push pre-receive update proc-receive post-receive \
    post-update reference-transaction push-to-checkout pre-auto-gc post-rewrite sendemail-validate \
    fsmonitor-watchman p4-changelist post-index-change";

struct World {
    place: Place,
    path: std::path::PathBuf,
    commit: String,
    script: String,
}

fn world(poison: &str) -> World {
    let place = Place::new();
    let (path, _) = place.repository("r");
    place.sh(
        &place.path(""),
        "printf '#!/bin/sh\\n: > %s/marker\\ncat\\n' \"$PWD\" > mark; chmod 755 mark; chmod 777 .",
    );
    let script = format!("mark={}; hooks='{HOOKS}'; ", place.path("mark").display());
    place.sh(&path, &format!("{script}{poison}; rm -f ../marker"));
    // What the poison needs may have made commits.
    let commit = place.git(&path, &["--no-pager", "-c", "core.fsmonitor=false", "rev-parse", "HEAD"]);
    place.sh(&path, "rm -f ../marker");
    World { place, path, commit, script }
}

impl World {
    fn marked(&self) -> bool {
        self.place.path("marker").exists()
    }
}

/// A change set with what a poisoned tree would bring.
fn changes(shelf: &JobShelf, commit: &str) -> ChangeSet {
    let new = |content: &[u8]| Some(file(shelf, content, 0o644));
    let attributes = b"* filter=x diff=x merge=x text ident working-tree-encoding=UTF-16\n";
    let mut hook = entry(".git/hooks/pre-commit", None, new(b"#!/bin/sh\n"));
    (hook.flags, hook.verdict) = (vec![Flag::Git], Verdict::Flagged);
    let entries = vec![
        entry(".gitattributes", None, new(attributes)),
        entry("a.txt", new(b"one\ntwo\nthree\n"), new(b"one\n2\n$Id$\n")),
        entry("dir/b.txt", new(b"b\n"), None),
        hook,
    ];
    set(entries, Some(commit))
}

/// Every way of ours, and what each said.
fn all_ways(world: &World, shelf: &JobShelf) -> Vec<(&'static str, Result<(), String>)> {
    fn said<T>(result: Result<T, impl std::fmt::Display>) -> Result<(), String> {
        result.map(drop).map_err(|error| error.to_string())
    }
    let (temporary, job) = (crate::git::temporary(), JobId::new(1, 1));
    let changes = changes(shelf, &world.commit);
    let author = GitIdentity::new("Ann", "a@b", "ann", "box");
    let wanted = Build {
        shelf,
        changes: &changes,
        job: &job,
        path: &world.path,
        identity: &world.place.who,
        author: &author,
        message: None,
        include: Include::Flagged,
        only: &[],
        now_s: 1_700_000_000,
        temporary: &temporary,
    };
    let form = |form| {
        let (only, include, colour, width) = (&[][..], Include::All, false, 80);
        let bytes_max = 1 << 20;
        said(render(
            shelf,
            &changes,
            &Render { form, only, include, colour, width, bytes_max, temporary: &temporary },
        ))
    };
    let open = |path: &Path| std::os::fd::OwnedFd::from(std::fs::File::open(path).expect("opened"));
    let applied = |path: &Path, check| {
        // The hook and the attributes may be there already, with the poison in them.
        let only = vec!["/a.txt".to_owned(), "/dir".to_owned()];
        let wish = Wish { include_flagged: true, three_way: true, check, only };
        let (identity, target) = (&world.place.who, open(path));
        let done = apply(&Apply { shelf, changes: &changes, target, path, identity, wish: &wish });
        said(done.map(|done| assert!(!check || done.merged.is_empty())))
    };
    let to = world.place.path("checked-out");
    let out = Checkout {
        shelf,
        changes: &changes,
        original: Some(open(&world.path)),
        original_path: &world.path,
        dir: &to,
        identity: &world.place.who,
    };
    let dir = std::fs::File::open(&world.path).expect("opened");
    let head = head_of(std::os::fd::AsFd::as_fd(&dir)).and_then(|head| head.commit);
    let mut bundle = std::fs::File::open(world.place.path("b")).expect("made");
    let (base, limits) = (Some(world.commit.as_str()), BundleLimits::default());
    vec![
        ("head", if head.as_deref() == base { Ok(()) } else { Err(format!("{head:?}")) }),
        ("patch", form(Form::Patch)),
        ("stat", form(Form::Stat)),
        ("tar", said(export::tar(shelf, &changes, Include::All, &[], 0, &mut Vec::new()))),
        (
            "import",
            said(import_bundle(&mut bundle, shelf, &world.path, &world.place.who, base, &temporary, &limits)),
        ),
        ("bundle", said(export::bundle(&wanted, &mut Vec::new()))),
        ("branch", said(create("agent", &wanted))),
        ("check", applied(&world.path, true)),
        ("apply", applied(&world.place.path("applied"), false)),
        ("checkout", said(checkout(&out))),
    ]
}

/// A bundle of a commit of the agent's, made in a clean clone.
fn agents_bundle(world: &World, from: &Path) {
    let head = world.commit.clone();
    world.place.sh(
        &world.place.path(""),
        &format!(
            "git clone -q --no-local {from:?} clean; cd clean; echo c > c; git add c; git commit -qm c; \
             git bundle create -q ../b HEAD ^{head}"
        ),
    );
}

#[test]
fn no_poison_of_a_repository_ever_runs() {
    for (name, poison, bait) in POISONS {
        let world = world(poison);
        // Before the poison is tried: objects through a copy that has no configuration.
        world.place.sh(
            &world.place.path(""),
            "git init -q --bare pure; top=$(cd r; cat .git/commondir 2>&- || echo .); \
             d=r/.git; [ -d $d ] || d=elsewhere; [ -d $d/$top/objects ] || top=.; cp -a $d/$top/objects pure/; \
             rm -f pure/objects/info/alternates",
        );
        world.place.sh(
            &world.place.path("pure"),
            &format!(
                "git update-ref refs/heads/main {}; git symbolic-ref HEAD refs/heads/main",
                world.commit
            ),
        );
        agents_bundle(&world, &world.place.path("pure"));
        // One that may be written to, and that its person has edited meanwhile.
        world.place.sh(
            &world.place.path(""),
            "cp -a r applied; printf 'zero\\none\\ntwo\\nthree\\n' > applied/a.txt",
        );
        assert!(!world.marked(), "{name}: before");
        let (_dir, shelf) = shelf();
        for (way, said) in all_ways(&world, &shelf) {
            assert!(!world.marked(), "{name}: {way} ran it");
            assert_eq!(said, Ok(()), "{name}: {way}");
        }
        if !bait.is_empty() {
            let script = format!("{} set +e; {bait}", world.script);
            let _ = world.place.command("sh", &world.path).args(["-c", &script]).output().expect("ran");
            assert!(world.marked(), "{name}: the poison itself works");
        }
    }
}
