//! What the gateway must know of a request body, and the few places it may change in it. Pure. The body comes
//! from a cell: anything that would make the provider fetch, store or run something needs the policy's word
//! ([`Wanted`]); what would bill outside the token usage, and any field that is not known to be harmless, is
//! refused. `top` and `read` walk the body, `recall` knows parts of it again; `shape` is what the estimate of its
//! input needs.

mod expand;
mod read;
mod recall;
mod shape;
mod tools;
mod top;

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

pub use recall::{Fragment, Interned, Recall};
pub use shape::{Bound, Known, Shape};

use crate::policy::requests::Part;
use crate::pricing::CacheWrite;

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
    /// A value that changes the price, which has no price.
    #[error("the request field {field:?} has the value {value:?}, which has no price here: leave it out")]
    Priced {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// A source whose kind is not known.
    #[error("a content source of type {0:?} is not allowed here: send the content itself")]
    RemoteSource(String),
    /// An edit of the context that is billed apart.
    #[error("the context edit {0:?} is not allowed here")]
    ContextEdit(String),
}

/// A part of a body that is allowed only where the policy names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The `type` of a tool that the provider runs.
    ServerTool(String),
    /// The URL of an MCP server that the provider connects to.
    McpServer(String),
    /// The URL of content that the provider fetches.
    UrlSource(String),
    /// The id of a file stored at the provider.
    FileId(String),
}

impl Wanted {
    /// As the policy is asked.
    pub fn part(&self) -> Part<'_> {
        match self {
            Self::ServerTool(kind) => Part::ServerTool(kind),
            Self::McpServer(url) => Part::McpServer(url),
            Self::UrlSource(url) => Part::UrlSource(url),
            Self::FileId(id) => Part::FileId(id),
        }
    }
}

/// A web search tool as it stands in a body.
#[derive(Debug, Clone, PartialEq, Eq)]
struct WebSearch {
    type_at: Range<usize>,
    /// `max_uses` (none where it is null) and its place.
    uses: Option<(Option<u64>, Range<usize>)>,
}

/// What is known of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BodyFacts {
    /// The model asked for.
    pub model: String,
    /// `max_tokens`, where given.
    pub output_tokens_max: Option<u64>,
    /// The longest-lived cache it asks for.
    pub cache_write: CacheWrite,
    /// Whether the answer is to be streamed.
    pub stream: bool,
    /// What needs the policy's word.
    pub wanted: Vec<Wanted>,
    /// What its input is made of.
    pub shape: Shape,
    web_searches: Vec<WebSearch>,
    max_tokens_at: Option<Range<usize>>,
    thinking_at: Option<Range<usize>>,
    thinking_budget: Option<(u64, Range<usize>)>,
    context_at: Option<Range<usize>>,
}

impl BodyFacts {
    /// Reads a body in one pass, without copying it.
    ///
    /// # Errors
    /// See [`BodyError`].
    pub fn read(body: &[u8]) -> Result<Self, BodyError> {
        Self::read_knowing(body, &[]).map(|(facts, _)| facts)
    }

    /// The same, of a body of which parts may be known; gives those that are not, and may be known from now on.
    ///
    /// # Errors
    /// See [`BodyError`].
    pub fn read_knowing(body: &[u8], known: &[Arc<Fragment>]) -> Result<(Self, Vec<Fragment>), BodyError> {
        let malformed = |error: serde_json::Error| BodyError::Malformed(error.to_string());
        // Once for all texts in it, each of which would be looked at apart.
        let text = std::str::from_utf8(body).map_err(|error| BodyError::Malformed(error.to_string()))?;
        let top = top::read(text, known).map_err(malformed)?;
        if let Some(refused) = top.refused {
            return Err(refused);
        }
        if top.toolsets && !top.wanted.iter().any(|wanted| matches!(wanted, Wanted::McpServer(_))) {
            return Err(BodyError::Malformed("tools: an mcp_toolset needs its server in mcp_servers".into()));
        }
        let at = |raw: &RawValue| {
            let start = raw.get().as_ptr() as usize - body.as_ptr() as usize;
            start..start + raw.get().len()
        };
        let number = |field: &'static str| {
            move |raw: &RawValue| {
                serde_json::from_str::<u64>(raw.get())
                    .map_err(|_| BodyError::Malformed(format!("{field}: expected a whole number")))
            }
        };
        let thinking: Option<Option<read::Thinking<'_>>> =
            top.thinking.map(|raw| serde_json::from_str(raw.get())).transpose().map_err(malformed)?;
        let thinking = thinking.flatten();
        let budget = thinking.as_ref().filter(|thinking| thinking.kind == "enabled");
        let budget = budget.and_then(|thinking| thinking.budget_tokens);
        let web_searches = top.web_searches.iter().map(|tool| {
            let uses = |raw: &RawValue| match raw.get() {
                "null" => Ok((None, at(raw))),
                _ => Ok((Some(number("max_uses")(raw)?), at(raw))),
            };
            let uses = tool.max_uses.map(uses).transpose()?;
            Ok(WebSearch { type_at: at(tool.kind), uses })
        });
        let model = top.model.ok_or_else(|| BodyError::Malformed("model: field required".to_owned()))?;
        let kind = thinking.as_ref().map_or("", |thinking| thinking.kind.as_ref());
        let facts = Self {
            output_tokens_max: top.max_tokens.map(number("max_tokens")).transpose()?,
            cache_write: if top.long_cache { CacheWrite::OneHour } else { CacheWrite::FiveMinutes },
            stream: top.stream,
            web_searches: web_searches.collect::<Result<_, BodyError>>()?,
            max_tokens_at: top.max_tokens.map(at),
            thinking_at: top.thinking.map(at),
            thinking_budget: budget.map(|raw| Ok((number("budget_tokens")(raw)?, at(raw)))).transpose()?,
            context_at: top.context.map(at),
            shape: top.shape.finish(&model, kind),
            wanted: top.wanted,
            model: model.into_owned(),
        };
        Ok((facts, top.fresh))
    }

    /// The most web searches that the provider may make for it, once no tool is above `uses_max`.
    pub fn web_searches_max(&self, uses_max: u32) -> u64 {
        let uses_max = u64::from(uses_max);
        let asked = |tool: &WebSearch| tool.uses.as_ref().and_then(|(uses, _)| *uses).unwrap_or(u64::MAX);
        self.web_searches.iter().map(|tool| asked(tool).min(uses_max)).fold(0, u64::saturating_add)
    }

    /// `body` with `max_tokens` set to `tokens`, and no web search tool with more uses than `uses_max`. A thinking
    /// budget that no longer fits is halved to fit, or switched off where half is below what the API takes (and
    /// with it the edits of the context, which speak of thinking). Adaptive thinking has no budget and stays
    /// within `max_tokens` by itself. All other bytes stay as they are.
    pub fn rewritten(&self, body: &Bytes, tokens: u64, uses_max: u32) -> Bytes {
        let mut edits: Vec<(Range<usize>, String)> = Vec::new();
        let mut replace = |at: &Range<usize>, text: String| edits.push((at.clone(), text));
        if let (Some(at), true) = (&self.max_tokens_at, self.output_tokens_max != Some(tokens)) {
            replace(at, tokens.to_string());
            if let (Some((budget, budget_at)), Some(thinking_at)) = (&self.thinking_budget, &self.thinking_at)
                && *budget >= tokens
            {
                let half = tokens / 2;
                if half >= THINKING_TOKENS_MIN {
                    replace(budget_at, half.to_string());
                } else {
                    replace(thinking_at, "{\"type\":\"disabled\"}".to_owned());
                    if let Some(at) = &self.context_at {
                        replace(at, "null".to_owned());
                    }
                }
            }
        }
        for tool in &self.web_searches {
            match &tool.uses {
                Some((Some(uses), _)) if *uses <= u64::from(uses_max) => {}
                Some((_, at)) => replace(at, uses_max.to_string()),
                None => replace(&(tool.type_at.end..tool.type_at.end), format!(",\"max_uses\":{uses_max}")),
            }
        }
        if edits.is_empty() {
            return body.clone();
        }
        edits.sort_by_key(|(at, _)| at.start);
        let mut out = BytesMut::with_capacity(body.len() + 64 * edits.len());
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

/// The fields that count_tokens takes; it refuses others.
#[derive(Deserialize, Serialize)]
struct Countable<'a> {
    #[serde(borrow)]
    model: &'a RawValue,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    mcp_servers: Option<&'a RawValue>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    messages: Option<&'a RawValue>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    system: Option<&'a RawValue>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    thinking: Option<&'a RawValue>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    tool_choice: Option<&'a RawValue>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    tools: Option<&'a RawValue>,
}

/// What of a body is sent to have its input counted; `None` where it is no body that was read before.
pub fn countable(body: &[u8]) -> Option<Bytes> {
    let fields: Countable<'_> = serde_json::from_slice(body).ok()?;
    serde_json::to_vec(&fields).ok().map(Bytes::from)
}

#[cfg(test)]
mod tests;
