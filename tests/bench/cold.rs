//! A cold job, from the request to its result and to its proven clean-up, beside what people do without
//! hotcell: a hardened `docker run` written by hand, and the bare CLI on the host. The same CLI, prompt,
//! script of the model, limits and walls; the runs take turns, so that the machine's moods hit all alike.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use hotcell::model::{Listener, Recorder, Script, serve};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::http::Client;
use crate::report::{Bar, Row, Samples};
use crate::setup::{self, Baselines, IDLE_MIB_MAX, UID, docker, own_dir, setting};
use crate::world::{World, one_command};

const PROMPT: &str = "run the command";
const MODEL: &str = "claude-sonnet-4-6";
const MEMORY_MIB: u32 = 4096;
const CPUS: f64 = 2.0;
const PIDS: u32 = 1024;
/// Waits of a job that its events show: from the first time to the second.
const STAGES: [&str; 8] = [
    "queued → slot",
    "slot → cell started",
    "cell started → CLI ready",
    "CLI ready → first request",
    "first request → result",
    "result → CLI ended",
    "CLI ended → collecting",
    "collecting → done",
];

/// One run, in milliseconds from its start.
struct Run {
    result_ms: f64,
    clean_ms: f64,
}

/// The model of the baselines, on loopback and on a unix socket.
struct Model {
    _runtime: tokio::runtime::Runtime,
    stop: CancellationToken,
    base_url: String,
}

impl Drop for Model {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// The samples of one way to run the task.
#[derive(Default)]
struct Way {
    result: Samples,
    clean: Samples,
}

impl Way {
    fn take(&mut self, run: &Run) {
        self.result.push(run.result_ms);
        self.clean.push(run.clean_ms);
    }
}

/// Runs all three in turn, `BENCH_COLD_N` times after a warm-up.
pub(crate) fn measure() -> Result<Vec<Row>> {
    let n = setting("BENCH_COLD_N", 12);
    let script = one_command("echo measured; ls");
    let world = World::with(&script, "[limits]\nslots = 1\n");
    let idle = setup::memory(&world.socket())?;
    let bench = Bench::new(&world, &script)?;
    let (mut cell, mut run, mut bare) = (Way::default(), Way::default(), Way::default());
    let mut stages: Vec<Samples> = vec![Samples::default(); STAGES.len()];
    let mut phases_before = Vec::new();
    for round in 0..=n {
        let (ours, events) = bench.hotcell(&world)?;
        let (theirs, host) = (bench.docker_run(round)?, bench.host(round)?);
        if round == 0 {
            phases_before = phases(&world)?;
            continue;
        }
        cell.take(&ours);
        run.take(&theirs);
        bare.take(&host);
        for (stage, ms) in stages.iter_mut().zip(stages_of(&events)?) {
            stage.push(ms);
        }
    }
    let after = setup::memory(&world.socket())?;
    let mut rows = vec![
        Row::median("cold job: submit to result", &cell.result, "ms")
            .against("docker run", &run.result)
            .bar(Bar::RatioAtMost(1.15)),
        Row::median("cold job: submit to clean-up", &cell.clean, "ms").against("docker run", &run.clean),
        Row::median("cold job: submit to result", &cell.result, "ms").against("bare CLI", &bare.result),
        Row::median("docker run: to result", &run.result, "ms").against("bare CLI", &bare.result),
    ];
    rows.extend(STAGES.iter().zip(&stages).map(|(name, ms)| Row::median(format!("  {name}"), ms, "ms")));
    for ((name, before), (_, after)) in phases_before.iter().zip(phases(&world)?) {
        let mean_ms = (after.0 - before.0) / (after.1 - before.1) * 1000.0;
        rows.push(Row::one(format!("  hotcell_job_phase_seconds: {name}, mean"), mean_ms, "ms"));
    }
    rows.push(
        Row::one("daemon: resident after start", idle.resident, "MiB").bar(Bar::ValueAtMost(IDLE_MIB_MAX)),
    );
    rows.push(Row::one("daemon: proportional after start", idle.proportional, "MiB"));
    rows.push(Row::one("daemon: anonymous after start", idle.anonymous, "MiB"));
    rows.push(
        Row::one(format!("daemon: resident after {} jobs", n + 1), after.resident, "MiB")
            .bar(Bar::ValueAtMost(IDLE_MIB_MAX)),
    );
    drop(bench);
    world.end();
    Ok(rows)
}

/// What the three ways need.
struct Bench {
    dir: PathBuf,
    image: String,
    claude: PathBuf,
    seccomp: PathBuf,
    model: Model,
    spec: String,
    baselines: Baselines,
}

impl Bench {
    fn new(world: &World, script: &str) -> Result<Self> {
        let dir = world.path("base");
        std::fs::create_dir(&dir)?;
        let seccomp = dir.join("seccomp.json");
        std::fs::write(&seccomp, hotcell::engine::SECCOMP_PROFILE)?;
        let workspace = world.workspace("repo", 0);
        std::fs::write(workspace.join("greeting.txt"), "hello\n")?;
        let spec = json!({
            "prompt": PROMPT, "policy": "trusted", "model": MODEL,
            "workspace": { "path": workspace, "mode": "bind" },
            "limits": { "memory_mib": MEMORY_MIB, "cpus": CPUS, "pids": PIDS, "disk_mib": 4096 },
        });
        let model = start_model(script, &dir)?;
        let (image, claude) = (setup::image_id(world)?, setup::real_cli(world)?);
        Ok(Self { dir, image, claude, seccomp, model, spec: spec.to_string(), baselines: Baselines::new() })
    }

    fn hotcell(&self, world: &World) -> Result<(Run, Vec<Value>)> {
        let begun = Instant::now();
        let mut client = Client::connect(&world.socket())?;
        let id = setup::submit(&mut client, &self.spec)?;
        let mut result_ms = None;
        let mut lines: Vec<Vec<u8>> = Vec::new();
        client.lines(&format!("/v1/jobs/{id}/events?follow=1"), |line| {
            if result_ms.is_none() && memchr::memmem::find(line, br#""frame":{"type":"result""#).is_some() {
                result_ms = Some(ms_since(begun));
            }
            lines.push(line.to_vec());
            Ok(())
        })?;
        let clean_ms = ms_since(begun);
        let events: Vec<Value> = lines.iter().map(|l| serde_json::from_slice(l)).collect::<Result<_, _>>()?;
        let last = events.last().context("no events")?;
        if last["state"] != "done" || last["outcome"] != "succeeded" {
            bail!("the job did not succeed: {last}\n{}", world.log());
        }
        Ok((Run { result_ms: result_ms.context("no result frame")?, clean_ms }, events))
    }

    /// The hardened command that a careful person would write.
    fn docker_run(&self, round: u64) -> Result<Run> {
        let at = self.dir.join(format!("docker-{round}"));
        let bind = |name: &str, target: &str| format!("{}:{target}", at.join(name).display());
        for name in ["home", "tmp", "workspace"] {
            own_dir(&at.join(name))?;
        }
        std::fs::write(at.join("workspace/greeting.txt"), "hello\n")?;
        let user = format!("{UID}:{UID}");
        let memory = format!("{MEMORY_MIB}m");
        let mut command = docker();
        command.args([
            "run",
            "--rm",
            "--label",
            &self.baselines.label,
            "--network",
            "none",
            "--cap-drop",
            "ALL",
        ]);
        command.args(["--security-opt", "no-new-privileges"]);
        command.arg("--security-opt").arg(format!("seccomp={}", self.seccomp.display()));
        command.args(["--read-only", "--user", &user, "--memory", &memory, "--memory-swap", &memory]);
        command.args([
            "--pids-limit",
            &PIDS.to_string(),
            "--cpus",
            &CPUS.to_string(),
            "--log-driver",
            "none",
        ]);
        command.args(["-v", &bind("home", "/home/agent"), "-v", &bind("tmp", "/tmp")]);
        command.args(["-v", &bind("workspace", "/workspace"), "-w", "/workspace"]);
        command.arg("-v").arg(format!("{}:/.hotcell:ro", self.dir.join("run").display()));
        for (name, value) in environment("/home/agent") {
            command.arg("-e").arg(format!("{name}={value}"));
        }
        command.args([
            "-e",
            "ANTHROPIC_UNIX_SOCKET=/.hotcell/api.sock",
            "-e",
            "ANTHROPIC_BASE_URL=http://hotcell",
        ]);
        command.args([&self.image, "claude"]).args(cli_arguments());
        timed(command)
    }

    fn host(&self, round: u64) -> Result<Run> {
        let at = self.dir.join(format!("host-{round}"));
        own_dir(&at)?;
        for name in ["home", "workspace"] {
            own_dir(&at.join(name))?;
        }
        std::fs::write(at.join("workspace/greeting.txt"), "hello\n")?;
        let mut command = Command::new(&self.claude);
        let path = std::env::var_os("PATH").unwrap_or_default();
        command.env_clear().env("PATH", path).envs(environment(&at.join("home").to_string_lossy()));
        command.env("ANTHROPIC_BASE_URL", &self.model.base_url).env("CLAUDE_CODE_TMPDIR", &at);
        command
            .args(cli_arguments())
            .current_dir(at.join("workspace"))
            .uid(UID)
            .gid(UID)
            .stdin(Stdio::null());
        timed(command)
    }
}

fn environment(home: &str) -> Vec<(String, String)> {
    let pairs = [
        ("HOME", home),
        ("LANG", "C.UTF-8"),
        ("TERM", "dumb"),
        ("SHELL", "/bin/bash"),
        ("ANTHROPIC_API_KEY", "bench"),
        ("CLAUDE_CODE_PROVIDER_MANAGED_BY_HOST", "1"),
        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"),
        ("DISABLE_AUTOUPDATER", "1"),
    ];
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

/// As hotcell's own, as far as a one-shot call has them.
fn cli_arguments() -> Vec<String> {
    let model = format!("--model={MODEL}");
    let arguments = [
        "-p",
        PROMPT,
        "--output-format=stream-json",
        "--verbose",
        "--strict-mcp-config",
        "--permission-mode=bypassPermissions",
        "--setting-sources=project",
        r#"--managed-settings={"allowManagedHooksOnly":true}"#,
        "--max-turns=1000",
        "--disallowedTools=AskUserQuestion,EnterPlanMode,ExitPlanMode,WebFetch,WebSearch",
        &model,
    ];
    arguments.map(str::to_owned).into()
}

/// Runs a command that prints stream-json, to its result and to its end.
fn timed(mut command: Command) -> Result<Run> {
    let begun = Instant::now();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().context("no stdout")?;
    let (mut result, mut result_ms) = (String::new(), None);
    for line in BufReader::with_capacity(256 * 1024, stdout).lines() {
        let line = line?;
        if line.starts_with(r#"{"type":"result""#) {
            result_ms.get_or_insert_with(|| ms_since(begun));
            result = line;
        }
    }
    let output = child.wait_with_output()?;
    let clean_ms = ms_since(begun);
    let frame: Value = serde_json::from_str(&result).unwrap_or_default();
    if !output.status.success() || frame["is_error"] != false || frame["num_turns"] != 2 {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("a baseline failed ({}): {result} {stderr}", output.status);
    }
    Ok(Run { result_ms: result_ms.context("no result frame")?, clean_ms })
}

fn start_model(script: &str, dir: &Path) -> Result<Model> {
    use std::os::unix::fs::PermissionsExt;
    let script = Arc::new(Script::parse(script, "bench")?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let stop = CancellationToken::new();
    let run = dir.join("run");
    std::fs::create_dir(&run)?;
    let guard = runtime.enter();
    let unix = tokio::net::UnixListener::bind(run.join("api.sock"))?;
    std::fs::set_permissions(run.join("api.sock"), std::fs::Permissions::from_mode(0o666))?;
    let tcp = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
    let base_url = format!("http://{}", tcp.local_addr()?);
    for listener in [Listener::Unix(unix), Listener::Tcp(tcp)] {
        runtime.spawn(serve(listener, script.clone(), Arc::new(Recorder::memory()), stop.clone()));
    }
    drop(guard);
    Ok(Model { _runtime: runtime, stop, base_url })
}

/// The waits of [`STAGES`], from the events' times.
fn stages_of(events: &[Value]) -> Result<Vec<f64>> {
    let first = |what: &str, test: &dyn Fn(&Value) -> bool| -> Result<f64> {
        let event = events.iter().find(|e| test(e)).with_context(|| format!("no event: {what}"))?;
        event["at_ms"].as_f64().context("an event without a time")
    };
    let state = |name: &str| first(name, &|e| e["type"] == "state" && e["state"] == name);
    let kind = |name: &str| first(name, &|e| e["type"] == name);
    let result = first("result", &|e| e["type"] == "frame" && e["frame"]["type"] == "result")?;
    let times = [
        state("queued")?,
        state("preparing")?,
        kind("sent")?,
        state("running")?,
        kind("request")?,
        result,
        kind("exit")?,
        state("collecting")?,
        state("done")?,
    ];
    Ok(times.windows(2).map(|pair| pair[1] - pair[0]).collect())
}

/// Sum and count of each phase, from the daemon's metrics.
fn phases(world: &World) -> Result<Vec<(String, (f64, f64))>> {
    let (_, body) = Client::connect(&world.socket())?.call("GET", "/metrics", "")?;
    let text = String::from_utf8_lossy(&body).into_owned();
    let value = |name: &str, phase: &str| -> Result<f64> {
        let start = format!("hotcell_job_phase_seconds_{name}{{phase=\"{phase}\"}} ");
        let line =
            text.lines().find_map(|l| l.strip_prefix(&start)).with_context(|| format!("no {start}"))?;
        Ok(line.parse()?)
    };
    ["prepare", "boot", "run", "collect"]
        .iter()
        .map(|phase| Ok(((*phase).to_owned(), (value("sum", phase)?, value("count", phase)?))))
        .collect()
}

fn ms_since(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1000.0
}
