//! What a script may say: TOML → [`Script`]. Pure. Unknown keys are errors with file, line and key; nothing
//! of a script is ever run.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use serde::Deserialize;
use serde_json::{Map, Value};
use toml::Spanned;

use super::ask::Ask;
use crate::pricing::Usage;

/// Largest script, in bytes.
pub const SCRIPT_BYTES_MAX: usize = 4 << 20;
/// Largest text of one block after `repeat`, in bytes.
const TEXT_BYTES_MAX: usize = 16 << 20;
/// Longest latency or delay, in milliseconds.
const DELAY_MS_MAX: u64 = 3_600_000;

/// A script that cannot be used. The message names the file and the line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScriptError {
    /// Not TOML, or a key or type that a script does not have.
    #[error("{file}:{line}: {message}")]
    Syntax {
        /// The name given by the caller.
        file: String,
        /// Line, counted from 1.
        line: usize,
        /// What the parser says; names the key.
        message: String,
    },
    /// A reply that contradicts itself.
    #[error("{file}:{line}: key `{key}`: {message}")]
    Reply {
        /// The name given by the caller.
        file: String,
        /// Line of the reply, counted from 1.
        line: usize,
        /// The key at fault.
        key: &'static str,
        /// What is wrong with it.
        message: &'static str,
    },
    /// Longer than [`SCRIPT_BYTES_MAX`].
    #[error("{file}: a script may have at most {SCRIPT_BYTES_MAX} bytes, this one has {bytes}")]
    TooLarge {
        /// The name given by the caller.
        file: String,
        /// Its size.
        bytes: usize,
    },
}

/// A parsed script with its counters.
#[derive(Debug)]
pub struct Script {
    rules: Vec<Rule>,
    default: Rule,
}

/// One `[[reply]]`.
#[derive(Debug)]
pub struct Rule {
    /// Its name, or `reply-N`.
    pub name: String,
    /// What it answers.
    pub reply: Reply,
    when: When,
    times_left: Option<AtomicU32>,
    hits: AtomicU64,
}

impl Rule {
    /// How many requests it answered.
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }
}

/// What is answered: content, timing, faults.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// Content blocks in order.
    pub blocks: Vec<Block>,
    /// Billed usage; `None` is estimated from sizes.
    pub usage: Option<Usage>,
    /// Set, or `tool_use` when there is a tool call, else `end_turn`.
    pub stop_reason: Option<String>,
    /// Wait before the first byte, in milliseconds.
    pub latency_ms: u64,
    /// Wait before each delta, in milliseconds.
    pub chunk_delay_ms: u64,
    /// Characters in one delta.
    pub chunk_chars: usize,
    /// What goes wrong, if anything.
    pub fault: Option<Fault>,
    /// Content type said instead of the right one.
    pub content_type: Option<String>,
}

/// One content block; text may hold `{{prompt}}` and the like.
#[derive(Debug, Clone, PartialEq)]
pub enum Block {
    /// Text for the user.
    Text(String),
    /// A thinking block (its signature is made up).
    Thinking(String),
    /// A tool call; without an id a new one is made for each answer.
    Tool {
        /// Name of the tool.
        name: String,
        /// Its input.
        input: Map<String, Value>,
        /// A fixed id.
        id: Option<String>,
    },
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// Another status than 200.
    Status {
        /// HTTP status.
        status: u16,
        /// Extra headers.
        headers: BTreeMap<String, String>,
        /// Body; made from type and message when absent.
        body: String,
    },
    /// Never answers.
    Hang,
    /// The connection ends after this many events (a JSON answer: in the middle).
    Cut(u64),
    /// An SSE `error` event after this many events (a JSON answer: status 500).
    Error {
        /// Events sent before.
        after_events: u64,
        /// `error.type`.
        kind: String,
        /// `error.message`.
        message: String,
    },
    /// Bytes that are no event after this many events, then the end (a JSON answer: no JSON).
    Malformed(u64),
}

impl Script {
    /// Parses `text`; `file` is only for messages.
    ///
    /// # Errors
    /// See [`ScriptError`].
    pub fn parse(text: &str, file: &str) -> Result<Self, ScriptError> {
        if text.len() > SCRIPT_BYTES_MAX {
            return Err(ScriptError::TooLarge { file: file.to_owned(), bytes: text.len() });
        }
        let raw: RawScript = toml::from_str(text).map_err(|e| ScriptError::Syntax {
            file: file.to_owned(),
            line: line_of(text, e.span()),
            message: e.message().trim().replace('\n', ", "),
        })?;
        let globals =
            Globals { usage: raw.usage, latency_ms: raw.latency_ms, chunk_delay_ms: raw.chunk_delay_ms };
        let mut rules = Vec::new();
        for (index, spanned) in raw.reply.into_iter().enumerate() {
            let line = line_of(text, Some(spanned.span()));
            let rule = spanned.into_inner().check(&globals, format!("reply-{}", index + 1));
            rules.push(rule.map_err(|bad| bad.at(file, line))?);
        }
        let default = match raw.default {
            None => RawReply { text: Some("ok".to_owned()), ..RawReply::default() }
                .check(&globals, "default".to_owned())
                .map_err(|bad| bad.at(file, 1))?,
            Some(spanned) => {
                let line = line_of(text, Some(spanned.span()));
                let raw = spanned.into_inner();
                if raw.when.is_some() || raw.times.is_some() {
                    return Err(Bad("when", "[default] has no conditions: use [[reply]]").at(file, line));
                }
                raw.check(&globals, "default".to_owned()).map_err(|bad| bad.at(file, line))?
            }
        };
        Ok(Self { rules, default })
    }

    /// The rule that answers `ask`; counts it and takes one of its `times`.
    pub fn choose(&self, ask: &Ask) -> &Rule {
        let take = |rule: &&Rule| {
            rule.when.holds(ask)
                && rule.times_left.as_ref().is_none_or(|left| {
                    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
                })
        };
        let rule = self.rules.iter().find(take).unwrap_or(&self.default);
        rule.hits.fetch_add(1, Ordering::Relaxed);
        rule
    }

    /// All rules in order, the default last.
    pub fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter().chain([&self.default])
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawScript {
    usage: Option<Usage>,
    latency_ms: Option<u64>,
    chunk_delay_ms: Option<u64>,
    #[serde(default)]
    reply: Vec<Spanned<RawReply>>,
    default: Option<Spanned<RawReply>>,
}

struct Globals {
    usage: Option<Usage>,
    latency_ms: Option<u64>,
    chunk_delay_ms: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawReply {
    name: Option<String>,
    when: Option<When>,
    times: Option<u32>,
    text: Option<String>,
    blocks: Option<Vec<RawBlock>>,
    usage: Option<Usage>,
    stop_reason: Option<String>,
    latency_ms: Option<u64>,
    chunk_delay_ms: Option<u64>,
    chunk_chars: Option<usize>,
    fault: Option<RawFault>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBlock {
    text: Option<String>,
    thinking: Option<String>,
    tool: Option<String>,
    input: Option<Map<String, Value>>,
    id: Option<String>,
    repeat: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFault {
    status: Option<u16>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    message: Option<String>,
    body: Option<String>,
    #[serde(default)]
    hang: bool,
    cut_after_events: Option<u64>,
    error_after_events: Option<u64>,
    malformed_after_events: Option<u64>,
    content_type: Option<String>,
}

/// A list or a single pattern.
#[derive(Debug, Default, Deserialize)]
#[serde(untagged)]
enum Patterns {
    #[default]
    None,
    One(String),
    All(Vec<String>),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct When {
    prompt: Patterns,
    last: Patterns,
    system: Patterns,
    tool_result: Patterns,
    model: Patterns,
    header: BTreeMap<String, String>,
    turn: Option<u64>,
    turn_from: Option<u64>,
    has_tool_result: Option<bool>,
    tools: Option<bool>,
    stream: Option<bool>,
}

impl Patterns {
    fn hold(&self, text: &str) -> bool {
        match self {
            Self::None => true,
            Self::One(pattern) => contains(text, pattern),
            Self::All(all) => all.iter().all(|pattern| contains(text, pattern)),
        }
    }
}

impl When {
    fn holds(&self, ask: &Ask) -> bool {
        let header = |(name, pattern): (&String, &String)| {
            ask.headers.iter().any(|(n, v)| n.eq_ignore_ascii_case(name) && contains(v, pattern))
        };
        self.prompt.hold(&ask.prompt)
            && self.last.hold(&ask.last)
            && self.system.hold(&ask.system)
            && self.model.hold(&ask.model)
            && self.header.iter().all(header)
            && self.turn.is_none_or(|turn| turn == ask.turn)
            && self.turn_from.is_none_or(|turn| turn <= ask.turn)
            && self.tools.is_none_or(|tools| tools == ask.has_tools)
            && self.stream.is_none_or(|stream| stream == ask.stream)
            && self.has_tool_result.is_none_or(|has| has == ask.tool_result.is_some())
            && match &self.tool_result {
                Patterns::None => true,
                patterns => ask.tool_result.as_deref().is_some_and(|text| patterns.hold(text)),
            }
    }
}

/// Whether `text` contains `pattern`, where `*` stands for any text.
fn contains(text: &str, pattern: &str) -> bool {
    let mut rest = text;
    pattern.split('*').all(|part| match rest.find(part) {
        Some(at) => {
            rest = &rest[at + part.len()..];
            true
        }
        None => false,
    })
}

/// A key and what is wrong with it, before file and line are known.
struct Bad(&'static str, &'static str);

impl Bad {
    fn at(self, file: &str, line: usize) -> ScriptError {
        ScriptError::Reply { file: file.to_owned(), line, key: self.0, message: self.1 }
    }
}

impl RawReply {
    fn check(self, globals: &Globals, name: String) -> Result<Rule, Bad> {
        let blocks = match (self.text, self.blocks) {
            (Some(_), Some(_)) => return Err(Bad("text", "is short for `blocks`: give one of them")),
            (Some(text), None) => vec![Block::Text(text)],
            (None, blocks) => {
                blocks.unwrap_or_default().into_iter().map(RawBlock::check).collect::<Result<_, _>>()?
            }
        };
        let (fault, content_type) = self.fault.map_or(Ok((None, None)), RawFault::check)?;
        let latency_ms = self.latency_ms.or(globals.latency_ms).unwrap_or(0);
        let chunk_delay_ms = self.chunk_delay_ms.or(globals.chunk_delay_ms).unwrap_or(0);
        if latency_ms.max(chunk_delay_ms) > DELAY_MS_MAX {
            return Err(Bad("latency_ms", "waits are at most one hour"));
        }
        let chunk_chars = self.chunk_chars.unwrap_or(40);
        if chunk_chars == 0 {
            return Err(Bad("chunk_chars", "must be at least 1"));
        }
        if blocks.is_empty() && fault.is_none() {
            return Err(Bad("blocks", "a reply needs `text`, `blocks` or a `fault`"));
        }
        let usage = self.usage.or(globals.usage);
        let stop_reason = self.stop_reason;
        Ok(Rule {
            name: self.name.unwrap_or(name),
            reply: Reply {
                blocks,
                usage,
                stop_reason,
                latency_ms,
                chunk_delay_ms,
                chunk_chars,
                fault,
                content_type,
            },
            when: self.when.unwrap_or_default(),
            times_left: self.times.map(AtomicU32::new),
            hits: AtomicU64::new(0),
        })
    }
}

impl RawBlock {
    fn check(self) -> Result<Block, Bad> {
        let repeat = self.repeat.unwrap_or(1);
        let repeated = |text: String| {
            if text.len().saturating_mul(repeat) > TEXT_BYTES_MAX {
                return Err(Bad("repeat", "a block may have at most 16 MiB of text"));
            }
            Ok(if repeat == 1 { text } else { text.repeat(repeat) })
        };
        match (self.text, self.thinking, self.tool) {
            (Some(text), None, None) => Ok(Block::Text(repeated(text)?)),
            (None, Some(text), None) => Ok(Block::Thinking(repeated(text)?)),
            (None, None, Some(name)) => {
                Ok(Block::Tool { name, input: self.input.unwrap_or_default(), id: self.id })
            }
            _ => Err(Bad("blocks", "each block has exactly one of `text`, `thinking`, `tool`")),
        }
    }
}

impl RawFault {
    fn check(self) -> Result<(Option<Fault>, Option<String>), Bad> {
        let counts = [self.cut_after_events, self.error_after_events, self.malformed_after_events];
        let chosen =
            counts.iter().flatten().count() + usize::from(self.hang) + usize::from(self.status.is_some());
        if chosen > 1 {
            return Err(Bad("fault", "choose one of status, hang, cut_, error_ and malformed_after_events"));
        }
        if chosen == 0 && self.content_type.is_none() {
            return Err(Bad("fault", "says nothing"));
        }
        let kind = self.kind.unwrap_or_else(|| "api_error".to_owned());
        let message = self.message.unwrap_or_else(|| "scripted fault".to_owned());
        let fault = if let Some(status) = self.status {
            if !(200..=599).contains(&status) {
                return Err(Bad("status", "must be between 200 and 599"));
            }
            let body = self.body.unwrap_or_else(|| error_json(&kind, &message));
            Some(Fault::Status { status, headers: self.headers, body })
        } else if self.hang {
            Some(Fault::Hang)
        } else if let Some(after_events) = self.error_after_events {
            Some(Fault::Error { after_events, kind, message })
        } else {
            self.cut_after_events.map(Fault::Cut).or(self.malformed_after_events.map(Fault::Malformed))
        };
        Ok((fault, self.content_type))
    }
}

/// The API's error body.
pub fn error_json(kind: &str, message: &str) -> String {
    serde_json::json!({ "type": "error", "error": { "type": kind, "message": message } }).to_string()
}

fn line_of(text: &str, span: Option<Range<usize>>) -> usize {
    let end = span.map_or(0, |span| span.start).min(text.len());
    text.as_bytes()[..end].iter().filter(|byte| **byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let error = Script::parse("\n[[reply]]\ntext = \"a\"\nlatency = 3\n", "x.toml").unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("x.toml:4: ") && text.contains("latency"), "{text}");
    }

    #[test]
    fn a_reply_that_contradicts_itself_is_refused_with_its_line() {
        for (body, key) in [
            ("text = \"a\"\nblocks = []", "text"),
            ("name = \"n\"", "blocks"),
            ("fault = { hang = true, status = 500 }", "fault"),
            ("blocks = [{ text = \"a\", tool = \"b\" }]", "blocks"),
            ("text = \"a\"\nchunk_chars = 0", "chunk_chars"),
        ] {
            let error = Script::parse(&format!("# c\n[[reply]]\n{body}\n"), "f").unwrap_err();
            assert!(matches!(&error, ScriptError::Reply { line: 2, key: k, .. } if *k == key), "{error}");
        }
    }

    #[test]
    fn the_first_rule_that_holds_answers_and_times_run_out() {
        let script = Script::parse(
            r#"
            [[reply]]
            name = "once"
            when = { prompt = "fix*bug", turn = 0, tools = true }
            times = 1
            text = "a"
            [[reply]]
            name = "more"
            when = { prompt = ["fix", "bug"], model = "haiku" }
            text = "b"
            "#,
            "f",
        )
        .unwrap();
        let mut ask =
            Ask { prompt: "fix the bug".into(), model: "claude-haiku-4-5".into(), ..Ask::default() };
        assert_eq!(script.choose(&ask).name, "more");
        ask.has_tools = true;
        assert_eq!(script.choose(&ask).name, "once");
        assert_eq!(script.choose(&ask).name, "more");
        ask.model = "claude-sonnet-4-6".into();
        assert_eq!(script.choose(&ask).name, "default");
    }

    #[test]
    fn the_scripts_that_come_with_hotcell_parse() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
        let mut count = 0;
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let script = Script::parse(&std::fs::read_to_string(&path).unwrap(), &path.display().to_string());
            assert!(script.is_ok(), "{script:?}");
            count += 1;
        }
        assert!(count >= 4);
    }
}
