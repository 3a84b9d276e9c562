//! The way out of a cell, tried by an agent at the real proxy: what no rule names, ambiguous bytes, spellings, inner
//! addresses, names of TLS. What counts is what arrives: the internet is [`Internet`], in this process.

use std::collections::BTreeSet;
use std::net::{TcpListener, UdpSocket};

use serde_json::{Value, json};

use super::{RUN_THE_PROMPT, Seen, run};
use crate::egress::Internet;
use crate::world::World;

const TOKEN: &str = "zoo-token-5b1f00c2d7";
const RULES: &str = "[[egress.host]]\nname = \"inspected.example\"\ninspect = true\nmethods = [\"GET\", \"POST\"]\n\
    paths = [\"/pub/**\"]\ncredential = \"git\"\n\
    [[egress.host]]\nname = \"tunnel.example\"\n[[egress.host]]\nname = \"second.example\"\n\
    [[egress.host]]\nname = \"second.example\"\nports = [8080]\nbytes_up_max = 20000\n\
    [[egress.host]]\nname = \"plain.example\"\nports = [80]\n";

fn world(internet: &Internet, more_rules: &str, network: &str) -> World {
    let file = internet.dir.path().join("token");
    std::fs::write(&file, TOKEN).unwrap();
    let credential = format!("[[credential]]\nname = \"git\"\nkind = \"bearer\"\nfile = {file:?}\n");
    let mut world =
        internet.without_daemon(RUN_THE_PROMPT, &format!("{RULES}{more_rules}"), &credential, network);
    world.start();
    world
}

fn agent(world: &World, command: &str) -> Seen {
    let seen = run(world, command, &json!({ "policy": "reach" }));
    seen.succeeded();
    seen
}

/// Every status that came back is one of these; none at all is fine: the connection ended.
#[track_caller]
fn only(of: &Value, expected: &[u64]) {
    for (what, statuses) in of.as_object().unwrap() {
        let statuses = statuses.as_array().unwrap();
        let fine = statuses.iter().all(|s| s.as_u64().is_some_and(|s| expected.contains(&s)));
        assert!(fine && statuses.len() <= 1, "{what}: {statuses:?}");
    }
}

/// What came of a way that a tool of people tried.
#[track_caller]
fn tool<'a>(seen: &'a Seen, name: &str) -> &'a str {
    seen.get(&format!("tool {name}")).as_str().unwrap()
}

#[test]
fn nothing_but_what_a_rule_names_gets_out_in_whatever_words() {
    let internet = Internet::new();
    let world = world(&internet, "", "");
    let seen = agent(&world, "python3 egress.py refused");
    let refused = seen.get("refused");
    assert!(refused.as_object().unwrap().len() > 100);
    only(refused, &[400, 403, 404, 405, 414, 421, 431, 501]);
    assert_eq!(internet.seen(), Vec::<String>::new());
    // A name that carries data is not asked for anywhere: it is refused before anybody looks it up.
    let asked = internet.shared.asked.lock().unwrap().join("\n");
    assert!(!asked.contains("evil") && !asked.contains("exfil") && !asked.contains("other"), "{asked}");
    let denied = seen.events.iter().filter(|e| e["type"] == "egress" && e["decision"] == "deny");
    assert!(denied.clone().count() > 60 && denied.clone().all(|e| e["origin"] == "gateway"));
    // What it wrote as a host is one value of one record, without control characters.
    for event in denied {
        assert!(!event["host"].as_str().unwrap().chars().any(char::is_control), "{event}");
    }
    world.end();
}

#[test]
fn of_ambiguous_bytes_a_host_sees_one_request_or_none() {
    let internet = Internet::new();
    let world = world(&internet, "", "");
    let seen = agent(&world, "python3 egress.py smuggle");
    let tries = seen.get("smuggle").as_object().unwrap().len();
    assert!(tries >= 60, "{tries}");
    let got = internet.seen();
    assert!(!got.is_empty() && got.iter().all(|line| !line.contains("evil")), "{got:#?}");
    let once: BTreeSet<&String> = got.iter().collect();
    assert_eq!(once.len(), got.len(), "one try was two requests: {got:#?}");
    world.end();
}

#[test]
fn the_name_in_tls_is_the_one_of_connect_and_nothing_else_goes_through_a_tunnel() {
    let internet = Internet::new();
    let world = world(&internet, "", "");
    let seen = agent(&world, "python3 egress.py tls");
    for (what, outcome) in seen.get("tls").as_object().unwrap() {
        let (asked, named) = what.split_once(" as ").unwrap();
        if asked == named {
            assert_eq!(*outcome, 200, "{what}");
        } else {
            assert!(outcome.as_str().is_some_and(|error| error.contains("Error")), "{what}: {outcome}");
        }
    }
    for (what, answer) in seen.get("not_tls").as_object().unwrap() {
        let answer = answer.as_str().unwrap();
        assert!(answer.is_empty() || answer.len() == 14 && answer.starts_with("1503"), "{what}: {answer}");
    }
    assert_eq!(internet.seen().len(), 3, "one request a name that agreed: {:#?}", internet.seen());
    world.end();
}

#[test]
fn what_passes_is_canonical_has_our_credential_alone_and_is_counted() {
    let internet = Internet::new();
    let world = world(&internet, "", "");
    let seen = agent(&world, "python3 egress.py passing limits");
    let passing = seen.get("passing");
    assert_eq!(passing["credential"], json!([200]));
    assert_eq!((&passing["other case"], &passing["final dot"]), (&json!([200]), &json!([200])));
    assert_eq!(passing["case and Host"], json!([200]));
    assert_eq!(passing["redirect"], json!([302]), "a redirect is handed back, not followed");
    let got = internet.seen();
    assert!(got.contains(&"GET plain.example /pub/case".to_owned()), "the host of the URL: {got:#?}");
    let asked = internet.shared.asked.lock().unwrap().clone();
    let canonical = |line: &String| {
        let target = line.split(' ').nth(1).unwrap_or_default();
        target == target.to_lowercase() && !target.contains(".:") && !target.contains("169.254")
    };
    assert!(asked.iter().all(canonical), "{asked:#?}");
    let authorized = internet.shared.authorized.lock().unwrap().clone();
    assert!(authorized.contains(&vec![format!("Bearer {TOKEN}")]), "last and once: {authorized:?}");
    assert!(!authorized.concat().iter().any(|value| value.contains("forged")), "{authorized:?}");

    let (cut, again) = (&seen.get("limits")[0], &seen.get("limits")[1]);
    assert!(*cut == json!([]) || *cut == json!([403]), "{cut}");
    assert_eq!(*again, json!([403]), "no request after the last byte");
    // How much went where is in the journal and in the audit, by host.
    let id = seen.job["id"].as_str().unwrap();
    let audit = world.call("GET", &format!("/v1/jobs/{id}/audit?kind=egress"), "").body;
    let audit: Vec<Value> = audit.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let up = |host: &str| {
        let records = audit.iter().filter(|r| r["host"] == host);
        records.map(|r| r["bytes_up"].as_u64().unwrap()).sum::<u64>()
    };
    assert!(up("second.example") <= 20_000, "{audit:#?}");
    assert!(up("inspected.example") > 0 && up("plain.example") > 0, "{audit:#?}");
    assert!(audit.iter().any(|r| r["credential"] == "git" && r["host"] == "inspected.example"));
    world.end();
}

/// One of each class; a name of this machine's own table and an address of its own come to them.
const INNER: [&str; 30] = [
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.0.1",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.17.0.1",
    "192.0.0.1",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "203.0.113.1",
    "224.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "2001:0:1::",
    "2001:db8::1",
    "2002:7f00:1::",
    "fc00::1",
    "fe80::1",
    "ff02::1",
];

#[test]
fn no_inner_address_is_dialled_though_rules_name_it() {
    let internet = Internet::new();
    // Somebody who would answer, on every address of this machine.
    let trap = TcpListener::bind("0.0.0.0:0").unwrap();
    trap.set_nonblocking(true).unwrap();
    let port = trap.local_addr().unwrap().port();
    // Nothing is sent: this asks which address the machine would use.
    let probe = UdpSocket::bind("0.0.0.0:0").unwrap();
    let own = probe.connect("192.0.2.1:9").and_then(|()| probe.local_addr()).ok().map(|a| a.ip().to_string());
    let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_owned();
    let mut targets: Vec<String> = INNER.map(str::to_owned).to_vec();
    targets.extend(own.filter(|own| own != "0.0.0.0" && !INNER.contains(&own.as_str())));
    targets.push("localhost".into());
    if machine != "localhost" {
        targets.push(machine.clone());
    }
    let rules: String = targets
        .iter()
        .map(|t| if t.contains(':') { format!("[{t}]") } else { t.clone() })
        .map(|t| format!("[[egress.host]]\nname = {t:?}\nports = [443, {port}]\n"))
        .collect();
    // Every other name is allowed, too.
    let everything = format!(
        "[egress]\neverything = \"yes, any host\"\n[[egress.host]]\nname = \"*\"\nports = [443, {port}]\n{rules}"
    );
    let mut world = internet.without_daemon(
        RUN_THE_PROMPT,
        &everything,
        "",
        &format!("no_proxy = [{:?}]", machine.to_lowercase()),
    );
    world.start();
    let seen = agent(&world, &format!("python3 egress.py addresses {port} {}", targets.join(" ")));
    for (what, statuses) in seen.get("addresses").as_object().unwrap() {
        let expected: &[u64] = if what.starts_with("spelled") {
            &[400, 403]
        } else if what.contains("localhost") || what.contains(&machine) {
            // 502: asked with a final dot, most resolvers do not know them at all.
            &[403, 502]
        } else {
            &[403]
        };
        let got = statuses[0].as_u64().unwrap_or(0);
        assert!(expected.contains(&got), "{what}: {statuses}");
    }
    let refused = seen.events.iter().filter(|e| e["type"] == "egress" && e["rule"] == "egress.addresses");
    assert!(refused.count() >= 3 * INNER.len(), "refused for what they are, not for want of a rule");
    assert_eq!(internet.shared.asked.lock().unwrap().join("\n"), "", "the proxy was asked");
    assert_eq!(internet.seen(), Vec::<String>::new());
    assert_eq!(trap.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "somebody dialled");
    world.end();
}

#[test]
fn the_tools_of_people_get_no_further() {
    let internet = Internet::new();
    let world = world(&internet, "", "");
    let seen = agent(&world, "sh egress.sh");
    assert_eq!((tool(&seen, "curl good"), tool(&seen, "openssl good")), ("200 200", "1"), "the search works");
    for (name, expected) in [
        ("curl path", "200 400"),
        ("curl host", "200 421"),
        ("curl connect-to", "403 000"),
        ("curl resolve", "000 000"),
        ("curl socks", "000 000"),
        ("curl method", "200 403"),
        ("curl redirect", "000 403"),
        ("curl direct", "000 000"),
        ("curl dns", "000 000"),
        ("getent", ""),
        ("node direct", "ENETUNREACH"),
        ("node dns", "ECONNREFUSED"),
        ("node upgrade", "403"),
        ("openssl sni", "0"),
    ] {
        assert_eq!(tool(&seen, name), expected, "{name}");
    }
    let sni = tool(&seen, "node sni");
    assert!(sni.starts_with("ERR_SSL") || sni == "ECONNRESET", "{sni}");
    let expected = ["GET plain.example /redirect", "GET inspected.example /pub/good"];
    assert_eq!(internet.seen(), expected);
    let asked = internet.shared.asked.lock().unwrap().join("\n");
    assert!(!asked.contains("evil") && !asked.contains("169.254") && !asked.contains("1.1.1.1"), "{asked}");
    world.end();
}
