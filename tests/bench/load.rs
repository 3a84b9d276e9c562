//! The daemon under many live jobs: its memory, and how long it takes until all run and until all are gone.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::http::Client;
use crate::report::{Bar, Row};
use crate::setup::{self, IDLE_MIB_MAX, Memory, fake_job, setting};
use crate::world::{PATIENCE, World};

/// Memory with `BENCH_STREAMS` jobs that all print.
pub(crate) fn streams() -> Result<Vec<Row>> {
    let jobs = setting("BENCH_STREAMS", 50);
    let mut world = setup::world_with_fake(&format!("[limits]\nslots = {jobs}\ncancel_grace_s = 2\n"))?;
    world.start();
    let idle = setup::memory(&world.socket())?;
    let mut client = Client::connect(&world.socket())?;
    let spec = fake_job(1_000_000, 20).to_string();
    let begun = Instant::now();
    let ids: Vec<String> = (0..jobs).map(|_| setup::submit(&mut client, &spec)).collect::<Result<_>>()?;
    wait_for(&world, "running", jobs, PATIENCE)?;
    let all_run_s = begun.elapsed().as_secs_f64();
    let mut most = idle;
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(300));
        most = largest(most, setup::memory(&world.socket())?);
    }
    let begun = Instant::now();
    for id in &ids {
        let (status, body) = client.call("POST", &format!("/v1/jobs/{id}/cancel"), "")?;
        ensure!(status == 202 || status == 200, "cancel: {status} {}", String::from_utf8_lossy(&body));
    }
    wait_for(&world, "done", jobs, PATIENCE)?;
    let all_gone_s = begun.elapsed().as_secs_f64();
    let after = setup::memory(&world.socket())?;
    let settled = settled(&world)?;
    world.end();
    Ok(vec![
        Row::one(format!("daemon: resident with {jobs} live jobs"), most.resident, "MiB"),
        Row::one(format!("daemon: anonymous with {jobs} live jobs"), most.anonymous, "MiB"),
        Row::one("  a live job's share, anonymous", (most.anonymous - idle.anonymous) / jobs as f64, "MiB"),
        Row::one(format!("daemon: resident after {jobs} jobs"), after.resident, "MiB"),
        Row::one(format!("daemon: resident a sweep after {jobs} jobs"), settled.resident, "MiB")
            .bar(Bar::ValueAtMost(IDLE_MIB_MAX)),
        Row::one(format!("{jobs} jobs: submit to all running"), all_run_s, "s"),
        Row::one(format!("{jobs} jobs: cancel to all cleaned up"), all_gone_s, "s"),
    ])
}

/// The daemon's memory once it has given back what it needs no more: it does so with its sweep, each minute.
fn settled(world: &World) -> Result<Memory> {
    let until = Instant::now() + Duration::from_secs(75);
    loop {
        let memory = setup::memory(&world.socket())?;
        if memory.resident <= IDLE_MIB_MAX || Instant::now() >= until {
            return Ok(memory);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn largest(a: Memory, b: Memory) -> Memory {
    Memory {
        resident: a.resident.max(b.resident),
        proportional: a.proportional.max(b.proportional),
        anonymous: a.anonymous.max(b.anonymous),
    }
}

/// Waits until `count` jobs are in a state.
pub(crate) fn wait_for(world: &World, state: &str, count: u64, patience: Duration) -> Result<()> {
    let until = Instant::now() + patience;
    let mut client = Client::connect(&world.socket())?;
    while Instant::now() < until {
        let (_, body) = client.call("GET", &format!("/v1/jobs?limit=1000&state={state}"), "")?;
        let list: Value = serde_json::from_slice(&body)?;
        if list["jobs"].as_array().context("no list")?.len() as u64 == count {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("waited in vain for {count} jobs to be {state}\n{}", world.log())
}
