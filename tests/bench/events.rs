//! Events through the whole path: a stand-in agent prints numbered frames, and each must arrive in the
//! journal and at a client once, in order. Beside it the same program under `docker run`.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::http::Client;
use crate::report::{Bar, Row, Samples};
use crate::setup::{self, Baselines, docker, fake_job, setting};
use crate::world::World;

/// Size of a frame with its line feed.
const LINE_BYTES: u64 = 1024;

/// How fast frames went by: in the journal by the daemon's clock, at the client by ours.
struct Rates {
    journal: f64,
    client: f64,
}

/// Frames with and without a client that follows, and the same under `docker run`, in turn.
pub(crate) fn measure() -> Result<Vec<Row>> {
    let (n, lines) = (setting("BENCH_EVENTS_N", 5), setting("BENCH_EVENTS", 200_000));
    let config = "[limits]\nslots = 1\njournal_bytes_max = 4294967296\n";
    let mut world = setup::world_with_fake(config)?;
    world.start();
    let baselines = Baselines::new();
    let (mut alone, mut followed, mut client) = (Samples::default(), Samples::default(), Samples::default());
    let (mut attached, mut json_file) = (Samples::default(), Samples::default());
    for round in 0..=n {
        let without = one_job(&world, lines, false)?;
        let with = one_job(&world, lines, true)?;
        let none = docker_run(&world, &baselines, lines, "none")?;
        let file = docker_run(&world, &baselines, lines, "json-file")?;
        if round > 0 {
            alone.push(without.journal);
            followed.push(with.journal);
            client.push(with.client);
            attached.push(none);
            json_file.push(file);
        }
    }
    drop(baselines);
    let after = setup::memory(&world.socket())?;
    world.end();
    Ok(vec![
        Row::median("events into the journal, nobody follows", &alone, "events/s")
            .against("docker run, json-file", &json_file)
            .bar(Bar::ValueAtLeast(150_000.0)),
        Row::median("events into the journal, one client follows", &followed, "events/s")
            .against("docker run, json-file", &json_file),
        Row::median("events to a client that follows", &client, "events/s")
            .against("docker run, json-file", &json_file),
        Row::median("docker run, log driver none", &attached, "events/s")
            .against("docker run, json-file", &json_file),
        Row::one("daemon: resident after the events", after.resident, "MiB"),
    ])
}

/// One job of `lines` frames. Each frame is looked at: none may be lost, doubled or out of order.
fn one_job(world: &World, lines: u64, follow: bool) -> Result<Rates> {
    let mut client = Client::connect(&world.socket())?;
    let mut seen = Seen::default();
    let id = setup::submit(&mut client, &fake_job(lines, 0).to_string())?;
    if !follow {
        wait_until_done(world, &id)?;
    }
    let follow = u8::from(follow);
    client.lines(&format!("/v1/jobs/{id}/events?from=1&follow={follow}"), |line| seen.take(line))?;
    ensure!(seen.frames == lines, "{} of {lines} frames arrived\n{}", seen.frames, world.log());
    let (status, _) = Client::connect(&world.socket())?.call("DELETE", &format!("/v1/jobs/{id}"), "")?;
    ensure!(status == 204, "deleting a job: {status}");
    let client_s = seen.last.zip(seen.first).map_or(0.0, |(last, first)| (last - first).as_secs_f64());
    let journal_s = (seen.last_ms - seen.first_ms) as f64 / 1000.0;
    Ok(Rates { journal: lines as f64 / journal_s, client: lines as f64 / client_s })
}

fn wait_until_done(world: &World, id: &str) -> Result<()> {
    let mut client = Client::connect(&world.socket())?;
    let until = Instant::now() + crate::world::PATIENCE;
    while Instant::now() < until {
        let (_, body) = client.call("GET", &format!("/v1/jobs/{id}"), "")?;
        let view: serde_json::Value = serde_json::from_slice(&body)?;
        if view["state"] == "done" {
            ensure!(view["outcome"] == "succeeded", "the job did not succeed: {view}\n{}", world.log());
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    bail!("a job does not end\n{}", world.log())
}

/// What arrived.
#[derive(Default)]
struct Seen {
    seq: u64,
    frames: u64,
    first: Option<Instant>,
    last: Option<Instant>,
    first_ms: u64,
    last_ms: u64,
}

impl Seen {
    fn take(&mut self, line: &[u8]) -> Result<()> {
        let seq = number(line, b"{\"seq\":").context("an event without a number")?;
        ensure!(seq == self.seq + 1, "event {seq} after {}", self.seq);
        self.seq = seq;
        let head = &line[..line.len().min(240)];
        let Some(n) = number(head, br#""subtype":"bench","n":""#) else { return Ok(()) };
        ensure!(n == self.frames, "frame {n} where {} was due", self.frames);
        let at_ms = number(head, br#""at_ms":"#).context("an event without a time")?;
        if self.frames == 0 {
            (self.first, self.first_ms) = (Some(Instant::now()), at_ms);
        }
        // The clock is asked for once in a while only; the last frames count little.
        if self.frames.is_multiple_of(64) {
            self.last = Some(Instant::now());
        }
        self.frames += 1;
        self.last_ms = at_ms;
        Ok(())
    }
}

/// The number after `key`.
fn number(text: &[u8], key: &[u8]) -> Option<u64> {
    let rest = &text[memchr::memmem::find(text, key)? + key.len()..];
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit());
    Some(digits.fold(0, |value, digit| value * 10 + u64::from(digit - b'0')))
}

/// The same program under `docker run`, its output through the client, the log kept by `driver`.
fn docker_run(world: &World, baselines: &Baselines, lines: u64, driver: &str) -> Result<f64> {
    let platform = hotcell::agent_bundle::Platform::of_host()?;
    let binary = world.state_dir().join(format!("agents/{}-{platform}/claude", setup::FAKE));
    let mut command = docker();
    command.args(["run", "--rm", "--label", &baselines.label, "--network", "none", "--log-driver", driver]);
    command.arg("-v").arg(format!("{}:/agent:ro", binary.display()));
    command.args(["-e", &format!("BENCH_LINES={lines}"), "-e", &format!("BENCH_LINE_BYTES={LINE_BYTES}")]);
    command.args(["--entrypoint", "/agent", &setup::image_id(world)?, "--print"]);
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut stdout = BufReader::with_capacity(512 * 1024, child.stdout.take().context("no stdout")?);
    let (mut count, mut first, mut last) = (0u64, None, Instant::now());
    loop {
        let block = stdout.fill_buf()?;
        if block.is_empty() {
            break;
        }
        last = Instant::now();
        first.get_or_insert(last);
        count += memchr::memchr_iter(b'\n', block).count() as u64;
        let used = block.len();
        stdout.consume(used);
    }
    let status = child.wait()?;
    ensure!(
        status.success() && count == lines,
        "docker run ended with {status} after {count} of {lines} lines"
    );
    Ok(count as f64 / last.duration_since(first.context("no output")?).as_secs_f64())
}
