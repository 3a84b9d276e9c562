//! What a credential's source gave, read: a plain text, `{"token", "expires_at"}`, or the forms in which AWS keeps
//! keys. Pure. It must never repeat a value in an error.

use serde::Deserialize;

use super::super::secret::Secret;
use super::super::sigv4::Keys;
use super::CredentialKind;

/// Longest credential, in bytes.
pub(super) const BYTES_MAX: usize = 16 << 10;
/// How a subscription's OAuth token begins.
const SUBSCRIPTION: &str = "sk-ant-oat";

/// Why a text is no credential. Never holds any of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// Empty, too long, or not one line of visible characters.
    #[error("does not hold an API key or token: expected one line of visible characters")]
    Text,
    /// JSON without what is needed.
    #[error("is JSON, but not {{\"token\": …, \"expires_at\": …}}")]
    Json,
    /// No keys of AWS.
    #[error(
        "does not hold keys of AWS: expected the JSON of a credential_process, or lines aws_access_key_id = … \
         and aws_secret_access_key = …"
    )]
    Aws,
    /// A subscription's token.
    #[error(
        "holds the OAuth token of a subscription (sk-ant-oat…), which is for the vendor's own apps and a person \
         at them, not for a daemon: use an API key, or a cloud provider's credential"
    )]
    Subscription,
    /// It is over already.
    #[error("holds a credential that has expired")]
    Expired,
    /// No time.
    #[error("says when it expires in a form that is no RFC 3339 time")]
    Expiry,
}

/// A credential.
#[derive(Debug, Clone)]
pub(super) enum Value {
    /// A key, a token or a password.
    Text(Secret),
    /// Keys of an AWS identity.
    Aws(Keys),
}

impl Value {
    /// What must stand nowhere but in a request.
    pub(super) fn secrets(&self) -> impl Iterator<Item = &Secret> {
        let (one, more) = match self {
            Self::Text(secret) => (secret, None),
            Self::Aws(keys) => (&keys.secret_access_key, keys.session_token.as_ref()),
        };
        std::iter::once(one).chain(more)
    }
}

/// A credential and when it is over, in milliseconds since 1970.
#[derive(Debug, Clone)]
pub(super) struct Parsed {
    pub(super) value: Value,
    pub(super) expires_ms: Option<u64>,
}

#[derive(Deserialize)]
struct Token {
    token: String,
    expires_at: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Process {
    access_key_id: String,
    secret_access_key: String,
    session_token: Option<String>,
    expiration: Option<String>,
}

/// Reads what a source gave, at the time `now_ms`.
pub(super) fn parse(kind: &CredentialKind, text: &str, now_ms: u64) -> Result<Parsed, Unusable> {
    let text = text.trim();
    if text.len() > BYTES_MAX {
        return Err(Unusable::Text);
    }
    let json = text.starts_with('{');
    let (value, expires) = match kind {
        CredentialKind::Aws if json => {
            let keys: Process = serde_json::from_str(text).map_err(|_| Unusable::Aws)?;
            let secret_access_key = keys.secret_access_key;
            (aws(keys.access_key_id, secret_access_key, keys.session_token)?, keys.expiration)
        }
        CredentialKind::Aws => (aws_lines(text)?, None),
        _ if json => {
            let token: Token = serde_json::from_str(text).map_err(|_| Unusable::Json)?;
            (Value::Text(visible(token.token)?), token.expires_at)
        }
        _ => (Value::Text(visible(text.to_owned())?), None),
    };
    let expires_ms = expires.map(|text| time_ms(&text)).transpose()?;
    if expires_ms.is_some_and(|at| at <= now_ms) {
        return Err(Unusable::Expired);
    }
    Ok(Parsed { value, expires_ms })
}

fn time_ms(text: &str) -> Result<u64, Unusable> {
    let time: jiff::Timestamp = text.trim().parse().map_err(|_| Unusable::Expiry)?;
    u64::try_from(time.as_millisecond()).map_err(|_| Unusable::Expiry)
}

fn visible(text: String) -> Result<Secret, Unusable> {
    let text = text.trim().to_owned();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Unusable::Text);
    }
    let bare =
        text.get(..7).filter(|scheme| scheme.eq_ignore_ascii_case("bearer:")).map_or(&*text, |_| &text[7..]);
    if bare.starts_with(SUBSCRIPTION) {
        return Err(Unusable::Subscription);
    }
    Ok(Secret::new(text))
}

fn aws(id: String, secret: String, session_token: Option<String>) -> Result<Value, Unusable> {
    let good = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    if !good(&id) || !good(&secret) || session_token.as_deref().is_some_and(|token| !good(token)) {
        return Err(Unusable::Aws);
    }
    Ok(Value::Aws(Keys {
        access_key_id: id,
        secret_access_key: Secret::new(secret),
        session_token: session_token.map(Secret::new),
    }))
}

/// The section `[default]` of a file as AWS's tools write it, or the first one.
fn aws_lines(text: &str) -> Result<Value, Unusable> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let default = lines.iter().position(|line| *line == "[default]").map_or(0, |at| at + 1);
    let first = lines[default..].iter().position(|line| !line.starts_with('[')).unwrap_or(0);
    let section = lines[default + first..].iter().take_while(|line| !line.starts_with('['));
    let value = |wanted: &str| {
        let pairs = section.clone().filter_map(|line| line.split_once('='));
        pairs
            .filter(|(key, _)| key.trim().eq_ignore_ascii_case(wanted))
            .map(|(_, v)| v.trim().to_owned())
            .next()
    };
    let needed = |key| value(key).ok_or(Unusable::Aws);
    aws(needed("aws_access_key_id")?, needed("aws_secret_access_key")?, value("aws_session_token"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;

    fn text(given: &str) -> Result<(String, Option<u64>), Unusable> {
        parse(&CredentialKind::ApiKey, given, NOW).map(|parsed| match parsed.value {
            Value::Text(secret) => (secret.expose().to_owned(), parsed.expires_ms),
            Value::Aws(_) => panic!("keys"),
        })
    }

    fn keys(given: &str) -> Result<(String, String, Option<String>), Unusable> {
        parse(&CredentialKind::Aws, given, NOW).map(|parsed| match parsed.value {
            Value::Text(_) => panic!("text"),
            Value::Aws(keys) => (
                keys.access_key_id,
                keys.secret_access_key.expose().to_owned(),
                keys.session_token.map(|t| t.expose().to_owned()),
            ),
        })
    }

    #[test]
    fn a_plain_text_and_a_token_that_expires_are_read() {
        assert_eq!(text(" sk-1\n"), Ok(("sk-1".into(), None)));
        let expiring = r#"{"token":"t1","expires_at":"2030-01-01T00:00:00Z","more":1}"#;
        assert_eq!(text(expiring), Ok(("t1".into(), Some(1_893_456_000_000))));
        assert_eq!(text(r#"{"token":"t1","expires_at":"2020-01-01T00:00:00Z"}"#), Err(Unusable::Expired));
        assert_eq!(text(r#"{"token":"t1","expires_at":"soon"}"#), Err(Unusable::Expiry));
        assert_eq!(text(r#"{"tok":"t1"}"#), Err(Unusable::Json));
        for bad in ["", " \n", "a b", "a\nb", "k\u{e9}y", &"x".repeat(BYTES_MAX + 1)] {
            assert_eq!(text(bad), Err(Unusable::Text), "{bad:.9}");
        }
    }

    #[test]
    fn keys_of_aws_are_read_in_both_forms() {
        let process = r#"{"Version":1,"AccessKeyId":"A","SecretAccessKey":"S","SessionToken":"T","Expiration":"2030-01-01T00:00:00+00:00"}"#;
        assert_eq!(keys(process), Ok(("A".into(), "S".into(), Some("T".into()))));
        let file = "[other]\naws_access_key_id=X\n\n[default]\naws_access_key_id = A\naws_secret_access_key = S=\n[z]\na=b\n";
        assert_eq!(keys(file), Ok(("A".into(), "S=".into(), None)));
        assert_eq!(keys("aws_access_key_id=A\naws_secret_access_key=S"), Ok(("A".into(), "S".into(), None)));
        for bad in [
            "",
            "AKIA",
            "[default]",
            r#"{"AccessKeyId":"A"}"#,
            "aws_access_key_id=A\n[b]\naws_secret_access_key=S",
        ] {
            assert_eq!(keys(bad), Err(Unusable::Aws), "{bad}");
        }
    }

    #[test]
    fn a_subscriptions_token_is_recognised_and_never_repeated() {
        for given in
            ["sk-ant-oat01-canary", "{\"token\":\"sk-ant-oat01-canary\"}", "Bearer:sk-ant-oat01-canary"]
        {
            let error = text(given).unwrap_err();
            assert_eq!(error, Unusable::Subscription);
            assert!(!format!("{error} {error:?}").contains("canary"));
        }
    }
}
