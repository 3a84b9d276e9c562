//! AWS Signature Version 4, as far as one POST to Amazon Bedrock needs it: header signing of a body that is
//! whole. Pure. Checked against the test suite that AWS published with the algorithm.
//!
//! Own code, though a crate exists: `aws-sigv4` brings some fifteen crates of the SDK (smithy runtimes, a second
//! date library) for these hundred lines; HMAC and SHA-256, where the difficulty is, are crates we have.

use std::fmt::Write as _;

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

use super::secret::Secret;

/// Keys of an AWS identity.
#[derive(Debug, Clone)]
pub struct Keys {
    /// The access key's id; no secret by itself.
    pub access_key_id: String,
    /// The secret.
    pub secret_access_key: Secret,
    /// Of temporary keys.
    pub session_token: Option<Secret>,
}

/// What a signature is for.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// E.g. `us-east-1`.
    pub region: &'a str,
    /// E.g. `bedrock`.
    pub service: &'a str,
    /// `YYYYMMDD'T'HHMMSS'Z'`, the same as in the header `x-amz-date`.
    pub amz_date: &'a str,
}

/// The request as it will go over the wire.
#[derive(Debug, Clone, Copy)]
pub struct Signed<'a> {
    /// E.g. `POST`.
    pub method: &'a str,
    /// The path, percent-encoded as on the wire; each of its segments is encoded once more, as the algorithm wants.
    pub path: &'a str,
    /// The query, without its question mark.
    pub query: &'a str,
    /// Headers that are signed: names in lower case, sorted.
    pub headers: &'a [(&'a str, &'a str)],
    /// SHA-256 of the body, in hex.
    pub body_sha256: &'a str,
}

/// `YYYYMMDD'T'HHMMSS'Z'` of a time in milliseconds since 1970.
pub fn amz_date(wall_ms: u64) -> String {
    let time = i64::try_from(wall_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    time.unwrap_or_default().strftime("%Y%m%dT%H%M%SZ").to_string()
}

/// SHA-256 in hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The value of the header `authorization`.
pub fn authorization(keys: &Keys, scope: Scope<'_>, request: Signed<'_>) -> String {
    let names: Vec<&str> = request.headers.iter().map(|(name, _)| *name).collect();
    let names = names.join(";");
    let mut headers = String::new();
    for (name, value) in request.headers {
        let value: Vec<&str> = value.split_whitespace().collect();
        // Writing to a String does not fail.
        let _ = writeln!(headers, "{name}:{}", value.join(" "));
    }
    let mut query: Vec<&str> = request.query.split('&').filter(|pair| !pair.is_empty()).collect();
    query.sort_unstable();
    let canonical = format!(
        "{}\n{}\n{}\n{headers}\n{names}\n{}",
        request.method,
        encoded(request.path),
        query.join("&"),
        request.body_sha256
    );
    let day = scope.amz_date.get(..8).unwrap_or_default();
    let place = format!("{day}/{}/{}/aws4_request", scope.region, scope.service);
    let text = format!("AWS4-HMAC-SHA256\n{}\n{place}\n{}", scope.amz_date, sha256_hex(canonical.as_bytes()));
    let mut key = format!("AWS4{}", keys.secret_access_key.expose()).into_bytes();
    for part in [day, scope.region, scope.service, "aws4_request"] {
        key = hmac(&key, part.as_bytes());
    }
    let signature = hex(&hmac(&key, text.as_bytes()));
    format!(
        "AWS4-HMAC-SHA256 Credential={}/{place}, SignedHeaders={names}, Signature={signature}",
        keys.access_key_id
    )
}

/// Percent-encodes everything but unreserved characters and slashes.
pub fn encoded(path: &str) -> String {
    let mut out = String::with_capacity(path.len() + 16);
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    if out.is_empty() { "/".to_owned() } else { out }
}

fn hmac(key: &[u8], text: &[u8]) -> Vec<u8> {
    // HMAC takes keys of every length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return Vec::new() };
    mac.update(text);
    mac.finalize().into_bytes().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    /// The signature over a request of AWS's test suite (`aws-sig-v4-test-suite`), whose keys and date are these.
    fn signature(method: &str, path: &str, query: &str, more: &[(&str, &str)], body: &[u8]) -> String {
        let keys = Keys {
            access_key_id: "AKIDEXAMPLE".into(),
            secret_access_key: Secret::new("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY".into()),
            session_token: None,
        };
        let amz_date = "20150830T123600Z";
        let mut headers = vec![("host", "example.amazonaws.com"), ("x-amz-date", amz_date)];
        headers.extend(more);
        headers.sort_unstable();
        let scope = Scope { region: "us-east-1", service: "service", amz_date };
        let body_sha256 = sha256_hex(body);
        let request = Signed { method, path, query, headers: &headers, body_sha256: &body_sha256 };
        authorization(&keys, scope, request).rsplit_once('=').unwrap().1.to_owned()
    }

    #[test]
    fn the_signatures_of_the_published_suite_come_out() {
        assert_eq!(sha256_hex(b""), EMPTY);
        let cases: [(&str, &str, &str, &str, &[(&str, &str)], &str, &str); 6] = [
            (
                "get-vanilla",
                "GET",
                "/",
                "",
                &[],
                "",
                "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
            ),
            (
                "get-vanilla-query-order-key-case",
                "GET",
                "/",
                "Param2=value2&Param1=value1",
                &[],
                "",
                "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
            ),
            (
                "get-utf8",
                "GET",
                "/\u{1234}",
                "",
                &[],
                "",
                "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85",
            ),
            (
                "post-vanilla",
                "POST",
                "/",
                "",
                &[],
                "",
                "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
            ),
            (
                "post-x-www-form-urlencoded",
                "POST",
                "/",
                "",
                &[("content-type", "application/x-www-form-urlencoded")],
                "Param1=value1",
                "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a",
            ),
            (
                "post-sts-header-after",
                "POST",
                "/",
                "",
                &[],
                "",
                "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
            ),
        ];
        for (name, method, path, query, headers, body, wanted) in cases {
            assert_eq!(signature(method, path, query, headers, body.as_bytes()), wanted, "{name}");
        }
        let token = "AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI/qkPpKPi/kMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA==";
        assert_eq!(
            signature("POST", "/", "", &[("x-amz-security-token", token)], b""),
            "85d96828115b5dc0cfc3bd16ad9e210dd772bbebba041836c64533a82be05ead",
            "post-sts-header-before"
        );
    }

    #[test]
    fn a_path_is_encoded_once_more_and_dates_are_of_the_basic_form() {
        assert_eq!(encoded("/model/a-v1%3A0/invoke"), "/model/a-v1%253A0/invoke");
        assert_eq!(amz_date(1_440_938_160_000), "20150830T123600Z");
    }
}
