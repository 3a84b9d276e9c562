//! Bodies as the CLI sends them, and as an attacker would.

use bytes::Bytes;
use proptest::prelude::*;

use super::*;

fn read(body: &str) -> Result<BodyFacts, BodyError> {
    BodyFacts::read(body.as_bytes())
}

fn rewritten(body: &str, tokens: u64, uses_max: u32) -> String {
    let bytes = read(body).unwrap().rewritten(&Bytes::copy_from_slice(body.as_bytes()), tokens, uses_max);
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_request_of_the_cli_is_understood() {
    let body = r#"{"model":"m","max_tokens":32000,"stream":true,"system":[{"type":"text","text":"s"}],
        "thinking":{"budget_tokens":31999,"type":"enabled","display":"summarized"},"context_management":{"edits":[{"type":"clear_thinking_20251015","keep":"all"}]},
        "tools":[{"name":"Bash","input_schema":{"properties":{"type":{"type":"url"}}}}],"service_tier":"standard_only","speed":null,
        "messages":[{"role":"user","content":"hi"},{"role":"assistant","content":[{"type":"tool_use","input":{"source":{"type":"url"}}}]},
        {"role":"user","content":[{"type":"tool_result","content":[{"type":"image","source":{"type":"base64","data":"AAAA"}}]}]}]}"#;
    let facts = read(body).unwrap();
    assert_eq!((facts.model.as_str(), facts.output_tokens_max), ("m", Some(32_000)));
    assert!(facts.stream && facts.wanted.is_empty());
    let changed = body.replace("\"max_tokens\":32000", "\"max_tokens\":4096").replace("31999", "2048");
    assert_eq!(rewritten(body, 4096, 1), changed);
    let off = rewritten(body, 1500, 1);
    assert!(off.contains(r#""thinking":{"type":"disabled"}"#), "{off}");
    assert!(off.contains(r#""context_management":null"#), "edits of thinking need thinking: {off}");
    assert_eq!(rewritten(body, 32_000, 1), body, "what fits stays as it is");
    let adaptive = r#"{"model":"m","max_tokens":64000,"thinking":{"type":"adaptive"}}"#;
    assert_eq!(rewritten(adaptive, 4096, 1), adaptive.replace("64000", "4096"));
}

#[test]
fn an_image_counts_as_an_image_and_text_by_its_bytes() {
    let with = |data: &str| {
        let body = format!(
            r#"{{"model":"m","messages":[{{"role":"user","content":[{{"type":"image","source":{{"type":"base64","data":"{data}"}}}}]}}]}}"#
        );
        read(&body).unwrap().shape.bound(&[]).tokens
    };
    assert_eq!(with("AAAA"), with(&"A".repeat(100_000)));
    assert!((5_000..7_000).contains(&with("AAAA")));
    let text = |text: &str| {
        let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{text}"}}]}}"#);
        read(&body).unwrap().shape.bound(&[]).tokens
    };
    assert_eq!(text(&"x".repeat(10_000)) - text(""), 10_000);
    let pdf = r#"{"model":"m","messages":[{"role":"user","content":[{"type":"document","source":{"type":"base64","data":"AAAA"}}]}]}"#;
    assert!(read(pdf).unwrap().shape.bound(&[]).tokens > 400_000, "its bytes bound nothing");
}

#[test]
fn what_the_provider_would_fetch_store_or_run_is_found_wherever_it_stands() {
    let with = |more: &str| read(&format!(r#"{{"model":"m","max_tokens":1,{more}}}"#));
    let block = |block: &str| with(&format!(r#""messages":[{{"role":"user","content":[{block}]}}]"#));
    for field in [r#""container":"c""#, r#""c\u006fntainer":"c""#, r#""fallbacks":[]"#] {
        assert!(matches!(with(field), Err(BodyError::Field(_))), "{field}");
    }
    for field in [
        r#""speed":"fast""#,
        r#""sp\u0065ed":"f\u0061st""#,
        r#""service_tier":"auto""#,
        r#""service_tier":"priority""#,
        r#""inference_geo":"us""#,
    ] {
        assert!(matches!(with(field), Err(BodyError::Priced { .. })), "{field}");
    }
    for field in [r#""speed":1"#, r#""inference_geo":["us"]"#] {
        assert!(matches!(with(field), Err(BodyError::Malformed(_))), "{field}");
    }
    for tool in [
        "web_search_20250305",
        "web_fetch_20250910",
        "code_execution_20250825",
        "bash_code_execution_20250825",
    ] {
        let facts = with(&format!(r#""tools":[{{"name":"a"}},{{"\u0074ype":"{tool}"}}]"#)).unwrap();
        assert_eq!(facts.wanted, [Wanted::ServerTool(tool.into())]);
    }
    let server = r#""mcp_servers":[{"type":"url","\u0075rl":"https://\u006dcp/","name":"x"}]"#;
    assert_eq!(with(server).unwrap().wanted, [Wanted::McpServer("https://mcp/".into())]);
    let toolset = r#""tools":[{"type":"mcp_toolset","mcp_server_name":"x"}]"#;
    assert!(matches!(with(toolset), Err(BodyError::Malformed(_))));
    assert!(with(&format!("{server},{toolset}")).is_ok());
    let nested = |image: &str| {
        [
            image.to_owned(),
            format!(r#"{{"type":"tool_result","content":[{image}]}}"#),
            format!(r#"{{"type":"document","source":{{"type":"content","content":[{image}]}}}}"#),
        ]
    };
    for (source, wanted) in [
        (r#"{"type":"url","url":"http://x"}"#, Some(Wanted::UrlSource("http://x".into()))),
        (r#"{"type":"\u0075rl","url":"http://x"}"#, Some(Wanted::UrlSource("http://x".into()))),
        (r#"{"type":"file","file_id":"f"}"#, Some(Wanted::FileId("f".into()))),
        (r#"{"type":"base64","data":"A","url":"http://x"}"#, None),
        (r#"{"type":"s3","url":"http://x"}"#, None),
        (r#"{"type":"url"}"#, None),
        ("{}", None),
    ] {
        for nested in nested(&format!(r#"{{"type":"image","source":{source}}}"#)) {
            match (&wanted, block(&nested)) {
                (Some(wanted), Ok(facts)) => assert_eq!(facts.wanted.first(), Some(wanted), "{nested}"),
                (None, Err(BodyError::RemoteSource(_))) => {}
                (_, other) => panic!("{nested}: {other:?}"),
            }
        }
    }
    let upload = block(r#"{"type":"container_upload","file_id":"f"}"#).unwrap();
    assert_eq!(upload.wanted, [Wanted::FileId("f".into())]);
    let edits = r#""context_management":{"edits":[{"type":"compact_20260112"}]}"#;
    assert!(matches!(with(edits), Err(BodyError::ContextEdit(_))));
}

#[test]
fn web_searches_are_counted_and_lowered() {
    let body = |tool: &str| format!(r#"{{"model":"m","max_tokens":9,"tools":[{tool}]}}"#);
    let eight = body(r#"{"max_uses":8,"name":"web_search","type":"web_search_20250305"}"#);
    assert_eq!(read(&eight).unwrap().web_searches_max(3), 3);
    assert_eq!(read(&eight).unwrap().web_searches_max(20), 8);
    assert_eq!(rewritten(&eight, 9, 3), eight.replace("\"max_uses\":8", "\"max_uses\":3"));
    assert_eq!(rewritten(&eight, 9, 8), eight);
    let open = body(r#"{"type":"web_search_20250305","name":"web_search"}"#);
    let closed = body(r#"{"type":"web_search_20250305","max_uses":3,"name":"web_search"}"#);
    assert_eq!(rewritten(&open, 9, 3), closed);
    assert_eq!(read(&open).unwrap().web_searches_max(3), 3);
    let null = body(r#"{"type":"web_search_20250305","max_uses":null}"#);
    assert!(rewritten(&null, 9, 3).contains("\"max_uses\":3"));
    let two = body(r#"{"type":"web_search_20250305"},{"type":"web_search_20250305","max_uses":1}"#);
    assert_eq!(read(&two).unwrap().web_searches_max(3), 4);
    assert!(matches!(
        read(&body(r#"{"type":"web_search_20250305","max_uses":-1}"#)),
        Err(BodyError::Malformed(_))
    ));
}

#[test]
fn a_one_hour_cache_is_seen_wherever_it_is_asked_for() {
    let cache = |more: &str| read(&format!(r#"{{"model":"m",{more}}}"#)).unwrap().cache_write;
    let long = r#""cache_control":{"type":"ephemeral","ttl":"1h"}"#;
    let block = format!(r#"{{"type":"text","text":"t",{long}}}"#);
    for body in [
        long.to_owned(),
        long.replace("1h", "\\u0031h"),
        format!(r#""system":[{block}]"#),
        format!(r#""tools":[{{"name":"a",{long}}}]"#),
        format!(r#""messages":[{{"role":"user","content":[{block}]}}]"#),
        format!(r#""messages":[{{"role":"user","content":[{{"type":"tool_result","content":[{block}]}}]}}]"#),
    ] {
        assert_eq!(cache(&body), CacheWrite::OneHour, "{body}");
        let short = body.replace("\"1h\"", "\"5m\"").replace("\\u0031h", "5m");
        assert_eq!(cache(&short), CacheWrite::FiveMinutes, "{body}");
    }
}

#[test]
fn fields_that_stand_twice_and_other_garbage_are_malformed() {
    let double = [
        r#"{"model":"a","model":"b"}"#,
        r#"{"model":"a","m\u006fdel":"b"}"#,
        r#"{"model":"a","system":"x","system":"y"}"#,
        r#"{"model":"a","mcp_servers":[{"url":"a","\u0075rl":"b"}]}"#,
        r#"{"model":"a","thinking":{"type":"enabled","type":"disabled"}}"#,
        r#"{"model":"a","tools":[{"type":"custom","\u0074ype":"web_search_20250305"}]}"#,
        r#"{"model":"a","tools":[{"type":"web_search_20250305","max_uses":1,"max\u005fuses":9}]}"#,
        r#"{"model":"a","tools":[{"name":"a","n\u0061me":"b"}]}"#,
        r#"{"model":"a","context_management":{"edits":[],"edits":[{"type":"compact_20260112"}]}}"#,
        r#"{"model":"a","context_management":{"edits":[{"type":"clear_thinking_1","type":"compact_1"}]}}"#,
        r#"{"model":"a","messages":[{"content":"a","content":[]}]}"#,
        r#"{"model":"a","messages":[{"role":"user","r\u006fle":"x","content":[]}]}"#,
        r#"{"model":"a","messages":[{"content":[{"type":"text","text":"a","t\u0065xt":"b"}]}]}"#,
        r#"{"model":"a","messages":[{"content":[{"type":"text","cache_control":{"ttl":"5m","ttl":"1h"}}]}]}"#,
        r#"{"model":"a","messages":[{"content":[{"type":"image","source":{"type":"base64","type":"url"}}]}]}"#,
        r#"{"model":"a","messages":[{"content":[{"type":"image","source":{},"s\u006furce":{"type":"url"}}]}]}"#,
        r#"{"model":"a","messages":[{"content":[{"content":[{"type":"image","type":"x"}]}]}]}"#,
        r#"{"model":"a","messages":[{"content":[{"type":"x","file_id":"a","file\u005fid":"b"}]}]}"#,
    ];
    let garbage = [
        "",
        "[]",
        "{}",
        "{\"model\":\"a\"} x",
        "{\"model\":1}",
        "{\"model\":\"a\",\"max_tokens\":-1}",
        "{\"model\":\"a\",\"max_tokens\":1.5}",
        "{\"model\":\"a\",\"messages\":{}}",
    ];
    for body in double.into_iter().chain(garbage) {
        assert!(matches!(read(body), Err(BodyError::Malformed(_))), "{body}: {:?}", read(body));
    }
    for (open, close) in [("[{\"content\":", "}]"), ("{\"source\":{\"content\":", "}}")] {
        for depth in [100, 5000] {
            let deep = format!(
                "{{\"model\":\"a\",\"messages\":[{{\"content\":{}1{}}}]}}",
                open.repeat(depth),
                close.repeat(depth)
            );
            assert!(matches!(read(&deep), Err(BodyError::Malformed(_))), "{open} {depth}");
        }
    }
    let many = format!("{{\"model\":\"a\",\"tools\":[{}{{}}]}}", "{\"type\":\"x_1\"},".repeat(300));
    assert!(matches!(read(&many), Err(BodyError::Malformed(_))));
}

/// Text of a block: letters, escapes and other scripts.
#[test]
fn a_conversation_is_known_again_only_with_the_same_tools() {
    let body = |tools: &str| {
        let body = format!(
            r#"{{"model":"m","max_tokens":9,"messages":[{{"role":"user","content":"hi"}}],"tools":{tools}}}"#
        );
        read(&body).unwrap().shape
    };
    let (mut known, first) = (Known::new(10), r#"[{"name":"a","description":"b"},{"name":"c"}]"#);
    let unknown = body(first).bound(&[&known]);
    assert!(unknown.guessed >= first.len() as u64, "{unknown:?}");
    body(first).learn(7, &mut known);
    // Bytes between fields say nothing.
    let spaced = body(r#"[ {"name":"a" ,"description":"b"},  {"name":"c"}]"#).bound(&[&known]);
    assert_eq!((body(first).bound(&[&known]).guessed, spaced.guessed), (0, 0));
    for other in [
        r#"[{"name":"a"},{"description":"b","name":"c"}]"#,
        r#"[{"name":"a","description":"b","name2":"c"}]"#,
        r#"[{"name":"a","description":"c"},{"name":"c"}]"#,
        r#"[{"name":"c"},{"name":"a","description":"b"}]"#,
        "[]",
        "null",
    ] {
        assert_ne!(body(other).bound(&[&known]).guessed, 0, "{other}");
    }
}

fn text() -> impl Strategy<Value = String> {
    "([a-z ]{0,20}|\\\\n|\\\\u00e9|é|漢){0,30}"
}

/// Tokens by a tokenizer that makes as many as it can: one a byte, wherever it cuts.
fn truth(messages: &[String], head: &str) -> u64 {
    (head.len() + messages.iter().map(|text| text.len() + 8).sum::<usize>()) as u64 + 100
}

fn body_of(messages: &[String], head: &str, marked: usize) -> String {
    let list: Vec<String> = messages
        .iter()
        .enumerate()
        .map(|(i, text)| {
            let role = if i % 2 == 0 { "user" } else { "assistant" };
            let mark = if i == marked { r#""cache_control":{"type":"ephemeral"},"# } else { "" };
            format!(r#"{{"content":[{{{mark}"text":"{text}","type":"text"}}],"role":"{role}"}}"#)
        })
        .collect();
    format!(
        r#"{{"model":"m","max_tokens":1,"system":[{{"type":"text","text":"{head}"}}],"messages":[{}]}}"#,
        list.join(",")
    )
}

proptest! {
    #[test]
    fn the_bound_is_never_below_the_truth(
        turns in prop::collection::vec(text(), 1..12), head in "[a-z]{0,600}",
        // What was sent before, in any order: how much of it, with another ending or not.
        before in prop::collection::vec((1usize..12, prop::option::of(text()), any::<bool>()), 0..12)
    ) {
        let (mut own, mut shared) = (Known::new(64), Known::new(64));
        for (length, ending, counted) in before {
            let mut sent: Vec<String> = turns.iter().take(length).cloned().collect();
            sent.extend(ending);
            let shape = read(&body_of(&sent, &head, sent.len() - 1)).unwrap().shape;
            let truth = truth(&sent, &head);
            prop_assert!(shape.bound(&[&own, &shared]).tokens >= truth);
            shape.learn(truth, &mut own);
            if counted {
                shape.learn_opening(truth, &mut shared);
            }
        }
        let shape = read(&body_of(&turns, &head, 0)).unwrap().shape;
        let bound = shape.bound(&[&own, &shared]);
        prop_assert!(bound.tokens >= truth(&turns, &head), "{bound:?}");
        shape.learn(truth(&turns, &head), &mut own);
        let again = read(&body_of(&turns, &head, turns.len() - 1)).unwrap().shape.bound(&[&own]);
        prop_assert!(again.tokens <= truth(&turns, &head) + 1_000, "a moved cache mark changes nothing: {again:?}");
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = BodyFacts::read(&bytes);
    }

    #[test]
    fn garbled_bodies_never_panic(at in 0usize..1000, byte in any::<u8>()) {
        let mut body = body_of(&["a".into(), "b".into()], "c", 0).into_bytes();
        let at = at % body.len();
        body[at] = byte;
        let _ = BodyFacts::read(&body);
    }

    #[test]
    fn a_lowered_body_is_read_back_lowered(tokens in 1u64..32_000, spaces in " {0,3}") {
        let body = format!("{{{spaces}\"max_tokens\"{spaces}:{spaces}32000{spaces},\"thinking\":{spaces}\
            {{\"type\":\"enabled\",\"budget_tokens\":31999}}{spaces},\"model\":\"m\"}}");
        let lowered = read(&rewritten(&body, tokens, 1)).unwrap();
        prop_assert_eq!(lowered.output_tokens_max, Some(tokens));
        prop_assert!(lowered.thinking_budget.is_none_or(|(budget, _)| budget < tokens));
    }
}

/// JSON as a provider may write it before the model is shown it: spaces, escapes, numbers in full.
fn written_anew(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::String(text) => {
            let units = text.encode_utf16().map(|unit| match u8::try_from(unit) {
                Ok(byte @ 0x20..=0x7e) if byte != b'"' && byte != b'\\' => char::from(byte).to_string(),
                _ => format!("\\u{unit:04x}"),
            });
            format!("\"{}\"", units.collect::<String>())
        }
        Value::Number(number) => format!("{:.1}", number.as_f64().unwrap()),
        Value::Array(all) => format!("[{}]", all.iter().map(written_anew).collect::<Vec<_>>().join(", ")),
        Value::Object(all) => {
            let field = |(key, value): (&String, &Value)| {
                format!("{}: {}", written_anew(&Value::String(key.clone())), written_anew(value))
            };
            format!("{{{}}}", all.iter().map(field).collect::<Vec<_>>().join(", "))
        }
        Value::Null | Value::Bool(_) => value.to_string(),
    }
}

/// Letters of all kinds, those that are longest when taken apart among them; no control characters, which no escape
/// of fewer bytes stands for.
fn strange() -> impl Strategy<Value = String> {
    let letter = prop_oneof![
        prop::char::range(' ', '~'),
        prop::char::range('\u{a1}', '\u{ffff}'),
        prop::char::range('\u{10000}', '\u{2ffff}'),
        prop::sample::select(vec!['\u{fdfa}', '\u{3316}', '\u{1d1c0}', '\u{cca}', 'é', '漢', '한']),
    ];
    prop::collection::vec(letter, 0..40).prop_map(|letters| letters.into_iter().collect())
}

proptest! {
    /// The shape of the bound, whatever the tokenizer is given: one token for each byte of it.
    #[test]
    fn the_bound_has_a_token_for_each_byte_that_a_tokenizer_may_be_given(
        text in strange(), name in strange(), (digit, exponent) in (1u8..10, 0u8..20), fields in 0usize..40,
        escaped in any::<bool>()
    ) {
        let forms = icu_normalizer::DecomposingNormalizerBorrowed::new_nfkd();
        // Hangul stays together in the forms that tokenizers use.
        let composed = icu_normalizer::ComposingNormalizerBorrowed::new_nfkc();
        let longest = |text: &str| {
            let apart: String = text.chars().filter(|c| !('\u{ac00}'..='\u{d7a3}').contains(c)).collect();
            let hangul = text.len() - apart.len();
            (forms.normalize(&apart).len() + hangul).max(composed.normalize(text).len())
        };
        let quoted = |text: &str| {
            let quoted = serde_json::to_string(text).unwrap();
            match escaped {
                true => quoted.chars().map(|c| if c.is_ascii() { c.to_string() } else {
                    c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
                }).collect(),
                false => quoted,
            }
        };
        let (text_json, name_json) = (quoted(&text), quoted(&name));
        let inputs: String = (0..fields).map(|i| format!(",\"p{i}\":{digit}e{exponent}")).collect();
        let input = format!("{{{name_json}:{text_json}{inputs}}}");
        let tool = format!(r#"{{"name":"t","description":{text_json},"input_schema":{{"enum":[{digit}E{exponent}],"x":{name_json}}}}}"#);
        let body = format!(
            r#"{{"model":"m","max_tokens":1,"tools":[{tool}],"messages":[{{"role":"user","content":{text_json}}},
            {{"role":"assistant","content":[{{"type":"tool_use","id":"i","name":"t","input":{input}}}]}}]}}"#
        );
        let bound = read(&body).unwrap().shape.bound(&[]).tokens;
        let value = |json: &str| serde_json::from_str::<serde_json::Value>(json).unwrap();
        let call: usize = value(&input).as_object().unwrap().iter()
            .map(|(key, value)| 20 + longest(key) + written_anew(value).len().max(longest(&value.to_string())))
            .sum();
        let tool = written_anew(&value(&tool)).len().max(longest(&value(&tool).to_string()));
        let given = longest(&text) + call + tool + 900;
        prop_assert!(bound >= given as u64, "{bound} for {given}: {body}");
    }
}

#[test]
fn texts_to_be_cited_and_documents_count_more_than_their_bytes() {
    let bound = |block: &str| {
        let body =
            format!(r#"{{"model":"m","max_tokens":1,"messages":[{{"role":"user","content":[{block}]}}]}}"#);
        read(&body).unwrap().shape.bound(&[]).tokens
    };
    let text = "a. ".repeat(1_000);
    let document = |citations: &str| {
        let source = format!(r#"{{"type":"text","media_type":"text/plain","data":"{text}"}}"#);
        bound(&format!(r#"{{"type":"document","source":{source},"citations":{citations}}}"#))
    };
    let (plain, cited) = (document(r#"{"enabled":false}"#), document(r#"{"enabled":true}"#));
    assert!(plain < 6_000 && cited > plain + 7 * text.len() as u64, "{plain} {cited}");
    let inside = r#"{"type":"tool_result","content":[{"type":"search_result","citations":{"enabled":true},"content":[]}]}"#;
    assert!(bound(inside) > bound(&inside.replace("true", "false")) + 7 * 30);
    let pdf =
        r#"{"type":"document","source":{"type":"base64","media_type":"application/pdf","data":"AAAA"}}"#;
    assert!(bound(pdf) >= 1_000_000);
}

#[test]
fn what_is_known_is_bounded_and_the_new_outlives_the_old() {
    let mut known = Known::new(16);
    let shapes: Vec<Shape> =
        (0..100).map(|i| read(&body_of(&[format!("m{i}")], "h", 0)).unwrap().shape).collect();
    for shape in &shapes {
        shape.learn(7, &mut known);
    }
    assert_eq!(shapes[99].bound(&[&known]).tokens, shapes[98].bound(&[&known]).tokens);
    assert!(shapes[99].bound(&[&known]).tokens < 200);
    assert!(shapes[0].bound(&[&known]).tokens > 1_000, "forgotten");
}

/// As a conversation sends it again and again: tools and system prompt of some KiB, cached.
fn long_body(system: &str, tools: &str, more: &str) -> String {
    let words = "w\u{fc}rde ".repeat(300);
    format!(
        r#"{{"model":"m","max_tokens":9,"messages":[{{"role":"user","content":"hi"}}],
        "system":[{{"type":"text","text":"{words}{system}","cache_control":{{"type":"ephemeral","ttl":"1h"}}}}],
        "tools" : [{{"name":"Bash","description":"{words}","input_schema":{{"type":"object"}}}}{tools}]{more}}}"#
    )
}

fn knowing(body: &str) -> Vec<std::sync::Arc<Fragment>> {
    let recall = Recall::default();
    let (_, fresh) = BodyFacts::read_knowing(body.as_bytes(), &[]).unwrap();
    recall.keep(fresh, &Interned::default());
    recall.known()
}

#[test]
fn parts_that_were_read_before_are_known_by_all_their_bytes_and_tell_the_same() {
    let body = long_body("", "", "");
    let known = knowing(&body);
    assert_eq!(known.len(), 2, "tools and system prompt");
    let (facts, fresh) = BodyFacts::read_knowing(body.as_bytes(), &known).unwrap();
    assert_eq!((facts, fresh.len()), (read(&body).unwrap(), 0));
    let other = long_body("x", r#",{"name":"Read"}"#, "");
    let (facts, fresh) = BodyFacts::read_knowing(other.as_bytes(), &known).unwrap();
    assert_eq!((facts, fresh.len()), (read(&other).unwrap(), 2), "one byte more is another part");
    for searching in [r#",{"type":"web_search_20250305","name":"s"}"#, r#",{"type":"web_fetch_1"}"#] {
        let body = long_body("", searching, "");
        assert_eq!(knowing(&body).len(), 1, "what the policy is asked for is read each time");
        let (facts, _) = BodyFacts::read_knowing(body.as_bytes(), &known).unwrap();
        assert_eq!(facts.wanted.len(), 1);
        assert_eq!(facts, read(&body).unwrap());
    }
    // What is no text is refused, wherever it stands.
    for at in ["\"m\"", "\"hi\"", "Bash", "\"ttl\"", "role", "metadata", "vain"] {
        let body = long_body("", "", r#","metadata":{"vain":"in vain"}"#);
        let mut bytes = body.into_bytes();
        let place = memchr::memmem::find(&bytes, at.as_bytes()).unwrap() + 1;
        bytes[place] = 0xff;
        for known in [&known[..], &[]] {
            let refused = BodyFacts::read_knowing(&bytes, known);
            assert!(matches!(refused, Err(BodyError::Malformed(_))), "{at}: {refused:?}");
        }
    }
    // What follows a known part is read as ever.
    for broken in [r#","tools":[]"#, r#","t\u006fols":null"#, "]", ",", r#","stream":truex"#, "}", ":1"] {
        let body = long_body("", "", broken);
        let refused = BodyFacts::read_knowing(body.as_bytes(), &known);
        assert!(matches!(refused, Err(BodyError::Malformed(_))), "{broken}: {refused:?}");
    }
}

#[test]
fn leases_keep_few_parts_and_share_those_that_are_the_same() {
    let (shared, one, two) = (Interned::default(), Recall::default(), Recall::default());
    let keep = |recall: &Recall, body: &str| {
        let (_, fresh) = BodyFacts::read_knowing(body.as_bytes(), &recall.known()).unwrap();
        recall.keep(fresh, &shared);
    };
    keep(&one, &long_body("", "", ""));
    keep(&two, &long_body("", "", ""));
    assert!(one.known().iter().zip(two.known()).all(|(a, b)| std::sync::Arc::ptr_eq(a, &b)));
    let (_, fresh) = BodyFacts::read_knowing(long_body("", "", "").as_bytes(), &[]).unwrap();
    one.keep(fresh, &shared);
    assert_eq!(one.known().len(), 2, "two requests at a time bring the same parts");
    (0..50).for_each(|n| keep(&one, &long_body(&n.to_string(), "", "")));
    assert_eq!(one.known().len(), 6);
    let huge = long_body(&"y".repeat(300 << 10), "", "");
    keep(&two, &huge);
    assert_eq!(two.known().len(), 2, "too large to keep");
}

proptest! {
    #[test]
    fn what_is_taken_for_a_body_is_json_and_reads_the_same_with_and_without_what_is_known(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0_u8..3, prop::sample::select(b"{}[],:\"\\ \n1etn".to_vec())), 0..4),
    ) {
        let body = long_body("", "", r#","stream":true,"temperature":1.5e0"#);
        let known = knowing(&body);
        let mut bytes = body.into_bytes();
        for (at, kind, byte) in edits {
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => { bytes.remove(at); }
            }
        }
        let plain = BodyFacts::read(&bytes);
        let knowing = BodyFacts::read_knowing(&bytes, &known).map(|(facts, _)| facts);
        prop_assert_eq!(plain.is_ok(), knowing.is_ok());
        if let (Ok(plain), Ok(knowing)) = (plain, knowing) {
            prop_assert_eq!(plain, knowing);
            let value: Result<serde_json::Value, _> = serde_json::from_slice(&bytes);
            prop_assert!(value.is_ok_and(|value| value.is_object()));
        }
    }
}
