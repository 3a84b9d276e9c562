//! The daemon is killed at places that a seed chooses among all transactions, writes of journals, calls to the engine
//! and requests to the model, again and again, while real cells run. Whatever it was, each job is done exactly once,
//! its events are whole, its money adds up, and nothing is left.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::fake_agent::{self, done, spec, states};
use crate::world::World;

/// Seeds in `make test`.
const SEEDS: u64 = 20;
/// Lives of a daemon that end at a place of the seed's choice, for each seed.
const LIVES: usize = 4;
/// What an answer of the model costs: claude-sonnet-4-6 takes 3 and 15 USD for a million tokens in and out.
const ANSWER_MICRO: u64 = 10 * 3 + 50 * 15;
const SCRIPT: &str = "usage = { input = 10, output = 50 }\n[default]\ntext = \"done\"\n";
/// Lines, a request, tool calls, a request, lines.
const TASK: &str = "print 20 100; patient one; ask 4 20000; patient two; print 10 100";

/// splitmix64: the same numbers for the same seed everywhere.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

/// Submits with a key until it is answered or the daemon is dead: the job's id.
fn submit(world: &mut World, key: &str) -> Option<String> {
    let header = format!("Idempotency-Key: {key}");
    let answer = world.curl("POST", "/v1/jobs", &spec(TASK).to_string(), &["-H", &header], None)?;
    assert!(matches!(answer.status, 200 | 201), "{}", answer.body);
    Some(answer.json()["id"].as_str().expect("an id").to_owned())
}

/// The daemon lives and dies until two jobs are done; how often it died.
fn lives(world: &mut World, seed: u64) -> (Vec<String>, usize) {
    let mut dice = Dice(seed);
    let mut jobs: [Option<String>; 2] = [None, None];
    let mut deaths = 0;
    for life in 0.. {
        // Early and late places alike: a start alone passes some twenty, two jobs some hundreds.
        let most = [30, 120, 400][dice.roll(3) as usize];
        let at = (life < LIVES)
            .then(|| (hotcell::failpoint::VARIABLE.to_owned(), (1 + dice.roll(most)).to_string()));
        world.daemon_env = at.into_iter().collect();
        let mut alive = world.start_or_be_killed();
        for (n, job) in jobs.iter_mut().enumerate() {
            if alive && job.is_none() {
                *job = submit(world, &format!("seed-{seed}-{n}"));
                alive = job.is_some();
            }
        }
        if alive {
            world.wait_for("both jobs are over, or the daemon", |world| {
                alive = !world.was_killed();
                let open = "SELECT count(*) FROM jobs WHERE state != 'done'";
                !alive || world.sql(open) == "0"
            });
        } else {
            world.wait_for("the daemon is dead", World::was_killed);
        }
        if alive {
            // Whoever looks now is not to be died upon.
            world.kill();
            world.daemon_env.clear();
            world.start();
            break;
        }
        deaths += 1;
    }
    (jobs.into_iter().flatten().collect(), deaths)
}

/// Moves that [`hotcell::job::State::next`] has, by name, without any stop.
fn assert_legal(names: &[&str]) {
    let legal = [
        ("queued", "preparing"),
        ("preparing", "queued"),
        ("preparing", "running"),
        ("running", "collecting"),
        ("collecting", "done"),
    ];
    assert_eq!(names.first(), Some(&"queued"));
    for pair in names.windows(2) {
        assert!(legal.contains(&(pair[0], pair[1])), "{names:?}");
    }
    assert_eq!(
        names.iter().filter(|name| **name == "running").count(),
        1,
        "its task was begun once: {names:?}"
    );
}

fn assert_done_once(world: &mut World, id: &str) -> u64 {
    let (events, job) = done(world, id);
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{}", world.log());
    assert_legal(&states(&events));
    let lines: Vec<u64> = events.iter().filter_map(|e| e["frame"]["n"].as_u64()).collect();
    assert_eq!(lines, (0..20).chain(0..10).collect::<Vec<_>>(), "each line once and in order");
    let got: Vec<&str> = events.iter().filter_map(|e| e["frame"]["got"].as_str()).collect();
    assert_eq!(got, ["ask-0", "ask-1", "ask-2", "ask-3"], "each answer once and in order");
    let charged = |e: &&Value| e["type"] == "charge";
    assert!(
        events.iter().filter(charged).count() <= events.iter().filter(|e| e["type"] == "request").count()
    );
    job["totals"]["charged_micro_usd"].as_u64().unwrap()
}

/// Σ billed ≤ Σ charged ≤ Σ billed + what was in flight at a death: one request a job and death at most.
fn assert_money(world: &World, charged: u64, billed: u64, deaths: usize) {
    let sum = |what: &str| {
        world.sql(&format!("SELECT coalesce(sum({what}), 0) FROM ledger")).parse::<u64>().unwrap()
    };
    assert_eq!(world.sql("SELECT count(*) FROM ledger WHERE status = 'open'"), "0");
    assert_eq!(sum("charged_micro"), charged, "what the jobs say is what the ledger says");
    let most: u64 = world.sql("SELECT coalesce(max(reserved_micro), 0) FROM ledger").parse().unwrap();
    assert!(billed <= charged, "billed {billed}, charged {charged}");
    assert!(
        charged <= billed + deaths as u64 * 2 * most,
        "billed {billed}, charged {charged}, {deaths} deaths"
    );
}

#[test]
fn a_daemon_that_is_killed_at_any_place_loses_and_doubles_nothing() {
    let seeds: u64 =
        std::env::var("HOTCELL_CRASH_SEEDS").map_or(SEEDS, |n| n.parse().expect("a number of seeds"));
    let (mut kinds, mut deaths_in_all) = (BTreeSet::new(), 0);
    let mut world = World::without_daemon(SCRIPT, "limits.slots = 2\n");
    fake_agent::install(&world.state_dir());
    let (mut charged, mut billed_before) = (0, 0);
    for seed in 0..seeds {
        let (jobs, deaths) = lives(&mut world, seed);
        deaths_in_all += deaths;
        assert_eq!(
            world.sql("SELECT count(*) FROM jobs"),
            (2 * (seed + 1)).to_string(),
            "each submit is one job"
        );
        for id in &jobs {
            charged += assert_done_once(&mut world, id);
        }
        let billed = world.recorder.total() * ANSWER_MICRO;
        assert!(billed > billed_before, "the model was asked");
        billed_before = billed;
        assert_money(&world, charged, billed, deaths_in_all);
        world.nothing_left();
        world.kill();
        kinds.extend(crash_points(&world));
    }
    for kind in [
        "store: before",
        "store: after",
        "journal: before",
        "journal: after",
        "engine: before",
        "engine: after",
    ] {
        assert!(kinds.iter().any(|name: &String| name.starts_with(kind)), "never died at {kind}: {kinds:?}");
    }
    println!("{seeds} seeds, {deaths_in_all} deaths at {kinds:?}");
    world.start();
    world.end();
}

/// Names of the places at which daemons died.
fn crash_points(world: &World) -> Vec<String> {
    let log = world.log();
    log.lines().filter_map(|line| line.split_once("crash point: ")).map(|(_, name)| name.to_owned()).collect()
}
