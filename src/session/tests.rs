//! The session against scripted lines: what it sends, and what it makes of an end.

use super::*;
use crate::job::JobSpec;
use crate::policy::{Defaults, Policy, narrow};
use proptest::prelude::*;

impl Session {
    fn on_line(&mut self, line: &[u8]) -> Vec<Step> {
        frames::parse(line).map_or_else(Vec::new, |frame| self.on_frame(frame))
    }
}

fn plan(spec: &str) -> Plan {
    let policy = Policy::parse("trusted", include_str!("../../policies/trusted.toml")).expect("policy");
    let defaults = Defaults {
        model: "claude-sonnet-4-6".into(),
        image: "hotcell/cell".into(),
        provider: "anthropic".into(),
    };
    narrow(&JobSpec::parse(spec.as_bytes()).expect("spec"), &policy, None, &defaults).expect("plan")
}

fn session(spec: &str) -> Session {
    Session::new(plan(spec), "do it".into(), None, String::new())
}

fn ok(id: &str) -> String {
    format!(
        r#"{{"type":"control_response","response":{{"subtype":"success","request_id":"{id}","response":{{}}}}}}"#
    )
}

fn sent(steps: &[Step]) -> Vec<serde_json::Value> {
    let frames = steps.iter().filter_map(|s| if let Step::Send(f) = s { Some(f) } else { None });
    frames.map(|f| serde_json::from_slice(f).expect("json")).collect()
}

fn booted(spec: &str) -> Session {
    let mut session = session(spec);
    session.on_line(ok(INITIALIZE).as_bytes());
    let steps = session.on_line(ok(SETTINGS).as_bytes());
    assert!(matches!(steps[0], Step::Booted));
    session
}

const RESULT: &str =
    r#"{"type":"result","subtype":"success","is_error":false,"result":"done","total_cost_usd":0.01}"#;

#[test]
fn the_task_is_sent_only_after_the_gate_stands() {
    let mut session = session(r#"{"prompt":"x"}"#);
    assert!(sent(&session.start()).iter().all(|f| f["type"] == "control_request"));
    assert!(session.on_line(ok(SETTINGS).as_bytes()).is_empty());
    assert!(session.on_line(ok(SETTINGS).as_bytes()).is_empty());
    let steps = session.on_line(ok(INITIALIZE).as_bytes());
    assert_eq!(sent(&steps)[0]["message"]["content"], "do it");
}

#[test]
fn a_refused_gate_ends_the_cell_before_the_task_is_sent() {
    let mut session = session(r#"{"prompt":"x"}"#);
    session.on_line(ok(INITIALIZE).as_bytes());
    let refused = r#"{"type":"control_response","response":{"subtype":"error","request_id":"hotcell-settings","error":"no"}}"#;
    let steps = session.on_line(refused.as_bytes());
    assert!(matches!(&steps[..], [Step::Broken(_)]));
}

#[test]
fn every_tool_call_is_judged_and_a_denied_one_tells_the_agent_why() {
    let mut session = booted(r#"{"prompt":"x","disallowed_tools":["Write"]}"#);
    let ask = |tool: &str| {
        format!(
            r#"{{"type":"control_request","request_id":"q","request":{{"subtype":"can_use_tool","tool_name":"{tool}","input":{{}},"tool_use_id":"t"}}}}"#
        )
    };
    let allowed = session.on_line(ask("Bash").as_bytes());
    assert_eq!(sent(&allowed)[0]["response"]["response"]["behavior"], "allow");
    let denied = session.on_line(ask("Write").as_bytes());
    let answer = &sent(&denied)[0]["response"]["response"];
    assert_eq!(answer["behavior"], "deny");
    assert!(answer["message"].as_str().expect("text").contains("Write"));
    assert_eq!(session.tool_counts(), (2, 1));
}

#[test]
fn in_other_modes_the_hook_is_the_gate_and_nobody_can_be_asked() {
    let mut session = booted(r#"{"prompt":"x","permission_mode":"default","disallowed_tools":["Write"]}"#);
    let hook = |tool: &str, id: &str| {
        format!(
            r#"{{"type":"control_request","request_id":"q","request":{{"subtype":"hook_callback","callback_id":"{id}","input":{{"tool_name":"{tool}","tool_use_id":"t","tool_input":{{}}}}}}}}"#
        )
    };
    let pass = session.on_line(hook("Bash", options::GATE_CALLBACK).as_bytes());
    assert_eq!(sent(&pass)[0]["response"]["response"], json!({}));
    for (tool, id) in [("Write", options::GATE_CALLBACK), ("Bash", "somebody-else")] {
        let steps = session.on_line(hook(tool, id).as_bytes());
        let answer = sent(&steps)[0]["response"].clone();
        assert_eq!(answer["subtype"], "success", "an error answer would let the tool run");
        assert_eq!(answer["response"]["hookSpecificOutput"]["permissionDecision"], "deny");
    }
    let ask = r#"{"type":"control_request","request_id":"q","request":{"subtype":"can_use_tool","tool_name":"Bash","input":{},"tool_use_id":"t"}}"#;
    assert_eq!(sent(&session.on_line(ask.as_bytes()))[0]["response"]["response"]["behavior"], "deny");
}

#[test]
fn the_end_waits_for_background_agents() {
    let mut session = booted(r#"{"prompt":"x"}"#);
    session.on_line(br#"{"type":"system","subtype":"task_started","task_id":"a","task_type":"local_agent"}"#);
    assert!(session.on_line(RESULT.as_bytes()).is_empty());
    session.on_line(br#"{"type":"system","subtype":"task_notification","task_id":"a"}"#);
    let steps = session.on_line(RESULT.as_bytes());
    assert_eq!(sent(&steps)[0]["request"]["subtype"], "end_session");
    assert!(session.on_line(RESULT.as_bytes()).is_empty(), "the end is asked for once");
}

#[test]
fn turns_count_messages_of_the_main_agent_once() {
    let mut session = booted(r#"{"prompt":"x"}"#);
    for line in [
        r#"{"type":"assistant","message":{"id":"m1","content":[]}}"#,
        r#"{"type":"assistant","message":{"id":"m1","content":[]}}"#,
        r#"{"type":"assistant","message":{"id":"s1","content":[]},"parent_tool_use_id":"t"}"#,
        r#"{"type":"assistant","message":{"id":"m2","content":[]},"parent_tool_use_id":null}"#,
    ] {
        session.on_line(line.as_bytes());
    }
    assert_eq!(session.turns(), 2);
}

#[test]
fn an_outcome_needs_both_the_exit_status_and_the_result() {
    let exit = |code| AgentExit { code, oom_kills: 0, stderr_tail: "boom".into() };
    let reason = |outcome: Outcome| match outcome {
        Outcome::Failed(f) => (f.phase, f.reason, f.message),
        other => panic!("{other:?}"),
    };
    let fresh = session(r#"{"prompt":"x"}"#);
    let (phase, why, words) = reason(fresh.outcome(&exit(127), None));
    assert_eq!((phase, why), (Phase::Boot, FailReason::AgentStart));
    assert!(words.contains("boom") && words.contains("127"), "{words}");

    let mut good = booted(r#"{"prompt":"x"}"#);
    assert_eq!(reason(good.outcome(&exit(0), None)).1, FailReason::AgentError);
    good.on_line(RESULT.as_bytes());
    assert_eq!(good.outcome(&exit(0), None), Outcome::Succeeded);
    assert_eq!(reason(good.outcome(&exit(1), None)).1, FailReason::AgentError);
    assert_eq!(good.cli_cost(), Some(MicroUsd(10_000)));

    for (status, expected) in [
        (401, FailReason::ProviderAuth),
        (429, FailReason::ProviderLimit),
        (529, FailReason::ProviderLimit),
        (500, FailReason::ProviderError),
        (400, FailReason::ProviderRejected),
    ] {
        let mut bad = booted(r#"{"prompt":"x"}"#);
        let line = format!(
            r#"{{"type":"result","subtype":"success","is_error":true,"api_error_status":{status},"result":"API Error"}}"#
        );
        bad.on_line(line.as_bytes());
        assert_eq!(reason(bad.outcome(&exit(1), None)).1, expected);
    }
    let mut cut = booted(r#"{"prompt":"x"}"#);
    cut.on_line(br#"{"type":"result","subtype":"success","is_error":true,"result":"Unable to connect"}"#);
    assert_eq!(reason(cut.outcome(&exit(1), Some(Trouble::Provider(0)))).1, FailReason::ProviderError);
    let mut refused = booted(r#"{"prompt":"x"}"#);
    refused.on_line(
        br#"{"type":"result","subtype":"success","is_error":true,"api_error_status":403,"result":"no"}"#,
    );
    let outcome = refused.outcome(&exit(1), Some(Trouble::Refused));
    assert_eq!(reason(outcome).1, FailReason::GatewayRefused, "the provider is not to blame for our refusal");
    let mut turns = booted(r#"{"prompt":"x"}"#);
    turns.on_line(br#"{"type":"result","subtype":"error_max_turns","is_error":true}"#);
    assert_eq!(turns.outcome(&exit(1), None), Outcome::Stopped { reason: StopReason::Turns });
}

proptest! {
    #[test]
    fn the_same_lines_give_the_same_bytes(picks in proptest::collection::vec(0usize..8, 0..40)) {
        let initialized = ok(INITIALIZE);
        let settled = ok(SETTINGS);
        let lines = [
            initialized.as_str(),
            settled.as_str(),
            r#"{"type":"control_request","request_id":"q","request":{"subtype":"can_use_tool","tool_name":"Bash","input":{},"tool_use_id":"t"}}"#,
            r#"{"type":"control_request","request_id":"m","request":{"subtype":"mcp_message"}}"#,
            r#"{"type":"assistant","message":{"id":"m1"}}"#,
            RESULT,
            "no json",
            r#"{"type":"system","subtype":"task_started","task_id":"a","task_type":"local_agent"}"#,
        ];
        let run = || {
            let mut session = session(r#"{"prompt":"x"}"#);
            let mut bytes = Vec::new();
            for pick in &picks {
                for step in session.on_line(lines[*pick].as_bytes()) {
                    if let Step::Send(frame) = step {
                        bytes.extend(frame);
                    }
                }
            }
            bytes
        };
        prop_assert_eq!(run(), run());
    }
}

/// A session under `trusted` with rules of its own.
fn ruled(rules: &str, spec: &str) -> Session {
    let text = format!("{}\n{rules}", include_str!("../../policies/trusted.toml"));
    let policy = Policy::parse("test", &text).expect("policy");
    let defaults = Defaults {
        model: "claude-sonnet-4-6".into(),
        image: "hotcell/cell".into(),
        provider: "anthropic".into(),
    };
    let plan =
        narrow(&JobSpec::parse(spec.as_bytes()).expect("spec"), &policy, None, &defaults).expect("plan");
    let mut session = Session::new(plan, "do it".into(), None, String::new());
    session.on_line(ok(INITIALIZE).as_bytes());
    session.on_line(ok(SETTINGS).as_bytes());
    session
}

const HOOKED: &str = "[[rule]]\ntool = 'Bash'\naction = 'hook'\nrun = ['/bin/check']";
const BASH: &str = r#"{"type":"control_request","request_id":"q","request":{"subtype":"can_use_tool","tool_name":"Bash","input":{"command":"ls"},"tool_use_id":"t"}}"#;

fn errand(steps: &[Step]) -> &Errand {
    match steps {
        [Step::Find(errand)] => errand,
        other => panic!("an errand and nothing else: {other:?}"),
    }
}

#[test]
fn a_call_waits_for_its_hook_and_runs_with_what_it_gives() {
    let mut session = ruled(HOOKED, r#"{"prompt":"x"}"#);
    let steps = session.on_line(BASH.as_bytes());
    let What::Hook { id, run, stdin, .. } = errand(&steps).what.clone() else { panic!("a hook") };
    assert_eq!(run, [std::path::PathBuf::from("/bin/check")]);
    let stdin: serde_json::Value = serde_json::from_slice(&stdin).expect("json");
    assert_eq!(
        (&stdin["tool_input"]["command"], &stdin["hook_event_name"]),
        (&json!("ls"), &json!("PreToolUse"))
    );
    let answer = crate::policy::judge::HookAnswer::Pass(Some(json!({ "command": "ls -l" })));
    let steps = session.on_found("q", Finding::Hook(id, answer.clone()));
    assert!(matches!(&steps[0], Step::Event(Body::Tool { decision: crate::event::Decision::Rewrite, .. })));
    assert_eq!(sent(&steps)[0]["response"]["response"]["updatedInput"]["command"], "ls -l");
    assert!(session.on_found("q", Finding::Hook(id, answer)).is_empty(), "a question is answered once");
}

#[test]
fn a_call_that_the_cli_gave_up_is_not_answered_but_told() {
    let mut session = ruled(HOOKED, r#"{"prompt":"x"}"#);
    let steps = session.on_line(BASH.as_bytes());
    let What::Hook { id, .. } = errand(&steps).what.clone() else { panic!("a hook") };
    let steps = session.on_line(br#"{"type":"control_cancel_request","request_id":"q"}"#);
    assert!(matches!(&steps[..], [Step::Event(Body::Tool { decision: crate::event::Decision::Deny, .. })]));
    let late = crate::policy::judge::HookAnswer::Pass(None);
    assert!(session.on_found("q", Finding::Hook(id, late)).is_empty());
}

#[test]
fn a_decision_of_the_journal_is_sent_again_byte_for_byte() {
    let mut first = ruled(HOOKED, r#"{"prompt":"x"}"#);
    let steps = first.on_line(BASH.as_bytes());
    let What::Hook { id, .. } = errand(&steps).what.clone() else { panic!("a hook") };
    let answer = crate::policy::judge::HookAnswer::Pass(Some(json!({ "command": "ls -l" })));
    let decided = first.on_found("q", Finding::Hook(id, answer));
    let Step::Event(body) = &decided[0] else { panic!("the event comes first") };
    let line = serde_json::to_string(&crate::event::Event {
        seq: 1,
        at_ms: 1,
        origin: body.origin(),
        body: body.clone(),
    });
    let line = line.expect("json");
    let mut second = ruled(HOOKED, r#"{"prompt":"x"}"#);
    second.on_line(BASH.as_bytes());
    let again = second.on_journaled(&serde_json::from_str(&line).expect("line"));
    assert_eq!(sent(&again), sent(&decided));
}

#[test]
fn what_is_asked_after_a_call_blocks_and_never_lets_an_error_through() {
    let after = "[[rule]]\ntool = 'Bash'\naction = 'hook'\nwhen = 'after'\nrun = ['/bin/check']";
    let mut session = ruled(after, r#"{"prompt":"x"}"#);
    assert_eq!(
        sent(&session.start())[0]["request"]["hooks"]["PostToolUse"][0]["hookCallbackIds"][0],
        options::AFTER_CALLBACK
    );
    // Before the call nothing is asked.
    assert_eq!(sent(&session.on_line(BASH.as_bytes())).len(), 1);
    let call = format!(
        r#"{{"type":"control_request","request_id":"p","request":{{"subtype":"hook_callback","callback_id":"{}","input":{{"tool_name":"Bash","tool_use_id":"t","tool_input":{{"command":"ls"}},"tool_response":{{"stdout":"key"}}}}}}}}"#,
        options::AFTER_CALLBACK
    );
    let steps = session.on_line(call.as_bytes());
    let What::Hook { id, stdin, .. } = errand(&steps).what.clone() else { panic!("a hook") };
    assert!(String::from_utf8(stdin).expect("text").contains("\"stdout\":\"key\""));
    let failed = crate::policy::judge::HookAnswer::Failed("boom".into());
    let steps = session.on_found("p", Finding::Hook(id, failed));
    let answer = &sent(&steps)[0]["response"];
    assert_eq!((&answer["subtype"], &answer["response"]["decision"]), (&json!("success"), &json!("block")));
    assert_eq!(session.tool_counts(), (1, 0), "one call, allowed");
}

/// Any JSON value, small.
fn anything() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|b| json!(b)),
        any::<i32>().prop_map(|n| json!(n)),
        "[ -~]{0,12}".prop_map(|text| json!(text)),
        prop_oneof![Just("Bash"), Just("Write"), Just("ls"), Just("hotcell-gate"), Just("/etc/shadow")]
            .prop_map(|text| json!(text)),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..3).prop_map(|list| json!(list)),
            proptest::collection::btree_map("(command|file_path|tool_name|tool_input|x)", inner, 0..4)
                .prop_map(|map| json!(map)),
        ]
    })
}

/// A question of the CLI, with any field missing or of any kind.
fn question() -> impl Strategy<Value = serde_json::Value> {
    let field = |right: serde_json::Value| prop_oneof![3 => Just(Some(right)), 1 => Just(None), 1 => anything().prop_map(Some)];
    let callback = prop_oneof![Just(options::GATE_CALLBACK), Just(options::AFTER_CALLBACK), Just("other")];
    let tool = prop_oneof![Just("Bash"), Just("Write"), Just("mcp__x__y"), Just("Glob")];
    let fields = (callback, tool).prop_flat_map(move |(callback, tool)| {
        (
            field(json!(callback)),
            field(json!(tool)),
            field(json!({ "command": "ls", "file_path": "a" })),
            field(json!("t")),
            any::<bool>(),
        )
    });
    fields.prop_map(|(callback, tool, input, tool_use_id, hook)| {
        let mut call = serde_json::Map::new();
        let given = [("tool_name", tool), ("tool_input", input), ("tool_use_id", tool_use_id.clone())];
        call.extend(given.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))));
        let mut request = if hook {
            json!({ "subtype": "hook_callback", "input": call })
        } else {
            let mut request = json!({ "subtype": "can_use_tool" });
            for (key, to) in [("tool_name", "tool_name"), ("tool_input", "input")] {
                if let Some(value) = call.get(key) {
                    request[to] = value.clone();
                }
            }
            request
        };
        for (key, value) in [("callback_id", callback), ("tool_use_id", tool_use_id)] {
            if let Some(value) = value {
                request[key] = value;
            }
        }
        json!({ "type": "control_request", "request_id": "q", "request": request })
    })
}

/// True where the CLI would run the call after this answer.
fn lets_it_run(hook: bool, answer: &serde_json::Value) -> bool {
    let response = &answer["response"]["response"];
    if hook {
        // As measured: everything but a well-formed denial.
        response["hookSpecificOutput"]["permissionDecision"] != "deny"
            || response["hookSpecificOutput"]["hookEventName"] != "PreToolUse"
    } else {
        response["behavior"] == "allow"
    }
}

proptest! {
    #[test]
    fn a_question_gets_one_answer_that_is_no_error_and_runs_nothing_undecided(
        asked in question(),
        mode in prop_oneof![Just("bypassPermissions"), Just("default"), Just("acceptEdits"), Just("plan"), Just("dontAsk")],
        hooked in any::<bool>(),
        answer in prop_oneof![
            Just(crate::policy::judge::HookAnswer::Pass(None)),
            Just(crate::policy::judge::HookAnswer::Deny("no".into())),
            Just(crate::policy::judge::HookAnswer::Failed("no".into())),
        ],
    ) {
        let rules = if hooked { HOOKED } else { "" };
        let mut session = ruled(rules, &json!({ "prompt": "x", "permission_mode": mode }).to_string());
        let mut steps = session.on_line(asked.to_string().as_bytes());
        let passes = answer == crate::policy::judge::HookAnswer::Pass(None);
        let waits = matches!(&steps[..], [Step::Find(_)]);
        if waits {
            // Nothing leaves before the hook's word.
            let What::Hook { id, .. } = errand(&steps).what.clone() else { panic!("a hook") };
            steps = session.on_found("q", Finding::Hook(id, answer));
        }
        let answers = sent(&steps);
        prop_assert_eq!(answers.len(), 1, "{:?}", steps);
        prop_assert_eq!(&answers[0]["response"]["request_id"], &json!("q"));
        prop_assert_eq!(&answers[0]["response"]["subtype"], &json!("success"), "an error lets the tool run");
        let request = &asked["request"];
        let hook = request["subtype"] == "hook_callback";
        if request["callback_id"] == options::AFTER_CALLBACK && hook {
            return Ok(());
        }
        let decisions: Vec<_> = steps
            .iter()
            .filter_map(|s| if let Step::Event(Body::Tool { decision, .. }) = s { Some(*decision) } else { None })
            .collect();
        prop_assert_eq!(decisions.len(), 1, "one decision, and before the answer: {:?}", steps);
        prop_assert!(matches!(steps[0], Step::Event(_)));
        let denied = decisions[0] == crate::event::Decision::Deny;
        prop_assert_eq!(lets_it_run(hook, &answers[0]), !denied, "{:?}", answers[0]);
        let (tool, input) = if hook {
            (&request["input"]["tool_name"], &request["input"]["tool_input"])
        } else {
            (&request["tool_name"], &request["input"])
        };
        let readable = tool.as_str().is_some_and(|name| !name.is_empty()) && input.is_object();
        if !readable || (waits && !passes) || (!hook && mode != "bypassPermissions") {
            prop_assert!(denied, "{:?}", answers[0]);
        }
    }
}
