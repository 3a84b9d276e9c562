//! `POST /v1/jobs/{id}/attach`: a client takes part in the command of its job. The connection changes from HTTP to
//! frames in both directions ([`Frame`]); the client gives input, gets output as it is, and ends the command by leaving.
//! Only whoever submitted the job may, and only one client at a time.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::jobs::{JobPath, path_text};
use super::peer::Peer;
use super::submit::identity;
use super::wire::ErrorCode;
use super::{Api, ApiError};
use crate::cell::attach::{Client, FromClient, ToClient};
use crate::job::{JobId, JobSpec, StopReason};

/// What the connection is changed to.
pub const PROTOCOL: &str = "hotcell-attach";
/// Longest payload of a frame, in bytes.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Bytes before a payload: the kind, and the payload's length in little endian.
const HEADER_BYTES: usize = 5;
/// How often a client is asked whether it is there: while its command takes no input nothing is read from it, and so
/// not its end either.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// How much is read at a time, in bytes.
const READ_BYTES: usize = 64 << 10;

/// One message of an attached connection. Kinds below 16 come from the daemon, the others from the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// 1: bytes of standard output, or of the terminal.
    Stdout(Bytes),
    /// 2: bytes of standard error.
    Stderr(Bytes),
    /// 3: the command ended; its exit code in four bytes. The last frame.
    Exit(i32),
    /// 16: bytes for standard input.
    Stdin(Bytes),
    /// 17: there is no more input.
    Eof,
    /// 18: the terminal's rows and columns, two bytes each.
    Resize(u16, u16),
    /// 19: a signal for the command, in one byte.
    Signal(u8),
}

/// Bytes that are no frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the protocol of an attached connection: {0}")]
pub struct FrameError(&'static str);

impl Frame {
    /// Its bytes.
    pub fn encode(&self) -> Bytes {
        let number;
        let (kind, payload): (u8, &[u8]) = match self {
            Self::Stdout(bytes) => (1, bytes),
            Self::Stderr(bytes) => (2, bytes),
            Self::Exit(code) => {
                number = code.to_le_bytes();
                (3, &number)
            }
            Self::Stdin(bytes) => (16, bytes),
            Self::Eof => (17, &[]),
            Self::Resize(rows, cols) => {
                let ([a, b], [c, d]) = (rows.to_le_bytes(), cols.to_le_bytes());
                number = [a, b, c, d];
                (18, &number)
            }
            Self::Signal(signal) => (19, std::slice::from_ref(signal)),
        };
        let mut bytes = BytesMut::with_capacity(HEADER_BYTES + payload.len());
        bytes.put_u8(kind);
        bytes.put_u32_le(u32::try_from(payload.len()).unwrap_or(u32::MAX));
        bytes.put_slice(payload);
        bytes.freeze()
    }

    /// Takes the first frame off `buffer`; none where it is not whole yet.
    ///
    /// # Errors
    /// [`FrameError`]; nothing that follows can be read then.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some((header, _)) = buffer.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let [kind, length @ ..] = *header;
        let length = u32::from_le_bytes(length) as usize;
        if length > PAYLOAD_BYTES_MAX {
            return Err(FrameError("a frame over its limit"));
        }
        if buffer.len() < HEADER_BYTES + length {
            return Ok(None);
        }
        buffer.advance(HEADER_BYTES);
        let payload = buffer.split_to(length).freeze();
        let wrong = FrameError("a frame of the wrong length");
        let frame = match (kind, payload.as_ref()) {
            (1, _) => Self::Stdout(payload),
            (2, _) => Self::Stderr(payload),
            (3, code) => Self::Exit(i32::from_le_bytes(code.try_into().map_err(|_| wrong)?)),
            (16, _) => Self::Stdin(payload),
            (17, []) => Self::Eof,
            (18, &[a, b, c, d]) => Self::Resize(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])),
            (19, &[signal]) => Self::Signal(signal),
            (17..=19, _) => return Err(wrong),
            (_, _) => return Err(FrameError("an unknown frame")),
        };
        Ok(Some(frame))
    }
}

/// Reads the next frame; none where the other side has left.
///
/// # Errors
/// What the system says; `InvalidData` for what is no frame.
pub async fn read_frame(
    socket: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
) -> std::io::Result<Option<Frame>> {
    loop {
        let frame = Frame::decode(buffer);
        if let Some(frame) = frame.map_err(|e| std::io::Error::new(std::io::ErrorKind::InvalidData, e))? {
            return Ok(Some(frame));
        }
        buffer.reserve(READ_BYTES);
        if socket.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

/// Lets a client take part.
pub async fn attach(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
    mut request: Request,
) -> Result<Response, ApiError> {
    let job = api.own_job(&peer, path_text(&id)).await?;
    if job.row.identity.uid != identity(&peer)?.uid {
        return Err(ApiError::new(ErrorCode::NotYours, "only whoever submitted the job takes part in it"));
    }
    let asked = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok());
    if !asked.is_some_and(|asked| asked.eq_ignore_ascii_case(PROTOCOL)) {
        let words = format!("the request must ask for `Upgrade: {PROTOCOL}` with `Connection: upgrade`");
        return Err(ApiError::new(ErrorCode::InvalidRequest, words));
    }
    let spec: JobSpec = serde_json::from_str(&job.spec_json)
        .map_err(|e| ApiError::new(ErrorCode::Internal, format!("the stored job does not parse: {e}")))?;
    if !spec.command.is_some_and(|command| command.attached) {
        return Err(ApiError::new(ErrorCode::InvalidRequest, "the job has no command to take part in")
            .hint("submit it with command.attached = true"));
    }
    let id = job.row.id;
    let taken =
        || ApiError::new(ErrorCode::Conflict, "the job is over, or somebody takes part in it already");
    if job.row.state.is_done() {
        return Err(taken());
    }
    let client = api.parts.attached.offer(&id).ok_or_else(taken)?;
    // It may have ended in between, and then nobody would come.
    if api.parts.store.job(&id).await?.is_none_or(|job| job.row.state.is_done()) {
        api.parts.attached.close(&id);
        return Err(taken());
    }
    let upgrade = hyper::upgrade::on(&mut request);
    let own = api.clone();
    api.parts.attached.tasks.spawn(async move {
        let left = match upgrade.await {
            Ok(socket) => carry(TokioIo::new(socket), client).await,
            Err(_) => true,
        };
        if left {
            leave(&own, id).await;
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Carries frames until one side has no more to say. True where that is the client.
async fn carry(socket: impl AsyncRead + AsyncWrite, client: Client) -> bool {
    let (mut read, mut write) = tokio::io::split(socket);
    let Client { mut from, to } = client;
    let mut buffer = BytesMut::new();
    let listening = async {
        while let Ok(Some(frame)) = read_frame(&mut read, &mut buffer).await {
            let said = match frame {
                Frame::Stdin(bytes) => FromClient::Stdin(bytes),
                Frame::Eof => FromClient::Eof,
                Frame::Resize(rows, cols) => FromClient::Resize { rows, cols },
                Frame::Signal(number @ 1..=64) => FromClient::Signal(i32::from(number)),
                Frame::Signal(_) | Frame::Stdout(_) | Frame::Stderr(_) | Frame::Exit(_) => return,
            };
            if to.send(said).await.is_err() {
                // The cell says no more and hears no more.
                std::future::pending::<()>().await;
            }
        }
    };
    let telling = async {
        loop {
            let frame = match timeout(ASK_AGAIN, from.recv()).await {
                Ok(Some(ToClient::Stdout(bytes))) => Frame::Stdout(bytes),
                Ok(Some(ToClient::Stderr(bytes))) => Frame::Stderr(bytes),
                Ok(Some(ToClient::Exit(code))) => Frame::Exit(code),
                Ok(None) => break,
                // Says nothing, and fails where nobody is there.
                Err(_) => Frame::Stderr(Bytes::new()),
            };
            if write.write_all(&frame.encode()).await.is_err() {
                return true;
            }
        }
        // It may be gone by now.
        let _ = write.shutdown().await;
        false
    };
    tokio::select! {
        () = listening => true,
        left = telling => left,
    }
}

/// A command goes with its client.
async fn leave(api: &Api, id: JobId) {
    let words = "the client of its command has left".to_owned();
    match api.driver.stop(id.clone(), StopReason::Cancelled, words).await {
        Ok(()) | Err(crate::driver::StopError::Over) => {}
        Err(error) => tracing::warn!(job = %id, %error, "a command whose client has left cannot be stopped"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_frame() -> impl Strategy<Value = Frame> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from);
        prop_oneof![
            bytes().prop_map(Frame::Stdout),
            bytes().prop_map(Frame::Stderr),
            any::<i32>().prop_map(Frame::Exit),
            bytes().prop_map(Frame::Stdin),
            Just(Frame::Eof),
            any::<(u16, u16)>().prop_map(|(rows, cols)| Frame::Resize(rows, cols)),
            any::<u8>().prop_map(Frame::Signal),
        ]
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(frames in proptest::collection::vec(any_frame(), 0..8), cut in 1usize..64) {
            let sent: Vec<u8> = frames.iter().flat_map(|frame| frame.encode().to_vec()).collect();
            let (mut buffer, mut got) = (BytesMut::new(), Vec::new());
            for piece in sent.chunks(cut) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = Frame::decode(&mut buffer).unwrap() {
                    got.push(frame);
                }
            }
            prop_assert_eq!(got, frames);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn other_bytes_are_an_error_or_not_whole_and_never_more(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = Frame::decode(&mut buffer) {}
            prop_assert!(buffer.len() <= bytes.len());
        }
    }
}
