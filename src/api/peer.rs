//! Who is at the other end of a connection, as the kernel tells it: uid, gid and groups at the time of
//! connecting. Never from anything the peer sends, and never by process id, which can be used again. Clients get no more
//! than half of the daemon's descriptors: jobs need the others.

use std::io;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use rustix::process::{Resource, getrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::job::Identity;

/// Most connections at a time, where descriptors are plenty.
const CONNECTIONS_MAX: usize = 16_384;
/// Most supplementary groups that are read.
const GROUPS_MAX: usize = 65_536;

/// The peer of a connection; none where the kernel would not tell.
#[derive(Debug, Clone)]
pub struct Peer(pub Option<Identity>);

/// A listener whose connections know their peers.
#[derive(Debug)]
pub struct PeerListener {
    listener: UnixListener,
    room: Arc<Semaphore>,
}

impl PeerListener {
    /// With room for as many connections as half of the descriptors that this process may have.
    pub fn new(listener: UnixListener) -> Self {
        let descriptors = getrlimit(Resource::Nofile).current.and_then(|most| usize::try_from(most).ok());
        let most = descriptors.map_or(CONNECTIONS_MAX, |most| (most / 2).clamp(1, CONNECTIONS_MAX));
        Self { listener, room: Arc::new(Semaphore::new(most)) }
    }

    /// Waits for an end where there are too many; the kernel holds those who come meanwhile.
    async fn room(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(room) = self.room.clone().try_acquire_owned() {
            return Some(room);
        }
        tracing::warn!("too many clients are connected: others wait until some of them leave");
        // It is never closed.
        self.room.clone().acquire_owned().await.ok()
    }
}

/// A connection, which gives its place to the next one when it ends.
#[derive(Debug)]
pub struct Seated {
    stream: UnixStream,
    _room: Option<OwnedSemaphorePermit>,
}

impl AsyncRead for Seated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Seated {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

impl axum::serve::Listener for PeerListener {
    type Io = Seated;
    type Addr = Peer;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let _room = self.room().await;
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let peer = identity(&stream)
                        .inspect_err(|error| tracing::warn!(%error, "the kernel does not tell who a peer is"))
                        .ok();
                    return (Seated { stream, _room }, Peer(peer));
                }
                Err(error) => {
                    // Out of descriptors, most likely: give others time to close theirs.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(Peer(None))
    }
}

impl Connected<IncomingStream<'_, PeerListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, PeerListener>) -> Self {
        stream.remote_addr().clone()
    }
}

fn identity(stream: &UnixStream) -> io::Result<Identity> {
    let credentials = stream.peer_cred()?;
    let groups = groups(stream)?.into_iter().filter(|gid| *gid != credentials.gid()).collect();
    Ok(Identity { uid: credentials.uid(), gid: credentials.gid(), groups })
}

/// SO_PEERGROUPS: socket(7) does not list it, see Linux's net/core/sock.c (since 4.13).
fn groups(stream: &UnixStream) -> io::Result<Vec<u32>> {
    const SO_PEERGROUPS: libc::c_int = 59;
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut bytes = (groups.len() * size_of::<libc::gid_t>()) as libc::socklen_t;
        // SAFETY: the buffer has `bytes` bytes, and the kernel writes at most that many and tells how many.
        let done = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let count = bytes as usize / size_of::<libc::gid_t>();
        if done == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || count > GROUPS_MAX {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_kernel_tells_who_connected() {
        let (here, _there) = UnixStream::pair().expect("socket pair");
        let identity = identity(&here).expect("identity");
        assert_eq!(identity.uid, rustix::process::geteuid().as_raw());
        assert_eq!(identity.gid, rustix::process::getegid().as_raw());
        assert!(!identity.groups.contains(&identity.gid));
    }
}
