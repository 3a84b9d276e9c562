//! A repository that makes git run things, as the workspace of a job: nothing of ours that reads it ever runs them.

use super::*;

/// `$M`: a program outside the workspace that leaves a marker beside itself.
const POISON: &str = "git config core.fsmonitor $M; git config core.hooksPath $PWD/h; mkdir h; \
    for h in post-checkout post-commit pre-commit reference-transaction post-index-change pre-auto-gc post-rewrite post-merge prepare-commit-msg commit-msg; do \
      cp $M h/$h; cp $M .git/hooks/$h; done; \
    for f in clean smudge process; do git config filter.x.$f $M; done; git config filter.x.required true; \
    git config diff.x.textconv $M; git config diff.x.command $M; git config diff.external $M; git config merge.x.driver $M; \
    git config merge.default x; git config core.pager $M; git config core.editor $M; git config core.askPass $M; git config core.sshCommand $M; \
    git config core.gitProxy $M; git config gpg.program $M; git config commit.gpgSign true; git config log.showSignature true; \
    git config credential.helper \"!$M\"; git config uploadpack.packObjectsHook $M; git config core.alternateRefsCommand $M; \
    git config alias.fast-import \"!$M\"; git config trailer.x.command $M; git config interactive.diffFilter $M; \
    printf '[core]\\n\\tfsmonitor = %s\\n' $M >../inc; git config include.path $PWD/../inc; \
    echo '* filter=x diff=x merge=x' >.git/info/attributes; echo '* filter=x diff=x merge=x' >.gitattributes; \
    printf '[submodule \"s\"]\\n\\tpath = s\\n\\turl = ext::%s\\n\\tupdate = !%s\\n' $M $M >.gitmodules; \
    mkdir -p .git/modules/s/hooks s/.git/hooks; cp $M .git/modules/s/hooks/post-checkout; cp .git/config s/.git/config; \
    printf 'ref: refs/heads/main\\n' >s/.git/HEAD; mkdir -p s/.git/objects s/.git/refs; cp $M s/.git/hooks/post-checkout";

/// The agent adds poison of its own to its copy.
const AGENT: &str = "echo agent >>text.txt; echo new >new.txt; git config core.fsmonitor /workspace/mark.sh; \
    printf '#!/bin/sh\\n' >mark.sh; echo '* filter=y' >.git/info/attributes; true";

#[test]
fn nothing_of_a_poisoned_repository_ever_runs() {
    let world = World::new(&script(&[("poisoned", AGENT)]));
    let dir = repository(&world, "repo", "printf '1\\n2\\n3\\n4\\n5\\n' >text.txt; echo b >b.txt");
    let traps = world.workspace("traps", ANN);
    let mark = traps.join("mark");
    sh(&traps, "printf '#!/bin/sh\\necho \"$0 $*\" >>%s\\ncat\\n' $PWD/MARKER >mark; chmod 755 mark; chmod 777 .");
    let parent = dir.parent().unwrap().to_owned();
    std::fs::write(parent.join("inc"), "").unwrap();
    std::os::unix::fs::chown(parent.join("inc"), Some(ANN), Some(ANN)).unwrap();
    sh(&dir, &format!("M={}; {POISON}", mark.display()));
    // It works: the person's own git runs it.
    sh(&dir, "git status >/dev/null 2>&1 || true");
    let marker = traps.join("MARKER");
    assert!(marker.exists(), "the trap does not work");
    std::fs::remove_file(&marker).unwrap();
    let quiet = |what: &str| {
        let said = std::fs::read_to_string(&marker).unwrap_or_default();
        assert!(said.is_empty(), "{what} ran something of the repository's: {said}");
    };

    let (id, ..) = job(&world, "poisoned", &dir);
    quiet("the job");
    let out = traps.display().to_string();
    for args in [
        &["diff", &id][..],
        &["diff", &id, "--stat"],
        &["diff", &id, "--name-only"],
        &["diff", &id, "--json"],
        &["export", &id],
        &["export", &id, "--format", "tar"],
        &["checkout", &id, &format!("{out}/checked")],
        &["apply", &id, "--check"],
    ] {
        let (code, _, err) = output_of(&world, args);
        assert_eq!(code, 0, "{args:?}: {err}");
        quiet(&args.join(" "));
    }
    // These may refuse such a repository by name, and run nothing either way.
    for args in [
        &["export", &id, "--format", "bundle"][..],
        &["apply", &id, "--branch", "agent/one"],
        &["apply", &id, "--branch", "agent/two", "--include-flagged"],
    ] {
        let (code, _, err) = output_of(&world, args);
        assert!(code == 0 || err.lines().count() >= 2, "{args:?}: {err}");
        eprintln!("{args:?}: {code} {err}");
        quiet(&args.join(" "));
    }
    sh(&dir, "sed -i 's/^1$/ONE/' text.txt");
    ann(&world, &["apply", &id, "--3way", "--include-flagged"]);
    quiet("apply --3way");
    assert_eq!(std::fs::read_to_string(dir.join("text.txt")).unwrap(), "ONE\n2\n3\n4\n5\nagent\n");
    assert!(std::fs::read_to_string(dir.join(".git/config")).unwrap().contains(&mark.display().to_string()));
    world.end();
}

/// Of bytes, since an archive is none.
fn output_of(world: &World, args: &[&str]) -> (i32, usize, String) {
    let output = command(world, ANN, args).output().unwrap();
    (output.status.code().unwrap_or(-1), output.stdout.len(), String::from_utf8_lossy(&output.stderr).into_owned())
}
