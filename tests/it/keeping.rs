//! What is kept and what goes: a damaged store set aside with nothing of its cells left, and jobs that are old or too
//! many, removed by the daemon itself and by `hotcell gc`.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use hotcell::agent_bundle::{PINNED_VERSION, Platform};
use hotcell::store::FILE_NAME;
use serde_json::{Value, json};

use crate::fake_agent::{containers, done, spec, until_event, until_state, world};
use crate::world::{World, docker};

/// What the daemon says when it does not start: exit code, standard error.
fn refused(world: &World) -> (i32, String) {
    let output = world.hotcell().arg("serve").stdin(Stdio::null()).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Overwrites the middle of the database, and takes its log away, which may hold those pages anew.
fn damage(world: &World) {
    let path = world.state_dir().join(FILE_NAME);
    let log = fs::read(world.state_dir().join(format!("{FILE_NAME}-wal"))).unwrap_or_default();
    if !log.is_empty() {
        // All of it into the file, as after an orderly end.
        let db = rusqlite::Connection::open(&path).unwrap();
        db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    }
    let file = fs::File::options().write(true).open(&path).unwrap();
    let pages = file.metadata().unwrap().len() / 4096;
    for page in 1..pages {
        file.write_all_at(&[0x5a; 2048], page * 4096).unwrap();
    }
}

#[test]
fn a_damaged_store_is_refused_and_set_aside_and_nothing_of_its_cells_is_left() {
    let mut world = world("limits.slots = 2\n");
    let over = world.submit(&spec("print 2 2"));
    done(&mut world, &over);
    let running = world.submit(&spec("print 1 1; sleep 600"));
    until_event(&mut world, &running, "\"n\":0");
    until_state(&mut world, &running, "running");
    let instance = world.instance();
    assert_eq!(containers(&world).len(), 1);
    world.kill();
    let state = world.state_dir();
    assert_eq!(fs::read_to_string(state.join("instance")).unwrap().trim(), instance);
    damage(&world);

    let (code, said) = refused(&world);
    assert_eq!(code, 1, "{said}");
    for words in [&*state.join(FILE_NAME).to_string_lossy(), "put a copy of it back", "--set-store-aside"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let filter = format!("label=hotcell.instance={instance}");
    let listed = || docker(&["ps", "-aq", "--filter", &filter]);
    assert_ne!(listed().trim(), "", "nothing is touched without a word");
    assert!(!state.join("set-aside").exists());

    world.daemon_args = vec!["--set-store-aside".to_owned()];
    world.start();
    assert_eq!(world.instance(), instance);
    let log = world.log();
    for words in ["It was set aside", &over, &running, "begin at zero", &instance] {
        assert!(log.contains(words), "{words}: {log}");
    }
    let aside = fs::read_dir(&state)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("set-aside-"))
        .expect("a directory for it");
    assert!(aside.join(FILE_NAME).is_file());
    for job in [&over, &running] {
        assert_ne!(fs::read_dir(aside.join("jobs").join(job)).unwrap().count(), 0, "journals are kept");
        assert_eq!(world.call("GET", &format!("/v1/jobs/{job}"), "").status, 404);
    }
    assert_eq!(listed().trim(), "", "the cell of the job that ran is gone");
    world.nothing_left();
    // It works as a new one, and the flag does nothing to a whole store.
    world.terminate();
    world.start();
    let fresh = world.submit(&spec("print 1 1"));
    assert_eq!(done(&mut world, &fresh).1["outcome"], "succeeded");
    world.kill();
    world.start();
    assert_eq!(world.show(&fresh)["outcome"], "succeeded");
    world.end();
}

#[test]
fn a_file_of_another_program_is_refused_by_name_even_where_setting_aside_is_allowed() {
    let mut world = World::without_daemon("[default]\ntext = \"never asked\"\n", "");
    let path = world.state_dir().join(FILE_NAME);
    rusqlite::Connection::open(&path).unwrap().execute_batch("CREATE TABLE theirs (x)").unwrap();
    let before = fs::read(&path).unwrap();
    let output = world.hotcell().args(["serve", "--set-store-aside"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("is not a hotcell store") && said.contains(&*path.to_string_lossy()), "{said}");
    assert_eq!(fs::read(&path).unwrap(), before);
    fs::remove_file(&path).unwrap();
    world.start();
    world.end();
}

/// Makes jobs as if they had ended so many days earlier, while no daemon runs.
fn age(world: &World, job: &str, days: u64) {
    let db = rusqlite::Connection::open(world.state_dir().join(FILE_NAME)).unwrap();
    let sql = "UPDATE jobs SET ended_ms = ended_ms - ?1 WHERE id = ?2 AND state = 'done'";
    assert_eq!(db.execute(sql, rusqlite::params![days as i64 * 86_400_000, job]).unwrap(), 1);
}

fn gc(world: &World, args: &[&str]) -> Value {
    let (code, said, err) = world.run(&[&["gc", "--json"], args].concat());
    assert_eq!(code, 0, "{said}{err}");
    serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"))
}

/// The jobs of an answer with their reasons.
fn named(view: &Value) -> Vec<(&str, &str)> {
    let of = |gone: &'_ Value, key: &str| gone[key].as_str().unwrap().to_owned();
    assert!(view["removals"].as_array().unwrap().iter().all(|gone| of(gone, "kind") == "job"), "{view}");
    let list = view["removals"].as_array().unwrap().iter();
    list.map(|gone| (gone["name"].as_str().unwrap(), gone["reason"].as_str().unwrap())).collect()
}

#[test]
fn what_is_old_goes_with_all_but_its_audit_and_its_cost_and_undecided_work_stays() {
    let mut world = world("limits.slots = 2\n[retention]\ndays = 7\nundecided_days = 20\n");
    let files = world.workspace("files", 0);
    let mut changing = spec("write new.txt 100");
    changing["workspace"] = json!({ "path": files, "mode": "copy" });
    let old = world.submit(&spec("print 2 2"));
    let undecided = world.submit(&changing);
    let discarded = world.submit(&changing);
    for job in [&old, &undecided, &discarded] {
        assert_eq!(done(&mut world, job).1["outcome"], "succeeded");
    }
    assert_eq!(world.show(&undecided)["totals"]["changes"]["entries"], 1);
    assert_eq!(world.run(&["discard", &discarded]).0, 0);
    let running = world.submit(&spec("print 1 1; sleep 600"));
    let fresh = world.submit(&spec("print 1 1"));
    done(&mut world, &fresh);
    until_state(&mut world, &running, "running");
    world.kill();
    for job in [&old, &undecided, &discarded] {
        age(&world, job, 10);
    }
    world.start();
    let state = world.state_dir();
    let there = |job: &str| state.join("jobs").join(job).exists();

    assert_eq!(world.curl("POST", "/v1/gc", "", &[], Some(4321)).unwrap().status, 403);
    assert_eq!(world.call("POST", "/v1/gc?dry_run=maybe", "").status, 400);
    let seen = gc(&world, &["--dry-run"]);
    let mut listed = named(&seen);
    listed.sort_unstable();
    let mut expected = vec![(old.as_str(), "age"), (discarded.as_str(), "age")];
    expected.sort_unstable();
    assert_eq!(listed, expected);
    assert!(seen["dry_run"] == true && seen["bytes"].as_u64() > Some(0), "{seen}");
    assert!(there(&old) && there(&discarded), "a dry run removes nothing");
    let shown = world.run(&["gc", "--dry-run"]).1;
    assert!(shown.contains("2 things would go") && shown.contains(&old), "{shown}");

    let done_now = gc(&world, &[]);
    assert_eq!((named(&done_now).len(), &done_now["bytes"]), (2, &seen["bytes"]));
    for job in [&old, &discarded] {
        assert!(!there(job) && !state.join("changes").join(job).exists());
        let answer = world.call("GET", &format!("/v1/jobs/{job}"), "");
        assert_eq!(answer.status, 404);
        let error = &answer.json()["error"];
        assert!(error["message"].as_str().unwrap().contains("was removed"), "{error}");
        assert!(error["hint"].as_str().unwrap().contains(&format!("hotcell audit {job}")), "{error}");
        assert_eq!(world.run(&["audit", job]).0, 0);
        let other = world.curl("GET", &format!("/v1/jobs/{job}"), "", &[], Some(4321)).unwrap();
        assert!(other.body.contains("there is no job"), "to others it never was: {}", other.body);
    }
    for job in [&undecided, &running, &fresh] {
        assert!(there(job) && world.call("GET", &format!("/v1/jobs/{job}"), "").status == 200);
    }
    assert_eq!(named(&gc(&world, &[])), []);
    let metrics = world.call("GET", "/metrics", "").body;
    assert!(metrics.contains("hotcell_retention_removed_total{kind=\"job\"} 2"), "{metrics}");
    let bytes = format!("hotcell_retention_removed_bytes_total{{kind=\"job\"}} {}", seen["bytes"]);
    assert!(metrics.contains(&bytes), "{bytes}: {metrics}");
    assert_eq!(world.call("POST", &format!("/v1/jobs/{running}/cancel"), "").status, 202);
    done(&mut world, &running);
    world.end();
}

#[test]
fn the_daemon_removes_by_itself_what_is_too_many_the_oldest_first_and_undecided_work_last() {
    let mut world = world("limits.slots = 1\n[retention]\njobs = 2\n");
    let files = world.workspace("files", 0);
    let mut changing = spec("write new.txt 100");
    changing["workspace"] = json!({ "path": files, "mode": "copy" });
    let jobs: Vec<String> = [changing, spec("print 1 1"), spec("print 1 1"), spec("print 1 1")]
        .iter()
        .map(|s| world.submit(s))
        .collect();
    for job in &jobs {
        assert_eq!(done(&mut world, job).1["outcome"], "succeeded");
    }
    world.kill();
    world.start();
    world.wait_for("the daemon removes two", |world| world.sql("SELECT count(*) FROM jobs") == "2");
    let kept = |job: &String| world.call("GET", &format!("/v1/jobs/{job}"), "").status == 200;
    assert_eq!(jobs.iter().map(kept).collect::<Vec<_>>(), [true, false, false, true]);
    let log = world.log();
    assert!(log.contains("removed what was old or too much"), "{log}");
    world.end();
}

#[test]
fn an_old_version_of_the_agent_goes_unless_something_names_it() {
    let mut world = World::without_daemon("[default]\ntext = \"never asked\"\n", "");
    crate::fake_agent::install(&world.state_dir());
    let agents = world.state_dir().join("agents");
    let platform = Platform::of_host().unwrap();
    let active = agents.join(format!("{PINNED_VERSION}-{platform}"));
    let version = |version: &str, installed_at_ms: u64| {
        let dir = agents.join(format!("{version}-{platform}"));
        fs::create_dir(&dir).unwrap();
        let mut bundle: Value =
            serde_json::from_slice(&fs::read(active.join("bundle.json")).unwrap()).unwrap();
        (bundle["version"], bundle["installed_at_ms"]) = (version.into(), installed_at_ms.into());
        fs::write(dir.join("bundle.json"), bundle.to_string()).unwrap();
        dir
    };
    let (old, fresh) = (version("2.0.1", 0), version("2.0.2", hotcell::clock::wall_ms()));
    world.start();
    let gone = gc(&world, &[]);
    assert_eq!(
        (&gone["removals"][0]["kind"], &gone["removals"][0]["name"]),
        (&json!("agent"), &json!("2.0.1"))
    );
    assert_eq!(gone["removals"].as_array().unwrap().len(), 1, "{gone}");
    assert!(!old.exists() && fresh.exists() && active.exists());
    world.end();
}
