//! What is found in which form, and what stays.

use base64::Engine as _;
use proptest::prelude::*;
use serde_json::json;

use super::*;

const CANARY: &str = "sk-canary-7f3a9c51d2e84b06";

fn redactor(secrets: &[&str]) -> Redactor {
    let secrets: Vec<Secret> = secrets.iter().map(|text| Secret::new((*text).to_owned())).collect();
    Redactor::new(&secrets)
}

fn clean(text: &str) -> (String, Counts) {
    let mut counts = Counts::new();
    (redactor(&[CANARY]).text(text, &mut counts).into_owned(), counts)
}

#[test]
fn a_credential_is_found_in_each_form() {
    let engine = base64::engine::general_purpose::STANDARD;
    let whole = format!("key: {CANARY}!");
    let escaped: String = CANARY.chars().map(|c| format!("\\u{:04x}", c as u32)).collect();
    let percent: String = CANARY.bytes().map(|b| format!("%{b:02X}")).collect();
    let hex: String = CANARY.bytes().map(|b| format!("{b:02x}")).collect();
    let broken = format!("{}\n  {}", &CANARY[..7], &CANARY[7..]);
    let nested =
        json!({ "in": json!({ "in": format!("x {}", CANARY.replace('-', "\\u002d")) }).to_string() });
    for text in [
        CANARY.to_owned(),
        CANARY.replace('-', "\\u002d"),
        CANARY.replace('-', "\\\\u002D"),
        CANARY.replace('-', "%2d"),
        escaped,
        percent,
        hex,
        broken,
        nested.to_string(),
        engine.encode(&whole),
        engine.encode(format!("u:{CANARY}")),
        engine
            .encode(&whole)
            .replace('\n', "")
            .as_bytes()
            .chunks(9)
            .map(String::from_utf8_lossy)
            .collect::<Vec<_>>()
            .join("\n"),
    ] {
        let (out, counts) = clean(&format!("before {text} after"));
        assert!(out.starts_with("before ") && out.ends_with(" after"), "{out}");
        assert!(out.contains("[redacted: credential of the daemon]"), "{text}: {out}");
        assert!(!redactor(&[CANARY]).still_in(&out) && !out.contains("7f3a9c51"), "{text}: {out}");
        assert_eq!(counts.values().sum::<u64>(), 1, "{counts:?}");
    }
}

#[test]
fn pieces_at_the_ends_of_a_text_are_found() {
    for cut in SECRET_BYTES_MIN..=CANARY.len() - SECRET_BYTES_MIN {
        let lines = [
            json!({ "text": format!("a {}", &CANARY[..cut]) }),
            json!({ "text": format!("{} z", &CANARY[cut..]) }),
        ];
        let mut counts = Counts::new();
        let out = redactor(&[CANARY]).json(&format!("{}\n{}\n", lines[0], lines[1]), &mut counts);
        let parsed: Vec<serde_json::Value> =
            out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(parsed[0]["text"], "a [redacted: credential of the daemon]");
        assert_eq!(parsed[1]["text"], "[redacted: credential of the daemon] z");
        assert_eq!(counts[CREDENTIAL], 2);
    }
}

#[test]
fn tokens_keys_headers_and_users_are_found() {
    let token = "ghp_0123456789abcdefghijABCDEFGHIJklmnop";
    let key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAE\nbm9uZQ\n-----END OPENSSH PRIVATE KEY-----";
    for (text, gone, stays) in [
        (format!("x={token};"), token, "x=[redacted: GitHub token];"),
        (token.replace("ghp_", "ghp\\u005f"), "0123456789abc", "[redacted: GitHub token]"),
        ("k sk-ant-api03-AbCdEf0123456789ghIJ_kl z".into(), "AbCdEf", "k [redacted: Anthropic key] z"),
        (format!("a\n{key}\nb"), "b3Blbn", "a\n[redacted: private key]\nb"),
        ("Authorization: Bearer abc\nnext".into(), "abc", "Authorization: [redacted: header]\nnext"),
        ("curl -H 'x-api-key: k1' u".into(), "k1", "curl -H 'x-api-key: [redacted: header]' u"),
        (r#"{"Cookie": "a=b; c=d"}"#.into(), "c=d", r#"{"Cookie": "[redacted: header]"}"#),
        ("bearer 0123456789abcdefgh.".into(), "0123456789", "bearer [redacted: header]"),
        (
            "at https://ann:pw@h.example/x".into(),
            "ann",
            "at https://[redacted: user in an address]@h.example/x",
        ),
        ("at https://t0k@h.example/x".into(), "t0k", "at https://[redacted: user in an address]@h.example/x"),
    ] {
        let (out, counts) = clean(&text);
        assert!(!out.contains(gone) && out == stays, "{text}: {out}");
        assert_eq!(counts.values().sum::<u64>(), 1, "{counts:?}");
        assert_eq!(clean(&out).0, out, "a second time changes nothing");
    }
    for text in ["ssh://git@h.example/x", "see /home/ann and a basic idea", "no cookie here", "ann@h.example"]
    {
        assert_eq!(clean(text), (text.to_owned(), Counts::new()));
    }
}

#[test]
fn json_stays_json_and_what_has_no_secret_stays_as_it_was_written() {
    let line = "{\"seq\":1,\"a\\u0062\":\"x\\/y\", \"n\": 1.50}\n";
    let mut counts = Counts::new();
    assert_eq!(redactor(&[CANARY]).json(line, &mut counts), line);
    let headers = json!({ "Authorization": "Basic x", "set-cookie": ["a=1", "b=2"], "n": { "other": "c" } });
    let out: serde_json::Value =
        serde_json::from_str(&redactor(&[]).json(&headers.to_string(), &mut counts)).expect("JSON");
    assert_eq!(
        out,
        json!({ "Authorization": "[redacted: header]", "set-cookie": ["[redacted: header]", "[redacted: header]"], "n": { "other": "c" } })
    );
    // A key that an agent prints line by line.
    let lines: Vec<String> = [
        "-----BEGIN RSA PRIVATE KEY-----",
        "MIIEpAIBAAKCAQEA0123456789ABCDEF",
        "-----END RSA PRIVATE KEY-----",
        "MIIEpAIBAAKCAQEA0123456789ABCDEF",
    ]
    .iter()
    .map(|text| json!({ "text": text }).to_string())
    .collect();
    let out = redactor(&[]).json(&lines.join("\n"), &mut counts);
    assert_eq!(out.matches("MIIE").count(), 1, "{out}");
    // A credential that is a number is found where no string is.
    let out = redactor(&["1234567890"]).json("{\"n\":1234567890}\n{\"n\":2}\n", &mut counts);
    assert!(!out.contains("1234567890") && out.ends_with("{\"n\":2}\n"), "{out}");
    for line in out.lines() {
        let _: serde_json::Value = serde_json::from_str(line).expect("JSON");
    }
}

#[test]
fn short_credentials_are_looked_for_as_they_are() {
    let mut counts = Counts::new();
    assert_eq!(
        redactor(&["abc", "12345"]).text("abc 12345 abcd", &mut counts),
        "abc [redacted: credential of the daemon] abcd"
    );
}

/// The forms in which a credential may stand somewhere.
fn form(secret: &str, kind: usize, seed: usize) -> String {
    let engine = base64::engine::general_purpose::STANDARD;
    let for_urls = base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let around = format!("{}{secret}{}", "ab".repeat(seed % 3), "z".repeat(seed % 5));
    let some = |n: usize| (n * 7 + seed).is_multiple_of(3);
    match kind {
        0 => secret.to_owned(),
        1 => {
            let escaped =
                |(n, c): (usize, char)| if some(n) { format!("\\u{:04X}", c as u32) } else { c.to_string() };
            secret.chars().enumerate().map(escaped).collect()
        }
        2 => secret.bytes().map(|b| format!("%{b:02x}")).collect(),
        3 => engine.encode(around),
        4 => for_urls.encode(around),
        5 => secret.bytes().map(|b| format!("{b:02X}")).collect(),
        6 => format!("{}\r\n\t{}", &secret[..secret.len() / 2], &secret[secret.len() / 2..]),
        7 => json!(json!({ "k": secret }).to_string()).to_string(),
        _ => json!({ "k": secret })
            .to_string()
            .bytes()
            .map(|b| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02X}") })
            .collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn no_credential_survives_in_any_form(
        secret in "[!-~]{8,40}", kind in 0usize..9, seed in 0usize..64,
        before in "[a-z {\"]{0,20}", after in "[a-z }\",]{0,20}", lines in any::<bool>(),
    ) {
        // Escaped in part: what must be escaped is not escaped there.
        prop_assume!(kind != 1 || !secret.contains(['"', '\\']));
        let redactor = redactor(&[&secret]);
        let text = format!("{before} {} {after}", form(&secret, kind, seed));
        let mut counts = Counts::new();
        let out = if lines {
            let line = json!({ "at": 1, "text": text }).to_string() + "\n";
            let out = redactor.json(&line, &mut counts);
            let read: serde_json::Value = serde_json::from_str(out.trim()).expect("JSON");
            read["text"].as_str().unwrap_or_default().to_owned()
        } else {
            redactor.text(&text, &mut counts).into_owned()
        };
        prop_assert!(!out.contains(&form(&secret, kind, seed)) && !redactor.still_in(&out), "{out}");
        prop_assert!(counts.values().sum::<u64>() >= 1);
    }

    #[test]
    fn text_without_secrets_is_never_changed(text in "[a-zA-Z0-9 .,\\n\\\\%{}-]{0,200}") {
        let mut counts = Counts::new();
        prop_assert_eq!(redactor(&[CANARY]).text(&text, &mut counts), text.as_str());
    }
}
