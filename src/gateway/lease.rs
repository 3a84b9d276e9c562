//! A cell's lease on the model: its socket, its token, and every request that is under way for it. Once revoked
//! it must not accept or keep a connection; a request that was forwarded must be settled even so.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::fs::{AtFlags, Mode, OFlags};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::body::Recall;
use super::egress::{self, Door, EgressSpec};
use super::estimate::Learnt;
use super::ledger::Ledger;
use super::messages;
use super::provider::Provider;
use super::secret::Secret;
use super::{Gateway, GatewayEvent};
use crate::job::{CellId, Identity, JobId};
use crate::money::Budget;
use crate::policy::Plan;

/// Name of the socket in the cell's run directory.
pub const SOCKET: &str = "api.sock";
/// Events that wait for [`Lease::next_event`]; of more, refusals are dropped first.
const EVENTS_MAX: usize = 1024;
/// How long requests may take to settle once they were told to stop.
const SETTLE_WAIT: Duration = Duration::from_secs(10);
/// A connection's buffer. It grows to this with a large request and stays while the answer streams.
const READ_BYTES_MAX: usize = 12 << 10;
/// Bodies are counted in pieces of this many bytes.
pub(super) const BODY_UNIT: usize = 1024;

/// What a cell gets.
#[derive(Clone)]
pub struct LeaseSpec {
    /// The job that pays.
    pub job: JobId,
    /// The cell, for logs.
    pub cell: CellId,
    /// The only credential that the socket accepts.
    pub token: String,
    /// Whose job it is: commands that give credentials run as them.
    pub identity: Identity,
    /// The job's plan: its provider, and which models may be asked.
    pub plan: Arc<Plan>,
    /// The budgets that its requests must fit under; what was spent before is in the ledger.
    pub budgets: Vec<Budget>,
    /// `max_tokens` of a request is lowered to this.
    pub output_tokens_max: Option<u64>,
    /// The directory in which `api.sock` is made.
    pub run_dir: PathBuf,
    /// Host uid and gid that may connect, beside root; `None`: the daemon's own.
    pub socket_owner: Option<(u32, u32)>,
    /// It may ask the model; else there is no socket for that.
    pub model: bool,
    /// The way out to hosts; without it there is none, and no socket for it.
    pub egress: Option<EgressSpec>,
    /// What its way out leads to at first, where that is not what the plan says: until [`Lease::settle_in`].
    pub first: Option<Arc<Plan>>,
}

impl fmt::Debug for LeaseSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseSpec").field("job", &self.job).field("cell", &self.cell).finish_non_exhaustive()
    }
}

/// A live lease. It ends with [`Lease::destroy`].
#[derive(Debug)]
pub struct Lease {
    pub(super) shared: Arc<Shared>,
    events: mpsc::Receiver<GatewayEvent>,
    /// None: it may not ask the model.
    acceptor: Option<JoinHandle<()>>,
    run_dir: PathBuf,
    door: Option<Door>,
    /// What the door after the first one is opened with.
    next: Option<(EgressSpec, Option<(u32, u32)>)>,
    destroyed: bool,
}

/// What the requests of a lease share.
pub(super) struct Shared {
    pub(super) gateway: Arc<Gateway>,
    pub(super) ledger: Arc<dyn Ledger>,
    pub(super) job: JobId,
    pub(super) cell: CellId,
    pub(super) token: Secret,
    pub(super) identity: Identity,
    pub(super) provider: Arc<Provider>,
    pub(super) plan: Arc<Plan>,
    pub(super) budgets: Vec<Budget>,
    pub(super) output_tokens_max: Option<u64>,
    /// What its conversations were billed for.
    pub(super) learnt: Learnt,
    /// Parts of its bodies.
    pub(super) recall: Recall,
    /// The end of the pause that was told of last, in milliseconds of the wall clock.
    pub(super) pause_told_ms: AtomicU64,
    /// No connections any more.
    revoked: CancellationToken,
    /// Requests under way stop and settle with what they have.
    pub(super) cut: CancellationToken,
    /// Told at each settlement, for requests that wait for room.
    pub(super) settled: Notify,
    pub(super) requests: Arc<Semaphore>,
    pub(super) bodies: Arc<Semaphore>,
    pub(super) tasks: TaskTracker,
    events: mpsc::Sender<GatewayEvent>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("job", &self.job).field("cell", &self.cell).finish_non_exhaustive()
    }
}

impl Shared {
    /// Hands an event over; never waits. A cell that floods us with bad requests loses its refusals first.
    pub(super) fn event(&self, event: GatewayEvent) {
        let refusal = matches!(event, GatewayEvent::Refused { .. });
        if refusal && self.events.capacity() < EVENTS_MAX / 2 {
            return;
        }
        if self.events.try_send(event).is_err() {
            tracing::warn!(job = %self.job, "a gateway event is dropped: nobody reads them");
        }
    }
}

impl Lease {
    pub(super) async fn open(
        gateway: Arc<Gateway>,
        provider: Arc<Provider>,
        spec: LeaseSpec,
        ledger: Arc<dyn Ledger>,
    ) -> io::Result<Self> {
        let (run_dir, owner) = (spec.run_dir.clone(), spec.socket_owner);
        let (way_out, model) = (spec.egress.is_some(), spec.model);
        let (listener, egress_listener) = tokio::task::spawn_blocking(move || {
            let egress = if way_out { Some(bind(&run_dir, egress::SOCKET, owner)?) } else { None };
            let model = if model { Some(bind(&run_dir, SOCKET, owner)?) } else { None };
            Ok::<_, io::Error>((model, egress))
        })
        .await??;
        let listener = listener.map(UnixListener::from_std).transpose()?;
        let egress_listener = egress_listener.map(UnixListener::from_std).transpose()?;
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let limits = &gateway.limits;
        let shared = Arc::new(Shared {
            ledger,
            job: spec.job,
            cell: spec.cell,
            token: Secret::new(spec.token),
            identity: spec.identity,
            provider,
            plan: spec.plan,
            budgets: spec.budgets,
            output_tokens_max: spec.output_tokens_max,
            learnt: Learnt::default(),
            recall: Recall::default(),
            pause_told_ms: AtomicU64::new(0),
            revoked: CancellationToken::new(),
            cut: CancellationToken::new(),
            settled: Notify::new(),
            requests: Arc::new(Semaphore::new(limits.requests_max)),
            bodies: Arc::new(Semaphore::new(limits.bodies_bytes_max / BODY_UNIT)),
            tasks: TaskTracker::new(),
            events: sender,
            gateway,
        });
        let next = spec.first.as_ref().and_then(|_| Some((spec.egress.clone()?, spec.socket_owner)));
        let first = spec.first.unwrap_or_else(|| Arc::clone(&shared.plan));
        let door = egress_listener
            .zip(spec.egress)
            .map(|(listener, egress)| Door::open(listener, egress, first, shared.cell.clone()));
        let acceptor = listener.map(|listener| tokio::spawn(accept(Arc::clone(&shared), listener)));
        Ok(Self { shared, events, acceptor, run_dir: spec.run_dir, door, next, destroyed: false })
    }

    /// From now on the way out leads to what the plan says: what was open until then is closed. Gives the events that
    /// nobody read yet.
    ///
    /// # Errors
    /// When the new socket cannot be made: then there is no way out any more.
    pub async fn settle_in(&mut self) -> io::Result<Vec<GatewayEvent>> {
        let Some((egress, owner)) = self.next.take() else { return Ok(Vec::new()) };
        let last = match self.door.take() {
            Some(door) => door.destroy().await,
            None => Vec::new(),
        };
        let run_dir = self.run_dir.clone();
        let bound = tokio::task::spawn_blocking(move || bind(&run_dir, egress::SOCKET, owner)).await??;
        let listener = UnixListener::from_std(bound)?;
        let (plan, cell) = (Arc::clone(&self.shared.plan), self.shared.cell.clone());
        self.door = Some(Door::open(listener, egress, plan, cell));
        Ok(last.into_iter().map(GatewayEvent::Egress).collect())
    }

    /// The next event. Cancel-safe. Does not return while nothing happens.
    pub async fn next_event(&mut self) -> GatewayEvent {
        let (events, door) = (&mut self.events, &mut self.door);
        let egress = async {
            match door {
                Some(door) => door.next_event().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            // There is always one: `shared` lives, which holds a sender.
            Some(event) = events.recv() => event,
            event = egress => GatewayEvent::Egress(event),
        }
    }

    /// The next event of the model's side that is there already.
    pub fn waiting_event(&mut self) -> Option<GatewayEvent> {
        self.events.try_recv().ok()
    }

    /// Stops accepting and closes all connections, at once. Requests that were forwarded are read on (for a
    /// limited time) and settled.
    pub fn revoke(&self) {
        self.shared.revoked.cancel();
        if let Some(door) = &self.door {
            door.revoke();
        }
    }

    /// Revokes, waits for the requests under way to settle (at most [`super::Limits::drain`], then they stop
    /// and settle with what they saw), removes the socket, and gives the events that nobody read yet.
    pub async fn destroy(mut self) -> Vec<GatewayEvent> {
        self.destroyed = true;
        self.revoke();
        let reached = match self.door.take() {
            Some(door) => door.destroy().await,
            None => Vec::new(),
        };
        if let Some(acceptor) = &mut self.acceptor
            && let Err(error) = acceptor.await
        {
            tracing::error!(%error, cell = %self.shared.cell, "the model socket's task ended badly");
        }
        self.shared.tasks.close();
        let drain = self.shared.gateway.limits.drain;
        if tokio::time::timeout(drain, self.shared.tasks.wait()).await.is_err() {
            self.shared.cut.cancel();
            if tokio::time::timeout(SETTLE_WAIT, self.shared.tasks.wait()).await.is_err() {
                let open = self.shared.tasks.len();
                tracing::error!(job = %self.shared.job, open, "requests are not settled: reservations stay");
            }
        }
        for socket in [SOCKET, egress::SOCKET].map(|name| self.run_dir.join(name)) {
            if let Err(error) = tokio::fs::remove_file(&socket).await
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, socket = %socket.display(), "cannot remove a socket of a cell");
            }
        }
        let left = std::iter::from_fn(|| self.events.try_recv().ok());
        left.chain(reached.into_iter().map(GatewayEvent::Egress)).collect()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.destroyed {
            if !self.shared.gateway.open.is_closed() {
                tracing::error!(job = %self.shared.job, "a lease was dropped, not destroyed: its socket file stays");
            }
            // Not clean-up, but a door that nobody watches must not stay open.
            self.revoke();
        }
    }
}

async fn accept(shared: Arc<Shared>, listener: UnixListener) {
    let mut connections = JoinSet::new();
    loop {
        let full = connections.len() >= shared.gateway.limits.connections_max;
        tokio::select! {
            () = shared.revoked.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if !full => match accepted {
                Ok((stream, _)) => { connections.spawn(connection(Arc::clone(&shared), stream)); }
                Err(error) => {
                    tracing::warn!(%error, cell = %shared.cell, "cannot accept a connection to the model");
                    // Out of descriptors, most likely: give others the time to close some.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
        }
    }
    connections.shutdown().await;
}

async fn connection(shared: Arc<Shared>, stream: UnixStream) {
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, std::convert::Infallible>(messages::answer(shared, request).await) }
    });
    // No limit on the time between requests: the CLI keeps connections, and a cell that opens idle ones only
    // takes its own places.
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_buf_size(READ_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!(%error, cell = %shared.cell, "a connection to the model ended");
    }
}

/// Makes the socket under a temporary name, sets owner and mode, then renames it, so that it is never there
/// with the wrong ones. By descriptor: the path of a state directory may be longer than a socket address.
fn bind(
    run_dir: &Path,
    socket: &str,
    owner: Option<(u32, u32)>,
) -> io::Result<std::os::unix::net::UnixListener> {
    let new = format!("{socket}.new");
    let dir = rustix::fs::open(run_dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    match rustix::fs::unlinkat(&dir, &new, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let address = format!("/proc/self/fd/{}/{new}", dir.as_raw_fd());
    let listener = std::os::unix::net::UnixListener::bind(address)?;
    listener.set_nonblocking(true)?;
    rustix::fs::chmodat(&dir, &new, Mode::RUSR | Mode::WUSR, AtFlags::empty())?;
    if let Some((uid, gid)) = owner {
        let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
        rustix::fs::chownat(&dir, &new, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    rustix::fs::renameat(&dir, &new, &dir, socket)?;
    Ok(listener)
}
