//! A job's life and its ends, in real cells: every stop, every way a cell can be lost, slots, limits of the
//! journal and of the disk. The CLI is a made-up one that does what the task says, save where it is the real one
//! that must be stopped.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fake_agent::{
    containers, done, kill, limited, processes, spec, states, until_event, until_state, world,
};
use crate::world::{PATIENCE, World, docker, one_command};

/// What a stop may take beside the grace: kill, report, clean-up, on a busy machine.
const SLACK: Duration = Duration::from_secs(12);

fn cancel(world: &World, job: &str) -> u16 {
    world.call("POST", &format!("/v1/jobs/{job}/cancel"), "").status
}

fn assert_stopped(job: &Value, reason: &str) {
    assert_eq!((job["outcome"].as_str(), job["reason"].as_str()), (Some("stopped"), Some(reason)), "{job}");
}

fn assert_failed(job: &Value, reason: &str) {
    assert_eq!((job["outcome"].as_str(), job["reason"].as_str()), (Some("failed"), Some(reason)), "{job}");
}

#[test]
fn a_cancelled_job_ends_within_the_grace_wherever_it_stands() {
    let mut world = world("limits.slots = 1\nlimits.cancel_grace_s = 2\n");
    let running = world.submit(&spec("print 1 1; sleep 600"));
    until_event(&mut world, &running, "\"n\":0");
    let queued = world.submit(&spec("sleep 600"));
    let followed = queued.clone();
    std::thread::scope(|scope| {
        let world = &world;
        let follower = scope.spawn(move || world.follow(&followed));
        assert_eq!(cancel(world, &queued), 200, "a queued job is over at once");
        let events = follower.join().unwrap();
        assert_eq!(states(&events), ["queued", "done"], "who followed the queued job sees its end");
    });
    assert_stopped(&world.show(&queued), "cancelled");

    let asked = Instant::now();
    assert_eq!(cancel(&world, &running), 202);
    assert_eq!(cancel(&world, &running), 202, "twice is no mistake");
    let (events, job) = done(&mut world, &running);
    assert!(asked.elapsed() < Duration::from_secs(2) + SLACK, "{:?}", asked.elapsed());
    assert_stopped(&job, "cancelled");
    assert_eq!(states(&events), ["queued", "preparing", "running", "stopping", "collecting", "done"]);
    assert_eq!(events.iter().filter(|e| e["type"] == "stop").count(), 1);
    assert!(events.iter().any(|e| e["type"] == "exit" && e["code"] == 130), "the cell's exit is proven");
    assert_eq!(cancel(&world, &running), 200, "and after its end it is none either");

    let booting = json!({ "prompt": "x", "policy": "trusted", "env": { "FAKE_BOOT": "deaf" }, "limits": { "disk_mib": 64 } });
    let preparing = world.submit(&booting);
    until_state(&mut world, &preparing, "preparing");
    assert_eq!(cancel(&world, &preparing), 202);
    let (_, job) = done(&mut world, &preparing);
    assert_stopped(&job, "cancelled");
    world.nothing_left();

    let lingering = world.submit(&spec("linger"));
    until_event(&mut world, &lingering, "all done");
    assert_eq!(cancel(&world, &lingering), 202);
    assert_stopped(&done(&mut world, &lingering).1, "cancelled");
    world.end();
}

#[test]
fn an_agent_that_hears_nothing_or_never_stops_printing_is_killed_after_the_grace() {
    let mut world =
        world("limits.slots = 2\nlimits.cancel_grace_s = 2\nlimits.journal_bytes_max = 16777216\n");
    let deaf = world.submit(&spec("deaf; sleep 600"));
    let flood = world.submit(&spec("deaf; flood"));
    until_event(&mut world, &deaf, "\"deaf\"");
    until_event(&mut world, &flood, "\"flood\"");
    let asked = Instant::now();
    assert_eq!(cancel(&world, &deaf), 202);
    assert_eq!(cancel(&world, &flood), 202);
    for job in [&deaf, &flood] {
        let (events, job) = done(&mut world, job);
        assert!(asked.elapsed() < Duration::from_secs(2) + SLACK, "{:?}", asked.elapsed());
        assert_stopped(&job, "cancelled");
        assert!(events.iter().any(|e| e["type"] == "exit" && e["code"] == 137), "it was killed");
    }
    let wall = world.submit(&limited("deaf; flood", "wall_s", 3));
    let asked = Instant::now();
    assert_stopped(&done(&mut world, &wall).1, "deadline");
    assert!(asked.elapsed() < Duration::from_secs(5) + SLACK, "{:?}", asked.elapsed());
    world.end();
}

#[test]
fn wall_and_silence_limits_stop_a_job_and_a_dead_boot_fails_it() {
    let mut world = world("limits.slots = 2\nlimits.cancel_grace_s = 2\n");
    // It prints all the time, so that only the wall limit can end it.
    let wall = world.submit(&limited("print 100000 10 20000", "wall_s", 3));
    let silent = world.submit(&limited("print 3 10; sleep 600", "silence_s", 2));
    let die = json!({ "prompt": "x", "policy": "trusted", "env": { "FAKE_BOOT": "die" }, "limits": { "disk_mib": 64 } });
    let die = world.submit(&die);
    assert_stopped(&done(&mut world, &wall).1, "deadline");
    assert_stopped(&done(&mut world, &silent).1, "silent");
    let (events, job) = done(&mut world, &die);
    assert_failed(&job, "agent_start");
    assert!(job["message"].as_str().unwrap().contains("dies in its boot"), "{job}");
    assert_eq!(states(&events), ["queued", "preparing", "collecting", "done"]);
    // What an agent says without a line feed, on stderr and before it falls is kept too.
    let (events, job) = world.job(&spec("empty 3; stderr alas; partial; exit 7"));
    assert_failed(&job, "agent_error");
    let texts: Vec<&str> =
        events.iter().filter(|e| e["type"] == "output").filter_map(|e| e["text"].as_str()).collect();
    for words in ["no line feed", "alas", ""] {
        assert!(texts.contains(&words), "{words:?} in {texts:?}");
    }
    let (_, job) = world.job(&spec("long 9000000; sleep 600"));
    assert_failed(&job, "agent_protocol");
    world.end();
}

#[test]
fn the_real_cli_is_stopped_in_the_middle_of_a_tool_and_at_its_turn_limit() {
    let mut world = World::with(&one_command("sleep 600"), "limits.cancel_grace_s = 4\n");
    let limits = json!({ "disk_mib": 64 });
    let id = world.submit(&json!({ "prompt": "wait", "policy": "trusted", "limits": limits }));
    until_event(&mut world, &id, "\"type\":\"tool\"");
    let (init, _) = processes(&world, &id);
    world.wait_for("the tool runs", |_| tree(init).iter().any(|command| command.contains("sleep 600")));
    let asked = Instant::now();
    assert_eq!(cancel(&world, &id), 202);
    let (_, job) = done(&mut world, &id);
    assert!(asked.elapsed() < Duration::from_secs(4) + SLACK, "{:?}", asked.elapsed());
    assert_stopped(&job, "cancelled");
    assert_eq!(job["totals"]["tool_calls"], 1);
    world.end();

    let input = "{ command = \"true\", description = \"x\" }";
    let script = format!(
        "usage = {{ input = 1, output = 1 }}\n[default]\nblocks = [{{ tool = \"Bash\", input = {input} }}]\n"
    );
    let world = World::new(&script);
    let limits = json!({ "max_turns": 2, "disk_mib": 64 });
    let (_, job) = world.job(&json!({ "prompt": "on and on", "policy": "trusted", "limits": limits }));
    assert_stopped(&job, "turns");
    world.end();
}

/// Command lines of the descendants of a process.
fn tree(root: u32) -> Vec<String> {
    let mut pids = vec![root];
    let mut next = 0;
    while next < pids.len() {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", pids[next])).into_iter().flatten().flatten();
        for task in tasks {
            let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            pids.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        next += 1;
    }
    let command = |pid: &u32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    pids.iter().map(command).map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " ")).collect()
}

#[test]
fn two_slots_are_shared_fairly_and_never_passed() {
    let mut world = world("limits.slots = 2\n");
    let submit = |world: &World, uid: u32| {
        let body = spec("sleep 1").to_string();
        let answer = world.curl("POST", "/v1/jobs", &body, &[], Some(uid)).unwrap();
        assert_eq!(answer.status, 201, "{}", answer.body);
        answer.json()["id"].as_str().unwrap().to_owned()
    };
    let greedy: Vec<String> = (0..4).map(|_| submit(&world, 5001)).collect();
    let modest = submit(&world, 5002);
    let (mut most, mut used_most) = (0, 0);
    world.wait_for("all jobs are over", |world| {
        most = most.max(containers(world).len());
        let metrics = world.call("GET", "/metrics", "").body;
        let used = metrics
            .lines()
            .find_map(|l| l.strip_prefix("hotcell_slots_used "))
            .unwrap()
            .parse::<usize>()
            .unwrap();
        used_most = used_most.max(used);
        world.sql("SELECT count(*) FROM jobs WHERE state = 'done'") == "5"
    });
    assert_eq!((most, used_most), (2, 2));
    let started =
        |world: &World, job: &str| world.sql(&format!("SELECT started_ms FROM jobs WHERE id = '{job}'"));
    assert!(
        started(&world, &modest) <= started(&world, &greedy[2]),
        "the second user's job goes before the third of the first"
    );
    assert!(
        started(&world, &greedy[0]) <= started(&world, &greedy[1])
            && started(&world, &greedy[2]) <= started(&world, &greedy[3])
    );
    assert_eq!(world.sql("SELECT count(*) FROM jobs WHERE state_json LIKE '%succeeded%'"), "5");
    world.end();
}

#[test]
fn a_job_waits_for_its_policys_turn_and_for_room_on_the_host_and_the_queue_says_which() {
    let policies = tempfile::tempdir().unwrap();
    let trusted = include_str!("../../policies/trusted.toml");
    let scarce = trusted.replace("\n[limits]\n", "\n[limits]\nslots = 1\n");
    assert_ne!(scarce, trusted);
    std::fs::write(policies.path().join("scarce.toml"), scarce).unwrap();
    let more = format!("policy_dirs = [{:?}]\nlimits.slots = 4\n", policies.path());
    let mut world = world(&more);
    let submit = |world: &World, policy: &str, task: &str| {
        let mut spec = spec(task);
        spec["policy"] = policy.into();
        world.submit(&spec)
    };
    let waiting = |world: &World| -> Vec<(String, String)> {
        let queue = world.call("GET", "/v1/queue", "").json();
        let text = |job: &Value, key: &str| job[key].as_str().unwrap().to_owned();
        queue["jobs"].as_array().unwrap().iter().map(|job| (text(job, "id"), text(job, "why"))).collect()
    };
    let first = submit(&world, "scarce", "sleep 3");
    let second = submit(&world, "scarce", "sleep 0.1");
    let other = submit(&world, "trusted", "sleep 0.1");
    assert_eq!(waiting(&world), [(second.clone(), "policy_limit".to_owned())]);
    done(&mut world, &other);
    assert_eq!(world.show(&second)["state"], "queued", "another policy's job went before it");
    // What the limit is, the queue's row knows after a kill as well.
    world.kill();
    world.start();
    assert_eq!(waiting(&world), [(second.clone(), "policy_limit".to_owned())]);
    for job in [&first, &second] {
        assert_eq!(done(&mut world, job).1["outcome"], "succeeded");
    }

    // A reserve that no machine has: one job at a time.
    world.kill();
    world.daemon_env.push(("HOTCELL_LIMITS_MEMORY_RESERVE_MIB".to_owned(), "16777216".to_owned()));
    world.start();
    let first = submit(&world, "trusted", "sleep 2");
    let second = submit(&world, "trusted", "sleep 0.1");
    assert_eq!(waiting(&world), [(second.clone(), "memory".to_owned())]);
    assert_eq!(done(&mut world, &first).1["outcome"], "succeeded");
    assert_eq!(done(&mut world, &second).1["outcome"], "succeeded");
    world.end();
}

#[test]
fn a_drain_lets_running_jobs_end_and_keeps_queued_ones_and_a_second_signal_stops_them() {
    let mut world = world("limits.slots = 1\nlimits.cancel_grace_s = 2\n");
    let running = world.submit(&spec("print 1 1; sleep 3"));
    let queued = world.submit(&spec("print 2 2"));
    until_event(&mut world, &running, "\"n\":0");
    world.signal();
    world.wait_for("it drains", |world| world.log().contains("draining"));
    let refused = world.call("POST", "/v1/jobs", &spec("x").to_string());
    assert_eq!(refused.status, 503, "{}", refused.body);
    world.ended();
    assert_eq!(
        world
            .sql(&format!("SELECT state_json FROM jobs WHERE id = '{running}'"))
            .matches("succeeded")
            .count(),
        1
    );
    assert_eq!(world.sql(&format!("SELECT state FROM jobs WHERE id = '{queued}'")), "queued");
    world.start();
    assert_eq!(done(&mut world, &queued).1["outcome"], "succeeded");

    let running = world.submit(&spec("print 1 1; deaf; sleep 600"));
    let queued = world.submit(&spec("print 1 1"));
    until_event(&mut world, &running, "\"deaf\"");
    world.signal();
    world.wait_for("it drains again", |world| world.log().matches("draining").count() == 2);
    world.signal();
    world.ended();
    world.start();
    let (events, job) = done(&mut world, &running);
    assert_stopped(&job, "drain");
    assert_eq!(states(&events), ["queued", "preparing", "running", "stopping", "collecting", "done"]);
    assert_eq!(done(&mut world, &queued).1["outcome"], "succeeded");
    world.end();
}

#[test]
fn a_cell_that_is_lost_or_killed_from_outside_has_a_named_end_and_leaves_nothing() {
    let mut world = world("limits.slots = 4\n");
    let jobs: Vec<String> = (0..4).map(|_| world.submit(&spec("print 1 1; sleep 600"))).collect();
    for job in &jobs {
        until_event(&mut world, job, "\"n\":0");
    }
    let container =
        |world: &World, job: &str| world.sql(&format!("SELECT container FROM cells WHERE job = '{job}'"));
    kill(processes(&world, &jobs[0]).0);
    kill(processes(&world, &jobs[1]).1);
    docker(&["rm", "-f", &container(&world, &jobs[2])]);
    docker(&["kill", &container(&world, &jobs[3])]);
    // An agent that ended is not tried again.
    let (events, job) = done(&mut world, &jobs[1]);
    assert_failed(&job, "agent_error");
    assert_eq!(states(&events), ["queued", "preparing", "running", "collecting", "done"]);
    // A cell that was taken away is: the conversation goes on where it was, and the lines before it are not told twice.
    for job in [&jobs[0], &jobs[2], &jobs[3]] {
        until_event(&mut world, job, "\"subtype\":\"resumed\"");
        world.call("POST", &format!("/v1/jobs/{job}/cancel"), "");
        let (events, view) = done(&mut world, job);
        assert_stopped(&view, "cancelled");
        let moves = ["queued", "preparing", "running", "parking", "parked", "queued", "preparing", "running"];
        assert_eq!(states(&events)[..8], moves);
        assert_eq!(events.iter().filter(|e| e["frame"]["n"] == 0).count(), 1);
        assert_eq!(view["attempt"], 2, "{view}");
    }
    world.end();
}

#[test]
fn a_job_that_is_over_is_tried_again_as_a_new_one_by_its_owner() {
    let mut world = world("limits.slots = 1\n");
    let first = world.submit(&spec("print 2 2; sleep 1; exit 7"));
    let early = world.call("POST", &format!("/v1/jobs/{first}/retry"), "");
    assert_eq!(
        (early.status, early.json()["error"]["code"].as_str()),
        (409, Some("not_done")),
        "{}",
        early.body
    );
    let (_, former) = done(&mut world, &first);
    let (code, line, err) = world.run(&["retry", "--json", &first]);
    assert_eq!(code, 0, "{err}");
    let second = serde_json::from_str::<Value>(&line).unwrap()["id"].as_str().unwrap().to_owned();
    assert_ne!(first, second);
    let (events, view) = done(&mut world, &second);
    assert_eq!((&view["outcome"], &view["reason"]), (&former["outcome"], &former["reason"]));
    assert_eq!(states(&events), ["queued", "preparing", "running", "collecting", "done"]);
    assert_eq!(world.show(&first), former, "the former one stays as it was");
    let strangers = world.curl("POST", &format!("/v1/jobs/{first}/retry"), "", &[], Some(4242)).unwrap();
    assert_eq!(strangers.status, 404, "{}", strangers.body);
    assert_eq!(world.run(&["retry", "j00000000000000z"]).0, 2);
    world.end();
}

#[test]
fn a_job_whose_cells_are_taken_away_again_and_again_fails_after_three_tries_and_says_so() {
    let mut world = world("limits.slots = 1\n");
    let job = world.submit(&spec("print 1 1; sleep 600"));
    until_event(&mut world, &job, "\"n\":0");
    for attempt in 1..=3 {
        let query = format!(
            "SELECT container FROM cells WHERE job = '{job}' AND attempt = {attempt} AND gone_ms IS NULL"
        );
        if attempt > 1 {
            world.wait_for("the next try", |world| {
                crate::fake_agent::journal(world, &job).matches("\"subtype\":\"resumed\"").count()
                    == attempt - 1
            });
        }
        docker(&["kill", &world.sql(&query)]);
        if attempt < 3 {
            until_event(&mut world, &job, &format!("try {attempt} of 3 was ended by this machine"));
        }
    }
    let (events, view) = done(&mut world, &job);
    assert_failed(&view, "cell_lost");
    assert_eq!((view["blame"].as_str(), view["attempt"].as_u64()), (Some("host"), Some(3)), "{view}");
    assert!(view["message"].as_str().unwrap().contains("(try 3 of this job)"), "{view}");
    assert_eq!(states(&events).iter().filter(|state| **state == "parked").count(), 2);
    world.end();
}

#[test]
fn a_journal_stays_within_its_limit_and_a_slow_reader_holds_nobody() {
    let mut world = world("limits.journal_bytes_max = 16777216\n");
    // 60 MB of lines in a journal of 16 MiB.
    let job = world.submit(&spec("print 60000 1000"));
    let mut slow = UnixStream::connect(world.socket()).unwrap();
    slow.set_read_timeout(Some(PATIENCE)).unwrap();
    let request =
        format!("GET /v1/jobs/{job}/events?follow=1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    std::io::Write::write_all(&mut slow, request.as_bytes()).unwrap();
    let (mut disk_most, mut memory_most) = (0, 0);
    let (dir, pid) = (world.state_dir().join("jobs").join(&job), world.pid());
    world.wait_for("the job is over, though its reader takes a byte at a time", |world| {
        let mut byte = [0];
        slow.read_exact(&mut byte).unwrap();
        // Segments come and go while we look.
        let files = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        disk_most = disk_most.max(files.filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum::<u64>());
        memory_most = memory_most.max(resident_mib(pid));
        world.sql(&format!("SELECT state FROM jobs WHERE id = '{job}'")) == "done"
    });
    assert!(disk_most <= 16 << 20, "{disk_most} bytes of journal");
    assert!(memory_most < 256, "{memory_most} MiB of memory");
    let view = world.show(&job);
    assert_eq!(view["outcome"], "succeeded", "{view}");
    assert_eq!(view["result"], "all done", "{view}");
    let answer = world.call("GET", &format!("/v1/jobs/{job}/events"), "");
    let lines: Vec<Value> = answer.body.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let told: Vec<&Value> = lines.iter().filter(|e| e["type"] == "truncated").collect();
    assert_eq!(told.len(), 1);
    let numbers: Vec<u64> = lines.iter().filter_map(|e| e["frame"]["n"].as_u64()).collect();
    assert_eq!((numbers[0], numbers[numbers.len() - 1]), (0, 59_999), "head and tail are there");
    assert_eq!(states(&lines), ["queued", "preparing", "running", "collecting", "done"]);
    // The slow reader comes to the end as well.
    let mut rest = Vec::new();
    slow.read_to_end(&mut rest).unwrap();
    let rest = String::from_utf8_lossy(&rest);
    assert!(rest.contains("\"type\":\"truncated\"") && rest.contains("\"state\":\"done\""));
    world.end();
}

fn resident_mib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

/// A small file system. Unmounted when it is dropped, after the world on it.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("hd-").tempdir_in(crate::world::base_dir()).unwrap();
        let options = format!("size={size},mode=0755");
        let mut mount = std::process::Command::new("mount");
        let mounted =
            mount.args(["-t", "tmpfs", "-o", &options, "hotcell-test"]).arg(dir.path()).status().unwrap();
        assert!(mounted.success());
        Self(dir)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn fill(&self, name: &str) -> std::path::PathBuf {
        let file = self.path(name);
        let filled = std::fs::write(&file, vec![0; 256 << 20]);
        assert_eq!(filled.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
        file
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

fn no_cells(world: &World) -> bool {
    std::fs::read_dir(world.state_dir().join("cells")).unwrap().next().is_none()
}

#[test]
fn a_full_disk_refuses_new_jobs_and_ends_running_ones_and_is_got_over() {
    let more = "limits.disk_reserve_mib = 16\nlimits.slots = 2\nlimits.cancel_grace_s = 2\n";
    let disk = SmallDisk::mount("96m");
    let mut world = World::without_daemon("[default]\ntext = \"never asked\"\n", more);
    let state = disk.path("state");
    std::fs::create_dir(&state).unwrap();
    let images = std::fs::read_link(world.state_dir().join("images")).unwrap();
    std::os::unix::fs::symlink(images, state.join("images")).unwrap();
    std::fs::remove_dir_all(world.state_dir()).unwrap();
    std::os::unix::fs::symlink(&state, world.state_dir()).unwrap();
    crate::fake_agent::install(&state);
    world.start();

    let running = world.submit(&spec("print 1000000 1000 1000"));
    until_event(&mut world, &running, "\"n\":0");
    let filler = disk.fill("filler");
    world.wait_for("the running job is ended", |world| containers(world).is_empty());
    // What the cell gave back is taken, too.
    world.wait_for("the cell's directory is gone", |world| no_cells(world));
    let second = disk.fill("second");
    let refused = world.call("POST", "/v1/jobs", &spec("x").to_string());
    assert!(refused.status >= 500 && refused.body.contains("space"), "{} {}", refused.status, refused.body);
    std::fs::remove_file(filler).unwrap();
    std::fs::remove_file(second).unwrap();

    until_state(&mut world, &running, "done");
    let job = world.show(&running);
    assert_failed(&job, "internal");
    assert_eq!(job["blame"], "host");
    assert!(job["message"].as_str().unwrap().contains("no space left"), "{job}");
    let (_, job) = world.job(&spec("print 2 2"));
    assert_eq!(job["outcome"], "succeeded", "{job}");
    world.end();
}
