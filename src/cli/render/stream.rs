//! A job's events as readable text: what the agent says, one line per tool call, what was denied and why,
//! and the end with its cost. Pure: events in, text out. Knows nothing of terminals or connections.

use serde_json::Value;

use super::escape::Neutraliser;
use super::words;
use super::{LINE_CHARS_MAX, Paint, Style, Text, one_line};
use crate::api::wire::JobView;
use crate::event::{Body, Decision, Refusal, Stage, StepEnd, Stream, Totals};
use crate::job::spec::Runtime;
use crate::job::{Outcome, State, StopReason};
use crate::money::MicroUsd;
use crate::money::budget::Scope;

/// Most ids of denied calls that are remembered.
const DENIED_MAX: usize = 1024;

/// What has been seen of one job.
pub(crate) struct StreamView {
    paint: Paint,
    /// Write a line for each new state (where no status line says it).
    states: bool,
    job: String,
    created_ms: Option<u64>,
    cost_limit_usd: f64,
    state: String,
    now_ms: u64,
    charged: MicroUsd,
    turns: u64,
    requests: u64,
    last_message_id: String,
    last_text: String,
    last_tool: String,
    denied: Vec<String>,
    /// Budgets whose end was told since the job last began to run.
    exhausted: Vec<Scope>,
    outputs: [Piece; 2],
    outcome: Option<Outcome>,
}

/// Where one byte stream of the cell stands.
#[derive(Default)]
struct Piece {
    filter: Neutraliser,
    end: u64,
}

impl StreamView {
    /// A view of `job`; `states` asks for a line per state.
    pub(crate) fn new(job: &JobView, paint: Paint, states: bool) -> Self {
        Self {
            paint,
            states,
            job: job.id.to_string(),
            created_ms: super::tables::parse_ms(&job.created_at),
            cost_limit_usd: job.cost_limit_usd,
            state: job.state.name().to_owned(),
            now_ms: 0,
            charged: MicroUsd::ZERO,
            turns: 0,
            requests: 0,
            last_message_id: String::new(),
            last_text: String::new(),
            last_tool: String::new(),
            denied: Vec::new(),
            exhausted: Vec::new(),
            outputs: Default::default(),
            outcome: None,
        }
    }

    /// How the job ended, once its last event was seen.
    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    /// What one event looks like; empty where there is nothing to see.
    pub(crate) fn event(&mut self, event: &Value) -> Text {
        self.now_ms = event["at_ms"].as_u64().unwrap_or(self.now_ms);
        match event["type"].as_str() {
            // A frame's raw JSON cannot pass through serde's tagged enums; it is read as a value.
            Some("frame") => self.frame(&event["frame"]),
            Some("sent") | None => self.text(),
            Some(_) => match serde_json::from_value::<Body>(event.clone()) {
                Ok(body) => self.body(body),
                // A kind that a newer daemon has: clients skip what they do not know.
                Err(_) => self.text(),
            },
        }
    }

    /// What stands in the status line at `now_ms`.
    pub(crate) fn status(&self, now_ms: u64) -> String {
        let mut parts = vec![self.state.clone()];
        if let Some(created) = self.created_ms {
            parts.push(words::clock(now_ms.saturating_sub(created)));
        }
        parts.push(words::plural(self.turns, "turn"));
        parts.push(format!("{} of {}", words::usd(self.charged), words::dollars_limit(self.cost_limit_usd)));
        if !self.last_tool.is_empty() && self.state == "running" {
            parts.push(self.last_tool.clone());
        }
        parts.join(" · ")
    }

    fn text(&self) -> Text {
        Text::new(self.paint)
    }

    fn remark(&self, style: Style, text: &str) -> Text {
        self.text().add(style, text).end()
    }

    fn body(&mut self, body: Body) -> Text {
        match body {
            Body::State { state } => self.state(&state),
            Body::Output { stream, end, text } => self.output(stream, end, &text),
            Body::Tool { tool_use_id, tool, decision: Decision::Deny, reason, rule, .. } => {
                self.denied(tool_use_id, &tool, &reason.unwrap_or(format!("by {rule}")))
            }
            Body::Charge { charged_micro_usd, .. } => {
                self.charged = self.charged.plus(charged_micro_usd);
                self.requests += 1;
                self.text()
            }
            // The budget's own event says it, with its figures.
            Body::Refused { why, .. } if why == Refusal::Budget.as_str() => self.text(),
            Body::Refused { status, why } => {
                self.remark(Style::Warn, &format!("! the gateway refused a request ({status}): {why}"))
            }
            Body::Stop { reason: StopReason::Budget, .. } if !self.exhausted.is_empty() => self.text(),
            Body::Stop { reason, detail } => {
                let why = words::stop(reason);
                self.remark(Style::Warn, &format!("■ stopping: {why} ({detail})"))
            }
            Body::Cell { runtime, instead: Some(why), .. } => {
                let words = format!("! it runs on {} instead: {why}", runtime.as_str());
                self.remark(Style::Warn, &words)
            }
            Body::Cell { runtime, instead: None, .. } if runtime != Runtime::default() => {
                self.remark(Style::Dim, &format!("· it runs on {}", words::runtime(runtime)))
            }
            Body::Step { stage, index, command, ended } => self.step(stage, index, &command, ended),
            Body::Note { text } => self.remark(Style::Dim, &format!("· {text}")),
            Body::Truncated { first, last } => {
                self.remark(Style::Warn, &format!("… events {first} to {last} are gone: the journal's limit"))
            }
            Body::Changes { summary } if summary.entries == 0 && summary.commits == 0 => self.text(),
            Body::Changes { summary } => {
                self.remark(Style::Dim, &format!("· changes: {}", super::diff::summary(&summary)))
            }
            Body::Summary { outcome, totals, result } => self.end(outcome, &totals, result),
            Body::Tool { decision: Decision::Rewrite, tool, rule, .. } => {
                self.remark(Style::Dim, &format!("· {tool} runs with another input (rule {rule})"))
            }
            Body::Egress { host, port, decision: Decision::Deny, rule, reason, .. } => {
                let why = reason.unwrap_or(format!("by {rule}"));
                self.remark(Style::Warn, &format!("! {host}:{port} was not reached: {why}"))
            }
            Body::Budget { scope, spent_micro_usd, limit_micro_usd, .. } => {
                let name = Scope::ALL.into_iter().find(|known| known.as_str() == scope);
                // Each request that finds no room has its event.
                if name.is_some_and(|name| self.exhausted.contains(&name)) {
                    return self.text();
                }
                self.exhausted.extend(name);
                let name = name.map_or(scope.as_str(), |known| known.words());
                let (limit, spent) = (words::usd(limit_micro_usd), words::usd(spent_micro_usd));
                self.remark(Style::Warn, &format!("! the {name} of {limit} has no room ({spent} spent)"))
            }
            Body::Tool { decision: Decision::Allow, .. }
            | Body::Egress { decision: Decision::Allow | Decision::Rewrite, .. }
            | Body::Attempt { .. }
            | Body::Frame { .. }
            | Body::Sent { .. }
            | Body::Request { .. }
            | Body::Cell { .. }
            | Body::Exit { .. } => self.text(),
        }
    }

    fn step(&self, stage: Stage, index: u32, command: &str, ended: Option<StepEnd>) -> Text {
        let (stage, number) = (stage.as_str(), index + 1);
        match ended {
            None => {
                self.remark(Style::Dim, &format!("· {stage} {number}: {}", one_line(command, LINE_CHARS_MAX)))
            }
            Some(StepEnd { code: 0, .. }) => self.text(),
            Some(StepEnd { code, duration_ms }) => {
                let took = words::duration(duration_ms);
                self.remark(Style::Warn, &format!("! {stage} {number} ended with code {code} after {took}"))
            }
        }
    }

    fn state(&mut self, state: &State) -> Text {
        self.state = state.name().to_owned();
        if matches!(state, State::Running) {
            self.exhausted.clear();
        }
        if let State::Parked { parked } = state {
            return self.remark(Style::Warn, &format!("‖ {}; it goes on by itself", words::parked(parked)));
        }
        let worth_a_line = matches!(state, State::Queued | State::Preparing | State::Running);
        if self.states && worth_a_line {
            return self.remark(Style::Dim, &format!("· {}", self.state));
        }
        self.text()
    }

    fn output(&mut self, stream: Stream, end: u64, text: &str) -> Text {
        let (index, name) = match stream {
            Stream::Stdout => (0, "stdout"),
            Stream::Stderr => (1, "stderr"),
        };
        let piece = &mut self.outputs[index];
        let mut safe = String::new();
        piece.filter.push(text, &mut safe);
        // A piece that is shorter than its span ended with a line feed, and with it every sequence.
        if end != piece.end + text.len() as u64 {
            piece.filter = Neutraliser::default();
        }
        piece.end = end;
        let label = self.text().add(Style::Dim, &format!("{name}| "));
        if self.paint.raw { label.agent(text).end() } else { label.add(Style::Dim, &safe).end() }
    }

    fn denied(&mut self, id: String, tool: &str, reason: &str) -> Text {
        if self.denied.len() < DENIED_MAX {
            self.denied.push(id);
        }
        let reason = one_line(reason, LINE_CHARS_MAX * 2);
        self.text().add(Style::Bad, &format!("✗ {tool}")).plain("  denied: ").agent(&reason).end()
    }

    fn frame(&mut self, frame: &Value) -> Text {
        match frame["type"].as_str() {
            Some("assistant") => self.assistant(frame),
            Some("user") => self.tool_results(frame),
            Some("system") => self.system(frame),
            Some("result") => self.result(frame),
            _ => self.text(),
        }
    }

    fn assistant(&mut self, frame: &Value) -> Text {
        let sub = !frame["parent_tool_use_id"].is_null();
        if let Some(id) = frame["message"]["id"].as_str()
            && !sub
            && id != self.last_message_id
        {
            self.turns += 1;
            id.clone_into(&mut self.last_message_id);
        }
        let indent = if sub { "  " } else { "" };
        let mut text = self.text();
        for block in blocks(&frame["message"]["content"]) {
            match block["type"].as_str() {
                Some("text") => {
                    let said = block["text"].as_str().unwrap_or("").trim_end();
                    if said.trim().is_empty() {
                        continue;
                    }
                    if !sub {
                        said.clone_into(&mut self.last_text);
                    }
                    for line in said.lines() {
                        text = text.plain(indent).agent(line).end();
                    }
                }
                Some("tool_use") => {
                    let name = block["name"].as_str().unwrap_or("?");
                    let argument = telling_argument(name, &block["input"]);
                    self.last_tool = one_line(&format!("{name} {argument}"), 60);
                    text = text.plain(indent).add(Style::Bold, &format!("● {}", one_line(name, 60)));
                    text = text.plain("  ").agent(&argument).end();
                }
                _ => {}
            }
        }
        text
    }

    /// Results of tools that failed, one line each; what worked needs no words.
    fn tool_results(&mut self, frame: &Value) -> Text {
        let mut text = self.text();
        for block in blocks(&frame["message"]["content"]) {
            let failed = block["type"] == "tool_result" && block["is_error"] == true;
            let id = block["tool_use_id"].as_str().unwrap_or("");
            if !failed || self.denied.iter().any(|d| d == id) {
                continue;
            }
            let content = &block["content"];
            let said = content.as_str().or_else(|| content[0]["text"].as_str()).unwrap_or("(no text)");
            text = text.add(Style::Bad, "  ✗ ").agent(&one_line(said, LINE_CHARS_MAX)).end();
        }
        text
    }

    fn system(&mut self, frame: &Value) -> Text {
        let word = |key: &str| frame[key].as_str().unwrap_or("?").to_owned();
        match frame["subtype"].as_str() {
            Some("api_retry") => {
                let status = frame["error_status"].as_u64().map_or("nothing".into(), |s| s.to_string());
                let delay = frame["retry_delay_ms"].as_f64().unwrap_or(0.0) as u64;
                let (attempt, max) = (&frame["attempt"], &frame["max_retries"]);
                let said = format!(
                    "↻ the model API answered {status} ({}); retry {attempt} of {max} in {}",
                    word("error"),
                    words::duration(delay)
                );
                self.remark(Style::Warn, &said)
            }
            Some("model_fallback") => {
                let (from, to) = (word("original_model"), word("fallback_model"));
                self.remark(Style::Warn, &format!("↻ {from} is overloaded; going on with {to}"))
            }
            Some("compact_boundary") => self.remark(Style::Dim, "· the conversation was compacted"),
            Some("permission_denied") => {
                let id = word("tool_use_id");
                if self.denied.contains(&id) {
                    return self.text();
                }
                self.denied(id, &one_line(&word("tool_name"), 60), &word("message"))
            }
            _ => self.text(),
        }
    }

    /// The CLI's own result: said only where it is no repetition of the last text.
    fn result(&mut self, frame: &Value) -> Text {
        let errors = blocks(&frame["errors"]).iter().filter_map(Value::as_str);
        let said = frame["result"].as_str().map(str::to_owned);
        let said = said.unwrap_or_else(|| errors.collect::<Vec<_>>().join("\n"));
        let said = said.trim_end();
        if said.is_empty() || said == self.last_text {
            return self.text();
        }
        said.clone_into(&mut self.last_text);
        let failed = frame["is_error"] == true;
        let mut text = self.text();
        for line in said.lines() {
            text = if failed { text.add(Style::Bad, "✗ ") } else { text };
            text = text.agent(line).end();
        }
        text
    }

    fn end(&mut self, outcome: Outcome, totals: &Totals, result: Option<String>) -> Text {
        let mut text = self.text();
        // After a gap in the events the answer may not have been seen.
        if let Some(result) = result.as_deref().map(str::trim_end)
            && !result.is_empty()
            && result != self.last_text
            && !matches!(outcome, Outcome::Failed(_))
        {
            text = text.agent(result).end();
        }
        let elapsed = self.created_ms.map(|created| self.now_ms.saturating_sub(created));
        text = verdict(text.end(), &outcome);
        text = text.plain("  ").plain(&spent(totals, elapsed, self.cost_limit_usd)).end();
        text = text.add(Style::Dim, &format!("  {}", tokens(totals))).end();
        text = explain(text, &outcome, &self.job);
        self.charged = totals.charged_micro_usd;
        self.state = "done".to_owned();
        self.outcome = Some(outcome);
        text
    }
}

/// One line: how it ended.
pub(super) fn verdict(text: Text, outcome: &Outcome) -> Text {
    match outcome {
        Outcome::Succeeded => text.add(Style::Good, "✓ succeeded").end(),
        Outcome::Failed(f) => {
            let place = format!(" in {} ({})", f.phase.as_str(), f.reason.as_str());
            text.add(Style::Bad, "✗ failed").plain(&place).end()
        }
        Outcome::Stopped { reason } => {
            text.add(Style::Warn, "■ stopped").plain(&format!(": {}", words::stop(*reason))).end()
        }
        Outcome::Lost => text.add(Style::Bad, "✗ lost").plain(": nobody can say how it ended").end(),
    }
}

/// What happened, whose fault, what to do next.
pub(super) fn explain(mut text: Text, outcome: &Outcome, job: &str) -> Text {
    if let Outcome::Failed(failure) = outcome {
        let mut label = "  what:  ";
        for line in failure.message.trim_end().lines() {
            text = text.plain(label).agent(line).end();
            label = "         ";
        }
        text = text.plain("  fault: ").plain(words::blame(failure.blame)).end();
    }
    if let Some(next) = words::next_step(outcome, job) {
        text = text.plain("  hint:  ").plain(&next).end();
    }
    text
}

/// Time, turns and money.
pub(super) fn spent(totals: &Totals, elapsed_ms: Option<u64>, cost_limit_usd: f64) -> String {
    let mut parts: Vec<String> = elapsed_ms.map(words::duration).into_iter().collect();
    parts.push(words::plural(totals.turns, "turn"));
    parts.push(words::plural(totals.tool_calls, "tool call"));
    if totals.tool_denials > 0 {
        parts.push(format!("{} denied", totals.tool_denials));
    }
    let limit = words::dollars_limit(cost_limit_usd);
    parts.push(format!("{} of {limit}", words::usd(totals.charged_micro_usd)));
    parts.join(" · ")
}

/// Tokens and requests.
pub(super) fn tokens(totals: &Totals) -> String {
    let usage = totals.usage;
    let mut parts = vec![
        format!("{} tokens in", words::count(usage.input)),
        format!("{} out", words::count(usage.output)),
    ];
    if usage.cache_read > 0 {
        parts.push(format!("{} from the cache", words::count(usage.cache_read)));
    }
    let written = usage.cache_write_5m + usage.cache_write_1h;
    if written > 0 {
        parts.push(format!("{} into the cache", words::count(written)));
    }
    parts.push(words::plural(totals.requests, "request"));
    parts.join(" · ")
}

fn blocks(content: &Value) -> &[Value] {
    content.as_array().map_or(&[], Vec::as_slice)
}

/// The argument of a tool call that tells most, on one line.
fn telling_argument(tool: &str, input: &Value) -> String {
    let key = match tool {
        "Bash" | "PowerShell" => "command",
        "Read" | "Write" | "Edit" => "file_path",
        "NotebookEdit" | "NotebookRead" => "notebook_path",
        "Glob" | "Grep" => "pattern",
        "WebFetch" => "url",
        "WebSearch" | "ToolSearch" => "query",
        "Agent" | "Task" => "description",
        "Skill" => "skill",
        _ => "",
    };
    if let Some(items) = input["todos"].as_array() {
        return words::plural(items.len() as u64, "item");
    }
    let text = match input[key].as_str() {
        Some(text) => text.strip_prefix("/workspace/").unwrap_or(text).to_owned(),
        None if input.as_object().is_none_or(|o| o.is_empty()) => String::new(),
        None => input.to_string(),
    };
    let argument = one_line(&text, LINE_CHARS_MAX);
    match input["path"].as_str().filter(|_| key == "pattern") {
        Some(place) => format!("{argument}  in {}", one_line(place, 80)),
        None => argument,
    }
}

#[cfg(test)]
mod tests;
