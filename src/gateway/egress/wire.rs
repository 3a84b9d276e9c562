//! Streams of the way out: one that counts and stops at the limits of a rule, one that gives back what was read
//! from it in advance, and the copying between a cell and a host. It must never let a byte pass uncounted.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::timeout;

use super::hello::{HELLO_BYTES_MAX, HelloError, Peek, peek};
use super::tally::{Tally, Used, ahead};
use crate::policy::Host;
use crate::policy::egress::Terms;

/// What was used of one rule by one job, since it began.
#[derive(Debug)]
pub(super) struct Account {
    name: String,
    tally: Arc<Tally>,
    up: Sum,
    down: Sum,
    connections: AtomicU32,
}

/// Bytes in one direction.
#[derive(Debug, Default)]
struct Sum {
    used: AtomicU64,
    /// What the tally says of it; never less, but for what is under way at this moment.
    noted: AtomicU64,
}

impl Sum {
    fn new(used: u64) -> Self {
        Self { used: AtomicU64::new(used), noted: AtomicU64::new(used) }
    }

    fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn add(&self, count: u64) {
        self.used.fetch_add(count, Ordering::Relaxed);
    }

    /// How far to note so that `more` bytes may go on; `None` where that is noted already.
    fn to_note(&self, more: u64, limit: u64) -> Option<u64> {
        let used = self.used().saturating_add(more);
        (used > self.noted.load(Ordering::Acquire)).then(|| ahead(used, limit))
    }
}

impl Account {
    pub(super) fn new(name: &str, tally: &Arc<Tally>) -> Self {
        let used = tally.used(name);
        Self {
            name: name.to_owned(),
            tally: Arc::clone(tally),
            up: Sum::new(used.bytes_up),
            down: Sum::new(used.bytes_down),
            connections: AtomicU32::new(0),
        }
    }

    fn note_up(&self, more: u64, limit: u64) -> io::Result<()> {
        if let Some(most) = self.up.to_note(more, limit) {
            self.tally.note(&self.name, |used| used.bytes_up = used.bytes_up.max(most))?;
            self.up.noted.fetch_max(most, Ordering::AcqRel);
        }
        Ok(())
    }

    fn note_down(&self, limit: u64) -> io::Result<()> {
        if let Some(most) = self.down.to_note(0, limit) {
            self.tally.note(&self.name, |used| used.bytes_down = used.bytes_down.max(most))?;
            self.down.noted.fetch_max(most, Ordering::AcqRel);
        }
        Ok(())
    }

    /// The exact sums, once no connection is left.
    pub(super) fn used(&self) -> Used {
        Used { bytes_up: self.up.used(), bytes_down: self.down.used() }
    }

    /// A place among the rule's connections; the key of the limit that is reached otherwise.
    pub(super) fn enter(self: &Arc<Self>, terms: &Terms) -> Result<Entered, &'static str> {
        if self.up.used() >= terms.bytes_up_max {
            return Err("bytes_up_max");
        }
        if self.down.used() >= terms.bytes_down_max {
            return Err("bytes_down_max");
        }
        let free = |n: u32| (n < terms.connections_max).then_some(n + 1);
        match self.connections.fetch_update(Ordering::AcqRel, Ordering::Acquire, free) {
            Ok(_) => Ok(Entered { account: Arc::clone(self) }),
            Err(_) => Err("connections_max"),
        }
    }
}

/// One of a rule's connections; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Entered {
    account: Arc<Account>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.account.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What one connection used.
#[derive(Debug)]
pub(super) struct Meter {
    place: Entered,
    up: AtomicU64,
    down: AtomicU64,
    up_max: u64,
    down_max: u64,
    began: Instant,
    /// Milliseconds after `began`.
    last_ms: AtomicU64,
}

impl Meter {
    pub(super) fn new(place: Entered, terms: &Terms) -> Arc<Self> {
        let (up_max, down_max) = (terms.bytes_up_max, terms.bytes_down_max);
        let (began, last_ms) = (Instant::now(), AtomicU64::new(0));
        Arc::new(Self {
            place,
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
            up_max,
            down_max,
            began,
            last_ms,
        })
    }

    /// Bytes so far, up and down.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.up.load(Ordering::Relaxed), self.down.load(Ordering::Relaxed))
    }

    /// The limit that is reached, if any.
    pub(super) fn exceeded(&self) -> Option<&'static str> {
        let account = &self.place.account;
        if account.up.used() >= self.up_max {
            return Some("bytes_up_max");
        }
        (account.down.used() >= self.down_max).then_some("bytes_down_max")
    }

    fn touch(&self) {
        self.last_ms.store(self.began.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Returns once nothing has moved for `idle`.
    async fn fell_silent(&self, idle: Duration) {
        loop {
            let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
            let silent = self.began.elapsed().saturating_sub(last);
            match idle.checked_sub(silent) {
                Some(left) if !left.is_zero() => tokio::time::sleep(left).await,
                _ => return,
            }
        }
    }
}

/// A connection to a host, counted.
pub(super) struct Counted<S> {
    inner: S,
    meter: Arc<Meter>,
}

impl<S> Counted<S> {
    pub(super) fn new(inner: S, meter: Arc<Meter>) -> Self {
        Self { inner, meter }
    }
}

fn limit() -> io::Error {
    io::Error::new(io::ErrorKind::QuotaExceeded, "the byte limit of this host is reached")
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.meter.exceeded().is_some() {
            return Poll::Ready(Err(limit()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        let count = (buf.filled().len() - before) as u64;
        self.meter.down.fetch_add(count, Ordering::Relaxed);
        let account = &self.meter.place.account;
        account.down.add(count);
        self.meter.touch();
        // Before the cell has them.
        Poll::Ready(account.note_down(self.meter.down_max))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let used = self.meter.place.account.up.used();
        let left = self.meter.up_max.saturating_sub(used);
        if left == 0 && !buf.is_empty() {
            return Poll::Ready(Err(limit()));
        }
        let buf = &buf[..buf.len().min(usize::try_from(left).unwrap_or(usize::MAX))];
        self.meter.place.account.note_up(buf.len() as u64, self.meter.up_max)?;
        let count = ready!(Pin::new(&mut self.inner).poll_write(cx, buf))?;
        self.meter.up.fetch_add(count as u64, Ordering::Relaxed);
        self.meter.place.account.up.add(count as u64);
        self.meter.touch();
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A stream with what was read from it in front again.
pub(super) struct Prefixed<S> {
    prefix: Vec<u8>,
    given: usize,
    inner: S,
}

impl<S> Prefixed<S> {
    pub(super) fn new(prefix: Vec<u8>, inner: S) -> Self {
        Self { prefix, given: 0, inner }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let rest = &self.prefix[self.given..];
        if rest.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let count = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..count]);
        self.given += count;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Reads the ClientHello and compares its name with the host that was asked for. Gives what was read.
pub(super) async fn read_hello<S: AsyncRead + Unpin>(
    stream: &mut S,
    host: &Host,
    wait: Duration,
) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(2048);
    let read = async {
        loop {
            match peek(&bytes) {
                Ok(Peek::More) => {}
                Ok(Peek::Hello(name)) => return judge_name(name.as_ref(), host),
                Err(error) => return Err(error.to_string()),
            }
            if bytes.len() >= HELLO_BYTES_MAX {
                return Err(HelloError::Long.to_string());
            }
            let mut piece = [0u8; 2048];
            match stream.read(&mut piece).await {
                Ok(0) | Err(_) => return Err("the connection ended before its ClientHello".to_owned()),
                Ok(count) => bytes.extend_from_slice(&piece[..count]),
            }
        }
    };
    match timeout(wait, read).await {
        Ok(judged) => judged.map(|()| bytes),
        Err(_) => Err("no ClientHello came in time".to_owned()),
    }
}

/// A name must be the one that was asked for; an address has none.
fn judge_name(name: Option<&Host>, host: &Host) -> Result<(), String> {
    match (name, host) {
        (None, Host::Address(_)) => Ok(()),
        (None, Host::Name(_)) => Err(format!("the ClientHello names no host; expected {host}")),
        (Some(name), _) if name == host => Ok(()),
        (Some(name), _) => Err(format!("the ClientHello names {name}, CONNECT named {host}")),
    }
}

/// Copies both ways until both ends have closed, or a limit is reached; why it ended early.
pub(super) async fn copy<A, B>(
    mut cell: A,
    host: B,
    meter: &Arc<Meter>,
    idle: Duration,
    total: Duration,
) -> Option<String>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let mut host = Counted::new(host, Arc::clone(meter));
    let copying = tokio::io::copy_bidirectional(&mut cell, &mut host);
    tokio::select! {
        ended = copying => match (ended, meter.exceeded()) {
            (Err(_), Some(key)) => Some(format!("{key} is reached")),
            // A reset is how many clients say good-bye.
            (Ok(_) | Err(_), _) => None,
        },
        () = meter.fell_silent(idle) => Some(format!("nothing moved for {} s", idle.as_secs())),
        () = tokio::time::sleep(total) => Some(format!("it lasted {} s", total.as_secs())),
    }
}
