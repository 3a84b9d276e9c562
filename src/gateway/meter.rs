//! Reads what a reply was billed for out of its bytes while they pass by: SSE events, the event stream of Amazon
//! Bedrock ([`eventstream`]), or one JSON message.
//! Pure: bytes in, a [`Reading`] out. It must give the same reading however the bytes are cut into chunks,
//! keep a bounded part of them, and never fail: what cannot be read is no usage.

pub mod eventstream;

use serde_json::Value;

use crate::pricing::Usage;
use eventstream::{Event, Frames};

/// Longest SSE event that is looked into, in bytes. The events that carry usage have a few hundred.
const EVENT_BYTES_MAX: usize = 1 << 20;
/// Longest JSON reply that is looked into, in bytes.
const JSON_BYTES_MAX: usize = 32 << 20;
/// An event of this kind carries no usage; told by its first bytes, since most events are of it.
const DELTA_PREFIX: &[u8] = b"{\"type\":\"content_block_delta\"";

/// What a reply said about its cost.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reading {
    /// The last usage seen; `None` when there was none.
    pub usage: Option<Usage>,
    /// Whether the final usage was seen (`message_delta` with a stop reason, or a whole JSON message).
    pub complete: bool,
    /// Why the model stopped.
    pub stop_reason: Option<String>,
    /// `error.type` of an error event or body.
    pub error: Option<String>,
    /// Bytes of events after `message_start`: no fewer than the output tokens they brought.
    pub output_bytes: u64,
    /// Whether a thinking block was begun: its tokens may not be visible in the stream.
    pub thinking: bool,
}

impl Reading {
    /// The usage to charge. Where the final usage was not seen, the output is as long as it can be made:
    /// `output_tokens_max`, since what was cut off may go on and be billed. Only where the provider itself ended it
    /// with an error, and all of that was read (`to_its_end`), it is bounded by what was seen (a token is at least
    /// one byte on the wire), unless hidden thinking may have been going on.
    pub fn billable(&self, output_tokens_max: u64, to_its_end: bool) -> Option<Usage> {
        let mut usage = self.usage?;
        if !self.complete {
            let over = to_its_end && self.error.is_some() && !self.thinking;
            let seen = if over { self.output_bytes } else { u64::MAX };
            usage.output = usage.output.max(seen.min(output_tokens_max));
        }
        Some(usage)
    }
}

/// A meter for one reply.
#[derive(Debug)]
pub enum Meter {
    /// `text/event-stream`.
    Sse(Box<SseMeter>),
    /// `application/vnd.amazon.eventstream`.
    EventStream(Box<EventStreamMeter>),
    /// `application/json`.
    Json(Vec<u8>),
    /// Anything else: nothing is read.
    Blind,
}

impl Meter {
    /// The meter for a content type.
    pub fn for_content_type(content_type: &str) -> Self {
        let essence = content_type.split(';').next().unwrap_or_default().trim();
        if essence.eq_ignore_ascii_case("text/event-stream") {
            Self::Sse(Box::default())
        } else if essence.eq_ignore_ascii_case("application/vnd.amazon.eventstream") {
            Self::EventStream(Box::default())
        } else if essence.eq_ignore_ascii_case("application/json") {
            Self::Json(Vec::new())
        } else {
            Self::Blind
        }
    }

    /// Takes the next bytes of the body.
    pub fn push(&mut self, bytes: &[u8]) {
        match self {
            Self::Sse(meter) => meter.push(bytes),
            Self::EventStream(meter) => meter.push(bytes),
            Self::Json(body) if body.len() + bytes.len() <= JSON_BYTES_MAX => body.extend_from_slice(bytes),
            Self::Json(_) => *self = Self::Blind,
            Self::Blind => {}
        }
    }

    /// The reading after the last byte.
    pub fn finish(self) -> Reading {
        match self {
            Self::Sse(mut meter) => meter.finish(),
            Self::EventStream(meter) => meter.finish(),
            Self::Json(body) => json_reading(&body),
            Self::Blind => Reading::default(),
        }
    }
}

fn json_reading(body: &[u8]) -> Reading {
    let Ok(message) = serde_json::from_slice::<Value>(body) else { return Reading::default() };
    let mut raw = RawUsage::default();
    raw.update(&message["usage"]);
    Reading {
        usage: raw.usage(),
        complete: raw.usage().is_some(),
        stop_reason: text(&message["stop_reason"]),
        error: text(&message["error"]["type"]),
        ..Reading::default()
    }
}

/// Incremental reader of an event stream: lines end in LF, CR or CRLF, `data:` lines of an event are joined.
#[derive(Debug, Default)]
pub struct SseMeter {
    line: Vec<u8>,
    data: Vec<u8>,
    /// The event has more than [`EVENT_BYTES_MAX`] bytes and is skipped.
    overlong: bool,
    after_cr: bool,
    event_bytes: u64,
    events: Events,
}

impl SseMeter {
    fn push(&mut self, mut bytes: &[u8]) {
        if self.after_cr && !bytes.is_empty() {
            self.after_cr = false;
            bytes = bytes.strip_prefix(b"\n").unwrap_or(bytes);
        }
        while let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            self.keep(&bytes[..end]);
            self.end_line();
            let ended_by_cr = bytes[end] == b'\r';
            bytes = &bytes[end + 1..];
            if ended_by_cr {
                self.after_cr = bytes.is_empty();
                bytes = bytes.strip_prefix(b"\n").unwrap_or(bytes);
            }
        }
        self.keep(bytes);
    }

    fn keep(&mut self, part: &[u8]) {
        self.event_bytes += part.len() as u64;
        if self.overlong || self.line.len() + self.data.len() + part.len() > EVENT_BYTES_MAX {
            self.overlong = true;
            self.data.clear();
            if !part.is_empty() {
                // Short, yet not empty: an empty line would end the event.
                self.line.clear();
                self.line.push(b':');
            }
            return;
        }
        self.line.extend_from_slice(part);
    }

    fn end_line(&mut self) {
        if self.line.is_empty() {
            self.dispatch();
            return;
        }
        if let Some(value) = self.line.strip_prefix(b"data:") {
            if !self.data.is_empty() {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
        }
        self.line.clear();
    }

    fn dispatch(&mut self) {
        self.events.take(&self.data, std::mem::take(&mut self.event_bytes));
        self.overlong = false;
        self.data.clear();
    }

    fn finish(&mut self) -> Reading {
        // A last event without its empty line: a client would not see it, but it was billed.
        if !self.line.is_empty() {
            self.end_line();
        }
        self.dispatch();
        self.events.finish()
    }
}

/// Incremental reader of the event stream of Amazon Bedrock: the same events in frames.
#[derive(Debug, Default)]
pub struct EventStreamMeter {
    frames: Frames,
    events: Events,
}

impl EventStreamMeter {
    fn push(&mut self, bytes: &[u8]) {
        let events = &mut self.events;
        self.frames.push(bytes, &mut |event| match event {
            Event::Chunk(data) => events.take(&data, data.len() as u64),
            Event::Exception(kind) => events.reading.error = Some(exception_type(&kind).to_owned()),
            // What was in it is unknown: then only `max_tokens` bounds the output.
            Event::Damaged => events.reading.thinking = true,
        });
    }

    fn finish(mut self) -> Reading {
        self.events.take(b"", self.frames.held_bytes() as u64);
        self.events.finish()
    }
}

/// The API's name for an exception of Bedrock's.
fn exception_type(kind: &str) -> &'static str {
    match kind {
        "throttlingException" | "ThrottlingException" => "rate_limit_error",
        "serviceUnavailableException" | "modelNotReadyException" => "overloaded_error",
        "validationException" => "invalid_request_error",
        "accessDeniedException" => "permission_error",
        _ => "api_error",
    }
}

/// What the events of a stream say, whatever carried them.
#[derive(Debug, Default)]
struct Events {
    started: bool,
    raw: RawUsage,
    reading: Reading,
}

impl Events {
    /// Takes an event's JSON (empty: none that could be read) and how many bytes it had on the wire.
    fn take(&mut self, data: &[u8], event_bytes: u64) {
        if self.started {
            self.reading.output_bytes = self.reading.output_bytes.saturating_add(event_bytes);
        }
        if !data.is_empty()
            && !data.starts_with(DELTA_PREFIX)
            && let Ok(event) = serde_json::from_slice::<Value>(data)
        {
            self.event(&event);
        }
    }

    fn event(&mut self, event: &Value) {
        match event["type"].as_str() {
            Some("message_start") => {
                self.started = true;
                self.raw.update(&event["message"]["usage"]);
            }
            Some("content_block_start") => {
                let kind = event["content_block"]["type"].as_str().unwrap_or_default();
                self.reading.thinking |= kind.ends_with("thinking");
            }
            Some("message_delta") => {
                self.raw.update(&event["usage"]);
                self.reading.stop_reason = text(&event["delta"]["stop_reason"]);
                let told = event["usage"]["output_tokens"].is_u64();
                self.reading.complete = told && self.reading.stop_reason.is_some();
            }
            Some("error") => {
                let kind = text(&event["error"]["type"]);
                self.reading.error = kind.or_else(|| Some("api_error".to_owned()));
            }
            _ => {}
        }
    }

    fn finish(&mut self) -> Reading {
        self.reading.usage = self.raw.usage();
        self.reading.complete &= self.reading.usage.is_some();
        std::mem::take(&mut self.reading)
    }
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(|text| text.chars().take(100).collect())
}

/// Usage as the API says it: cumulative, each part overwritten by a later event that has it.
#[derive(Debug, Default)]
struct RawUsage {
    input: Option<u64>,
    output: Option<u64>,
    cache_read: Option<u64>,
    cache_write: Option<u64>,
    cache_write_5m: Option<u64>,
    cache_write_1h: Option<u64>,
    web_searches: Option<u64>,
}

impl RawUsage {
    fn update(&mut self, usage: &Value) {
        let take = |slot: &mut Option<u64>, value: &Value| *slot = value.as_u64().or(*slot);
        take(&mut self.input, &usage["input_tokens"]);
        take(&mut self.output, &usage["output_tokens"]);
        take(&mut self.cache_read, &usage["cache_read_input_tokens"]);
        take(&mut self.cache_write, &usage["cache_creation_input_tokens"]);
        take(&mut self.cache_write_5m, &usage["cache_creation"]["ephemeral_5m_input_tokens"]);
        take(&mut self.cache_write_1h, &usage["cache_creation"]["ephemeral_1h_input_tokens"]);
        take(&mut self.web_searches, &usage["server_tool_use"]["web_search_requests"]);
    }

    /// `None` unless input and output were both said. Cache writes whose duration was not said are charged
    /// as one-hour ones, the dearer.
    fn usage(&self) -> Option<Usage> {
        let (Some(input), Some(output)) = (self.input, self.output) else { return None };
        let (short, long) = (self.cache_write_5m.unwrap_or(0), self.cache_write_1h.unwrap_or(0));
        let total = self.cache_write.unwrap_or(0);
        let cache_write_1h = long.max(total.saturating_sub(short));
        let cache_read = self.cache_read.unwrap_or(0);
        Some(Usage {
            input,
            output,
            cache_read,
            cache_write_5m: short,
            cache_write_1h,
            web_searches: self.web_searches.unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: &str = "event: message_start\r\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":10,\
        \"cache_creation_input_tokens\":7,\"cache_read_input_tokens\":5,\"cache_creation\":{\"ephemeral_5m_input_tokens\":3,\
        \"ephemeral_1h_input_tokens\":4},\"output_tokens\":1}}}\r\n\r\nevent: content_block_start\ndata: {\"type\":\"content_block_start\",\
        \"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n: comment\n\nevent: content_block_delta\rdata: {\"type\":\
        \"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"h\u{e9}\"}}\r\revent: message_delta\ndata: {\"type\":\
        \"message_delta\",\ndata: \"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":42}}\n\ndata: {\"type\":\"message_stop\"}\n\n";

    fn read(chunks: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Reading {
        let mut meter = Meter::for_content_type("text/event-stream; charset=utf-8");
        chunks.into_iter().for_each(|chunk| meter.push(chunk.as_ref()));
        meter.finish()
    }

    /// The same stream as Bedrock sends it.
    fn framed() -> Vec<u8> {
        let text = STREAM.replace("\r\n", "\n").replace('\r', "\n").replace(",\ndata: \"delta", ",\"delta");
        let events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let events = events.into_iter();
        events.flat_map(|event| crate::model::eventstream::chunk(event.as_bytes())).collect()
    }

    fn read_frames<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Reading {
        let mut meter = Meter::for_content_type("application/vnd.amazon.eventstream");
        pieces.into_iter().for_each(|piece| meter.push(piece));
        meter.finish()
    }

    #[test]
    fn frames_that_broke_off_or_are_damaged_are_charged_for_no_less_than_they_may_have_cost() {
        let whole = framed();
        for end in 0..whole.len() {
            let reading = read_frames([&whole[..end]]);
            if let Some(usage) = reading.billable(1_000, false) {
                let whole = if reading.complete { 42 } else { 1_000 };
                assert!(usage.output == whole && usage.input == 10, "{end}: {reading:?}");
            }
            let mut flipped = whole.clone();
            flipped[end] ^= 0x10;
            let reading = read_frames([&flipped[..]]);
            let charged = reading.billable(1_000, true).map(|usage| usage.output);
            assert!(charged.is_none_or(|output| output == 42 || output == 1_000), "{end}: {reading:?}");
        }
        let slow = crate::model::eventstream::exception("throttlingException", "slow down");
        assert_eq!(read_frames([&slow[..]]).error.as_deref(), Some("rate_limit_error"));
    }

    #[test]
    fn the_whole_stream_gives_the_usage() {
        let reading = read([STREAM]);
        let usage = Usage {
            input: 10,
            output: 42,
            cache_read: 5,
            cache_write_5m: 3,
            cache_write_1h: 4,
            ..Usage::default()
        };
        assert_eq!((reading.usage, reading.complete), (Some(usage), true));
        assert_eq!(reading.stop_reason.as_deref(), Some("end_turn"));
        assert_eq!(reading.billable(1_000, false), Some(usage));
    }

    #[test]
    fn a_stream_cut_early_is_charged_for_all_that_may_still_be_made() {
        let end = STREAM.find("event: message_delta").unwrap();
        let reading = read([&STREAM[..end]]);
        assert!(!reading.complete && reading.output_bytes >= 2);
        let output =
            |reading: &Reading, to_its_end| reading.billable(9_000, to_its_end).map(|usage| usage.output);
        assert_eq!((output(&reading, false), output(&reading, true)), (Some(9_000), Some(9_000)));
        // Nothing comes after an error of the provider's.
        let failed = Reading { error: Some("overloaded_error".to_owned()), ..reading.clone() };
        assert_eq!(
            (output(&failed, false), output(&failed, true)),
            (Some(9_000), Some(reading.output_bytes))
        );
        let thinking = Reading { thinking: true, ..failed };
        assert_eq!(output(&thinking, true), Some(9_000));
        assert_eq!(read(["event: ping\ndata: {}\n\n"]).billable(9, true), None);
        // A stop without a figure is no final usage.
        let stop =
            "data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{}}\n\n";
        assert_eq!(output(&read([&STREAM[..end], stop]), true), Some(9_000));
    }

    #[test]
    fn an_overlong_event_is_skipped_and_the_next_is_read() {
        let long = format!("data: {}\ndata: x\n\n", "x".repeat(EVENT_BYTES_MAX + 1));
        let reading = read([long.as_str(), STREAM]);
        assert_eq!(reading.usage.map(|usage| usage.output), Some(42));
    }

    #[test]
    fn a_json_message_and_an_error_event_are_read() {
        let mut meter = Meter::for_content_type("application/json");
        meter.push(b"{\"usage\":{\"input_tokens\":1,\"output_tokens\":2,\"cache_creation_input_tokens\":9}}");
        let usage = Usage { input: 1, output: 2, cache_write_1h: 9, ..Usage::default() };
        assert_eq!(meter.finish().usage, Some(usage), "cache writes of unknown duration at the dearer price");
        let error = read(["data: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\"}}\n\n"]);
        assert_eq!(error.error.as_deref(), Some("overloaded_error"));
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_reading(cuts in prop::collection::vec(0..STREAM.len(), 0..40)) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            let mut from = 0;
            let mut chunks = Vec::new();
            for cut in cuts.into_iter().chain([STREAM.len()]) {
                chunks.push(&STREAM.as_bytes()[from..cut]);
                from = cut;
            }
            prop_assert_eq!(read(chunks), read([STREAM]));
        }

        #[test]
        fn any_chunking_of_frames_gives_the_same_reading(cuts in prop::collection::vec(0usize..4000, 0..40)) {
            let stream = framed();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(stream.len())).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let whole = read_frames([&stream[..]]);
            prop_assert_eq!(whole.usage, read([STREAM]).usage);
            prop_assert!(whole.complete);
            prop_assert_eq!(read_frames(cuts.windows(2).map(|w| &stream[w[0]..w[1]])), whole);
        }

        #[test]
        fn garbage_never_panics(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20),
            kind in prop::sample::select(vec![
                "application/json", "text/event-stream", "application/vnd.amazon.eventstream",
            ])
        ) {
            let mut meter = Meter::for_content_type(kind);
            chunks.iter().for_each(|chunk| meter.push(chunk));
            meter.finish();
        }

        #[test]
        fn garbled_events_never_panic(at in 0..STREAM.len(), byte in any::<u8>()) {
            let mut bytes = STREAM.as_bytes().to_vec();
            bytes[at] = byte;
            read([bytes]);
        }
    }
}
