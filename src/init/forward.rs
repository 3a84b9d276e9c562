//! Carries TCP connections on 127.0.0.1 to unix sockets of the daemon, on one thread with one edge-triggered
//! epoll. While a socket does not answer, new connections are held, unread, and tried again. It must never
//! hold more than a fixed amount of memory per connection, and never show half of a broken connection as a
//! whole one.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::boot::Forward;
use crate::sys;

const CONNECTIONS_MAX: usize = 256;
/// Bytes moved at once; also the most that is kept of one direction of one connection.
const CHUNK_BYTES: usize = 128 << 10;
/// Chunks moved for one connection before the others have their turn.
const CHUNKS_PER_TURN: usize = 16;
const RETRY_MS_MIN: u64 = 2;
const RETRY_MS_MAX: u64 = 100;
const EVENTS_MAX: usize = 128;
const LISTENER: u64 = 1 << 32;

/// Listeners that accept nothing yet.
pub(crate) struct Forwarder {
    epoll: File,
    listeners: Vec<Listener>,
    connections: Vec<Option<Connection>>,
    open: usize,
    ready: VecDeque<usize>,
    hold_ms_max: u64,
    chunk: Vec<u8>,
}

struct Listener {
    socket: TcpListener,
    path: PathBuf,
    acceptable: bool,
    retry_at_ms: u64,
    retry_ms: u64,
}

struct Connection {
    listener: usize,
    sides: [Option<Side>; 2],
    /// `directions[0]` is from the cell to the daemon.
    directions: [Direction; 2],
    queued: bool,
    hung_up: bool,
    held_since_ms: u64,
}

struct Side {
    file: File,
    readable: bool,
    writable: bool,
}

#[derive(Default)]
struct Direction {
    pending: Vec<u8>,
    source_ended: bool,
    done: bool,
}

const CELL: usize = 0;
const DAEMON: usize = 1;

impl Forwarder {
    /// Listens on every port; connections wait in the kernel until [`Forwarder::start`].
    pub(crate) fn listen(forwards: &[Forward], hold_ms_max: u64) -> io::Result<Self> {
        // SAFETY: no pointers; the descriptor is ours alone.
        let epoll = unsafe {
            let fd = libc::epoll_create1(libc::EPOLL_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            File::from(OwnedFd::from_raw_fd(fd))
        };
        let mut listeners = Vec::new();
        for forward in forwards {
            let socket = TcpListener::bind(("127.0.0.1", forward.port))?;
            socket.set_nonblocking(true)?;
            let path = PathBuf::from(OsStr::from_bytes(&forward.path));
            listeners.push(Listener {
                socket,
                path,
                acceptable: true,
                retry_at_ms: 0,
                retry_ms: RETRY_MS_MIN,
            });
        }
        let connections = (0..CONNECTIONS_MAX).map(|_| None).collect();
        let (ready, chunk) = (VecDeque::new(), vec![0; CHUNK_BYTES]);
        Ok(Self { epoll, listeners, connections, open: 0, ready, hold_ms_max, chunk })
    }

    /// Carries on a thread of its own for as long as the process lives.
    pub(crate) fn start(mut self) -> io::Result<()> {
        if self.listeners.is_empty() {
            return Ok(());
        }
        for (index, listener) in self.listeners.iter().enumerate() {
            watch(&self.epoll, listener.socket.as_raw_fd(), LISTENER | index as u64)?;
        }
        let thread = std::thread::Builder::new().name("forward".into()).stack_size(256 << 10);
        thread.spawn(move || self.run()).map(|_| ())
    }

    fn run(&mut self) {
        loop {
            let now_ms = sys::now_ms();
            self.connect_held(now_ms);
            self.accept(now_ms);
            self.wait(now_ms);
            for _ in 0..self.ready.len() {
                if let Some(index) = self.ready.pop_front() {
                    self.carry(index);
                }
            }
        }
    }

    fn accept(&mut self, now_ms: u64) {
        for index in 0..self.listeners.len() {
            while self.listeners[index].acceptable && self.open < CONNECTIONS_MAX {
                match self.listeners[index].socket.accept() {
                    Ok((stream, _)) => {
                        let _ = stream.set_nodelay(true);
                        if stream.set_nonblocking(true).is_ok() {
                            self.admit(index, OwnedFd::from(stream).into(), now_ms);
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        self.listeners[index].acceptable = false;
                    }
                    // A connection that ended before it was taken, or no descriptors left: the next turn.
                    Err(_) => break,
                }
            }
        }
    }

    fn admit(&mut self, listener: usize, file: File, now_ms: u64) {
        let Some(slot) = self.connections.iter().position(Option::is_none) else { return };
        if watch(&self.epoll, file.as_raw_fd(), (slot * 2 + CELL) as u64).is_err() {
            return;
        }
        let cell = Side { file, readable: false, writable: true };
        self.connections[slot] = Some(Connection {
            listener,
            sides: [Some(cell), None],
            directions: [Direction::default(), Direction::default()],
            queued: false,
            hung_up: false,
            held_since_ms: now_ms,
        });
        self.open += 1;
        if now_ms >= self.listeners[listener].retry_at_ms {
            self.connect(slot, now_ms);
        }
    }

    /// Tries the held connections again; the first failure of a socket is an answer for all of them.
    fn connect_held(&mut self, now_ms: u64) {
        for slot in 0..CONNECTIONS_MAX {
            let Some(connection) = &self.connections[slot] else { continue };
            if connection.sides[DAEMON].is_some() {
                continue;
            }
            if connection.hung_up || now_ms.saturating_sub(connection.held_since_ms) >= self.hold_ms_max {
                self.close(slot);
            } else if now_ms >= self.listeners[connection.listener].retry_at_ms {
                self.connect(slot, now_ms);
            }
        }
    }

    fn connect(&mut self, slot: usize, now_ms: u64) {
        let Some(connection) = self.connections[slot].as_mut() else { return };
        let listener = &mut self.listeners[connection.listener];
        let connected = sys::connect_unix(&listener.path, 0).map(File::from).and_then(|file| {
            watch(&self.epoll, file.as_raw_fd(), (slot * 2 + DAEMON) as u64)?;
            Ok(file)
        });
        match connected {
            Ok(file) => {
                (listener.retry_ms, listener.retry_at_ms) = (RETRY_MS_MIN, 0);
                connection.sides[DAEMON] = Some(Side { file, readable: false, writable: true });
                self.queue(slot);
            }
            Err(_) => {
                listener.retry_at_ms = now_ms + listener.retry_ms;
                listener.retry_ms = (listener.retry_ms * 2).min(RETRY_MS_MAX);
            }
        }
    }

    fn queue(&mut self, slot: usize) {
        if let Some(connection) = self.connections[slot].as_mut()
            && !connection.queued
        {
            connection.queued = true;
            self.ready.push_back(slot);
        }
    }

    fn wait(&mut self, now_ms: u64) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS_MAX];
        let timeout_ms = self.timeout_ms(now_ms);
        // SAFETY: pointer and length describe `events`.
        let count = unsafe {
            libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), EVENTS_MAX as i32, timeout_ms)
        };
        for event in &events[..count.max(0) as usize] {
            let (flags, token) = (event.events as i32, event.u64);
            if token & LISTENER != 0 {
                self.listeners[(token & !LISTENER) as usize].acceptable = true;
                continue;
            }
            let (slot, side) = (token as usize / 2, token as usize % 2);
            // A token of a connection that is gone, or of its successor: the worst is a read that finds nothing.
            let Some(connection) = self.connections[slot].as_mut() else { continue };
            let broken = flags & (libc::EPOLLHUP | libc::EPOLLERR) != 0;
            connection.hung_up |= broken || flags & libc::EPOLLRDHUP != 0;
            if let Some(side) = &mut connection.sides[side] {
                side.readable |= broken || flags & (libc::EPOLLIN | libc::EPOLLRDHUP) != 0;
                side.writable |= broken || flags & libc::EPOLLOUT != 0;
            }
            if connection.sides[DAEMON].is_some() {
                self.queue(slot);
            }
        }
    }

    fn timeout_ms(&self, now_ms: u64) -> i32 {
        if !self.ready.is_empty() {
            return 0;
        }
        if self.open < CONNECTIONS_MAX && self.listeners.iter().any(|listener| listener.acceptable) {
            // accept failed for want of something that comes back with time.
            return 10;
        }
        let held = self.connections.iter().flatten().filter(|connection| connection.sides[DAEMON].is_none());
        let at_ms = held.map(|connection| match connection.hung_up {
            true => 0,
            false => self.listeners[connection.listener].retry_at_ms,
        });
        at_ms.min().map_or(-1, |at_ms| at_ms.saturating_sub(now_ms) as i32)
    }

    fn carry(&mut self, slot: usize) {
        let Some(connection) = self.connections[slot].as_mut() else { return };
        connection.queued = false;
        let [Some(cell), Some(daemon)] = &mut connection.sides else { return };
        let [to_daemon, to_cell] = &mut connection.directions;
        let moved = to_daemon
            .carry(cell, daemon, &mut self.chunk)
            .and_then(|more| Ok(to_cell.carry(daemon, cell, &mut self.chunk)? | more));
        match moved {
            Err(_) => {
                connection.reset();
                self.close(slot);
            }
            Ok(_) if connection.directions.iter().all(|direction| direction.done) => self.close(slot),
            Ok(true) => self.queue(slot),
            Ok(false) => {}
        }
    }

    fn close(&mut self, slot: usize) {
        // Closing a descriptor takes it out of the epoll: no other holds the same socket.
        if self.connections[slot].take().is_some() {
            self.open -= 1;
        }
    }
}

impl Connection {
    /// Makes the close of the cell's side an error for the peer: a broken answer must not look complete.
    fn reset(&self) {
        let Some(cell) = &self.sides[CELL] else { return };
        let now = libc::linger { l_onoff: 1, l_linger: 0 };
        let len = size_of::<libc::linger>() as libc::socklen_t;
        // SAFETY: pointer and length describe `now`; the descriptor is open.
        unsafe {
            let now = (&raw const now).cast();
            libc::setsockopt(cell.file.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, now, len);
        }
    }
}

impl Direction {
    /// Moves what can be moved now; true where it stopped only to give the others a turn.
    fn carry(&mut self, from: &mut Side, to: &mut Side, chunk: &mut [u8]) -> io::Result<bool> {
        for _ in 0..CHUNKS_PER_TURN {
            if !self.flush(to) || self.done {
                return Ok(false);
            }
            if self.source_ended {
                // SAFETY: a system call on an open descriptor. The other direction goes on.
                unsafe { libc::shutdown(to.file.as_raw_fd(), libc::SHUT_WR) };
                self.done = true;
                return Ok(false);
            }
            if !from.readable {
                return Ok(false);
            }
            match from.file.read(chunk) {
                Ok(0) => self.source_ended = true,
                Ok(count) => self.write(to, &chunk[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => from.readable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Writes, and keeps what the other side does not take.
    fn write(&mut self, to: &mut Side, bytes: &[u8]) {
        match to.file.write(bytes) {
            Ok(count) if count == bytes.len() => {}
            Ok(count) => {
                self.pending.extend_from_slice(&bytes[count..]);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                to.writable = false;
                self.pending.extend_from_slice(bytes);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => self.pending.extend_from_slice(bytes),
            // The other side reads no more, yet may still have an answer to give: only this direction ends.
            Err(_) => self.give_up(),
        }
    }

    /// Writes what was kept; true when nothing is left.
    fn flush(&mut self, to: &mut Side) -> bool {
        let mut written = 0;
        while written < self.pending.len() && to.writable {
            match to.file.write(&self.pending[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => to.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.give_up();
                    return true;
                }
            }
        }
        self.pending.drain(..written);
        if self.pending.is_empty() {
            self.pending = Vec::new();
        }
        self.pending.is_empty()
    }

    fn give_up(&mut self) {
        self.pending = Vec::new();
        self.done = true;
    }
}

fn watch(epoll: &File, fd: RawFd, token: u64) -> io::Result<()> {
    let flags = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET;
    let mut event = libc::epoll_event { events: flags as u32, u64: token };
    // SAFETY: `event` is valid for the call, and both descriptors are open.
    if unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
