//! `devcontainer.json`: what of it says how an image is built, and what else it asks for. Pure. Commands of its life
//! cycle are for the cell; what would run on the host, or open a wall of the cell, is left out and told; what an image
//! would be wrong without is refused by name.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::job::spec::StepCommand;

/// Commands that run in the cell, in the order of a devcontainer's life.
const IN_THE_CELL: [&str; 4] =
    ["onCreateCommand", "updateContentCommand", "postCreateCommand", "postStartCommand"];
/// What says nothing that a cell would do another way.
const SILENT: [&str; 5] = ["$schema", "name", "customizations", "extensions", "settings"];
/// Most variables, arguments and commands.
const ENTRIES_MAX: usize = 64;

/// What one says, with paths as they stand there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Devcontainer {
    /// Its Dockerfile.
    pub(super) dockerfile: Option<String>,
    /// Its image, where it has no Dockerfile.
    pub(super) image: Option<String>,
    /// The directory of the context.
    pub(super) context: Option<String>,
    /// The stage.
    pub(super) target: Option<String>,
    /// Build arguments.
    pub(super) args: BTreeMap<String, String>,
    /// Variables.
    pub(super) env: BTreeMap<String, String>,
    /// Commands that run in the cell.
    pub(super) setup: Vec<StepCommand>,
    /// What is left out, one line each.
    pub(super) told: Vec<String>,
}

impl Devcontainer {
    /// Reads one.
    ///
    /// # Errors
    /// Words for what cannot be read, and for what is not built here.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let syntax = |e: jsonc_parser::errors::ParseError| format!("it is no JSON with comments: {e}");
        let options = jsonc_parser::ParseOptions::default();
        // This one knows how deep it goes; the other one does not.
        jsonc_parser::parse_to_ast(text, &jsonc_parser::CollectOptions::default(), &options)
            .map_err(syntax)?;
        let value: Value = jsonc_parser::parse_to_serde_value(text, &options).map_err(syntax)?;
        let Value::Object(all) = value else { return Err("it is no JSON object".to_owned()) };
        let mut found = Self::default();
        found.refuse(&all)?;
        found.source(&all)?;
        for key in ["containerEnv", "remoteEnv"] {
            found.variables(key, &all)?;
        }
        for key in IN_THE_CELL {
            if let Some(value) = all.get(key) {
                found.setup.extend(commands(value).map_err(|problem| format!("{key}: {problem}"))?);
            }
        }
        if found.setup.len() > ENTRIES_MAX {
            return Err(format!("it has more than {ENTRIES_MAX} commands"));
        }
        found.tell(&all);
        Ok(found)
    }

    fn refuse(&self, all: &Map<String, Value>) -> Result<(), String> {
        if all.contains_key("dockerComposeFile") {
            return Err("dockerComposeFile: a cell is one container; name a Dockerfile (`build.dockerfile`)"
                .to_owned());
        }
        if all
            .get("features")
            .is_some_and(|features| features.as_object().is_none_or(|list| !list.is_empty()))
        {
            return Err("features: they are scripts of others that are fetched while the image is built, which is not \
                        done here; put what they install into the Dockerfile"
                .to_owned());
        }
        Ok(())
    }

    fn source(&mut self, all: &Map<String, Value>) -> Result<(), String> {
        let empty = Map::new();
        let build = match all.get("build") {
            None => &empty,
            Some(Value::Object(build)) => build,
            Some(_) => return Err("build: it is no object".to_owned()),
        };
        self.dockerfile = text("build.dockerfile", build.get("dockerfile"))?;
        if self.dockerfile.is_none() {
            self.dockerfile = text("dockerFile", all.get("dockerFile"))?;
        }
        self.context = text("build.context", build.get("context"))?;
        if self.context.is_none() {
            self.context = text("context", all.get("context"))?;
        }
        self.target = text("build.target", build.get("target"))?;
        self.image = text("image", all.get("image"))?.filter(|_| self.dockerfile.is_none());
        if self.dockerfile.is_none() && self.image.is_none() {
            return Err("it names neither build.dockerfile nor image".to_owned());
        }
        for (name, value) in object("build.args", build.get("args"))? {
            let value = value.as_str().ok_or(format!("build.args.{name}: it is no text"))?;
            if value.contains("${") {
                return Err(format!(
                    "build.args.{name}: {value:?} names a variable of the host, which is not told to a build"
                ));
            }
            if !is_variable(name) || value.contains(['\0', '\n', '\r']) {
                return Err(format!("build.args.{name:?}: it is no plain argument"));
            }
            self.args.insert(name.clone(), value.to_owned());
        }
        for key in
            build.keys().filter(|key| !["dockerfile", "context", "target", "args"].contains(&key.as_str()))
        {
            self.told.push(format!("build.{key} is left out"));
        }
        Ok(())
    }

    fn variables(&mut self, key: &str, all: &Map<String, Value>) -> Result<(), String> {
        for (name, value) in object(key, all.get(key))? {
            match value.as_str() {
                Some(value)
                    if is_variable(name) && !value.contains("${") && !value.contains(['\0', '\n', '\r']) =>
                {
                    self.env.insert(name.clone(), value.to_owned());
                }
                _ => self.told.push(format!("{key}.{name} is left out: it is no plain value")),
            }
        }
        Ok(())
    }

    /// What is left out.
    fn tell(&mut self, all: &Map<String, Value>) {
        if let Some(value) = all.get("initializeCommand") {
            let words = commands(value).unwrap_or_default();
            let words = words.iter().map(StepCommand::words).collect::<Vec<_>>().join("; ");
            self.told.push(format!("initializeCommand never runs, since it would run on the host: {words}"));
        }
        if all.contains_key("postAttachCommand") {
            self.told.push("postAttachCommand never runs: nobody attaches".to_owned());
        }
        let taken = ["build", "dockerFile", "context", "image", "features", "containerEnv", "remoteEnv"];
        let told = ["initializeCommand", "postAttachCommand"];
        let known = |key: &str| {
            taken.contains(&key) || told.contains(&key) || IN_THE_CELL.contains(&key) || SILENT.contains(&key)
        };
        let rest: Vec<&str> =
            all.keys().map(String::as_str).filter(|key| !known(key)).take(ENTRIES_MAX).collect();
        if !rest.is_empty() {
            self.told.push(format!(
                "what it says besides does not loosen a cell and is left out: {}",
                rest.join(", ")
            ));
        }
    }
}

fn text(key: &str, value: Option<&Value>) -> Result<Option<String>, String> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.contains("${") => {
            Err(format!("{key}: {text:?} names a variable, which is not followed here"))
        }
        Some(Value::String(text)) if !text.is_empty() => Ok(Some(text.clone())),
        Some(_) => Err(format!("{key}: it is no text")),
    }
}

fn object<'a>(key: &str, value: Option<&'a Value>) -> Result<Vec<(&'a String, &'a Value)>, String> {
    match value {
        None => Ok(Vec::new()),
        Some(Value::Object(map)) if map.len() <= ENTRIES_MAX => Ok(map.iter().collect()),
        Some(Value::Object(_)) => Err(format!("{key}: it has more than {ENTRIES_MAX} entries")),
        Some(_) => Err(format!("{key}: it is no object")),
    }
}

fn is_variable(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    !name.is_empty() && name.bytes().all(plain) && !name.starts_with(|c: char| c.is_ascii_digit())
}

/// A line for the shell, a program with arguments, or several of both by name: those run one after another.
fn commands(value: &Value) -> Result<Vec<StepCommand>, String> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(line) if line.trim().is_empty() => Ok(Vec::new()),
        Value::String(line) => Ok(vec![StepCommand::Line(line.clone())]),
        Value::Array(words) => {
            let words: Option<Vec<String>> =
                words.iter().map(|word| word.as_str().map(str::to_owned)).collect();
            let words = words.ok_or("its words are no texts")?;
            Ok(if words.is_empty() { Vec::new() } else { vec![StepCommand::Argv(words)] })
        }
        Value::Object(named) => {
            let parts: Result<Vec<_>, _> = named
                .values()
                .map(|value| if value.is_object() { Err("it is nested".to_owned()) } else { commands(value) })
                .collect();
            Ok(parts?.into_iter().flatten().collect())
        }
        Value::Bool(_) | Value::Number(_) => Err("it is no command".to_owned()),
    }
}
