//! `hotcell drain` and `hotcell detach`: end the daemon. What becomes of jobs is the daemon's; this asks, and waits
//! where it is told to.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use clap::Args;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::fail::{CliError, ExitCode};
use super::render::Text;
use super::{Connection, Context};
use crate::api::daemon::EndingView;

/// How often it is looked whether the daemon has ended.
const LOOK: Duration = Duration::from_millis(50);
/// Longest wait for the end of a detached daemon: its own limits are shorter.
const DETACHED_MAX: Duration = Duration::from_secs(60);

/// End the daemon when running jobs have ended (for admins and the user it runs as)
#[derive(Debug, Args)]
#[command(after_help = "\
Nothing new starts; running jobs get limits.drain_s and are stopped then. What waits is kept for
the next daemon. The same as SIGTERM; a second SIGTERM stops running jobs at once.")]
pub(super) struct DrainArgs {
    /// Return when the daemon has ended
    #[arg(short, long)]
    wait: bool,
    /// Print the answer as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

/// End the daemon and let its jobs go on: the next one adopts them (for admins and the user it runs as)
#[derive(Debug, Args)]
#[command(after_help = "\
For upgrades: detach, replace the program, start it. Cells go on; a cell for which no daemon
comes back within 15 minutes ends. Requests for the model that are under way may end for 10 s;
what is left then is charged in full, as after a kill. Commands of `hotcell exec` and `shell`
end: their jobs are named. Returns when the daemon has ended. The same as SIGQUIT.")]
pub(super) struct DetachArgs {
    /// Print the answer as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn drain(args: &DrainArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let ending = args.connection.client(&context.machine)?.end("drain").await?;
    told(context, &ending, args.json)?;
    if args.wait {
        gone(&ending, None).await?;
    }
    Ok(ExitCode::Succeeded)
}

pub(super) async fn detach(args: &DetachArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let ending = args.connection.client(&context.machine)?.end("detach").await?;
    told(context, &ending, args.json)?;
    gone(&ending, Some(DETACHED_MAX)).await?;
    Ok(ExitCode::Succeeded)
}

fn told(context: &mut Context, ending: &EndingView, json: bool) -> Result<(), CliError> {
    if json {
        context.out.json(ending)?;
    } else {
        let line = format!("{}: {} running, {} waiting", ending.how.words(), ending.running, ending.queued);
        let lost = ending.lost.iter().fold(Text::new(context.out.paint).plain(&line).end(), |text, job| {
            text.plain(&format!("{job}  ends: its command runs for a client")).end()
        });
        context.out.print(&lost)?;
    }
    context.out.flush()
}

/// Waits for the end of the daemon's process: then its store and its socket are free for the next one.
async fn gone(ending: &EndingView, max: Option<Duration>) -> Result<(), CliError> {
    let pid = i32::try_from(ending.pid).ok().and_then(Pid::from_raw);
    let Some(pid) = pid else { return Err(CliError::Protocol { what: "no process id".into() }) };
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(Errno::SRCH) => return Ok(()),
        Err(error) => return Err(CliError::Local(error.into())),
    };
    let waiting = async {
        while !has_ended(&process) {
            tokio::time::sleep(LOOK).await;
        }
    };
    match max {
        None => waiting.await,
        Some(max) => tokio::time::timeout(max, waiting).await.map_err(|_| {
            let what = format!("process {} has not ended within {} s", ending.pid, max.as_secs());
            CliError::ConnectionLost { what }
        })?,
    }
    Ok(())
}

/// Its descriptor can be read once it has ended, also before anybody asks for its exit code.
fn has_ended(process: &OwnedFd) -> bool {
    let mut fd = libc::pollfd { fd: process.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry, an open descriptor, no waiting.
    let count = unsafe { libc::poll(&mut fd, 1, 0) };
    count > 0
}
