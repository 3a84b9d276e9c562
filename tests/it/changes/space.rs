//! Disks that are full: a job's own limit, and the reserve of the host that no job can eat.

use serde_json::json;

use super::*;
use crate::fake_agent;
use crate::world::tool_results;

#[test]
fn a_job_that_fills_its_disk_is_told_so_and_keeps_its_changes() {
    let fill = "dd if=/dev/zero of=big bs=1M count=200 2>&1 | tail -1; echo after >after && echo COULD-WRITE; true";
    let room = "dd if=/dev/zero of=big bs=1M count=200 2>&1; rm big; echo after >after && echo COULD-WRITE";
    let inodes = "mkdir many; cd many; i=0; while echo x >f$i && [ $i -lt 200000 ]; do i=$((i+1)); done; cd ..; rm -r many; echo after >after";
    let world = World::new(&script(&[("fill", fill), ("room", room), ("inodes", inodes)]));
    let dir = world.workspace("work", ANN);
    let jobs: Vec<String> = ["room", "inodes", "fill"].map(|prompt| submit(&world, &spec(prompt, &dir))).into();
    for (id, prompt) in jobs.iter().zip(["room", "inodes", "fill"]) {
        let events = world.follow(id);
        let view = world.show(id);
        let said = tool_results(&events);
        let outcome = (view["outcome"].as_str(), view["reason"].as_str());
        match prompt {
            // Nothing more can be written: the CLI may fail by it, and then that is what is said.
            "fill" => assert!(matches!(outcome, (Some("succeeded"), _) | (Some("failed"), Some("disk_full"))), "{view:#}"),
            _ => {
                assert_eq!(outcome.0, Some("succeeded"), "{view:#}");
                assert!(said.contains("No space left on device"), "{prompt}: {said}");
            }
        }
        let set = ann_json(&world, &["diff", id, "--json"]);
        let name = if prompt == "fill" { "big" } else { "after" };
        assert!(entry(&set, name)["after"]["bytes"].as_u64().unwrap() > 0);
    }
    world.end();
}

/// The cells' directory as a small file system of its own: what others do to the machine's disk does not count.
struct Small(PathBuf);

impl Small {
    fn mount(dir: PathBuf, mib: u32) -> Self {
        std::fs::create_dir(&dir).unwrap();
        let options = format!("size={mib}m,mode=0711");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "hotcell-test"]).arg(&dir).status().unwrap();
        assert!(done.success());
        Self(dir)
    }

    fn write(&self, mib: usize) {
        std::fs::write(self.0.join("others"), vec![1; mib << 20]).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn the_hosts_reserve_is_given_back_by_the_largest_job_and_no_job_starts_below_it() {
    let write = |mib: u32| format!("head -c {mib}M /dev/urandom >data; sync; touch /tmp/wrote; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo went-on");
    let world = World::without_daemon(
        &script(&[("small-one", &write(10)), ("large-one", &write(150))]),
        "limits.disk_reserve_mib = 300\nlimits.cancel_grace_s = 2\n",
    );
    let small_disk = Small::mount(world.state_dir().join("cells"), 420);
    let mut world = world;
    world.start();
    let dir = world.workspace("work", ANN);
    let with_disk = |prompt: &str| {
        let mut spec = spec(prompt, &dir);
        spec["limits"]["disk_mib"] = json!(256);
        spec
    };
    let small = submit(&world, &with_disk("small-one"));
    let at = |world: &World, id: &str| {
        let cell = world.sql(&format!("SELECT cell FROM cells WHERE job = '{id}'"));
        world.state_dir().join("cells").join(cell).join("scratch/tmp")
    };
    fake_agent::until_state(&mut world, &small, "running");
    let tmp = at(&world, &small);
    world.wait_for("the small one has written", |_| tmp.join("wrote").exists());
    let large = submit(&world, &with_disk("large-one"));
    let (_, view) = fake_agent::done(&mut world, &large);
    assert_eq!((&view["outcome"], &view["reason"]), (&json!("failed"), &json!("disk_full")), "{view:#}");
    assert!(view.to_string().contains("reserve of 300 MiB"), "{view:#}");
    // What it had written by then is there all the same.
    let set = ann_json(&world, &["diff", &large, "--json"]);
    assert!(entry(&set, "data")["after"]["bytes"].as_u64().unwrap() > 0);
    assert_eq!(world.show(&small)["state"], "running", "{}", world.show(&small));
    std::fs::write(tmp.join("go"), "").unwrap();
    let (events, view) = fake_agent::done(&mut world, &small);
    assert_eq!(view["outcome"], "succeeded", "{view:#}");
    assert!(tool_results(&events).contains("went-on"));
    // Others have taken what there was.
    small_disk.write(200);
    let none = submit(&world, &with_disk("small-one"));
    let (_, view) = fake_agent::done(&mut world, &none);
    assert_eq!(view["outcome"], "failed", "{view:#}");
    assert!(view.to_string().contains("the reserve is"), "{view:#}");
    world.terminate();
    drop(small_disk);
    world.end();
}
