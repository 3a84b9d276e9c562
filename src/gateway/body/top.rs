//! A body's top level: which fields it may have, and what each adds to what is known. A field whose bytes were read
//! before is not read again ([`Fragment`]).

use std::borrow::Cow;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Error, IgnoredAny};
use serde_json::value::RawValue;

use super::read::{
    CONTEXT_EDITS, CacheControl, Edits, McpServer, Messages, Names, Of, Parts, SearchTool, Text, WANTED_MAX,
    inner, shown,
};
use super::recall::Fragment;
use super::shape::{Media, ShapeBuilder};
use super::tools::Tools;
use super::{BodyError, Wanted};

/// Fields that may stand in a request. The API's others store (`container`) or are not known.
const FIELDS: &[&str] = &[
    "cache_control",
    "context_management",
    "inference_geo",
    "max_tokens",
    "mcp_servers",
    "messages",
    "metadata",
    "model",
    "output_config",
    "output_format",
    "service_tier",
    "speed",
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
/// Fields that change the price, with the one value that does not. The CLI sends none of them.
const PRICED: [(&str, &str); 3] =
    [("inference_geo", "global"), ("service_tier", "standard_only"), ("speed", "standard")];

/// A body's top level.
#[derive(Default)]
pub(super) struct Top<'a> {
    pub(super) model: Option<Cow<'a, str>>,
    pub(super) max_tokens: Option<&'a RawValue>,
    pub(super) thinking: Option<&'a RawValue>,
    pub(super) context: Option<&'a RawValue>,
    pub(super) stream: bool,
    pub(super) long_cache: bool,
    /// A tool of `TOOLSET` is there.
    pub(super) toolsets: bool,
    pub(super) web_searches: Vec<SearchTool<'a>>,
    pub(super) wanted: Vec<Wanted>,
    pub(super) shape: ShapeBuilder,
    pub(super) refused: Option<BodyError>,
    /// Parts that may be known by their bytes from now on.
    pub(super) fresh: Vec<Fragment>,
    pub(super) media: Media,
}

/// Reads a body; of fields that are in `known`, byte for byte, only their length.
pub(super) fn read<'a>(body: &'a [u8], known: &[Arc<Fragment>]) -> Result<Top<'a>, serde_json::Error> {
    let mut from = Cursor { body, at: 0, unchecked_from: 0 };
    let (mut top, mut names) = (Top::default(), Names::default());
    from.expect(b'{')?;
    let mut more = !from.take(b'}');
    while more {
        let Text(key) = from.value::<Text<'a>>()?;
        names.add::<serde_json::Error>(key.clone())?;
        from.expect(b':')?;
        match FIELDS.iter().find(|field| **field == key) {
            Some(field @ (&"system" | &"tools")) => top.part(field, &mut from, known)?,
            Some(field) => top.field(field, &mut from)?,
            None => {
                top.refused.get_or_insert(BodyError::Field(shown(&key)));
                from.value::<IgnoredAny>()?;
            }
        }
        more = from.take(b',');
        if !more {
            from.expect(b'}')?;
        }
    }
    from.end()?;
    Ok(top)
}

/// A place in a body.
struct Cursor<'a> {
    body: &'a [u8],
    at: usize,
    /// All bytes before this one are known to be text (UTF-8): they were checked here, or belong to a part that was
    /// read before. Serde alone does not make sure of that: it passes strings that nobody wants without a look.
    unchecked_from: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a [u8] {
        self.body.get(self.at..).unwrap_or_default()
    }

    /// Checks that all that was passed since the last check is text.
    fn check(&mut self) -> Result<&'a str, serde_json::Error> {
        let passed = self.body.get(self.unchecked_from..self.at).unwrap_or_default();
        self.unchecked_from = self.at;
        std::str::from_utf8(passed).map_err(serde_json::Error::custom)
    }

    /// Passes a known part.
    fn pass(&mut self, bytes: usize) -> Result<(), serde_json::Error> {
        self.check()?;
        self.at += bytes;
        self.unchecked_from = self.at;
        Ok(())
    }

    fn skip_spaces(&mut self) {
        let space = |byte: &u8| matches!(byte, b' ' | b'\n' | b'\r' | b'\t');
        self.at += self.rest().iter().take_while(|byte| space(byte)).count();
    }

    /// Whether this is the next thing; then it is passed.
    fn take(&mut self, byte: u8) -> bool {
        self.skip_spaces();
        let there = self.rest().first() == Some(&byte);
        self.at += usize::from(there);
        there
    }

    fn expect(&mut self, byte: u8) -> Result<(), serde_json::Error> {
        if self.take(byte) {
            return Ok(());
        }
        let (expected, at) = (char::from(byte), self.at);
        Err(serde_json::Error::custom(format_args!("expected `{expected}` at byte {at}")))
    }

    fn end(&mut self) -> Result<(), serde_json::Error> {
        self.skip_spaces();
        if self.rest().is_empty() {
            return self.check().map(drop);
        }
        Err(serde_json::Error::custom(format_args!(
            "more than one value: the second begins at byte {}",
            self.at
        )))
    }

    fn value<T: Deserialize<'a>>(&mut self) -> Result<T, serde_json::Error> {
        self.seeded(std::marker::PhantomData)
    }

    fn seeded<S: DeserializeSeed<'a>>(&mut self, seed: S) -> Result<S::Value, serde_json::Error> {
        let mut from = serde_json::Deserializer::from_slice(self.rest());
        let value = seed.deserialize(&mut from)?;
        self.at += from.into_iter::<IgnoredAny>().byte_offset();
        Ok(value)
    }
}

impl Top<'_> {
    pub(super) fn want(&mut self, wanted: Wanted) {
        if self.wanted.len() < WANTED_MAX {
            self.wanted.push(wanted);
        } else {
            let many = format!("more than {WANTED_MAX} remote sources and tools");
            self.refused.get_or_insert(BodyError::Malformed(many));
        }
    }

    /// What a part told, as if it had been read right here.
    fn add(&mut self, part: Self) {
        self.long_cache |= part.long_cache;
        self.toolsets |= part.toolsets;
        self.shape.add(&part.shape);
        part.wanted.into_iter().for_each(|wanted| self.want(wanted));
        self.refused = self.refused.take().or(part.refused);
    }
}

impl<'de> Top<'de> {
    /// A field that conversations repeat.
    fn part(
        &mut self,
        field: &'static str,
        from: &mut Cursor<'de>,
        known: &[Arc<Fragment>],
    ) -> Result<(), serde_json::Error> {
        from.skip_spaces();
        if let Some(fragment) = known.iter().find(|fragment| fragment.begins(field, from.rest())) {
            from.pass(fragment.bytes())?;
            self.long_cache |= fragment.long_cache;
            self.shape.add(&fragment.shape);
            return Ok(());
        }
        from.check()?;
        let mut part = Top::default();
        match field {
            "system" => from.seeded(Parts { top: &mut part, of: Of::System, depth: 0 })?,
            _ => from.seeded(Tools { top: &mut part })?,
        }
        let raw = from.check()?;
        let plain = part.wanted.is_empty() && part.refused.is_none() && !part.toolsets;
        if plain && part.web_searches.is_empty() {
            self.fresh.extend(Fragment::new(field, raw, part.long_cache, &part.shape));
        }
        self.web_searches.append(&mut part.web_searches);
        self.add(part);
        Ok(())
    }

    fn field(&mut self, field: &'static str, from: &mut Cursor<'de>) -> Result<(), serde_json::Error> {
        match field {
            "model" => self.model = Some(from.value::<Text<'de>>()?.0),
            "max_tokens" => self.max_tokens = Some(from.value()?),
            "thinking" => self.thinking = Some(from.value()?),
            "stream" => self.stream = from.value::<Option<bool>>()?.unwrap_or(false),
            "cache_control" => {
                self.long_cache |= from.value::<Option<CacheControl<'de>>>()?.is_some_and(|c| c.is_long());
            }
            "messages" => from.seeded(Messages { top: self })?,
            "mcp_servers" => {
                let raw: &RawValue = from.value()?;
                self.shape.setting(2, raw.get());
                for server in
                    inner::<Option<Vec<McpServer<'de>>>, serde_json::Error>(raw)?.into_iter().flatten()
                {
                    self.want(Wanted::McpServer(server.url.into_owned()));
                }
            }
            "context_management" => {
                let raw: &RawValue = from.value()?;
                self.shape.setting(3, raw.get());
                self.context = Some(raw);
                let edits =
                    inner::<Option<Edits<'de>>, serde_json::Error>(raw)?.and_then(|edits| edits.edits);
                for edit in edits.into_iter().flatten() {
                    if !CONTEXT_EDITS.iter().any(|prefix| edit.kind.starts_with(prefix)) {
                        self.refused.get_or_insert(BodyError::ContextEdit(shown(&edit.kind)));
                    }
                }
            }
            "output_config" => self.shape.setting(4, from.value::<&RawValue>()?.get()),
            "output_format" => self.shape.setting(5, from.value::<&RawValue>()?.get()),
            "tool_choice" => self.shape.setting(6, from.value::<&RawValue>()?.get()),
            _ => {
                let raw: &RawValue = from.value()?;
                if let Some((field, free)) = PRICED.iter().find(|(name, _)| *name == field) {
                    let value = inner::<Option<Text<'de>>, serde_json::Error>(raw)?;
                    if let Some(Text(value)) = value.filter(|value| value.0 != *free) {
                        self.refused.get_or_insert(BodyError::Priced { field, value: shown(&value) });
                    }
                }
            }
        }
        Ok(())
    }
}
