//! Which file of a workspace says what is built. The caller reads, with the submitter's rights; here it is decided. Pure.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use super::devcontainer::Devcontainer;
use super::{DockerfileError, Recipe};

/// Longest file that is followed, in bytes: it is stored with the job.
pub const FILE_BYTES_MAX: u64 = 64 * 1024;
/// Where it may lie; the first that is there holds.
pub const CANDIDATES: [&str; 4] =
    [".devcontainer/devcontainer.json", ".devcontainer.json", "Dockerfile", "Containerfile"];

/// Finds it in a directory, with the rights of whoever calls it, who can leave files out. Follows no link. Blocks.
///
/// # Errors
/// [`DockerfileError`].
pub fn find_in(dir: BorrowedFd<'_>, leave_out: &dyn Fn(&str) -> bool) -> Result<Recipe, DockerfileError> {
    find(|name| {
        let text = if leave_out(name) { None } else { super::pack::read_text(dir, name, FILE_BYTES_MAX) };
        Ok(text)
    })
}

/// Finds it. `read` gives the text of a file below the workspace, `None` where there is none that can be read.
///
/// # Errors
/// What `read` says; [`DockerfileError`] for what is not there, or not built here.
pub(super) fn find(
    mut read: impl FnMut(&str) -> Result<Option<String>, DockerfileError>,
) -> Result<Recipe, DockerfileError> {
    for name in CANDIDATES {
        let Some(text) = read(name)? else { continue };
        if name.ends_with(".json") {
            return of_devcontainer(name, &text, read);
        }
        let recipe = Recipe {
            source: name.to_owned(),
            dockerfile: Some(name.to_owned()),
            text,
            context: String::new(),
            target: None,
            args: BTreeMap::new(),
            env: BTreeMap::new(),
            setup: Vec::new(),
            told: Vec::new(),
        };
        return Ok(recipe);
    }
    Err(DockerfileError::None)
}

fn of_devcontainer(
    name: &str,
    text: &str,
    mut read: impl FnMut(&str) -> Result<Option<String>, DockerfileError>,
) -> Result<Recipe, DockerfileError> {
    let file = || name.to_owned();
    let found = Devcontainer::parse(text)
        .map_err(|problem| DockerfileError::Devcontainer { file: file(), problem })?;
    let beside = name.rsplit_once('/').map_or("", |(folder, _)| folder);
    let inside = |key: &'static str, path: &str| {
        below(beside, path).ok_or(DockerfileError::Outside { file: file(), key, path: path.to_owned() })
    };
    let (dockerfile, text) = match (&found.dockerfile, &found.image) {
        (Some(path), _) => {
            let path = inside("build.dockerfile", path)?;
            let unreadable = || DockerfileError::Unreadable { file: path.clone(), by: file() };
            let text = read(&path)?.ok_or_else(unreadable)?;
            (Some(path), text)
        }
        (None, image) => (None, format!("FROM {}\n", image.as_deref().unwrap_or_default())),
    };
    let context = inside("build.context", found.context.as_deref().unwrap_or("."))?;
    let told = found.told.iter().map(|words| format!("{name}: {words}")).collect();
    let Devcontainer { target, args, env, setup, .. } = found;
    Ok(Recipe { source: file(), dockerfile, text, context, target, args, env, setup, told })
}

/// `path`, as seen from the directory `from`; none where it leads out of the workspace.
fn below(from: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = from.split('/').filter(|part| !part.is_empty()).collect();
    if path.starts_with('/') || path.contains(['\0', '\\']) {
        return None;
    }
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}
