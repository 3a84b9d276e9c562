//! The server of one `ctl.sock`: accepts, authenticates a few connections at a time, and lets one live. It
//! must never let strangers cost more than a few small buffers, or keep init out by being many.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinError, JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::job::CellId;

use super::boot::random;
use super::state::Shared;
use super::stream::{self, End};
use super::wire::{
    FromInit, HANDSHAKE_BODY_BYTES_MAX, HEADER_BYTES, Handshake, Header, Held, ToInit, VERSION, WireError,
};
use super::{CtlKey, LinkEvent};

const HANDSHAKES_MAX: usize = 4;
const HANDSHAKE_MAX: Duration = Duration::from_secs(2);
/// Pause after the oldest handshake had to make room: init's own takes a fraction of it, so that four
/// strangers in a row cannot push it out before it is done.
const CROWDED_PAUSE: Duration = Duration::from_millis(10);
const HOSTILE_PAUSE: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Server {
    listener: UnixListener,
    secret: Arc<Secret>,
    shared: Arc<Shared>,
    events: mpsc::Sender<LinkEvent>,
    stop: CancellationToken,
    handshakes: JoinSet<Result<Authenticated, &'static str>>,
    order: VecDeque<AbortHandle>,
    live: Option<Live>,
    hostile_after: Instant,
    accept_after: Instant,
}

struct Secret {
    cell: CellId,
    key: CtlKey,
}

/// A connection whose other side has the key.
struct Authenticated {
    socket: UnixStream,
    held: Held,
}

/// The connection that counts.
struct Live {
    reader: JoinHandle<End>,
    writer: JoinHandle<()>,
    stop: CancellationToken,
    /// A second descriptor of the socket, to ask whether its peer hung up.
    probe: std::os::fd::OwnedFd,
}

enum Happened {
    Stop,
    Accepted(std::io::Result<UnixStream>),
    Handshake(Result<Result<Authenticated, &'static str>, JoinError>),
    Ended(Result<End, JoinError>),
}

impl Server {
    pub(super) fn new(
        listener: UnixListener,
        cell: &CellId,
        key: CtlKey,
        shared: Arc<Shared>,
        events: mpsc::Sender<LinkEvent>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            listener,
            secret: Arc::new(Secret { cell: cell.clone(), key }),
            shared,
            events,
            stop,
            handshakes: JoinSet::new(),
            order: VecDeque::new(),
            live: None,
            hostile_after: Instant::now(),
            accept_after: Instant::now(),
        }
    }

    /// Serves until stopped; no task of it is left then.
    pub(super) async fn run(mut self) {
        loop {
            match self.happens().await {
                Happened::Stop => break,
                Happened::Accepted(Ok(socket)) => self.greet(socket),
                // Out of descriptors or the like: strangers do not make it better.
                Happened::Accepted(Err(_)) => self.accept_after = Instant::now() + CROWDED_PAUSE,
                Happened::Handshake(Ok(Ok(authenticated))) => self.adopt(authenticated).await,
                Happened::Handshake(Ok(Err(what))) => self.hostile(what),
                Happened::Handshake(Err(_)) => {}
                Happened::Ended(end) => self.ended(end).await,
            }
        }
        self.end_live().await;
        self.handshakes.shutdown().await;
    }

    async fn happens(&mut self) -> Happened {
        let accept = async {
            tokio::time::sleep_until(self.accept_after).await;
            self.listener.accept().await.map(|(socket, _)| socket)
        };
        let ended = async {
            match &mut self.live {
                Some(live) => (&mut live.reader).await,
                None => std::future::pending().await,
            }
        };
        // The end of the live connection is looked at before a newcomer that might take its place.
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Happened::Stop,
            end = ended => Happened::Ended(end),
            Some(done) = self.handshakes.join_next() => Happened::Handshake(done),
            accepted = accept => Happened::Accepted(accepted),
        }
    }

    /// Begins a handshake; where too many are under way the oldest makes room.
    fn greet(&mut self, socket: UnixStream) {
        self.order.retain(|handshake| !handshake.is_finished());
        if self.order.len() >= HANDSHAKES_MAX {
            if let Some(oldest) = self.order.pop_front() {
                oldest.abort();
            }
            self.accept_after = Instant::now() + CROWDED_PAUSE;
            self.hostile("too many connections at once");
        }
        let secret = self.secret.clone();
        self.order.push_back(self.handshakes.spawn(async move {
            match tokio::time::timeout(HANDSHAKE_MAX, secret.shake_hands(socket)).await {
                Ok(result) => result,
                Err(_) => Err("a handshake that took too long"),
            }
        }));
    }

    /// Makes an authenticated connection the live one.
    async fn adopt(&mut self, Authenticated { mut socket, held }: Authenticated) {
        if let Some(live) = &self.live {
            if !hung_up(&live.probe) {
                self.hostile("a second authenticated connection beside a live one");
                return;
            }
            self.end_live().await;
            self.send(LinkEvent::Disconnected).await;
        }
        let received = self.shared.with(|state| state.received);
        let resumable = (0..2).all(|i| (held.output_base[i]..=held.output_end[i]).contains(&received[i]));
        if !resumable {
            self.hostile("init does not hold the output that comes next");
            return;
        }
        // A few bytes into an empty socket buffer: it takes them at once or is broken.
        let welcome = ToInit::Welcome { received }.encode();
        let Ok(probe) = socket.as_fd().try_clone_to_owned() else { return };
        match tokio::time::timeout(HANDSHAKE_MAX, socket.write_all(&welcome)).await {
            Ok(Ok(())) => {}
            _ => return,
        }
        let told = self.shared.with(|state| state.connected(&held));
        self.send(LinkEvent::Connected { stdin_received: held.stdin_received }).await;
        let (read_half, write_half) = socket.into_split();
        let stop = self.stop.child_token();
        let (shared, events) = (self.shared.clone(), self.events.clone());
        let reader = tokio::spawn(stream::read(read_half, shared.clone(), events, stop.clone()));
        let writer = tokio::spawn(stream::write(write_half, shared, told, stop.clone()));
        self.live = Some(Live { reader, writer, stop, probe });
    }

    async fn ended(&mut self, end: Result<End, JoinError>) {
        if let Some(live) = self.live.take() {
            live.stop.cancel();
            let _ = live.writer.await;
        }
        if let Ok(End::Hostile(what)) = end {
            self.hostile(what);
        }
        self.send(LinkEvent::Disconnected).await;
    }

    async fn end_live(&mut self) {
        if let Some(live) = self.live.take() {
            live.stop.cancel();
            let _ = live.reader.await;
            let _ = live.writer.await;
        }
    }

    async fn send(&self, event: LinkEvent) {
        tokio::select! {
            () = self.stop.cancelled() => {}
            _ = self.events.send(event) => {}
        }
    }

    /// Reports at most once in a while, and only where nobody has to wait for it.
    fn hostile(&mut self, what: &'static str) {
        let now = Instant::now();
        if now >= self.hostile_after && self.events.try_send(LinkEvent::Hostile { what }).is_ok() {
            self.hostile_after = now + HOSTILE_PAUSE;
        }
    }
}

impl Secret {
    /// Both sides prove that they have the key. The error says what the other side did.
    async fn shake_hands(&self, mut socket: UnixStream) -> Result<Authenticated, &'static str> {
        let (header, body) = read_frame(&mut socket).await?;
        let hello = FromInit::decode(&header, &body).map_err(|WireError(what)| what)?;
        let FromInit::Hello { version: VERSION, nonce: init_nonce, cell } = hello else {
            return Err("no greeting of this version");
        };
        if cell != self.cell.as_str().as_bytes() {
            return Err("a greeting for another cell");
        }
        let daemon_nonce = random().map_err(|_| "no random bytes for a nonce")?;
        let handshake =
            Handshake { key: &self.key.0, cell: &cell, init_nonce: &init_nonce, daemon_nonce: &daemon_nonce };
        let challenge = ToInit::Challenge { nonce: daemon_nonce, mac: handshake.daemon_mac() };
        socket.write_all(&challenge.encode()).await.map_err(|_| "a connection closed in the handshake")?;
        let (header, body) = read_frame(&mut socket).await?;
        match FromInit::decode(&header, &body).map_err(|WireError(what)| what)? {
            FromInit::Proof { held, mac } if handshake.init_is(&held, &mac) => {
                Ok(Authenticated { socket, held })
            }
            FromInit::Proof { .. } => Err("a proof without the key"),
            _ => Err("no proof"),
        }
    }
}

async fn read_frame(socket: &mut UnixStream) -> Result<(Header, Vec<u8>), &'static str> {
    const CLOSED: &str = "a connection closed in the handshake";
    let mut head = [0; HEADER_BYTES];
    socket.read_exact(&mut head).await.map_err(|_| CLOSED)?;
    let header = Header::parse(&head, HANDSHAKE_BODY_BYTES_MAX).map_err(|WireError(what)| what)?;
    let mut body = vec![0; header.body_bytes];
    socket.read_exact(&mut body).await.map_err(|_| CLOSED)?;
    Ok((header, body))
}

/// Whether the peer of a socket closed it, even if bytes are still to be read. init keeps those that count.
fn hung_up(socket: &impl AsFd) -> bool {
    let mut fd = libc::pollfd { fd: socket.as_fd().as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one valid entry, an open descriptor, no waiting.
    let count = unsafe { libc::poll(&mut fd, 1, 0) };
    count > 0 && fd.revents & (libc::POLLHUP | libc::POLLRDHUP | libc::POLLERR) != 0
}
