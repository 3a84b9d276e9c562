//! Jobs on repositories that are fetched for them, with the real CLI in a real cell and a second uid: what the agent
//! did comes back to a clone of the user's own, nothing of the repository runs on the host, and nothing is left.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::world::{World, one_command, tool_results};

const ANN: u32 = 4242;
const BOB: u32 = 4343;
const LOOK: &str = "git log --format=%s; git branch --show-current; git remote get-url origin; git status --short; \
    cat greeting.txt; echo more >>greeting.txt; echo new >new.txt; ls -A .git/hooks 2>/dev/null; cat .git/config";

/// Runs a shell line in `dir` as Ann.
#[track_caller]
fn sh(dir: &Path, line: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-ec", line]).current_dir(dir).uid(ANN).gid(ANN).env("HOME", "/nonexistent");
    for (name, value) in [("GIT_AUTHOR_NAME", "Ann"), ("GIT_AUTHOR_EMAIL", "ann@example.org")] {
        command.env(name, value).env(name.replace("AUTHOR", "COMMITTER"), value);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A bare repository of Ann's that runs `touch marker` wherever one of its own hooks or settings is obeyed.
fn poisoned(world: &World) -> (PathBuf, PathBuf) {
    let dir = world.workspace("ann", ANN);
    sh(
        &dir,
        "git init -q -b main work && cd work && echo hello >greeting.txt && git add . && git commit -qm first && \
         git checkout -qb feature && echo x >x && git add x && git commit -qm second && git checkout -q main && \
         printf '* filter=evil\\n' >.gitattributes && git add . && git commit -qm attributes && \
         git clone -q --bare . ../app.git",
    );
    let (bare, marker) = (dir.join("app.git"), dir.join("marker"));
    let run = format!("touch {}", marker.display());
    for hook in ["post-checkout", "post-update", "reference-transaction", "fsmonitor-watchman"] {
        let path = bare.join("hooks").join(hook);
        std::fs::create_dir_all(bare.join("hooks")).unwrap();
        std::fs::write(&path, format!("#!/bin/sh\n{run}\ncat\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let config = format!(
        "[core]\n\trepositoryformatversion = 0\n\tbare = true\n\tfsmonitor = {run}\n\tsshCommand = {run}\n\
         [uploadpack]\n\tpackObjectsHook = {run};\n[filter \"evil\"]\n\tsmudge = {run}\n\tclean = {run}\n[diff]\n\texternal = {run}\n"
    );
    std::fs::write(bare.join("config"), config).unwrap();
    (dir, marker)
}

fn submit(world: &World, spec: &Value, key: &str, uid: u32) -> (u16, Value) {
    let header = format!("idempotency-key: {key}");
    let answer = world.curl("POST", "/v1/jobs", &spec.to_string(), &["-H", &header], Some(uid)).unwrap();
    (answer.status, answer.json())
}

fn as_ann(world: &World, method: &str, path: &str, body: &Value) -> (u16, String) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let answer = world.curl(method, path, &body, &[], Some(ANN)).unwrap();
    (answer.status, answer.body)
}

/// What was fetched for jobs and is still there.
fn trees(world: &World, uid: u32) -> usize {
    let dir = world.path("state-sources").join(uid.to_string()).join("trees");
    std::fs::read_dir(dir).map_or(0, Iterator::count)
}

#[test]
fn a_job_works_on_a_repository_that_is_fetched_and_its_changes_come_to_a_clone() {
    let world = World::new(&one_command(LOOK));
    let (dir, marker) = poisoned(&world);
    let url = dir.join("app.git").display().to_string();
    let spec =
        json!({ "prompt": "x", "policy": "trusted", "workspace": { "git": { "url": url, "ref": "main" } } });
    let (status, job) = submit(&world, &spec, "once", ANN);
    assert_eq!(status, 201, "{job}");
    assert_eq!(job["workspace_mode"], "copy");
    let commit = sh(&dir.join("app.git"), "git rev-parse main");
    let fetched = json!({ "url": url, "ref": "main", "commit": commit, "branch": "main" });
    assert_eq!(job["source"], fetched);
    assert!(job["warnings"].to_string().contains("fetched in"), "{job}");
    let (again, same) = submit(&world, &spec, "once", ANN);
    assert_eq!((again, &same["id"], trees(&world, ANN)), (200, &job["id"], 1));
    let id = job["id"].as_str().unwrap();
    let events = world.follow(id);
    let view = world.show(id);
    assert_eq!(view["outcome"], "succeeded", "{view:#}\n{}", world.log());
    let text = tool_results(&events);
    for words in ["attributes\nfirst", "\nmain\n", &*url, "hello"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(!text.contains("evil") && !text.contains(" M "), "{text}");
    let tree = PathBuf::from(job["workspace"].as_str().unwrap());
    assert_eq!(std::fs::read_to_string(tree.join("greeting.txt")).unwrap(), "hello\n");

    // Nobody's files are there: a place has to be named.
    let (status, diff) = as_ann(&world, "GET", &format!("/v1/jobs/{id}/diff"), &Value::Null);
    assert!(status == 200 && diff.contains("+more") && diff.contains("new.txt"), "{diff}");
    let apply = format!("/v1/jobs/{id}/apply");
    for wish in [json!({}), json!({ "branch": "from-agent" })] {
        let (status, body) = as_ann(&world, "POST", &apply, &wish);
        assert!(status == 400 && body.contains("--to DIR"), "{body}");
    }
    sh(&dir, "git clone -q app.git clone");
    let clone = dir.join("clone");
    let (status, body) = as_ann(&world, "POST", &apply, &json!({ "to": clone, "branch": "from-agent" }));
    assert!(status == 200 && body.contains("from-agent"), "{body}");
    assert_eq!(
        sh(&clone, "git show from-agent:greeting.txt; git show from-agent:new.txt"),
        "hello\nmore\nnew"
    );
    assert_eq!(sh(&clone, "git rev-parse from-agent~1; git status --short"), commit);
    let (status, body) = as_ann(&world, "POST", &apply, &json!({ "to": clone }));
    assert_eq!(status, 200, "{body}");
    assert_eq!(sh(&clone, "cat greeting.txt new.txt"), "hello\nmore\nnew");
    let export = format!("http://hotcell/v1/jobs/{id}/export?format=bundle");
    let line = format!(
        "curl -sS --unix-socket {} '{export}' -o b && git bundle verify -q b && git bundle list-heads b",
        world.socket().display()
    );
    assert!(sh(&clone, &line).contains("refs/"));

    // Another job goes on with it, on the same commit, whatever became of the branch.
    assert!(!marker.exists(), "something of the repository ran");
    // Ann's own push obeys the hooks of her repository, as it should.
    sh(&dir.join("work"), "git push -q ../app.git +feature:main; rm ../marker");
    let (status, next) =
        submit(&world, &json!({ "prompt": "x", "policy": "trusted", "from": id }), "twice", ANN);
    assert_eq!((status, &next["source"]["commit"]), (201, &json!(commit)), "{next}");
    let second = next["id"].as_str().unwrap();
    let events = world.follow(second);
    assert!(tool_results(&events).contains("hello\nmore"), "{}", tool_results(&events));
    assert_eq!(trees(&world, ANN), 2);
    for id in [id, second] {
        let (status, body) = as_ann(&world, "DELETE", &format!("/v1/jobs/{id}"), &Value::Null);
        assert_eq!(status, 204, "{body}");
    }
    assert_eq!(trees(&world, ANN), 0);
    assert!(!marker.exists(), "something of the repository ran");
    world.end();
}

#[test]
fn what_cannot_be_fetched_is_named_with_its_key_and_leaves_nothing() {
    let world = World::new("[default]\ntext = \"never asked\"\n");
    let (dir, marker) = poisoned(&world);
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).unwrap();
    let url = dir.join("app.git").display().to_string();
    let spec = |git: Value| json!({ "prompt": "x", "policy": "trusted", "workspace": { "git": git } });
    for (n, (git, code, words, uid)) in [
        (json!({ "url": url, "ref": "mian" }), "workspace", "workspace.git.ref: ", ANN),
        (json!({ "url": url, "ref": "mian" }), "workspace", "did you mean main", ANN),
        (json!({ "url": "http://127.0.0.1:9/app" }), "workspace", "workspace.git.url: ", ANN),
        (json!({ "url": dir.join("work/nothing") }), "workspace", "no git repository", ANN),
        (json!({ "url": url }), "workspace", "no git repository", BOB),
        (json!({ "url": "ext::sh -c id" }), "invalid_spec", "workspace.git.url: ", ANN),
        (json!({ "url": url, "ref": "--upload-pack=id" }), "invalid_spec", "workspace.git.ref: ", ANN),
    ]
    .into_iter()
    .enumerate()
    {
        let (status, body) = submit(&world, &spec(git.clone()), &format!("k{n}"), uid);
        assert!(status == 400 && body["error"]["code"] == code, "{git}: {body}");
        assert!(body["error"]["message"].as_str().unwrap().contains(words), "{git}: {body}");
        assert_eq!(trees(&world, uid), 0, "{git}");
    }
    // A policy that allows no copy: nothing is fetched for a job that is refused.
    let mut bind = spec(json!({ "url": url }));
    bind["workspace"]["mode"] = json!("bind");
    let (status, body) = submit(&world, &bind, "bind", ANN);
    assert!(status == 400 && body["error"]["message"].as_str().unwrap().contains("workspace.mode"), "{body}");
    // The command says what it does, and what is missing: git reads no other user's repository.
    let (code, out, errors) = world.run(&["run", "-w", &url, "--ref", "main", "go"]);
    assert!(code != 0 && out.is_empty(), "{code} {out}");
    assert!(errors.contains("fetching") && errors.contains("safe.directory"), "{errors}");
    assert_eq!(world.sql("SELECT count(*) FROM jobs"), "0");
    assert!(!marker.exists(), "something of the repository ran");
    world.end();
}

#[test]
fn what_a_killed_daemon_fetched_is_swept() {
    let mut world = World::without_daemon("[default]\ntext = \"never asked\"\n", "");
    world.start();
    let (dir, _) = poisoned(&world);
    let url = dir.join("app.git").display().to_string();
    let spec = json!({ "prompt": "x", "policy": "trusted", "workspace": { "git": { "url": url } } });
    // A job that waits for its engine's word has its checkout; one without a row is a leftover.
    let (status, job) = submit(&world, &spec, "one", ANN);
    assert_eq!(status, 201, "{job}");
    world.follow(job["id"].as_str().unwrap());
    world.kill();
    let left = world.path("state-sources/4242/trees/j00000000000000");
    assert!(
        Command::new("cp")
            .args(["-a", job["workspace"].as_str().unwrap()])
            .arg(&left)
            .status()
            .unwrap()
            .success()
    );
    let orphan = left.with_file_name("j000000000000000");
    std::fs::rename(&left, &orphan).unwrap();
    world.start();
    world.wait_for("the leftover is swept", |_| !orphan.exists());
    assert_eq!(trees(&world, ANN), 1);
    world.end();
}
