//! A proxy's process: started with little environment, ended whatever happens, with its processor time and
//! memory read from the kernel. What it used must never be guessed or taken from itself.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

/// Longest wait for a proxy to listen: Python's imports take their time.
const START_MAX: Duration = Duration::from_secs(180);
/// Longest wait for one to end by itself.
const END_MAX: Duration = Duration::from_secs(10);
/// Unit of the kernel's figures: its ABI, whatever its timer does.
const TICKS_PER_S: f64 = 100.0;

/// A proxy that somebody else wrote.
pub(crate) struct Process {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Process {
    /// Starts a program in `dir` that is going to listen on `address`, and waits until it does.
    pub(crate) fn start(mut command: Command, dir: &Path, address: SocketAddr) -> Result<Self> {
        let program = command.get_program().to_owned();
        let log = dir.join("log");
        let out = std::fs::File::create(&log)?;
        let path = std::env::var_os("PATH").unwrap_or_default();
        let envs: Vec<_> =
            command.get_envs().map(|(k, v)| (k.to_owned(), v.map(ToOwned::to_owned))).collect();
        command.env_clear().env("PATH", path).env("HOME", dir);
        command.envs(envs.into_iter().filter_map(|(name, value)| Some((name, value?))));
        command.current_dir(dir).stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out).process_group(0);
        let child = command.spawn().with_context(|| format!("start {program:?}: run `make bench-tools`"))?;
        let mut process = Self { child, address };
        let until = Instant::now() + START_MAX;
        while TcpStream::connect(address).is_err() {
            if let Some(status) = process.child.try_wait()? {
                bail!("{program:?} ended ({status}): {}", std::fs::read_to_string(&log).unwrap_or_default());
            }
            if Instant::now() > until {
                bail!("{program:?} does not listen: {}", std::fs::read_to_string(&log).unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(process)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let group = Pid::from_child(&self.child);
        let _ = kill_process_group(group, Signal::TERM);
        let until = Instant::now() + END_MAX;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = kill_process_group(group, Signal::KILL);
        let _ = self.child.wait();
    }
}

/// A port on loopback that nobody listens on now.
pub(crate) fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// The processes that a process started, as the kernel lists them.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

/// A process and all that it started, directly or not.
pub(crate) fn family(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut at = 0;
    while at < all.len() {
        all.extend(children(all[at]));
        at += 1;
    }
    all
}

/// Processor time that these processes used so far, in seconds.
pub(crate) fn cpu_s(pids: &[u32]) -> Result<f64> {
    let mut ticks = 0;
    for pid in pids {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // After the name, which may hold anything.
        let (_, rest) = text.rsplit_once(')').context("no name in stat")?;
        let mut fields = rest.split_whitespace().skip(11).map(str::parse::<u64>);
        let mut field = || fields.next().context("stat is short")?.context("no figure");
        ticks += field()? + field()?;
    }
    Ok(ticks as f64 / TICKS_PER_S)
}

/// Resident memory of these processes now, in MB.
pub(crate) fn resident_mb(pids: &[u32]) -> Result<f64> {
    status_mb(pids, "VmRSS:")
}

/// The most that was resident since [`forget_peak`], in MB.
pub(crate) fn peak_mb(pids: &[u32]) -> Result<f64> {
    status_mb(pids, "VmHWM:")
}

/// From here on the peak is counted anew.
pub(crate) fn forget_peak(pids: &[u32]) -> Result<()> {
    pids.iter().try_for_each(|pid| Ok(std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?))
}

fn status_mb(pids: &[u32], name: &str) -> Result<f64> {
    let mut bytes = 0.0;
    for pid in pids {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = text.lines().find(|line| line.starts_with(name)).with_context(|| format!("no {name}"))?;
        bytes += line.split_whitespace().nth(1).context("no figure")?.parse::<f64>()? * 1024.0;
    }
    Ok(bytes / 1e6)
}
