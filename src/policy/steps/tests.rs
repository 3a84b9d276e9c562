//! What steps may reach: their own table, else the agent's, never more than any layer, never a credential after the agent.

use proptest::prelude::*;

use super::*;
use crate::job::JobSpec;
use crate::policy::egress::decide_url;
use crate::policy::{Defaults, Narrowing, Policy, narrow};

const DEFAULT: &str = include_str!("../../../policies/default.toml");

fn plan(policy: &str, own: Option<&str>) -> Plan {
    let policy = Policy::parse("mine", &format!("{DEFAULT}\n{policy}")).expect("a good policy");
    let own = own.map(|text| Narrowing::parse("narrow", text).expect("a good file"));
    let spec = JobSpec::parse(br#"{"prompt":"x"}"#).expect("spec");
    let defaults = Defaults {
        model: "claude-sonnet-4-6".into(),
        image: "hotcell/cell".into(),
        provider: "anthropic".into(),
    };
    narrow(&spec, &policy, own.as_ref(), &defaults).expect("plan")
}

fn reaches(plan: &Plan, url: &str) -> bool {
    decide_url(&plan.layers, "GET", url).expect(url).is_ok()
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

const NPM: &str = "https://registry.npmjs.org/x";
const PYPI: &str = "https://pypi.org/simple/x/";
const OWN: &str = "https://own.example/";

#[test]
fn a_step_reaches_what_its_own_table_says_else_what_the_agent_does() {
    let plan = plan("[egress]\nsets = ['npm']\n[setup]\negress = { sets = ['pypi'] }", None);
    let (setup, verify) = (plan.for_setup(None), plan.for_verify(None));
    let of = |plan: &Plan| (reaches(plan, NPM), reaches(plan, PYPI));
    assert_eq!((of(&plan), of(&setup), of(&verify)), ((true, false), (false, true), (true, false)));
    let denial = decide_url(&setup.layers, "GET", NPM).expect("url").expect_err("closed");
    assert!(
        denial.reason.ends_with("`sets = [\"npm\"]` under [setup.egress] of the policy mine would open it"),
        "{denial}"
    );
    let terms = decide_url(&setup.layers, "GET", PYPI).expect("url").expect("open");
    assert_eq!(terms.permit.rule(), "setup.egress.sets pypi pypi.org");
    for plan in [setup, verify] {
        let stored = serde_json::to_string(&plan).expect("json");
        assert_eq!(serde_json::from_str::<Plan>(&stored).expect("plan"), plan);
    }
}

#[test]
fn a_cell_has_a_way_out_where_only_its_setup_has_one() {
    let closed = plan("[setup]\negress = { sets = ['npm'] }", None);
    assert!(!closed.has_egress() && closed.cell_has_egress() && closed.cell_inspects_egress());
    assert!(closed.for_setup(None).has_egress());
    let verify = plan("[verify]\negress = { sets = ['npm'] }", None);
    assert!(!verify.cell_has_egress() && verify.for_verify(None).has_egress());
    let shut = plan("[egress]\nsets = ['npm']\n[setup]\negress = {}", None);
    assert!(shut.cell_has_egress() && !shut.for_setup(None).has_egress());
}

#[test]
fn a_users_own_file_narrows_steps_too() {
    let policy = "[egress]\nsets = ['npm', 'pypi']\n[setup]\negress = { sets = ['npm', 'pypi', 'crates'] }";
    let of = |own: &str| {
        let plan = plan(policy, Some(own));
        let each = |plan: &Plan| [NPM, PYPI, "https://index.crates.io/x"].map(|url| reaches(plan, url));
        (each(&plan), each(&plan.for_setup(None)), each(&plan.for_verify(None)))
    };
    let (t, f) = (true, false);
    assert_eq!(of(""), ([t, t, f], [t, t, t], [t, t, f]));
    assert_eq!(of("[egress]\nsets = ['npm']"), ([t, f, f], [t, f, f], [t, f, f]));
    assert_eq!(of("[setup.egress]\nsets = ['crates']"), ([t, t, f], [f, f, t], [t, t, f]));
    assert_eq!(of("[verify.egress]\nsets = ['crates']"), ([t, t, f], [t, t, t], [f, f, f]));
    assert_eq!(of("[egress]\n[setup.egress]\nsets = ['npm']"), ([f, f, f], [t, f, f], [f, f, f]));
}

#[test]
fn a_job_may_name_less() {
    let plan = plan(
        "[egress]\nsets = ['npm', 'pypi']\n[[egress.host]]\nname = '.own.example'\nports = [80, 443]\n[[egress.host]]\nname = 'x.own.example'",
        None,
    );
    let with = |list: &[&str]| plan.for_setup(Some(&names(list)));
    let of = |plan: &Plan| {
        [NPM, PYPI, OWN.replace("own", "own.own").as_str(), "https://x.own.example/"]
            .map(|url| reaches(plan, url))
    };
    let (t, f) = (true, false);
    assert_eq!(of(&with(&["npm"])), [t, f, f, f]);
    assert_eq!(of(&with(&["pypi.org"])), [f, t, f, f]);
    assert_eq!(of(&with(&["own.own.example"])), [f, f, t, f]);
    assert_eq!(of(&with(&["x.own.example"])), [f, f, f, t]);
    assert_eq!(of(&with(&[])), [f, f, f, f]);
    assert!(reaches(&with(&["own.own.example"]), "http://own.own.example/"));
    assert!(reaches(&with(&["x.own.example"]), "http://x.own.example/"), "the suffix speaks on that port");
    let denial = decide_url(&with(&["npm"]).layers, "GET", PYPI).expect("url").expect_err("closed");
    assert!(denial.reason.contains("(the job, rule setup.egress)"), "{denial}");
    assert!(
        denial.reason.ends_with("`pypi` among the names of the job's own setup.egress would open it"),
        "{denial}"
    );
}

#[test]
fn a_name_that_opens_nothing_is_refused_with_what_is_open() {
    let policy = "[egress]\nsets = ['npm', 'pypi']\n[[egress.host]]\nname = '.own.example'";
    let wide = plan(policy, None);
    let check = |plan: &Plan, list: &[&str]| {
        check_step_egress(plan, StepKind::Setup, &names(list)).map_err(|error| error.to_string())
    };
    assert_eq!(check(&wide, &["npm", "a.own.example", "files.pythonhosted.org"]), Ok(()));
    let error = check(&wide, &["npm", "crates"]).expect_err("not open");
    assert_eq!(
        error,
        "setup.egress[1]: crates is not allowed by the policy mine (egress opens .own.example, npm, pypi)"
    );
    let close = plan(policy, Some("[egress]\nsets = ['npm']"));
    assert_eq!(check(&close, &["npm"]), Ok(()));
    let error = check(&close, &["pypi"]).expect_err("narrowed");
    assert!(error.contains("narrowed by your own file narrow to npm"), "{error}");
    // A set of the policy's that the user's file names host by host.
    let close = plan(policy, Some("[[egress.host]]\nname = 'registry.npmjs.org'"));
    assert_eq!(check(&close, &["npm"]), Ok(()));
    assert!(reaches(&close.for_setup(Some(&names(&["npm"]))), NPM));
    assert!(!reaches(&close.for_setup(Some(&names(&["npm"]))), "https://nodejs.org/dist/x"));
}

#[test]
fn verify_has_no_credential_and_no_wider_rule_in_its_stead() {
    let plan = plan(
        "[[egress.host]]\nname = '.corp.example'\n[[egress.host]]\nname = 'npm.corp.example'\ninspect = true\npaths = ['/a']\ncredential = 'corp'\n[[egress.host]]\nname = 'npm.corp.example'\ninspect = true\npaths = ['/b']",
        None,
    );
    let (setup, verify) = (plan.for_setup(None), plan.for_verify(None));
    let (a, b, other) =
        ("https://npm.corp.example/a", "https://npm.corp.example/b", "https://x.corp.example/");
    assert!([a, b, other].iter().all(|url| reaches(&setup, url)));
    assert!(!reaches(&verify, a) && reaches(&verify, b) && reaches(&verify, other));
    assert!(verify.layers.iter().all(|layer| layer.egress.credentials().next().is_none()));

    let alone = self::plan(
        "[[egress.host]]\nname = '.corp.example'\n[[egress.host]]\nname = 'npm.corp.example'\ninspect = true\ncredential = 'corp'",
        None,
    );
    let verify = alone.for_verify(None);
    let denial = decide_url(&verify.layers, "GET", a).expect("url").expect_err("closed");
    assert!(denial.reason.contains("is closed to this step"), "{denial}");
    let error =
        check_step_egress(&alone, StepKind::Verify, &names(&["npm.corp.example"])).expect_err("closed");
    assert_eq!(error.key, "verify.egress[0]");
    let only = self::plan("[[egress.host]]\nname = 'a.example'\ninspect = true\ncredential = 'corp'", None);
    assert!(only.has_egress() && !only.for_verify(None).has_egress());
}

/// A table of hosts and sets that stand in each other's way: exact names beside suffixes, ports, methods, credentials.
fn table(key: &'static str) -> impl Strategy<Value = String> {
    let host = (
        prop::sample::select(vec![".npmjs.org", "registry.npmjs.org", "pypi.org", ".org", "a.npmjs.org"]),
        prop::sample::select(vec!["[443]", "[80]", "[80, 443]"]),
        prop::option::of(prop::sample::select(vec!["['GET']", "['POST', 'GET']"])),
        prop::option::of(prop::sample::select(vec!["['/x']", "['/simple/**']"])),
        any::<bool>(),
    );
    let sets = prop::sample::subsequence(vec!["npm", "pypi", "maven"], 0..=3);
    (prop::option::of((sets, prop::collection::vec(host, 0..4))),).prop_map(move |(given,)| {
        let Some((sets, hosts)) = given else { return String::new() };
        let mut text = format!("[{key}]\neverything = 'yes, any host'\nsets = {sets:?}\n");
        for (name, ports, methods, paths, credential) in hosts {
            text += &format!("[[{key}.host]]\nname = '{name}'\ninspect = true\nports = {ports}\n");
            text += &methods.map(|list| format!("methods = {list}\n")).unwrap_or_default();
            text += &paths.map(|list| format!("paths = {list}\n")).unwrap_or_default();
            text += if credential && name != ".org" { "credential = 'c'\n" } else { "" };
        }
        text
    })
}

fn tables() -> impl Strategy<Value = String> {
    (table("egress"), table("setup.egress"), table("verify.egress"))
        .prop_map(|(a, b, c)| format!("{a}{b}{c}"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]
    #[test]
    fn neither_a_narrowing_nor_a_jobs_own_word_widens_a_step(
        policy in tables(),
        own in tables(),
        list in prop::sample::subsequence(vec!["npm", "pypi", "maven", "a.npmjs.org", "registry.npmjs.org", "b.org"], 0..=6),
        method in prop::sample::select(vec!["GET", "POST"]),
        url in prop::sample::select(vec![NPM, PYPI, "https://a.npmjs.org/x", "http://registry.npmjs.org/x", "https://b.org/y", "https://repo1.maven.org/maven2/x", OWN]),
    ) {
        let (wide, close) = (plan(&policy, None), plan(&policy, Some(&own)));
        let list = names(&list);
        let terms = |plan: &Plan| decide_url(&plan.layers, method, url).expect("url").ok();
        for (wide, close) in [
            (wide.clone(), close.clone()),
            (wide.for_setup(None), close.for_setup(None)),
            (wide.for_verify(None), close.for_verify(None)),
        ] {
            prop_assert!(terms(&wide).is_some() || terms(&close).is_none());
        }
        for plan in [wide, close] {
            let (setup, verify) = (plan.for_setup(None), plan.for_verify(None));
            prop_assert!(terms(&setup).is_some() || terms(&plan.for_setup(Some(&list))).is_none());
            prop_assert!(terms(&verify).is_some() || terms(&plan.for_verify(Some(&list))).is_none());
            // What a step after the agent reaches, the same table with its credentials reaches, too.
            prop_assert!(terms(&verify).is_none_or(|terms| terms.credential.is_none()));
            let mut own = plan.clone();
            for layer in &mut own.layers {
                layer.egress = layer.egress_for(StepKind::Verify).clone();
            }
            prop_assert!(terms(&own).is_some() || terms(&verify).is_none());
        }
    }
}
