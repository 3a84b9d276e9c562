//! A real project for each toolchain is built and its tests run in cells under `refactor`: by a job's setup, by its agent
//! and by what judges it. The second job of the same kind fetches nothing that is there already, and gets true bytes
//! whatever jobs before it tried (`poison.sh`). The same under gVisor, as far as that goes (see images/README.md).

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::packages;
use super::server::{Behaviour, Registries, Seen};
use crate::runtime;
use crate::world::{World, tool_results};

const POISON: &str = include_str!("poison.sh");
/// Projects that are built under gVisor beside the quickest, for which there is more time: names with blanks between.
const MORE: &str = "HOTCELL_TEST_GVISOR";
/// What a registry gives to who asks in an odd way.
const EVIL: &[u8] = b"evil!\n";
/// The host whose name `poison.sh` puts into a request to another one.
const OTHER: &str = "repo1.maven.org";

/// What differs between the ecosystems.
struct Kind {
    /// As in tests/packages/projects.toml.
    name: &'static str,
    /// An index of the registry, and a file that never changes: what `poison.sh` asks for.
    index: &'static str,
    file: &'static str,
    /// Where the package manager keeps things, as words of a shell.
    caches: &'static str,
    /// Lists the files that came from the registry as they are there. By the image's `find`: what the agent's shell calls
    /// by that name is the CLI's own, and does not run under every gVisor.
    held: &'static str,
    /// How many different ones there are at least.
    held_min: usize,
}

const NODE: Kind = Kind {
    name: "node",
    index: "https://registry.npmjs.org/qs-iconv",
    file: "https://registry.npmjs.org/qs-iconv/-/qs-iconv-1.0.4.tgz",
    caches: "$npm_config_cache/_cacache",
    held: "command find $npm_config_cache/_cacache/content-v2 -type f",
    held_min: 137,
};
const PYTHON: Kind = Kind {
    name: "python",
    index: "https://pypi.org/simple/flit-core/",
    file: "https://files.pythonhosted.org/packages/7a/ad/flit_core-3.9.0-py3-none-any.whl",
    caches: "$PIP_CACHE_DIR",
    // pip keeps them in a form of its own: it fetches them once more, from the gateway.
    held: "(.venv/bin/pip download -q --no-cache-dir --no-deps --require-hashes -d /tmp/held -r requirements/hashed.txt \
           && command find /tmp/held -type f)",
    held_min: 12,
};
const RUST: Kind = Kind {
    name: "rust",
    index: "https://index.crates.io/se/rd/serde",
    file: "https://static.crates.io/crates/serde/1.0.193/download",
    caches: "$CARGO_HOME/registry",
    held: "command find $CARGO_HOME/registry/cache -name '*.crate'",
    held_min: 11,
};
const GO: Kind = Kind {
    name: "go",
    index: "https://proxy.golang.org/gopkg.in/yaml.v3/@v/list",
    file: "https://proxy.golang.org/gopkg.in/yaml.v3/@v/v3.0.1.zip",
    caches: "$GOMODCACHE",
    held: "command find $GOMODCACHE/cache/download -name '*.zip' -o -name '*.mod'",
    held_min: 8,
};
const JAVA: Kind = Kind {
    name: "java",
    index: "https://repo.maven.apache.org/maven2/javax/enterprise/cdi-api/1.2/cdi-api-1.2.pom",
    file: "https://repo.maven.apache.org/maven2/javax/enterprise/cdi-api/1.2/cdi-api-1.2.jar",
    caches: "$HOME/.m2/repository",
    held: "command find $HOME/.m2/repository -name '*.jar' -o -name '*.pom'",
    held_min: 160,
};
const CC: Kind = Kind {
    name: "cc",
    index: "http://deb.debian.org/debian/dists/bookworm/Release",
    file: "http://deb.debian.org/debian/pool/main/z/zlib1g_1-1.2.13.dfsg-1_amd64.deb",
    // What is unpacked beside these is the job's own work, which its judging builds on.
    caches: "deps/*.deb deps/apt",
    held: "command find deps -name '*.deb'",
    held_min: 2,
};

/// A project, as tests/packages/projects.toml says.
struct Project {
    image: String,
    build: String,
    test: String,
    tests_say: String,
}

impl Project {
    fn of(name: &str) -> Self {
        let all: toml::Table = toml::from_str(include_str!("../../packages/projects.toml")).unwrap();
        let text = |key: &str| all[name][key].as_str().unwrap().to_owned();
        Self { image: text("image"), build: text("build"), test: text("test"), tests_say: text("tests_say") }
    }

    /// The tests, failing where they fail and where their output lacks what it must say.
    fn judged(&self) -> String {
        format!(
            "({}) >/tmp/said 2>&1; code=$?; tail -60 /tmp/said; [ $code = 0 ] && grep -qF '{}' /tmp/said",
            self.test, self.tests_say
        )
    }
}

/// A world, the registries that it reaches, and one project in it.
struct Yard {
    kind: &'static Kind,
    project: Project,
    registries: Registries,
    mirror: PathBuf,
    world: World,
    policy: &'static str,
    workspace: PathBuf,
}

impl Yard {
    fn new(kind: &'static Kind, policy: &'static str, more: &str) -> Self {
        let packages = packages();
        let project = Project::of(kind.name);
        let mirror = packages.join("mirror");
        let registries = Registries::new(&mirror);
        let config = format!("{more}{}[cache]\nfree_bytes_min = 0\n", registries.mirrors());
        let world = World::with(&script(kind, &project), &config);
        let workspace = world.path("repo");
        let from = packages.join("projects").join(kind.name);
        let copied =
            Command::new("cp").args(["-r", "--no-preserve=ownership"]).args([&from, &workspace]).status();
        assert!(copied.unwrap().success());
        Self { kind, project, registries, mirror, world, policy, workspace }
    }

    fn spec(&self, more: Value) -> Value {
        let mut spec = json!({
            "policy": self.policy, "image": self.project.image,
            "workspace": { "path": self.workspace, "mode": "copy" },
            "limits": { "disk_mib": 4096, "memory_mib": 4096, "pids": 1024, "wall_s": 900 },
        });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    }

    /// Builds in setup, tests by the agent, and is judged if that is wanted: what the agent's tools gave, what the registries were asked, and
    /// the job.
    fn build(&self, prompt: &str, judged: bool) -> (String, Vec<Seen>, Value) {
        let begun = Instant::now();
        let setup = json!({ "commands": [self.project.build], "timeout_s": 600 });
        let mut spec = self.spec(json!({ "prompt": prompt, "setup": setup }));
        if judged {
            spec["verify"] = json!({ "commands": [self.project.judged()], "timeout_s": 600 });
        }
        let (events, job) = self.world.job(&spec);
        let judging = events.iter().skip_while(|e| e["type"] != "state" || e["state"] != "verifying");
        let said = |e: &Value| e["text"].as_str().unwrap_or_default().to_owned() + "\n";
        let printed: String = judging.filter(|e| e["type"] == "output").map(said).collect();
        let all: String = events.iter().filter(|e| e["type"] == "output").map(said).collect();
        assert_eq!(job["outcome"], "succeeded", "{job:#}\n{all}\n{}", self.world.log());
        let results = tool_results(&events);
        let wanted = &self.project.tests_say;
        assert!(results.contains(wanted.as_str()), "{wanted} is not in what the agent ran:\n{results}");
        if judged {
            assert_eq!(job["totals"]["verified"], json!({ "passed": true, "repairs": 0 }));
            assert!(printed.contains(wanted.as_str()), "{wanted} is not in what judged:\n{printed}");
        }
        let seen = self.registries.take_seen();
        self.tell(prompt, &seen, &job, begun);
        (results, seen, job)
    }

    /// Says what a job took, past the harness, which keeps the output of tests that pass to itself.
    fn tell(&self, what: &str, seen: &[Seen], job: &Value, begun: Instant) {
        let egress = &job["totals"]["egress"];
        let line = format!(
            "{} ({}), {what}: {} bytes down and {} up over the network in {} requests, {} bytes from the package cache; {:.1} s\n",
            self.kind.name,
            self.policy,
            egress["bytes_down"],
            egress["bytes_up"],
            seen.len(),
            egress["cached_bytes"],
            begun.elapsed().as_secs_f64(),
        );
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }

    /// A job that has nothing to build yet, and asks in odd ways for what the next ones will need.
    fn ask_oddly(&self) {
        let command = json!({ "argv": ["sh", "-c", poison(self.kind)] });
        let begun = Instant::now();
        let (events, job) = self.world.job(&self.spec(json!({ "command": command })));
        let said = events.iter().filter(|e| e["type"] == "output").filter_map(|e| e["text"].as_str());
        let said: String = said.map(|line| format!("{line}\n")).collect();
        assert_eq!(job["outcome"], "succeeded", "{job:#}\n{said}");
        refused(&said);
        // It fools itself where the answer is for it alone.
        for way in ["own", "query", "accept"] {
            assert!(said.contains(&format!("{way}: 200 evil")), "{said}");
        }
        self.tell("odd questions", &self.registries.take_seen(), &job, begun);
    }
}

/// The agent runs the tests, says what it got from the registry, and tries to spoil it where it is told to.
fn script(kind: &Kind, project: &Project) -> String {
    let bash = |command: String| {
        let input = json!({ "command": command, "description": "the test's command", "timeout": 600_000 });
        let toml: toml::Value = serde_json::from_value(input).unwrap();
        format!("blocks = [{{ tool = \"Bash\", input = {toml} }}]")
    };
    let held = format!(
        "{} | xargs sha256sum | cut -c1-16 | sort -u | sed 's/^/held: /'; \
         for at in {} {}; do echo \"got: $(curl -sS --fail $at | sha256sum)\"; done",
        kind.held, kind.index, kind.file
    );
    let tests = bash(format!("({}) 2>&1 | tail -60", project.test));
    format!(
        "usage = {{ input = 10, output = 20 }}\n\
         [[reply]]\nwhen = {{ turn = 0, tools = true }}\n{tests}\n\
         [[reply]]\nwhen = {{ turn = 1, tools = true }}\n{}\n\
         [[reply]]\nwhen = {{ turn = 2, tools = true, prompt = \"poison\" }}\n{}\n\
         [default]\ntext = \"done\"\n",
        bash(held),
        bash(poison(kind))
    )
}

fn poison(kind: &Kind) -> String {
    let Kind { index, file, caches, .. } = kind;
    format!("INDEX={index} FILE={file} OTHER={OTHER} CACHES=\"{caches}\"\n{POISON}")
}

/// What would change a registry does not reach it.
#[track_caller]
fn refused(said: &str) {
    for way in ["put", "post", "delete"] {
        let start = format!("{way}: ");
        let answers: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix(start.as_str())).collect();
        assert!(
            answers.len() == 2 && answers.iter().all(|answer| answer.starts_with("403")),
            "{way}:\n{said}"
        );
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The hashes of all that the registries serve.
fn served(mirror: &Path) -> BTreeSet<String> {
    let (mut hashes, mut todo) = (BTreeSet::new(), vec![mirror.to_owned()]);
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => todo.push(path),
                false => drop(hashes.insert(sha256(&std::fs::read(&path).unwrap()))),
            }
        }
    }
    hashes
}

/// What the agent holds, and what it got, is what the registries serve.
#[track_caller]
fn true_bytes(results: &str, kind: &Kind, mirror: &Path) {
    let served = served(mirror);
    let held: Vec<&str> = results.lines().filter_map(|line| line.strip_prefix("held: ")).collect();
    assert!(held.len() >= kind.held_min, "only {} of {}:\n{results}", held.len(), kind.held_min);
    for short in held {
        assert!(
            short.len() == 16 && served.iter().any(|hash| hash.starts_with(short)),
            "{short}:\n{results}"
        );
    }
    let got: Vec<&str> = results.lines().filter_map(|line| line.strip_prefix("got: ")).collect();
    assert_eq!(got.len(), 2, "{results}");
    for line in got {
        assert!(served.contains(line.split(' ').next().unwrap()), "{line}:\n{results}");
    }
}

/// Bodies that came over the network: host and path.
fn fetched(seen: &[Seen]) -> BTreeSet<(String, String)> {
    let whole = seen.iter().filter(|seen| seen.method == "GET" && seen.status == 200);
    whole.map(|seen| (seen.host.clone(), seen.path.clone())).collect()
}

/// The same walls as `refactor`, around a kernel of the cell's own. False where this machine has no gVisor; that a job
/// then fails is looked at.
fn builds_under_gvisor(kind: &'static Kind) -> bool {
    let policies = tempfile::tempdir().unwrap();
    let text = format!("runtime = \"runsc\"\n{}", include_str!("../../../policies/refactor.toml"));
    std::fs::write(policies.path().join("gvisor.toml"), text).unwrap();
    let yard = Yard::new(kind, "gvisor", &format!("policy_dirs = [{:?}]\n", policies.path()));
    let there = runtime::here(&yard.world);
    if there {
        let (results, _, job) = yard.build("build", true);
        assert_eq!(job["runtime"], "runsc", "{job:#}");
        true_bytes(&results, kind, &yard.mirror);
    }
    yard.world.end();
    there
}

fn builds_and_tests(kind: &'static Kind) {
    let yard = Yard::new(kind, "refactor", "");
    let host = |url: &str| url.split('/').nth(2).unwrap().to_owned();
    for host in [host(kind.index), host(kind.file)] {
        yard.registries.set(&host, "/", Behaviour::Swayed(EVIL.to_vec()));
    }
    yard.ask_oddly();
    let (results, first, job) = yard.build("build, then poison", true);
    refused(&results);
    let spoilt = results.lines().find_map(|line| line.strip_prefix("spoilt: ")).unwrap_or("0");
    assert!(spoilt.parse::<usize>().unwrap() >= kind.held_min.min(4), "{results}");
    assert!(job["totals"]["egress"]["bytes_down"].as_u64() > Some(10_000), "{job:#}");

    // The next one: everything is there, and as it was published.
    let (results, second, job) = yard.build("build again", false);
    true_bytes(&results, kind, &yard.mirror);
    let again = fetched(&second);
    assert!(again.is_empty(), "fetched again, of {} files: {again:#?}", fetched(&first).len());
    let egress = &job["totals"]["egress"];
    assert!(egress["cached_bytes"].as_u64() > Some(10_000), "{egress}");
    yard.world.end();
}

#[test]
fn a_node_project_builds_and_no_job_poisons_the_next() {
    builds_and_tests(&NODE);
}

#[test]
fn a_python_project_builds_and_no_job_poisons_the_next() {
    builds_and_tests(&PYTHON);
}

#[test]
fn a_rust_project_builds_and_no_job_poisons_the_next() {
    builds_and_tests(&RUST);
}

#[test]
fn a_go_project_builds_and_no_job_poisons_the_next() {
    builds_and_tests(&GO);
}

#[test]
fn a_java_project_builds_and_no_job_poisons_the_next() {
    builds_and_tests(&JAVA);
}

#[test]
fn a_cc_project_builds_and_no_job_poisons_the_next() {
    builds_and_tests(&CC);
}

#[test]
fn projects_build_and_test_under_gvisor() {
    let more = std::env::var(MORE).unwrap_or_default();
    let more = more.split_whitespace().map(|name| {
        let found = [&NODE, &PYTHON, &RUST, &GO, &JAVA, &CC].into_iter().find(|kind| kind.name == name);
        found.unwrap_or_else(|| panic!("{MORE}: there is no project {name:?}"))
    });
    for kind in std::iter::once(&NODE).chain(more) {
        if !builds_under_gvisor(kind) {
            return;
        }
    }
}
