//! What is fuzzed, one function a target: bytes in, and a panic where something that has to hold does not. Shared
//! by the cargo-fuzz targets (`fuzz_targets/`) and by the bounded run of `cargo test` (`tests/fuzz.rs`), so that
//! nothing is written twice. Pure: no file, no clock, no chance; the same bytes give the same run.

use std::sync::LazyLock;

use hotcell::gateway::body::{BodyFacts, Known, countable};
use hotcell::gateway::egress::hello::{HELLO_BYTES_MAX, Peek, peek};
use hotcell::gateway::fuzz::{BASE_URL, Head, Passed, Providers};
use hotcell::gateway::meter::{Meter, Reading};
use hotcell::job::{JobId, JobSpec};
use hotcell::model::eventstream;
use hotcell::policy::egress::{CanonicalPath, decide_url, parse_url};
use hotcell::policy::judge::{Call, Findings, HookAnswer, Judgement, Need, judge, judge_after};
use hotcell::policy::{Defaults, Host, Narrowing, Plan, Policy, PolicyError, narrow};
use hotcell::session::{AgentExit, Errand, Finding, INTERRUPT, Session, Step, What};
use hotcell::{agent::frames, audit, event};
use serde_json::Value;

/// A target by its name.
pub(crate) type Target = (&'static str, fn(&[u8]));

/// All of them; the names are those of the binaries and of the corpora.
pub(crate) const ALL: [Target; 8] = [
    ("policy_file", policy_file),
    ("request_head", request_head),
    ("body", body),
    ("sse_meter", sse_meter),
    ("eventstream_meter", eventstream_meter),
    ("client_hello", client_hello),
    ("session", session),
    ("audit", audit_lines),
];

const TRUSTED: &str = include_str!("../../policies/trusted.toml");
/// What the policies that come along do not say: hosts, paths, rules, and what requests may hold.
const MORE: &str = include_str!("more.toml");

static POLICY: LazyLock<Policy> =
    LazyLock::new(|| Policy::parse("more", &format!("{TRUSTED}\n{MORE}")).expect("a good policy"));
static PLAN: LazyLock<Plan> = LazyLock::new(|| plan(&POLICY, None, "{}").expect("a good plan"));
static PROVIDERS: LazyLock<Providers> = LazyLock::new(|| Providers::new().expect("providers"));

fn plan(policy: &Policy, narrowing: Option<&Narrowing>, more: &str) -> Option<Plan> {
    let mut spec: Value = serde_json::from_str(more).ok()?;
    spec["prompt"] = "x".into();
    let spec = JobSpec::parse(spec.to_string().as_bytes()).ok()?;
    let defaults = Defaults {
        model: "claude-sonnet-4-6".to_owned(),
        image: "hotcell/cell".to_owned(),
        provider: "anthropic".to_owned(),
    };
    narrow(&spec, policy, narrowing, &defaults).ok()
}

/// Parts of an input, between lines of `---`; what is not there is empty.
fn parts<const N: usize>(data: &[u8]) -> [String; N] {
    let text = String::from_utf8_lossy(data);
    let mut parts = text.splitn(N, "\n---\n").map(str::to_owned);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// A policy, a user's narrowing, and a tool call as JSON (`{"tool": …, "input": …}`).
pub(crate) fn policy_file(data: &[u8]) {
    let [policy_text, narrow_text, call] = parts::<3>(data);
    let policy = match Policy::parse("fuzz", &policy_text) {
        Ok(policy) => {
            policy.warnings();
            let again = Policy::parse("fuzz", &policy_text).expect("it was good a moment ago");
            assert_eq!(again, policy);
            policy
        }
        Err(error) => {
            line_is_there(&error, &policy_text);
            POLICY.clone()
        }
    };
    for key in ["rule[0].path[1]", "egress.host[3].name", "limits.cpus", "models.allow[0]", "description"] {
        assert!(Policy::place_of(&policy_text, key).is_none_or(|(line, _)| line <= lines(&policy_text)));
    }
    let narrowing = match Narrowing::parse("narrow.toml", &narrow_text) {
        Ok(narrowing) => {
            narrowing.warnings();
            Some(narrowing)
        }
        Err(error) => {
            line_is_there(&error, &narrow_text);
            None
        }
    };
    let call: Value = serde_json::from_str(&call).unwrap_or_default();
    let tool = call["tool"].as_str().unwrap_or("Bash");
    let call = Call { tool, input: &call["input"] };
    let Some(wide) = plan(&policy, None, "{}") else { return };
    let wide_allows = allows(&wide, call);
    let Some(narrowing) = narrowing else { return };
    let Some(close) = plan(&policy, Some(&narrowing), "{}") else { return };
    assert!(!allows(&close, call) || wide_allows, "a narrowing widened the policy");
    let text = serde_json::to_string(&close).expect("JSON");
    assert_eq!(serde_json::from_str::<Plan>(&text).expect("a plan is read from its row"), close);
}

fn lines(text: &str) -> usize {
    text.matches('\n').count() + 1
}

fn line_is_there(error: &PolicyError, text: &str) {
    assert!(!error.to_string().is_empty());
    if let Some(line) = error.line {
        assert!(line >= 1 && line <= lines(text), "{error}");
    }
}

/// Whether a call ends up allowed where every path leads where it says and every hook agrees.
fn allows(plan: &Plan, call: Call<'_>) -> bool {
    let mut found = Findings::default();
    let mut end = |judge: fn(&Plan, Call<'_>, &Findings) -> Judgement| {
        // Each need is asked once, so there are no more rounds than rules.
        for _ in 0..10_000 {
            match judge(plan, call, &found) {
                Judgement::Allow { .. } => return true,
                Judgement::Deny(denial) => {
                    assert!(!denial.rule.is_empty(), "a denial names its rule");
                    return false;
                }
                Judgement::Need(Need::Paths(paths)) => {
                    found.paths.extend(paths.into_iter().map(|path| (path.clone(), Some(path))));
                }
                Judgement::Need(Need::Hook(hook)) => {
                    found.hooks.insert(hook.id, HookAnswer::Pass(None));
                }
            }
        }
        panic!("a judgement has no end");
    };
    let before = end(judge);
    end(judge_after);
    before
}

/// A request line, headers, an empty line, a body; and what of it is a URL, for the way out.
pub(crate) fn request_head(data: &[u8]) {
    let end = data.windows(2).position(|two| two == b"\n\n");
    let (head, body) = match (end, data.windows(4).position(|four| four == b"\r\n\r\n")) {
        (_, Some(at)) => (&data[..at], &data[at + 4..]),
        (Some(at), None) => (&data[..at], &data[at + 2..]),
        (None, None) => (data, &b""[..]),
    };
    if let Some(head) = Head::parse(head) {
        let bodies: [&[u8]; 3] = [
            body,
            br#"{"model":"claude-sonnet-4-6","max_tokens":9,"messages":[]}"#,
            br#"{"max_tokens":9,"messages":[]}"#,
        ];
        for body in bodies {
            PROVIDERS.answer(&PLAN, &head, body).iter().for_each(goes_where_it_may);
        }
    }
    let text = String::from_utf8_lossy(head);
    for word in text.split_ascii_whitespace() {
        way_out(&text, word);
    }
}

fn way_out(text: &str, word: &str) {
    let method = text.split(' ').next().unwrap_or_default();
    if let Ok(Ok(terms)) = decide_url(&PLAN.layers, method, word) {
        assert!(!terms.permit.rule().is_empty());
        let (host, _, path, _) = parse_url(word).expect("it was judged");
        assert!(host.name().is_some_and(|name| name.ends_with("example.org")), "{host} has no rule");
        assert!(!path.as_str().split('/').any(|part| part == ".."), "{}", path.as_str());
    }
    for text in [word, word.rsplit('/').next().unwrap_or_default()] {
        if let Ok(host) = Host::parse(text) {
            assert_eq!(Host::parse(&host.to_string()), Ok(host.clone()), "one spelling of {text}");
        }
        if let Ok((host, port)) = Host::parse_with_port(text) {
            let again = Host::parse_with_port(&host.authority(port, 0));
            assert_eq!(again.expect("what was parsed is parsed again"), (host, port));
        }
    }
    if let Ok(path) = CanonicalPath::parse(word) {
        let again = CanonicalPath::parse(path.as_str()).expect("a canonical path is one");
        assert_eq!(again.as_str(), path.as_str());
        assert!(path.fits("/**") || !path.as_str().starts_with('/'));
        ["/v1/*/x", "/**/a", "*", "/a/**"].iter().for_each(|glob| _ = path.fits(glob));
    }
}

/// What may be said of every request that would go upstream.
fn goes_where_it_may(passed: &Passed) {
    let path = passed.uri.strip_prefix(BASE_URL).expect("it goes to the provider");
    assert!(path.starts_with('/') && !path.contains(['#', ' ', '\\']), "{path}");
    assert!(!path.split('/').any(|part| matches!(part, "." | "..")), "{path}");
    for name in &passed.headers {
        let known = ["anthropic-", "x-stainless-", "x-claude-", "x-app"];
        let plain = ["accept", "user-agent", "content-type"];
        assert!(known.iter().any(|k| name.starts_with(k)) || plain.contains(&name.as_str()), "{name}");
    }
    let model = |body: &[u8]| said(body).model;
    assert_eq!(model(&passed.judged).as_deref(), Some(&*passed.model), "what was judged is what was priced");
    let in_path = path.contains("/model/") || (path.contains("/models/") && !path.contains("count-tokens"));
    assert_eq!(model(&passed.sent).is_none(), in_path, "{path}: the model stands in one place");
}

/// What an outgoing body must be: an object with at most one model. Lone surrogates are none of our business: they
/// are JSON by its grammar, and pass as they came.
#[derive(serde::Deserialize)]
struct Said {
    model: Option<String>,
}

fn said(body: &[u8]) -> Said {
    serde_json::from_slice(body).expect("a JSON object goes out")
}

/// A request's body: read, rewritten, counted, and through each kind of provider.
pub(crate) fn body(data: &[u8]) {
    let heads = [
        "POST /v1/messages?beta=true HTTP/1.1\nanthropic-version: 2023-06-01",
        "POST /v1/messages/count_tokens HTTP/1.1",
        "POST /anthropic/v1/messages HTTP/1.1",
        "POST /model/us.anthropic.claude-sonnet-4-6-v1%3A0/invoke-with-response-stream HTTP/1.1",
        "POST /v1/projects/hotcell/locations/global/publishers/anthropic/models/claude-sonnet-4-6:rawPredict HTTP/1.1",
    ];
    for head in heads {
        let head = Head::parse(head.as_bytes()).expect("a good head");
        PROVIDERS.answer(&PLAN, &head, data).iter().for_each(goes_where_it_may);
    }
    let facts = match BodyFacts::read(data) {
        Ok(facts) => facts,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    facts.wanted.iter().for_each(|wanted| _ = wanted.part());
    let bytes = bytes::Bytes::copy_from_slice(data);
    for (tokens, uses_max) in [(1, 0), (2_000, 1), (u64::MAX, u32::MAX)] {
        let out = facts.rewritten(&bytes, tokens, uses_max);
        let again = BodyFacts::read(&out).expect("what was rewritten is a body");
        assert_eq!(again.output_tokens_max, facts.output_tokens_max.map(|_| tokens));
        assert_eq!(again.model, facts.model);
        assert!(again.web_searches_max(u32::MAX) <= facts.web_searches_max(uses_max), "searches are bounded");
        assert_eq!(again.rewritten(&out, tokens, uses_max), out, "rewriting twice changes nothing");
    }
    if let Some(counted) = countable(data) {
        assert_eq!(said(&counted).model.as_deref(), Some(&*facts.model));
    }
    let mut known = Known::new(8);
    let guess = facts.shape.bound(&[&known]);
    facts.shape.learn(guess.tokens / 2, &mut known);
    facts.shape.learn_opening(guess.tokens / 2, &mut known);
    assert!(facts.shape.bound(&[&known]).tokens <= guess.tokens, "what is learnt makes no bound wider");
}

/// Numbers for the cuts, made from the data: the same data is always cut alike.
struct Cuts(u64);

impl Cuts {
    fn of(data: &[u8]) -> Self {
        Self(data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        }))
    }

    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below.max(1)
    }
}

fn read(kind: &str, data: &[u8], mut step: impl FnMut(usize) -> usize) -> Reading {
    let mut meter = Meter::for_content_type(kind);
    let mut rest = data;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(step(rest.len()).min(rest.len()));
        meter.push(piece);
        rest = after;
    }
    meter.finish()
}

/// The reading of whole data, which that of any cuts has to equal.
fn same_however_cut(kind: &str, data: &[u8]) -> Reading {
    let whole = read(kind, data, |left| left);
    let mut cuts = Cuts::of(data);
    // Empty pieces too: a stream may have them.
    assert_eq!(read(kind, data, |_| cuts.next(40)), whole, "{kind}, small cuts");
    assert_eq!(read(kind, data, |left| 1 + cuts.next(left)), whole, "{kind}, large cuts");
    assert_eq!(read(kind, data, |_| 1), whole, "{kind}, byte by byte");
    for tokens in [0, 1_000, u64::MAX] {
        for to_its_end in [true, false] {
            if let (Some(seen), Some(billed)) = (whole.usage, whole.billable(tokens, to_its_end)) {
                assert!(billed.output >= seen.output && billed.input == seen.input);
            }
        }
    }
    whole
}

/// An event stream, or one JSON message.
pub(crate) fn sse_meter(data: &[u8]) {
    same_however_cut("text/event-stream", data);
    same_however_cut("application/json", data);
    same_however_cut("text/plain", data);
}

/// The bytes as they are, as a prelude whose checksum is right, and its lines as frames: `!kind` is an exception,
/// `#` a frame of raw headers, everything else an event.
pub(crate) fn eventstream_meter(data: &[u8]) {
    const KIND: &str = "application/vnd.amazon.eventstream";
    same_however_cut(KIND, data);
    if let Some((lengths, rest)) = data.split_at_checked(8) {
        let mut framed = lengths.to_vec();
        framed.extend(crc32fast::hash(lengths).to_be_bytes());
        framed.extend_from_slice(rest);
        same_however_cut(KIND, &framed);
    }
    let (mut frames, mut events, mut plain) = (Vec::new(), Vec::new(), true);
    for line in data.split(|byte| *byte == b'\n') {
        match line.split_first() {
            Some((b'!', kind)) => frames.extend(eventstream::exception(&String::from_utf8_lossy(kind), "")),
            Some((b'#', headers)) => frames.extend(eventstream::frame(headers, br#"{"bytes":"e30="}"#)),
            _ => frames.extend(eventstream::chunk(line)),
        }
        plain &= !line.starts_with(b"!") && !line.starts_with(b"#") && !line.contains(&b'\r');
        events.extend([b"data: ", line, b"\n\n"].concat());
    }
    let framed = same_however_cut(KIND, &frames);
    if plain && data.len() < 100_000 {
        let told = read("text/event-stream", &events, |left| left);
        assert_eq!(
            (framed.usage, framed.complete),
            (told.usage, told.complete),
            "both carriers say the same"
        );
        assert_eq!((framed.stop_reason, framed.error), (told.stop_reason, told.error));
        assert_eq!(framed.thinking, told.thinking);
    }
}

/// The first bytes of a connection: as they are, and as the body of a ClientHello whose lengths are right.
pub(crate) fn client_hello(data: &[u8]) {
    let length = |bytes: usize, width: usize| (bytes as u64).to_be_bytes()[8 - width..].to_vec();
    let message = [&[1][..], &length(data.len(), 3), data].concat();
    let framed = [&[22, 3, 1][..], &length(message.len(), 2), &message].concat();
    let random = [&[3, 3][..], &[7; 32], &[0, 0, 2, 0x13, 1, 1, 0], &length(data.len(), 2), data].concat();
    let inner = [&[1][..], &length(random.len(), 3), &random].concat();
    let extended = [&[22, 3, 1][..], &length(inner.len(), 2), &inner].concat();
    for bytes in [data, &framed, &extended] {
        let whole = peek(bytes);
        let mut cuts = Cuts::of(bytes);
        for _ in 0..8 {
            let cut = &bytes[..cuts.next(bytes.len())];
            match (peek(cut), &whole) {
                (Ok(Peek::More), _) => assert!(cut.len() < HELLO_BYTES_MAX, "it waits for ever"),
                (sooner, whole) => assert_eq!(sooner, *whole, "more bytes change what was said"),
            }
        }
        if let Ok(Peek::Hello(Some(host))) = whole {
            assert_eq!(Host::parse(&host.to_string()), Ok(host), "one reading of the name");
        }
    }
}

/// Lines of the CLI, for a session in each of two modes; lines that are events of a journal are taken as such.
pub(crate) fn session(data: &[u8]) {
    for spec in [r#"{"disallowed_tools":["WebFetch"]}"#, r#"{"permission_mode":"dontAsk"}"#] {
        let Some(plan) = plan(&POLICY, None, spec) else { panic!("{spec} is within the policy") };
        let told = talk(&plan, data);
        assert_eq!(told, talk(&plan, data), "what is sent is a function of the lines");
    }
}

/// What a session sends for these lines.
fn talk(plan: &Plan, data: &[u8]) -> Vec<Vec<u8>> {
    let mut session = Session::new(plan.clone(), "the task".to_owned(), None, String::new());
    let (mut sent, mut booted) = (Vec::new(), false);
    let mut cuts = Cuts::of(data);
    let started = session.start();
    sent.extend(
        started.into_iter().filter_map(|step| if let Step::Send(line) = step { Some(line) } else { None }),
    );
    for line in data.split(|byte| *byte == b'\n') {
        let mut steps = match serde_json::from_slice::<event::Line<'_>>(line) {
            Ok(line) => session.on_journaled(&line),
            Err(_) => frames::parse(line).map_or_else(Vec::new, |frame| {
                let asked = matches!(frame, frames::Incoming::CanUseTool(_) | frames::Incoming::Hook(_));
                let steps = session.on_frame(frame);
                assert!(!asked || !steps.is_empty(), "a question has an answer");
                steps
            }),
        };
        while let Some(step) = (!steps.is_empty()).then(|| steps.remove(0)) {
            match step {
                Step::Send(line) => {
                    assert_eq!(line.iter().position(|byte| *byte == b'\n'), Some(line.len() - 1), "one line");
                    let frame: Value = serde_json::from_slice(&line).expect("JSON");
                    assert!(frame["type"] != "user" || booted, "the task waits for the gate");
                    sent.push(line);
                }
                Step::Booted => assert!(!std::mem::replace(&mut booted, true), "one start"),
                Step::Find(errand) => {
                    let Errand { request_id, number, what } = errand;
                    if let Some(finding) = finding(what, &mut cuts) {
                        steps.extend(session.on_found(&request_id, number, finding));
                    }
                }
                Step::Event(body) => drop(serde_json::to_string(&body).expect("JSON")),
                Step::Turn(_) | Step::Over | Step::Broken(_) => {}
            }
        }
    }
    let (calls, denials) = session.tool_counts();
    assert!(denials <= calls && session.turns() <= data.len() as u64);
    let _ = (session.answer(), session.cli_cost(), session.outcome(&AgentExit::default(), None), INTERRUPT);
    sent
}

/// What was found out; now and then nothing, so that the question waits on.
fn finding(what: What, cuts: &mut Cuts) -> Option<Finding> {
    match (what, cuts.next(4)) {
        (_, 0) => None,
        (What::Paths(paths), 1) => Some(Finding::Paths(paths.into_iter().map(|path| (path, None)).collect())),
        (What::Paths(paths), _) => {
            Some(Finding::Paths(paths.into_iter().map(|path| (path.clone(), Some(path))).collect()))
        }
        (What::Hook { id, stdin, .. }, 1) => {
            let code = if stdin.len().is_multiple_of(2) { 0 } else { 2 };
            Some(Finding::Hook(id, hotcell::policy::judge::hook_answer(code, &stdin, &stdin)))
        }
        (What::Hook { id, .. }, _) => Some(Finding::Hook(id, HookAnswer::Pass(None))),
    }
}

/// Lines of a journal; and each of them as what an agent printed, which must never become a record.
pub(crate) fn audit_lines(data: &[u8]) {
    let job = JobId::new(1, 2);
    for line in data.split(|byte| *byte == b'\n') {
        if let Ok(Some(record)) = audit::project(&job, 1000, line) {
            let text = serde_json::to_string(&record).expect("JSON");
            assert!(!text.contains('\n'));
            let again: audit::Record = serde_json::from_str(&text).expect("a record is read again");
            assert_eq!(serde_json::to_string(&again).expect("JSON"), text);
            for denied in [false, true] {
                let kinds = vec![audit::Kind::Tool, audit::Kind::Credential];
                let _ = audit::Filter { kinds, denied, since_ms: 1 }.keeps(&record);
            }
        }
        let printed = String::from_utf8_lossy(line);
        let frame = match serde_json::from_slice::<Box<serde_json::value::RawValue>>(line) {
            Ok(frame) => frame.get().to_owned(),
            Err(_) => Value::from(printed).to_string(),
        };
        let agents =
            format!(r#"{{"seq":1,"at_ms":2,"origin":"agent","type":"frame","end":3,"frame":{frame}}}"#);
        let projected = audit::project(&job, 1000, agents.as_bytes());
        assert!(matches!(projected, Ok(None)), "an agent wrote a record: {agents}");
    }
}
