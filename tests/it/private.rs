//! Private registries and git hosts that want a token, with the real package managers in real cells: the token is added
//! outside and is nowhere inside, and who has none is told what is missing.

use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::packages::packages;
use crate::packages::server::{Behaviour, Registries};
use crate::world::{World, one_command, tool_results};

const NPM: &str = "npm-private-4f0c2a91d7e8";
const PYPI: &str = "pypi-private-93ab17c05e2f";
const GIT: &str = "git-private-c81e5520fa6b";

/// What the job does: each package manager in its own words.
const INSTALLS: &str = "set -e; npm install --no-audit --no-fund --registry https://npm.corp.example/ balanced-match@1.0.2\n\
    python3 -m venv venv\n\
    venv/bin/pip install -q --disable-pip-version-check --index-url https://pypi.corp.example/simple/ iniconfig==2.0.0\n\
    git clone -q https://git.corp.example/lib.git over-https\n\
    git clone -q git@git.corp.example:lib.git over-ssh\n\
    ls node_modules/balanced-match/index.js venv/lib/python3*/site-packages/iniconfig/__init__.py over-*/lib.txt";

fn basic(user: &str, token: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{token}")))
}

fn git(dir: &Path, args: &[&str]) {
    let mut command = Command::new("git");
    command.args(["-c", "user.name=Test", "-c", "user.email=test@hotcell.invalid"]).args(args);
    let output = command.current_dir(dir).env("GIT_CONFIG_GLOBAL", "/dev/null").output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Three servers that want their tokens, and policies: `team` adds them, `outside` does not.
struct Corporation {
    registries: Registries,
    dir: tempfile::TempDir,
}

impl Corporation {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registries = Registries::new(&packages().join("mirror"));
        registries.add_files("npm.corp.example", &["registry.npmjs.org"]);
        registries.add_files("pypi.corp.example", &["pypi.org", "files.pythonhosted.org"]);
        let (source, bare) = (dir.path().join("source"), dir.path().join("bare"));
        std::fs::create_dir(&source).unwrap();
        std::fs::write(source.join("lib.txt"), "a library\n").unwrap();
        git(&source, &["init", "-q", "-b", "main"]);
        git(&source, &["add", "lib.txt"]);
        git(&source, &["commit", "-q", "-m", "first"]);
        std::fs::create_dir(&bare).unwrap();
        git(&bare, &["clone", "-q", "--bare", source.to_str().unwrap(), "lib.git"]);
        registries.add_git("git.corp.example", &bare);
        for (host, wants) in [
            ("npm.corp.example", format!("Bearer {NPM}")),
            ("pypi.corp.example", basic("ci", PYPI)),
            ("git.corp.example", basic("x-access-token", GIT)),
        ] {
            registries.set(host, "/", Behaviour::Wants(wants));
        }
        Self { registries, dir }
    }

    fn world(&self, script: &str) -> World {
        let policies = self.dir.path().join("policies");
        std::fs::create_dir(&policies).unwrap();
        let refactor = include_str!("../../policies/refactor.toml");
        for (name, adds) in [("team", true), ("outside", false)] {
            let rules: String = ["npm", "pypi", "git"]
                .iter()
                .map(|host| {
                    let credential = if adds { format!("credential = {host:?}\n") } else { String::new() };
                    let cache = match *host {
                        "git" => "",
                        _ => "methods = [\"GET\", \"HEAD\"]\ncache = true\nimmutable = [\"/**/*.tgz\", \"/**/*.whl\"]\n",
                    };
                    format!("[[egress.host]]\nname = \"{host}.corp.example\"\ninspect = true\n{cache}{credential}")
                })
                .collect();
            std::fs::write(policies.join(format!("{name}.toml")), format!("{refactor}\n{rules}")).unwrap();
        }
        let mut tables = String::new();
        for (name, kind, token) in [
            ("npm", "kind = \"bearer\"", NPM),
            ("pypi", "kind = \"basic\"\nusername = \"ci\"", PYPI),
            ("git", "kind = \"basic\"\nusername = \"x-access-token\"", GIT),
        ] {
            let file = self.dir.path().join(format!("{name}.token"));
            std::fs::write(&file, token).unwrap();
            tables.push_str(&format!("[[credential]]\nname = {name:?}\n{kind}\nfile = {file:?}\n"));
        }
        let more = format!("policy_dirs = [{policies:?}]\n{tables}{}", self.registries.mirrors());
        World::with(script, &more)
    }
}

fn spec(world: &World, policy: &str, more: Value) -> Value {
    let workspace = world.path("repo");
    if !workspace.exists() {
        world.workspace("repo", 0);
        std::fs::write(workspace.join("search.py"), include_str!("search.py")).unwrap();
    }
    let mut spec = json!({
        "prompt": "install it", "policy": policy, "image": "hotcell/python",
        "workspace": { "path": workspace, "mode": "copy" }, "limits": { "disk_mib": 512 },
    });
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    spec
}

#[test]
fn a_job_installs_from_private_registries_and_their_tokens_are_nowhere_in_its_cell() {
    let corporation = Corporation::new();
    let secrets: Vec<String> = [NPM.to_owned(), PYPI.to_owned(), GIT.to_owned()]
        .into_iter()
        .chain(
            [basic("ci", PYPI), basic("x-access-token", GIT)]
                .map(|header| header["Basic ".len()..].to_owned()),
        )
        .collect();
    let backwards: Vec<String> = secrets.iter().map(|secret| secret.chars().rev().collect()).collect();
    let world = corporation.world(&one_command(&format!(
        "({INSTALLS}) 2>&1; git config -l; python3 search.py {}",
        backwards.join(" ")
    )));
    let (events, job) = world.job(&spec(&world, "team", json!({})));
    assert_eq!(job["outcome"], "succeeded", "{job:#}");
    let results = tool_results(&events);
    for file in [
        "node_modules/balanced-match/index.js",
        "iniconfig/__init__.py",
        "over-https/lib.txt",
        "over-ssh/lib.txt",
    ] {
        assert!(results.contains(file), "{file} is missing:\n{results}");
    }
    let looked =
        results.split("looked at ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u32>().ok());
    assert!(looked > Some(10_000) && results.contains("files, found []"), "{results}");
    // Nor in what is told of it, or kept.
    let id = job["id"].as_str().unwrap();
    let told = [
        format!("{events:?}"),
        world.run(&["show", id]).1,
        world.run(&["diff", id]).1,
        world.run(&["audit", id]).1,
        world.log(),
    ];
    for secret in &secrets {
        assert!(told.iter().all(|text| !text.contains(secret.as_str())), "{secret}");
    }
    assert!(told[3].contains("npm.corp.example") && told[3].contains("credential"), "{}", told[3]);

    // All of it was asked for with the token; the next job has the packages from the cache.
    let files = |seen: &[crate::packages::server::Seen]| {
        let packages = seen.iter().filter(|s| s.path.ends_with(".tgz") || s.path.ends_with(".whl"));
        packages.map(|s| s.path.clone()).collect::<Vec<_>>()
    };
    let seen = corporation.registries.take_seen();
    assert!(seen.iter().all(|s| s.authorization.is_some() && s.status < 400), "{seen:#?}");
    assert_eq!(files(&seen).len(), 2, "{seen:#?}");
    let (_, job) = world.job(&spec(&world, "team", json!({})));
    assert_eq!(job["outcome"], "succeeded", "{job:#}");
    assert!(job["totals"]["egress"]["cached_bytes"].as_u64() > Some(0), "{job:#}");
    assert_eq!(files(&corporation.registries.take_seen()), Vec::<String>::new());
    world.end();
}

/// The lines of a failure that are ours.
fn ours(job: &Value) -> Vec<&str> {
    let message = job["message"].as_str().unwrap_or_else(|| panic!("no message: {job:#}"));
    message.lines().filter(|line| line.starts_with("hotcell: ")).collect()
}

#[test]
fn who_has_no_token_gets_a_401_and_is_told_which_rule_could_add_one() {
    let corporation = Corporation::new();
    let world = corporation.world(&one_command("true"));
    let failing = |policy: &str, stage: &str, command: &str| {
        let (_, job) = world.job(&spec(&world, policy, json!({ stage: { "commands": [command] } })));
        assert_eq!(job["outcome"], "failed", "{job:#}");
        assert_eq!((&job["phase"], &job["blame"]), (&json!(stage), &json!("job")), "{job:#}");
        job
    };
    let npm = "npm install --no-audit --no-fund --registry https://npm.corp.example/ balanced-match";
    let job = failing("outside", "setup", npm);
    assert_eq!(job["reason"], "setup_failed");
    let [line] = ours(&job)[..] else { panic!("{job:#}") };
    assert!(
        line.contains("npm.corp.example answers 401") && line.contains("credential = \"NAME\""),
        "{line}"
    );
    assert!(job["message"].as_str().unwrap().contains("E401"), "npm's own words: {job:#}");

    // A token that the host does not know.
    corporation.registries.set("git.corp.example", "/", Behaviour::Wants("Bearer another".into()));
    let job = failing("team", "setup", "git clone -q https://git.corp.example/lib.git");
    let [line] = ours(&job)[..] else { panic!("{job:#}") };
    assert!(
        line.contains("git.corp.example answers 401") && line.contains("adds the credential git"),
        "{line}"
    );

    // What judges has no credentials at all.
    let job = failing(
        "team",
        "verify",
        "venv/bin/pip --version; curl -sSf https://pypi.corp.example/simple/iniconfig/",
    );
    assert_eq!(job["reason"], "verify_failed");
    let [line] = ours(&job)[..] else { panic!("{job:#}") };
    assert!(line.contains("pypi.corp.example is closed to this step"), "{line}");
    let used =
        corporation.registries.take_seen().into_iter().filter(|s| s.host == "pypi.corp.example").count();
    assert_eq!(used, 0);
    world.end();
}
