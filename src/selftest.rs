//! The protocol self-test: are the facts that the session driver leans on true for this version of the CLI?
//! Runs a daemon of its own in this process, with a state directory of its own, real cells and the scripted
//! model on loopback, and asks the events of real jobs. Leaves nothing behind, whatever comes out.
//! `hotcell serve --require-doctor` asks the doctor in the same way ([`doctor`]), before there is a daemon to ask.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use crate::agent_bundle::{Report, Version};
use crate::api::wire::{CheckVerdict, Doctor, ErrorBody};
use crate::clock;
use crate::config::{self, ApiKeySource, Config};
use crate::daemon::{self, Listeners};
use crate::driver::{How, Shutdown};
use crate::engine::docker::Docker;
use crate::engine::{Engine, find_address};
use crate::model::{self, Recorder, Script};

/// Longest run of one check.
const CHECK_MAX: Duration = Duration::from_secs(120);
/// Largest answer of our own daemon, in bytes.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// What the scripted model says: the first word of the prompt picks the check.
const SCRIPT: &str = include_str!("selftest/script.toml");

/// Why a version is not qualified.
#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    /// The test could not be run: no engine, no image.
    #[error("the self-test could not be run: {0:#}")]
    Setup(anyhow::Error),
    /// A fact does not hold.
    #[error("{name}: {why}")]
    Check {
        /// Which one.
        name: &'static str,
        /// What was seen.
        why: String,
    },
}

/// What a check wants to see of a job.
struct Seen {
    events: Vec<Value>,
    job: Value,
}

type Check = (&'static str, Value, fn(&Seen) -> Result<(), String>);

/// Tests an installed version.
///
/// # Errors
/// [`SelfTestError`].
pub async fn run(config: &Config, version: &Version) -> Result<Report, SelfTestError> {
    let begun = std::time::Instant::now();
    let dir = tempfile::Builder::new()
        .prefix("selftest-")
        .tempdir_in(&config.state_dir)
        .context("cannot make a directory for the self-test")
        .map_err(SelfTestError::Setup)?;
    let key = dir.path().join("key");
    std::fs::write(&key, "scripted").context("cannot write").map_err(SelfTestError::Setup)?;
    let lab = Lab::start(config, version, dir.path(), key).await.map_err(SelfTestError::Setup)?;
    let mut passed = Vec::new();
    let mut failed = None;
    for (name, spec, check) in checks() {
        let seen = match tokio::time::timeout(CHECK_MAX, lab.job(&spec)).await {
            Ok(Ok(seen)) => check(&seen),
            Ok(Err(error)) => Err(format!("{error:#}")),
            Err(_) => Err(format!("no end within {} s", CHECK_MAX.as_secs())),
        };
        match seen {
            Ok(()) => passed.push(name.to_owned()),
            Err(why) => {
                failed = Some(SelfTestError::Check { name, why });
                break;
            }
        }
    }
    lab.stop().await.map_err(SelfTestError::Setup)?;
    match failed {
        Some(error) => Err(error),
        None => Ok(Report {
            at_ms: clock::wall_ms(),
            duration_ms: begun.elapsed().as_millis() as u64,
            checks: passed,
        }),
    }
}

/// Where the daemon of [`doctor`] lives, in the state directory: always the same, so that what a killed one left is put
/// right by the next.
const DOCTOR_DIR: &str = "doctor";
/// Longest wait for the doctor's answer: a little more than it takes for itself.
const DOCTOR_MAX: Duration = Duration::from_secs(300);

/// Why the daemon does not start on this machine.
#[derive(Debug, thiserror::Error)]
pub enum Unhealthy {
    /// The machine lacks something.
    #[error("--require-doctor: this machine lacks something that jobs need: {what}")]
    Lacks {
        /// The checks that failed.
        what: String,
    },
    /// A cell did not keep what every cell promises.
    #[error("--require-doctor: a cell under the policy {policy} does not keep its promises: {what}")]
    Broken {
        /// The policy.
        policy: String,
        /// The promises.
        what: String,
    },
}

/// Asks the doctor of a daemon with this configuration, and lets it attack a cell: before the real one opens its store or
/// listens. Everything is asked as whoever starts the daemon.
///
/// # Errors
/// [`Unhealthy`], and what keeps the doctor from answering.
pub async fn doctor(
    config: &Config,
    policy: Option<&str>,
    engine: Arc<dyn Engine>,
    address: &str,
    shutdown: &Shutdown,
) -> anyhow::Result<()> {
    let dir = config.state_dir.join(DOCTOR_DIR);
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot make {}", dir.display()));
        }
        Ok(()) | Err(_) => {}
    }
    // Of a daemon that was killed. Its store stays: by it the cell that it left is found and removed.
    for (name, remove) in [
        ("s", std::fs::remove_file as fn(PathBuf) -> std::io::Result<()>),
        ("agents", std::fs::remove_dir_all),
        ("images", std::fs::remove_dir_all),
    ] {
        match remove(dir.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {name} in {}", dir.display()));
            }
            Ok(()) | Err(_) => {}
        }
    }
    let mut own = config.clone();
    own.access = Vec::new();
    let lab = Lab::open(own, &dir, engine, address.to_owned())?;
    let asked = json!({ "policy": policy }).to_string();
    let asking = tokio::time::timeout(DOCTOR_MAX, lab.call("POST", "/v1/doctor", asked));
    let answer = tokio::select! {
        answer = asking => answer.unwrap_or_else(|_| Err(anyhow!("no answer within {} s", DOCTOR_MAX.as_secs()))),
        _ = shutdown.begun() => Err(anyhow!("stopped while the doctor was at work")),
    };
    lab.stop().await.context("the daemon of the doctor")?;
    if let Err(error) = std::fs::remove_dir_all(&dir) {
        tracing::warn!(%error, dir = %dir.display(), "what the doctor needed is left");
    }
    let answer = answer.context("--require-doctor")?;
    let doctor: Doctor = match (serde_json::from_slice(&answer), serde_json::from_slice::<ErrorBody>(&answer))
    {
        (Ok(doctor), _) => doctor,
        (Err(_), Ok(refused)) => bail!("--require-doctor: {}", refused.error.message),
        (Err(error), Err(_)) => return Err(error).context("--require-doctor: the answer"),
    };
    let failed = |promise: bool| {
        let some = doctor
            .checks
            .iter()
            .filter(|c| c.verdict == CheckVerdict::Fail && c.promise.is_some() == promise);
        some.map(|check| format!("{}: {}", check.name, check.words)).collect::<Vec<_>>().join("; ")
    };
    match doctor.status.as_str() {
        "ok" => {
            tracing::info!(checks = doctor.checks.len(), "the doctor finds no fault");
            Ok(())
        }
        "broken" => {
            let policy = doctor.attack.map(|attack| attack.policy).unwrap_or_default();
            Err(Unhealthy::Broken { policy, what: failed(true) }.into())
        }
        _ => Err(Unhealthy::Lacks { what: failed(false) }.into()),
    }
}

fn checks() -> Vec<Check> {
    let spec = |prompt: &str, more: Value| {
        let mut spec =
            json!({ "prompt": prompt, "policy": "trusted", "limits": { "wall_s": 90, "cost_usd": 5 } });
        if let (Some(spec), Some(more)) = (spec.as_object_mut(), more.as_object()) {
            spec.extend(more.clone());
        }
        spec
    };
    vec![
        ("every tool call is asked for in bypassPermissions", spec("allow", json!({})), |seen| {
            seen.outcome("succeeded")?;
            seen.decision("Bash", "allow")?;
            seen.printed("selftest-ran", true)
        }),
        (
            "a denied call does not run",
            spec("deny", json!({ "disallowed_tools": ["Write"], "tools": ["Bash", "Write"] })),
            |seen| {
                seen.outcome("succeeded")?;
                seen.printed("\"is_error\":true", true)
            },
        ),
        (
            "the gate denies what the policy denies",
            spec("gate", json!({ "disallowed_tools": ["Ba*"] })),
            |seen| {
                seen.outcome("succeeded")?;
                seen.decision("Bash", "deny")?;
                seen.printed("selftest-ran", false)
            },
        ),
        (
            "the hook is the gate in the other modes",
            spec("gate", json!({ "permission_mode": "acceptEdits", "disallowed_tools": ["Ba*"] })),
            |seen| {
                seen.decision("Bash", "deny")?;
                seen.printed("selftest-ran", false)
            },
        ),
        (
            "dontAsk denies what is not allowed beforehand",
            spec("allow", json!({ "permission_mode": "dontAsk" })),
            |seen| seen.printed("selftest-ran", false),
        ),
        ("the transcript is mirrored", spec("allow", json!({})), |seen| seen.frame("transcript_mirror")),
        (
            "the turn limit ends the job",
            spec("loop", json!({ "limits": { "max_turns": 2, "wall_s": 90 } })),
            |seen| {
                if seen.job["outcome"] == "stopped" && seen.job["reason"] == "turns" {
                    Ok(())
                } else {
                    Err(seen.end())
                }
            },
        ),
        ("a refused request is not tried again", spec("refuse", json!({})), |seen| {
            seen.outcome("failed")?;
            let requests = seen.job["totals"]["requests"].as_u64().unwrap_or(0);
            if requests <= 2 { Ok(()) } else { Err(format!("{requests} requests")) }
        }),
        ("a cut stream is tried again", spec("cut", json!({})), |seen| seen.outcome("succeeded")),
    ]
}

impl Seen {
    fn end(&self) -> String {
        format!("the job ended as {}", serde_json::to_string(&self.job).unwrap_or_default())
    }

    fn outcome(&self, wanted: &str) -> Result<(), String> {
        if self.job["outcome"] == wanted { Ok(()) } else { Err(self.end()) }
    }

    fn decision(&self, tool: &str, decision: &str) -> Result<(), String> {
        let found =
            self.events.iter().any(|e| e["type"] == "tool" && e["tool"] == tool && e["decision"] == decision);
        if found { Ok(()) } else { Err(format!("no {decision} of {tool} was asked for")) }
    }

    fn frame(&self, kind: &str) -> Result<(), String> {
        let found = self.events.iter().any(|e| e["type"] == "frame" && e["frame"]["type"] == kind);
        if found { Ok(()) } else { Err(format!("no frame {kind}")) }
    }

    /// Whether the text stands in a tool's result.
    fn printed(&self, text: &str, wanted: bool) -> Result<(), String> {
        let results = self.events.iter().filter(|e| e["type"] == "frame" && e["frame"]["type"] == "user");
        let found = results.map(|e| e["frame"]["message"]["content"].to_string()).any(|r| r.contains(text));
        match (found, wanted) {
            (true, true) | (false, false) => Ok(()),
            (true, false) => Err(format!("{text:?} stands in a tool's result: the call ran")),
            (false, true) => Err(format!("{text:?} stands in no tool's result")),
        }
    }
}

/// A daemon of our own, and a scripted model where it asks one.
struct Lab {
    socket: PathBuf,
    shutdown: Shutdown,
    daemon: tokio::task::JoinHandle<anyhow::Result<()>>,
    model: Option<Model>,
}

struct Model {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<model::ModelReport>,
}

impl Lab {
    async fn start(config: &Config, version: &Version, dir: &Path, key: PathBuf) -> anyhow::Result<Self> {
        let address = find_address(config.engine.as_deref())?;
        let engine: Arc<dyn Engine> = Arc::new(Docker::connect(&address).await?);
        let script = Arc::new(Script::parse(SCRIPT, "selftest/script.toml")?);
        let tcp = TcpListener::bind("127.0.0.1:0").await.context("cannot listen on loopback")?;
        let base_url = format!("http://{}", tcp.local_addr()?);
        let stop = CancellationToken::new();
        let task = tokio::spawn(model::serve(tcp, script, Arc::new(Recorder::off()), stop.clone()));
        let mut own = config.clone();
        own.policy_dirs = Vec::new();
        own.gateway = config::anthropic(base_url, ApiKeySource::File(key));
        own.defaults.policy = "trusted".to_owned();
        own.defaults.agent = Some(version.to_string());
        let mut lab = Self::open(own, dir, engine, address)?;
        lab.model = Some(Model { stop, task });
        Ok(lab)
    }

    /// A daemon with this configuration but for what must be its own.
    fn open(mut own: Config, dir: &Path, engine: Arc<dyn Engine>, address: String) -> anyhow::Result<Self> {
        share(&own.state_dir, dir)?;
        let socket = dir.join("s");
        own.state_dir = dir.to_owned();
        own.socket.clone_from(&socket);
        own.metrics = None;
        own.limits.slots = 1;
        own.limits.drain_s = 1;
        own.require_doctor = None;
        own.notify = Vec::new();
        let listeners =
            Listeners { api: UnixListener::bind(&socket)?, metrics: None, hangup: None, systemd: false };
        let shutdown = Shutdown::default();
        let daemon = tokio::spawn(daemon::run(own, listeners, engine, address, shutdown.clone()));
        Ok(Self { socket, shutdown, daemon, model: None })
    }

    async fn job(&self, spec: &Value) -> anyhow::Result<Seen> {
        let job = self.call("POST", "/v1/jobs", spec.to_string()).await?;
        let job: Value = serde_json::from_slice(&job).context("the answer to the submit")?;
        let id = job["id"].as_str().with_context(|| format!("the submit was refused: {job}"))?;
        let events = self.call("GET", &format!("/v1/jobs/{id}/events?follow=1"), String::new()).await?;
        let lines = events.split(|b| *b == b'\n').filter(|l| !l.is_empty());
        let events =
            lines.map(serde_json::from_slice).collect::<Result<Vec<Value>, _>>().context("an event")?;
        let job = self.call("GET", &format!("/v1/jobs/{id}"), String::new()).await?;
        Ok(Seen { events, job: serde_json::from_slice(&job).context("the job")? })
    }

    async fn call(&self, method: &str, path: &str, body: String) -> anyhow::Result<Bytes> {
        let stream = UnixStream::connect(&self.socket).await.context("our daemon does not answer")?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::builder().method(method).uri(path).header("host", "hotcell");
        let request = request.body(Full::new(Bytes::from(body)))?;
        let ask = async {
            let answer = sender.send_request(request).await?;
            let body = http_body_util::Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
            body.map(http_body_util::Collected::to_bytes).map_err(|e| anyhow!("reading the answer: {e}"))
        };
        tokio::select! {
            answer = ask => answer,
            ended = connection => Err(anyhow!("our daemon hung up: {ended:?}")),
        }
    }

    async fn stop(self) -> anyhow::Result<()> {
        self.shutdown.ask(How::Now);
        let ended = self.daemon.await.context("our daemon died")?;
        if let Some(model) = self.model {
            model.stop.cancel();
            model.task.await.context("the scripted model died")?;
        }
        ended
    }
}

/// Bundles and the image's record are shared with the real state directory, by hard links and a copy.
fn share(from: &Path, to: &Path) -> anyhow::Result<()> {
    let mut folders: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
    for entry in std::fs::read_dir(from.join("agents")).context("no agent is installed")?.flatten() {
        if entry.path().is_dir() {
            folders.insert(entry.path(), to.join("agents").join(entry.file_name()));
        }
    }
    folders.insert(from.join("images"), to.join("images"));
    folders.insert(from.join("images/facts"), to.join("images/facts"));
    for (source, target) in folders {
        std::fs::create_dir_all(&target).with_context(|| format!("cannot make {}", target.display()))?;
        let Ok(entries) = std::fs::read_dir(&source) else { continue };
        for entry in entries.flatten().filter(|e| e.path().is_file()) {
            let name = target.join(entry.file_name());
            // Another file system: a copy does, with the mode it had.
            let linked = std::fs::hard_link(entry.path(), &name)
                .or_else(|_| std::fs::copy(entry.path(), &name).map(|_| ()));
            linked.with_context(|| format!("cannot link {}", name.display()))?;
        }
    }
    Ok(())
}
