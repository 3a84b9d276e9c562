//! One authenticated connection: a reader that turns frames into events and a writer that tells init what it
//! does not know yet. It must never allocate by a length over the limit, and never count a byte as received
//! that was not handed over.

use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::LinkEvent;
use super::state::{Shared, Told};
use super::wire::{BODY_BYTES_MAX, FromInit, HEADER_BYTES, Header, OutputStream, WireError};

/// Room for one read: little for a quiet cell, more while reads fill it.
const READ_BYTES_MIN: usize = 8 << 10;
const READ_BYTES_MAX: usize = 256 << 10;
/// Pieces given to one write call of the system.
const SLICES_MAX: usize = 32;

/// Why a connection ended.
#[derive(Debug)]
pub(super) enum End {
    /// The other side closed it, or it broke.
    Closed,
    /// The link ends, or the connection was replaced.
    Stopped,
    /// It did what init does not do.
    Hostile(&'static str),
}

impl From<WireError> for End {
    fn from(WireError(what): WireError) -> Self {
        Self::Hostile(what)
    }
}

/// Takes whole frames off the front of what was read.
#[derive(Debug)]
pub(super) struct Frames {
    buffer: BytesMut,
    read_bytes: usize,
}

impl Frames {
    pub(super) fn new() -> Self {
        Self { buffer: BytesMut::new(), read_bytes: READ_BYTES_MIN }
    }

    /// The next whole frame, if it is there.
    pub(super) fn next(&mut self) -> Result<Option<(Header, Bytes)>, WireError> {
        let Some(head) = self.buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let header = Header::parse(head, BODY_BYTES_MAX)?;
        let frame_bytes = HEADER_BYTES + header.body_bytes;
        if self.buffer.len() < frame_bytes {
            self.buffer.reserve(frame_bytes - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        Ok(Some((header, self.buffer.split_to(header.body_bytes).freeze())))
    }

    /// Where to read to.
    pub(super) fn room(&mut self) -> &mut BytesMut {
        if self.buffer.capacity() - self.buffer.len() < self.read_bytes / 4 {
            self.buffer.reserve(self.read_bytes);
        }
        &mut self.buffer
    }

    /// Fits the room to what the last read brought.
    pub(super) fn was_read(&mut self, bytes: usize) {
        if bytes >= self.read_bytes / 2 {
            self.read_bytes = (self.read_bytes * 2).min(READ_BYTES_MAX);
        } else if bytes < self.read_bytes / 16 {
            self.read_bytes = (self.read_bytes / 2).max(READ_BYTES_MIN);
        }
    }
}

/// Reads frames until the connection ends.
pub(super) async fn read(
    mut socket: OwnedReadHalf,
    shared: Arc<Shared>,
    events: mpsc::Sender<LinkEvent>,
    stop: CancellationToken,
) -> End {
    let reading = async {
        let mut frames = Frames::new();
        loop {
            loop {
                let (header, body) = match frames.next() {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break,
                    Err(error) => return error.into(),
                };
                if let Err(end) = take(&shared, &events, &header, body).await {
                    return end;
                }
            }
            match socket.read_buf(frames.room()).await {
                Ok(count) if count > 0 => frames.was_read(count),
                _ => return End::Closed,
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => End::Stopped,
        end = reading => end,
    }
}

/// Handles one frame. The place in the queue comes first and the bookkeeping with it, without a pause between:
/// a frame is either handed over and counted, or neither.
async fn take(
    shared: &Shared,
    events: &mpsc::Sender<LinkEvent>,
    header: &Header,
    body: Bytes,
) -> Result<(), End> {
    let place = events.reserve().await.map_err(|_| End::Stopped)?;
    let event = shared.with(|state| {
        if state.ended && header.output().is_some() {
            return Err(End::Hostile("output after the end"));
        }
        if let Some((stream, offset)) = header.output() {
            let received = &mut state.received[stream.index()];
            if body.is_empty() || offset != *received {
                return Err(End::Hostile("output out of order"));
            }
            *received += body.len() as u64;
            let end = *received;
            return Ok(Some(match stream {
                OutputStream::Stdout => LinkEvent::Stdout { end, bytes: body },
                OutputStream::Stderr => LinkEvent::Stderr { end, bytes: body },
            }));
        }
        match FromInit::decode(header, &body)? {
            FromInit::StdinAck { offset } if state.stdin_taken(offset) => {
                Ok(Some(LinkEvent::StdinAcked { offset }))
            }
            FromInit::StdinAck { .. } => Err(End::Hostile("acknowledged input that was not sent")),
            // Sent again after every reconnect until Bye; handed out once.
            FromInit::SpawnFailed { errno, message } => {
                let again = std::mem::replace(&mut state.ended, true);
                Ok((!again).then_some(LinkEvent::SpawnFailed { errno, message }))
            }
            FromInit::Exited(report) => {
                let again = std::mem::replace(&mut state.ended, true);
                Ok((!again).then_some(LinkEvent::Exited(report)))
            }
            // Sent again until the daemon asks for something else.
            FromInit::StepEnded { .. } if state.ended => Err(End::Hostile("the end of a step after the end")),
            FromInit::StepEnded { index, status } => {
                let news = state.step_ended(index);
                Ok(news.then_some(LinkEvent::StepEnded { index, status }))
            }
            FromInit::Hello { .. } | FromInit::Proof { .. } => {
                Err(End::Hostile("a handshake frame after the handshake"))
            }
        }
    })?;
    if matches!(event, Some(LinkEvent::StdinAcked { .. })) {
        // The window moved: more input may go.
        shared.change(|_| ());
    }
    if let Some(event) = event {
        place.send(event);
    }
    Ok(())
}

/// Writes what init is not told yet, until the connection breaks or is stopped.
pub(super) async fn write(
    mut socket: OwnedWriteHalf,
    shared: Arc<Shared>,
    mut told: Told,
    stop: CancellationToken,
) {
    let writing = async {
        loop {
            let frames = shared.with(|state| state.frames(&mut told));
            if frames.is_empty() {
                shared.changed().await;
            } else if write_all(&mut socket, frames).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = writing => {}
    }
}

async fn write_all(socket: &mut OwnedWriteHalf, frames: Vec<Bytes>) -> std::io::Result<()> {
    let mut rest = frames.into_iter().collect::<std::collections::VecDeque<_>>();
    while !rest.is_empty() {
        let slices: Vec<_> = rest.iter().take(SLICES_MAX).map(|piece| std::io::IoSlice::new(piece)).collect();
        let mut written = socket.write_vectored(&slices).await?;
        if written == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        while let Some(piece) = rest.front_mut() {
            let count = written.min(piece.len());
            piece.advance(count);
            written -= count;
            if !piece.is_empty() {
                break;
            }
            rest.pop_front();
        }
    }
    Ok(())
}
