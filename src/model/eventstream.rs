//! Writes AWS event-stream frames, as Amazon Bedrock answers in. Pure. Only what the scripted model needs.

use base64::Engine as _;
use serde_json::json;

/// One frame of raw headers and payload.
pub fn frame(headers: &[u8], payload: &[u8]) -> Vec<u8> {
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes();
    let mut out = Vec::with_capacity(16 + headers.len() + payload.len());
    out.extend(length(16 + headers.len() + payload.len()));
    out.extend(length(headers.len()));
    out.extend(crc32fast::hash(&out).to_be_bytes());
    out.extend(headers);
    out.extend(payload);
    out.extend(crc32fast::hash(&out).to_be_bytes());
    out
}

/// An event of the model's: JSON, in base64, in JSON, in a frame.
pub fn chunk(event: &[u8]) -> Vec<u8> {
    let bytes = base64::engine::general_purpose::STANDARD.encode(event);
    let headers =
        [(":event-type", "chunk"), (":content-type", "application/json"), (":message-type", "event")];
    frame(&texts(&headers), json!({ "bytes": bytes, "p": "abcdefghij" }).to_string().as_bytes())
}

/// The end of a stream that failed.
pub fn exception(kind: &str, message: &str) -> Vec<u8> {
    let headers =
        [(":exception-type", kind), (":content-type", "application/json"), (":message-type", "exception")];
    frame(&texts(&headers), json!({ "message": message }).to_string().as_bytes())
}

fn texts(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in headers {
        out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        out.extend(name.as_bytes());
        out.push(7);
        out.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_be_bytes());
        out.extend(value.as_bytes());
    }
    out
}
