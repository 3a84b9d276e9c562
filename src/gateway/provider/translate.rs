//! Between a provider's request body and the one that is judged. Everything that the gateway decides, it decides on
//! a request of the vendor's own API: what a provider spells otherwise is put into that form on the way in
//! ([`inbound`]) and back on the way out ([`outbound`]). Pure; one pass over the top level, values are not touched.

use std::borrow::Cow;
use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// Most beta names in a body.
const BETAS_MAX: usize = 64;
/// Fields that the path or a header says for these providers, and a body must not.
const VERSION: &str = "anthropic_version";
const BETA: &str = "anthropic_beta";

/// Why a body cannot be put into the vendor's form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::gateway) enum TranslateError {
    /// No JSON object.
    #[error("the request body is not a valid JSON request: {0}")]
    Malformed(String),
    /// A field twice, where only one of them would be looked at.
    #[error("the field {0:?} stands twice")]
    Twice(String),
    /// A field that the path says.
    #[error("the request field {0:?} is said by the path and must not stand in the body")]
    InPath(&'static str),
    /// The version or the betas are of another type or value.
    #[error("the request field {0:?} is not what this provider takes")]
    Field(&'static str),
}

/// What a provider's path says of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Said<'a> {
    /// The plain name of the model.
    pub(super) model: &'a str,
    /// Whether the answer is a stream; `None` where the body says it.
    pub(super) stream: Option<bool>,
    /// The only version that the body may name.
    pub(super) version: &'static str,
}

/// A body with its model in the body, and what was taken out of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Inbound {
    pub(super) body: Bytes,
    /// The names in `anthropic_beta`.
    pub(super) betas: Vec<String>,
}

/// Puts a body without a model into the vendor's form.
pub(super) fn inbound(body: &[u8], said: Said<'_>) -> Result<Inbound, TranslateError> {
    let mut betas = Vec::new();
    let mut fields = Fields::read(body)?;
    if fields.get("model").is_some() {
        return Err(TranslateError::InPath("model"));
    }
    if let Some(version) = fields.take(VERSION)
        && serde_json::from_str::<String>(version).ok().as_deref() != Some(said.version)
    {
        return Err(TranslateError::Field(VERSION));
    }
    if let Some(list) = fields.take(BETA) {
        betas = serde_json::from_str(list).map_err(|_| TranslateError::Field(BETA))?;
        let good =
            |name: &String| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if betas.len() > BETAS_MAX || !betas.iter().all(good) {
            return Err(TranslateError::Field(BETA));
        }
    }
    let mut add = vec![("model", quoted(said.model))];
    if let Some(stream) = said.stream {
        if fields.get("stream").is_some() {
            return Err(TranslateError::InPath("stream"));
        }
        add.push(("stream", stream.to_string()));
    }
    Ok(Inbound { body: fields.write(&add), betas })
}

/// The body with another model, for providers that take it in the body. `None` where it stays as it is.
pub(super) fn with_model(
    body: &[u8],
    rename: impl FnOnce(&str) -> Option<String>,
) -> Result<Option<Bytes>, TranslateError> {
    let mut fields = Fields::read(body)?;
    let Some(model) = fields.get("model").and_then(|raw| serde_json::from_str::<String>(raw).ok()) else {
        // The inspection of the body says what is wrong with it.
        return Ok(None);
    };
    Ok(match rename(&model) {
        Some(name) if name != model => {
            fields.take("model");
            Some(fields.write(&[("model", quoted(&name))]))
        }
        _ => None,
    })
}

/// A judged body in the provider's form: without what the path says, with its version and betas.
pub(super) fn outbound(
    body: &[u8],
    without: &[&str],
    version: &str,
    betas: &[String],
) -> Result<Bytes, TranslateError> {
    let mut fields = Fields::read(body)?;
    for name in without {
        fields.take(name);
    }
    let mut add = vec![(VERSION, quoted(version))];
    if !betas.is_empty() {
        let betas: Vec<String> = betas.iter().map(|name| quoted(name)).collect();
        add.push((BETA, format!("[{}]", betas.join(","))));
    }
    Ok(fields.write(&add))
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The fields of an object, each once, in order, values as they stand.
struct Fields<'a>(Vec<(Cow<'a, str>, &'a str)>);

impl<'a> Fields<'a> {
    /// Most fields; the API has some thirty.
    const FIELDS_MAX: usize = 256;

    fn read(body: &'a [u8]) -> Result<Self, TranslateError> {
        let malformed = |error: serde_json::Error| TranslateError::Malformed(error.to_string());
        let fields: Self = serde_json::from_slice(body).map_err(malformed)?;
        for (index, (name, _)) in fields.0.iter().enumerate() {
            if fields.0[..index].iter().any(|(other, _)| other == name) {
                return Err(TranslateError::Twice(name.chars().take(64).collect()));
            }
        }
        Ok(fields)
    }

    fn get(&self, name: &str) -> Option<&'a str> {
        self.0.iter().find(|(field, _)| field == name).map(|(_, raw)| *raw)
    }

    fn take(&mut self, name: &str) -> Option<&'a str> {
        let at = self.0.iter().position(|(field, _)| field == name)?;
        Some(self.0.remove(at).1)
    }

    fn write(&self, first: &[(&str, String)]) -> Bytes {
        let size: usize = self.0.iter().map(|(name, raw)| name.len() + raw.len() + 8).sum();
        let mut out = BytesMut::with_capacity(size + 256);
        let mut put = |name: &str, raw: &str| {
            out.put_u8(if out.is_empty() { b'{' } else { b',' });
            out.put_slice(quoted(name).as_bytes());
            out.put_u8(b':');
            out.put_slice(raw.as_bytes());
        };
        first.iter().for_each(|(name, raw)| put(name, raw));
        self.0.iter().for_each(|(name, raw)| put(name, raw));
        if out.is_empty() {
            out.put_u8(b'{');
        }
        out.put_u8(b'}');
        out.freeze()
    }
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

/// A string that borrows where it can.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
        let mut fields = Vec::new();
        while let Some((Text(name), raw)) = map.next_entry::<Text<'de>, &'de RawValue>()? {
            if fields.len() == Fields::FIELDS_MAX {
                return Err(serde::de::Error::custom("too many fields"));
            }
            fields.push((name, raw.get()));
        }
        Ok(Fields(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAID: Said<'static> = Said { model: "m", stream: Some(true), version: "bedrock-2023-05-31" };

    #[test]
    fn a_body_comes_back_as_it_was() {
        let body = br#"{"messages": [ 1 ],"max_tokens":9,"anthropic_beta":["a-1"],"anthropic_version":"bedrock-2023-05-31"}"#;
        let judged = inbound(body, SAID).unwrap();
        assert_eq!(&judged.body[..], br#"{"model":"m","stream":true,"messages":[ 1 ],"max_tokens":9}"#);
        assert_eq!(judged.betas, ["a-1"]);
        let sent = outbound(&judged.body, &["model", "stream"], SAID.version, &judged.betas).unwrap();
        let (sent, came): (serde_json::Value, serde_json::Value) =
            (serde_json::from_slice(&sent).unwrap(), serde_json::from_slice(body).unwrap());
        assert_eq!(sent, came);
    }

    #[test]
    fn what_the_path_says_must_not_be_said_again_and_nothing_twice() {
        for (body, wanted) in [
            (r#"{"model":"x"}"#, TranslateError::InPath("model")),
            (r#"{"stream":false}"#, TranslateError::InPath("stream")),
            (r#"{"a":1,"\u0061":2}"#, TranslateError::Twice("a".into())),
            (r#"{"anthropic_version":"2099"}"#, TranslateError::Field(VERSION)),
            (r#"{"anthropic_beta":"a"}"#, TranslateError::Field(BETA)),
            (r#"{"anthropic_beta":["a,b"]}"#, TranslateError::Field(BETA)),
        ] {
            assert_eq!(inbound(body.as_bytes(), SAID), Err(wanted), "{body}");
        }
        assert!(matches!(inbound(b"[]", SAID), Err(TranslateError::Malformed(_))));
        assert!(matches!(inbound(b"{\"a\":}", SAID), Err(TranslateError::Malformed(_))));
    }

    #[test]
    fn only_another_model_changes_a_body() {
        let renamed = |body: &str, to: &str| with_model(body.as_bytes(), |_| Some(to.to_owned())).unwrap();
        assert_eq!(renamed(r#"{"model":"m"}"#, "m"), None);
        assert_eq!(renamed(r#"{"a":1}"#, "m"), None);
        assert_eq!(renamed(r#"{"a":1,"model":"m"}"#, "d\"x").unwrap(), r#"{"model":"d\"x","a":1}"#);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(body in prop::collection::vec(any::<u8>(), 0..200), text in "[\\[\\]{}\",:a-e0-9]{0,80}") {
            for bytes in [&body[..], text.as_bytes()] {
                if let Ok(judged) = inbound(bytes, SAID) {
                    prop_assert!(outbound(&judged.body, &["model"], "v", &judged.betas).is_ok());
                }
            }
        }
    }
}
