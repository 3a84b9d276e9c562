//! AWS event-stream frames (`application/vnd.amazon.eventstream`), as Amazon Bedrock answers in: length, length of
//! the headers, checksum of both, headers, payload, checksum of all. Pure. The same events come out however the
//! bytes are cut; no more than one frame of [`FRAME_BYTES_MAX`] is kept; any bytes at all are taken.

use base64::Engine as _;
use serde::Deserialize;

/// Longest frame that is looked into, in bytes. Those that carry usage have a few hundred.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// Longest frame that can be: AWS allows 24 MiB. Above that the stream is no stream.
const FRAME_BYTES_POSSIBLE: u32 = 24 << 20;
/// Two lengths and their checksum.
const PRELUDE_BYTES: usize = 12;
/// The prelude and the checksum at the end.
const OVERHEAD_BYTES: usize = PRELUDE_BYTES + 4;

/// What one frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// One event of the model's, as JSON.
    Chunk(Vec<u8>),
    /// The provider ended the stream; the kind as the headers name it, e.g. `throttlingException`.
    Exception(String),
    /// A frame that cannot be read, or is too long: what it said is unknown. After a damaged prelude nothing
    /// more is read, since nobody knows where the next frame begins.
    Damaged,
}

/// Cuts a stream into frames.
#[derive(Debug, Default)]
pub struct Frames {
    held: Vec<u8>,
    /// Bytes of an overlong frame that are still to come.
    skip: usize,
    /// A prelude was damaged.
    lost: bool,
}

impl Frames {
    /// Takes the next bytes and hands every frame that they complete to `each`.
    pub fn push(&mut self, mut bytes: &[u8], each: &mut impl FnMut(Event)) {
        while !self.lost && !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            (self.skip, bytes) = (self.skip - skipped, &bytes[skipped..]);
            // First the prelude, then the rest: never more is held than the frame in hand.
            let wanted = self.wanted();
            let taken = wanted.saturating_sub(self.held.len()).min(bytes.len());
            self.held.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.held.len() < wanted {
                continue;
            }
            if wanted > PRELUDE_BYTES {
                each(frame(&self.held));
                self.held.clear();
            } else {
                self.check_prelude(each);
            }
        }
    }

    /// Bytes of a frame that has not come to its end.
    pub fn held_bytes(&self) -> usize {
        self.held.len()
    }

    /// How long the held bytes must become before something can be done with them.
    fn wanted(&self) -> usize {
        if self.held.len() < PRELUDE_BYTES { PRELUDE_BYTES } else { word(&self.held, 0) as usize }
    }

    fn check_prelude(&mut self, each: &mut impl FnMut(Event)) {
        let (length, headers) = (word(&self.held, 0), word(&self.held, 4));
        let sound = crc32fast::hash(&self.held[..8]) == word(&self.held, 8)
            && length as usize >= OVERHEAD_BYTES
            && length <= FRAME_BYTES_POSSIBLE
            && headers as usize <= length as usize - OVERHEAD_BYTES;
        if !sound {
            self.lost = true;
            self.held = Vec::new();
            each(Event::Damaged);
        } else if length as usize > FRAME_BYTES_MAX {
            self.skip = length as usize - PRELUDE_BYTES;
            self.held.clear();
            each(Event::Damaged);
        }
    }
}

/// Four bytes, big-endian; zero where they are not there.
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn frame(bytes: &[u8]) -> Event {
    let body = bytes.len() - 4;
    if crc32fast::hash(&bytes[..body]) != word(bytes, body) {
        return Event::Damaged;
    }
    let split = PRELUDE_BYTES + word(bytes, 4) as usize;
    let (headers, payload) = (&bytes[PRELUDE_BYTES..split], &bytes[split..body]);
    if let Some(kind) = header(headers, b":exception-type").or_else(|| header(headers, b":error-code")) {
        return Event::Exception(kind.chars().take(100).collect());
    }
    match serde_json::from_slice::<Payload<'_>>(payload) {
        Ok(payload) => base64::engine::general_purpose::STANDARD
            .decode(payload.bytes.as_bytes())
            .map_or(Event::Damaged, Event::Chunk),
        Err(_) => Event::Damaged,
    }
}

/// The payload of a chunk; its other fields are padding and the service's own figures.
#[derive(Deserialize)]
struct Payload<'a> {
    #[serde(borrow)]
    bytes: std::borrow::Cow<'a, str>,
}

/// The text of a header. Types of other lengths end the search: what is looked for is text and comes first.
fn header(mut headers: &[u8], wanted: &[u8]) -> Option<String> {
    loop {
        let (length, rest) = headers.split_first()?;
        let (name, rest) = rest.split_at_checked(usize::from(*length))?;
        let (kind, rest) = rest.split_first()?;
        let fixed = |bytes: usize| rest.split_at_checked(bytes);
        let (value, rest) = match kind {
            0 | 1 => fixed(0)?,
            2 => fixed(1)?,
            3 => fixed(2)?,
            4 => fixed(4)?,
            5 | 8 => fixed(8)?,
            9 => fixed(16)?,
            6 | 7 => {
                let (length, rest) = rest.split_at_checked(2)?;
                rest.split_at_checked(usize::from(u16::from_be_bytes([length[0], length[1]])))?
            }
            _ => return None,
        };
        if name == wanted && *kind == 7 {
            return Some(String::from_utf8_lossy(value).into_owned());
        }
        headers = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::eventstream::{chunk, exception};
    use proptest::prelude::*;

    fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Event> {
        let (mut frames, mut events) = (Frames::default(), Vec::new());
        for piece in pieces {
            frames.push(piece, &mut |event| events.push(event));
            assert!(frames.held_bytes() <= FRAME_BYTES_MAX);
        }
        events
    }

    fn stream() -> Vec<u8> {
        let parts = [chunk(b"{\"a\":1}"), chunk(b""), exception("throttlingException", "slow down")];
        parts.concat()
    }

    fn said() -> Vec<Event> {
        let slow = Event::Exception("throttlingException".into());
        vec![Event::Chunk(b"{\"a\":1}".to_vec()), Event::Chunk(Vec::new()), slow]
    }

    #[test]
    fn every_cut_gives_the_same_events() {
        let stream = stream();
        for cut in 0..=stream.len() {
            assert_eq!(read([&stream[..cut], &stream[cut..]]), said(), "{cut}");
        }
        assert_eq!(read(stream.chunks(1)), said());
    }

    #[test]
    fn a_flipped_bit_is_noticed_wherever_it_is() {
        let first = chunk(b"{\"a\":1}").len();
        let whole = stream();
        for at in 0..first {
            let mut stream = whole.clone();
            stream[at] ^= 1;
            let events = read([&stream[..]]);
            assert_eq!(events[0], Event::Damaged, "{at}");
            // After a sound prelude the next frame is found.
            assert_eq!(events.len(), if at < PRELUDE_BYTES { 1 } else { 3 }, "{at}");
        }
    }

    #[test]
    fn huge_and_impossible_lengths_are_skipped_or_end_the_reading() {
        let prelude = |length: u32, headers: u32| {
            let mut bytes = [length.to_be_bytes(), headers.to_be_bytes()].concat();
            bytes.extend(crc32fast::hash(&bytes).to_be_bytes());
            bytes
        };
        for (length, headers) in [(u32::MAX, 0), (0, 0), (15, 0), (20, 5), (FRAME_BYTES_POSSIBLE + 1, 0)] {
            let bytes = [prelude(length, headers), stream()].concat();
            assert_eq!(read([&bytes[..]]), [Event::Damaged], "{length} {headers}");
        }
        let long = FRAME_BYTES_MAX + 1;
        let bytes = [prelude(long as u32, 0), vec![7; long - PRELUDE_BYTES], chunk(b"x")].concat();
        assert_eq!(read(bytes.chunks(4096)), [Event::Damaged, Event::Chunk(b"x".to_vec())]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20)) {
            read(pieces.iter().map(Vec::as_slice));
        }

        #[test]
        fn sound_frames_of_any_content_are_taken(
            headers in prop::collection::vec(any::<u8>(), 0..60), payload in prop::collection::vec(any::<u8>(), 0..60)
        ) {
            let bytes = crate::model::eventstream::frame(&headers, &payload);
            prop_assert_eq!(read([&bytes[..]]).len(), 1);
        }
    }
}
