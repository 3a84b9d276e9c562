//! The walk over a body's tools: which of them the provider runs. Like all of the walk it refuses an object in
//! which a field stands twice.

use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::Wanted;
use super::read::{CacheControl, Names, SearchTool, Text, inner};
use super::shape::Piece;
use super::top::Top;

/// Tool types that the client runs; one without a type is such a tool too. (The search among tools runs at the
/// provider, is free and reaches nothing.) All others need the policy's word.
const CLIENT_TOOLS: &[&str] =
    &["bash", "text_editor", "computer", "memory", "tool_search_tool_regex", "tool_search_tool_bm25"];
/// Tools of MCP servers that the provider connects to; the policy is asked for the servers.
const TOOLSET: &str = "mcp_toolset";

/// The field `tools`: a list, or null.
pub(super) struct Tools<'t, 'a> {
    pub(super) top: &'t mut Top<'a>,
}

impl<'de> DeserializeSeed<'de> for Tools<'_, 'de> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Tools<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of tools")
    }

    fn visit_none<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let (mut piece, mut deferred, mut typed) = (Piece::new(), false, 0);
        while items
            .next_element_seed(Tool {
                top: &mut *self.top,
                piece: &mut piece,
                deferred: &mut deferred,
                typed: &mut typed,
            })?
            .is_some()
        {}
        self.top.shape.tools(piece, deferred, typed);
        Ok(())
    }
}

/// One tool; all of it counts and belongs to the chain, its `cache_control` too.
struct Tool<'t, 'a> {
    top: &'t mut Top<'a>,
    piece: &'t mut Piece,
    deferred: &'t mut bool,
    /// How many have a type of the provider's.
    typed: &'t mut u64,
}

impl<'de> DeserializeSeed<'de> for Tool<'_, 'de> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Tool<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tool")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut names = Names::default();
        let (mut kind, mut max_uses) = (None, None);
        while let Some(Text(key)) = map.next_key::<Text<'de>>()? {
            names.add(key.clone())?;
            let raw: &'de RawValue = map.next_value()?;
            self.piece.add(&key);
            self.piece.add_json(raw.get());
            // Quotes, colon and comma.
            self.piece.count(4);
            match key.as_ref() {
                "type" => kind = Some(raw),
                "max_uses" => max_uses = Some(raw),
                "cache_control" => {
                    let control = inner::<Option<CacheControl<'de>>, A::Error>(raw)?;
                    self.top.long_cache |= control.is_some_and(|control| control.is_long());
                }
                "defer_loading" => {
                    *self.deferred |= inner::<Option<bool>, A::Error>(raw)?.unwrap_or(false);
                }
                _ => {}
            }
        }
        // Its end, so that a field cannot go over to the next one; and braces and comma.
        self.piece.add("");
        self.piece.count(3);
        let Some(kind) = kind else { return Ok(()) };
        *self.typed += u64::from(self.top.tool(kind, max_uses)?);
        Ok(())
    }
}

impl<'de> Top<'de> {
    /// Takes a tool's type; true where it is one of the provider's.
    fn tool<E: Error>(
        &mut self,
        kind_raw: &'de RawValue,
        max_uses: Option<&'de RawValue>,
    ) -> Result<bool, E> {
        let Some(Text(kind)) = inner::<Option<Text<'de>>, E>(kind_raw)? else { return Ok(false) };
        match kind.as_ref() {
            "custom" => {}
            TOOLSET => self.toolsets = true,
            kind if is_client_tool(kind) => {}
            kind => {
                if kind.starts_with("web_search_") {
                    self.web_searches.push(SearchTool { kind: kind_raw, max_uses });
                }
                self.want(Wanted::ServerTool(kind.to_owned()));
            }
        }
        Ok(kind != "custom")
    }
}

/// Whether a tool type is one of the client's, with or without the date of its version. A name that only begins like
/// one, such as `bash_code_execution_20250825`, is another tool.
fn is_client_tool(kind: &str) -> bool {
    let dated = |date: &str| date.len() == 8 && date.bytes().all(|byte| byte.is_ascii_digit());
    let name = kind.rsplit_once('_').filter(|(_, date)| dated(date)).map_or(kind, |(name, _)| name);
    CLIENT_TOOLS.contains(&name)
}
