//! Sends one notice: an HTTP POST that is signed, or a program of the operator's that is run as the user whose job it is.
//! It must never wait longer than its limits, follow a redirect, or run anything as the daemon for somebody else.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use hmac::{Hmac, Mac};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use sha2::Sha256;

use crate::clock;
use crate::gateway::post::Poster;
use crate::gateway::{GatewayError, Reach};
use crate::job::Identity;
use crate::notice::{Target, To};
use crate::run_as::{self, Bounds, Surroundings};

/// Longest try.
const WAIT: Duration = Duration::from_secs(10);
/// Longest run of a program.
const BOUNDS: Bounds = Bounds { wall: Duration::from_secs(30), output_bytes_max: 64 << 10 };
/// Longest key, in bytes.
const KEY_BYTES_MAX: u64 = 4096;
/// How much of a program's words is kept, in bytes.
const WORDS_BYTES_MAX: usize = 400;

/// One target, ready to be told.
#[derive(Debug)]
pub struct Notifier {
    target: Target,
    poster: Option<Poster>,
}

/// What is sent.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// The same at each try.
    pub delivery: &'a str,
    /// What happened, in a word.
    pub kind: &'a str,
    /// Of which job.
    pub job: &'a str,
    /// JSON.
    pub body: &'a str,
    /// Whose job it is.
    pub who: &'a Identity,
}

impl Notifier {
    /// For a target.
    ///
    /// # Errors
    /// [`GatewayError::BaseUrl`]: its URL cannot be used.
    pub fn new(target: Target, reach: &Reach) -> Result<Self, GatewayError> {
        let poster = match &target.to {
            To::Webhook { url, .. } => Some(Poster::new(&format!("[[notify]] {}", target.name), url, reach)?),
            To::Command { .. } => None,
        };
        Ok(Self { target, poster })
    }

    /// Who is told.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Tells it.
    ///
    /// # Errors
    /// Why it was not told, in words.
    pub async fn send(&self, message: Message<'_>) -> Result<(), String> {
        match (&self.target.to, &self.poster) {
            (To::Webhook { secret_file, .. }, Some(poster)) => {
                let key = secret_file.as_deref().map(read_key).transpose()?;
                let headers = headers(&message, key.as_deref(), clock::wall_ms() / 1000)?;
                let body = Bytes::copy_from_slice(message.body.as_bytes());
                match poster.post(headers, body, WAIT).await? {
                    200..=299 => Ok(()),
                    status => Err(format!("the answer was {status}")),
                }
            }
            (To::Command { argv }, _) => {
                let variable = |name: &str, value: &str| (name.to_owned(), value.into());
                let env = vec![
                    variable("HOTCELL_NOTICE", message.kind),
                    variable("HOTCELL_JOB", message.job),
                    variable("HOTCELL_DELIVERY", message.delivery),
                ];
                let more = Surroundings { env, file_bytes_max: None };
                let body = message.body.as_bytes();
                let output = run_as::run_with(argv, message.who, &more, body, BOUNDS).await;
                match output.map_err(|error| error.to_string())? {
                    output if output.code == 0 => Ok(()),
                    output => {
                        let words = String::from_utf8_lossy(
                            &output.stderr[..output.stderr.len().min(WORDS_BYTES_MAX)],
                        )
                        .into_owned();
                        Err(format!("the command ended with code {}: {}", output.code, words.trim()))
                    }
                }
            }
            (To::Webhook { .. }, None) => Err("the webhook has no way".to_owned()),
        }
    }
}

/// The key, from a file that only its owner can read. Read each time: it may be changed while the daemon runs.
fn read_key(path: &Path) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("secret_file {}: {error}", path.display());
    let file = std::fs::File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if meta.mode() & 0o077 != 0 {
        return Err(format!("secret_file {}: others than its owner may read it; chmod 600", path.display()));
    }
    let mut key = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(file, KEY_BYTES_MAX + 1), &mut key)
        .map_err(failed)?;
    key.truncate(key.trim_ascii_end().len());
    match key.len() as u64 {
        0 => Err(format!("secret_file {}: is empty", path.display())),
        n if n > KEY_BYTES_MAX => {
            Err(format!("secret_file {}: is longer than {KEY_BYTES_MAX} bytes", path.display()))
        }
        _ => Ok(key),
    }
}

/// The signature is over the second and the body, so that an old notice cannot be sent again as a new one.
fn headers(message: &Message<'_>, key: Option<&[u8]>, now_s: u64) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(USER_AGENT, HeaderValue::from_static(concat!("hotcell/", env!("CARGO_PKG_VERSION"))));
    let mut put = |name: &'static str, value: &str| {
        let value = HeaderValue::from_str(value).map_err(|error| error.to_string())?;
        headers.insert(HeaderName::from_static(name), value);
        Ok::<(), String>(())
    };
    put("x-hotcell-delivery", message.delivery)?;
    put("x-hotcell-event", message.kind)?;
    put("x-hotcell-timestamp", &now_s.to_string())?;
    if let Some(key) = key {
        put("x-hotcell-signature", &format!("sha256={}", signature(key, now_s, message.body)?))?;
    }
    Ok(headers)
}

/// HMAC-SHA256 (RFC 2104) of `"<seconds>.<body>"`, in hex.
fn signature(key: &[u8], now_s: u64, body: &str) -> Result<String, String> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(|error| error.to_string())?;
    mac.update(format!("{now_s}.").as_bytes());
    mac.update(body.as_bytes());
    Ok(mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_an_hmac_over_time_and_body() {
        // By `printf '5.{}' | openssl dgst -sha256 -hmac key`.
        let expected = "9be615aec64f0d044b5ad6854ab1d893ec88617fb728d2149dcd3a3428e8c45d";
        assert_eq!(signature(b"key", 5, "{}").unwrap(), expected);
        assert_ne!(signature(b"key", 6, "{}").unwrap(), expected);
    }

    #[test]
    fn a_key_that_others_may_read_is_not_used() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "secret\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(read_key(&path).unwrap_err().contains("chmod 600"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(read_key(&path).unwrap(), b"secret");
        std::fs::write(&path, "\n").unwrap();
        assert!(read_key(&path).unwrap_err().contains("empty"));
    }
}
