//! Records of the audit as lines for people. Pure; all text of a record is made safe.

use super::{Paint, Style, Text, one_line, words};
use crate::audit::{Record, What};
use crate::event::Decision;
use crate::job::Outcome;

/// One record; `jobs` adds whose it is.
pub(crate) fn record(paint: Paint, record: &Record, jobs: bool) -> Text {
    let at = crate::clock::rfc3339(record.at_ms);
    let mut text = Text::new(paint).add(Style::Dim, &at).plain("  ");
    if jobs {
        text = text.plain(&format!("{} {:>5}  ", record.job, record.uid));
    }
    let kind = record.what.kind().map_or("gap", |kind| kind.as_str());
    let (style, word, words) = line(&record.what);
    text.plain(&format!("{kind:<8} "))
        .add(style, &format!("{word:<8}"))
        .plain(" ")
        .plain(&one_line(&words, 300))
        .end()
}

fn decided(decision: Decision) -> (Style, &'static str) {
    match decision {
        Decision::Allow => (Style::Good, "allow"),
        Decision::Deny => (Style::Bad, "deny"),
        Decision::Rewrite => (Style::Warn, "rewrite"),
    }
}

fn because(reason: Option<&String>) -> String {
    reason.map(|reason| format!(": {reason}")).unwrap_or_default()
}

/// Style, one word and the rest.
fn line(what: &What) -> (Style, String, String) {
    let plain = |word: &str, words: String| (Style::Plain, word.to_owned(), words);
    match what {
        What::Tool { tool, decision, rule, reason, .. } => {
            let (style, word) = decided(*decision);
            (style, word.into(), format!("{tool}  [{rule}]{}", because(reason.as_ref())))
        }
        What::Egress {
            host,
            port,
            method,
            path,
            decision,
            rule,
            reason,
            credential,
            bytes_up,
            bytes_down,
            status,
            cached_bytes,
            ..
        } => {
            let (style, word) = decided(*decision);
            let request = match (method, path) {
                (Some(method), Some(path)) => format!("{method} {host}:{port}{path}"),
                (Some(method), None) => format!("{method} {host}:{port}"),
                (None, _) => format!("{host}:{port}"),
            };
            let with = credential.as_ref().map(|name| format!(", with {name}")).unwrap_or_default();
            let cached = Some(cached_bytes).filter(|bytes| **bytes > 0);
            let cached = cached.map(|bytes| format!(", {bytes} B cached")).unwrap_or_default();
            let said = status.map(|status| format!("status {status}, ")).unwrap_or_default();
            let size = format!("{said}{bytes_up} B up, {bytes_down} B down{cached}{with}");
            (style, word.into(), format!("{request}  {size}  [{rule}]{}", because(reason.as_ref())))
        }
        What::Request { model, reserved_micro_usd, credential } => {
            let with = if credential.is_empty() { String::new() } else { format!(", with {credential}") };
            plain("reserve", format!("{model}  {}{with}", words::usd(*reserved_micro_usd)))
        }
        What::Charge { model, status, charged_micro_usd, .. } => {
            plain("charge", format!("{model}  {}  status {status}", words::usd(*charged_micro_usd)))
        }
        What::Refused { status, why } => (Style::Bad, "refuse".into(), format!("{status}: {why}")),
        What::Budget { scope, spent_micro_usd, limit_micro_usd, .. } => {
            let words = format!(
                "{scope}: {} of {} spent",
                words::usd(*spent_micro_usd),
                words::usd(*limit_micro_usd)
            );
            (Style::Bad, "no room".into(), words)
        }
        What::Stop { reason, detail } => {
            (Style::Warn, "stop".into(), format!("{}: {detail}", reason.as_str()))
        }
        What::Limit { limit, count } => {
            (Style::Bad, "killed".into(), format!("{limit}: {}", words::plural(*count, "process")))
        }
        What::End { outcome, charged_micro_usd, tool_calls, tool_denials } => end(
            outcome,
            format!("{}, {tool_calls} tool calls, {tool_denials} denied", words::usd(*charged_micro_usd)),
        ),
        What::Gap { first, last } => {
            (Style::Bad, "lost".into(), format!("events {first} to {last} were dropped from the journal"))
        }
    }
}

fn end(outcome: &Outcome, totals: String) -> (Style, String, String) {
    match outcome {
        Outcome::Succeeded => (Style::Good, "success".into(), totals),
        Outcome::Failed(failure) => {
            (Style::Bad, "failed".into(), format!("{}; {totals}", failure.reason.as_str()))
        }
        Outcome::Stopped { reason } => {
            (Style::Warn, "stopped".into(), format!("{}; {totals}", reason.as_str()))
        }
        Outcome::Lost => (Style::Bad, "lost".into(), totals),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(json: &str, jobs: bool) -> String {
        let found: Record = serde_json::from_str(json).expect("record");
        record(Paint::default(), &found, jobs).as_str().to_owned()
    }

    #[test]
    fn a_record_is_one_line_whatever_is_in_it() {
        let denied = r#"{"at_ms":0,"job":"j0dq2v7hk0x3m9ra","uid":1000,"seq":3,"origin":"daemon","kind":"tool",
            "tool_use_id":"t","tool":"Bash\n\u001b[2Kx","decision":"deny","rule":"tools.deny Bash","reason":"no\nmore"}"#;
        let line = shown(denied, true);
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(!line.contains('\u{1b}') && line.contains("j0dq2v7hk0x3m9ra  1000  tool     deny"), "{line}");
        let egress = r#"{"at_ms":0,"job":"j0dq2v7hk0x3m9ra","uid":1000,"seq":3,"origin":"gateway","kind":"egress",
            "host":"example.org","port":443,"method":"GET","path":"/a","decision":"allow","rule":"egress.allow 1",
            "credential":"git","bytes_up":10,"bytes_down":20,"duration_ms":5}"#;
        assert_eq!(
            shown(egress, false),
            "1970-01-01T00:00:00.000Z  egress   allow    GET example.org:443/a 10 B up, 20 B down, with git [egress.allow 1]\n"
        );
    }
}
