//! The images of toolchains: one is built by the engine under a name of its own; those that `make images` left answer
//! as a cell asks them; and `image = "auto"` picks them for real jobs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hotcell::cell_image::{
    BaseSource, BuildRequest, EngineImages, ImageEngine, ImageError, Images, Standing, TOOLCHAINS, Workshop,
    toolchain,
};
use hotcell::engine::docker::Docker;
use hotcell::engine::{Engine, EngineError, Extend, find_address};
use hotcell::job::InstanceId;
use hotcell::npm::Npm;
use serde_json::{Value, json};

use super::FakeEngine;
use super::docker_cli::DockerCli;
use crate::world::{World, docker, one_command, tool_results};

const UID: u32 = 4242;

async fn engine() -> Arc<dyn Engine> {
    let address = find_address(None).expect("an engine: run `make engine`");
    Arc::new(Docker::connect(&address).await.unwrap())
}

/// The base that `make image` leaves: its name, and its id.
fn base() -> (String, String) {
    let list = docker(&[
        "images",
        "--filter",
        "label=hotcell.image=base",
        "--format",
        "{{.Repository}}:{{.Tag}} {{.ID}}",
    ]);
    let line = list.lines().find(|line| line.starts_with("hotcell/base:"));
    let (name, id) = line.and_then(|line| line.split_once(' ')).expect("the base that `make image` leaves");
    (name.to_owned(), docker(&["inspect", "--format", "{{.Id}}", id]).trim().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_toolchains_image_is_built_reused_listed_and_works_in_a_locked_cell() {
    let prefix = format!("hotcell-test-toolchain-{}", std::process::id());
    let (port, cli) = (EngineImages::new(engine().await, InstanceId::new(7)), DockerCli::connect().await);
    let state = tempfile::tempdir_in(crate::world::base_dir()).unwrap();
    let (name, id) = base();
    port.tag(&id, &name.replace("hotcell/", &format!("{prefix}/"))).await.unwrap();
    let images = Images::new(&port, state.path()).with_prefix(&prefix);
    let outcome = check_toolchain(&images, &cli, &prefix).await;
    cli.remove_images(&prefix).await;
    outcome.unwrap();
    let containers = docker(&["ps", "-aq", "--filter", &format!("name={prefix}")]);
    assert_eq!(containers.trim(), "", "containers are left");
    let mut left: Vec<String> = std::fs::read_dir(state.path().join("images"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["facts", "python.json"], "nothing else is left in the state directory");
}

async fn check_toolchain(images: &Images<'_>, cli: &DockerCli, prefix: &str) -> Result<(), String> {
    let text = |error: ImageError| error.to_string();
    let python = toolchain("python").unwrap();
    let npm = Npm::from_environment().unwrap();
    let request = BuildRequest { base: BaseSource::Debian, ..BuildRequest::default() };
    let mut workshop = Workshop::new();
    let steps = std::sync::Mutex::new(Vec::new());
    let on_progress = |progress: hotcell::cell_image::Progress<'_>| {
        if let hotcell::cell_image::Progress::Step(step) = progress {
            steps.lock().unwrap().push(step.to_owned());
        }
    };
    let missing = images.resolve_image(&format!("{prefix}/python")).await.map_err(text);
    let words = missing.expect_err("it was not built");
    assert_eq!(words, "there is no image hotcell/python yet; run `hotcell image build python`");

    let built =
        images.build_toolchain(python, &npm, &request, &mut workshop, &on_progress).await.map_err(text)?;
    assert!(built.tag.starts_with(&format!("{prefix}/python:")) && !built.reused, "{built:?}");
    assert!(built.versions["python3"].starts_with("3."), "{built:?}");
    assert!(built.versions.contains_key("gcc") && built.agent.is_none(), "{built:?}");
    assert!(steps.lock().unwrap().iter().any(|step| step == "fetching the packages of python"), "{steps:?}");
    let again =
        images.build_toolchain(python, &npm, &request, &mut workshop, &on_progress).await.map_err(text)?;
    assert!(again.reused && again.id == built.id && again.versions == built.versions, "{again:?}");
    workshop.close().map_err(text)?;
    let found = images.resolve_image(&format!("{prefix}/python:latest")).await.map_err(text)?;
    assert_eq!(found.id, built.id);
    let facts = images.suitability(&found).await.map_err(text)?;
    assert!(facts.git && facts.agent.is_none(), "{facts:?}");
    let listed = images.list(&"2.1.197".parse().unwrap()).await.map_err(text)?;
    let of = |name: &str| listed.iter().find(|listed| listed.name == name).unwrap().state;
    assert_eq!(
        (of("python"), of("rust"), of("cell")),
        (Standing::Built, Standing::NotBuilt, Standing::NotBuilt)
    );

    let script = "set -eu; cd; python3 -m venv v; v/bin/python -c 'print(6 * 7)'; pip --version; \
        printf 'int main(void) { return 0; }' >a.c; cc a.c -o a; ./a; ls -A /mnt /var/log; \
        ls /etc/apt/apt.conf.d /etc/apt/sources.list.d; test -d /.hotcell -a -f /.hotcell-init -a -d /workspace; \
        find / -xdev -perm /6000 -type f 2>/dev/null || true; echo end";
    let output = cli.run_locked(&built.id, script).await?;
    assert!(output.starts_with("42\npip ") && output.ends_with("debian.sources\nend"), "{output}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recipe_that_fails_says_what_it_said_and_leaves_neither_container_nor_image() {
    let engine = engine().await;
    let dir = tempfile::tempdir_in(crate::world::base_dir()).unwrap();
    let name = format!("hotcell-test-fails-{}", std::process::id());
    let (progress, _) = tokio::sync::mpsc::channel(10);
    let mut extend = Extend {
        image_id: base().1,
        container: name.clone(),
        dir: dir.path().to_owned(),
        command: ["/bin/sh", "-c", "echo begun; echo the disk is full >&2; exit 3"]
            .map(str::to_owned)
            .to_vec(),
        keep_as: Some(format!("{name}/never:latest")),
        changes: Vec::new(),
    };
    // What a killed build left under the name is no obstacle.
    docker(&["create", "--name", &name, &extend.image_id, "/bin/true"]);
    let error = engine.extend(&extend, &progress).await.unwrap_err();
    assert!(matches!(error, EngineError::ImageFailed { .. }), "{error}");
    let words = error.to_string();
    assert!(words.contains("exit code 3") && words.contains("the disk is full"), "{words}");
    assert_eq!(docker(&["ps", "-aq", "--filter", &format!("name={name}")]).trim(), "");
    assert_eq!(engine.image(&format!("{name}/never:latest")).await.unwrap(), None);
    // It has no network.
    extend.keep_as = None;
    extend.command = ["/bin/sh", "-c", "ls /sys/class/net >/mnt/net"].map(str::to_owned).to_vec();
    engine.extend(&extend, &progress).await.unwrap();
    assert_eq!(std::fs::read_to_string(dir.path().join("net")).unwrap(), "lo\n");
}

#[tokio::test]
async fn another_image_under_a_toolchains_name_is_not_taken_for_ours() {
    let state = tempfile::tempdir().unwrap();
    let engine = FakeEngine::default().with("hotcell/go:latest", 'd', &[("hotcell.image", "toolchain")]);
    let images = Images::new(&engine, state.path());
    assert!(matches!(
        images.resolve_image("hotcell/go").await,
        Err(ImageError::ToolchainNotBuilt { name: "go" })
    ));
    let labels = [("hotcell.image", "toolchain"), ("hotcell.toolchain", "go"), ("hotcell.recipe", "old")];
    let engine = FakeEngine::default().with("hotcell/go:latest", 'd', &labels);
    let images = Images::new(&engine, state.path());
    assert!(images.resolve_image("hotcell/go:latest").await.is_ok());
    let listed = images.list(&"2.1.197".parse().unwrap()).await.unwrap();
    let standing: BTreeMap<&str, Standing> =
        listed.iter().map(|listed| (listed.name.as_str(), listed.state)).collect();
    assert_eq!(standing.len(), 1 + TOOLCHAINS.len());
    assert_eq!((standing["go"], standing["java"]), (Standing::Outdated, Standing::NotBuilt));
}

/// What each image is asked, and words of its answer.
const ANSWERS: [(&str, &str, &[&str]); 6] = [
    (
        "cc",
        "gcc --version; g++ --version; cmake --version; ninja --version; meson --version; autoreconf --version; \
         pkg-config --version; make --version; mkdir b; cd b; printf 'project(x CXX)\nadd_executable(x x.cc)\n' \
         >CMakeLists.txt; printf '#include <vector>\nint main() { return 0; }' >x.cc; cmake -G Ninja -B o . \
         && ninja -C o && o/x && echo works",
        &["gcc (Debian", "g++ (Debian", "cmake version 3.", "autoreconf (GNU", "GNU Make", "\nworks"],
    ),
    (
        "go",
        "go version; printf 'module x.test/x\n' >go.mod; printf 'package main\nfunc main() { println(42) }' >x.go; \
         go build -o x . && ./x; gofmt -l .; go list -f '{{.Stale}} {{.Target}}' net/http",
        // The compiled standard library of the image is taken for fresh.
        &["go version go1.23", "\n42", "false /usr/lib/go-1.23/pkg/linux_"],
    ),
    (
        "java",
        "java -version; mvn -v; echo \"$JAVA_HOME\"; printf 'class A { public static void main(String[] a) { \
         System.out.println(42); } }' >A.java; javac A.java && java A; test -s /etc/ssl/certs/java/cacerts && echo trusts",
        &["openjdk version \"17", "Apache Maven 3.8", "/usr/lib/jvm/default-java", "\n42", "\ntrusts"],
    ),
    (
        "node",
        "node --version; npm --version; corepack --version; command -v yarn pnpm; g++ --version; \
         test -f \"$npm_config_nodedir/include/node/node_api.h\" && echo headers",
        &["v22.", "/usr/local/bin/yarn", "/usr/local/bin/pnpm", "g++ (Debian", "headers"],
    ),
    (
        "python",
        "python --version; pip --version; python -m venv v && v/bin/pip --version; python3-config --includes; \
         gcc --version",
        &["Python 3.", "pip 23", "/v/lib/python3", "-I/usr/include/python3", "gcc (Debian"],
    ),
    (
        "rust",
        "rustc --version; cargo clippy --version; cargo fmt --version; cargo init -q --vcs none --name x . \
         && cargo test -q 2>&1 | grep 'test result'",
        &["rustc 1.", "clippy 0.", "rustfmt 1.", "test result: ok"],
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn each_toolchain_works_for_a_foreign_uid_under_a_read_only_root() {
    let cli = DockerCli::connect().await;
    let names: Vec<&str> = TOOLCHAINS.iter().map(|toolchain| toolchain.name).collect();
    assert_eq!(ANSWERS.map(|(name, ..)| name).to_vec(), names, "each one is asked");
    for (name, script, words) in ANSWERS {
        let output = cli
            .run_locked(&format!("hotcell/{name}"), &format!("exec 2>&1; mkdir ~/w; cd ~/w; {script}"))
            .await;
        let output = output.unwrap_or_else(|e| panic!("hotcell/{name} (run `make images`): {e}"));
        for word in words {
            assert!(output.contains(word), "{name}: {word:?} is missing in: {output}");
        }
    }
}

const LOOK: &str = "rustc --version; go version; ls /home/agent >/dev/null && pwd";

fn owned(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::os::unix::fs::chown(path, Some(UID), Some(UID)).unwrap();
}

fn submitted(world: &World, spec: &Value) -> Value {
    let answer = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(UID)).unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);
    answer.json()
}

/// The job's picked image, the reason in its warnings and its events, and what its agent saw.
fn picked(world: &World, spec: &Value) -> (String, String, String) {
    let job = submitted(world, spec);
    let id = job["id"].as_str().unwrap();
    let why = job["warnings"].as_array().unwrap().iter().filter_map(Value::as_str);
    let why = why.filter(|text| text.starts_with("the image ")).collect::<Vec<_>>().join("\n");
    let events = world.follow(id);
    let view = world.show(id);
    assert_eq!(view["outcome"], "succeeded", "{view:#}\n{}", world.log());
    let told = |e: &&Value| e["type"] == "note" && e["text"] == why.as_str();
    assert!(events.iter().any(|event| told(&event)), "{why:?} is no event of {id}");
    (view["image"].as_str().unwrap().to_owned(), why, tool_results(&events))
}

/// A bare repository of a Go module.
fn go_repository(world: &World) -> PathBuf {
    let dir = world.workspace("go", UID);
    let line = "git init -q -b main work && cd work && printf 'module x.test/x\n' >go.mod && git add . && \
                git -c user.name=A -c user.email=a@example.org commit -qm first && git clone -q --bare . ../x.git";
    let mut command = std::process::Command::new("sh");
    std::os::unix::process::CommandExt::uid(&mut command, UID);
    std::os::unix::process::CommandExt::gid(&mut command, UID);
    let done = command.args(["-ec", line]).current_dir(&dir).env("HOME", "/nonexistent").output().unwrap();
    assert!(done.status.success(), "{done:?}");
    dir.join("x.git")
}

#[test]
fn auto_picks_the_image_of_the_toolchain_and_says_why() {
    let world = World::new(&one_command(LOOK));
    // A directory below the top of a repository of another kind: what the cell sees decides.
    let top = world.workspace("repo", UID);
    owned(&top.join("package.json"), "{}");
    let part = world.workspace("repo/part", UID);
    owned(&part.join("Cargo.toml"), "[package]\nname = \"x\"\n");
    owned(&part.join("Makefile"), "all:\n");
    let spec = |workspace: Value| json!({ "prompt": "x", "policy": "refactor", "image": "auto", "workspace": workspace });
    let (image, why, saw) = picked(&world, &spec(json!({ "path": part })));
    assert_eq!(image, "hotcell/rust");
    assert_eq!(
        why,
        "the image hotcell/rust is taken since there is Cargo.toml; there is also Makefile (hotcell/cc)"
    );
    assert!(saw.contains("rustc 1.") && !saw.contains("go version go1"), "{saw}");

    let git = json!({ "git": { "url": go_repository(&world), "ref": "main" } });
    let (image, why, saw) = picked(&world, &spec(git));
    assert_eq!(image, "hotcell/go");
    assert!(why.contains("since there is go.mod"), "{why}");
    assert!(saw.contains("go version go1.23"), "{saw}");

    // Nothing speaks for a toolchain.
    let plain = world.workspace("plain", UID);
    owned(&plain.join("notes.txt"), "x");
    let (image, why, _) = picked(&world, &spec(json!({ "path": plain })));
    assert_eq!((image.as_str(), why.contains("no file at the top")), ("hotcell/cell", true), "{why}");
    world.end();
}

#[test]
fn what_auto_picks_must_be_allowed_and_there() {
    let mut world = World::without_daemon(&one_command("true"), "");
    // A state directory whose record of one image is of one that is gone.
    let images = world.state_dir().join("images");
    let record = std::fs::read_to_string(images.join("rust.json")).expect("`make images` leaves it");
    let cell = std::fs::read(images.join("cell.json")).unwrap();
    std::fs::remove_file(&images).unwrap();
    std::fs::create_dir(&images).unwrap();
    let mut record: Value = serde_json::from_str(&record).unwrap();
    record["id"] = format!("sha256:{}", "0".repeat(64)).into();
    std::fs::write(images.join("rust.json"), record.to_string()).unwrap();
    std::fs::write(images.join("cell.json"), cell).unwrap();
    world.start();
    let dir = world.workspace("repo", UID);
    owned(&dir.join("Cargo.toml"), "[package]\n");
    let spec = |policy: &str| {
        json!({ "prompt": "x", "policy": policy, "image": "auto",
                "workspace": { "path": dir, "mode": "read-only" } })
    };
    let answer = world.curl("POST", "/v1/jobs", &spec("review").to_string(), &[], Some(UID)).unwrap();
    assert!(answer.status >= 400, "{}", answer.body);
    let error = &answer.json()["error"];
    assert_eq!(error["code"], "above_policy", "{error}");
    let words = error["message"].as_str().unwrap();
    assert_eq!(
        words,
        "image: hotcell/rust is not allowed by the policy review (hotcell/cell*) (image = \"auto\": the image \
         hotcell/rust is taken since there is Cargo.toml)"
    );
    let id = submitted(&world, &spec("refactor"))["id"].as_str().unwrap().to_owned();
    world.follow(&id);
    let view = world.show(&id);
    assert_eq!(view["reason"], "image_unavailable", "{view:#}");
    assert!(view.to_string().contains("`hotcell image build rust`"), "{view:#}");
    let (code, _, err) = world.run(&["image", "build", "cobol"]);
    assert!(code == 2 && err.contains("cc, go, java, node, python, rust"), "{code}: {err}");
    let (code, out, err) = world.run(&["image", "ls", "--json"]);
    let list: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {code} {err}"));
    let rust = list.as_array().unwrap().iter().find(|one| one["name"] == "rust").unwrap();
    assert_eq!((&rust["state"], &rust["image"]), (&json!("gone"), &json!("hotcell/rust")), "{list:#}");
    world.end();
}
