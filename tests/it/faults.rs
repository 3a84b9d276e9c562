//! The table of faults: what dies or hangs beside the daemon, and what a person is promised then. Where the engine
//! itself is the one, the test has an engine of its own ([`crate::own_engine`]).
//!
//! | fault | tests |
//! |---|---|
//! | kill -9 of the daemon at each state | `crash::a_job_that_had_not_its_task_yet_is_done_once_after_the_restart` and its neighbours, `crash_points::a_daemon_that_is_killed_at_any_place_loses_and_doubles_nothing` |
//! | kill -9 of a client | `command::a_client_can_leave_come_back_cancel_and_die`, `api::a_key_is_one_job_even_in_a_crowd_and_after_a_crash` |
//! | kill -9 of dockerd | `faults::a_dockerd_that_is_killed_holds_the_queue_and_no_running_job`, `faults::what_a_new_dockerd_kills_goes_on_as_a_resumed_conversation` |
//! | dockerd dead at the deadline | `faults::without_an_engine_a_cell_ends_at_its_deadline_and_a_dead_one_is_seen` |
//! | kill -9 of a shim | `faults::a_killed_shim_is_a_fault_of_this_machine_and_a_stopped_one_holds_nobody` |
//! | kill -9 of containerd | `faults::a_dead_containerd_does_not_make_a_dead_cell_look_alive` |
//! | an engine that hangs | `faults::an_engine_that_hangs_holds_no_running_job_and_no_stop` |
//! | a container that will not die | those of the shim and of the deadline, `faults::a_frozen_cell_is_killed_all_the_same` |
//! | removal busy | `faults::what_cannot_be_removed_is_counted_and_tried_again` |
//! | disk full | `life::a_full_disk_refuses_new_jobs_and_ends_running_ones_and_is_got_over`, `walls::a_full_disk_is_the_cells_own` |
//! | a torn store | `keeping::a_damaged_store_is_refused_and_set_aside_and_nothing_of_its_cells_is_left`, `store::a_flipped_or_cut_page_is_refused_as_damage_and_a_flipped_or_cut_log_ends_earlier` |
//! | out of memory in a cell | `walls::memory_beyond_the_limit_is_killed_for_and_counted`, `engine::more_memory_than_allowed_ends_the_cell` |
//! | clock jumps | `clocks::a_clock_that_jumps_moves_no_deadline_and_no_budget_day_back_and_removes_nothing`, `crash::a_wall_limit_holds_while_no_daemon_is_there` |
//! | many queued | `life::two_slots_are_shared_fairly_and_never_passed`, `scheduler::one_user_cannot_hold_another_back` |
//! | a cell that prints 10 GB | `faults::a_cell_that_prints_10_gb_takes_little_disk_and_memory_and_its_result_is_seen` |
//! | a slow reader | `life::a_journal_stays_within_its_limit_and_a_slow_reader_holds_nobody` |
//! | 429, 529, hang, truncated answers | `park::a_job_that_the_provider_limits_waits_and_goes_on_where_it_was`, `gateway::a_provider_that_never_answers_costs_the_reservation`, `gateway::an_answer_that_is_cut_at_any_byte_costs_its_usage_or_no_less_than_was_seen` |
//! | gateway restart | `crash::the_money_of_a_request_under_way_at_a_kill_is_charged_and_the_job_goes_on` |
//! | two daemons | `bad_input::one_state_directory_and_one_socket_have_one_daemon` |
//! | descriptors used up | `faults::a_daemon_whose_clients_take_all_descriptors_goes_on_with_its_jobs_and_answers_when_they_leave` |
//! | SIGTERM with jobs | `life::a_drain_lets_running_jobs_end_and_keeps_queued_ones_and_a_second_signal_stops_them`, `stop::the_jobs_of_a_detached_daemon_go_on_and_end_once_with_the_next_one` |
//! | all of them, at random | `soak::random_kills_of_everything_lose_no_job_and_leave_nothing` (`make soak`) |

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::fake_agent::{
    self, done, journal, kill, limited, processes, spec, states, until_event, until_state,
};
use crate::own_engine::{OwnEngine, signal, world_on};
use crate::world::{World, mounts_below};

const SCRIPT: &str = "[default]\ntext = \"never asked\"\n";

/// A world with the made-up agent on that engine.
fn world(engine: &OwnEngine, more: &str) -> World {
    let mut world = world_on(engine, SCRIPT, more);
    fake_agent::install(&world.state_dir());
    world.start();
    world
}

fn numbers(events: &[Value]) -> Vec<u64> {
    events.iter().filter_map(|e| e["frame"]["n"].as_u64()).collect()
}

fn assert_ended(job: &Value, outcome: &str, reason: Option<&str>, attempt: u64) {
    let told = (job["outcome"].as_str(), job["reason"].as_str(), job["attempt"].as_u64());
    assert_eq!(told, (Some(outcome), reason, Some(attempt)), "{job:#}");
}

fn container(world: &World, job: &str) -> String {
    world.sql(&format!("SELECT container FROM cells WHERE job = '{job}' ORDER BY rowid DESC"))
}

fn state(world: &World, job: &str) -> String {
    world.sql(&format!("SELECT state FROM jobs WHERE id = '{job}'"))
}

/// Whether a process is there; one that nobody has taken away yet is not.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

fn until_dead(world: &mut World, pid: u32) {
    world.wait_for("a process is dead", |_| !lives(pid));
}

fn metric(world: &World, name: &str) -> String {
    let text = world.call("GET", "/metrics", "").body;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
    line.unwrap_or_else(|| panic!("no {name}: {text}"))
}

fn until_metric(world: &mut World, name: &str, value: &str) {
    world.wait_for(&format!("{name} is {value}"), |world| metric(world, name) == value);
}

/// The job was tried again as a resumed conversation; it is cancelled there.
fn resumed_once(world: &mut World, job: &str) {
    until_event(world, job, "\"subtype\":\"resumed\"");
    assert_eq!(world.call("POST", &format!("/v1/jobs/{job}/cancel"), "").status, 202);
    let (events, view) = done(world, job);
    assert_ended(&view, "stopped", Some("cancelled"), 2);
    assert_eq!(numbers(&events), [0], "what was printed before is not printed again");
    assert_eq!(states(&events).iter().filter(|state| **state == "parked").count(), 1);
}

#[test]
fn a_dockerd_that_is_killed_holds_the_queue_and_no_running_job() {
    let mut engine = OwnEngine::start(true);
    let mut world = world(&engine, "limits.slots = 2\n");
    let running = world.submit(&spec("print 300 100 50000"));
    let other = world.submit(&spec("print 5 100 1000000; print 1 1"));
    until_event(&mut world, &running, "\"n\":0");
    let waiting: Vec<String> = (0..3).map(|_| world.submit(&spec("print 2 2"))).collect();
    until_event(&mut world, &other, "\"n\":0");
    engine.kill();
    let seen = journal(&world, &running).len();
    world.wait_for("the cell is heard without an engine", |world| journal(world, &running).len() > seen);
    until_metric(&mut world, "hotcell_engine_up", "0");
    // The slot of the one that ends is the queue's, and nothing starts in vain.
    let queue = world.call("GET", "/v1/queue", "").json();
    let why: Vec<&str> =
        queue["jobs"].as_array().unwrap().iter().map(|j| j["why"].as_str().unwrap()).collect();
    assert_eq!(why, ["engine_away"; 3], "{queue}");
    assert_eq!(world.call("POST", "/v1/jobs", &spec("x").to_string()).status, 503);
    engine.launch(true);
    for (job, lines) in [(&running, 300), (&other, 6)] {
        let (events, view) = done(&mut world, job);
        assert_ended(&view, "succeeded", None, 1);
        assert_eq!(numbers(&events).len(), lines);
        assert_eq!(states(&events), ["queued", "preparing", "running", "collecting", "done"]);
    }
    for job in &waiting {
        let (_, view) = done(&mut world, job);
        assert_ended(&view, "succeeded", None, 1);
    }
    world.end();
}

#[test]
fn what_a_new_dockerd_kills_goes_on_as_a_resumed_conversation() {
    let mut engine = OwnEngine::start(false);
    // The real CLI, in the middle of a tool.
    let script = r#"
usage = { input = 10, output = 20 }

[[reply]]
when = { last = "The job was paused", tools = true }
times = 1
blocks = [{ tool = "Bash", input = { command = "cat ~/note", description = "read" } }]

[[reply]]
when = { prompt = "remember", turn = 0, tools = true }
blocks = [{ tool = "Bash", input = { command = "echo of the first cell > ~/note; echo written", description = "write" } }]

[[reply]]
when = { prompt = "remember", turn = 1, tools = true }
times = 1
blocks = [{ tool = "Bash", input = { command = "sleep 600", description = "wait", timeout = 600000 } }]

[default]
text = "done"
"#;
    let mut world = world_on(&engine, script, "");
    world.start();
    let limits = serde_json::json!({ "disk_mib": 64 });
    let job = world
        .submit(&serde_json::json!({ "prompt": "remember this", "policy": "trusted", "limits": limits }));
    until_event(&mut world, &job, "sleep 600");
    world.wait_for("the command runs", |world| {
        world.docker(&["top", &container(world, &job)]).contains("sleep 600")
    });
    engine.kill();
    until_metric(&mut world, "hotcell_engine_up", "0");
    assert_eq!(state(&world, &job), "running", "a silent engine is no dead cell");
    engine.launch(false);
    let (events, view) = done(&mut world, &job);
    assert_ended(&view, "succeeded", None, 2);
    let seen = crate::world::tool_results(&events);
    assert!(seen.contains("of the first cell"), "{seen}");
    assert_eq!(seen.matches("written").count(), 1, "nothing was done twice");
    let charged: u64 = events.iter().filter_map(|e| e["charged_micro_usd"].as_u64()).sum();
    assert_eq!(view["totals"]["charged_micro_usd"], charged, "{view}");
    world.end();
}

#[test]
fn without_an_engine_a_cell_ends_at_its_deadline_and_a_dead_one_is_seen() {
    let mut engine = OwnEngine::start(true);
    let mut world = world(&engine, "limits.slots = 2\nlimits.cancel_grace_s = 2\n");
    let late = world.submit(&limited("print 1 1; deaf; sleep 600", "wall_s", 12));
    let dying = world.submit(&spec("print 1 1; sleep 600"));
    until_event(&mut world, &late, "\"deaf\"");
    until_event(&mut world, &dying, "\"n\":0");
    let (late_init, late_agent) = processes(&world, &late);
    let (dying_init, _) = processes(&world, &dying);
    engine.kill();
    // Nobody in the cell does what it is asked to: only the host can end it.
    signal(late_init, Signal::STOP);
    kill(dying_init);
    world
        .wait_for("a dead cell is seen, whatever the engine does", |world| state(world, &dying) == "parking");
    for pid in [late_agent, late_init] {
        until_dead(&mut world, pid);
    }
    let (events, view) = done(&mut world, &late);
    assert_ended(&view, "stopped", Some("deadline"), 1);
    assert_eq!(states(&events), ["queued", "preparing", "running", "stopping", "collecting", "done"]);
    assert_eq!(metric(&world, "hotcell_engine_up"), "0", "all that without an engine");
    // What only the engine can remove is counted, and gone soon after it is back.
    assert_eq!(metric(&world, "hotcell_cells_left"), "1");
    engine.launch(true);
    until_metric(&mut world, "hotcell_cells_left", "0");
    resumed_once(&mut world, &dying);
    world.end();
}

#[test]
fn a_killed_shim_is_a_fault_of_this_machine_and_a_stopped_one_holds_nobody() {
    let engine = OwnEngine::start(true);
    let mut world = world(&engine, "limits.slots = 2\nlimits.cancel_grace_s = 2\n");
    let jobs = [0, 1].map(|_| world.submit(&spec("print 1 1; sleep 600")));
    for job in &jobs {
        until_event(&mut world, job, "\"n\":0");
    }
    let (killed, stopped) = (&jobs[0], &jobs[1]);
    let shim = engine.shim(&container(&world, stopped)).expect("a shim");
    let (init, agent) = processes(&world, stopped);
    kill(engine.shim(&container(&world, killed)).expect("a shim"));
    resumed_once(&mut world, killed);

    // The engine cannot do anything to it: neither kill it nor see that it is dead.
    signal(shim, Signal::STOP);
    signal(init, Signal::STOP);
    let asked = Instant::now();
    assert_eq!(world.call("POST", &format!("/v1/jobs/{stopped}/cancel"), "").status, 202);
    for pid in [agent, init] {
        until_dead(&mut world, pid);
    }
    assert!(asked.elapsed() < Duration::from_secs(45), "{:?}", asked.elapsed());
    signal(shim, Signal::CONT);
    let (_, view) = done(&mut world, stopped);
    assert_ended(&view, "stopped", Some("cancelled"), 1);
    world.end();
}

#[test]
fn a_dead_containerd_does_not_make_a_dead_cell_look_alive() {
    let engine = OwnEngine::start(true);
    let mut world = world(&engine, "limits.slots = 3\nlimits.cancel_grace_s = 2\n");
    let jobs = [0, 1].map(|_| world.submit(&spec("print 1 1; sleep 600")));
    let fine = world.submit(&spec("print 100 100 100000"));
    for job in jobs.iter().chain([&fine]) {
        until_event(&mut world, job, "\"n\":0");
    }
    let (cancelled, dying) = (&jobs[0], &jobs[1]);
    let (init, agent) = processes(&world, cancelled);
    let (dying_init, _) = processes(&world, dying);
    kill(engine.containerd().expect("a containerd"));
    kill(dying_init);
    let asked = Instant::now();
    assert_eq!(world.call("POST", &format!("/v1/jobs/{cancelled}/cancel"), "").status, 202);
    for pid in [agent, init] {
        until_dead(&mut world, pid);
    }
    assert!(asked.elapsed() < Duration::from_secs(45), "{:?}", asked.elapsed());
    let (_, view) = done(&mut world, cancelled);
    assert_ended(&view, "stopped", Some("cancelled"), 1);
    resumed_once(&mut world, dying);
    let (events, view) = done(&mut world, &fine);
    assert_ended(&view, "succeeded", None, 1);
    assert_eq!(numbers(&events).len(), 100);
    world.end();
}

#[test]
fn an_engine_that_hangs_holds_no_running_job_and_no_stop() {
    let engine = OwnEngine::start(true);
    let mut world = world(&engine, "limits.slots = 2\nlimits.cancel_grace_s = 2\n");
    let printing = world.submit(&spec("print 600 100 100000; ask 3 1000"));
    let stopping = world.submit(&spec("print 1 1; sleep 600"));
    until_event(&mut world, &printing, "\"n\":0");
    until_event(&mut world, &stopping, "\"n\":0");
    let (init, agent) = processes(&world, &stopping);
    signal(engine.pid(), Signal::STOP);
    let asked = Instant::now();
    assert_eq!(world.call("POST", &format!("/v1/jobs/{stopping}/cancel"), "").status, 202);
    for pid in [agent, init] {
        until_dead(&mut world, pid);
    }
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    until_metric(&mut world, "hotcell_engine_up", "0");
    let seen = journal(&world, &printing).len();
    world.wait_for("the other cell is heard", |world| journal(world, &printing).len() > seen);
    let next = world.call("GET", "/v1/queue", "").status;
    assert_eq!(next, 200, "the daemon answers at once");
    signal(engine.pid(), Signal::CONT);
    until_metric(&mut world, "hotcell_engine_up", "1");
    let fresh = world.submit(&spec("print 2 2"));
    let (_, view) = done(&mut world, &stopping);
    assert_ended(&view, "stopped", Some("cancelled"), 1);
    for job in [&printing, &fresh] {
        let (_, view) = done(&mut world, job);
        assert_ended(&view, "succeeded", None, 1);
    }
    world.end();
}

/// Where this machine freezes the processes of a container: cgroups of version 1 or 2.
fn freezer(init: u32) -> (std::path::PathBuf, &'static str) {
    let cgroups = std::fs::read_to_string(format!("/proc/{init}/cgroup")).unwrap();
    let of = |name: &str| {
        let mut lines = cgroups.lines().map(|line| line.splitn(3, ':').skip(1).collect::<Vec<_>>());
        lines.find(|line| line[0] == name).map(|line| line[1].trim_start_matches('/').to_owned())
    };
    match of("freezer") {
        Some(path) => (Path::new("/sys/fs/cgroup/freezer").join(path).join("freezer.state"), "FROZEN"),
        None => (Path::new("/sys/fs/cgroup").join(of("").unwrap()).join("cgroup.freeze"), "1"),
    }
}

#[test]
fn a_frozen_cell_is_killed_all_the_same() {
    let mut world = fake_agent::world("limits.slots = 1\nlimits.cancel_grace_s = 2\n");
    let job = world.submit(&spec("print 1 1; sleep 600"));
    until_event(&mut world, &job, "\"n\":0");
    let (init, agent) = processes(&world, &job);
    let (file, frozen) = freezer(init);
    std::fs::write(&file, frozen).unwrap();
    assert_eq!(world.call("POST", &format!("/v1/jobs/{job}/cancel"), "").status, 202);
    for pid in [agent, init] {
        until_dead(&mut world, pid);
    }
    let (_, view) = done(&mut world, &job);
    assert_ended(&view, "stopped", Some("cancelled"), 1);
    world.end();
}

#[test]
fn what_cannot_be_removed_is_counted_and_tried_again() {
    let mut world = fake_agent::world("limits.slots = 2\n");
    let job = world.submit(&spec("print 1 1; sleep 3"));
    until_event(&mut world, &job, "\"n\":0");
    // Somebody holds the cell's disk open. (Another mount namespace would hold those of all other tests, too.)
    let mounts = mounts_below(&world.state_dir().canonicalize().unwrap().join("cells"));
    let held: Vec<std::fs::File> =
        mounts.iter().filter_map(|point| std::fs::File::open(point).ok()).collect();
    assert!(!held.is_empty(), "a cell has mounts");
    let (events, view) = done(&mut world, &job);
    assert_ended(&view, "succeeded", None, 1);
    assert_eq!(states(&events), ["queued", "preparing", "running", "collecting", "done"]);
    until_metric(&mut world, "hotcell_cells_left", "1");
    let log = world.log();
    assert!(log.contains("something of a cell is left; the sweeper goes on"), "{log}");
    // Nobody else is held by it.
    let other = world.submit(&spec("print 1 1"));
    until_state(&mut world, &other, "done");
    drop(held);
    until_metric(&mut world, "hotcell_cells_left", "0");
    world.end();
}

#[test]
fn a_daemon_whose_clients_take_all_descriptors_goes_on_with_its_jobs_and_answers_when_they_leave() {
    let mut world = World::without_daemon(SCRIPT, "limits.slots = 1\n");
    fake_agent::install(&world.state_dir());
    world.descriptors_max = Some(96);
    world.start();
    let running = world.submit(&spec("print 60 100 50000"));
    let next = world.submit(&spec("print 2 2"));
    until_event(&mut world, &running, "\"n\":0");
    // More clients than it can have, who say nothing.
    let crowd: Vec<_> =
        (0..200).map_while(|_| std::os::unix::net::UnixStream::connect(world.socket()).ok()).collect();
    assert!(crowd.len() > 96, "{}", crowd.len());
    world.wait_for("there is no room", |world| world.log().contains("too many clients are connected"));
    // A job ends and the next one gets a cell all the same.
    for job in [&running, &next] {
        until_state(&mut world, job, "done");
    }
    let log = world.log();
    assert_eq!(log.matches("too many clients").count(), 1, "{log}");
    assert!(!log.contains("cannot accept"), "{log}");
    drop(crowd);
    world.wait_for("it answers again", |world| {
        world.try_call("GET", "/healthz", "").is_some_and(|answer| answer.status == 200)
    });
    for job in [&running, &next] {
        let (_, view) = done(&mut world, job);
        assert_ended(&view, "succeeded", None, 1);
    }
    world.end();
}

#[test]
fn a_cell_that_prints_10_gb_takes_little_disk_and_memory_and_its_result_is_seen() {
    let mut world = fake_agent::world("limits.journal_bytes_max = 16777216\n");
    let lines = 10_000_000_000 / 65_536;
    let begun = Instant::now();
    let job = world.submit(&limited(&format!("print {lines} 65536"), "wall_s", 3600));
    let (dir, pid) = (world.state_dir().join("jobs").join(&job), world.pid());
    let mut disk_most = 0;
    while state(&world, &job) != "done" {
        assert!(begun.elapsed() < Duration::from_secs(600), "it takes too long");
        // Segments come and go while we look.
        let files = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        disk_most = disk_most.max(files.filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum::<u64>());
        std::thread::sleep(Duration::from_millis(50));
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    let memory_kb: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    println!(
        "10 GB printed in {:?}: {disk_most} bytes of journal, {memory_kb} kB of memory",
        begun.elapsed()
    );
    assert!(disk_most <= 16 << 20, "{disk_most} bytes of journal");
    assert!(memory_kb < 256 << 10, "{memory_kb} kB of memory");
    let (events, view) = done(&mut world, &job);
    assert_ended(&view, "succeeded", None, 1);
    assert_eq!(view["result"], "all done", "{view}");
    assert_eq!(events.iter().filter(|e| e["type"] == "truncated").count(), 1);
    let numbers = numbers(&events);
    assert_eq!((numbers[0], numbers[numbers.len() - 1]), (0, lines - 1), "head and tail are there");
    assert_eq!(states(&events), ["queued", "preparing", "running", "collecting", "done"]);
    world.end();
}

#[test]
fn every_test_that_the_table_names_is_there() {
    let mut code = String::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut dirs = vec![root.join("src"), root.join("tests")];
    while let Some(dir) = dirs.pop() {
        for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            match path.extension() {
                _ if path.is_dir() => dirs.push(path),
                Some(extension) if extension == "rs" => code += &std::fs::read_to_string(path).unwrap(),
                _ => {}
            }
        }
    }
    let table = include_str!("faults.rs").lines().filter(|line| line.starts_with("//! |"));
    let names: Vec<&str> =
        table.flat_map(|line| line.split('`')).filter(|text| text.contains("::")).collect();
    assert!(names.len() > 25, "{names:?}");
    for name in names {
        let function = format!("fn {}(", name.rsplit("::").next().unwrap());
        assert!(code.contains(&function), "{name} is not there");
    }
}
