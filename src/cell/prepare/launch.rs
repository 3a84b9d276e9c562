//! What the engine and PID 1 are told of a cell: its mounts and limits, what runs in it, and its environment. It must
//! never name a mount that its rooms do not have, or a variable of the daemon's own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::super::record::Record;
use super::super::rooms::{self, Dirs, Who};
use super::super::{Parts, way_out};
use super::{Image, Names, PrepareError, failed};
use crate::agent::{options, surroundings, way_out as agent_way_out};
use crate::cell::live::CELL_BUFFER_BYTES_MAX;
use crate::engine::{BindMount, CellLimits, CellSpec};
use crate::git::above;
use crate::job::spec::TerminalSize;
use crate::job::{CellId, FailReason};
use crate::link::{Boot, PortForward};
use crate::policy::Plan;

/// How long init lets the agent live without a daemon, in milliseconds.
const DEAD_MAN_MS: u64 = 15 * 60 * 1000;
/// What programs are told of a terminal.
const TERMINAL: &str = "xterm-256color";

/// What runs in a cell.
pub(in crate::cell) struct Launch<'a> {
    /// The program and its arguments.
    pub(in crate::cell) argv: Vec<String>,
    /// Variables beside the plan's.
    pub(in crate::cell) more: &'a [(String, String)],
    /// Commands that run before it, one at a time, when they are asked for.
    pub(in crate::cell) steps: Vec<Vec<String>>,
    /// It gets a terminal.
    pub(in crate::cell) terminal: Option<TerminalSize>,
    /// Longest life, in milliseconds.
    pub(in crate::cell) wall_limit_ms: u64,
    /// It may ask the model.
    pub(in crate::cell) model: bool,
    /// What the tools in the cell are told of their way out.
    pub(in crate::cell) shown: &'a Plan,
}

impl<'a> Launch<'a> {
    /// A program on its own, without a model.
    pub(in crate::cell) fn of(argv: Vec<String>, wall_limit_ms: u64, record: &'a Record) -> Self {
        let shown = &record.accepted.plan;
        Self { argv, more: &[], steps: Vec::new(), terminal: None, wall_limit_ms, model: false, shown }
    }
}

pub(in crate::cell) fn cell_spec(
    parts: &Parts,
    record: &Record,
    cell: &CellId,
    image: &Image,
    dirs: &Dirs,
    who: &Who,
) -> CellSpec {
    let (limits, workspace) = (&record.accepted.plan.limits, record.accepted.plan.workspace_at.as_str());
    let bind = |source: &Path, target: &str, read_only: bool| BindMount {
        source: source.to_owned(),
        target: target.to_owned(),
        read_only,
    };
    let mut mounts = vec![
        bind(&dirs.run, "/.hotcell", true),
        bind(&parts.settings.init_binary, "/.hotcell-init", true),
        bind(&dirs.claude, options::CLI_PATH, true),
        bind(&dirs.etc.join("passwd"), "/etc/passwd", true),
        bind(&dirs.etc.join("group"), "/etc/group", true),
        // Empty: managed settings of an image would win over ours, and their hooks would run.
        bind(&dirs.etc.join("claude-code"), "/etc/claude-code", true),
        bind(&dirs.etc.join("git-hooks"), options::GIT_HOOKS, true),
        bind(&dirs.home, options::HOME, false),
        bind(&dirs.tmp, "/tmp", false),
    ];
    mounts.extend(dirs.under.iter().map(|under| bind(&under.source, &under.target, under.read_only)));
    mounts.push(
        // A read-only one is staged so; asked to do it, the engine would drop nosuid and nodev on the way.
        bind(&dirs.workspace, workspace, dirs.workspace_read_only),
    );
    for part in &dirs.parts {
        mounts.push(bind(&part.path, &format!("{workspace}/{}", part.below.display()), false));
    }
    for over in &dirs.over {
        // The later one of two on one path hides more.
        mounts.retain(|mount| mount.target != over.target);
        mounts.push(bind(&over.source, &over.target, over.read_only));
    }
    // A volume that the image declares would be writable and without a limit: the scratch space covers it.
    for volume in &image.volumes {
        if !mounts.iter().any(|m| m.target == *volume) {
            mounts.push(bind(&dirs.tmp, volume, false));
        }
    }
    CellSpec {
        instance: parts.store.instance().clone(),
        cell: cell.clone(),
        image_id: image.id.clone(),
        user: who.owner(),
        groups: who.groups.clone(),
        limits: CellLimits {
            memory_bytes: limits.memory_bytes,
            // A policy may name more cores than this machine has; the engine would refuse that.
            cpus_milli: limits.cpus_milli.min(rooms::cores_milli()),
            pids_max: limits.pids_max,
            nofile_max: rooms::nofile_max(),
        },
        mounts,
        runtime: None,
        working_dir: workspace.to_owned(),
        argv: vec!["/.hotcell-init".to_owned()],
        env: Vec::new(),
    }
}

pub(in crate::cell) fn boot_with(
    parts: &Parts,
    record: &Record,
    names: &Names,
    image: &Image,
    launch: Launch<'_>,
) -> Result<Vec<u8>, PrepareError> {
    let Launch { argv, more, steps, terminal, wall_limit_ms, model, shown } = launch;
    let plan = &record.accepted.plan;
    let words = |argv: Vec<String>| argv.into_iter().map(OsString::from).collect::<Vec<_>>();
    let provider = parts.gateway.view(&plan.provider).map_err(|e| failed(FailReason::Internal, e))?;
    let mut env = options::environment(plan, &image.env, &provider, &names.token);
    if !model {
        // Nobody answers there.
        provider.environment(&names.token).into_iter().for_each(|(name, _)| drop(env.remove(name)));
    }
    if terminal.is_some() {
        env.insert("TERM".to_owned(), TERMINAL.to_owned());
    }
    env.extend(more.iter().cloned());
    surroundings::add_way_out(&mut env, shown, way_out::has_authorities(parts, shown));
    env.extend(record.accepted.above.iter().map(|_| above::across()));
    env.entry("SHELL".to_owned()).or_insert_with(|| image.shell.to_owned());
    let mut boot = Boot::new(names.cell.clone(), names.key.clone(), words(argv));
    boot.env = env.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    boot.cwd = PathBuf::from(&plan.workspace_at);
    boot.ctl_socket = PathBuf::from("/.hotcell/ctl.sock");
    boot.wall_limit_ms = wall_limit_ms;
    boot.dead_man_ms = DEAD_MAN_MS;
    boot.buffer_bytes_max = CELL_BUFFER_BYTES_MAX;
    boot.start_now = steps.is_empty();
    boot.steps = steps.into_iter().map(words).collect();
    boot.terminal = terminal.map(|size| (size.rows, size.cols));
    // A person's command may open /dev/stdout, which no socket can be.
    boot.pipes = !model && terminal.is_none();
    let forward = |port, name| PortForward { port, socket: PathBuf::from("/.hotcell").join(name) };
    boot.forwards = vec![forward(agent_way_out::EGRESS_PORT, "egress.sock")];
    if model {
        boot.forwards.push(forward(options::MODEL_PORT, "api.sock"));
    }
    boot.encode().map_err(|e| failed(FailReason::Internal, e))
}
