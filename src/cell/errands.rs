//! What a tool call waits for: where its paths lead in the cell, what a hook says. Each errand is a task of its own
//! with a limit; whatever goes wrong with one is an answer that denies, never a silence.

use std::path::PathBuf;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::agent::options;
use crate::job::Identity;
use crate::policy::judge::{HookAnswer, HookId, hook_answer};
use crate::run_as::{self, Bounds};
use crate::session::{Errand, Finding, What};
use crate::workspace::{Scratch, View};

/// Most errands at a time; further ones wait.
const AT_A_TIME_MAX: usize = 16;
/// Most bytes that a hook may print on each of its outputs.
const HOOK_OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Longest look at paths.
const PATHS_WAIT: Duration = Duration::from_secs(10);

/// A finding, the question it is for, and the number of its errand.
pub(super) type Found = (String, u64, Finding);

/// The errands under way.
#[derive(Debug, Default)]
pub(super) struct Errands {
    running: JoinSet<Found>,
    waiting: std::collections::VecDeque<(Errand, Place)>,
}

/// What errands need to know of the cell.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// Whose programs run.
    pub(super) who: Identity,
    /// The cell's directory on the host.
    pub(super) dir: PathBuf,
    /// Where the host has the cell's workspaces, the primary one first.
    pub(super) workspaces: Vec<(String, PathBuf)>,
    /// The host's process id of its PID 1, where the engine says it.
    pub(super) pid: Option<u32>,
}

impl Errands {
    pub(super) fn add(&mut self, errand: Errand, place: Place) {
        self.waiting.push_back((errand, place));
        self.start();
    }

    fn start(&mut self) {
        while self.running.len() < AT_A_TIME_MAX
            && let Some((errand, place)) = self.waiting.pop_front()
        {
            self.running.spawn(run(errand, place));
        }
    }

    /// The next finding. Cancel-safe. Does not return while there is none.
    pub(super) async fn next(&mut self) -> Found {
        loop {
            match self.running.join_next().await {
                Some(Ok(found)) => {
                    self.start();
                    return found;
                }
                // It panicked or was ended: its question stays unanswered, which denies.
                Some(Err(error)) => {
                    tracing::error!(%error, "an errand for a tool call died");
                    self.start();
                }
                None => std::future::pending::<()>().await,
            }
        }
    }
}

async fn run(errand: Errand, place: Place) -> Found {
    let finding = match errand.what {
        What::Paths(paths) => Finding::Paths(follow(paths, place).await),
        What::Hook { id, run, timeout_s, stdin } => hook(id, &run, timeout_s, &stdin, &place.who).await,
    };
    (errand.request_id, errand.number, finding)
}

async fn hook(id: HookId, argv: &[PathBuf], timeout_s: u32, stdin: &[u8], who: &Identity) -> Finding {
    let wall = Duration::from_secs(u64::from(timeout_s));
    let bounds = Bounds { wall, output_bytes_max: HOOK_OUTPUT_BYTES_MAX };
    let answer = match run_as::run(argv, who, stdin, bounds).await {
        Ok(output) => hook_answer(output.code, &output.stdout, &output.stderr),
        Err(error) => HookAnswer::Failed(error.to_string()),
    };
    Finding::Hook(id, answer)
}

async fn follow(paths: Vec<String>, place: Place) -> Vec<(String, Option<String>)> {
    let asked = paths.clone();
    let looking = tokio::task::spawn_blocking(move || {
        let view = view(&place);
        let at = place.workspaces.first().map(|(at, _)| at.as_str());
        let leads = |path: &str| view.follow(path).map(|to| as_in_rules(to, at));
        paths.into_iter().map(|path| (path.clone(), leads(&path))).collect::<Vec<_>>()
    });
    match tokio::time::timeout(PATHS_WAIT, looking).await {
        Ok(Ok(found)) => found,
        Ok(Err(_)) | Err(_) => asked.into_iter().map(|path| (path, None)).collect(),
    }
}

/// Rules know the workspace as `/workspace`, wherever the cell sees it.
fn as_in_rules(path: String, at: Option<&str>) -> String {
    match at.and_then(|at| path.strip_prefix(at)) {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => format!("{}{rest}", options::WORKSPACE),
        _ => path,
    }
}

/// The cell's file systems: its own directories by where they lie on the host, the image by way of PID 1.
fn view(place: &Place) -> View {
    let mut rooms = Vec::new();
    if let Some(pid) = place.pid {
        rooms.push(("/", PathBuf::from(format!("/proc/{pid}/root"))));
    }
    if let Ok(Some(scratch)) = Scratch::adopt(&place.dir) {
        rooms.push((options::HOME, scratch.home()));
        rooms.push(("/tmp", scratch.tmp()));
        rooms.push((options::WORKSPACE, scratch.work()));
    }
    for (at, dir) in &place.workspaces {
        rooms.retain(|(taken, _)| taken != at);
        rooms.push((at, dir.clone()));
    }
    View::new(&rooms)
}
