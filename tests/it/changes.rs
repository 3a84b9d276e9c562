//! Change sets with the real CLI in real cells, by the real daemon and the real commands, of a person who is not root:
//! what an agent did to a copy is shown, set apart, applied, exported and thrown away; whatever ends a job or the
//! daemon, no change is lost and nothing is left.

mod ask;
mod decide;
mod ends;
mod flags;
mod former;
mod input;
mod kills;
mod part;
mod poison;
mod real;
mod road;
mod space;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::world::World;

/// Whose jobs these are.
const ANN: u32 = 4242;
/// Somebody else.
const BOB: u32 = 4243;

/// What is in a tree beside `.git`: names, kinds, modes, targets and contents.
const TREE: &str = "find . -name .git -prune -o -printf '%P %y %m %l\\n' | LC_ALL=C sort; \
    find . -name .git -prune -o -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum";
/// The same as far as git knows it.
const TRACKED: &str = "find . -name .git -prune -o -type l -printf '%P %l\\n' | LC_ALL=C sort; \
    find . -name .git -prune -o -type f -perm -u+x -printf '%P x\\n' | LC_ALL=C sort; \
    find . -name .git -prune -o -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum";
/// Everything, with owners, times and `.git`.
const ALL: &str = "find . -printf '%p %y %U:%G %m %s %T@ %l\\n' | LC_ALL=C sort; \
    find . -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum";

/// One shell command of an agent, as a block of a script.
fn bash(command: &str) -> String {
    let input = json!({ "command": command, "description": "the test's command", "timeout": 60_000 });
    let input: toml::Value = serde_json::from_value(input).unwrap();
    format!("{{ tool = \"Bash\", input = {input} }}")
}

/// A script whose agents run one shell command each, by their prompts, and then say that they are done.
fn script(jobs: &[(&str, &str)]) -> String {
    let mut text = "usage = { input = 10, output = 20 }\n".to_owned();
    for (prompt, command) in jobs {
        let when = format!("{{ prompt = {prompt:?}, turn = 0, tools = true }}");
        text.push_str(&format!("[[reply]]\nwhen = {when}\nblocks = [{}]\n", bash(command)));
    }
    text + "[default]\ntext = \"done\"\n"
}

/// Runs a shell line in `dir` as Ann, with git as a person has it.
#[track_caller]
fn sh(dir: &Path, line: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-ec", line]).current_dir(dir).uid(ANN).gid(ANN).env("HOME", "/nonexistent");
    for (name, value) in [("GIT_AUTHOR_NAME", "Ann"), ("GIT_AUTHOR_EMAIL", "ann@example.org")] {
        command.env(name, value).env(name.replace("AUTHOR", "COMMITTER"), value);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A directory of Ann's that is a git repository with one commit of what `line` makes.
fn repository(world: &World, name: &str, line: &str) -> PathBuf {
    let dir = world.workspace(name, ANN);
    sh(
        &dir,
        &format!(
            "umask 022; git init -q -b main; git config user.name Ann; git config user.email ann@example.org; {line}; \
        git add -A; git commit -qm first"
        ),
    );
    dir
}

/// A `hotcell` command of this user's.
fn command(world: &World, uid: u32, args: &[&str]) -> Command {
    let mut command = world.hotcell();
    command.args(args).uid(uid).gid(uid).stdin(Stdio::null()).current_dir("/");
    command
}

/// Runs one: exit code, standard output, standard error.
fn run_as(world: &World, uid: u32, args: &[&str]) -> (i32, String, String) {
    let output = command(world, uid, args).output().expect("hotcell");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// The output of one of Ann's that has to succeed.
#[track_caller]
fn ann(world: &World, args: &[&str]) -> String {
    let (code, out, err) = run_as(world, ANN, args);
    assert_eq!(code, 0, "{args:?}: {out}{err}\n{}", world.log());
    out
}

/// The same, parsed.
#[track_caller]
fn ann_json(world: &World, args: &[&str]) -> Value {
    let out = ann(world, args);
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{args:?}: {e}: {out}"))
}

/// A job on a copy of `dir`.
fn spec(prompt: &str, dir: &Path) -> Value {
    json!({ "prompt": prompt, "policy": "trusted", "workspace": { "path": dir, "mode": "copy" }, "limits": { "disk_mib": 64 } })
}

/// Submits a job of Ann's.
#[track_caller]
fn submit(world: &World, spec: &Value) -> String {
    let answer = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(ANN)).unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);
    answer.json()["id"].as_str().unwrap().to_owned()
}

/// A job of Ann's on a copy of `dir` that has to succeed: its id, its events and its view.
#[track_caller]
fn job(world: &World, prompt: &str, dir: &Path) -> (String, Vec<Value>, Value) {
    let id = submit(world, &spec(prompt, dir));
    let events = world.follow(&id);
    let view = world.show(&id);
    assert_eq!(view["outcome"], "succeeded", "{view:#}\n{}", world.log());
    (id, events, view)
}

/// Paths of a list of them, or of entries.
fn paths(list: &Value) -> Vec<&str> {
    let list = list.as_array().unwrap_or_else(|| panic!("no list: {list}"));
    list.iter().map(|item| item["path"].as_str().or(item.as_str()).unwrap()).collect()
}

/// The change set's entry of this path.
#[track_caller]
fn entry<'a>(set: &'a Value, path: &str) -> &'a Value {
    let entries = set["entries"].as_array().unwrap();
    entries.iter().find(|e| e["path"] == path).unwrap_or_else(|| panic!("no {path}: {set:#}"))
}
