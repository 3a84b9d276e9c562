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
        let mut applying = applying.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn().unwrap();
        let begun = world.state_dir().join("changes").join(&id).join("apply");
        world.wait_for("it begins", |_| begun.exists() || applying.try_wait().unwrap().is_some());
        std::thread::sleep(Duration::from_millis(wait_ms));
        world.kill();
        applying.wait().unwrap();
        world.start();
        let now = sh(&dir, TREE);
        assert!(now == before || now == after, "after {wait_ms} ms neither before nor after:\n{now}\n{}", world.log());
        if now == before { undone += 1 } else { all_done += 1 }
        world.nothing_left();
    }
    eprintln!("killed while it was applied: {undone} undone, {all_done} done");
    sh(&dir, "rm -f filled-*; echo base >base");
    ann(&world, &["apply", &id]);
    assert_eq!(sh(&dir, TREE), after);
    world.end();
}
