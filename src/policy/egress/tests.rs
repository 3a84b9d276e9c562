//! What rules say about hosts, and what no rule can say.

use proptest::prelude::*;

use super::check::HOST_ENTRIES_MAX;
use super::*;
use crate::policy::{Ask, Policy, decide};

fn policy(egress: &str) -> Result<Policy, String> {
    let text = format!("{}\n{egress}", include_str!("../../../policies/default.toml"));
    Policy::parse("test", &text).map_err(|e| e.to_string())
}

fn egress(text: &str) -> Egress {
    policy(text).expect("a good policy").egress
}

fn problem(egress: &str) -> String {
    policy(egress).expect_err(egress)
}

#[test]
fn a_host_that_is_always_refused_is_a_warning() {
    let told =
        |name: &str| !egress(&format!("[[egress.host]]\nname = {name:?}")).warnings("egress").is_empty();
    for name in ["localhost", "a.localhost", "10.0.0.1", "127.0.0.1", "169.254.169.254", "[::1]", "[fd00::1]"]
    {
        assert!(told(name), "{name}");
    }
    for name in ["example.com", ".example.com", "93.184.216.34", "localhost.example.com"] {
        assert!(!told(name), "{name}");
    }
}

fn layer(text: &str) -> Layer {
    Layer { name: "test".into(), egress: egress(text), ..Layer::default() }
}

fn connect(layers: &[Layer], host: &str, port: u16) -> Result<Terms, Denial> {
    decide_egress(layers, &EgressAsk { host: &Host::parse(host).expect(host), port, act: Act::Connect })
}

fn request(layers: &[Layer], method: &str, url: &str) -> Result<Terms, Denial> {
    let (host, port, path, secure) = parse_url(url).expect(url);
    let query = url.split_once('?').map(|(_, query)| query);
    let act = Act::Request { method, path: &path, query, secure };
    decide_egress(layers, &EgressAsk { host: &host, port, act })
}

#[test]
fn mistakes_are_named_with_their_key_and_place() {
    let rule =
        |more: &str| problem(&format!("[[egress.host]]\nname = \"ok.example\"\n[[egress.host]]\n{more}"));
    for (text, words) in [
        ("name = \"*\"", &["egress.host[1].name", "opens every host", "everything = \"yes, any host\""][..]),
        ("name = \".com\"", &["whole top-level domain", "everything"]),
        ("name = \"*.example.com\"", &["write \".example.com\""]),
        ("name = \"0.0.0.0/0\"", &["egress.host[1].name"]),
        ("name = \"\"", &["is empty"]),
        ("name = \".\"", &["egress.host[1].name"]),
        ("name = \"127.1\"", &["four decimal numbers"]),
        ("name = \".127.0.0.1\"", &["no names below"]),
        ("name = \"bücher.de\"", &["xn--"]),
        ("name = \"a.b\"\nports = []", &["egress.host[1].ports"]),
        ("name = \"a.b\"\nports = [0]", &["egress.host[1].ports"]),
        ("name = \"a.b\"\nmethods = [\"GET\"]", &["egress.host[1].methods", "inspect = true"]),
        ("name = \"a.b\"\npaths = [\"/\"]", &["egress.host[1].paths", "inspect = true"]),
        ("name = \"a.b\"\ncredential = \"x\"", &["egress.host[1].credential", "inspect = true"]),
        ("name = \"a.b\"\ninspect = true\nmethods = [\"get\"]", &["upper case"]),
        ("name = \"a.b\"\ninspect = true\nmethods = []", &["is empty"]),
        ("name = \"a.b\"\ninspect = true\npaths = [\"a\"]", &["must begin with '/'"]),
        ("name = \"a.b\"\ninspect = true\npaths = [\"/a/../b\"]", &["'..'"]),
        ("name = \"a.b\"\ninspect = true\ncredential = \"x y\"", &["name of a credential"]),
        ("name = \"a.b\"\nbytes_up_max = 0", &["egress.host[1].bytes_up_max"]),
        ("name = \"OK.example.\"", &["stands twice"]),
        ("name = \"a.b\"\nport = 443", &["port"]),
        ("name = \"a.b\"\nqueries = [\"\"]", &["egress.host[1].queries", "inspect = true"]),
        ("name = \"a.b\"\ninspect = true\nqueries = []", &["egress.host[1].queries", "is empty"]),
        ("name = \"a.b\"\ninspect = true\nqueries = [\"a b\"]", &["is no query that passes"]),
        ("name = \"a.b\"\ncache = true", &["egress.host[1].cache", "inspect = true"]),
        ("name = \"a.b\"\nupgrade = true", &["egress.host[1].upgrade", "inspect = true"]),
        ("name = \"a.b\"\ninspect = true\nports = [80]\nupgrade = true", &["upgrade", "port 443"]),
        ("name = \"a.b\"\nimmutable = [\"/**\"]", &["egress.host[1].immutable", "cache = true"]),
        ("name = \"a.b\"\nports = [80]\ncache = true\nimmutable = [\"x\"]", &["immutable", "begin with '/'"]),
    ] {
        let error = rule(text);
        assert!(words.iter().all(|word| error.contains(word)), "{text}: {error}");
        assert!(error.contains("test.toml"), "{error}");
    }
    assert!(problem("[egress]\neverything = true").contains("everything"));
    assert!(problem("[egress]\neverything = \"yes\"").contains("egress.everything: can only be"));
    let starred = "[egress]\neverything = \"yes, any host\"\n[[egress.host]]\nname = \"*\"\ninspect = true\n";
    assert!(policy(starred).is_ok());
    assert!(problem(&format!("{starred}credential = \"x\"")).contains("credential"));
}

#[test]
fn nothing_named_is_nothing_reached() {
    assert!(connect(&[], "a.b", 443).is_err());
    assert!(connect(&[layer("")], "a.b", 443).is_err());
    let layers = [layer("[[egress.host]]\nname = \"a.example\"\n")];
    assert_eq!(connect(&layers, "A.example.", 443).expect("allowed").account, "a.example");
    for (host, port) in
        [("b.example", 443), ("a.example", 80), ("x.a.example", 443), ("a.example.evil.com", 443)]
    {
        let denial = connect(&layers, host, port).expect_err(host);
        assert!(denial.reason.contains(host) && denial.reason.contains("policy test"), "{denial}");
    }
}

#[test]
fn a_dot_in_front_opens_names_below_and_the_most_exact_name_speaks() {
    let layers = [layer(
        "[egress]\neverything = \"yes, any host\"\n[[egress.host]]\nname = \"*\"\n[[egress.host]]\nname = \".a.example\"\n\
         inspect = true\n[[egress.host]]\nname = \"x.a.example\"\nconnections_max = 3\n",
    )];
    let account = |host: &str| connect(&layers, host, 443).map(|terms| (terms.account, terms.inspect));
    assert_eq!(account("x.a.example"), Ok(("x.a.example".into(), false)));
    assert_eq!(account("y.a.example"), Ok((".a.example".into(), true)));
    assert_eq!(account("a.example"), Ok((".a.example".into(), true)));
    assert_eq!(account("ba.example"), Ok(("*".into(), false)));
    assert!(account("9.9.9.9").is_err(), "an address is reached only where it is listed");
    assert!(account("[2001:4860::8888]").is_err());
}

#[test]
fn an_address_is_reached_only_as_itself() {
    let layers = [layer("[[egress.host]]\nname = \"9.9.9.9\"\n[[egress.host]]\nname = \"[2620:fe::fe]\"\n")];
    assert!(connect(&layers, "9.9.9.9", 443).is_ok() && connect(&layers, "[2620:FE:0::fe]", 443).is_ok());
    assert!(connect(&layers, "9.9.9.10", 443).is_err() && connect(&layers, "[::ffff:9.9.9.9]", 443).is_err());
}

#[test]
fn methods_and_paths_of_several_rules_add_up() {
    let layers = [layer(
        "[[egress.host]]\nname = \"git.example\"\ninspect = true\nmethods = [\"GET\"]\npaths = [\"/me/repo.git/**\"]\n\
         credential = \"git-token\"\n\
         [[egress.host]]\nname = \"git.example\"\ninspect = true\nmethods = [\"POST\"]\n\
         paths = [\"/me/repo.git/git-upload-pack\"]\n",
    )];
    let terms =
        request(&layers, "GET", "https://git.example/me/repo.git/info/refs?service=x").expect("allowed");
    assert_eq!(terms.credential.as_deref(), Some("git-token"));
    assert_eq!(terms.permit.rule(), "egress.host[0] git.example");
    let terms = request(&layers, "POST", "https://git.example/me/repo.git/git-upload-pack").expect("allowed");
    assert_eq!(terms.permit.rule(), "egress.host[1] git.example");
    for (method, path) in
        [("POST", "/me/repo.git/git-receive-pack"), ("get", "/me/repo.git/x"), ("GET", "/me/other")]
    {
        assert!(request(&layers, method, &format!("https://git.example{path}")).is_err(), "{method} {path}");
    }
}

#[test]
fn a_query_is_compared_as_a_whole() {
    let layers = [layer(
        "[[egress.host]]\nname = \"git.example\"\ninspect = true\nmethods = [\"GET\"]\npaths = [\"/**/info/refs\"]\n\
         queries = [\"service=git-upload-pack\"]\n",
    )];
    let allowed =
        |query: &str| request(&layers, "GET", &format!("https://git.example/a/b/info/refs{query}")).is_ok();
    assert!(allowed("?service=git-upload-pack"));
    for query in [
        "",
        "?",
        "?service=git-receive-pack",
        "?service=git-upload-pack&service=git-receive-pack",
        "?x=1&service=git-upload-pack",
        "?service=git%2Dupload-pack",
    ] {
        assert!(!allowed(query), "{query}");
    }
}

#[test]
fn only_the_policys_own_rule_has_answers_kept() {
    let kept =
        "[[egress.host]]\nname = \"a.example\"\ninspect = true\ncache = true\nimmutable = [\"/files/**\"]\n";
    let plain = "[[egress.host]]\nname = \"a.example\"\ninspect = true\n";
    let of = |first: &str, second: &str, path: &str| {
        let layers = [layer(first), layer(second)];
        let terms = request(&layers, "GET", &format!("https://a.example{path}")).expect("allowed");
        (terms.cache, terms.immutable)
    };
    assert_eq!(of(kept, plain, "/files/x"), (true, true));
    assert_eq!(of(kept, plain, "/index"), (true, false));
    assert_eq!(of(plain, kept, "/files/x"), (false, false));
    let terms = connect(&[layer(kept)], "a.example", 443).expect("allowed");
    assert_eq!((terms.cache, terms.immutable), (true, false));
}

#[test]
fn only_the_policys_own_word_takes_plain_text_for_tls_and_then_it_is_judged_as_such() {
    let raised =
        "[[egress.host]]\nname = \"a.example\"\ninspect = true\nupgrade = true\nmethods = [\"GET\"]\n";
    let usual = "[[egress.host]]\nname = \"a.example\"\ninspect = true\n";
    let ask = |layers: &[&str], method: &str, url: &str| {
        let layers: Vec<_> = layers.iter().map(|text| layer(text)).collect();
        decide_url(&layers, method, url).expect("a URL").is_ok()
    };
    let url = "http://a.example/x";
    assert!(ask(&[raised], "GET", url) && ask(&[raised, usual], "GET", url));
    assert!(!ask(&[raised], "POST", url), "the rule's own conditions hold");
    assert!(!ask(&[usual], "GET", url) && !ask(&[usual, raised], "GET", url));
    assert!(!ask(&[raised, ""], "GET", url), "every layer has to open it");
    assert!(
        !ask(&[raised], "GET", "http://a.example:8080/x") && !ask(&[raised], "GET", "http://b.example/x")
    );
}

#[test]
fn a_url_is_judged_as_the_gateway_does_it() {
    let layers = [layer(
        "[[egress.host]]\nname = \"i.example\"\ninspect = true\nmethods = [\"GET\"]\n\
         [[egress.host]]\nname = \"t.example\"\nports = [80, 443]\n",
    )];
    let allowed = |method: &str, url: &str| decide_url(&layers, method, url).map(|decided| decided.is_ok());
    assert_eq!(allowed("GET", "https://i.example/x"), Ok(true));
    assert_eq!(allowed("POST", "https://i.example/x"), Ok(false));
    assert_eq!(allowed("POST", "https://t.example/x"), Ok(true), "nobody looks into it");
    assert_eq!(allowed("POST", "http://t.example/x"), Ok(true));
    assert_eq!(allowed("GET", "http://i.example/x"), Ok(false));
    assert!(allowed("GET", "https://i.example/../x").is_err());
}

#[test]
fn a_credential_never_goes_over_plain_http() {
    let layers = [layer(
        "[[egress.host]]\nname = \"a.example\"\nports = [80, 443]\ninspect = true\ncredential = \"x\"\n\
         [[egress.host]]\nname = \"b.example\"\nports = [80, 443]\n",
    )];
    assert!(request(&layers, "GET", "https://a.example/").is_ok());
    assert!(request(&layers, "GET", "http://a.example/").expect_err("plain").reason.contains("TLS"));
    assert!(request(&layers, "GET", "http://b.example/").is_ok());
    assert!(request(&layers, "GET", "http://b.example:443/").is_err());
}

#[test]
fn every_layer_must_allow_and_the_lowest_limits_hold() {
    let above = layer(
        "[[egress.host]]\nname = \".example.com\"\ninspect = true\ncredential = \"x\"\nbytes_up_max = 5000\nconnections_max = 9\n",
    );
    let below =
        layer("[[egress.host]]\nname = \"a.example.com\"\nbytes_up_max = 9000\nconnections_max = 2\n");
    let layers = [above.clone(), below];
    let terms = connect(&layers, "a.example.com", 443).expect("both allow");
    assert_eq!((terms.bytes_up_max, terms.connections_max, terms.inspect), (5000, 2, true));
    assert_eq!(terms.credential, None, "a credential is added only where every layer names it");
    assert!(connect(&layers, "b.example.com", 443).is_err());
    assert!(connect(&[above, layer("")], "a.example.com", 443).is_err());
}

#[test]
fn the_general_question_has_the_same_answer() {
    let text = "[[egress.host]]\nname = \"a.example\"\n";
    let spec = crate::job::JobSpec::parse(br#"{"prompt":"x"}"#).expect("spec");
    let defaults = crate::policy::Defaults {
        model: "claude-sonnet-4-6".into(),
        image: "hotcell/cell".into(),
        provider: "anthropic".into(),
    };
    let plan = crate::policy::narrow(&spec, &policy(text).expect("policy"), None, &defaults).expect("plan");
    assert!(plan.has_egress() && !plan.inspects_egress());
    for name in ["a.example", "b.example"] {
        let host = Host::parse(name).expect("host");
        let ask = EgressAsk { host: &host, port: 443, act: Act::Connect };
        let general = decide(&plan, Ask::Egress(ask)).map(|permit| permit.rule().to_owned());
        let special = decide_egress(&plan.layers, &ask).map(|terms| terms.permit.rule().to_owned());
        assert_eq!(general, special);
    }
    // A stored plan reads back.
    let stored = serde_json::to_string(&plan).expect("json");
    assert_eq!(serde_json::from_str::<Plan>(&stored).expect("plan"), plan);
}

#[test]
fn urls_are_taken_apart_without_guessing() {
    let parts =
        |url: &str| parse_url(url).map(|(h, p, path, s)| (h.to_string(), p, path.as_str().to_owned(), s));
    assert_eq!(parts("https://A.b/x?y"), Ok(("a.b".into(), 443, "/x".into(), true)));
    assert_eq!(parts("http://a.b:8080"), Ok(("a.b".into(), 8080, "/".into(), false)));
    assert_eq!(parts("https://[::1]/"), Ok(("[::1]".into(), 443, "/".into(), true)));
    assert_eq!(parts("https://[::1]:8/"), Ok(("[::1]".into(), 8, "/".into(), true)));
    for bad in [
        "a.b",
        "ftp://a.b",
        "https://u:p@a.b/",
        "https://a.b:/",
        "https:///x",
        "https://a.b/../c",
        "https://a b/",
    ] {
        assert!(parse_url(bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn a_further_layer_never_allows_more(
        first in prop::collection::vec(("(a|b|\\.a\\.x|a\\.x|x\\.y)", any::<bool>(), 1024u64..4096), 0..4),
        second in prop::collection::vec(("(a|b|\\.a\\.x|a\\.x|x\\.y)", any::<bool>(), 1024u64..4096), 0..4),
        host in "(a|b|c|a\\.x|b\\.a\\.x|x\\.y)", port in prop::sample::select(vec![443u16, 80]),
    ) {
        let build = |rules: &[(String, bool, u64)]| {
            let hosts = rules.iter().map(|(name, inspect, up)| {
                let text = format!("name = {name:?}\ninspect = {inspect}\nbytes_up_max = {up}\nports = [443, 80]");
                toml::from_str(&text).expect("rule")
            });
            let mut layer = layer("");
            layer.egress.hosts = hosts.collect();
            layer
        };
        let layers = [build(&first), build(&second)];
        let both = connect(&layers, &host, port);
        let each: Vec<_> = layers.iter().map(|l| connect(std::slice::from_ref(l), &host, port)).collect();
        prop_assert_eq!(both.is_ok(), each.iter().all(Result::is_ok));
        if let Ok(both) = both {
            for one in each.into_iter().flatten() {
                prop_assert!(both.bytes_up_max <= one.bytes_up_max);
                prop_assert!(both.inspect || !one.inspect);
            }
        }
    }

    #[test]
    fn only_what_is_below_a_suffix_is_below_it(host in "[a-z.]{1,20}") {
        let layers = [layer("[[egress.host]]\nname = \".a.b\"\n")];
        if let Ok(host) = Host::parse(&host) {
            let text = host.to_string();
            let allowed = decide_egress(&layers, &EgressAsk { host: &host, port: 443, act: Act::Connect }).is_ok();
            prop_assert_eq!(allowed, text == "a.b" || text.ends_with(".a.b"));
        }
    }
}

#[test]
fn lists_of_one_host_are_bounded() {
    let with = |count: usize| {
        let paths: Vec<String> = (0..count).map(|n| format!("/{n}")).collect();
        let text = format!("[[egress.host]]\nname = 'a.example.com'\ninspect = true\npaths = {paths:?}");
        crate::policy::Narrowing::parse("n", &text).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(with(HOST_ENTRIES_MAX), Ok(()));
    let error = with(HOST_ENTRIES_MAX + 1).expect_err("too many");
    assert!(error.starts_with("n:4: egress.host[0].paths: has 257 entries; at most 256"), "{error}");
}
