//! The limits of a cell, pressed from inside: the one who presses is held, nobody else notices.

use serde_json::json;

use super::{run, spec, world};

const MIB: u64 = 1024 * 1024;

/// Free bytes where the world's files are.
fn free(path: &std::path::Path) -> u64 {
    let stat = rustix::fs::statvfs(path).unwrap();
    stat.f_bfree * stat.f_frsize
}

#[test]
fn a_full_disk_is_the_cells_own() {
    let world = world();
    let before = free(world.dir.path());
    let seen = run(&world, "python3 fill.py", &json!({ "limits": { "disk_mib": 256 } }));
    seen.succeeded();
    let number = |name: &str| seen.get(name).as_u64().unwrap();
    assert!(number("size") <= 256 * MIB, "{:?}", seen.found);
    assert!((128 * MIB..=256 * MIB).contains(&(number("in_tmp") + number("in_home"))), "{:?}", seen.found);
    assert_eq!((seen.get("tmp_error"), seen.get("home_error")), (&json!("ENOSPC"), &json!("ENOSPC")));
    assert!(seen.get("types").as_array().unwrap().iter().all(|t| t != "tmpfs"), "{:?}", seen.found);
    assert_eq!(*seen.get("inode_error"), "ENOSPC", "{:?}", seen.found);
    // What the cell took is given back; other tests write too, but not a scratch space's worth.
    assert!(free(world.dir.path()) + 1024 * MIB > before);
    world.end();
}

#[test]
fn processes_are_bounded_and_a_sibling_does_not_notice() {
    let mut world = world();
    let bomb = world.submit(&spec(
        &world,
        "bash bomb.sh; sleep 5",
        &json!({ "limits": { "pids": 128, "cpus": 0.5, "wall_s": 60 } }),
    ));
    world.wait_for("the bomb's cell runs", |w| {
        w.show(&bomb)["state"] != "queued" && w.show(&bomb)["state"] != "preparing"
    });
    let seen = run(&world, "python3 forks.py", &json!({ "limits": { "pids": 64 } }));
    seen.succeeded();
    assert_eq!(*seen.get("error"), "EAGAIN");
    let (forked, processes) = (seen.get("forked").as_u64().unwrap(), seen.get("processes").as_u64().unwrap());
    assert!(forked > 8 && forked < 64 && processes <= 64, "{forked} forked, {processes} processes");
    world.follow(&bomb);
    let bomb = world.show(&bomb);
    // Whether the CLI can still end well in there is chance; that it ends, and alone, is not.
    assert!(["succeeded", "failed", "stopped"].contains(&bomb["outcome"].as_str().unwrap()), "{bomb}");
    world.end();
}

#[test]
fn memory_beyond_the_limit_is_killed_for_and_counted() {
    let world = world();
    let seen =
        run(&world, &format!("python3 eat.py {}", 512 * MIB), &json!({ "limits": { "memory_mib": 512 } }));
    // The greedy process dies, the CLI does not: its score makes it the kernel's later choice.
    seen.succeeded();
    assert_eq!(*seen.get("eater"), "killed by 9");
    let exit = seen.events.iter().find(|e| e["type"] == "exit").expect("an exit");
    assert!(exit["oom_kills"].as_u64().unwrap() >= 1, "{exit}");
    let peak = exit["peak_memory_bytes"].as_u64().unwrap();
    assert!((256 * MIB..=512 * MIB).contains(&peak), "{exit}");
    world.end();
}
