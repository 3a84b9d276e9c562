//! What systemd hands over and is told, by its protocols sd_listen_fds(3) and sd_notify(3): the socket, that the daemon
//! serves, reads its files again or ends, and that it is alive. The word that it is alive is sent only after its loop and
//! its store have answered: it must never come from a timer that knows nothing of them.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::api::Api;
use crate::driver::Shutdown;

/// How often the status is told where no watchdog waits for it.
const STATUS: Duration = Duration::from_secs(60);

/// The socket that systemd listens on for the daemon (its `.socket` unit); none where it does not.
///
/// # Errors
/// Where something else was handed over than one unix stream socket that listens.
pub(super) fn handed_over() -> anyhow::Result<Option<UnixListener>> {
    let fds: Vec<i32> = sd_notify::listen_fds().context("LISTEN_FDS")?.collect();
    let fd = match fds.as_slice() {
        [] => return Ok(None),
        [fd] => *fd,
        many => {
            bail!("LISTEN_FDS: {} sockets were handed over; the daemon takes one, for its API", many.len())
        }
    };
    // SAFETY: borrowed for this look only; the process was started with it, or the look says that it is not open.
    let looked = socket_kind(unsafe { BorrowedFd::borrow_raw(fd) });
    let (unix, listens) = looked.context("LISTEN_FDS: what was handed over is no socket")?;
    ensure!(unix && listens, "LISTEN_FDS: what was handed over is no unix stream socket that listens");
    // SAFETY: systemd gives it to this process (LISTEN_PID says so), and nobody else here takes it.
    let listener = unsafe { std::os::unix::net::UnixListener::from_raw_fd(fd) };
    listener.set_nonblocking(true)?;
    Ok(Some(UnixListener::from_std(listener)?))
}

fn socket_kind(fd: BorrowedFd<'_>) -> rustix::io::Result<(bool, bool)> {
    let fd = fd.as_fd();
    let unix = socket_domain(fd)? == AddressFamily::UNIX && socket_type(fd)? == SocketType::STREAM;
    Ok((unix, socket_acceptconn(fd)?))
}

/// That the files are being read again, until [`reloaded`].
pub(super) fn reloading() {
    let since = NotifyState::monotonic_usec_now().ok();
    tell(&std::iter::once(NotifyState::Reloading).chain(since).collect::<Vec<_>>());
}

/// That they were.
pub(super) fn reloaded() {
    tell(&[NotifyState::Ready]);
}

/// Says that the daemon serves, and from then on that it is alive, until `close`.
/// `ending_max`: the longest that a drain takes; systemd, which would wait for its own limit only, is told of it.
pub(super) async fn run(api: Arc<Api>, shutdown: Shutdown, ending_max: Duration, close: CancellationToken) {
    let watchdog = sd_notify::watchdog_enabled();
    tell(&[NotifyState::Ready, NotifyState::Status("serving")]);
    let period = watchdog.map_or(STATUS, |limit| limit / 3);
    let ending = async {
        let mut how = shutdown.begun().await;
        let more_us = u32::try_from(ending_max.as_micros()).unwrap_or(u32::MAX);
        tell(&[
            NotifyState::Stopping,
            NotifyState::ExtendTimeoutUsec(more_us),
            NotifyState::Status(how.words()),
        ]);
        loop {
            how = shutdown.beyond(how).await;
            tell(&[NotifyState::Status(how.words())]);
        }
    };
    let alive = async {
        loop {
            // A third of the limit for the answer, one for the pause, and one to spare.
            match timeout(period, figures(&api, &shutdown)).await {
                Ok(Some(status)) => tell(&[NotifyState::Watchdog, NotifyState::Status(&status)]),
                Ok(None) => tracing::error!(
                    "the daemon's loop or its store does not answer; systemd is not told that it is alive"
                ),
                Err(_) => {
                    tracing::error!(
                        "the daemon's loop or its store is too slow; systemd is not told that it is alive"
                    );
                    continue;
                }
            }
            tokio::time::sleep(period).await;
        }
    };
    tokio::select! {
        () = close.cancelled() => {}
        () = ending => {}
        () = alive => {}
    }
}

/// What is asked of the loop and of the store. A loop that is ending need not answer.
async fn figures(api: &Api, shutdown: &Shutdown) -> Option<String> {
    let done = api.parts.store.counts_by_state().await.ok()?.get("done").copied().unwrap_or_default();
    if let Some(how) = shutdown.how() {
        return Some(how.words().to_owned());
    }
    let now = api.driver.look().await?;
    let (running, waiting, parked) = (now.running(), now.queued(), now.parked());
    Some(format!("serving: {running} running, {waiting} waiting, {parked} parked, {done} over"))
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd cannot be told");
    }
}
