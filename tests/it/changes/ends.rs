//! However a job ends, what it changed is there: failed, cancelled, out of time, out of money, and parked.

use serde_json::json;

use super::*;
use crate::fake_agent::{self, done, until_event, until_state};

/// A job of the made-up agent's on a copy of `dir`.
fn fake(task: &str, dir: &Path) -> Value {
    let mut spec = fake_agent::spec(task);
    spec["workspace"] = json!({ "path": dir, "mode": "copy" });
    spec
}

/// What the job's change set says that it added or changed, and applies.
#[track_caller]
fn applied(world: &World, id: &str) -> Vec<String> {
    let applied = ann_json(world, &["apply", id, "--json"]);
    paths(&applied["applied"]).into_iter().map(str::to_owned).collect()
}

#[test]
fn a_job_that_fails_is_cancelled_or_runs_out_of_time_has_its_change_set() {
    let mut world = fake_agent::world("limits.cancel_grace_s = 2\n");
    let dir = world.workspace("work", ANN);
    let failing = submit(&world, &fake("write failing x; exit 3", &dir));
    let cancelled = submit(&world, &fake("write cancelled x; sleep 600", &dir));
    let mut late = fake("write late x; sleep 600", &dir);
    late["limits"]["wall_s"] = json!(3);
    let late = submit(&world, &late);
    until_event(&mut world, &cancelled, "\"wrote\"");
    ann(&world, &["cancel", &cancelled]);
    for (id, outcome, reason, name) in [
        (&failing, "failed", "agent_error", "failing"),
        (&cancelled, "stopped", "cancelled", "cancelled"),
        (&late, "stopped", "deadline", "late"),
    ] {
        let (events, view) = done(&mut world, id);
        assert_eq!((&view["outcome"], &view["reason"]), (&json!(outcome), &json!(reason)), "{view}");
        assert_eq!(view["totals"]["changes"]["added"], 1, "{view:#}");
        assert!(events.iter().any(|e| e["type"] == "changes" && e["added"] == 1));
        assert_eq!(applied(&world, id), [name]);
    }
    // Nothing changed: an empty change set, which is none to apply.
    let idle = submit(&world, &fake("print 1 1", &dir));
    let (_, view) = done(&mut world, &idle);
    assert_eq!(view["totals"]["changes"]["entries"], 0, "{view:#}");
    let (code, _, err) = run_as(&world, ANN, &["apply", &idle]);
    assert!(code == 2 && err.contains("nothing to apply"), "{code}: {err}");
    assert_eq!(ann(&world, &["diff", &idle]), "");
    assert_eq!(sh(&dir, "ls"), "cancelled\nfailing\nlate\n");
    world.end();
}

#[test]
fn a_job_that_the_model_fails_or_the_budget_stops_has_its_change_set() {
    let broken = "[[reply]]\nwhen = { prompt = \"broken\", turn_from = 1, tools = true }\n\
        fault = { status = 400, type = \"invalid_request_error\", message = \"no\" }\n";
    // It writes, and asks for what it cannot pay.
    let dear = format!(
        "[[reply]]\nwhen = {{ prompt = \"dear\", turn_from = 1, tools = true }}\nusage = {{ input = 30000, output = 20000 }}\nblocks = [{}]\n",
        bash("sleep 50")
    );
    let text = script(&[("broken", "echo x >broken"), ("dear", "echo x >dear")]);
    let (head, tail) = text.split_once("[default]").unwrap();
    let text = format!("{head}{dear}{broken}[default]{tail}");
    let world = World::new(&text);
    let dir = world.workspace("work", ANN);
    let mut poor = spec("dear", &dir);
    poor["limits"]["cost_usd"] = json!(0.3);
    let jobs = [submit(&world, &spec("broken", &dir)), submit(&world, &poor)];
    for (id, outcome, name) in [(&jobs[0], "failed", "broken"), (&jobs[1], "stopped", "dear")] {
        world.follow(id);
        let view = world.show(id);
        assert_eq!(view["outcome"], outcome, "{view:#}");
        assert_eq!(applied(&world, id), [name]);
    }
    assert_eq!(world.show(&jobs[1])["reason"], "budget");
    world.end();
}

#[test]
fn what_cannot_be_taken_out_of_a_copy_is_kept_and_taken_out_when_it_can_be() {
    let mut world = fake_agent::world("limits.cancel_grace_s = 2\n");
    let dir = world.workspace("work", ANN);
    for again in [true, false] {
        let id = submit(&world, &fake("write a x; sleep 600", &dir));
        until_event(&mut world, &id, "\"wrote\"");
        let shelf = world.state_dir().join("changes").join(&id);
        // Nothing can be written there.
        let in_the_way = shelf.join("changes.new");
        std::fs::create_dir(&in_the_way).unwrap();
        ann(&world, &["cancel", &id]);
        let (events, view) = done(&mut world, &id);
        assert_eq!(view["totals"]["changes"], Value::Null, "{view:#}");
        let note = events.iter().filter_map(|e| e["text"].as_str()).find(|t| t.contains("its copy is kept"));
        assert!(note.is_some_and(|note| note.contains("try again")), "{events:#?}");
        let (code, _, err) = run_as(&world, ANN, &["diff", &id]);
        assert!(
            code != 0 && err.contains("still in its copy") && err.contains("hotcell rm"),
            "{code}: {err}"
        );
        assert!(shelf.join("copy.img").exists());
        if again {
            std::fs::remove_dir(&in_the_way).unwrap();
            let set = ann_json(&world, &["diff", &id, "--json"]);
            assert_eq!(paths(&set["entries"]), ["a"]);
            assert_eq!(world.show(&id)["totals"]["changes"]["added"], 1, "{}", world.show(&id));
            assert!(!shelf.join("copy.img").exists());
            assert_eq!(applied(&world, &id), ["a"]);
            sh(&dir, "rm a");
        } else {
            ann(&world, &["rm", &id]);
            assert!(!shelf.exists());
        }
        world.nothing_left();
    }
    world.end();
}

#[test]
fn a_parked_job_that_is_cancelled_keeps_its_agents_commits() {
    let commit =
        bash("echo work >work.txt; git add -A; git commit -qm 'before the pause'; echo loose >loose.txt");
    let text = format!(
        "usage = {{ input = 10, output = 20 }}\n\
         [[reply]]\nwhen = {{ prompt = \"parks\", turn = 0, tools = true }}\nblocks = [{commit}]\n\
         [[reply]]\nwhen = {{ prompt = \"parks\", turn_from = 1, tools = true }}\n\
         fault = {{ status = 429, type = \"rate_limit_error\", message = \"slow down\", headers = {{ retry-after = \"600\" }} }}\n\
         [default]\ntext = \"done\"\n"
    );
    let mut world = World::new(&text);
    let dir = repository(&world, "repo", "echo base >base.txt");
    let id = submit(&world, &spec("parks", &dir));
    until_state(&mut world, &id, "parked");
    let mut cancel = command(&world, ANN, &["cancel", &id]).stdout(Stdio::null()).spawn().unwrap();
    world.wait_for("its commits are taken out in a second cell", |world| {
        world.sql(&format!("SELECT count(*) FROM cells WHERE job = '{id}'")) == "2"
    });
    // Who asks again hears of the same end, and it cannot be taken back.
    let (code, _, err) = run_as(&world, ANN, &["unpark", &id]);
    assert!(code != 0 && err.contains("only a parked job"), "{code}: {err}");
    ann(&world, &["cancel", &id]);
    assert!(cancel.wait().unwrap().success());
    let (_, view) = done(&mut world, &id);
    assert_eq!(view["totals"]["changes"]["commits"], 1, "{view:#}\n{}", world.log());
    world.nothing_left();
    ann(&world, &["apply", &id, "--branch", "agent/paused"]);
    let log = sh(&dir, "git log --format=%s main..agent/paused; git diff --name-only main agent/paused");
    assert_eq!(log, "What the agent left without a commit\nbefore the pause\nloose.txt\nwork.txt\n");
    world.end();
}

/// As in the tests of parking: a limit that the gateway does not hold a request for.
const LIMITED: &str = "usage = { input = 10, output = 20 }\n[[reply]]\nwhen = { prompt = \"once\" }\ntimes = 1\n\
    fault = { status = 429, type = \"rate_limit_error\", message = \"slow down\", headers = { retry-after = \"2\", x-should-retry = \"false\" } }\n\
    [[reply]]\nwhen = { prompt = \"long\" }\ntimes = 1\n\
    fault = { status = 429, type = \"rate_limit_error\", message = \"slow down\", headers = { retry-after = \"600\" } }\n\
    [default]\ntext = \"done\"\n";

#[test]
fn a_parked_job_goes_on_with_its_copy_and_one_that_is_cancelled_has_its_change_set() {
    let mut world = World::without_daemon(LIMITED, "");
    fake_agent::install(&world.state_dir());
    world.start();
    let dir = world.workspace("work", ANN);
    sh(&dir, "echo base >base");
    let before = sh(&dir, ALL);
    let goes_on =
        submit(&world, &fake("write a one; write base more; model once; write a two; write b x", &dir));
    let (_, view) = done(&mut world, &goes_on);
    assert_eq!((&view["outcome"], &view["attempt"]), (&json!("succeeded"), &json!(2)), "{view}");
    assert_eq!(sh(&dir, ALL), before);
    let set = ann_json(&world, &["diff", &goes_on, "--json"]);
    assert_eq!(paths(&set["entries"]), ["a", "b", "base"]);
    let patch = ann(&world, &["diff", &goes_on]);
    assert!(patch.contains("+one\n+two\n") && patch.contains(" base\n+more\n"), "{patch}");

    let parked = submit(&world, &fake("write parked x; write base y; model long; write never x", &dir));
    until_state(&mut world, &parked, "parked");
    // Another daemon ends it.
    world.kill();
    world.start();
    ann(&world, &["cancel", &parked]);
    let (events, view) = done(&mut world, &parked);
    assert_eq!((&view["outcome"], &view["reason"]), (&json!("stopped"), &json!("cancelled")), "{view}");
    assert_eq!(
        (&view["totals"]["changes"]["added"], &view["totals"]["changes"]["modified"]),
        (&json!(1), &json!(1)),
        "{view:#}"
    );
    assert!(events.iter().any(|e| e["type"] == "changes"));
    world.nothing_left();
    assert_eq!(sh(&dir, ALL), before);
    assert_eq!(applied(&world, &parked), ["base", "parked"]);
    assert_eq!(sh(&dir, "cat base parked"), "base\ny\nx\n");
    world.end();
}
