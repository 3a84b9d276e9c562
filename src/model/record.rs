//! What the scripted model received: kept in memory for tests, or appended to an NDJSON file in which
//! credentials are replaced by a hash. A file must never hold a credential in clear.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::sync::watch;

/// Requests kept in memory; later ones are counted only.
const KEPT_MAX: usize = 10_000;

/// One request as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Method.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Headers in order, names in lower case, values in clear.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Bytes,
    /// Name of the rule that answered, for `POST …/messages`.
    pub rule: Option<String>,
}

impl Received {
    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The body as JSON; null if it is none.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

/// Where received requests go.
#[derive(Debug)]
pub struct Recorder {
    sink: Sink,
    total: watch::Sender<u64>,
}

#[derive(Debug)]
enum Sink {
    Off,
    Memory(Mutex<Vec<Received>>),
    File(Mutex<File>),
}

impl Recorder {
    /// Counts only.
    pub fn off() -> Self {
        Self::with(Sink::Off)
    }

    /// Keeps the first 10,000 requests in memory, credentials in clear: for tests.
    pub fn memory() -> Self {
        Self::with(Sink::Memory(Mutex::default()))
    }

    /// Appends one JSON line a request to `path`, readable by its owner only.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn file(path: &Path) -> std::io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        Ok(Self::with(Sink::File(Mutex::new(file))))
    }

    fn with(sink: Sink) -> Self {
        Self { sink, total: watch::Sender::new(0) }
    }

    /// Requests received so far, of any kind.
    pub fn total(&self) -> u64 {
        *self.total.borrow()
    }

    /// Returns once `count` requests have been received.
    pub async fn wait_for(&self, count: u64) {
        // Cannot fail: the sender lives as long as `self`.
        let _ = self.total.subscribe().wait_for(|total| *total >= count).await;
    }

    /// The requests kept in memory; empty for the other kinds.
    pub fn requests(&self) -> Vec<Received> {
        match &self.sink {
            Sink::Memory(kept) => kept.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            _ => Vec::new(),
        }
    }

    /// Takes one request. A file that cannot be written is logged, not an error of the request.
    pub(super) fn take(&self, received: Received) {
        match &self.sink {
            Sink::Off => {}
            Sink::Memory(kept) => {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() < KEPT_MAX {
                    kept.push(received);
                }
            }
            Sink::File(file) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                // One write(2) of at most a request's size to a local file.
                if let Err(error) = file.write_all(line(&received).as_bytes()) {
                    tracing::warn!(%error, "cannot record a request of the scripted model");
                }
            }
        }
        self.total.send_modify(|total| *total += 1);
    }
}

fn line(received: &Received) -> String {
    let header = |(name, value): &(String, String)| {
        let secret = ["x-api-key", "authorization", "cookie", "proxy-authorization", "x-amz-security-token"]
            .contains(&&**name);
        let shown = if secret { format!("sha256:{:x}", Sha256::digest(value)) } else { value.clone() };
        json!([name, shown])
    };
    let headers: Vec<_> = received.headers.iter().map(header).collect();
    let body = serde_json::from_slice::<serde_json::Value>(&received.body)
        .unwrap_or_else(|_| json!(String::from_utf8_lossy(&received.body)));
    let line = json!({ "method": received.method, "target": received.target, "rule": received.rule,
                       "headers": headers, "body": body });
    format!("{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorded_line_holds_no_credential() {
        let received = Received {
            method: "POST".into(),
            target: "/v1/messages".into(),
            headers: vec![("x-api-key".into(), "canary".into()), ("a".into(), "b".into())],
            body: Bytes::from_static(b"{\"model\":\"m\"}"),
            rule: None,
        };
        let line = line(&received);
        assert!(
            !line.contains("canary") && line.contains("sha256:") && line.contains("\"model\":\"m\""),
            "{line}"
        );
    }
}
