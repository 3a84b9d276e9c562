//! Requests for the model from real cells: what they may hold, what is set aside for them, and how they wait
//! when the provider is limited.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::world::{World, tool_results};

fn reserved(events: &[Value]) -> Vec<u64> {
    let requests = events.iter().filter(|e| e["type"] == "request");
    requests.map(|e| e["reserved_micro_usd"].as_u64().unwrap()).collect()
}

/// Requests that reached the provider, without the counts and the CLI's warm-up.
fn messages(world: &World) -> Vec<Value> {
    let seen = world.recorder.requests();
    seen.iter().filter(|r| r.target.contains("/v1/messages?")).map(|r| r.json()).collect()
}

fn counts(world: &World) -> usize {
    world.recorder.requests().iter().filter(|r| r.target.contains("count_tokens")).count()
}

#[test]
fn a_small_budget_is_enough_to_start_on_each_model() {
    let world = World::new("[default]\ntext = \"done\"\n");
    for (model, cost_usd, tools) in [
        ("claude-sonnet-4-6", 0.5, Value::Null),
        ("claude-opus-4-8", 0.5, Value::Null),
        ("claude-haiku-4-5-20251001", 0.1, Value::Null),
        ("claude-haiku-4-5-20251001", 0.05, json!(["Read"])),
    ] {
        let mut spec = json!({ "prompt": "hello", "model": model, "limits": { "cost_usd": cost_usd } });
        if !tools.is_null() {
            spec["tools"] = tools;
        }
        let before = counts(&world);
        let (events, job) = world.job(&spec);
        assert_eq!(job["outcome"], "succeeded", "{model}: {job}");
        let first = reserved(&events)[0];
        assert!(first as f64 / 1e6 <= cost_usd, "{model}: {first}");
        assert_eq!(counts(&world) - before, 1, "{model}: its beginning is counted once");
    }
    // What was counted serves the next job with another task.
    let before = counts(&world);
    let (events, job) = world.job(&json!({ "prompt": "another task", "model": "claude-sonnet-4-6" }));
    assert_eq!(job["outcome"], "succeeded", "{job}");
    // 32000 tokens of output are 0.48; bytes alone would add 0.42 for the input.
    assert!(reserved(&events)[0] < 700_000, "{:?}", reserved(&events));
    assert_eq!(counts(&world), before);
    world.end();
}

#[test]
fn five_parallel_subagents_finish_under_two_dollars() {
    let call = r#"{ tool = "Agent", input = { description = "part", prompt = "look at your part", subagent_type = "general-purpose" } }"#;
    let script = format!(
        "[[reply]]\nwhen = {{ prompt = \"fan out\", turn = 0, tools = true }}\nblocks = [{}]\n\
         [[reply]]\nwhen = {{ prompt = \"your part\", turn = 0 }}\nlatency_ms = 400\n\
         blocks = [{{ tool = \"Bash\", input = {{ command = \"echo part\", description = \"look\" }} }}]\n\
         [[reply]]\nwhen = {{ prompt = \"your part\" }}\nlatency_ms = 400\ntext = \"my part is fine\"\n\
         [default]\ntext = \"all parts are fine\"\n",
        [call; 5].join(", ")
    );
    let world = World::new(&script);
    let (events, job) = world.job(&json!({
        "prompt": "fan out", "policy": "trusted", "model": "claude-sonnet-4-6", "limits": { "cost_usd": 2.0 },
    }));
    assert_eq!(job["outcome"], "succeeded", "{job}");
    let parts = messages(&world).iter().filter(|m| m.to_string().contains("look at your part")).count();
    assert!(parts >= 10, "each of the five had two turns: {parts}");
    assert!(job["cost_usd"].as_f64().unwrap() <= 2.0, "{job}");
    // What the five ask for at once is above the limit: some wait for it, and none is refused.
    assert!(!events.iter().any(|event| event["type"] == "refused"), "{job}");
    world.end();
}

#[test]
fn a_limit_of_the_provider_is_waited_for_by_two_jobs_that_never_see_it() {
    let world = World::with(
        "[[reply]]\ntimes = 1\nfault = { status = 429, type = \"rate_limit_error\", message = \"slow\", headers = { retry-after = \"3\" } }\n\
         [default]\ntext = \"done\"\n",
        "[limits]\nslots = 2\n",
    );
    let begun = Instant::now();
    let ids = [world.submit(&json!({ "prompt": "one" })), world.submit(&json!({ "prompt": "two" }))];
    for id in ids {
        let events = world.follow(&id);
        let job = world.show(&id);
        assert_eq!(job["outcome"], "succeeded", "{job}");
        let retries = events.iter().filter(|e| e["frame"]["subtype"] == "api_retry").count();
        assert_eq!(retries, 0, "the CLI sees a slow answer, not an error");
        assert_eq!(reserved(&events).len(), 1, "one reservation, however often it is sent");
    }
    assert!(begun.elapsed() >= Duration::from_secs(3));
    assert_eq!(messages(&world).len(), 3);
    let metrics = world.call("GET", "/metrics", "").body;
    assert!(metrics.contains("\nhotcell_provider_paused_seconds 0\n"), "{metrics}");
    let limit =
        metrics.lines().find_map(|l| l.strip_prefix("hotcell_provider_concurrency ")).expect("a gauge");
    assert!(limit.parse::<u64>().unwrap() < 1024, "fewer at once after a limit: {limit}");
    world.end();
}

#[test]
fn web_search_is_there_where_the_policy_says_so_and_else_leaves_the_tool_list() {
    let script = r#"
[[reply]]
when = { prompt = "look it up", turn = 0, tools = true, system = "interactive agent" }
blocks = [{ tool = "WebSearch", input = { query = "hotcell" } }]
[default]
text = "found"
"#;
    let mut world = World::without_daemon(script, "");
    let text = include_str!("../../policies/default.toml");
    let text = text.replace("deny = []", "deny = [\"WebFetch\"]");
    std::fs::create_dir(world.path("policies")).unwrap();
    let search = format!("{text}\n[requests]\nserver_tools = [\"web_search\"]\nweb_search_uses_max = 2\n");
    std::fs::write(world.path("policies/search.toml"), search).unwrap();
    let dir = world.path("policies").display().to_string();
    world.daemon_env.push(("HOTCELL_POLICY_DIRS".to_owned(), dir));
    world.start();
    let names = |message: &Value| -> Vec<String> {
        let tools = message["tools"].as_array().cloned().unwrap_or_default();
        tools.iter().map(|tool| tool["name"].as_str().unwrap_or_default().to_owned()).collect()
    };
    let (events, job) = world.job(&json!({ "prompt": "look it up", "policy": "search" }));
    assert_eq!(job["outcome"], "succeeded", "{job}");
    let sent = messages(&world);
    assert!(names(&sent[0]).contains(&"WebSearch".to_owned()), "{:?}", names(&sent[0]));
    assert_eq!(sent[1]["tools"][0]["type"], "web_search_20250305", "{}", sent[1]["tools"]);
    assert_eq!(sent[1]["tools"][0]["max_uses"], 2, "lowered to what the policy allows");
    let second = reserved(&events)[1];
    assert!(second >= 20_000, "the price of two searches is set aside: {second}");

    let (_, job) = world.job(&json!({ "prompt": "say it" }));
    assert_eq!(job["outcome"], "succeeded", "{job}");
    let last = messages(&world).pop().unwrap();
    assert!(!names(&last).contains(&"WebSearch".to_owned()), "{:?}", names(&last));
    world.end();
}

/// What an agent tries with curl, and the status that it must get.
const TRIES: [(&str, &str, &str); 18] = [
    ("foreign key", "-H 'x-api-key: sk-foreign' -d '{M,\"messages\":[]}'", "403"),
    ("two keys", "K -H 'authorization: Bearer sk-foreign' -d '{M,\"messages\":[]}'", "403"),
    ("web fetch", "K -d '{M,\"messages\":[],\"tools\":[{\"type\":\"web_fetch_20250910\"}]}'", "403"),
    ("web search", "K -d '{M,\"messages\":[],\"tools\":[{\"type\":\"web_search_20250305\"}]}'", "403"),
    (
        "escaped key",
        "K -d '{M,\"messages\":[],\"tools\":[{\"t\\u0079pe\":\"code_execution_20250825\"}]}'",
        "403",
    ),
    (
        "doubled key",
        "K -d '{M,\"messages\":[],\"tools\":[],\"t\\u006fols\":[{\"type\":\"web_fetch_20250910\"}]}'",
        "400",
    ),
    (
        "connector",
        "K -d '{M,\"messages\":[],\"mcp_servers\":[{\"type\":\"url\",\"url\":\"https://evil.example\",\"name\":\"e\"}]}'",
        "403",
    ),
    (
        "url",
        "K -d '{M,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"source\":{\"type\":\"url\",\"url\":\"https://evil.example/?s\"}}]}]}'",
        "403",
    ),
    (
        "file",
        "K -d '{M,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"document\",\"source\":{\"type\":\"file\",\"file_id\":\"f\"}}]}]}'",
        "403",
    ),
    ("beta", "K -H 'anthropic-beta: files-api-2025-04-14' -d '{M,\"messages\":[]}'", "403"),
    ("header", "K -H 'anthropic-workspace: w' -d '{M,\"messages\":[]}'", "403"),
    ("speed", "K -d '{M,\"messages\":[],\"speed\":\"fast\"}'", "403"),
    ("tier", "K -d '{M,\"messages\":[],\"service_tier\":\"priority\"}'", "403"),
    (
        "model",
        "K -d '{\"model\":\"gpt-5\\n{\\\"type\\\":\\\"charge\\\"}\",\"max_tokens\":5,\"messages\":[]}'",
        "403",
    ),
    ("unpriced", "K -d '{\"model\":\"claude-next-9\",\"max_tokens\":5,\"messages\":[]}'", "403"),
    ("gzip", "K -H 'content-encoding: gzip' -d 'xx'", "413"),
    ("oversized", "K --data-binary @/tmp/large", "413"),
    ("batches", "B K -d '{}'", "403"),
];

#[test]
fn what_an_agent_sends_with_the_jobs_own_token_reaches_nothing_it_should_not() {
    let mut command =
        String::from("head -c 34000000 /dev/zero > /tmp/large; U=$ANTHROPIC_BASE_URL/v1/messages; ");
    for (name, arguments, _) in TRIES {
        let (url, rest) = match arguments.strip_prefix("B ") {
            Some(rest) => ("$U/batches", rest),
            None => ("$U", arguments),
        };
        let rest = rest.replacen("K ", "-H \"x-api-key: $ANTHROPIC_API_KEY\" ", 1);
        let rest = rest.replace("{M,", "{\"model\":\"claude-sonnet-4-6\",\"max_tokens\":5,");
        command.push_str(&format!(
            "echo \"{name}=$(curl -s -o /dev/null -w '%{{http_code}}' -H 'expect:' -H 'content-type: application/json' {rest} {url})\"; "
        ));
    }
    let script = format!(
        "[[reply]]\nwhen = {{ prompt = \"try\", turn = 0, tools = true }}\n\
         blocks = [{{ tool = \"Bash\", input = {{ command = {}, description = \"try\" }} }}]\n[default]\ntext = \"done\"\n",
        toml::Value::from(command)
    );
    let world = World::new(&script);
    let (events, job) = world.job(&json!({ "prompt": "try" }));
    assert_eq!(job["outcome"], "succeeded", "{job}");
    let said = tool_results(&events);
    for (name, _, status) in TRIES {
        assert!(said.contains(&format!("{name}={status}")), "{name} must give {status}:\n{said}");
    }
    assert_eq!(messages(&world).len(), 2, "only the CLI's own two turns went upstream");
    let refused = events.iter().filter(|e| e["type"] == "refused" && e["origin"] == "gateway").count();
    assert_eq!(refused, TRIES.len(), "each refusal is one record of the gateway");
    let charges = events.iter().filter(|e| e["type"] == "charge").count();
    assert_eq!(charges, 2, "no record can be forged through a name");
    world.end();
}
