//! The scripted model: a Messages API whose replies come from a TOML script, for tests, the demo and
//! rehearsals. It must never reach the network itself, never need a real key, and never write a received
//! credential to a file in clear.
//!
//! Read in this order: [`script`] (what a script may say), [`ask`] (what a request says), [`reply`] (events
//! and JSON of an answer), [`server`] (sockets), [`record`] (what was received).
//!
//! # Which reply is chosen
//! The choice depends on the request's content alone, so a retry of a request gets the same reply, however
//! many requests run side by side: the first `[[reply]]` whose `when` holds and whose `times` is not used up,
//! else `[default]`. The turn is the number of assistant messages in the request. Requests that the CLI makes
//! beside the conversation (titles, summaries) carry no tools, and `count_tokens` never takes a reply: give
//! `when = { tools = true }` to rules with `times`, so that such a request cannot use one up. When a stream
//! breaks, the CLI sends the same request again without `stream`: a rule with a fault and `times = 1` is
//! followed by the rule for the retry.
//!
//! # A script
//! ```toml
//! usage = { input = 1200, output = 40 }      # for replies that say nothing else
//!
//! [[reply]]
//! name = "edit"                              # for the counters
//! when = { prompt = "greeting", turn = 0, tools = true }
//! blocks = [
//!   { text = "I will look at it." },
//!   { tool = "Bash", input = { command = "ls", description = "list files" } },
//! ]
//! usage = { input = 10, output = 80, cache_read = 0, cache_write_5m = 9000, cache_write_1h = 0 }
//! latency_ms = 20                            # before the first byte
//! chunk_delay_ms = 5                         # between deltas
//! chunk_chars = 24                           # size of a delta
//!
//! [[reply]]
//! name = "limited"
//! when = { turn = 1, tools = true }
//! times = 1
//! fault = { status = 429, headers = { retry-after = "1" }, type = "rate_limit_error", message = "slow down" }
//!
//! [default]
//! text = "Done: {{tool_result}}"             # also {{prompt}}, {{last}}, {{turn}}, {{model}}
//! ```
//! # Other providers
//! The same script answers as Amazon Bedrock (`/model/{id}/invoke…`, with its event stream), Google Vertex
//! (`…/publishers/anthropic/models/{id}:rawPredict…`) and Microsoft Foundry (`/anthropic/v1/messages`), told by the
//! path ([`cloud`]). The first two refuse requests without a credential of the right form and bodies that are not
//! of theirs; `model` in a `when` is then the provider's id.
//!
//! Conditions of `when`: `prompt` (text of the first user message, reminders left out), `last` (the latest
//! user text), `system`, `tool_result` (text of the results in the last message), `model`, `header = { name =
//! pattern }`, all patterns: the text must contain it, `*` stands for any text, a list means all of them;
//! `turn`, `turn_from`, `has_tool_result`, `tools`, `stream`. Faults: `status` (with `headers`, `type`,
//! `message`, `body`), `hang`, `cut_after_events`, `error_after_events`, `malformed_after_events`,
//! `content_type`. Output above the request's `max_tokens` is clipped, with `stop_reason` `max_tokens`, and a
//! thinking budget that does not fit is refused with 400, as the real API does.

pub mod ask;
pub mod cloud;
pub mod eventstream;
pub mod record;
pub mod reply;
pub mod script;
pub mod server;

pub use record::{Received, Recorder};
pub use script::{Script, ScriptError};
pub use server::{Listener, ModelReport, RuleHits, serve};
