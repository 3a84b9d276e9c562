//! What tools in a cell find: their caches on the disk, the image's own words where they do no harm, Java's and git's
//! way out, and what the agent is told.

use super::super::options;
use super::super::provider::{ProviderKind, ProviderView};
use super::*;
use crate::job::JobSpec;
use crate::policy::{Defaults, Narrowing, Policy, narrow};

const TRUSTED: &str = include_str!("../../../policies/trusted.toml");

fn plan_of(egress: &str, env: &str, own: Option<&str>) -> Plan {
    let policy = Policy::parse("mine", &format!("{TRUSTED}\n{egress}")).expect("a good policy");
    let own = own.map(|text| Narrowing::parse("narrow", text).expect("a good file"));
    let spec = format!(r#"{{"prompt":"x","env":{env}}}"#);
    let spec = JobSpec::parse(spec.as_bytes()).expect("spec");
    let defaults = Defaults {
        model: "claude-sonnet-4-6".into(),
        image: "hotcell/cell".into(),
        provider: "anthropic".into(),
    };
    narrow(&spec, &policy, own.as_ref(), &defaults).expect("plan")
}

fn plan(egress: &str) -> Plan {
    plan_of(egress, "{}", None)
}

fn whole(plan: &Plan, image: &[(&str, &str)], commits: &[(&str, &str)]) -> BTreeMap<String, String> {
    let own = |list: &[(&str, &str)]| -> Vec<(String, String)> {
        list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let provider = ProviderView { kind: ProviderKind::Anthropic, region: None };
    let mut env = options::environment(plan, &own(image), &provider, "token");
    env.extend(own(commits));
    add_way_out(&mut env, plan, plan.cell_inspects_egress());
    env
}

#[test]
fn the_whole_environment_of_a_cell_with_package_sets() {
    let plan = plan("[egress]\nsets = ['npm', 'pypi', 'github-read']");
    let env = whole(&plan, &[("PATH", "/usr/local/go/bin:/usr/bin"), ("JAVA_HOME", "/opt/java")], &[]);
    let lines: Vec<String> = env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    insta::assert_snapshot!("environment", lines.join("\n"));
}

#[test]
fn every_place_of_a_tool_lies_below_home() {
    let env = whole(&plan(""), &[], &[]);
    for (name, _) in BELOW_HOME {
        assert!(env[name].starts_with("/home/agent/"), "{name}");
    }
    assert!(!env.contains_key("JAVA_TOOL_OPTIONS") && !env.contains_key("HTTPS_PROXY"));
    assert!(!env.contains_key("GIT_CONFIG_COUNT"));
}

#[test]
fn an_image_says_what_it_is_and_never_what_steers_the_cell() {
    let image = [
        ("PATH", "/usr/local/cargo/bin:/usr/bin"),
        ("RUSTUP_HOME", "/usr/local/rustup"),
        ("CARGO_HOME", "/usr/local/cargo"),
        ("GOROOT", "/usr/local/go"),
        ("LANG", "C"),
        ("HOME", "/root"),
        ("LD_PRELOAD", "/x.so"),
        ("ANTHROPIC_BASE_URL", "http://evil"),
        ("CLAUDE_CODE_SIMPLE", "1"),
        ("NODE_OPTIONS", "--require /x.js"),
        ("HTTPS_PROXY", "http://evil"),
        ("MAVEN_CONFIG", "/usr/share/m2"),
        ("GIT_CONFIG_COUNT", "1"),
        ("1BAD", "x"),
        ("BAD-NAME", "x"),
        ("NUL", "a\0b"),
    ];
    let env = whole(&plan(""), &image, &[]);
    assert_eq!(env["PATH"], "/usr/local/cargo/bin:/usr/bin:/home/agent/.local/bin");
    assert_eq!((env["RUSTUP_HOME"].as_str(), env["GOROOT"].as_str()), ("/usr/local/rustup", "/usr/local/go"));
    assert_eq!((env["CARGO_HOME"].as_str(), env["HOME"].as_str()), ("/home/agent/.cargo", "/home/agent"));
    assert_eq!(env["LANG"], "C");
    for (name, value) in &image[6..] {
        assert_ne!(env.get(*name).map(String::as_str), Some(*value), "{name}");
    }
    let many: Vec<(String, String)> = (0..500).map(|n| (format!("V{n}"), "x".repeat(n * 100))).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    let env = whole(&plan(""), &many, &[]);
    let brought: Vec<&String> = env.keys().filter(|name| name.starts_with('V')).collect();
    assert!(brought.len() <= IMAGE_VARIABLES_MAX && !env.contains_key("V499"), "{}", brought.len());
}

#[test]
fn the_jobs_own_words_win_and_the_sets_come_before_the_image() {
    let plan = plan_of(
        "[egress]\nsets = ['npm']",
        r#"{"CARGO_HOME":"/workspace/.cargo","npm_config_audit":"true","PATH":"/mine","JAVA_TOOL_OPTIONS":"-Xmx1g"}"#,
        None,
    );
    let env = whole(
        &plan,
        &[("npm_config_fund", "true"), ("PATH", "/image"), ("JAVA_TOOL_OPTIONS", "-Xss1m")],
        &[],
    );
    assert_eq!((env["CARGO_HOME"].as_str(), env["npm_config_audit"].as_str()), ("/workspace/.cargo", "true"));
    assert_eq!((env["npm_config_fund"].as_str(), env["PATH"].as_str()), ("false", "/mine"));
    assert!(env["JAVA_TOOL_OPTIONS"].starts_with("-Dhttp.proxyHost=127.0.0.1 -Dhttp.proxyPort=3128 "));
    assert!(env["JAVA_TOOL_OPTIONS"].ends_with(" -Xmx1g"), "{}", env["JAVA_TOOL_OPTIONS"]);
    // Nothing is looked into: no store of ours is there.
    let plain = self::plan("[[egress.host]]\nname = 'a.example'");
    let env = whole(&plain, &[], &[]);
    assert!(!env["JAVA_TOOL_OPTIONS"].contains("trustStore") && env.contains_key("HTTPS_PROXY"));
}

#[test]
fn a_cell_whose_setup_alone_reaches_something_has_the_way_out_too() {
    let env = whole(&plan("[setup]\negress = { sets = ['npm', 'github-read'] }"), &[], &[]);
    assert!(env.contains_key("HTTPS_PROXY") && env.contains_key("SSL_CERT_FILE"));
    assert!(env["JAVA_TOOL_OPTIONS"].contains("trustStore=/.hotcell/ca.p12"));
    assert_eq!(env["npm_config_audit"], "false");
    assert!(env.values().any(|value| value == "git@github.com:"));
}

#[test]
fn ssh_addresses_become_https_where_git_can_fetch_and_nowhere_else() {
    let plan = plan(
        "[egress]\nsets = ['npm', 'github-read']\n[[egress.host]]\nname = 'git.corp.example'\n[[egress.host]]\nname = '.suffix.example'\n\
         [[egress.host]]\nname = 'read.example'\ninspect = true\nmethods = ['GET']\n[[egress.host]]\nname = 'other.example'\nports = [8443]\n\
         [[egress.host]]\nname = '9.9.9.9'",
    );
    assert_eq!(git_hosts(&plan), ["git.corp.example", "github.com"]);
    let commits =
        [("GIT_CONFIG_COUNT", "1"), ("GIT_CONFIG_KEY_0", "core.hooksPath"), ("GIT_CONFIG_VALUE_0", "/h")];
    let env = whole(&plan, &[], &commits);
    assert_eq!(env["GIT_CONFIG_COUNT"], "7");
    let pair = |at: usize| {
        (env[&format!("GIT_CONFIG_KEY_{at}")].as_str(), env[&format!("GIT_CONFIG_VALUE_{at}")].as_str())
    };
    assert_eq!(pair(0), ("core.hooksPath", "/h"));
    assert_eq!(pair(1), ("url.https://git.corp.example/.insteadOf", "git@git.corp.example:"));
    assert_eq!(pair(5), ("url.https://github.com/.insteadOf", "ssh://git@github.com/"));
    assert_eq!(pair(6), ("url.https://github.com/.insteadOf", "git://github.com/"));
}

#[test]
fn tools_without_a_variable_find_a_file() {
    let names =
        |egress: &str| home_files(&plan(egress)).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(""), [".config/pnpm/rc"]);
    assert_eq!(names("[setup]\negress = { sets = ['maven'] }"), [".config/pnpm/rc", ".m2/settings.xml"]);
    let files = home_files(&plan("[egress]\nsets = ['maven']"));
    assert!(files[0].1 == "store-dir=/home/agent/.local/share/pnpm/store\n");
    assert!(files[1].1.matches("<host>127.0.0.1</host><port>3128</port>").count() == 2, "{}", files[1].1);
}

#[test]
fn maven_asks_in_plain_text_where_every_step_that_reaches_it_is_upgraded() {
    let asks = |policy: &str| {
        let files = home_files(&plan(policy));
        files.iter().any(|(_, text)| text.contains("<url>http://repo.maven.apache.org/maven2</url>"))
    };
    assert!(asks("[egress]\nsets = ['maven']") && asks("[setup]\negress = { sets = ['maven'] }"));
    assert!(
        !asks("[egress]\nsets = ['npm']")
            && !asks("[egress]\nsets = ['npm']\n[setup]\negress = { sets = ['maven'] }")
    );
    assert!(!asks("[[egress.host]]\nname = 'repo.maven.apache.org'\ninspect = true"));
}

#[test]
fn the_agent_is_told_what_is_open_and_what_is_not_there() {
    let closed = words(&plan(""));
    assert!(
        closed.contains("Nothing of the network can be reached") && closed.contains("no Docker"),
        "{closed}"
    );
    let open = "[egress]\nsets = ['npm', 'pypi']\n[[egress.host]]\nname = 'a.example'";
    insta::assert_snapshot!("words", words(&plan(open)));
    let narrowed = words(&plan_of(open, "{}", Some("[egress]\nsets = ['pypi']")));
    assert!(narrowed.contains("sets pypi.") && !narrowed.contains("npm"), "{narrowed}");
    let many: String = (0..100).map(|n| format!("[[egress.host]]\nname = 'h{n}.example'\n")).collect();
    assert!(words(&plan(&many)).contains("h23.example and 76 more"));
}
