//! Side-by-side measurements: `make bench`. The real binaries, engine, image and CLI beside what people use
//! without hotcell, all in one run and in turn. Prints a table and writes `target/bench.json` and
//! `target/bench.md`.
//!
//! Arguments: names of parts to run (`cold`, `events`, `streams`, `queue`, `gateway`, `workspaces`,
//! `builds`; all where none is given), and `--strict`. Ends with 2 when a measurement broke, with 1 under `--strict` when a bar is missed, else with 0:
//! a busy machine must not fail a build, and a missed bar is printed as FAIL.
//!
//! `BENCH_COLD_N`, `BENCH_EVENTS_N`, `BENCH_EVENTS`, `BENCH_STREAMS` change how much is done; those of `queue`, `gateway`,
//! `workspaces` and `builds` are named there.

// It says what it expects by panicking, like a test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod builds;
mod cold;
mod events;
mod gateway;
mod http;
mod load;
mod queue;
mod report;
mod setup;
mod workspaces;
// What the integration tests serve as package registries.
#[allow(dead_code)]
#[path = "../it/packages/server.rs"]
mod registries;
// The integration tests' world: a daemon, a state directory and a scripted model of its own.
#[allow(dead_code)]
#[path = "../it/place.rs"]
mod place;
#[allow(dead_code, unused_imports)]
#[path = "../it/world.rs"]
mod world;

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use report::Row;

type Part = (&'static str, fn() -> Result<Vec<Row>>);

const PARTS: [Part; 7] = [
    ("cold", cold::measure),
    ("events", events::measure),
    ("streams", load::streams),
    ("queue", queue::measure),
    ("gateway", gateway::measure),
    ("workspaces", workspaces::measure),
    ("builds", builds::measure),
];

fn main() -> ExitCode {
    if gateway::run_if_told() {
        return ExitCode::SUCCESS;
    }
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let strict = arguments.iter().any(|a| a == "--strict");
    let wanted: Vec<&String> = arguments.iter().filter(|a| !a.starts_with("--")).collect();
    if let Some(wrong) = wanted.iter().find(|name| !PARTS.iter().any(|(part, _)| part == *name)) {
        eprintln!("there is no part {wrong:?}");
        return ExitCode::from(2);
    }
    let (mut rows, mut broken) = (Vec::new(), Vec::new());
    for (name, measure) in PARTS {
        if !wanted.is_empty() && !wanted.iter().any(|w| *w == name) {
            continue;
        }
        let begun = Instant::now();
        eprintln!("{name}: measuring …");
        // A panic is a measurement that broke; what the part started is ended while it unwinds.
        match std::panic::catch_unwind(AssertUnwindSafe(measure)) {
            Ok(Ok(more)) => rows.extend(more),
            Ok(Err(error)) => broken.push(format!("{name}: {error:#}")),
            Err(_) => broken.push(format!("{name}: panicked (see above)")),
        }
        eprintln!("{name}: {:.0} s", begun.elapsed().as_secs_f64());
    }
    let facts: Vec<String> =
        setup::machine().iter().map(|(name, value)| format!("{name}: {value}")).collect();
    let text = format!("{}\n\n{}", facts.join("; "), report::table(&rows));
    println!("{text}");
    for words in &broken {
        eprintln!("BROKEN {words}");
    }
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    let json = serde_json::to_string_pretty(&report::json(&rows)).unwrap();
    let written = std::fs::write(target.join("bench.json"), json)
        .and_then(|()| std::fs::write(target.join("bench.md"), text));
    if let Err(error) = &written {
        eprintln!("cannot write the report: {error}");
    }
    let missed = rows.iter().any(|row| row.pass() == Some(false));
    match (broken.is_empty() && written.is_ok(), strict && missed) {
        (false, _) => ExitCode::from(2),
        (true, true) => ExitCode::from(1),
        (true, false) => ExitCode::SUCCESS,
    }
}
