//! What isolates a cell: the first runtime of the plan that the engine has and that was seen to run a cell. A
//! runtime counts as fit only after a cell of the job's own kind (its image, its mounts, its sockets, the
//! CLI) has run under it; that is remembered by the hash of the runtime's program. Nothing here ever puts a
//! job on a runtime that its plan does not name.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::{Mutex, watch};

use super::prepare::{self, Image, Launch, Names, PrepareError, engine_failure, failed};
use super::record::Record;
use super::rooms::Tenant;
use super::{Parts, StopWish};
use crate::agent::options;
use crate::engine::{EngineError, EngineInfo, RuntimeInfo};
use crate::job::FailReason;
use crate::job::spec::{Runtime, WorkspaceMode};
use crate::link::{ExitStatus, Link, LinkEvent, OutputStream, Resume};

/// Where verdicts are kept, in the state directory.
pub const FILE_NAME: &str = "runtimes.json";
/// Longest file of verdicts that is read, in bytes.
const FILE_BYTES_MAX: u64 = 256 * 1024;
/// Most verdicts that are kept.
const VERDICTS_MAX: usize = 64;
/// Longest trial: the first read of the CLI's program may come from a slow disk.
const TRIAL_MAX: Duration = Duration::from_secs(60);
/// How long init may go on in a trial whose daemon died, in milliseconds.
const TRIAL_WALL_MS: u64 = 60_000;
/// How long an engine's list of runtimes is good enough for a job that wants the usual one.
const ENGINE_LATELY: Duration = Duration::from_secs(30);
/// Before a runtime that failed its trial is tried again.
const AGAIN_AFTER: Duration = Duration::from_secs(60);
/// Scratch space of a trial, in bytes.
const TRIAL_DISK_BYTES: u64 = 64 << 20;
/// Most of what a trial prints that is looked at, in bytes.
const OUTPUT_BYTES_MAX: usize = 4096;
/// What a trial writes in /tmp, for the daemon to find.
const PROOF: &str = "hotcell-trial";

/// What was decided for a cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chosen {
    /// Which one.
    pub(super) runtime: Runtime,
    /// What the engine is told; nothing where it is the engine's own default.
    pub(super) engine_name: Option<String>,
    /// Why it is none that the plan names before this one.
    pub(super) instead: Option<String>,
}

/// Verdicts about runtimes.
#[derive(Debug)]
pub struct Tried {
    file: PathBuf,
    known: Mutex<Known>,
    /// What the engine said last.
    engine: std::sync::Mutex<Option<(Instant, EngineInfo)>>,
}

#[derive(Debug, Default)]
struct Known {
    /// Fit, on the disk too.
    fit: Vec<Fit>,
    /// Failed lately, by [`Fit::key`].
    unfit: HashMap<String, (Instant, String)>,
    /// Hashes of programs by path, length and time of change.
    hashes: HashMap<(PathBuf, u64, Option<std::time::SystemTime>), String>,
}

/// One runtime that ran a cell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fit {
    /// The engine's name for it.
    runtime: String,
    /// SHA-256 of its program, in hex.
    sha256: String,
    /// The engine's arguments for it.
    args: Vec<String>,
    /// The bundle of the CLI that ran.
    agent: String,
}

impl Fit {
    fn key(&self) -> String {
        format!("{} {} {} {}", self.runtime, self.sha256, self.agent, self.args.join(" "))
    }
}

impl Tried {
    /// The verdicts of earlier daemons; a file that cannot be read is no verdict.
    pub fn load(state_dir: &Path) -> Self {
        let file = state_dir.join(FILE_NAME);
        let small = std::fs::metadata(&file).is_ok_and(|meta| meta.len() <= FILE_BYTES_MAX);
        let text = if small { std::fs::read(&file).unwrap_or_default() } else { Vec::new() };
        let fit = serde_json::from_slice(&text).unwrap_or_default();
        Self {
            file,
            known: Mutex::new(Known { fit, ..Known::default() }),
            engine: std::sync::Mutex::default(),
        }
    }

    fn engine_lately(&self) -> Option<EngineInfo> {
        let engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        engine.as_ref().filter(|(at, _)| at.elapsed() < ENGINE_LATELY).map(|(_, info)| info.clone())
    }

    async fn ask(&self, parts: &Parts) -> Result<EngineInfo, PrepareError> {
        let info = parts.engine.info().await;
        let info = info.map_err(|e| engine_failure(FailReason::EngineUnavailable, &e))?;
        let mut engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        *engine = Some((Instant::now(), info.clone()));
        Ok(info)
    }

    fn save(&self, known: &Known) {
        let fresh = self.file.with_extension("json.new");
        let text = serde_json::to_vec_pretty(&known.fit).unwrap_or_default();
        let saved = std::fs::write(&fresh, text).and_then(|()| std::fs::rename(&fresh, &self.file));
        if let Err(error) = saved {
            tracing::warn!(%error, file = %self.file.display(), "a verdict about a runtime is not kept");
        }
    }
}

/// What is known of one runtime without trying it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Offer {
    /// Cells run on it all the time.
    Usual {
        /// What the engine is told.
        engine_name: Option<String>,
    },
    /// It is there, and to be tried.
    Untried(RuntimeInfo),
    /// It is not there.
    Missing(&'static str),
}

/// Pure: what an engine offers for a runtime.
fn offer(info: &EngineInfo, runtime: Runtime) -> Offer {
    let there = info.runtimes.get(runtime.as_str());
    match runtime {
        // An engine whose default is of runc's kind under another name (crun, a shim's) needs no word for it.
        Runtime::Runc if !is_gvisor(info, &info.default_runtime) => Offer::Usual { engine_name: None },
        Runtime::Runc => match there {
            Some(_) => Offer::Usual { engine_name: Some(runtime.as_str().to_owned()) },
            None => Offer::Missing("the engine has only runtimes of another kind"),
        },
        Runtime::Runsc => there.cloned().map_or(
            Offer::Missing("the engine has no runtime of this name: install gVisor and register it"),
            Offer::Untried,
        ),
    }
}

fn is_gvisor(info: &EngineInfo, name: &str) -> bool {
    let program = info.runtimes.get(name).map(|found| found.path.as_path()).and_then(Path::file_name);
    name == Runtime::Runsc.as_str() || program.is_some_and(|program| program == "runsc")
}

/// Chooses the runtime of a job's next cell.
pub(super) async fn choose(
    parts: &Arc<Parts>,
    record: &mut Record,
    image: &Image,
    stop: &mut watch::Receiver<StopWish>,
) -> Result<Chosen, PrepareError> {
    let wanted = record.accepted.plan.runtimes.clone();
    // Who wants something special gets the engine's answer of now: it may just have been installed.
    let info = match parts.runtimes.engine_lately().filter(|_| wanted.first() == Some(&Runtime::Runc)) {
        Some(info) => info,
        None => parts.runtimes.ask(parts).await?,
    };
    let mut passed: Vec<String> = Vec::new();
    for runtime in wanted {
        let (engine_name, verdict) = match offer(&info, runtime) {
            Offer::Usual { engine_name } => (engine_name, Ok(())),
            Offer::Missing(why) => (None, Err(why.to_owned())),
            Offer::Untried(found) => {
                let verdict = qualified(parts, record, image, runtime, &found, stop).await?;
                (Some(runtime.as_str().to_owned()), verdict)
            }
        };
        match verdict {
            Ok(()) => {
                let instead = (!passed.is_empty()).then(|| passed.join("; "));
                return Ok(Chosen { runtime, engine_name, instead });
            }
            Err(why) => passed.push(format!("{}: {why}", runtime.as_str())),
        }
    }
    Err(failed(FailReason::RuntimeUnavailable, refusal(&record.accepted.plan.policy, &passed)))
}

fn refusal(policy: &str, passed: &[String]) -> String {
    format!(
        "no runtime that the policy {policy} names can run this job ({}); `make gvisor` installs gVisor where \
         Debian has it, and `runtime_fallback = [\"runc\"]` in the policy would let jobs run on runc instead",
        passed.join("; ")
    )
}

/// `Ok(Err)` says why it is not fit.
async fn qualified(
    parts: &Arc<Parts>,
    record: &mut Record,
    image: &Image,
    runtime: Runtime,
    found: &RuntimeInfo,
    stop: &mut watch::Receiver<StopWish>,
) -> Result<Result<(), String>, PrepareError> {
    // One trial at a time: the others wait for its verdict.
    let mut known = tokio::select! {
        known = parts.runtimes.known.lock() => known,
        Some((reason, detail)) = prepare::wish(stop) => return Err(PrepareError::Stopped(reason, detail)),
    };
    let sha256 = known.hash_of(&found.path).await;
    let bundle = image.claude.parent().and_then(Path::file_name).unwrap_or_default();
    let fit = Fit {
        runtime: runtime.as_str().to_owned(),
        sha256,
        args: found.args.clone(),
        agent: bundle.to_string_lossy().into_owned(),
    };
    if known.fit.contains(&fit) {
        return Ok(Ok(()));
    }
    match known.unfit.get(&fit.key()) {
        Some((at, why)) if at.elapsed() < AGAIN_AFTER => return Ok(Err(why.clone())),
        _ => {}
    }
    let begun = Instant::now();
    let verdict = trial(parts, record, image, runtime).await?;
    match &verdict {
        Ok(()) => {
            tracing::info!(
                runtime = fit.runtime,
                ms = begun.elapsed().as_millis() as u64,
                "a runtime is fit"
            );
            known.fit.retain(|old| old.runtime != fit.runtime || old.agent != fit.agent);
            known.fit.push(fit);
            let surplus = known.fit.len().saturating_sub(VERDICTS_MAX);
            known.fit.drain(..surplus);
            parts.runtimes.save(&known);
        }
        Err(why) => {
            tracing::warn!(runtime = fit.runtime, why, "a runtime failed its trial");
            known.unfit.clear();
            known.unfit.insert(fit.key(), (Instant::now(), why.clone()));
        }
    }
    Ok(verdict)
}

impl Known {
    /// The hash of a runtime's program; its path where the daemon cannot read it.
    async fn hash_of(&mut self, program: &Path) -> String {
        let Some((path, meta)) = find_program(program) else { return program.display().to_string() };
        let key = (path.clone(), meta.len(), meta.modified().ok());
        if let Some(hash) = self.hashes.get(&key) {
            return hash.clone();
        }
        let hash = tokio::task::spawn_blocking(move || hash_file(&path)).await;
        let hash = hash.ok().and_then(Result::ok).unwrap_or_else(|| program.display().to_string());
        self.hashes.clear();
        self.hashes.insert(key, hash.clone());
        hash
    }
}

/// Where the engine finds a runtime that it names without a path.
fn find_program(program: &Path) -> Option<(PathBuf, std::fs::Metadata)> {
    const PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let whole = program.is_absolute().then(|| program.to_owned());
    let mut places = whole.into_iter().chain(PATH.iter().map(|dir| Path::new(dir).join(program)));
    places
        .find_map(|path| std::fs::metadata(&path).ok().filter(std::fs::Metadata::is_file).map(|m| (path, m)))
}

fn hash_file(path: &Path) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut std::fs::File::open(path)?, &mut hasher)?;
    Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// Runs one cell of the job's kind: init starts, listens on the cell's loopback and reaches `ctl.sock`, the shell
/// writes to a bound directory, the CLI runs and says its version, and the exit code comes back. The cell has a row of its own,
/// as every cell, and is proven gone when this returns.
async fn trial(
    parts: &Arc<Parts>,
    record: &mut Record,
    image: &Image,
    runtime: Runtime,
) -> Result<Result<(), String>, PrepareError> {
    let names = Names::new(None, &record.job)?;
    parts.store.put_cell(names.row(record, None)).await?;
    let verdict = trial_cell(parts, record, image, runtime, &names).await;
    super::destroy(parts, &record.job).await;
    match verdict {
        Err(PrepareError::Failed(failure)) if failure.reason != FailReason::EngineUnavailable => {
            Ok(Err(failure.message))
        }
        verdict => verdict,
    }
}

async fn trial_cell(
    parts: &Arc<Parts>,
    record: &Record,
    image: &Image,
    runtime: Runtime,
    names: &Names,
) -> Result<Result<(), String>, PrepareError> {
    let mut accepted = record.accepted.clone();
    accepted.workspace = None;
    accepted.plan.workspace_mode = WorkspaceMode::None;
    accepted.plan.limits.disk_bytes = TRIAL_DISK_BYTES;
    let tenant = Tenant { uid: names.uid, runtime, claude: image.claude.clone(), kept: false };
    let made = prepare::make_rooms(parts, record, names, tenant, accepted, None).await?;
    let (dirs, who) = (made.dirs, made.who);
    let mut spec = prepare::cell_spec(parts, record, &names.cell, image, &dirs, &who);
    spec.runtime = Some(runtime.as_str().to_owned());
    let script = format!("echo {PROOF} >/tmp/{PROOF} && exec {} --version", options::CLI_PATH);
    let argv = vec![image.shell.to_owned(), "-c".to_owned(), script];
    let boot = prepare::boot_with(parts, record, names, image, Launch::of(argv, TRIAL_WALL_MS, record))?;
    let mut link = Link::bind(&dirs.run, &names.cell, names.key.clone(), Resume::default(), who.owner())
        .await
        .map_err(|e| failed(FailReason::Internal, e))?;
    // Not stopped half-way: it is short, and what it leaves is then gone in the usual way.
    let (_nobody, not_stopped) = watch::channel(None);
    let started = prepare::start(parts, &names.cell, &spec, &boot, &not_stopped).await;
    let verdict = match started {
        Ok(container) => {
            let ended = parts.engine.wait(&container);
            tokio::time::timeout(TRIAL_MAX, listen(&mut link, ended)).await.unwrap_or_else(|_| {
                Err(format!("a cell under it did not answer within {} s", TRIAL_MAX.as_secs()))
            })
        }
        Err(PrepareError::Failed(failure)) if failure.reason != FailReason::EngineUnavailable => {
            Err(failure.message)
        }
        Err(error) => {
            prepare::leave_link(record, link).await;
            return Err(error);
        }
    };
    prepare::leave_link(record, link).await;
    let proof = dirs.tmp.join(PROOF);
    // Only looked at, never read: what lies there is the cell's.
    let written =
        std::fs::symlink_metadata(&proof).is_ok_and(|m| m.is_file() && m.len() == PROOF.len() as u64 + 1);
    Ok(match verdict {
        Ok(()) if !written => Err("what a cell under it writes does not reach the host".to_owned()),
        verdict => verdict,
    })
}

/// Until PID 1 says how the CLI ended, or the container has ended without a word.
pub(super) async fn listen(
    link: &mut Link,
    ended: impl Future<Output = Result<crate::engine::Exit, EngineError>>,
) -> Result<(), String> {
    let mut ended = std::pin::pin!(ended);
    let mut printed = Vec::new();
    let keep = |printed: &mut Vec<u8>, bytes: &[u8]| {
        let room = OUTPUT_BYTES_MAX.saturating_sub(printed.len());
        printed.extend_from_slice(&bytes[..bytes.len().min(room)]);
    };
    loop {
        let event = tokio::select! {
            biased;
            event = link.next() => event,
            exit = &mut ended => {
                let words = match exit {
                    Ok(exit) => exit.error.unwrap_or(format!("code {}: {}", exit.code, exit.stderr_tail.trim())),
                    Err(error) => error.to_string(),
                };
                return Err(format!("PID 1 of a cell under it never reached the daemon's socket ({words})"));
            }
        };
        match event {
            LinkEvent::Stdout { end, bytes } => {
                keep(&mut printed, &bytes);
                link.handle().ack(OutputStream::Stdout, end);
            }
            LinkEvent::Stderr { end, bytes } => {
                keep(&mut printed, &bytes);
                link.handle().ack(OutputStream::Stderr, end);
            }
            LinkEvent::Exited(report) => {
                link.handle().bye();
                let text = String::from_utf8_lossy(&printed).trim().to_owned();
                return match report.status {
                    ExitStatus::Code(0) => Ok(()),
                    ExitStatus::Code(code) => Err(format!("the CLI ends with code {code} under it: {text}")),
                    ExitStatus::Signal(signal) => {
                        Err(format!("the CLI ends by signal {signal} under it: {text}"))
                    }
                };
            }
            LinkEvent::SpawnFailed { message, .. } => {
                link.handle().bye();
                return Err(format!("nothing can be started in a cell under it: {message}"));
            }
            LinkEvent::Connected { .. }
            | LinkEvent::Disconnected
            | LinkEvent::StdinAcked { .. }
            | LinkEvent::StepEnded { .. }
            | LinkEvent::Hostile { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(runtimes: &[(&str, &str)], default: &str) -> EngineInfo {
        let text = str::to_owned;
        let all = runtimes
            .iter()
            .map(|(name, path)| (text(name), RuntimeInfo { path: path.into(), args: Vec::new() }));
        EngineInfo {
            version: text("0"),
            api_version: text("1.41"),
            arch: text("x64"),
            os: text("linux"),
            runtimes: all.collect(),
            default_runtime: text(default),
            cgroup_version: text("2"),
            root_dir: "/nowhere".into(),
            components: std::collections::BTreeMap::new(),
            security: Vec::new(),
            kernel: text("6.1.0"),
        }
    }

    #[test]
    fn runc_is_what_it_says_even_where_the_engine_prefers_gvisor() {
        let usual = |name: Option<&str>| Offer::Usual { engine_name: name.map(str::to_owned) };
        let both = [("runc", "runc"), ("runsc", "/usr/bin/runsc")];
        assert_eq!(offer(&engine(&both, "runc"), Runtime::Runc), usual(None));
        assert_eq!(offer(&engine(&[("crun", "/usr/bin/crun")], "crun"), Runtime::Runc), usual(None));
        assert_eq!(offer(&engine(&both, "runsc"), Runtime::Runc), usual(Some("runc")));
        let hidden = [("runc", "runc"), ("secure", "/opt/runsc")];
        assert_eq!(offer(&engine(&hidden, "secure"), Runtime::Runc), usual(Some("runc")));
        let only = engine(&[("runsc", "/usr/bin/runsc")], "runsc");
        assert!(matches!(offer(&only, Runtime::Runc), Offer::Missing(_)));
    }

    #[test]
    fn gvisor_is_tried_where_it_is_and_missing_where_it_is_not() {
        let both = engine(&[("runc", "runc"), ("runsc", "/usr/bin/runsc")], "runc");
        assert!(
            matches!(offer(&both, Runtime::Runsc), Offer::Untried(found) if found.path == Path::new("/usr/bin/runsc"))
        );
        assert!(matches!(offer(&engine(&[("runc", "runc")], "runc"), Runtime::Runsc), Offer::Missing(_)));
    }

    #[test]
    fn a_refusal_says_why_for_each_and_what_to_do() {
        let text = refusal("untrusted", &["runsc: it is not there".to_owned()]);
        for part in ["untrusted", "runsc: it is not there", "make gvisor", "runtime_fallback"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[tokio::test]
    async fn verdicts_outlive_the_daemon_and_a_broken_file_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let fit = Fit {
            runtime: "runsc".to_owned(),
            sha256: "ab".repeat(32),
            args: vec!["--network=none".to_owned()],
            agent: "2.1.197-x64-gnu".to_owned(),
        };
        let tried = Tried::load(dir.path());
        let mut known = tried.known.lock().await;
        known.fit.push(fit.clone());
        tried.save(&known);
        assert_eq!(Tried::load(dir.path()).known.lock().await.fit, [fit]);
        std::fs::write(dir.path().join(FILE_NAME), "[{]").unwrap();
        assert_eq!(Tried::load(dir.path()).known.lock().await.fit, []);
    }

    #[tokio::test]
    async fn another_program_at_the_same_path_is_another_runtime() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("runsc");
        std::fs::write(&program, "one").unwrap();
        let mut known = Known::default();
        let one = known.hash_of(&program).await;
        assert_eq!(one.len(), 64);
        assert_eq!(known.hash_of(&program).await, one);
        std::fs::write(&program, "other").unwrap();
        assert_ne!(known.hash_of(&program).await, one);
        assert_eq!(known.hash_of(Path::new("/nowhere/runsc")).await, "/nowhere/runsc", "no hash, no crash");
    }
}
