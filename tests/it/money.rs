//! Money with the real CLI in real cells: a batch shares its budget, what was spent is reported to the cent and
//! outlives its jobs, and budgets survive the daemon.

use serde_json::{Value, json};

use crate::world::World;

/// 30 000 tokens in and 8 000 out at 3 and 15 USD for a million.
const SCRIPT: &str = "[default]\ntext = \"done\"\nusage = { input = 30000, output = 8000 }\n";
const COST_MICRO: u64 = 90_000 + 120_000;

fn cost(world: &World, args: &[&str]) -> Value {
    let (code, out, err) = world.run(&[&["cost", "--json"], args].concat());
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    serde_json::from_str(&out).expect("JSON")
}

fn keys(report: &Value) -> Vec<(Option<&str>, u64)> {
    let rows = report["rows"].as_array().expect("rows");
    rows.iter().map(|row| (row["key"].as_str(), row["cost_micro_usd"].as_u64().unwrap())).collect()
}

#[test]
fn a_batch_shares_its_budget_and_the_report_has_every_cent_of_it() {
    let mut world = World::with(SCRIPT, "budgets.day_usd = 50\nbudgets.time_zone = \"UTC\"\n");
    let submit = |prompt: &str, more: &[&str]| {
        let (code, out, err) =
            world.run(&[&["run", prompt, "-d", "--batch", "nightly", "--label", "team=red"], more].concat());
        assert_eq!(code, 0, "{err}");
        out.trim().to_owned()
    };
    // Room for one answer, and not for what a second one could cost.
    let first = submit("one", &["--batch-cost-usd", "0.30"]);
    world.follow(&first);
    let job = world.show(&first);
    assert_eq!((&job["outcome"], &job["batch"]), (&json!("succeeded"), &json!("nightly")), "{job}");
    assert_eq!(job["totals"]["charged_micro_usd"], COST_MICRO);
    let second = submit("two", &[]);
    let events = world.follow(&second);
    let job = world.show(&second);
    assert_eq!((&job["outcome"], &job["reason"]), (&json!("stopped"), &json!("budget")), "{job}");
    assert_eq!(job["cost_usd"], 0.0);
    let budget = events.iter().find(|event| event["type"] == "budget").expect("a budget event");
    assert_eq!(
        (&budget["scope"], &budget["limit_micro_usd"]),
        (&json!("batch"), &json!(300_000)),
        "{budget}"
    );
    assert_eq!(budget["spent_micro_usd"], COST_MICRO);
    let stop = events.iter().find(|event| event["type"] == "stop").expect("a stop");
    assert!(stop["detail"].as_str().unwrap().contains("batch budget"), "{stop}");
    // Counting tokens costs nothing.
    let paid = world.recorder.requests().iter().filter(|r| !r.target.contains("count_tokens")).count();
    assert_eq!(paid, 1, "a request went out without money");
    // Another user's batch of that name is another one; another figure for this one is a mistake.
    let (code, _, err) = world.run(&["run", "x", "-d", "--batch", "nightly", "--batch-cost-usd", "0.31"]);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("batch.cost_usd") && err.contains("0.300000"), "{err}");
    let third = submit("three", &[]);
    world.follow(&third);

    reports(&world, &first);
    // Removed jobs and dead daemons change nothing of it.
    let (code, _, err) = world.run(&["rm", &first]);
    assert_eq!(code, 0, "{err}");
    world.kill();
    world.start();
    assert_eq!(keys(&cost(&world, &["--by", "batch"])), [(Some("nightly"), COST_MICRO)]);
    let budgets = world.call("GET", "/v1/budgets", "").json();
    assert_eq!(budgets["time_zone"], "UTC");
    let day = &budgets["budgets"][0];
    assert_eq!((&day["scope"], &day["limit_usd"]), (&json!("day"), &json!(50.0)), "{budgets}");
    assert_eq!((&day["spent_usd"], &day["reserved_usd"]), (&json!(COST_MICRO as f64 / 1e6), &json!(0.0)));
    assert!(day["resets_at"].as_str().unwrap().ends_with("T00:00:00.000Z"), "{day}");
    let metrics = world.call("GET", "/metrics", "").body;
    for line in [
        "hotcell_cost_usd_total{model=\"claude-sonnet-4-6\"} 0.21",
        "hotcell_budget_spent_usd{scope=\"day\"} 0.21",
        "hotcell_budget_limit_usd{scope=\"day\"} 50",
        "hotcell_budget_limit_usd{scope=\"month\"} 0",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}:\n{metrics}");
    }
    world.end();
}

fn reports(world: &World, first: &str) {
    let ledger: u64 = world.sql("SELECT sum(charged_micro) FROM ledger").parse().unwrap();
    assert_eq!(ledger, COST_MICRO);
    let whole = |key: Option<&'static str>| vec![(key, ledger)];
    for (by, key) in [
        ("model", Some("claude-sonnet-4-6")),
        ("user", Some("0")),
        ("policy", Some("default")),
        ("label", Some("team=red")),
        ("batch", Some("nightly")),
        ("credential", Some("anthropic")),
    ] {
        let report = cost(world, &["--by", by]);
        assert_eq!(keys(&report), whole(key), "{report}");
        assert_eq!(
            (&report["total"]["cost_micro_usd"], &report["total"]["requests"]),
            (&json!(ledger), &json!(1))
        );
    }
    assert_eq!(keys(&cost(world, &["--by", "label", "--label", "team"])), whole(Some("red")));
    assert_eq!(keys(&cost(world, &["--by", "job"])), [(Some(first), ledger)]);
    let report = cost(world, &["--by", "day"]);
    let day = report["rows"][0]["key"].as_str().expect("a day");
    assert_eq!(keys(&cost(world, &["--by", "month"])), [(Some(&day[..7]), ledger)]);
    assert_eq!(keys(&cost(world, &["--since", day, "--until", day])), whole(Some("claude-sonnet-4-6")));
    assert!(keys(&cost(world, &["--until", "2020-01-01"])).is_empty());

    let root = &cost(world, &["--by", "user"])["rows"][0];
    assert_eq!((&root["uid"], &root["user"]), (&json!(0), &json!("root")));
    let (code, out, _) = world.run(&["cost", "--by", "user"]);
    assert!(code == 0 && out.contains("\nroot "), "{out}");

    let (code, out, _) = world.run(&["cost", "--by", "batch", "--csv"]);
    assert_eq!(code, 0);
    assert_eq!(
        out,
        "batch,cost_usd,share,requests,input,output,cache_read,cache_write_5m,cache_write_1h,web_searches\r\n\
         nightly,0.210000,1.000000,1,30000,8000,0,0,0,0\r\n"
    );
    let (code, out, _) = world.run(&["cost", "--by", "batch"]);
    assert!(code == 0 && out.contains("nightly  $0.2100  100.0%") && out.contains("\ntotal "), "{out}");
    let (code, out, _) = world.run(&["cost", "--since", "2999-01-01"]);
    assert_eq!((code, out.as_str()), (0, "nothing was spent\n"));
    for (args, words) in [
        (["--since", "yesterday"], "--since"),
        (["--until", "2026-02-30"], "--until"),
        (["--by", "colour"], "--by"),
        (["--label", "team"], "--by label"),
    ] {
        let (code, _, err) = world.run(&[&["cost"], args.as_slice()].concat());
        assert!(code == 2 && err.contains(words), "{args:?}: {err}");
    }
    // Somebody else has spent nothing, whatever they ask for.
    for (query, status) in [("", 200), ("?by=user", 200), ("?by=x", 400), ("?since=x", 400), ("?all=1", 400)]
    {
        let answer = world.curl("GET", &format!("/v1/cost{query}"), "", &[], Some(4242)).expect("an answer");
        assert_eq!(answer.status, status, "{query}: {}", answer.body);
        if status == 200 {
            assert_eq!(
                (&answer.json()["rows"], &answer.json()["total"]["requests"]),
                (&json!([]), &json!(0))
            );
        }
    }
}
