//! What the measurements share: facts about the machine, the engine's client, the stand-in agent as a bundle,
//! a daemon's memory. Must never write a host name or a path into a report.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use hotcell::agent_bundle::Platform;
use serde_json::{Value, json};

use crate::http::Client;
use crate::world::World;

/// Version of the stand-in agent's bundle.
pub(crate) const FAKE: &str = "0.0.1";
/// Whom baselines run as.
pub(crate) const UID: u32 = 4242;

/// A number from the environment.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The docker client on the engine that hotcell uses.
pub(crate) fn docker() -> Command {
    let address = hotcell::engine::find_address(None).expect("an engine: run `make engine`");
    let mut command = Command::new("docker");
    command.args(["-H", &address]).stdin(Stdio::null());
    command
}

/// Standard output of a command that must succeed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("run {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!("{:?}: {}", command.get_program(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The id of the recorded cell image.
pub(crate) fn image_id(world: &World) -> Result<String> {
    let text = std::fs::read_to_string(world.state_dir().join("images/cell.json"))?;
    let built: Value = serde_json::from_str(&text)?;
    Ok(built["id"].as_str().context("the image record has no id")?.to_owned())
}

/// The real CLI's binary.
pub(crate) fn real_cli(world: &World) -> Result<PathBuf> {
    let bundles = hotcell::agent_bundle::Bundles::new(&world.state_dir());
    let path = bundles.path_for(&bundles.active()?, Platform::of_host()?)?;
    Ok(path.canonicalize()?)
}

/// Containers of baselines; whatever happens, none outlives this.
pub(crate) struct Baselines {
    pub(crate) label: String,
}

impl Baselines {
    pub(crate) fn new() -> Self {
        Self { label: format!("hotcell.bench={}", std::process::id()) }
    }
}

impl Drop for Baselines {
    fn drop(&mut self) {
        let filter = format!("label={}", self.label);
        let left = output(docker().args(["ps", "-aq", "--filter", &filter])).unwrap_or_default();
        for id in left.split_whitespace() {
            let _ = output(docker().args(["rm", "-f", id]));
        }
    }
}

/// A directory of its own for a baseline, owned by [`UID`].
pub(crate) fn own_dir(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path)?;
    std::os::unix::fs::chown(path, Some(UID), Some(UID))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// A world with the stand-in agent beside the real one; its daemon is not started.
pub(crate) fn world_with_fake(config: &str) -> Result<World> {
    let world = World::without_daemon("[default]\ntext = \"hello\"\n", config);
    let agents = world.state_dir().join("agents");
    let real = std::fs::read_link(&agents)?;
    std::fs::remove_file(&agents)?;
    std::fs::create_dir(&agents)?;
    std::fs::set_permissions(&agents, std::fs::Permissions::from_mode(0o711))?;
    for entry in std::fs::read_dir(&real)? {
        let entry = entry?;
        std::os::unix::fs::symlink(entry.path(), agents.join(entry.file_name()))?;
    }
    let platform = Platform::of_host()?;
    let bundle = agents.join(format!("{FAKE}-{platform}"));
    std::fs::create_dir(&bundle)?;
    std::fs::set_permissions(&bundle, std::fs::Permissions::from_mode(0o755))?;
    compile(&bundle.join("claude"))?;
    let facts = json!({
        "version": FAKE, "platform": platform, "sha256": "", "size_bytes": 0, "package": "stand-in",
        "integrity": "", "installed_at_ms": 0, "state": { "state": "installed" },
    });
    std::fs::write(bundle.join("bundle.json"), facts.to_string())?;
    Ok(world)
}

fn compile(to: &Path) -> Result<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/agent.rs");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut command = Command::new(rustc);
    command.args([
        "--edition=2024",
        "-Copt-level=3",
        "-Ctarget-feature=+crt-static",
        "-Cstrip=symbols",
        "-o",
    ]);
    output(command.arg(to).arg(source).stdin(Stdio::null()))?;
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o711))?;
    Ok(())
}

/// A job of the stand-in agent.
pub(crate) fn fake_job(lines: u64, pause_ms: u64) -> Value {
    json!({
        "prompt": "print", "policy": "trusted", "agent": FAKE,
        "env": { "BENCH_LINES": lines.to_string(), "BENCH_PAUSE_MS": pause_ms.to_string() },
        "limits": { "memory_mib": 256, "disk_mib": 64, "pids": 64, "cpus": 2.0 },
    })
}

/// Submits a job; its id.
pub(crate) fn submit(client: &mut Client, spec: &str) -> Result<String> {
    let (status, body) = client.call("POST", "/v1/jobs", spec)?;
    if status != 201 {
        bail!("a job was refused with {status}: {}", String::from_utf8_lossy(&body));
    }
    let view: Value = serde_json::from_slice(&body)?;
    Ok(view["id"].as_str().context("a job without an id")?.to_owned())
}

/// A daemon's memory, in MiB.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    pub(crate) resident: f64,
    pub(crate) proportional: f64,
    /// Heap and stacks: what a longer life or more work can make grow. (Private_Dirty would count pages of a
    /// freshly linked program too, until they are written back.)
    pub(crate) anonymous: f64,
}

/// The memory of the process that listens on `socket`.
pub(crate) fn memory(socket: &Path) -> Result<Memory> {
    let pid = rustix::net::sockopt::socket_peercred(UnixStream::connect(socket)?)?.pid;
    let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", pid.as_raw_nonzero()))?;
    let field = |name: &str| -> Result<f64> {
        let line = text.lines().find(|line| line.starts_with(name)).with_context(|| format!("no {name}"))?;
        let kib: f64 = line.split_whitespace().nth(1).context("no figure")?.parse()?;
        Ok(kib / 1024.0)
    };
    let (resident, proportional) = (field("Rss:")?, field("Pss:")?);
    Ok(Memory { resident, proportional, anonymous: field("Anonymous:")? })
}

/// Where the figures come from, one fact a line.
pub(crate) fn machine() -> Vec<(&'static str, String)> {
    let engine = "engine {{.Server.Version}} (API {{.Server.APIVersion}}), client {{.Client.Version}}";
    let info = "{{.Driver}}, cgroup v{{.CgroupVersion}}, runtime {{.DefaultRuntime}}";
    let known = |text: Result<String>| text.unwrap_or_else(|error| format!("unknown ({error})"));
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        memory.lines().next().and_then(|l| l.split_whitespace().nth(1)).and_then(|n| n.parse::<u64>().ok());
    vec![
        ("hotcell", env!("CARGO_PKG_VERSION").to_owned()),
        ("cores", std::thread::available_parallelism().map_or(0, usize::from).to_string()),
        ("memory", format!("{} GiB", kib.unwrap_or(0) >> 20)),
        ("kernel", known(output(Command::new("uname").arg("-sr")))),
        ("docker", known(output(docker().args(["version", "--format", engine])))),
        ("storage", known(output(docker().args(["info", "--format", info])))),
        ("agent", hotcell::agent_bundle::PINNED_VERSION.to_owned()),
    ]
}
