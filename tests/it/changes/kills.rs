//! kill -9 of the daemon at every point of a change's road: what was done is whole, what was not is not half done, and
//! nothing is left.

use std::os::unix::process::CommandExt;
use std::time::Duration;

use serde_json::json;

use super::*;
use crate::fake_agent::{self, done, until_event, until_state};

const FILES: u64 = 400;

fn fake(task: &str, dir: &Path) -> Value {
    let mut spec = fake_agent::spec(task);
    spec["workspace"] = json!({ "path": dir, "mode": "copy" });
    spec
}

/// The job is done, its change set is what it did, and nothing else is left of it.
#[track_caller]
fn complete(world: &mut World, id: &str, expected: &[&str]) {
    let (_, view) = done(world, id);
    assert_eq!(view["outcome"], "succeeded", "{view:#}\n{}", world.log());
    let set = ann_json(world, &["diff", id, "--json"]);
    let found = paths(&set["entries"]);
    assert!(found == expected, "{} entries: {found:?}\n{}", found.len(), world.log());
    assert_eq!(view["totals"]["changes"]["hash"], set["summary"]["hash"]);
    world.nothing_left();
}

fn restart(world: &mut World) {
    world.kill();
    world.start();
}

#[test]
fn a_job_whose_daemon_is_killed_has_its_change_set_whole() {
    let mut world = fake_agent::world("");
    let dir = world.workspace("work", ANN);
    sh(&dir, "echo base >base");
    let before = sh(&dir, ALL);
    // Before its cell is ready.
    let mut slow = fake("write a x", &dir);
    slow["env"] = json!({ "FAKE_BOOT": "1000" });
    let id = submit(&world, &slow);
    until_state(&mut world, &id, "preparing");
    restart(&mut world);
    complete(&mut world, &id, &["a"]);
    // While it works, and while nobody looks.
    let id = submit(&world, &fake("write a x; sleep 1; write base y; sleep 2; write c z", &dir));
    until_event(&mut world, &id, "\"wrote\":\"a\"");
    restart(&mut world);
    complete(&mut world, &id, &["a", "base", "c"]);
    // While its changes are taken out, at several points.
    let mut all: Vec<String> = (0..FILES).map(|n| format!("filled-{n}")).collect();
    all.sort();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    for wait_ms in [0, 30, 100, 250, 500] {
        let id = submit(&world, &fake(&format!("fill {FILES}"), &dir));
        world.wait_for("it is collected", |world| {
            matches!(&*world.sql(&format!("SELECT state FROM jobs WHERE id = '{id}'")), "collecting" | "done")
        });
        // Not to be in time with anything: any moment must do.
        std::thread::sleep(Duration::from_millis(wait_ms));
        restart(&mut world);
        complete(&mut world, &id, &all);
    }
    assert_eq!(sh(&dir, ALL), before);
    world.end();
}

#[test]
fn an_application_whose_daemon_is_killed_is_done_or_undone_when_the_next_one_answers() {
    let mut world = fake_agent::world("");
    let dir = world.workspace("work", ANN);
    sh(&dir, "echo base >base");
    let id = submit(&world, &fake(&format!("fill {FILES}; write base x"), &dir));
    done(&mut world, &id);
    let before = sh(&dir, TREE);
    let after = {
        let to = dir.with_extension("after").display().to_string();
        let parent = dir.parent().unwrap();
        std::os::unix::fs::chown(parent, Some(ANN), Some(ANN)).unwrap();
        ann(&world, &["checkout", &id, &to]);
        std::os::unix::fs::chown(parent, Some(0), Some(0)).unwrap();
        sh(Path::new(&to), TREE)
    };
    let (mut undone, mut all_done) = (0, 0);
    for wait_ms in [0, 5, 15, 30, 60, 100, 150, 250, 400] {
        sh(&dir, "rm -f filled-*; echo base >base");
        let mut applying = command(&world, ANN, &["apply", &id]);
        let mut applying =
            applying.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn().unwrap();
        let begun = world.state_dir().join("changes").join(&id).join("apply");
        world.wait_for("it begins", |_| begun.exists() || applying.try_wait().unwrap().is_some());
        std::thread::sleep(Duration::from_millis(wait_ms));
        world.kill();
        applying.wait().unwrap();
        world.start();
        let now = sh(&dir, TREE);
        assert!(
            now == before || now == after,
            "after {wait_ms} ms neither before nor after:\n{now}\n{}",
            world.log()
        );
        if now == before {
            undone += 1
        } else {
            all_done += 1
        }
        world.nothing_left();
    }
    eprintln!("killed while it was applied: {undone} undone, {all_done} done");
    sh(&dir, "rm -f filled-*; echo base >base");
    ann(&world, &["apply", &id]);
    assert_eq!(sh(&dir, TREE), after);
    world.end();
}

#[test]
fn a_job_whose_daemon_is_killed_at_any_moment_of_its_preparation_is_done_once_and_whole() {
    let mut world = fake_agent::world("");
    let dir =
        repository(&world, "work", "echo base >base; echo SECRET=1 >.env; mkdir deep; echo d >deep/.npmrc");
    let before = sh(&dir, ALL);
    for wait_ms in [0, 10, 25, 50, 80, 120, 180, 260, 360, 500] {
        let id = submit(&world, &fake("write a x; write base y", &dir));
        // Not to be in time with anything: any moment must do.
        std::thread::sleep(Duration::from_millis(wait_ms));
        let state = world.sql(&format!("SELECT state FROM jobs WHERE id = '{id}'"));
        restart(&mut world);
        eprintln!("killed after {wait_ms} ms: {state}");
        complete(&mut world, &id, &["a", "base"]);
    }
    assert_eq!(sh(&dir, ALL), before);
    world.end();
}

#[test]
fn a_checkout_whose_daemon_is_killed_is_whole_or_not_there_when_the_next_one_answers() {
    let mut world = fake_agent::world("");
    let dir = world.workspace("work", ANN);
    sh(&dir, "echo base >base; mkdir many; for n in $(seq 2000); do echo $n >many/$n; done");
    let id = submit(&world, &fake(&format!("fill {FILES}; write base x"), &dir));
    done(&mut world, &id);
    let place = world.workspace("place", ANN);
    let to = |name: &str| place.join(name).display().to_string();
    ann(&world, &["checkout", &id, &to("whole")]);
    let whole = sh(&place.join("whole"), TREE);
    let notes = world.state_dir().join("changes").join(&id);
    let noted = || {
        let listed = std::fs::read_dir(&notes).unwrap().flatten();
        listed.filter(|entry| entry.file_name().to_string_lossy().starts_with("checkout-")).count()
    };
    let (mut gone, mut there) = (0, 0);
    for wait_ms in [0, 5, 15, 30, 60, 100, 200, 400] {
        let (name, path) = (format!("out-{wait_ms}"), to(&format!("out-{wait_ms}")));
        let mut making = command(&world, ANN, &["checkout", &id, &path]);
        let mut making = making.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn().unwrap();
        world.wait_for("it begins", |_| noted() > 0 || making.try_wait().unwrap().is_some());
        std::thread::sleep(Duration::from_millis(wait_ms));
        world.kill();
        making.wait().unwrap();
        world.start();
        let mut left: Vec<String> = std::fs::read_dir(&place)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name != "whole")
            .collect();
        match left.pop() {
            None => {
                gone += 1;
                ann(&world, &["checkout", &id, &path]);
            }
            Some(made) => {
                assert_eq!(made, name, "{}", world.log());
                there += 1;
            }
        }
        assert!(left.is_empty(), "{left:?}\n{}", world.log());
        assert_eq!(sh(&place.join(&name), TREE), whole, "after {wait_ms} ms");
        sh(&place, &format!("rm -r {name}"));
        world.nothing_left();
    }
    eprintln!("killed while it was checked out: {gone} gone, {there} whole");
    assert!(gone > 0, "it was always too late");
    world.end();
}

#[test]
fn a_branch_whose_daemon_is_killed_is_whole_or_not_there_and_can_be_made_again() {
    let mut world = fake_agent::world("");
    let dir = repository(&world, "repo", "echo base >base");
    let id = submit(&world, &fake(&format!("fill {FILES}; write base x"), &dir));
    done(&mut world, &id);
    ann(&world, &["apply", &id, "--branch", "whole"]);
    let tree = sh(&dir, "git rev-parse whole^{tree}");
    let work_tree = sh(&dir, TREE);
    let (mut gone, mut there) = (0, 0);
    for wait_ms in [0, 20, 50, 80, 110, 140, 170, 200, 250, 320, 400] {
        let name = format!("agent/after-{wait_ms}");
        let mut making = command(&world, ANN, &["apply", &id, "--branch", &name]);
        let mut making = making.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn().unwrap();
        // Not to be in time with anything: any moment must do.
        std::thread::sleep(Duration::from_millis(wait_ms));
        world.kill();
        making.wait().unwrap();
        world.start();
        let half = sh(&dir, "find .git -name '*.lock' -o -name 'tmp_*'");
        assert_eq!(half, "", "after {wait_ms} ms\n{}", world.log());
        match sh(&dir, &format!("git branch --list {name}")).is_empty() {
            true => {
                gone += 1;
                ann(&world, &["apply", &id, "--branch", &name]);
            }
            false => there += 1,
        }
        assert_eq!(sh(&dir, &format!("git rev-parse {name}^{{tree}}")), tree);
        sh(&dir, "git fsck --strict 2>&1 | grep -v dangling && exit 1 || true");
        world.nothing_left();
    }
    eprintln!("killed while a branch was made: {gone} not there, {there} whole");
    assert!(gone > 0, "it was always too late");
    assert_eq!(sh(&dir, TREE), work_tree, "the work tree is as it was");
    world.end();
}
