//! Who is at the other end of a connection, as the kernel tells it: uid, gid and groups at the time of
//! connecting. Never from anything the peer sends, and never by process id, which can be used again.

use std::io;
use std::os::fd::AsRawFd;

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use tokio::net::{UnixListener, UnixStream};

use crate::job::Identity;

/// Most supplementary groups that are read.
const GROUPS_MAX: usize = 65_536;

/// The peer of a connection; none where the kernel would not tell.
#[derive(Debug, Clone)]
pub struct Peer(pub Option<Identity>);

/// A listener whose connections know their peers.
#[derive(Debug)]
pub struct PeerListener(pub UnixListener);

impl axum::serve::Listener for PeerListener {
    type Io = UnixStream;
    type Addr = Peer;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.0.accept().await {
                Ok((stream, _)) => {
                    let peer = identity(&stream)
                        .inspect_err(|error| tracing::warn!(%error, "the kernel does not tell who a peer is"))
                        .ok();
                    return (stream, Peer(peer));
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
