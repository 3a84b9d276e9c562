//! How the events of a job read.

use super::*;
use crate::cli::fake;
use serde_json::json;

fn view(paint: Paint, states: bool) -> StreamView {
    let job = serde_json::from_value(fake::job(fake::JOB, json!({"state": "queued"}))).expect("job");
    StreamView::new(&job, paint, states)
}

fn read(events: &[Value], paint: Paint, states: bool) -> String {
    let mut view = view(paint, states);
    events.iter().map(|event| view.event(event).as_str().to_owned()).collect()
}

fn ending(outcome: Value) -> String {
    let mut last = json!({"type": "summary", "totals": fake::totals()});
    if let (Value::Object(last), Value::Object(outcome)) = (&mut last, outcome) {
        last.extend(outcome);
    }
    read(&fake::numbered(vec![last]), Paint::default(), true)
}

#[test]
fn a_job_reads_as_text_tools_and_an_end() {
    insta::assert_snapshot!("job", read(&fake::events_of_a_job(), Paint::default(), true));
}

#[test]
fn on_a_terminal_it_has_colours_and_no_lines_for_states() {
    let shown = read(&fake::events_of_a_job(), Paint { color: true, raw: false }, false);
    insta::assert_snapshot!("job_terminal", shown.replace('\u{1b}', "␛"));
}

#[test]
fn each_end_says_what_happened_whose_fault_and_what_next() {
    let failed =
        ending(json!({"outcome": "failed", "phase": "boot", "reason": "agent_start", "blame": "job",
        "message": "the CLI ended with 127 before it answered\nclaude: not \u{1b}[31mfound"}));
    let stopped = ending(json!({"outcome": "stopped", "reason": "budget", "result": "half an answer"}));
    let cancelled = ending(json!({"outcome": "stopped", "reason": "cancelled"}));
    let lost = ending(json!({"outcome": "lost"}));
    insta::assert_snapshot!("ends", [failed, stopped, cancelled, lost].join("----\n"));
}

#[test]
fn the_end_of_a_budget_is_told_once_in_the_stream() {
    let budget = |scope: &str| json!({"type": "budget", "scope": scope, "spent_micro_usd": 480_000, "limit_micro_usd": 500_000});
    let refused = json!({"type": "refused", "status": 403, "why": "budget"});
    let stop = json!({"type": "stop", "reason": "budget", "detail": "the job's budget is exhausted"});
    let running = json!({"type": "state", "state": "running"});
    let shown = |events: Vec<Value>| read(&fake::numbered(events), Paint::default(), false);
    let once = shown(vec![refused.clone(), budget("job"), refused.clone(), budget("job"), stop.clone()]);
    assert_eq!(once, "! the cost limit of $0.5000 has no room ($0.4800 spent)\n");
    let two = shown(vec![budget("job"), budget("batch"), stop.clone()]);
    assert_eq!(two.lines().count(), 2, "{two}");
    let again = shown(vec![budget("day"), running, budget("day")]);
    assert_eq!(again.lines().count(), 2, "after the pause it is news: {again}");
    assert!(shown(vec![stop]).starts_with("■ stopping: "), "where nothing else said why, the stop does");
}

#[test]
fn the_status_line_says_where_it_stands() {
    let mut view = view(Paint::default(), false);
    let events = fake::events_of_a_job();
    assert_eq!(view.status(1_767_323_050_000), "queued · 5s · 0 turns · $0.0000 of $1.00");
    for event in &events[..14] {
        view.event(event);
    }
    let line = "running · 1m 12s · 2 turns · $0.0210 of $1.00 · Edit src/sum.rs";
    assert_eq!(view.status(1_767_323_117_000), line);
}

#[test]
fn what_an_agent_says_cannot_act_on_the_terminal() {
    let evil = "a\u{1b}]0;title\u{7}b\u{9b}2Jc\u{202e}d\r";
    let content = json!([
        {"type": "text", "text": evil},
        {"type": "tool_use", "id": "t1", "name": evil, "input": {"command": evil}},
        {"type": "tool_use", "id": "t2", "name": "Bash", "input": {"command": evil}},
    ]);
    let results = json!([{"type": "tool_result", "tool_use_id": "t1", "is_error": true, "content": evil}]);
    let frame = |frame: Value| json!({"type": "frame", "end": 0, "frame": frame});
    let events = fake::numbered(vec![
        frame(json!({"type": "assistant", "message": {"id": "m", "content": content}})),
        frame(json!({"type": "user", "message": {"content": results}})),
        frame(json!({"type": "result", "is_error": true, "result": format!("{evil}!")})),
        frame(json!({"type": "system", "subtype": "api_retry", "error": evil})),
        frame(json!({"type": "system", "subtype": "permission_denied", "tool_name": evil, "message": evil})),
        json!({"type": "output", "stream": "stdout", "end": 9, "text": evil}),
        json!({"type": "note", "text": evil}),
        json!({"type": "tool", "tool_use_id": evil, "tool": evil, "decision": "deny", "rule": evil, "reason": evil}),
        json!({"type": "refused", "status": 403, "why": evil}),
        json!({"type": "summary", "outcome": "failed", "phase": "run", "reason": "agent_error", "blame": "job",
            "message": evil, "totals": fake::totals(), "result": evil}),
    ]);
    let mut view = view(Paint::default(), true);
    for event in &events {
        let shown = view.event(event).as_str().to_owned();
        assert!(!shown.is_empty());
        let bad = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!shown.contains(bad), "{event}: {shown:?}");
    }
    let raw = read(&events[..1], Paint { color: false, raw: true }, true);
    assert!(raw.contains("\u{1b}]0;title\u{7}"), "{raw:?}");
}

#[test]
fn a_sequence_cut_by_the_edge_of_a_piece_is_dropped_whole() {
    let piece =
        |end: u64, text: &str| json!({"type": "output", "stream": "stderr", "end": end, "text": text});
    // 5 bytes of 5: no line feed came, the line goes on; then 3 of 4: the line feed is the fourth.
    let events = fake::numbered(vec![
        piece(5, "ab\u{1b}[3"),
        piece(9, "1mc"),
        piece(15, "\u{1b}]0;d"),
        piece(17, "e"),
    ]);
    let shown = read(&events, Paint::default(), true);
    assert_eq!(shown, "stderr| ab\nstderr| c\nstderr| \nstderr| e\n");
}

#[test]
fn odd_frames_are_skipped_not_fatal() {
    let odd = [
        json!({}),
        json!({"type": 3}),
        json!({"type": "frame"}),
        json!({"type": "frame", "frame": []}),
        json!({"type": "frame", "frame": {"type": "assistant", "message": {"content": "text"}}}),
        json!({"type": "frame", "frame": {"type": "result", "errors": [1, {}]}}),
        json!({"type": "charge"}),
    ];
    assert_eq!(read(&odd, Paint::default(), true), "");
}
