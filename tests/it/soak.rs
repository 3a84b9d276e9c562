//! `make soak`, and for a short time in `make test`: jobs of made-up and of real agents run under two daemons on an
//! engine of their own, while a seed's choice of daemon, dockerd, containerd, shim, PID 1 and agent is killed. What
//! ends must have ended truthfully, and at the end nothing is left. Its last lines say what was survived.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::crash_points::Dice;
use crate::fake_agent::{self, done, spec, states};
use crate::own_engine::{OwnEngine, all_pids, world_on};
use crate::world::{PATIENCE, World, one_command};

/// Seconds and seed in `make test`.
const SECONDS: u64 = 6;
const SEED: u64 = 3;
/// Jobs of each world that are not over at a time.
const OPEN_MAX: usize = 6;
/// What an answer of the model costs: claude-sonnet-4-6 takes 3 and 15 USD for a million tokens in and out.
const ANSWER_MICRO: u64 = 10 * 3 + 50 * 15;

/// What gets SIGKILL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Daemon,
    Dockerd,
    Containerd,
    Shim,
    Init,
    Agent,
}

const VICTIMS: [Victim; 10] = [
    Victim::Daemon,
    Victim::Daemon,
    Victim::Dockerd,
    Victim::Containerd,
    Victim::Shim,
    Victim::Shim,
    Victim::Init,
    Victim::Init,
    Victim::Agent,
    Victim::Agent,
];

/// A daemon with its jobs.
struct Side {
    world: World,
    real: bool,
    open: Vec<String>,
    submitted: u64,
    /// Jobs whose agent was killed: they may fail for it.
    bereft: BTreeSet<String>,
    outcomes: BTreeMap<String, u64>,
    charged: u64,
    deaths: u64,
}

impl Side {
    fn new(engine: &OwnEngine, real: bool) -> Self {
        let fake = "usage = { input = 10, output = 50 }\n[default]\ntext = \"done\"\n".to_owned();
        let script =
            if real { one_command("sleep 5; echo done").replace("output = 20", "output = 50") } else { fake };
        let mut world = world_on(engine, &script, "limits.slots = 2\nlimits.cancel_grace_s = 2\n");
        if !real {
            fake_agent::install(&world.state_dir());
        }
        world.start();
        let (open, bereft, outcomes) = (Vec::new(), BTreeSet::new(), BTreeMap::new());
        Self { world, real, open, submitted: 0, bereft, outcomes, charged: 0, deaths: 0 }
    }

    /// As many jobs as may be open, as far as the daemon takes them: it takes none while it has no engine.
    fn submit(&mut self, dice: &mut Dice) {
        while self.open.len() < OPEN_MAX {
            let lines = 20 + dice.roll(100);
            let task = format!("print {lines} 100 100000; patient one; ask 3 20000; print 10 100");
            let real = json!({ "prompt": "go", "policy": "trusted", "limits": { "disk_mib": 64 } });
            let body = if self.real { real } else { spec(&task) }.to_string();
            let answer = self.world.call("POST", "/v1/jobs", &body);
            match answer.status {
                201 => self.open.push(answer.json()["id"].as_str().unwrap().to_owned()),
                503 => return,
                _ => panic!("{}", answer.body),
            }
            self.submitted += 1;
        }
    }

    /// What is over is looked at, and forgotten.
    fn look(&mut self) {
        for job in std::mem::take(&mut self.open) {
            let state = self.world.sql(&format!("SELECT state FROM jobs WHERE id = '{job}'"));
            if state == "done" { self.judge(&job) } else { self.open.push(job) }
        }
    }

    fn judge(&mut self, job: &str) {
        let (events, view) = done(&mut self.world, job);
        let (outcome, reason) = (view["outcome"].as_str().unwrap(), view["reason"].as_str());
        let named = format!("{outcome} {}", reason.unwrap_or_default());
        // The truth: done, or what this soak did to it.
        let bereft = self.bereft.contains(job);
        let faults = view["attempt"].as_u64() == Some(3);
        let fair = match (outcome, reason) {
            ("succeeded", None) => true,
            ("failed", Some("agent_error" | "agent_protocol")) => bereft,
            ("failed", Some("cell_lost" | "container_start" | "container_create" | "engine_unavailable")) => {
                faults
            }
            _ => false,
        };
        assert!(fair, "{named}, its agent killed: {bereft}: {view:#}\n{}", self.world.log());
        let states = states(&events);
        assert_eq!(states.first(), Some(&"queued"), "{states:?}");
        assert_eq!(states.iter().filter(|state| **state == "done").count(), 1, "{states:?}");
        if outcome == "succeeded" && !self.real {
            let lines: Vec<u64> = events.iter().filter_map(|e| e["frame"]["n"].as_u64()).collect();
            assert!(
                lines.ends_with(&(0..10).collect::<Vec<_>>()),
                "the last lines once and in order: {lines:?}"
            );
            let asked = events.iter().filter(|e| e["frame"]["got"] == "ask-2").count();
            assert!(asked >= 1, "its last question was answered");
        }
        self.charged += view["totals"]["charged_micro_usd"].as_u64().unwrap();
        *self.outcomes.entry(named).or_default() += 1;
    }

    /// Σ billed ≤ Σ charged ≤ Σ billed + what was in flight at a death.
    fn money(&self) {
        let sum =
            self.world.sql("SELECT coalesce(sum(charged_micro), 0) FROM ledger").parse::<u64>().unwrap();
        assert_eq!(sum, self.charged, "what the jobs say is what the ledger says");
        let requests = self.world.recorder.requests();
        let asked =
            requests.iter().filter(|r| r.target.split('?').next() == Some("/v1/messages")).count() as u64;
        let most =
            self.world.sql("SELECT coalesce(max(reserved_micro), 0) FROM ledger").parse::<u64>().unwrap();
        let (least, bound) = (asked * ANSWER_MICRO, asked * ANSWER_MICRO + self.deaths * 4 * most);
        assert!(least <= sum && sum <= bound, "billed {least}, charged {sum}, at most {bound}");
    }

    /// A cell that runs: its job, its container, PID 1 and agent.
    fn cell(&self, dice: &mut Dice) -> Option<(String, String, u32, u32)> {
        let query = "SELECT coalesce(group_concat(jobs.id || ' ' || container), '') FROM cells JOIN jobs ON jobs.id = job \
                     WHERE gone_ms IS NULL AND container IS NOT NULL AND state = 'running'";
        let list = self.world.sql(query);
        let cells: Vec<(&str, &str)> = list.split(',').filter_map(|cell| cell.split_once(' ')).collect();
        let (job, container) = *cells.get(dice.roll(cells.len().max(1) as u64) as usize)?;
        let of = |pid: &u32| {
            std::fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(container))
        };
        let (init, agent) = all_pids().into_iter().filter(of).fold((None, None), |(init, agent), pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let first = String::from_utf8_lossy(line.split(|byte| *byte == 0).next().unwrap_or_default())
                .into_owned();
            (
                init.or((first.contains("init")).then_some(pid)),
                agent.or(first.contains("claude").then_some(pid)),
            )
        });
        Some((job.to_owned(), container.to_owned(), init?, agent?))
    }
}

/// Kills one. False where there was none.
fn strike(victim: Victim, engine: &mut OwnEngine, side: &mut Side, dice: &mut Dice) -> bool {
    match victim {
        Victim::Daemon => {
            side.world.kill();
            side.deaths += 1;
            std::thread::sleep(Duration::from_millis(dice.roll(1500)));
            side.world.start();
            true
        }
        Victim::Dockerd => {
            engine.kill();
            std::thread::sleep(Duration::from_millis(dice.roll(4000)));
            engine.launch(dice.roll(2) == 0);
            true
        }
        Victim::Containerd => struck(engine.containerd()),
        Victim::Shim => {
            let cell = side.cell(dice);
            struck(cell.and_then(|(_, container, ..)| engine.shim(&container)))
        }
        Victim::Init => struck(side.cell(dice).map(|(_, _, init, _)| init)),
        Victim::Agent => {
            let Some((job, _, _, agent)) = side.cell(dice) else { return false };
            side.bereft.insert(job);
            struck(Some(agent))
        }
    }
}

/// SIGKILL, where it is there still.
fn struck(pid: Option<u32>) -> bool {
    let pid = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    pid.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok())
}

#[test]
fn random_kills_of_everything_lose_no_job_and_leave_nothing() {
    let number = |name: &str| std::env::var(name).ok().map(|n| n.parse::<u64>().expect(name));
    let seconds = number("HOTCELL_SOAK_S");
    let other = if seconds.is_some() { hotcell::clock::wall_ms() } else { SEED };
    let (seconds, seed) = (seconds.unwrap_or(SECONDS), number("HOTCELL_SOAK_SEED").unwrap_or(other));
    println!("soak: {seconds} s, HOTCELL_SOAK_SEED={seed}");
    let mut dice = Dice(seed);
    let mut engine = OwnEngine::start(true);
    let mut sides = [Side::new(&engine, false), Side::new(&engine, true)];
    let mut struck: BTreeMap<Victim, u64> = BTreeMap::new();
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        for side in &mut sides {
            side.submit(&mut dice);
            side.look();
        }
        std::thread::sleep(Duration::from_millis(dice.roll(6000)));
        let victim = VICTIMS[dice.roll(VICTIMS.len() as u64) as usize];
        let side = &mut sides[dice.roll(2) as usize];
        let whose = if side.real { "real" } else { "made-up" };
        if strike(victim, &mut engine, side, &mut dice) {
            println!("soak: killed {victim:?}, of the {whose} agents");
            *struck.entry(victim).or_default() += 1;
        }
    }
    for side in &mut sides {
        for job in side.open.clone() {
            fake_agent::until_state(&mut side.world, &job, "done");
        }
        side.look();
        assert_eq!(
            side.world.sql("SELECT count(*) FROM jobs"),
            side.submitted.to_string(),
            "each submit is one job"
        );
        side.money();
        side.world.wait_for("the last of its cells is gone", |world| {
            world.sql("SELECT count(*) FROM cells WHERE gone_ms IS NULL") == "0"
        });
        side.world.nothing_left();
    }
    println!("soak: survived kills of {struck:?}");
    for Side { world, real, submitted, outcomes, deaths, .. } in sides {
        println!("soak: real agents {real}: {submitted} jobs, {deaths} deaths of their daemon, {outcomes:?}");
        world.end();
    }
    // A shim ends a moment after its container is gone.
    let until = Instant::now() + PATIENCE;
    while engine.shims() > 0 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(100));
    }
    let lines = |args: &[&str]| engine.docker(args).lines().count();
    let left = [
        ("containers", lines(&["ps", "-aq"])),
        ("volumes", lines(&["volume", "ls", "-q"])),
        ("networks", lines(&["network", "ls", "-q", "--filter", "type=custom"])),
        ("processes", engine.shims()),
    ];
    // Each world has looked for the others at its end.
    println!("soak: left: {left:?}; mounts, loop devices, sockets, directories, reservations: 0");
    assert!(left.iter().all(|(_, count)| *count == 0), "{left:?}");
}
