//! A long queue, beside pueue (the queue for shell commands that people use) with one as long on the same disk: how many
//! submits are durable in a second, how long lists and a restart take, what a queued job costs in memory, what an idle
//! daemon costs in processor time; and a thousand short jobs through two slots, with what is left of them.
//!
//! Clients are compared with clients (`hotcell run -d` and `pueue add`, a process each); the rate of the socket, which
//! pueue has no client for but its own, stands beside them. pueue's queue is made as long as ours by repeating a task of
//! its own in its state file: adding so many would take it an hour.
//!
//! `BENCH_QUEUE` (jobs that wait), `BENCH_SHORT` (short jobs).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::gateway::process::cpu_s;
use crate::http::Client;
use crate::load::wait_for;
use crate::report::{Bar, Row, Samples};
use crate::setup::{self, fake_job, output, setting};
use crate::world::{PATIENCE, World};

/// Clients that submit at the same time.
const SUBMITTERS: usize = 8;
/// Commands of a client that are timed.
const COMMANDS: u64 = 30;
/// How long an idle daemon is watched.
const IDLE: Duration = Duration::from_secs(10);
/// Longest wait for anything of pueue's.
const PUEUE_MAX: Duration = Duration::from_secs(60);

/// Bars of the project.
const TIMES_PUEUE_MIN: f64 = 10.0;
const RESTART_MS_MAX: f64 = 1000.0;
const QUEUED_KIB_MAX: f64 = 2.0;
/// The kernel counts in hundredths of a second: one of them in [`IDLE`].
const IDLE_CPU_MS_MAX: f64 = 10.0;

/// What was measured of ours.
struct Ours {
    rows: Vec<Row>,
    add: Samples,
    list: Samples,
    filter: Samples,
    restart: Samples,
    per_s: Samples,
}

/// All of it.
pub(crate) fn measure() -> Result<Vec<Row>> {
    let queued = setting("BENCH_QUEUE", 10_000);
    let ours = ours(queued)?;
    eprintln!("queue: pueue …");
    let mut pueue = Pueue::with_queue(queued)?;
    let add = timed(COMMANDS, || pueue.ok(&["add", "--", "true"]))?;
    let list = timed(COMMANDS / 3, || pueue.ok(&["status", "--json"]))?;
    let filter = timed(COMMANDS / 3, || pueue.ok(&["status", "--json", "status=running"]))?;
    let restart = pueue.restart()?;
    let per_s: Samples = std::iter::once(1000.0 / add.median()).collect();
    let mut rows = ours.rows;
    rows.extend([
        Row::median(
            format!("submits per second, {queued} queued, {SUBMITTERS} clients"),
            &ours.per_s,
            "jobs/s",
        )
        .against("pueue add", &per_s)
        .bar(Bar::RatioAtLeast(TIMES_PUEUE_MIN)),
        Row::median(format!("`hotcell run -d`, {queued} queued"), &ours.add, "ms").against("pueue add", &add),
        Row::median(format!("`hotcell ls -n 1000` of {queued}"), &ours.list, "ms")
            .against("pueue status", &list),
        Row::median(format!("`hotcell ls -s running` of {queued}"), &ours.filter, "ms")
            .against("pueue status", &filter),
        Row::median(format!("restart with {queued} queued, to the first answer"), &ours.restart, "ms")
            .against("pueued", &restart)
            .bar(Bar::ValueAtMost(RESTART_MS_MAX)),
    ]);
    drop(pueue);
    rows.extend(short_jobs()?);
    Ok(rows)
}

/// A queue of so many jobs behind one that holds the only slot.
fn ours(queued: u64) -> Result<Ours> {
    let config = "[limits]\nslots = 1\nqueued_jobs_max = 100000\ndrain_s = 1\ncancel_grace_s = 2\n";
    let mut world = setup::world_with_fake(config)?;
    world.start();
    let idle_cpu_ms = idle_cpu_ms(world.pid())?;
    let mut client = Client::connect(&world.socket())?;
    setup::submit(&mut client, &fake_job(1_000_000, 1000).to_string())?;
    wait_for(&world, "running", 1, PATIENCE)?;
    let spec = fake_job(1, 0).to_string();
    // One client, one call at a time: what a caller waits.
    let few = submit_timed(&mut client, &spec, 500.min(queued))?;
    let before = setup::memory(&world.socket())?;
    let rest = queued.saturating_sub(1000).max(1);
    submit_by_many(&world, &spec, rest)?;
    let many = submit_timed(&mut client, &spec, 500.min(queued))?;
    let memory = setup::memory(&world.socket())?;
    let kib = (memory.anonymous - before.anonymous) * 1024.0 / (rest + 500) as f64;
    let per_s: Samples = (0..3)
        .map(|_| submit_by_many(&world, &spec, 1000))
        .collect::<Result<Vec<f64>>>()?
        .into_iter()
        .collect();
    let page = list_timed(&mut client, 100)?;
    let pages = list_timed(&mut client, 1000)?;
    let work = world.path("w");
    std::fs::create_dir_all(&work)?;
    let cli =
        |args: &[&str]| output(world.hotcell().current_dir(&work).args(args).stdin(Stdio::null())).map(drop);
    let add = timed(COMMANDS, || cli(&["run", "-d", "-p", "trusted", "print"]))?;
    let list = timed(COMMANDS / 3, || cli(&["ls", "--json", "-n", "1000"]))?;
    let filter = timed(COMMANDS / 3, || cli(&["ls", "--json", "-s", "running"]))?;
    let mut restart = Samples::default();
    for _ in 0..3 {
        world.kill();
        let begun = Instant::now();
        world.start();
        restart.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    // Ended by a drain: a cancelled job would let the next of the queue start.
    world.terminate();
    world.end();
    let rows = vec![
        Row::median("submit, empty queue", &few, "ms"),
        Row::one("submit, empty queue: p99", few.percentile(99), "ms"),
        Row::median(format!("submit, {queued} queued"), &many, "ms"),
        Row::one(format!("submit, {queued} queued: p99"), many.percentile(99), "ms"),
        Row::median(format!("list 100 of {queued}"), &page, "ms"),
        Row::median(format!("list 1000 of {queued}"), &pages, "ms"),
        Row::one(format!("daemon: resident with {queued} queued"), memory.resident, "MiB"),
        Row::one("  a queued job's share, anonymous", kib, "KiB").bar(Bar::ValueAtMost(QUEUED_KIB_MAX)),
        Row::one(format!("idle daemon: processor time in {} s", IDLE.as_secs()), idle_cpu_ms, "ms")
            .bar(Bar::ValueAtMost(IDLE_CPU_MS_MAX)),
    ];
    Ok(Ours { rows, add, list, filter, restart, per_s })
}

fn idle_cpu_ms(pid: u32) -> Result<f64> {
    // What a start leaves to do is done by then.
    std::thread::sleep(Duration::from_secs(3));
    let before = cpu_s(&[pid])?;
    std::thread::sleep(IDLE);
    Ok((cpu_s(&[pid])? - before) * 1000.0)
}

/// Submits by several clients at once; durable jobs per second.
fn submit_by_many(world: &World, spec: &str, count: u64) -> Result<f64> {
    let workers = SUBMITTERS as u64;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = Client::connect(&world.socket())?;
                    submit_timed(&mut client, spec, count / workers).map(drop)
                })
            })
            .collect();
        handles.into_iter().try_for_each(|handle| match handle.join() {
            Ok(done) => done,
            Err(_) => bail!("a submitter died"),
        })
    })?;
    Ok((count / workers * workers) as f64 / begun.elapsed().as_secs_f64())
}

fn submit_timed(client: &mut Client, spec: &str, count: u64) -> Result<Samples> {
    timed(count, || setup::submit(client, spec).map(drop))
}

fn list_timed(client: &mut Client, limit: u64) -> Result<Samples> {
    timed(20, || {
        let (status, _) = client.call("GET", &format!("/v1/jobs?limit={limit}"), "")?;
        ensure!(status == 200, "list: {status}");
        Ok(())
    })
}

/// Milliseconds of each.
fn timed(count: u64, mut one: impl FnMut() -> Result<()>) -> Result<Samples> {
    let one = |_| {
        let begun = Instant::now();
        one()?;
        Ok(begun.elapsed().as_secs_f64() * 1000.0)
    };
    (0..count).map(one).collect::<Result<Vec<f64>>>().map(Samples::from_iter)
}

/// Short jobs of a trivial agent through two slots; the world's end proves that nothing is left of them.
fn short_jobs() -> Result<Vec<Row>> {
    let jobs = setting("BENCH_SHORT", 1000);
    let mut world = setup::world_with_fake("[limits]\nslots = 2\nqueued_jobs_max = 100000\n")?;
    world.start();
    let mut client = Client::connect(&world.socket())?;
    let spec = fake_job(1, 0).to_string();
    let begun = Instant::now();
    for _ in 0..jobs {
        setup::submit(&mut client, &spec)?;
    }
    let until = begun + Duration::from_secs(60 + jobs * 5);
    while world.sql("SELECT count(*) FROM jobs WHERE state = 'done'") != jobs.to_string() {
        ensure!(Instant::now() < until, "{jobs} short jobs are not over: {}", world.log());
        std::thread::sleep(Duration::from_millis(200));
    }
    let took_s = begun.elapsed().as_secs_f64();
    let succeeded = world.sql("SELECT count(*) FROM jobs WHERE state_json LIKE '%succeeded%'");
    ensure!(succeeded == jobs.to_string(), "{succeeded} of {jobs} short jobs succeeded");
    let left = left(&world)?;
    world.end();
    Ok(vec![
        Row::one(format!("{jobs} short jobs through 2 slots"), jobs as f64 / took_s, "jobs/s"),
        Row::one(format!("left of {jobs} short jobs"), left as f64, "").bar(Bar::ValueAtMost(0.0)),
    ])
}

/// Containers, mounts, loop devices, cell directories and open reservations of a world whose jobs are all over.
fn left(world: &World) -> Result<usize> {
    let filter = format!("label=hotcell.instance={}", world.instance());
    let containers = output(setup::docker().args(["ps", "-aq", "--filter", &filter]))?.lines().count();
    let state = world.state_dir().canonicalize()?;
    let of_ours = |text: &str| text.contains(&*state.to_string_lossy());
    let mounts =
        std::fs::read_to_string("/proc/self/mountinfo")?.lines().filter(|line| of_ours(line)).count();
    let backing =
        |block: std::fs::DirEntry| std::fs::read_to_string(block.path().join("loop/backing_file")).ok();
    let loops =
        std::fs::read_dir("/sys/block")?.flatten().filter_map(backing).filter(|file| of_ours(file)).count();
    let cells = std::fs::read_dir(state.join("cells"))?.count();
    let reservations: usize = world.sql("SELECT count(*) FROM ledger WHERE status = 'open'").parse()?;
    Ok(containers + mounts + loops + cells + reservations)
}

/// A pueue daemon in a directory of its own, with one running task and a long queue.
struct Pueue {
    dir: tempfile::TempDir,
    daemon: Option<Child>,
}

impl Pueue {
    fn with_queue(queued: u64) -> Result<Self> {
        // On the disk of the cells.
        let dir = tempfile::Builder::new().prefix("hc-").tempdir_in("/var/tmp")?;
        let path = dir.path().display();
        let config = format!(
            "shared:\n  pueue_directory: {path}\n  runtime_directory: {path}\n  use_unix_socket: true\n  \
             unix_socket_path: {path}/s\n  pid_path: {path}/pid\n"
        );
        std::fs::write(dir.path().join("pueue.yml"), config)?;
        let mut pueue = Self { dir, daemon: None };
        pueue.start()?;
        pueue.ok(&["add", "--", "sleep", "3600"])?;
        pueue.ok(&["add", "--", "true"])?;
        pueue.stop()?;
        pueue.lengthen(queued)?;
        pueue.start()?;
        Ok(pueue)
    }

    /// Repeats the queued task in the state file.
    fn lengthen(&self, queued: u64) -> Result<()> {
        let file = self.dir.path().join("state.json");
        let mut state: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
        let tasks = state["tasks"].as_object_mut().context("pueue's state has no tasks")?;
        let last = tasks.values().next_back().context("pueue has no task")?.clone();
        for id in 2..queued {
            let mut task = last.clone();
            task["id"] = id.into();
            tasks.insert(id.to_string(), task);
        }
        std::fs::write(&file, serde_json::to_vec(&state)?)?;
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(tools().join(program));
        command.arg("--config").arg(self.dir.path().join("pueue.yml")).stdin(Stdio::null());
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", self.dir.path());
        command
    }

    fn ok(&self, args: &[&str]) -> Result<()> {
        output(self.command("pueue").args(args)).map(drop)
    }

    /// Starts the daemon, and waits until it answers.
    fn start(&mut self) -> Result<()> {
        let log = std::fs::File::create(self.dir.path().join("log"))?;
        let mut command = self.command("pueued");
        command.stdout(log.try_clone()?).stderr(log);
        self.daemon = Some(command.spawn().context("start pueued: run `make bench-tools`")?);
        let until = Instant::now() + PUEUE_MAX;
        while self.ok(&["status", "--json", "status=running"]).is_err() {
            ensure!(Instant::now() < until, "pueued does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// kill -9, as for ours.
    fn stop(&mut self) -> Result<()> {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill()?;
            daemon.wait()?;
        }
        Ok(())
    }

    fn restart(&mut self) -> Result<Samples> {
        self.stop()?;
        let begun = Instant::now();
        self.start()?;
        Ok(std::iter::once(begun.elapsed().as_secs_f64() * 1000.0).collect())
    }
}

impl Drop for Pueue {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

fn tools() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench-pueue/bin")
}
