//! The Dockerfile that the engine gets: the one that was listed, line for line, on images by their digests. Pure. What is
//! added are labels by which leftovers are found, and, where a stage runs something, the way out: arguments that are in
//! the environment of its commands alone, and files of authorities that are emptied at the end.

use std::collections::{BTreeMap, BTreeSet};

use super::parse::{Base, Dockerfile, Instruction, Line, Stage};

/// The directory of the context that is ours: what a repository has there is left out.
pub const OWN_DIR: &str = ".hotcell-build";
/// Where the files of authorities lie while something runs. In a cell something is mounted over it.
const AUTHORITIES_AT: &str = "/.hotcell/";

/// Files of authorities in the context.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Authorities {
    /// Their names; an empty file of each name with `empty-` before it is there too.
    pub names: Vec<&'static str>,
}

/// The text. `ids`: what each image is; `labels`: of everything that is made; `arguments`: names whose values the engine
/// is given.
pub fn generate(
    file: &Dockerfile,
    ids: &BTreeMap<String, String>,
    labels: &BTreeMap<String, String>,
    arguments: &BTreeSet<String>,
    env: &BTreeMap<String, String>,
    authorities: &Authorities,
) -> String {
    let mut out = format!("# escape={}\n", file.escape);
    for line in &file.before {
        out.push_str(&format!("{} {}\n", line.word, line.rest));
    }
    let mut carried = false;
    for stage in &file.stages {
        out.push_str(&from(stage, ids));
        let labels: String =
            labels.iter().map(|(key, value)| format!(" {key}={}", quoted(value, file.escape))).collect();
        if !labels.is_empty() {
            out.push_str(&format!("LABEL{labels}\n"));
        }
        if stage.lines.iter().any(|line| line.instruction.runs()) {
            for name in arguments {
                out.push_str(&format!("ARG {name}\n"));
            }
            if !authorities.names.is_empty() {
                carried = true;
                out.push_str(&copy(&authorities.names, ""));
            }
        }
        for line in &stage.lines {
            out.push_str(&written(line, ids));
        }
    }
    for (name, value) in env {
        out.push_str(&format!("ENV {name}={}\n", quoted(value, file.escape)));
    }
    if carried {
        authorities.names.iter().for_each(|name| {
            out.push_str(&format!("COPY {OWN_DIR}/empty-{name} {AUTHORITIES_AT}{name}\n"));
        });
    }
    out
}

fn copy(names: &[&str], prefix: &str) -> String {
    let sources: String = names.iter().map(|name| format!("{OWN_DIR}/{prefix}{name} ")).collect();
    format!("COPY {sources}{AUTHORITIES_AT}\n")
}

fn id_of<'a>(image: &'a str, ids: &'a BTreeMap<String, String>) -> &'a str {
    ids.get(image).map_or(image, String::as_str)
}

fn from(stage: &Stage, ids: &BTreeMap<String, String>) -> String {
    let base = match &stage.base {
        Base::Scratch => "scratch",
        Base::Stage(name) => name.as_str(),
        Base::Image(image) => id_of(image, ids),
    };
    let name = stage.name.as_ref().map(|name| format!(" AS {name}")).unwrap_or_default();
    format!("FROM {base}{name}\n")
}

fn written(line: &Line, ids: &BTreeMap<String, String>) -> String {
    match (line.instruction, &line.from) {
        // Whatever is labelled as ours is ours.
        (Instruction::Label, _) => String::new(),
        (Instruction::Copy, Some(image)) => {
            let (named, id) = (format!("--from={image}"), format!("--from={}", id_of(image, ids)));
            format!("{} {}\n", line.word, line.rest.replacen(&named, &id, 1))
        }
        _ => format!("{} {}\n", line.word, line.rest),
    }
}

/// In double quotes, with nothing in it that a builder would expand.
fn quoted(value: &str, escape: char) -> String {
    let mut out = String::from("\"");
    for c in value.chars() {
        if matches!(c, '"' | '$') || c == escape {
            out.push(escape);
        }
        out.push(if c.is_control() { ' ' } else { c });
    }
    out.push('"');
    out
}
