//! The walls of a cell, tried from inside: misbehaving agents and repositories of `tests/zoo` run in real cells
//! under the real CLI, which the scripted model makes run them. What each must see is said here, in one
//! module a wall. `tests/zoo/README.md` lists them.

mod cli;
mod inside;
mod kernel;
pub(crate) mod key;
mod limits;
mod model_api;
mod output;
mod repo;
mod sockets;
mod table;
mod way_out;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::world::{World, tool_results};

/// The agent's model: its first answer runs the prompt as a shell command, the next says that it is done.
pub(crate) const RUN_THE_PROMPT: &str = r#"
usage = { input = 10, output = 20 }

[[reply]]
when = { turn = 0, tools = true }
blocks = [{ tool = "Bash", input = { command = "{{prompt}}", description = "the zoo", timeout = 120000 } }]

[default]
text = "done"
"#;

/// What an agent of the zoo told, and how its job ended.
pub(crate) struct Seen {
    found: Map<String, Value>,
    pub(crate) events: Vec<Value>,
    pub(crate) job: Value,
}

impl Seen {
    fn new(events: Vec<Value>, job: Value) -> Self {
        let mut found = Map::new();
        for line in tool_results(&events).lines().filter_map(|l| l.strip_prefix("ZOO ")) {
            let told: Map<String, Value> =
                serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
            found.extend(told);
        }
        Self { found, events, job }
    }

    /// A finding; a test that asks for one that is not there shows what the agent printed.
    #[track_caller]
    fn get(&self, name: &str) -> &Value {
        let all = || format!("{}\n{}", tool_results(&self.events), self.job);
        self.found.get(name).unwrap_or_else(|| panic!("the agent told nothing of {name:?}:\n{}", all()))
    }

    #[track_caller]
    fn succeeded(&self) {
        assert_eq!(self.job["outcome"], "succeeded", "{}\n{}", self.job, tool_results(&self.events));
    }

    /// The texts of the notes in the journal.
    fn notes(&self) -> Vec<&str> {
        self.events.iter().filter(|e| e["type"] == "note").filter_map(|e| e["text"].as_str()).collect()
    }
}

/// A world in which a job's prompt is the command that its agent runs.
fn world() -> World {
    World::new(RUN_THE_PROMPT)
}

/// The job that runs one command in a copy of the zoo, under the strict policy unless `more` says otherwise.
pub(crate) fn spec(world: &World, command: &str, more: &Value) -> Value {
    // What is trusted works in place, the rest as it does by itself.
    let mode = if more["policy"] == "trusted" { "bind" } else { "copy" };
    let mut spec = json!({ "prompt": command, "workspace": { "path": agents(world), "mode": mode } });
    for (key, value) in more.as_object().expect("an object") {
        spec[key] = value.clone();
    }
    spec
}

/// Runs one of the zoo's agents to its end.
pub(crate) fn run(world: &World, command: &str, more: &Value) -> Seen {
    let (events, job) = world.job(&spec(world, command, more));
    Seen::new(events, job)
}

/// The world's copy of the agents; made once.
fn agents(world: &World) -> PathBuf {
    let copy = world.path("zoo");
    if !copy.exists() {
        copy_tree(&zoo("agents"), &copy);
    }
    copy
}

pub(crate) fn zoo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/zoo").join(name)
}

/// Copies files and directories. A name that begins with `dot.` gets its dot: what is kept in this repository
/// must not act in it.
pub(crate) fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if name == "__pycache__" {
            continue;
        }
        let target = to.join(name.strip_prefix("dot").filter(|rest| rest.starts_with('.')).unwrap_or(&name));
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
