//! Each kind of provider on real sockets against the scripted model: what passes, in which form it arrives, what it
//! costs, and that everything else sends nothing.

use serde_json::{Value, json};

use super::super::tests::{KEY, MODEL, SCRIPT, SCRIPT_COST, Setup, TOKEN, World, ask, read};
use super::super::{CredentialKind, GatewayEvent, ProviderSpec, sigv4};
use super::*;

const ID: &str = "us.anthropic.claude-sonnet-4-6-v1:0";

fn spec(kind: ProviderKind) -> (ProviderSpec, CredentialKind) {
    let text = |text: &str| Some(text.to_owned());
    let (base_url, credential, region, project) = match kind {
        ProviderKind::Anthropic | ProviderKind::Compatible => ("", CredentialKind::ApiKey, None, None),
        ProviderKind::Bedrock => ("", CredentialKind::Bearer, text("us-east-1"), None),
        ProviderKind::Vertex => ("/v1", CredentialKind::Bearer, text("us-east5"), text("real-project")),
        ProviderKind::Foundry => ("/anthropic", CredentialKind::ApiKey, None, None),
    };
    let models = if kind == ProviderKind::Bedrock { vec![(MODEL.into(), ID.into())] } else { Vec::new() };
    let models = models.into_iter().collect();
    let (name, base_url) = ("test".to_owned(), base_url.to_owned());
    (ProviderSpec { name, kind, base_url, credential: "key".into(), region, project, models }, credential)
}

async fn world(provider: (ProviderSpec, CredentialKind)) -> World {
    World::with(SCRIPT, Setup { provider: Some(provider), ..Setup::default() }).await
}

const VERTEX: &str = "/v1/projects/hotcell/locations/global/publishers/anthropic/models";

/// A path that calls, and the header that carries the token, as the CLI does it.
fn call(kind: ProviderKind) -> (String, (&'static str, String)) {
    let bearer = ("authorization", format!("Bearer {TOKEN}"));
    match kind {
        ProviderKind::Anthropic | ProviderKind::Compatible => {
            ("/v1/messages?beta=true".into(), ("x-api-key", TOKEN.into()))
        }
        ProviderKind::Bedrock => (format!("/model/{MODEL}/invoke-with-response-stream"), bearer),
        ProviderKind::Vertex => (format!("{VERTEX}/{MODEL}:streamRawPredict"), (TOKEN_HEADER, TOKEN.into())),
        ProviderKind::Foundry => ("/anthropic/v1/messages?beta=true".into(), ("x-api-key", TOKEN.into())),
    }
}

/// A body as the CLI sends it to this kind.
fn body(kind: ProviderKind) -> Value {
    let mut body = ask("x", true);
    let version = match kind {
        ProviderKind::Bedrock => "bedrock-2023-05-31",
        ProviderKind::Vertex => "vertex-2023-10-16",
        ProviderKind::Anthropic | ProviderKind::Foundry | ProviderKind::Compatible => return body,
    };
    let fields = body.as_object_mut().unwrap();
    fields.remove("model");
    fields.insert("anthropic_version".into(), version.into());
    if kind == ProviderKind::Bedrock {
        fields.remove("stream");
        fields.insert("anthropic_beta".into(), json!(["interleaved-thinking-2025-05-14"]));
    }
    body
}

#[tokio::test]
async fn a_call_arrives_in_the_providers_form_and_is_charged_exactly() {
    for kind in ProviderKind::ALL {
        let mut world = world(spec(kind)).await;
        let (path, (name, token)) = call(kind);
        let headers = [(name, &*token), ("anthropic-beta", "claude-code-20250219"), ("x-amzn-x", "1")];
        let answer = read(world.send(&path, &headers, body(kind).to_string()).await).await;
        assert_eq!(answer.status, 200, "{kind:?}: {}", answer.body);
        assert!(answer.whole, "{kind:?}");
        assert_eq!(world.charged().await.1, SCRIPT_COST, "{kind:?}");
        let seen = &world.recorder.requests()[0];
        let wanted = match kind {
            ProviderKind::Anthropic | ProviderKind::Compatible => "/some/prefix/v1/messages?beta=true",
            ProviderKind::Bedrock => {
                "/some/prefix/model/us.anthropic.claude-sonnet-4-6-v1%3A0/invoke-with-response-stream"
            }
            ProviderKind::Vertex => {
                "/some/prefix/v1/projects/real-project/locations/us-east5/publishers/anthropic/models/claude-sonnet-4-6:streamRawPredict"
            }
            ProviderKind::Foundry => "/some/prefix/anthropic/v1/messages?beta=true",
        };
        assert_eq!(seen.target, wanted);
        let bearer = format!("Bearer {KEY}");
        let (key, authorization) = (seen.header("x-api-key"), seen.header("authorization"));
        match kind {
            ProviderKind::Bedrock | ProviderKind::Vertex => {
                assert_eq!((key, authorization), (None, Some(&*bearer)));
            }
            _ => assert_eq!((key, authorization), (Some(KEY), None)),
        }
        assert_eq!(seen.header("anthropic-beta"), Some("claude-code-20250219"), "{kind:?}");
        assert!(!format!("{:?}", seen.headers).contains(TOKEN) && seen.header("x-amzn-x").is_none());
        assert_eq!(seen.json(), body(kind), "{kind:?}: the body goes on as it came");
        let events = world.end().await.0;
        let requested = events.iter().all(|event| !matches!(event, GatewayEvent::Refused { .. }));
        assert!(requested, "{events:?}");
    }
}

#[tokio::test]
async fn a_whole_answer_is_charged_and_so_are_probes() {
    for (kind, path) in [
        (ProviderKind::Bedrock, format!("/model/{}/invoke", ID.replace(':', "%3A"))),
        (ProviderKind::Vertex, format!("{VERTEX}/claude-sonnet-4-6@20260101:rawPredict")),
    ] {
        let mut world = world(spec(kind)).await;
        let (_, (name, token)) = call(kind);
        let mut body = body(kind);
        body.as_object_mut().unwrap().remove("stream");
        let answer = read(world.send(&path, &[(name, &token)], body.to_string()).await).await;
        assert_eq!(answer.status, 200, "{kind:?}: {}", answer.body);
        assert_eq!(world.charged().await.1, SCRIPT_COST, "{kind:?}");
        world.end().await;
    }
}

#[tokio::test]
async fn foreign_missing_and_doubled_credentials_send_nothing_for_any_kind() {
    let bearer = format!("Bearer {TOKEN}");
    let cases: &[&[(&str, &str)]] = &[
        &[],
        &[("x-api-key", "sk-foreign")],
        &[("authorization", "Bearer sk-ant-oat01-foreign")],
        &[("authorization", "AWS4-HMAC-SHA256 Credential=AKIA/x, SignedHeaders=host, Signature=00")],
        &[(TOKEN_HEADER, "foreign")],
        &[("x-api-key", TOKEN), ("authorization", "Bearer sk-foreign")],
        &[("x-api-key", TOKEN), ("authorization", &bearer)],
        &[("x-api-key", TOKEN), (TOKEN_HEADER, TOKEN)],
        &[("x-api-key", TOKEN), ("x-api-key", TOKEN)],
        &[("authorization", &bearer), ("authorization", &bearer)],
        &[("x-api-key", TOKEN), ("x-goog-api-key", "AIza")],
        &[("x-api-key", TOKEN), ("api-key", "k")],
        &[("authorization", &bearer), ("x-amz-security-token", "t")],
    ];
    for kind in ProviderKind::ALL {
        let mut world = world(spec(kind)).await;
        for headers in cases {
            let answer = read(world.send(&call(kind).0, headers, body(kind).to_string()).await).await;
            assert_eq!(answer.status, 403, "{kind:?} {headers:?}");
            let refused = GatewayEvent::Refused { status: 403, why: Refusal::Credential };
            assert_eq!(world.lease.next_event().await, refused);
        }
        assert_eq!(world.recorder.total(), 0, "{kind:?}");
        world.end().await;
    }
}

/// Every method × every path that any kind knows, and spellings that mean something else.
#[tokio::test]
async fn only_the_list_of_its_kind_passes() {
    let encoded = ID.replace(':', "%3A");
    let paths: Vec<String> = [
        "/",
        "/v1",
        "/v1/messages",
        "/v1/messages?beta=true",
        "/v1/messages?beta=false",
        "/v1/messages/",
        "/v1//messages",
        "/V1/messages",
        "/v1/messages/count_tokens",
        "/v1/messages/batches",
        "/v1/complete",
        "/v1/files",
        "/v1/models",
        "/v1/organizations/me",
        "/x/../v1/messages",
        "/v1/%6dessages",
        "/anthropic/v1/messages",
        "/anthropic/v1/messages?beta=true",
        "/anthropic/v1/messages/count_tokens",
        "/anthropic/v1/files",
        "/inference-profiles",
        "/inference-profiles?type=SYSTEM_DEFINED",
        "/inference-profiles/x",
        "/foundation-models",
        "/guardrails",
        "/async-invoke",
        "/model//invoke",
        "/model/../invoke",
        "/v1/projects",
        "/v1beta/models",
        "/openai/v1/chat/completions",
    ]
    .map(str::to_owned)
    .into_iter()
    .chain(
        ["invoke", "invoke-with-response-stream", "converse", "converse-stream", "count-tokens", "invoke/x"]
            .map(|a| format!("/model/{encoded}/{a}")),
    )
    .chain([
        format!("/model/{ID}/invoke"),
        format!("/model/{}/invoke", ID.replace(':', "%3a")),
        format!("/model/{encoded}/invoke?x=1"),
    ])
    .chain(
        ["rawPredict", "streamRawPredict", "predict", "serverStreamingPredict"]
            .map(|a| format!("{VERTEX}/{MODEL}:{a}")),
    )
    .chain([format!("{VERTEX}/count-tokens:rawPredict"), format!("{VERTEX}/count-tokens:streamRawPredict")])
    .chain(
        [VERTEX.replace("/hotcell/", "/other/"), VERTEX.replace("/global/", "/us-east5/")]
            .map(|m| format!("{m}/{MODEL}:rawPredict")),
    )
    .collect();
    let methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"];
    for kind in ProviderKind::ALL {
        let provider = Provider::open(spec_at_home(kind), Pacer::new(), &Reach::default()).unwrap();
        let mut passed = Vec::new();
        for (method, path) in methods.iter().flat_map(|m| paths.iter().map(move |p| (*m, p))) {
            let (method, uri) =
                (Method::from_bytes(method.as_bytes()).unwrap(), path.parse::<Uri>().unwrap());
            if provider.route(&method, &uri).is_ok() {
                passed.push(format!("{method} {path}"));
            }
        }
        let absolute = format!("http://evil{}", call(kind).0).parse().unwrap();
        assert!(provider.route(&Method::POST, &absolute).is_err(), "{kind:?}");
        let posts = |paths: &[&str]| paths.iter().map(|p| format!("POST {p}")).collect::<Vec<_>>();
        let vertex =
            |ends: &[&str]| ends.iter().map(|end| format!("POST {VERTEX}/{end}")).collect::<Vec<_>>();
        let wanted = match kind {
            ProviderKind::Anthropic | ProviderKind::Compatible => {
                posts(&["/v1/messages", "/v1/messages?beta=true", "/v1/messages/count_tokens"])
            }
            ProviderKind::Foundry => posts(&[
                "/anthropic/v1/messages",
                "/anthropic/v1/messages?beta=true",
                "/anthropic/v1/messages/count_tokens",
            ]),
            ProviderKind::Bedrock => posts(&[
                &format!("/model/{encoded}/invoke"),
                &format!("/model/{encoded}/invoke-with-response-stream"),
                &format!("/model/{ID}/invoke"),
            ]),
            ProviderKind::Vertex => vertex(&[
                "claude-sonnet-4-6:rawPredict",
                "claude-sonnet-4-6:streamRawPredict",
                "count-tokens:rawPredict",
            ]),
        };
        assert_eq!(passed, wanted, "{kind:?}");

        // The same over the wire: nothing else reaches the upstream.
        let world = world(spec(kind)).await;
        let (_, (name, token)) = call(kind);
        for path in paths.iter().filter(|path| !wanted.contains(&format!("POST {path}"))) {
            let answer = read(world.send(path, &[(name, &token)], body(kind).to_string()).await).await;
            assert_eq!(answer.status, 403, "{kind:?} {path}");
        }
        assert_eq!(world.recorder.total(), 0, "{kind:?}");
        world.end().await;
    }
}

fn spec_at_home(kind: ProviderKind) -> ProviderSpec {
    let (spec, _) = spec(kind);
    ProviderSpec { base_url: "http://127.0.0.1:9".into(), ..spec }
}

#[tokio::test]
async fn the_profiles_are_answered_here_and_tell_nothing() {
    let world = world(spec(ProviderKind::Bedrock)).await;
    for (token, status) in [(TOKEN, 200), ("other", 403)] {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(world.connect().await))
                .await
                .unwrap();
        let connection = tokio::spawn(connection);
        let request = hyper::Request::get("/inference-profiles?type=SYSTEM_DEFINED")
            .header("authorization", format!("Bearer {token}"))
            .body(http_body_util::Full::new(Bytes::new()));
        let answer = read(sender.send_request(request.unwrap()).await.unwrap()).await;
        assert_eq!(answer.status, status);
        assert_eq!(answer.body == bedrock::NO_PROFILES, status == 200, "{}", answer.body);
        drop(sender);
        connection.abort();
        let _ = connection.await;
    }
    assert_eq!(world.recorder.total(), 0);
    world.end().await;
}

#[tokio::test]
async fn what_bedrock_is_not_told_twice_or_does_not_know_sends_nothing() {
    let world = world(spec(ProviderKind::Bedrock)).await;
    let token = format!("Bearer {TOKEN}");
    let with = |key: &str, value: Value| {
        let mut body = body(ProviderKind::Bedrock);
        body[key] = value;
        body.to_string()
    };
    let path = call(ProviderKind::Bedrock).0;
    for (path, body, status) in [
        (path.clone(), with("model", json!("claude-opus-4-8")), 400),
        (path.clone(), with("stream", json!(true)), 400),
        (path.clone(), with("anthropic_version", json!("2023-06-01")), 400),
        (path.clone(), with("mcp_servers", json!([{"type":"url","url":"https://x","name":"x"}])), 403),
        (path, "{".to_owned(), 400),
        // No id is known, or no price.
        ("/model/claude-opus-4-8/invoke".into(), with("x", json!(1)), 403),
        ("/model/amazon.nova-pro-v1:0/invoke".into(), with("x", json!(1)), 403),
        (
            "/model/us.anthropic.claude-new-9/invoke".into(),
            self::body(ProviderKind::Bedrock).to_string(),
            403,
        ),
    ] {
        let answer = read(world.send(&path, &[("authorization", &token)], body.clone()).await).await;
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.body);
        assert!(answer.body.contains("hotcell: "), "{}", answer.body);
    }
    assert_eq!(world.recorder.total(), 0);
    world.end().await;
}

#[tokio::test]
async fn a_broken_event_stream_costs_no_less_than_was_seen() {
    for fault in ["cut_after_events", "malformed_after_events", "error_after_events"] {
        for events in [0, 1, 3, 6] {
            let script = format!("{SCRIPT}\nfault = {{ {fault} = {events} }}");
            let setup = Setup { provider: Some(spec(ProviderKind::Bedrock)), ..Setup::default() };
            let mut world = World::with(&script, setup).await;
            let (path, (name, token)) = call(ProviderKind::Bedrock);
            let body = body(ProviderKind::Bedrock).to_string();
            let answer = read(world.send(&path, &[(name, &token)], body).await).await;
            assert_eq!(answer.whole, fault != "cut_after_events", "{fault} {events}");
            let GatewayEvent::Requested { reserved, .. } = world.lease.next_event().await else { panic!() };
            let charged = world.charged().await.1;
            match (events, fault) {
                (0, "error_after_events") => assert_eq!(charged, 0, "it did not begin"),
                (0, _) => assert_eq!(charged, reserved.0, "{fault}: no usage was seen"),
                _ => assert!(
                    charged > SCRIPT_COST - 3000 && charged <= reserved.0 + SCRIPT_COST,
                    "{fault} {events}: {charged}"
                ),
            }
            world.end().await;
        }
    }
}

#[tokio::test]
async fn aws_keys_sign_and_neither_they_nor_the_signature_come_back() {
    let provider = (spec(ProviderKind::Bedrock).0, CredentialKind::Aws);
    let key = r#"{"Version":1,"AccessKeyId":"AKIDEXAMPLE","SecretAccessKey":"canary-secret-access-key","SessionToken":"canary-session-token"}"#;
    let world =
        World::with(SCRIPT, Setup { provider: Some(provider), key: key.into(), ..Setup::default() }).await;
    let (path, (name, token)) = call(ProviderKind::Bedrock);
    let answer =
        read(world.send(&path, &[(name, &token)], body(ProviderKind::Bedrock).to_string()).await).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let seen = &world.recorder.requests()[0];
    let header = |name| seen.header(name).unwrap();
    assert_eq!(header("x-amz-security-token"), "canary-session-token");
    let keys = Keys {
        access_key_id: "AKIDEXAMPLE".into(),
        secret_access_key: Secret::new("canary-secret-access-key".into()),
        session_token: None,
    };
    let scope = Scope { region: "us-east-1", service: "bedrock", amz_date: header("x-amz-date") };
    let headers =
        ["content-type", "host", "x-amz-date", "x-amz-security-token"].map(|name| (name, header(name)));
    let body_sha256 = sigv4::sha256_hex(&seen.body);
    let signed = Signed {
        method: "POST",
        path: &seen.target,
        query: "",
        headers: &headers,
        body_sha256: &body_sha256,
    };
    assert_eq!(
        header("authorization"),
        sigv4::authorization(&keys, scope, signed),
        "as the upstream reckons it"
    );
    assert!(!format!("{:?}", seen.headers).contains("canary-secret"));
    world.end().await;
}

#[tokio::test]
async fn a_credential_that_cannot_be_had_is_told_without_its_source_and_costs_nothing() {
    let source =
        crate::gateway::CredentialSource::Command(vec!["/bin/sh".into(), "-c".into(), "exit 3".into()]);
    let setup = Setup { source: Some(source), ..Setup::default() };
    let world = World::with(SCRIPT, setup).await;
    let answer = world.post(ask("x", true)).await;
    assert_eq!(answer.status, 403, "{}", answer.body);
    assert!(answer.body.contains("credential key") && !answer.body.contains("/bin/sh"), "{}", answer.body);
    assert_eq!(world.recorder.total(), 0);
    let (events, spent) = world.end().await;
    assert!(
        spent == 0 && events.contains(&GatewayEvent::Refused { status: 403, why: Refusal::Provider }),
        "{events:?}"
    );
}

#[test]
fn a_provider_that_lacks_something_is_named() {
    let open = |change: &dyn Fn(&mut ProviderSpec)| {
        let mut spec = spec_at_home(ProviderKind::Vertex);
        change(&mut spec);
        Provider::open(spec, Pacer::new(), &Reach::default())
            .map(|p| p.upstream.uri("/x").unwrap().to_string())
            .map_err(|e| e.to_string())
    };
    assert!(open(&|s| s.project = None).unwrap_err().contains("project"));
    assert!(open(&|s| s.region = Some("a/b".into())).unwrap_err().contains("single words"));
    assert!(
        open(&|s| s.models = [("a".into(), "x".into()), ("b".into(), "x".into())].into())
            .unwrap_err()
            .contains("same id")
    );
    let usual = |kind, region: &str| {
        open(&|s| (s.kind, s.base_url, s.region) = (kind, String::new(), Some(region.into())))
    };
    assert_eq!(
        usual(ProviderKind::Bedrock, "eu-west-1").unwrap(),
        "https://bedrock-runtime.eu-west-1.amazonaws.com/x"
    );
    assert_eq!(
        usual(ProviderKind::Vertex, "us-east5").unwrap(),
        "https://us-east5-aiplatform.googleapis.com/v1/x"
    );
    assert_eq!(usual(ProviderKind::Vertex, "global").unwrap(), "https://aiplatform.googleapis.com/v1/x");
    assert!(usual(ProviderKind::Foundry, "x").unwrap_err().contains("base_url"));
}
