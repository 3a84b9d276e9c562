//! Every kind of provider with the real CLI in a real cell: the job succeeds, the charge is right, the credential
//! arrives in the provider's form and is nowhere in the cell; who may use a credential; whom its command runs as.

use hotcell::gateway::secret::Secret;
use hotcell::gateway::sigv4::{self, Keys, Scope, Signed};
use hotcell::model::Received;
use serde_json::{Value, json};

use crate::walls::key::{nothing_inside, nothing_written, scan};
use crate::walls::{RUN_THE_PROMPT, run, spec};
use crate::world::{CANARY, World};

/// A world whose only provider is what `text` says; `BASE` stands for the scripted model, `KEY` for its key's file.
fn world(text: &str) -> World {
    let mut world = World::without_daemon(RUN_THE_PROMPT, "");
    configure(&world, text);
    world.daemon_env.push(("PROVIDER_KEY".to_owned(), CANARY.to_owned()));
    world.start();
    world
}

fn configure(world: &World, text: &str) {
    let path = world.path("config.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let (head, table) = config.split_once("[provider.anthropic]").expect("the world's own provider");
    let base = table.split('"').nth(1).expect("its base_url");
    let text = text.replace("BASE", base).replace("KEY", &world.path("key").to_string_lossy());
    std::fs::write(path, format!("{head}\n{text}\n")).unwrap();
}

fn credential(kind: &str) -> String {
    format!("[[credential]]\nname = \"work\"\nkind = \"{kind}\"\nfile = \"KEY\"\n")
}

fn provider(kind: &str, path: &str, more: &str) -> String {
    format!(
        "[[provider]]\nname = \"p\"\nkind = \"{kind}\"\ncredential = \"work\"\nbase_url = \"BASE{path}\"\n{more}\n"
    )
}

const BEDROCK: &str = "region = \"eu-central-1\"\n\
    models = { \"claude-sonnet-4-6\" = \"eu.anthropic.claude-sonnet-4-6-v1:0\", \"claude-haiku-4-5\" = \"eu.anthropic.claude-haiku-4-5-20251001-v1:0\" }";

/// One job of the real CLI, whose agent looks for the key everywhere it can; the requests that reached the provider.
#[track_caller]
fn rehearse(world: World) -> Vec<Received> {
    let seen = run(&world, &scan(), &json!({}));
    nothing_inside(&seen);
    nothing_written(&world, &seen);
    let charges: Vec<&Value> = seen.events.iter().filter(|e| e["type"] == "charge").collect();
    assert!(charges.len() >= 2, "{charges:?}");
    // Of Sonnet: 10 input tokens, and 20 output tokens or what the request allowed.
    let (mut sum, mut of_the_search) = (0, 0);
    for charge in &charges {
        let output = charge["usage"]["output"].as_u64().unwrap();
        assert!(output > 0 && charge["model"] == "claude-sonnet-4-6", "{charge}");
        assert_eq!(charge["charged_micro_usd"], 10 * 3 + output * 15, "{charge}");
        sum += 10 * 3 + output * 15;
        // The search itself asks the API, for 16 tokens at most.
        of_the_search += u64::from(output == 16);
    }
    let totals = &seen.job["totals"];
    assert_eq!(totals["charged_micro_usd"], sum);
    assert_eq!(totals["cli_micro_usd"], sum - of_the_search * 270, "the CLI's own figure");
    let requests = seen.events.iter().filter(|e| e["type"] == "request");
    assert!(requests.clone().count() > 0 && requests.clone().all(|e| e["credential"] == "work"));
    let refused: Vec<&Value> = seen.events.iter().filter(|e| e["type"] == "refused").collect();
    // Six requests are the search's.
    assert_eq!(refused.len() as u64, 6 - of_the_search, "what the CLI itself asks is refused: {refused:?}");
    let got = world.recorder.requests();
    assert_eq!(got.len(), charges.len(), "every request that reached the provider is charged");
    assert!(
        got.iter().all(|r| !format!("{:?}", r.headers).contains("hotcell-")),
        "the token went to the provider"
    );
    world.end();
    got
}

#[track_caller]
fn all(got: &[Received], header: &str, value: &str, path: &str) {
    for request in got {
        assert_eq!(request.header(header), Some(value), "{}", request.target);
        // The search asks without the query that the CLI adds.
        let target = &request.target;
        assert!(target == path || Some(&**target) == path.strip_suffix("?beta=true"), "{target}");
    }
}

#[test]
fn anthropic_with_a_bearer_token() {
    let got = rehearse(world(&(credential("bearer") + &provider("anthropic", "", ""))));
    all(&got, "authorization", &format!("Bearer {CANARY}"), "/v1/messages?beta=true");
    assert!(got.iter().all(|r| r.header("x-api-key").is_none()));
}

#[test]
fn a_compatible_url_with_a_key_in_a_header_of_its_own() {
    let credential = credential("header") + "header = \"X-Team-Key\"\nprefix = \"key=\"\n";
    let got = rehearse(world(&(credential + &provider("compatible", "/gateway", ""))));
    all(&got, "x-team-key", &format!("key={CANARY}"), "/gateway/v1/messages?beta=true");
}

#[test]
fn foundry_with_a_deployment_of_another_name() {
    let models = "models = { \"claude-sonnet-4-6\" = \"our-deployment\" }";
    let got = rehearse(world(&(credential("api_key") + &provider("foundry", "/anthropic", models))));
    all(&got, "x-api-key", CANARY, "/anthropic/v1/messages?beta=true");
    assert!(got.iter().all(|r| r.json()["model"] == "our-deployment"));
}

#[test]
fn vertex_with_an_access_token() {
    let place = "region = \"europe-west1\"\nproject = \"our-project\"";
    let got = rehearse(world(&(credential("bearer") + &provider("vertex", "/v1", place))));
    let path = "/v1/projects/our-project/locations/europe-west1/publishers/anthropic/models/claude-sonnet-4-6:streamRawPredict";
    all(&got, "authorization", &format!("Bearer {CANARY}"), path);
}

const BEDROCK_PATH: &str = "/model/eu.anthropic.claude-sonnet-4-6-v1%3A0/invoke-with-response-stream";

#[test]
fn bedrock_with_a_bearer_token() {
    let got = rehearse(world(&(credential("bearer") + &provider("bedrock", "", BEDROCK))));
    all(&got, "authorization", &format!("Bearer {CANARY}"), BEDROCK_PATH);
}

#[test]
fn bedrock_with_keys_that_sign() {
    let command = "[[credential]]\nname = \"work\"\nkind = \"aws\"\n\
        command = \"printf '{\\\"Version\\\":1,\\\"AccessKeyId\\\":\\\"AKIDEXAMPLE\\\",\\\"SecretAccessKey\\\":\\\"%s\\\"}' $(cat KEY)\"\n";
    let got = rehearse(world(&(command.to_owned() + &provider("bedrock", "", BEDROCK))));
    let keys = Keys {
        access_key_id: "AKIDEXAMPLE".into(),
        secret_access_key: Secret::new(CANARY.to_owned()),
        session_token: None,
    };
    for request in &got {
        let header = |name| request.header(name).expect(name);
        let scope = Scope { region: "eu-central-1", service: "bedrock", amz_date: header("x-amz-date") };
        let headers = ["content-type", "host", "x-amz-date"].map(|name| (name, header(name)));
        let (path, body_sha256) = (BEDROCK_PATH, sigv4::sha256_hex(&request.body));
        assert_eq!(request.target, path);
        let signed = Signed { method: "POST", path, query: "", headers: &headers, body_sha256: &body_sha256 };
        assert_eq!(header("authorization"), sigv4::authorization(&keys, scope, signed));
        assert!(!format!("{:?}", request.headers).contains(CANARY), "the secret key itself went out");
    }
}

/// Submits as a user; the answer.
fn submit(world: &World, uid: u32, spec: &Value) -> crate::world::Answer {
    world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(uid)).expect("an answer")
}

#[test]
fn a_credentials_command_runs_as_the_submitter_and_others_are_refused_at_submit() {
    let credential = "[[credential]]\nname = \"work\"\nkind = \"api_key\"\nusers = [12345]\n\
        command = \"echo key-of-$(id -u)-$(id -g)\"\n";
    let world = world(&(credential.to_owned() + &provider("anthropic", "", "")));
    let job = json!({ "prompt": "true", "policy": "trusted" });
    let accepted = submit(&world, 12_345, &job);
    assert_eq!(accepted.status, 201, "{}", accepted.body);
    let id = accepted.json()["id"].as_str().unwrap().to_owned();
    world.follow(&id);
    assert_eq!(world.show(&id)["outcome"], "succeeded", "{}", world.log());
    let got = world.recorder.requests();
    assert!(!got.is_empty());
    assert!(got.iter().all(|r| r.header("x-api-key") == Some("key-of-12345-12345")), "{got:?}");

    for (uid, provider, status, words) in [
        (12_346, json!(null), 403, "may not use the credential work"),
        (12_345, json!("nope"), 400, "there is no provider"),
        // The built-in one stands there, but nobody gave it a key.
        (12_345, json!("anthropic"), 201, ""),
    ] {
        let mut spec = job.clone();
        if !provider.is_null() {
            spec["provider"] = provider;
        }
        let answer = submit(&world, uid, &spec);
        assert_eq!(answer.status, status, "{}", answer.body);
        assert!(answer.body.contains(words), "{}", answer.body);
        if status == 201 {
            let id = answer.json()["id"].as_str().unwrap().to_owned();
            world.follow(&id);
            assert_eq!(world.show(&id)["reason"], "provider_auth", "{}", world.show(&id));
        }
    }
    assert_eq!(world.recorder.total(), got.len() as u64);
    world.end();
}

#[test]
fn a_subscriptions_token_is_refused_with_the_reason_from_every_source() {
    const OAT: &str = "sk-ant-oat01-canary-of-a-subscription";
    for source in ["file = \"KEY\"", "env = \"PROVIDER_OAT\""] {
        let world = World::without_daemon(RUN_THE_PROMPT, "");
        std::fs::write(world.path("key"), OAT).unwrap();
        let credential = format!("[[credential]]\nname = \"work\"\nkind = \"bearer\"\n{source}\n");
        configure(&world, &(credential + &provider("anthropic", "", "")));
        let output = world.hotcell().env("PROVIDER_OAT", OAT).arg("serve").output().expect("hotcell serve");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("subscription") && said.contains("work"), "{said}");
        assert!(!said.contains(OAT) && !said.contains("canary"), "{said}");
    }
    // A command is run only when a job needs it.
    let credential =
        format!("[[credential]]\nname = \"work\"\nkind = \"api_key\"\ncommand = \"echo {OAT}\"\n");
    let world = world(&(credential + &provider("anthropic", "", "")));
    let (events, job) = world.job(&spec(&world, "true", &json!({})));
    assert_eq!((&job["outcome"], &job["reason"]), (&json!("failed"), &json!("provider_auth")), "{job}");
    assert_eq!(world.recorder.total(), 0);
    let journal: String = events.iter().map(ToString::to_string).collect();
    assert!(world.log().contains("subscription"));
    assert!(!world.log().contains(OAT) && !journal.contains(OAT));
    world.end();
}
