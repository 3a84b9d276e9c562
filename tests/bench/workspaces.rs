//! A private copy of a large workspace (50 000 files, 1 GB, a git repository) beside what people do without hotcell:
//! `cp -a`, `git worktree add`, `git clone --shared`, `docker cp`; and taking out what a job changed in it beside one
//! `git status`. The runs take turns, each from a disk that has nothing to write.
//!
//! hotcell is measured whole and by itself: real jobs in real cells, whose agent changes 20 files, and the times that
//! the daemon tells of each step of theirs (`hotcell_workspace_copy_seconds`).
//!
//! `BENCH_WORKSPACES_N` (jobs, and runs of `git status`), `BENCH_WORKSPACES_COPIES` (runs of each of the others),
//! `BENCH_WORKSPACES_FILES`, `BENCH_WORKSPACES_MIB`. `BENCH_WORKSPACES_DIR` (an absolute path): the tree is made
//! there, if there is nothing, and stays; else it is made in a temporary directory and removed.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::http::Client;
use crate::report::{Bar, Row, Samples};
use crate::setup::{self, Baselines, docker, output, setting};
use crate::world::{World, one_command};

/// Bars of the project.
const SET_UP_MS_MAX: f64 = 10.0;
const SET_UP_TO_WORKTREE_MAX: f64 = 0.01;
const EXTRACTION_TO_STATUS_MAX: f64 = 2.0;
const REMOVAL_MS_MAX: f64 = 50.0;

const FILES_PER_DIRECTORY: u64 = 50;
/// How long files are, as shares of their mean.
const SHARES: [u64; 8] = [1, 2, 3, 5, 8, 13, 30, 106];
const KINDS: [&str; 7] = ["rs", "py", "ts", "md", "json", "toml", "h"];
/// Paths that a job's agent changes.
const CHANGED: u64 = 20;
/// As the daemon calls them.
const STEPS: [&str; 4] = ["snapshot", "set_up", "extraction", "removal"];

/// The tree, removed with this unless it is to stay.
struct Tree {
    path: PathBuf,
    files: u64,
    _temporary: Option<tempfile::TempDir>,
}

/// The samples of what people do, in milliseconds.
#[derive(Default)]
struct Others {
    cp: Samples,
    rm: Samples,
    worktree: Samples,
    clone: Samples,
    docker: Samples,
    status: Samples,
}

/// Those of our jobs.
#[derive(Default)]
struct Ours {
    steps: [Samples; 4],
    /// Snapshot and set-up of the same job.
    ready: Samples,
    /// From the slot to the cell's start, and from the agent's end to the job's.
    prepare: Samples,
    collect: Samples,
}

/// All of it.
pub(crate) fn measure() -> Result<Vec<Row>> {
    let (n, copies) = (setting("BENCH_WORKSPACES_N", 12), setting("BENCH_WORKSPACES_COPIES", 3));
    let tree = Tree::make()?;
    let world = World::with(&one_command(&changes(tree.files)), "[limits]\nslots = 1\n");
    let image = setup::image_id(&world)?;
    let baselines = Baselines::new();
    let (mut ours, mut others) = (Ours::default(), Others::default());
    // Caches warm, the index fresh, the scratch space's template made.
    others.status(&tree.path)?;
    Ours::default().job(&world, &tree.path)?;
    others = Others::default();
    for round in 0..n.max(copies) {
        if round < n {
            ours.job(&world, &tree.path)?;
            others.status(&tree.path)?;
        }
        if round < copies {
            others.copies(&tree.path, &world.path("other"), &image, &baselines)?;
        }
    }
    world.end();
    Ok(rows(&ours, &others))
}

fn rows(ours: &Ours, others: &Others) -> Vec<Row> {
    let [snapshot, set_up, extraction, removal] = &ours.steps;
    let name = "workspace: set-up beyond the listing";
    let ready = "workspace: listing and set-up";
    let extracted = format!("workspace: extraction of {CHANGED} changes");
    vec![
        Row::median(name, set_up, "ms").bar(Bar::ValueAtMost(SET_UP_MS_MAX)),
        Row::median(name, set_up, "ms")
            .against("git worktree add", &others.worktree)
            .bar(Bar::RatioAtMost(SET_UP_TO_WORKTREE_MAX)),
        Row::median("workspace: listing (the base snapshot)", snapshot, "ms"),
        Row::median(ready, &ours.ready, "ms").against("git worktree add", &others.worktree),
        Row::median(ready, &ours.ready, "ms").against("git clone --shared", &others.clone),
        Row::median(ready, &ours.ready, "ms").against("cp -a", &others.cp),
        Row::median(ready, &ours.ready, "ms").against("docker cp", &others.docker),
        Row::median(extracted, extraction, "ms")
            .against("git status", &others.status)
            .bar(Bar::RatioAtMost(EXTRACTION_TO_STATUS_MAX)),
        Row::median("workspace: destroy", removal, "ms")
            .against("rm -r of cp -a's", &others.rm)
            .bar(Bar::ValueAtMost(REMOVAL_MS_MAX)),
        Row::median("  its job: slot → cell started", &ours.prepare, "ms"),
        Row::median("  its job: CLI ended → done", &ours.collect, "ms"),
    ]
}

impl Ours {
    /// One job, from a quiet disk.
    fn job(&mut self, world: &World, tree: &Path) -> Result<()> {
        settle(tree)?;
        let spec = json!({
            "prompt": "run the command", "policy": "trusted", "model": "claude-sonnet-4-6",
            "workspace": { "path": tree, "mode": "copy" },
            "limits": { "memory_mib": 2048, "cpus": 2.0, "pids": 512, "disk_mib": 4096 },
        });
        let before = told(world)?;
        let (events, view) = world.job(&spec);
        ensure!(view["outcome"] == "succeeded", "the job did not succeed: {view}\n{}", world.log());
        let changes = events.iter().find(|e| e["type"] == "changes").context("no change set")?;
        let changed = changes["entries"].as_u64().context("a change set without a number")?;
        ensure!(changed == CHANGED, "{changed} changes instead of {CHANGED}: {changes}");
        let mut took = [0.0; 4];
        for ((ms, before), after) in took.iter_mut().zip(before).zip(told(world)?) {
            ensure!(after.1 - before.1 == 1.0, "a step was taken {} times", after.1 - before.1);
            *ms = (after.0 - before.0) * 1000.0;
        }
        self.ready.push(took[0] + took[1]);
        for (samples, ms) in self.steps.iter_mut().zip(took) {
            samples.push(ms);
        }
        let at = |what: &str, test: &dyn Fn(&Value) -> bool| -> Result<f64> {
            let event = events.iter().find(|e| test(e)).with_context(|| format!("no event: {what}"))?;
            event["at_ms"].as_f64().context("an event without a time")
        };
        let state = |name: &str| at(name, &|e| e["type"] == "state" && e["state"] == name);
        let kind = |name: &str| at(name, &|e| e["type"] == name);
        self.prepare.push(kind("sent")? - state("preparing")?);
        self.collect.push(state("done")? - kind("exit")?);
        Ok(())
    }
}

/// Sum and count of each step's times, in seconds, as the daemon tells them.
fn told(world: &World) -> Result<[(f64, f64); 4]> {
    let (_, body) = Client::connect(&world.socket())?.call("GET", "/metrics", "")?;
    let text = String::from_utf8_lossy(&body).into_owned();
    let value = |what: &str, step: &str| -> Result<f64> {
        let start = format!("hotcell_workspace_copy_seconds_{what}{{step=\"{step}\"}} ");
        let line =
            text.lines().find_map(|l| l.strip_prefix(&start)).with_context(|| format!("no {start}"))?;
        Ok(line.parse()?)
    };
    let mut all = [(0.0, 0.0); 4];
    for (one, step) in all.iter_mut().zip(STEPS) {
        *one = (value("sum", step)?, value("count", step)?);
    }
    Ok(all)
}

impl Others {
    fn status(&mut self, tree: &Path) -> Result<()> {
        settle(tree)?;
        self.status.push(timed(git(tree).args(["status", "--porcelain"]))?);
        Ok(())
    }

    /// One copy of each kind, each removed before the next.
    fn copies(&mut self, tree: &Path, to: &Path, image: &str, baselines: &Baselines) -> Result<()> {
        settle(tree)?;
        self.cp.push(timed(Command::new("cp").arg("-a").arg(tree).arg(to))?);
        settle(tree)?;
        self.rm.push(timed(Command::new("rm").arg("-r").arg(to))?);
        settle(tree)?;
        self.worktree.push(timed(git(tree).args(["worktree", "add", "--quiet", "--detach"]).arg(to))?);
        output(git(tree).args(["worktree", "remove", "--force"]).arg(to))?;
        settle(tree)?;
        self.clone.push(timed(git(tree).args(["clone", "--quiet", "--shared", "."]).arg(to))?);
        std::fs::remove_dir_all(to)?;
        let id = output(docker().args(["create", "--label", &baselines.label, image, "true"]))?;
        settle(tree)?;
        self.docker.push(timed(docker().arg("cp").arg("--quiet").arg(tree).arg(format!("{id}:/work")))?);
        output(docker().args(["rm", &id]))?;
        Ok(())
    }
}

/// Milliseconds of a command that must succeed.
fn timed(command: &mut Command) -> Result<f64> {
    let begun = Instant::now();
    output(command)?;
    Ok(begun.elapsed().as_secs_f64() * 1000.0)
}

/// What is still to be written would be waited for by whoever comes next.
fn settle(tree: &Path) -> Result<()> {
    Ok(rustix::fs::syncfs(std::fs::File::open(tree)?)?)
}

/// Git in the tree, as it is without anybody's settings.
fn git(tree: &Path) -> Command {
    let mut command = Command::new("git");
    command.current_dir(tree).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
    command.args(["-c", "gc.auto=0"]).stdin(Stdio::null());
    command
}

fn file_path(number: u64) -> String {
    let directory = number / FILES_PER_DIRECTORY;
    let kind = KINDS[number as usize % KINDS.len()];
    format!("part{:02}/module{:02}/file{number:05}.{kind}", directory / 50, directory % 50)
}

/// What the agent runs: edits, new files, files that are gone, files under another name; [`CHANGED`] paths, all over
/// the tree.
fn changes(files: u64) -> String {
    let at = |n: u64| file_path(n * (files / CHANGED));
    let mut lines = vec!["set -e".to_owned()];
    lines.extend((0..8).map(|n| format!("echo edited >> {}", at(n))));
    lines.extend((8..12).map(|n| format!("echo new > {}.new", at(n))));
    lines.extend((12..16).map(|n| format!("rm {}", at(n))));
    // Two paths each.
    lines.extend((16..18).map(|n| format!("mv {0} {0}.moved", at(n))));
    lines.join("; ")
}

impl Tree {
    fn make() -> Result<Self> {
        let files = setting("BENCH_WORKSPACES_FILES", 50_000);
        let bytes = setting("BENCH_WORKSPACES_MIB", 1024) << 20;
        let (path, temporary) = match std::env::var_os("BENCH_WORKSPACES_DIR") {
            Some(path) => (PathBuf::from(path), None),
            None => {
                // Beside the world, so on its disk.
                let base = std::env::var_os("HOTCELL_TEST_DIR").map_or("/var/tmp".into(), PathBuf::from);
                let dir = tempfile::Builder::new().prefix("hc-tree-").tempdir_in(base)?;
                (dir.path().join("repository"), Some(dir))
            }
        };
        let tree = Self { path, files, _temporary: temporary };
        if !tree.path.exists() {
            std::fs::create_dir_all(&tree.path)?;
            tree.import(bytes)?;
        }
        Ok(tree)
    }

    /// One commit, checked out; its objects in one pack, as after a clone.
    fn import(&self, bytes: u64) -> Result<()> {
        output(git(&self.path).args(["init", "--quiet"]))?;
        let mut importing = git(&self.path);
        importing.args(["-c", "core.compression=0", "-c", "fastimport.unpackLimit=0"]);
        let mut importing =
            importing.args(["fast-import", "--quiet"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let mut to = BufWriter::with_capacity(1 << 20, importing.stdin.take().context("no stdin")?);
        let head = "commit refs/heads/main\ncommitter bench <bench@example.org> 0 +0000\ndata 4\nbase\n";
        to.write_all(head.as_bytes())?;
        let unit = bytes / self.files * SHARES.len() as u64 / SHARES.iter().sum::<u64>();
        let mut seed = 0x9e37_79b9_7f4a_7c15;
        let mut content = Vec::new();
        for number in 0..self.files {
            let length = unit * SHARES[number as usize % SHARES.len()];
            content.clear();
            // Cannot be compressed, and no two are the same.
            while (content.len() as u64) < length {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                content.extend_from_slice(&u64::to_le_bytes(seed));
            }
            write!(to, "M 100644 inline {}\ndata {}\n", file_path(number), content.len())?;
            to.write_all(&content)?;
            to.write_all(b"\n")?;
        }
        to.flush()?;
        drop(to);
        if !importing.wait()?.success() {
            bail!("the tree cannot be imported");
        }
        output(git(&self.path).args(["symbolic-ref", "HEAD", "refs/heads/main"]))?;
        output(git(&self.path).args(["reset", "--hard", "--quiet"]))?;
        let found = output(git(&self.path).args(["ls-files"]))?.lines().count() as u64;
        ensure!(found == self.files, "{found} files instead of {}", self.files);
        Ok(())
    }
}
