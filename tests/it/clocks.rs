//! A wall clock that jumps by a year, there and back: deadlines hold, a budget's day never goes back, and nothing is
//! removed because it suddenly is old. The daemon gets its wall clock from libfaketime, and the other ones from the kernel.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::fake_agent::{self, done, limited, spec, until_event};
use crate::world::World;

const SCRIPT: &str = "usage = { input = 10, output = 50 }\n[default]\ntext = \"done\"\n";

fn faketime() -> PathBuf {
    let places = std::fs::read_dir("/usr/lib").unwrap().flatten().map(|entry| entry.path());
    let mut libraries = places.map(|dir| dir.join("faketime/libfaketimeMT.so.1"));
    libraries.find(|path| path.exists()).expect("libfaketime: run `make tools`")
}

/// A world whose daemon has a clock of its own, and the file that sets it.
fn world() -> (World, PathBuf) {
    let mut world = World::without_daemon(SCRIPT, "limits.slots = 2\nlimits.cancel_grace_s = 2\n");
    fake_agent::install(&world.state_dir());
    let file = world.path("clock");
    set(&file, "+0");
    let library = faketime().display().to_string();
    let variables = [
        ("LD_PRELOAD", library.as_str()),
        ("FAKETIME_TIMESTAMP_FILE", file.to_str().unwrap()),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("DONT_FAKE_MONOTONIC", "1"),
        ("NO_FAKE_STAT", "1"),
    ];
    world.daemon_env = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    world.start();
    (world, file)
}

/// In one step: the daemon reads it at each look at the clock.
fn set(file: &Path, offset: &str) {
    let fresh = file.with_extension("new");
    std::fs::write(&fresh, format!("{offset}\n")).unwrap();
    std::fs::rename(fresh, file).unwrap();
}

fn gc(world: &World) -> Value {
    let (code, said, err) = world.run(&["gc", "--json"]);
    assert_eq!(code, 0, "{said}{err}");
    serde_json::from_str(&said).unwrap()
}

#[test]
fn a_clock_that_jumps_moves_no_deadline_and_no_budget_day_back_and_removes_nothing() {
    let (mut world, clock) = world();
    let over = world.submit(&spec("patient one"));
    assert_eq!(done(&mut world, &over).1["outcome"], "succeeded");
    assert_eq!(gc(&world)["clock_jumped"], Value::Null);

    let begun = Instant::now();
    let late = world.submit(&limited("print 1 1; sleep 600", "wall_s", 10));
    let fine = world.submit(&limited("print 150 10 100000; patient two", "wall_s", 120));
    for job in [&late, &fine] {
        until_event(&mut world, job, "\"n\":0");
    }
    set(&clock, "+400d");
    let year_later = gc(&world);
    assert_eq!(
        (&year_later["clock_jumped"], &year_later["removals"]),
        (&true.into(), &serde_json::json!([]))
    );
    assert!(world.run(&["gc", "--dry-run"]).1.contains("the clock has jumped"));
    // A daemon that starts with the wrong clock knows by the other one what is left.
    world.kill();
    world.start();
    let (events, job) = done(&mut world, &late);
    assert_eq!(job["reason"], "deadline", "{job}");
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(9) && took < Duration::from_secs(30), "{took:?}");
    assert!(!events.is_empty());
    let tomorrow = world.submit(&spec("patient three"));
    assert_eq!(done(&mut world, &tomorrow).1["outcome"], "succeeded");
    set(&clock, "-1d");
    let (_, job) = done(&mut world, &fine);
    assert_eq!(job["outcome"], "succeeded", "{job}");
    let back = world.submit(&spec("patient four"));
    assert_eq!(done(&mut world, &back).1["outcome"], "succeeded");
    let day = |job: &str| world.sql(&format!("SELECT day FROM ledger WHERE job = '{job}'"));
    assert!(day(&over) < day(&tomorrow), "{} {}", day(&over), day(&tomorrow));
    assert_eq!(day(&back), day(&tomorrow), "no budget begins anew because the clock went back");
    assert_eq!(gc(&world)["clock_jumped"], true, "a jump back is one as well");
    assert_eq!(world.call("GET", &format!("/v1/jobs/{over}"), "").status, 200);
    world.end();
}
