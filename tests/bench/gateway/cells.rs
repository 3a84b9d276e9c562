//! hotcell's own side: a daemon with real cells, whose model sockets are used as the agents in them would. The
//! request is recorded from the real CLI in a real cell; then stand-in agents hold the cells open. Nothing here
//! uses the gateway's own interface: configuration, jobs and sockets are all it knows.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hotcell::model::Received;
use serde_json::json;

use super::client::{Address, Door};
use super::process::children;
use super::upstream::{PROMPT, Upstream};
use crate::http::Client;
use crate::load::wait_for;
use crate::setup::{self, docker, fake_job, output};
use crate::world::{CANARY, PATIENCE, World};

/// The key that the daemon holds for the provider.
pub(crate) const KEY: &str = CANARY;
/// The model that the recorded request asks for; it has a price.
pub(crate) const MODEL: &str = "claude-sonnet-4-6";
/// Where the CLI in a cell sends its requests.
const MODEL_PORT: u16 = hotcell::agent::options::MODEL_PORT;
/// The least that a recorded request has: the CLI's first one has 116 to 126 KB.
const REQUEST_BYTES_MIN: usize = 110_000;

/// A daemon whose provider is the upstream, and its open cells.
pub(crate) struct Cells {
    world: World,
    jobs: Vec<String>,
    /// The process with number 1 of each cell.
    pub(crate) inits: Vec<u32>,
    /// Each cell's model socket, as the daemon has it.
    pub(crate) sockets: Vec<Door>,
    /// The same as the agent reaches it: a port in the cell, carried by hotcell-init.
    pub(crate) ports: Vec<Door>,
}

impl Cells {
    /// Records the CLI's request, then starts the daemon anew with `upstream` as its provider. No cell is open.
    pub(crate) fn start(dir: &Path, slots: u64, upstream: &Upstream) -> Result<(Self, Received)> {
        let policies = policies(dir)?;
        let config = format!("policy_dirs = [{policies:?}]\n[limits]\nslots = {slots}\ncancel_grace_s = 2\n");
        let mut world = setup::world_with_fake(&config)?;
        world.start();
        let (_, job) = world.job(&json!({ "prompt": PROMPT, "policy": "bench" }));
        let asked = |request: &Received| {
            request.target.starts_with("/v1/messages?")
                && request.body.len() >= REQUEST_BYTES_MIN
                && memchr::memmem::find(&request.body, PROMPT.as_bytes()).is_some()
        };
        let recorded = world.recorder.requests().into_iter().find(asked);
        let recorded = recorded.with_context(|| format!("the CLI sent no such request: {job}"))?;
        world.terminate();
        world.set_provider(&format!("http://{}", upstream.address));
        world.start();
        let none = Vec::new;
        Ok((
            Self { world, jobs: none(), inits: Vec::new(), sockets: Vec::new(), ports: Vec::new() },
            recorded,
        ))
    }

    pub(crate) fn daemon(&self) -> u32 {
        self.world.pid()
    }

    pub(crate) fn log(&self) -> String {
        self.world.log()
    }

    /// Opens `count` cells, with an agent in each that says next to nothing.
    pub(crate) fn open(&mut self, count: u64) -> Result<()> {
        let mut client = Client::connect(&self.world.socket())?;
        let mut spec = fake_job(1_000_000, 60_000);
        spec["policy"] = json!("bench");
        let spec = spec.to_string();
        self.jobs = (0..count).map(|_| setup::submit(&mut client, &spec)).collect::<Result<_>>()?;
        wait_for(&self.world, "running", count, PATIENCE + Duration::from_secs(2 * count))?;
        let filter = format!("label=hotcell.instance={}", self.world.instance());
        let ids = output(docker().args(["ps", "-q", "--no-trunc", "--filter", &filter]))?;
        for id in ids.split_whitespace() {
            let format = r#"{{.State.Pid}} {{index .Config.Labels "hotcell.cell"}}"#;
            let facts = output(docker().args(["inspect", "--format", format, id]))?;
            let (pid, cell) = facts.split_once(' ').context("no cell")?;
            self.add(pid.parse()?, cell)?;
        }
        ensure!(self.inits.len() as u64 == count, "{} of {count} cells are open", self.inits.len());
        Ok(())
    }

    fn add(&mut self, init: u32, cell: &str) -> Result<()> {
        let key = token(init)?;
        let socket = self.world.state_dir().join("cells").join(cell).join("run/api.sock");
        self.sockets.push(Door { address: Address::Unix(socket), key: key.clone() });
        self.ports.push(Door { address: Address::Inside { pid: init, port: MODEL_PORT }, key });
        self.inits.push(init);
        Ok(())
    }

    /// Ends the cells and proves that nothing is left, reservations included.
    pub(crate) fn end(self) -> Result<()> {
        let mut client = Client::connect(&self.world.socket())?;
        for job in &self.jobs {
            let (status, body) = client.call("POST", &format!("/v1/jobs/{job}/cancel"), "")?;
            ensure!(matches!(status, 200 | 202), "cancel: {status} {}", String::from_utf8_lossy(&body));
        }
        // The recorded job is done as well.
        wait_for(&self.world, "done", self.jobs.len() as u64 + 1, PATIENCE)?;
        self.world.end();
        Ok(())
    }
}

/// A policy whose money is no matter here: a held stream reserves half a dollar, and there are many.
fn policies(dir: &Path) -> Result<std::path::PathBuf> {
    let dir = dir.join("policies");
    std::fs::create_dir(&dir)?;
    let trusted = include_str!("../../../policies/trusted.toml");
    let bench = trusted.replace("cost_usd = 20.0", "cost_usd = 100000.0");
    ensure!(bench != trusted, "the policy `trusted` has another limit now");
    std::fs::write(dir.join("bench.toml"), bench)?;
    Ok(dir)
}

/// What the agent was given as its key.
fn token(init: u32) -> Result<String> {
    for agent in children(init) {
        let environment = std::fs::read(format!("/proc/{agent}/environ"))?;
        let mut entries = environment.split(|byte| *byte == 0);
        if let Some(token) = entries.find_map(|entry| entry.strip_prefix(b"ANTHROPIC_API_KEY=")) {
            return Ok(String::from_utf8(token.to_vec())?);
        }
    }
    bail!("no agent with a key in the cell of process {init}")
}
