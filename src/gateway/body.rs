//! What the gateway must know of a request body, and the few places it may change in it. Pure. The body comes
//! from a cell: anything that would make the provider fetch, store or run something, or bill it outside the
//! token usage, is refused, and so is any field that is not known to be harmless.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::pricing::CacheWrite;

/// Fields that may stand in a request. The API's others fetch (`mcp_servers`), store (`container`), or change
/// the price (`speed`, `inference_geo`).
const FIELDS: &[&str] = &[
    "cache_control",
    "context_management",
    "max_tokens",
    "messages",
    "metadata",
    "model",
    "output_config",
    "output_format",
    "service_tier",
    "stop_sequences",
    "stream",
    "system",
    "temperature",
    "thinking",
    "tool_choice",
    "tools",
    "top_k",
    "top_p",
];
/// Tool types that the client runs; one without a type is such a tool too. All others run at the provider.
const CLIENT_TOOLS: &[&str] = &["bash_", "text_editor_", "computer_", "memory_", "tool_search_tool_"];
/// Edits of the context that cost nothing. (A compaction is billed apart from the usage.)
const CONTEXT_EDITS: &[&str] = &["clear_thinking_", "clear_tool_uses_"];
/// Most that one image costs, in tokens; its base64 text is not what is billed.
const IMAGE_TOKENS_MAX: u64 = 5_000;
/// Bytes of request text that make one token, at the least, on average. An estimate: prose has four or more,
/// dense text fewer. A bound needs the provider's count_tokens.
const BYTES_PER_TOKEN: u64 = 3;
/// Tokens that the provider adds for tools and the like.
const INPUT_TOKENS_BASE: u64 = 1_024;
/// The smallest thinking budget that the API takes.
const THINKING_TOKENS_MIN: u64 = 1_024;

/// Why a body is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// No JSON object, a field twice, or a field of the wrong type.
    #[error("the request body is not a valid JSON request: {0}")]
    Malformed(String),
    /// A field that is not on the list.
    #[error("the request field {0:?} is not allowed here")]
    Field(String),
    /// A tool that the provider runs.
    #[error("the tool type {0:?} is run by the provider, which is not allowed here")]
    ServerTool(String),
    /// Content that the provider is to fetch or has stored.
    #[error("a content source of type {0:?} is not allowed here: send the content itself")]
    RemoteSource(String),
    /// An edit of the context that is billed apart.
    #[error("the context edit {0:?} is not allowed here")]
    ContextEdit(String),
}

/// What is known of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BodyFacts {
    /// The model asked for.
    pub model: String,
    /// `max_tokens`, where given.
    pub output_tokens_max: Option<u64>,
    /// Estimate of the input, see `BYTES_PER_TOKEN`.
    pub input_tokens_estimate: u64,
    /// The longest-lived cache it asks for.
    pub cache_write: CacheWrite,
    /// Whether the answer is to be streamed.
    pub stream: bool,
    max_tokens_at: Option<Range<usize>>,
    thinking_at: Option<Range<usize>>,
    thinking_budget: Option<u64>,
}

impl BodyFacts {
    /// Reads a body in one pass, without copying it.
    ///
    /// # Errors
    /// See [`BodyError`].
    pub fn read(body: &[u8]) -> Result<Self, BodyError> {
        let malformed = |error: serde_json::Error| BodyError::Malformed(error.to_string());
        let top: Top<'_> = serde_json::from_slice(body).map_err(malformed)?;
        if let Some(refused) = top.refused {
            return Err(refused);
        }
        let at = |raw: &RawValue| {
            let start = raw.get().as_ptr() as usize - body.as_ptr() as usize;
            start..start + raw.get().len()
        };
        let number = |raw: &RawValue| {
            serde_json::from_str::<u64>(raw.get())
                .map_err(|_| BodyError::Malformed("max_tokens: expected a whole number".to_owned()))
        };
        let thinking: Option<Option<Thinking>> =
            top.thinking.map(|raw| serde_json::from_str(raw.get())).transpose().map_err(malformed)?;
        let thinking = thinking.flatten().filter(|thinking| thinking.kind == "enabled");
        let text_bytes = (body.len() as u64).saturating_sub(top.image_bytes);
        let image_tokens = top.images.saturating_mul(IMAGE_TOKENS_MAX);
        Ok(Self {
            model: top
                .model
                .ok_or_else(|| BodyError::Malformed("model: field required".to_owned()))?
                .into_owned(),
            output_tokens_max: top.max_tokens.map(number).transpose()?,
            input_tokens_estimate: text_bytes.div_ceil(BYTES_PER_TOKEN) + INPUT_TOKENS_BASE + image_tokens,
            cache_write: if top.long_cache { CacheWrite::OneHour } else { CacheWrite::FiveMinutes },
            stream: top.stream,
            max_tokens_at: top.max_tokens.map(at),
            thinking_at: top.thinking.map(at),
            thinking_budget: thinking.and_then(|thinking| thinking.budget_tokens),
        })
    }

    /// `body` with `max_tokens` lowered to `tokens`; a thinking budget that no longer fits is halved to fit,
    /// or switched off where half is below what the API takes. All other bytes stay as they are.
    pub fn with_output_tokens(&self, body: &Bytes, tokens: u64) -> Bytes {
        let mut edits: Vec<(&Range<usize>, String)> = Vec::new();
        if let Some(at) = &self.max_tokens_at {
            edits.push((at, tokens.to_string()));
        }
        if let (Some(at), Some(budget)) = (&self.thinking_at, self.thinking_budget)
            && budget >= tokens
        {
            let half = tokens / 2;
            let enabled = format!("{{\"type\":\"enabled\",\"budget_tokens\":{half}}}");
            let fits = half >= THINKING_TOKENS_MIN;
            edits.push((at, if fits { enabled } else { "{\"type\":\"disabled\"}".to_owned() }));
        }
        edits.sort_by_key(|(at, _)| at.start);
        let mut out = BytesMut::with_capacity(body.len() + 64);
        let mut from = 0;
        for (at, text) in edits {
            out.extend_from_slice(&body[from..at.start]);
            out.extend_from_slice(text.as_bytes());
            from = at.end;
        }
        out.extend_from_slice(&body[from..]);
        out.freeze()
    }
}

#[derive(Deserialize)]
struct Thinking<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    budget_tokens: Option<u64>,
}

/// A string that borrows where it can.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Default)]
struct Top<'a> {
    model: Option<Cow<'a, str>>,
    max_tokens: Option<&'a RawValue>,
    thinking: Option<&'a RawValue>,
    stream: bool,
    long_cache: bool,
    images: u64,
    image_bytes: u64,
    refused: Option<BodyError>,
}

impl<'de> Deserialize<'de> for Top<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(TopVisitor)
    }
}

struct TopVisitor;

impl<'de> Visitor<'de> for TopVisitor {
    type Value = Top<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Top<'de>, A::Error> {
        let mut top = Top::default();
        let mut seen = 0u32;
        while let Some(Text(key)) = map.next_key::<Text<'de>>()? {
            let Some(index) = FIELDS.iter().position(|field| *field == key) else {
                top.refused.get_or_insert(BodyError::Field(shown(&key)));
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if seen & (1 << index) != 0 {
                return Err(serde::de::Error::custom(format_args!("the field {key:?} stands twice")));
            }
            seen |= 1 << index;
            match FIELDS[index] {
                "model" => top.model = Some(map.next_value::<Text<'de>>()?.0),
                "max_tokens" => top.max_tokens = Some(map.next_value()?),
                "thinking" => top.thinking = Some(map.next_value()?),
                "stream" => top.stream = map.next_value::<Option<bool>>()?.unwrap_or(false),
                "cache_control" => {
                    top.long_cache |=
                        map.next_value::<Option<CacheControl<'de>>>()?.is_some_and(|c| c.is_long())
                }
                "messages" | "system" => map.next_value_seed(Content { top: &mut top })?,
                "tools" => {
                    for tool in map.next_value::<Option<Vec<Typed<'de>>>>()?.into_iter().flatten() {
                        tool.check(&mut top, CLIENT_TOOLS, BodyError::ServerTool);
                    }
                }
                "context_management" => {
                    let edits = map.next_value::<Option<Edits<'de>>>()?.and_then(|edits| edits.edits);
                    for edit in edits.into_iter().flatten() {
                        edit.check(&mut top, CONTEXT_EDITS, BodyError::ContextEdit);
                    }
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(top)
    }
}

#[derive(Deserialize)]
struct Edits<'a> {
    #[serde(borrow)]
    edits: Option<Vec<Typed<'a>>>,
}

#[derive(Deserialize)]
struct Typed<'a> {
    #[serde(rename = "type", borrow)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow)]
    cache_control: Option<CacheControl<'a>>,
}

#[derive(Deserialize)]
struct CacheControl<'a> {
    #[serde(borrow)]
    ttl: Option<Cow<'a, str>>,
}

impl CacheControl<'_> {
    /// Longer than the default of five minutes, as far as we know.
    fn is_long(&self) -> bool {
        self.ttl.as_deref().is_some_and(|ttl| ttl != "5m")
    }
}

impl Typed<'_> {
    fn check(&self, top: &mut Top<'_>, allowed: &[&str], error: fn(String) -> BodyError) {
        top.long_cache |= self.cache_control.as_ref().is_some_and(CacheControl::is_long);
        let Some(kind) = self.kind.as_deref().filter(|kind| *kind != "custom") else { return };
        if !allowed.iter().any(|prefix| kind.starts_with(prefix)) {
            top.refused.get_or_insert(error(shown(kind)));
        }
    }
}

fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

/// Walks messages and their content blocks; text is skipped, tool inputs are not looked into.
struct Content<'t, 'a> {
    top: &'t mut Top<'a>,
}

impl<'de> DeserializeSeed<'de> for Content<'_, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Content<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text or a list of blocks")
    }

    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Item { top: &mut *self.top })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        Item { top: self.top }.visit_map(map)
    }
}

/// A message or a content block: `type`, `content`, `source`, `file_id` and `cache_control` matter.
struct Item<'t, 'a> {
    top: &'t mut Top<'a>,
}

impl<'de> DeserializeSeed<'de> for Item<'_, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Item<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message or a content block")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut kind, mut source, mut seen) = (None, None, 0u8);
        while let Some(Text(key)) = map.next_key::<Text<'de>>()? {
            let bit = match key.as_ref() {
                "type" => 1,
                "content" => 2,
                "source" => 4,
                _ => 0,
            };
            if seen & bit != 0 {
                return Err(serde::de::Error::custom(format_args!(
                    "the field {key:?} stands twice in a block"
                )));
            }
            seen |= bit;
            match key.as_ref() {
                "type" => kind = Some(map.next_value::<Text<'de>>()?.0),
                "content" => map.next_value_seed(Content { top: &mut *self.top })?,
                "source" => source = Some(map.next_value_seed(Source { top: &mut *self.top })?),
                "cache_control" => {
                    let control = map.next_value::<Option<CacheControl<'de>>>()?;
                    self.top.long_cache |= control.is_some_and(|control| control.is_long());
                }
                "file_id" => {
                    self.top.refused.get_or_insert(BodyError::RemoteSource("file".to_owned()));
                    map.next_value::<IgnoredAny>()?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        let bytes: u64 = source.unwrap_or(0);
        if kind.as_deref() == Some("image") && bytes > 0 {
            self.top.images += 1;
            self.top.image_bytes += bytes;
        }
        Ok(())
    }
}

/// The source of an image or document; gives the bytes of its data. A source that is plain text (search
/// results have such) is not followed by the provider.
struct Source<'t, 'a> {
    top: &'t mut Top<'a>,
}

impl<'de> DeserializeSeed<'de> for Source<'_, '_> {
    type Value = u64;
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<u64, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Source<'_, '_> {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a source")
    }

    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<u64, E> {
        Ok(0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<u64, A::Error> {
        let (mut kind, mut bytes) = (None, 0);
        while let Some(Text(key)) = map.next_key::<Text<'de>>()? {
            match key.as_ref() {
                "type" if kind.is_some() => {
                    return Err(serde::de::Error::custom("the field \"type\" stands twice in a source"));
                }
                "type" => kind = Some(map.next_value::<Text<'de>>()?.0),
                "data" => bytes = map.next_value::<Text<'de>>()?.0.len() as u64,
                "content" => map.next_value_seed(Content { top: &mut *self.top })?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        let kind = kind.unwrap_or_default();
        if !matches!(kind.as_ref(), "base64" | "text" | "content") {
            self.top.refused.get_or_insert(BodyError::RemoteSource(shown(&kind)));
        }
        Ok(if kind == "base64" { bytes } else { 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(body: &str) -> Result<BodyFacts, BodyError> {
        BodyFacts::read(body.as_bytes())
    }

    #[test]
    fn a_request_of_the_cli_is_understood() {
        let body = r#"{"model":"m","max_tokens":32000,"stream":true,"system":[{"type":"text","text":"s"}],
            "thinking":{"budget_tokens":31999,"type":"enabled"},"context_management":{"edits":[{"type":"clear_thinking_20251015","keep":"all"}]},
            "tools":[{"name":"Bash","input_schema":{"properties":{"type":{"type":"url"}}}}],
            "messages":[{"role":"user","content":"hi"},{"role":"assistant","content":[{"type":"tool_use","input":{"source":{"type":"url"}}}]},
            {"role":"user","content":[{"type":"tool_result","content":[{"type":"image","source":{"type":"base64","data":"AAAA"}}]}]}]}"#;
        let facts = read(body).unwrap();
        assert_eq!((facts.model.as_str(), facts.output_tokens_max), ("m", Some(32_000)));
        let base = INPUT_TOKENS_BASE + IMAGE_TOKENS_MAX;
        assert_eq!(facts.input_tokens_estimate, (body.len() as u64 - 4).div_ceil(3) + base);
        let text = |tokens| {
            String::from_utf8(
                facts.with_output_tokens(&Bytes::copy_from_slice(body.as_bytes()), tokens).to_vec(),
            )
            .unwrap()
        };
        let changed = body.replace("\"max_tokens\":32000", "\"max_tokens\":4096").replace(
            r#"{"budget_tokens":31999,"type":"enabled"}"#,
            r#"{"type":"enabled","budget_tokens":2048}"#,
        );
        assert_eq!(text(4096), changed);
        assert!(text(1500).contains(r#""thinking":{"type":"disabled"}"#));
        assert!(text(32_000).contains("31999"), "a budget that fits stays");
    }

    #[test]
    fn what_the_provider_would_fetch_store_or_run_is_refused() {
        let with = |more: &str| read(&format!(r#"{{"model":"m","max_tokens":1,{more}}}"#));
        let block = |block: &str| with(&format!(r#""messages":[{{"role":"user","content":[{block}]}}]"#));
        assert!(matches!(with(r#""mcp_servers":[]"#), Err(BodyError::Field(_))));
        assert!(matches!(with(r#""m\u0063p_servers":[]"#), Err(BodyError::Field(_))));
        assert!(matches!(with(r#""speed":"fast""#), Err(BodyError::Field(_))));
        for tool in ["web_search_20250305", "web_fetch_20250910", "code_execution_20250825", "mcp_toolset"] {
            let refused = with(&format!(r#""tools":[{{"name":"a"}},{{"\u0074ype":"{tool}"}}]"#));
            assert!(matches!(refused, Err(BodyError::ServerTool(_))), "{tool}");
        }
        for source in [r#"{"type":"url","url":"http://x"}"#, r#"{"type":"file","file_id":"f"}"#, "{}"] {
            let image = format!(r#"{{"type":"image","source":{source}}}"#);
            for nested in [
                image.clone(),
                format!(r#"{{"type":"tool_result","content":[{image}]}}"#),
                format!(r#"{{"type":"document","source":{{"type":"content","content":[{image}]}}}}"#),
            ] {
                assert!(matches!(block(&nested), Err(BodyError::RemoteSource(_))), "{nested}");
            }
        }
        assert!(matches!(
            block(r#"{"type":"container_upload","file_id":"f"}"#),
            Err(BodyError::RemoteSource(_))
        ));
        let edits = r#""context_management":{"edits":[{"type":"compact_20260112"}]}"#;
        assert!(matches!(with(edits), Err(BodyError::ContextEdit(_))));
    }

    #[test]
    fn a_one_hour_cache_is_seen_wherever_it_is_asked_for() {
        let cache = |more: &str| read(&format!(r#"{{"model":"m",{more}}}"#)).unwrap().cache_write;
        let long = r#""cache_control":{"type":"ephemeral","ttl":"1h"}"#;
        let block = format!(r#"{{"type":"text","text":"t",{long}}}"#);
        for body in [
            long.to_owned(),
            long.replace("1h", "\\u0031h"),
            format!(r#""system":[{block}]"#),
            format!(r#""tools":[{{"name":"a",{long}}}]"#),
            format!(r#""messages":[{{"role":"user","content":[{block}]}}]"#),
            format!(
                r#""messages":[{{"role":"user","content":[{{"type":"tool_result","content":[{block}]}}]}}]"#
            ),
        ] {
            assert_eq!(cache(&body), CacheWrite::OneHour, "{body}");
            assert_eq!(
                cache(&body.replace("\"1h\"", "\"5m\"").replace("\\u0031h", "5m")),
                CacheWrite::FiveMinutes,
                "{body}"
            );
        }
    }

    #[test]
    fn fields_that_stand_twice_and_other_garbage_are_malformed() {
        for body in [
            "",
            "[]",
            "{}",
            "{\"model\":\"a\",\"model\":\"b\"}",
            r#"{"model":"a","m\u006fdel":"b"}"#,
            "{\"model\":\"a\"} x",
            "{\"model\":1}",
            "{\"model\":\"a\",\"max_tokens\":-1}",
            "{\"model\":\"a\",\"max_tokens\":1.5}",
            r#"{"model":"a","thinking":{"type":"enabled","type":"disabled"}}"#,
            r#"{"model":"a","messages":[{"content":"a","content":[]}]}"#,
            r#"{"model":"a","messages":[{"content":[{"type":"image","source":{"type":"base64","type":"url"}}]}]}"#,
        ] {
            assert!(matches!(read(body), Err(BodyError::Malformed(_))), "{body}");
        }
        let deep = format!(
            "{{\"model\":\"a\",\"messages\":{}{}}}",
            "[{\"content\":".repeat(5000),
            "}]".repeat(5000)
        );
        assert!(matches!(read(&deep), Err(BodyError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = BodyFacts::read(&bytes);
        }

        #[test]
        fn a_lowered_body_is_read_back_lowered(tokens in 1u64..32_000, spaces in " {0,3}") {
            let body = format!("{{{spaces}\"max_tokens\"{spaces}:{spaces}32000{spaces},\"thinking\":{spaces}\
                {{\"type\":\"enabled\",\"budget_tokens\":31999}}{spaces},\"model\":\"m\"}}");
            let facts = read(&body).unwrap();
            let lowered = BodyFacts::read(&facts.with_output_tokens(&Bytes::from(body), tokens)).unwrap();
            prop_assert_eq!(lowered.output_tokens_max, Some(tokens));
            prop_assert!(lowered.thinking_budget.is_none_or(|budget| budget < tokens));
        }
    }
}
