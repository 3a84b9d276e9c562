//! hotcell-init, PID 1 of a cell: reads one boot message from its stdin, runs the steps that the daemon asks
//! for, starts the agent on socket pairs, pipes or a terminal, carries its streams to the daemon over `ctl.sock` without loss, forwards local ports to the daemon's
//! sockets, holds the deadlines, reaps, and reports the end. Linked statically, std and libc only. It must
//! never trust anything that comes from the cell, close the agent's stdin by itself, or show its key.
//!
//! Called with `attack` it is no PID 1 but the one that tries the walls for `hotcell doctor` ([`attack`]).

mod attack;
// Shared with the daemon, which uses the other half and makes some of it public: `boot`, `hash`, `wire`.
#[allow(dead_code, unreachable_pub)]
mod boot;
mod carry;
mod child;
mod ctl;
mod forward;
#[allow(dead_code, unreachable_pub)]
mod hash;
mod life;
mod ring;
mod source;
mod steps;
mod sys;
mod terminal;
mod usage;
#[allow(dead_code, unreachable_pub)]
mod wire;

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::process::ExitCode;

use crate::boot::BootMessage;
use crate::child::{OomScore, SpawnError};
use crate::forward::Forwarder;
use crate::life::Life;

/// How long the daemon may take to send the boot message.
const BOOT_MS_MAX: u64 = 60_000;
/// Exit code for a boot message that is missing or wrong (EX_USAGE).
const EXIT_BOOT: u8 = 64;
/// Exit code where the system refuses what init cannot do without (EX_OSERR).
const EXIT_SYSTEM: u8 = 71;

fn main() -> ExitCode {
    // PID 1 of a cell has no arguments.
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some((word, rest)) = args.split_first()
        && word == attack::WORD
    {
        return attack::run(rest);
    }
    sys::close_inherited();
    sys::block_signals();
    let oom = OomScore::open();
    sys::harden();
    let boot = match read_boot() {
        Ok(boot) => boot,
        Err(what) => {
            sys::complain(what);
            return ExitCode::from(EXIT_BOOT);
        }
    };
    if let Ok(null) = File::open("/dev/null") {
        sys::replace_stdin(&null.into());
    }
    if !sys::is_pid_1() {
        sys::complain("not PID 1: only descendants are reaped and killed");
    }
    let child_signal = match sys::child_signal() {
        Ok(fd) => fd,
        Err(error) => {
            sys::complain(&format!("signalfd: {error}"));
            return ExitCode::from(EXIT_SYSTEM);
        }
    };
    // Before the agent starts, so that its first connection finds a listener.
    let forwarder = Forwarder::listen(&boot.forwards, boot.dead_man_ms);
    let mut life = Life::new(boot, oom, child_signal);
    if let Err(error) = forwarder.and_then(Forwarder::start) {
        life.fail(SpawnError::new("listen for forwards", &error));
    }
    ExitCode::from(life.run())
}

/// Reads the boot message from stdin, within its time and size.
fn read_boot() -> Result<BootMessage, &'static str> {
    let stdin = sys::stdin().try_clone_to_owned().map_err(|_| "no stdin to read the boot message from")?;
    let mut stdin = File::from(stdin);
    let deadline_ms = sys::now_ms() + BOOT_MS_MAX;
    let mut start = [0; 8];
    read_exact(&mut stdin, &mut start, deadline_ms)?;
    let mut body = vec![0; BootMessage::body_bytes(&start).map_err(|error| error.0)?];
    read_exact(&mut stdin, &mut body, deadline_ms)?;
    BootMessage::decode(&body).map_err(|error| error.0)
}

fn read_exact(source: &mut File, mut rest: &mut [u8], deadline_ms: u64) -> Result<(), &'static str> {
    while !rest.is_empty() {
        let now_ms = sys::now_ms();
        if now_ms >= deadline_ms {
            return Err("the boot message did not come in time");
        }
        let mut fds = [sys::interest(source.as_raw_fd(), libc::POLLIN)];
        sys::poll(&mut fds, deadline_ms - now_ms);
        if fds[0].revents == 0 {
            continue;
        }
        match source.read(rest) {
            Ok(0) => return Err("stdin ended within the boot message"),
            Ok(count) => rest = &mut rest[count..],
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return Err("the boot message cannot be read"),
        }
    }
    Ok(())
}
