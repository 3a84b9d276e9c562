//! What the built-in sets open and what they never do, and what a set of an administrator's own may say.

use super::*;
use crate::policy::egress::{Egress, decide_url};
use crate::policy::{Layer, Narrowing, Policy};

const DEFAULT: &str = include_str!("../../../policies/default.toml");

fn policy(egress: &str) -> Result<Policy, String> {
    Policy::parse("mine", &format!("{DEFAULT}\n{egress}")).map_err(|error| error.to_string())
}

fn layers(egress: &str) -> Vec<Layer> {
    let policy = policy(egress).expect("a good policy");
    let known_sets = policy.known_sets.clone();
    vec![Layer { name: policy.name, egress: policy.egress, known_sets, ..Layer::default() }]
}

fn allowed(layers: &[Layer], method: &str, url: &str) -> bool {
    decide_url(layers, method, url).expect(url).is_ok()
}

fn set(text: &str) -> EgressSet {
    toml::from_str(text).expect("a set")
}

#[test]
fn the_built_in_sets_are_exact_looked_into_and_bounded() {
    let all: BTreeMap<String, EgressSet> = toml::from_str(BUILT_IN).expect("sets.toml");
    let names: Vec<&str> = all.keys().map(String::as_str).collect();
    assert_eq!(names, ["crates", "debian", "github-read", "go", "maven", "npm", "pypi"]);
    for (name, set) in all {
        assert!(!set.description.is_empty(), "{name}");
        for rule in &set.hosts {
            let at = format!("{name}: {}", rule.name);
            assert!(rule.inspect && !rule.name.starts_with(['.', '*']) && rule.credential.is_none(), "{at}");
            let methods = rule.methods.as_ref().expect("methods").join(" ");
            assert!(methods == "GET HEAD" || name == "github-read", "{at}: {methods}");
        }
        Sets::default().with(&name, set).unwrap_or_else(|problem| panic!("{name}: {problem:?}"));
    }
}

#[test]
fn a_set_opens_what_its_package_manager_asks_for() {
    let everything = layers("[egress]\nsets = ['npm', 'pypi', 'crates', 'go', 'maven', 'debian']");
    for url in [
        "https://registry.npmjs.org/@babel%2fcore",
        "https://registry.npmjs.org/@babel/core/-/core-7.0.0.tgz",
        "https://pypi.org/simple/pytest/",
        "https://files.pythonhosted.org/packages/aa/bb/cc/x-1.0-py3-none-any.whl.metadata",
        "https://index.crates.io/se/rd/serde",
        "https://static.crates.io/crates/serde/1.0.0/download",
        "https://proxy.golang.org/github.com/!burnt!sushi/toml/@v/list",
        "https://proxy.golang.org/sumdb/sum.golang.org/lookup/rsc.io/quote@v1.5.2",
        "https://repo.maven.apache.org/maven2/junit/junit/maven-metadata.xml",
        "https://services.gradle.org/distributions/gradle-8.5-bin.zip",
        // Where the answer to that leads, by version.
        "https://downloads.gradle.org/distributions/gradle-8.5-bin.zip",
        "https://github.com/gradle/gradle-distributions/releases/download/v8.5.0/gradle-8.5-bin.zip",
        "https://release-assets.githubusercontent.com/github-production-release-asset/696192900/0b1c?sp=r&sig=x",
        "https://plugins.gradle.org/m2/com/example/thing/1.0/thing-1.0.pom",
        "http://deb.debian.org/debian/dists/bookworm/InRelease",
    ] {
        assert!(allowed(&everything, "GET", url), "{url}");
        assert!(!allowed(&everything, "POST", url), "{url}");
        assert!(!allowed(&everything, "PUT", url), "{url}");
    }
    assert!(!allowed(&everything, "GET", "https://pypi.org/legacy/"));
    assert!(!allowed(&everything, "GET", "https://github.com/a/b/info/refs?service=git-upload-pack"));
    assert!(!allowed(&everything, "GET", "https://x.registry.npmjs.org/a"));
    assert!(!allowed(&everything, "GET", "https://github.com/a/b/releases/download/v1/gradle-8.5-bin.zip"));
}

#[test]
fn what_changes_is_never_taken_for_immutable() {
    let layers = layers("[egress]\nsets = ['npm', 'pypi', 'crates', 'go', 'maven', 'debian']");
    let terms = |url: &str| decide_url(&layers, "GET", url).expect(url).expect("allowed");
    for url in [
        "https://registry.npmjs.org/left-pad/-/left-pad-1.3.0.tgz",
        "https://registry.npmjs.org/@babel/core/-/core-7.0.0.tgz",
        "https://files.pythonhosted.org/packages/aa/bb/cc/x-1.0.tar.gz",
        "https://static.crates.io/crates/serde/1.0.0/download",
        "https://proxy.golang.org/rsc.io/quote/@v/v1.5.2.zip",
        "https://repo.maven.apache.org/maven2/junit/junit/4.13/junit-4.13.pom.sha1",
        "http://deb.debian.org/debian/pool/main/h/hello/hello_2.10-3_amd64.deb",
    ] {
        assert!(terms(url).cache && terms(url).immutable, "{url}");
    }
    for url in [
        "https://registry.npmjs.org/left-pad",
        "https://pypi.org/simple/pytest/",
        "https://index.crates.io/config.json",
        "https://proxy.golang.org/rsc.io/quote/@v/list",
        "https://proxy.golang.org/rsc.io/quote/@v/master.info",
        "https://proxy.golang.org/rsc.io/quote/@latest",
        "https://repo.maven.apache.org/maven2/junit/junit/maven-metadata.xml.sha1",
        "https://sum.golang.org/latest",
        "http://deb.debian.org/debian/dists/bookworm/InRelease",
    ] {
        assert!(terms(url).cache && !terms(url).immutable, "{url}");
    }
}

#[test]
fn github_is_read_and_never_written() {
    let layers = layers("[egress]\nsets = ['github-read']");
    for (method, url) in [
        ("GET", "https://github.com/o/r/info/refs?service=git-upload-pack"),
        ("GET", "https://github.com/o/r.git/info/refs?service=git-upload-pack"),
        ("POST", "https://github.com/o/r.git/git-upload-pack"),
        ("GET", "https://github.com/o/r/archive/refs/heads/main.tar.gz"),
        ("GET", "https://github.com/o/r/releases/download/v1/x.tar.gz"),
        ("GET", "https://codeload.github.com/o/r/tar.gz/refs/tags/v1"),
        ("GET", "https://raw.githubusercontent.com/o/r/main/README.md"),
    ] {
        assert!(allowed(&layers, method, url), "{method} {url}");
    }
    for (method, url) in [
        ("GET", "https://github.com/o/r.git/info/refs?service=git-receive-pack"),
        ("GET", "https://github.com/o/r.git/info/refs?service=git-receive-pack&service=git-upload-pack"),
        ("GET", "https://github.com/o/r.git/info/refs?service=git-upload-pack&service=git-receive-pack"),
        ("GET", "https://github.com/o/r.git/info/refs"),
        ("POST", "https://github.com/o/r.git/info/refs?service=git-upload-pack"),
        ("POST", "https://github.com/o/r.git/git-receive-pack"),
        ("POST", "https://github.com/o/r.git/git%2Dreceive-pack"),
        ("POST", "https://github.com/o/r/x/git-upload-pack"),
        ("POST", "https://github.com/o/r.git/info/lfs/objects/batch"),
        ("GET", "https://github.com/login"),
        ("POST", "https://codeload.github.com/o/r/tar.gz/x"),
        ("GET", "https://api.github.com/repos/o/r"),
        ("GET", "https://gist.github.com/o/r/info/refs?service=git-upload-pack"),
    ] {
        assert!(!allowed(&layers, method, url), "{method} {url}");
    }
}

#[test]
fn a_refusal_says_what_would_open_the_host() {
    let reason = |layers: &[Layer], method: &str, url: &str| {
        decide_url(layers, method, url).expect(url).expect_err(url).reason
    };
    let none = layers("");
    assert_eq!(
        reason(&none, "GET", "https://registry.npmjs.org/x"),
        "registry.npmjs.org:443 is not among the hosts that may be reached (policy mine, rule egress): \
         `sets = [\"npm\"]` under [egress] of the policy mine would open it"
    );
    let cargo = reason(&none, "GET", "https://static.crates.io/x");
    assert!(
        cargo.ends_with("`sets = [\"crates\"]` under [egress] of the policy mine would open it"),
        "{cargo}"
    );
    let unknown = reason(&none, "GET", "https://x.example/");
    assert!(
        unknown.ends_with(": [[egress.host]] name = \"x.example\" of the policy mine would open it"),
        "{unknown}"
    );
    assert!(reason(&none, "GET", "http://x.example:8080/").contains("name = \"x.example\", ports = [8080]"));
    assert!(reason(&none, "GET", "http://deb.debian.org/x").contains("`sets = [\"debian\"]`"));
    for private in ["https://10.1.2.3/", "https://localhost/", "https://[::1]/"] {
        assert!(!reason(&none, "GET", private).contains("would open"), "{private}");
    }

    let npm = layers("[[egress.host]]\nname = 'own.example'");
    let own = reason(&npm, "GET", "http://own.example/");
    assert!(own.contains("`ports = [80]` in egress.host[0] own.example would open it"), "{own}");

    let npm = layers(
        "[egress]\nsets = ['npm']\n[[egress.host]]\nname = 'own.example'\ninspect = true\npaths = ['/a']",
    );
    let put = reason(&npm, "PUT", "https://registry.npmjs.org/mine");
    assert!(put.contains("PUT /mine is not allowed at registry.npmjs.org"), "{put}");
    assert!(put.contains("rule egress.sets npm registry.npmjs.org"), "{put}");
    assert!(put.ends_with("npm opens no more than it names: a [[egress.host]] of its own would"), "{put}");
    let path = reason(&npm, "GET", "https://own.example/b");
    assert!(path.contains("rule egress.host[0] own.example): `methods`, `paths` and `queries`"), "{path}");

    // In a user's own file, and where the policy has opened it already.
    let mut both = npm.clone();
    both.push(Layer { name: "narrow".into(), ..Layer::default() });
    let narrowed = reason(&both, "GET", "https://registry.npmjs.org/x");
    assert!(
        narrowed.ends_with("`sets = [\"npm\"]` under [egress] of your own file narrow would open it"),
        "{narrowed}"
    );
}

#[test]
fn an_unknown_set_is_an_error_with_its_place_and_the_sets_there_are() {
    let error = policy("[egress]\nsets = ['npm', 'nmp']").expect_err("unknown");
    assert!(
        error.contains("egress.sets[1]: there is no set \"nmp\"; there are: crates, debian, github-read"),
        "{error}"
    );
    assert!(error.starts_with("mine.toml:"), "{error}");
    let error = policy("[setup]\negress = { sets = ['nmp'] }").expect_err("unknown");
    assert!(error.contains(": setup.egress.sets[0]: there is no set"), "{error}");
    let error = policy("[egress]\nsets = ['npm', 'npm']").expect_err("twice");
    assert!(error.contains("egress.sets[1]: \"npm\" stands twice"), "{error}");
    let error = policy("[[egress.host]]\nname = 'a.example'\nset = 'npm'").expect_err("set");
    assert!(error.contains("egress.host[0].set: is not written in a file"), "{error}");
    let error = Narrowing::parse("n", "[verify.egress]\nsets = ['x']").expect_err("unknown").to_string();
    assert!(error.starts_with("n:2: verify.egress.sets[0]: there is no set"), "{error}");
    assert!(Narrowing::parse_with("n", "[egress]\nsets = ['x']", &Sets::of_another_daemon()).is_ok());
}

#[test]
fn an_administrators_set_takes_the_place_of_a_built_in_one() {
    let own = set(
        "[[host]]\nname = 'npm.corp.example'\ninspect = true\ncredential = 'corp'\n[env]\nnpm_config_registry = 'https://npm.corp.example/'",
    );
    let sets =
        Sets::built_in().with("npm", own.clone()).expect("a good set").with("corp", own).expect("a good set");
    let text = format!("{DEFAULT}\n[egress]\nsets = ['npm']\n[setup]\negress = {{ sets = ['pypi'] }}");
    let policy = Policy::parse_with("mine", &text, &sets).expect("policy");
    let names: Vec<&str> = policy.egress.hosts.iter().map(|rule| rule.name.as_str()).collect();
    assert_eq!(names, ["npm.corp.example"]);
    assert_eq!(policy.set_env["npm_config_registry"], "https://npm.corp.example/");
    assert_eq!(policy.set_env["PIP_DISABLE_PIP_VERSION_CHECK"], "1", "sets of steps count too");
    assert!(policy.known_sets["corp"] == ["npm.corp.example:443"]);
}

#[test]
fn a_set_that_cannot_be_meant_is_refused_with_its_key() {
    let host = "[[host]]\nname = 'a.example'\n";
    for (name, text, key) in [
        ("Big", host.to_owned(), ""),
        ("", host.to_owned(), ""),
        ("a", "host = []".to_owned(), "host"),
        ("a", format!("{host}methods = ['GET']"), "host[0].methods"),
        ("a", "[[host]]\nname = '*'".to_owned(), "host[0].name"),
        ("a", "[[host]]\nname = '.com'".to_owned(), "host[0].name"),
        ("a", format!("{host}set = 'npm'"), "host[0].set"),
        ("a", format!("{host}{host}"), "host[1].name"),
        ("a", format!("{host}[env]\nHTTPS_PROXY = 'x'"), "env.HTTPS_PROXY"),
        ("a", format!("{host}[env]\nLD_PRELOAD = 'x'"), "env.LD_PRELOAD"),
        ("a", format!("{host}[env]\n'A-B' = 'x'"), "env.A-B"),
    ] {
        let error = Sets::built_in().with(name, set(&text)).expect_err(&text);
        assert_eq!(error.0, key, "{text}");
    }
}

#[test]
fn rules_of_a_set_stand_behind_the_files_own_and_add_up() {
    let layers = layers(
        "[egress]\nsets = ['npm']\n[[egress.host]]\nname = 'registry.npmjs.org'\ninspect = true\nmethods = ['GET']\npaths = ['/@corp/**']\ncredential = 'corp'",
    );
    let terms = |url: &str| decide_url(&layers, "GET", url).expect(url).expect("allowed");
    assert_eq!(terms("https://registry.npmjs.org/@corp/x").credential.as_deref(), Some("corp"));
    let public = terms("https://registry.npmjs.org/left-pad");
    assert_eq!((public.credential, public.cache), (None, true));
    assert_eq!(public.permit.rule(), "egress.sets npm registry.npmjs.org");
    let egress: Egress = layers[0].egress.clone();
    assert_eq!(egress.hosts[0].set, None);
    assert!(egress.hosts[1..].iter().all(|rule| rule.set.as_deref() == Some("npm")));
}
