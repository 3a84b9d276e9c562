//! The walk over the fields of a request body ([`super::top`]): one pass, no copies of text. Every object it looks
//! into is refused when a field stands twice in it, however the names are spelled: the provider might take the other
//! one.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::shape::{Media, Piece};
use super::top::Top;
use super::{BodyError, Wanted};

/// Edits of the context that cost nothing. (A compaction is billed apart from the usage.)
pub(super) const CONTEXT_EDITS: &[&str] = &["clear_thinking_", "clear_tool_uses_"];
/// How deep blocks may stand in blocks: the API has two levels, and each is read once more here.
const DEPTH_MAX: u8 = 8;
/// Most fields of one object.
const FIELDS_MAX: usize = 64;
/// Names of an object's fields that are kept without an allocation; blocks and tools have fewer.
const NAMES_INLINE: usize = 8;
/// Most things in one body that need the policy's word.
pub(super) const WANTED_MAX: usize = 256;

/// A web search tool.
pub(super) struct SearchTool<'a> {
    pub(super) kind: &'a RawValue,
    pub(super) max_uses: Option<&'a RawValue>,
}

/// The field `thinking`.
#[derive(Deserialize)]
pub(super) struct Thinking<'a> {
    #[serde(rename = "type", borrow)]
    pub(super) kind: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) budget_tokens: Option<&'a RawValue>,
}

/// A string that borrows where it can.
#[derive(Deserialize)]
pub(super) struct Text<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);

/// The names of an object's fields so far; the first few without an allocation.
pub(super) struct Names<'a> {
    few: [Cow<'a, str>; NAMES_INLINE],
    count: usize,
    more: Vec<Cow<'a, str>>,
}

impl Default for Names<'_> {
    fn default() -> Self {
        Self { few: [const { Cow::Borrowed("") }; NAMES_INLINE], count: 0, more: Vec::new() }
    }
}

impl<'a> Names<'a> {
    pub(super) fn add<E: Error>(&mut self, name: Cow<'a, str>) -> Result<(), E> {
        if self.few.iter().take(self.count).chain(&self.more).any(|known| *known == name) {
            return Err(E::custom(format_args!("the field {:?} stands twice", shown(&name))));
        }
        if self.count >= FIELDS_MAX {
            return Err(E::custom(format_args!("more than {FIELDS_MAX} fields in one object")));
        }
        match self.few.get_mut(self.count) {
            Some(place) => *place = name,
            None => self.more.push(name),
        }
        self.count += 1;
        Ok(())
    }
}

pub(super) fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

/// Parses a part of the body again, for its inside. Lines and columns are those of the part.
pub(super) fn inner<'de, T: Deserialize<'de>, E: Error>(raw: &'de RawValue) -> Result<T, E> {
    serde_json::from_str(raw.get()).map_err(E::custom)
}

fn seeded<'de, S: DeserializeSeed<'de>, E: Error>(raw: &'de RawValue, seed: S) -> Result<S::Value, E> {
    seed.deserialize(&mut serde_json::Deserializer::from_str(raw.get())).map_err(E::custom)
}

#[derive(Deserialize)]
pub(super) struct Edits<'a> {
    #[serde(borrow)]
    pub(super) edits: Option<Vec<Edit<'a>>>,
}

#[derive(Deserialize)]
pub(super) struct Edit<'a> {
    #[serde(rename = "type", borrow, default)]
    pub(super) kind: Cow<'a, str>,
}

#[derive(Deserialize)]
pub(super) struct McpServer<'a> {
    #[serde(borrow)]
    pub(super) url: Cow<'a, str>,
}

#[derive(Deserialize)]
pub(super) struct CacheControl<'a> {
    #[serde(borrow)]
    ttl: Option<Cow<'a, str>>,
}

impl CacheControl<'_> {
    /// Longer than the default of five minutes, as far as we know.
    pub(super) fn is_long(&self) -> bool {
        self.ttl.as_deref().is_some_and(|ttl| ttl != "5m")
    }
}

/// The field `messages`.
pub(super) struct Messages<'t, 'a> {
    pub(super) top: &'t mut Top<'a>,
}

impl<'de> DeserializeSeed<'de> for Messages<'_, 'de> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Messages<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of messages")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Message { top: &mut *self.top })?.is_some() {}
        Ok(())
    }
}

/// One message: `role` and `content` matter.
struct Message<'t, 'a> {
    top: &'t mut Top<'a>,
}

impl<'de> DeserializeSeed<'de> for Message<'_, 'de> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Message<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut names, mut role) = (Names::default(), None);
        while let Some(Text(key)) = map.next_key::<Text<'de>>()? {
            names.add(key.clone())?;
            match key.as_ref() {
                "role" => role = Some(map.next_value::<Text<'de>>()?.0),
                "content" => {
                    map.next_value_seed(Parts { top: &mut *self.top, of: Of::Message, depth: 0 })?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        self.top.shape.message(role.as_deref().unwrap_or_default());
        Ok(())
    }
}

/// Whose blocks they are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    /// The system prompt's.
    System,
    /// A message's.
    Message,
    /// Another block's, which counts them as its own.
    Block,
}

/// Text, or a list of content blocks.
pub(super) struct Parts<'t, 'a> {
    pub(super) top: &'t mut Top<'a>,
    pub(super) of: Of,
    pub(super) depth: u8,
}

impl<'de> DeserializeSeed<'de> for Parts<'_, 'de> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl Parts<'_, '_> {
    fn done(top: &mut Top<'_>, of: Of, piece: Piece, media: Media) {
        match of {
            Of::System => top.shape.system(piece, media),
            Of::Message => top.shape.block(piece, media),
            Of::Block => {}
        }
    }
}

impl<'de> Visitor<'de> for Parts<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text or a list of blocks")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        let mut piece = Piece::new();
        piece.add(text);
        Self::done(self.top, self.of, piece, Media::default());
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items
            .next_element_seed(Block { top: &mut *self.top, of: self.of, depth: self.depth })?
            .is_some()
        {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        Block { top: self.top, of: self.of, depth: self.depth }.visit_map(map)
    }
}

/// A content block: `type`, `content`, `source`, `file_id` and `cache_control` matter. Text is skipped, tool
/// inputs are not looked into. `cache_control` is no part of the chain: the CLI moves it from block to block.
struct Block<'t, 'a> {
    top: &'t mut Top<'a>,
    of: Of,
    depth: u8,
}

impl<'de> DeserializeSeed<'de> for Block<'_, 'de> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Block<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a content block")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        if self.depth > DEPTH_MAX {
            return Err(A::Error::custom("blocks stand too deep in blocks"));
        }
        let (mut names, mut piece) = (Names::default(), Piece::new());
        let (mut kind, mut data_bytes, mut bytes, mut cited) = (None, 0, 0, false);
        let before = self.top.media;
        while let Some(Text(key)) = map.next_key::<Text<'de>>()? {
            names.add(key.clone())?;
            let raw: &'de RawValue = map.next_value()?;
            if key == "cache_control" {
                let control = inner::<Option<CacheControl<'de>>, A::Error>(raw)?;
                self.top.long_cache |= control.is_some_and(|control| control.is_long());
                continue;
            }
            if self.of != Of::Block {
                piece.add(&key);
                if key == "input" {
                    // What is no object has no parameters; the provider refuses it.
                    let Entries(parameters) = inner::<Entries, A::Error>(raw).unwrap_or(Entries(0));
                    piece.add_call(raw.get(), parameters);
                } else {
                    piece.add(raw.get());
                }
            }
            bytes += raw.get().len() as u64;
            match key.as_ref() {
                "type" => kind = Some(inner::<Text<'de>, A::Error>(raw)?.0),
                // Text needs no second look.
                "content" | "source" if raw.get().starts_with('"') => {}
                "content" => {
                    seeded(raw, Parts { top: &mut *self.top, of: Of::Block, depth: self.depth + 1 })?
                }
                "source" => data_bytes = seeded(raw, Source { top: &mut *self.top, depth: self.depth })?,
                "file_id" => self.file(raw)?,
                // Of a text it is a list of what was cited.
                "citations" => cited = raw.get().starts_with('{') && raw.get().contains("true"),
                _ => {}
            }
        }
        let media = &mut self.top.media;
        if cited {
            media.cited += bytes - data_bytes;
        }
        match kind.as_deref() {
            Some("image") => {
                media.images += 1;
                media.bytes += data_bytes;
            }
            // A document of text has no data of this kind; its bytes count.
            Some("document") if data_bytes > 0 => {
                media.documents += 1;
                media.bytes += data_bytes;
            }
            _ => {}
        }
        let own = Media {
            images: media.images - before.images,
            documents: media.documents - before.documents,
            bytes: media.bytes - before.bytes,
            cited: media.cited - before.cited,
        };
        Parts::done(self.top, self.of, piece, own);
        Ok(())
    }
}

/// How many fields an object has; nothing else has any.
struct Entries(u64);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Count;
        impl<'de> Visitor<'de> for Count {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut count = 0;
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(Entries(count))
            }
        }
        from.deserialize_map(Count)
    }
}

impl Block<'_, '_> {
    fn file<'de, E: Error>(&mut self, raw: &'de RawValue) -> Result<(), E> {
        if let Some(Text(id)) = inner::<Option<Text<'de>>, E>(raw)? {
            self.top.media.documents += 1;
            self.top.want(Wanted::FileId(id.into_owned()));
        }
        Ok(())
    }
}

/// The source of an image or document; gives the bytes of its data. A source that is plain text (search
/// results have such) is not followed by the provider.
struct Source<'t, 'a> {
    top: &'t mut Top<'a>,
    depth: u8,
}

impl<'de> DeserializeSeed<'de> for Source<'_, 'de> {
    type Value = u64;
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<u64, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Source<'_, 'de> {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a source")
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<u64, E> {
        Ok(0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<u64, A::Error> {
        let mut names = Names::default();
        let (mut kind, mut url, mut file, mut bytes) = (None, None, None, 0);
        while let Some(Text(key)) = map.next_key::<Text<'de>>()? {
            names.add(key.clone())?;
            match key.as_ref() {
                "type" => kind = Some(map.next_value::<Text<'de>>()?.0),
                "data" => bytes = map.next_value::<&RawValue>()?.get().len() as u64,
                "url" => url = Some(map.next_value::<Text<'de>>()?.0),
                "file_id" => file = Some(map.next_value::<Text<'de>>()?.0),
                "content" => {
                    map.next_value_seed(Parts { top: &mut *self.top, of: Of::Block, depth: self.depth + 1 })?
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        // A document that is not here has no bytes to count by.
        let remote = |top: &mut Top<'_>, wanted| {
            top.media.documents += 1;
            top.want(wanted);
        };
        match (kind.as_deref().unwrap_or_default(), url, file) {
            ("base64", None, None) => return Ok(bytes),
            ("text" | "content", None, None) => {}
            ("url", Some(url), None) => remote(self.top, Wanted::UrlSource(url.into_owned())),
            ("file", None, Some(id)) => remote(self.top, Wanted::FileId(id.into_owned())),
            (kind, ..) => {
                self.top.refused.get_or_insert(BodyError::RemoteSource(shown(kind)));
            }
        }
        Ok(0)
    }
}
