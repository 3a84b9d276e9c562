//! The workspaces of a job spec: which directories, how they are mounted, where the cell sees them, and what it must
//! not see of them. It must never accept a place in the cell that the cell needs for itself.

use std::path::{Component, Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{SpecError, WorkspaceMode, field, text};
use crate::job::source::GitSource;

/// Where a cell sees its workspace.
pub const WORKSPACE: &str = "/workspace";
/// Where it sees further ones, by their names.
const OTHERS: &str = "/workspaces";
/// Most further directories of a job.
pub const OTHERS_MAX: usize = 8;
/// What a cell needs for itself: nothing else can be seen at, above or below these paths.
const TAKEN: [&str; 27] = [
    "/.hotcell",
    "/.hotcell-agent",
    "/.hotcell-git",
    "/.hotcell-init",
    "/workspace",
    "/workspace.git",
    "/workspaces",
    "/home/agent",
    "/tmp",
    "/etc",
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/boot",
    "/root",
    "/var/run",
    "/var/lock",
    "/var/log",
    "/var/lib/dpkg",
];

/// The directory a job works on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("oneOf" = [{ "required": ["path"] }, { "required": ["git"] }]))]
pub struct WorkspaceSpec {
    /// Absolute path on the host, without symbolic links; absent where `git` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// A repository that is fetched when the job is submitted, instead of a path: it is worked on as a copy, or read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git: Option<GitSource>,
    /// How it is mounted; the policy's first mode where absent, `copy` for a repository that is fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<WorkspaceMode>,
    /// Where the cell sees it.
    #[serde(default, skip_serializing_if = "MountAt::is_usual")]
    pub mount: MountAt,
    /// More that the cell never sees, beside what the policy hides: globs as in `.gitignore`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hide: Vec<String>,
    /// Keep the contents of what git ignores too, in the change set of a copy.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_ignored: bool,
    /// Further directories, at most 8, that the cell sees beside it. Their changes are thrown away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<OtherSpec>,
}

impl WorkspaceSpec {
    /// Where the cell sees it.
    pub fn seen_at(&self) -> String {
        match (self.mount, &self.path) {
            (MountAt::SamePath, Some(path)) => path.display().to_string(),
            (MountAt::Workspace | MountAt::SamePath, _) => WORKSPACE.to_owned(),
        }
    }

    fn check_git(&self, git: &GitSource) -> Result<(), SpecError> {
        git.check().map_err(|(key, problem)| field(&format!("workspace.git.{key}"), &problem))?;
        if self.mode == Some(WorkspaceMode::Bind) {
            let problem =
                "bind is for a directory of yours: what is fetched is worked on as a copy, or read-only";
            return Err(field("workspace.mode", problem));
        }
        if self.mount == MountAt::SamePath {
            return Err(field(
                "workspace.mount",
                "same-path is for a directory of yours, and this one is fetched",
            ));
        }
        Ok(())
    }
}

/// Where the cell sees a workspace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MountAt {
    /// At `/workspace`, or `/workspaces/<name>`.
    #[default]
    Workspace,
    /// At the path that it has on the host.
    SamePath,
}

impl MountAt {
    fn is_usual(&self) -> bool {
        *self == Self::Workspace
    }
}

/// A further directory of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OtherSpec {
    /// What it is called: lower-case letters, digits, `-` and `_`.
    pub name: String,
    /// Absolute path on the host, without symbolic links.
    pub path: PathBuf,
    /// How it is mounted.
    #[serde(default)]
    pub mode: OtherMode,
    /// Where the cell sees it.
    #[serde(default, skip_serializing_if = "MountAt::is_usual")]
    pub mount: MountAt,
}

impl OtherSpec {
    /// Where the cell sees it.
    pub fn seen_at(&self) -> String {
        match self.mount {
            MountAt::Workspace => format!("{OTHERS}/{}", self.name),
            MountAt::SamePath => self.path.display().to_string(),
        }
    }
}

/// How a further directory is mounted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OtherMode {
    /// The agent can read it and write nothing.
    #[default]
    ReadOnly,
    /// A private copy that is thrown away.
    Copy,
}

impl OtherMode {
    /// The same as the mode of a workspace.
    pub fn as_mode(self) -> WorkspaceMode {
        match self {
            Self::ReadOnly => WorkspaceMode::ReadOnly,
            Self::Copy => WorkspaceMode::Copy,
        }
    }
}

impl WorkspaceSpec {
    pub(super) fn check(&self) -> Result<(), SpecError> {
        match (&self.path, &self.git) {
            (Some(path), None) => {
                check_path("workspace.path", path)?;
                check_place("workspace.mount", self.mount, path)?;
            }
            (None, Some(git)) => self.check_git(git)?,
            (None, None) => return Err(field("workspace", "needs a path, or a git repository to fetch")),
            (Some(_), Some(_)) => {
                let problem = "cannot be given beside workspace.path: one of them is the workspace";
                return Err(field("workspace.git", problem));
            }
        }
        hide_rules(&self.hide)?;
        if self.others.len() > OTHERS_MAX {
            let problem = format!("has {} entries; at most {OTHERS_MAX} are allowed", self.others.len());
            return Err(field("workspace.others", &problem));
        }
        let mut places = vec![self.seen_at()];
        for (index, other) in self.others.iter().enumerate() {
            let key = |name: &str| format!("workspace.others[{index}].{name}");
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
            if other.name.is_empty() || other.name.len() > 64 || !other.name.chars().all(plain) {
                let problem = "must be 1 to 64 lower-case letters, digits, '-' and '_'";
                return Err(field(&key("name"), problem));
            }
            check_path(&key("path"), &other.path)?;
            check_place(&key("mount"), other.mount, &other.path)?;
            let at = other.seen_at();
            let overlaps =
                |other: &String| Path::new(other).starts_with(&at) || Path::new(&at).starts_with(other);
            if let Some(taken) = places.iter().find(|other| overlaps(other)) {
                return Err(field(
                    &key("name"),
                    &format!("would be seen at {at}, and {taken} is another one's"),
                ));
            }
            if self.others[..index].iter().any(|before| before.name == other.name) {
                return Err(field(&key("name"), "is another one's name already"));
            }
            places.push(at);
        }
        Ok(())
    }
}

fn hide_rules(rules: &[String]) -> Result<(), SpecError> {
    use crate::change::hide::{HideError, HideRules};
    match HideRules::new(rules) {
        Ok(_) => Ok(()),
        Err(HideError::Bad { index, rule, problem }) => {
            Err(field(&format!("workspace.hide[{index}]"), &format!("{rule:?} {problem}")))
        }
        Err(error @ (HideError::TooMany { .. } | HideError::TooLarge(_))) => {
            Err(field("workspace.hide", &error.to_string()))
        }
    }
}

/// A cell cannot see a directory where it has something of its own.
fn check_place(key: &str, mount: MountAt, path: &Path) -> Result<(), SpecError> {
    if mount == MountAt::Workspace {
        return Ok(());
    }
    if let Some(taken) = taken_at(path) {
        let problem = format!("same-path cannot be had: a cell needs {taken} for itself");
        return Err(field(key, &problem));
    }
    // The engine takes a colon for the end of a path.
    if path.to_string_lossy().contains([':', '\n']) {
        return Err(field(key, "same-path cannot be had for a path with a colon or a line break"));
    }
    Ok(())
}

/// What of a cell's own is at, above or below `path`.
pub fn taken_at(path: &Path) -> Option<&'static str> {
    let overlaps = |taken: &&&str| path.starts_with(taken) || Path::new(taken).starts_with(path);
    TAKEN.iter().find(overlaps).copied()
}

fn check_path(key: &str, path: &Path) -> Result<(), SpecError> {
    let shown = path.to_str().ok_or_else(|| field(key, "is not UTF-8"))?;
    text(key, shown, 4096)?;
    let plain = |c: Component| matches!(c, Component::RootDir | Component::Normal(_));
    if !path.is_absolute() || !path.components().all(plain) {
        return Err(field(key, "must be an absolute path without '..'"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::JobSpec;

    fn error_of(workspace: &str) -> Option<String> {
        let json = format!(r#"{{"prompt":"x","workspace":{workspace}}}"#);
        JobSpec::parse(json.as_bytes()).err().map(|error| error.to_string())
    }

    #[test]
    fn a_place_that_the_cell_needs_is_refused_by_its_name() {
        for (path, taken) in [
            ("/tmp/x", "/tmp"),
            ("/home/agent/app", "/home/agent"),
            ("/home", "/home/agent"),
            ("/usr/local/app", "/usr"),
            ("/etc", "/etc"),
            ("/.hotcell/x", "/.hotcell"),
            ("/workspace/app", "/workspace"),
        ] {
            let workspace = format!(r#"{{"path":"{path}","mount":"same-path"}}"#);
            let error = error_of(&workspace).expect(path);
            assert!(
                error.starts_with("workspace.mount: ") && error.contains(&format!("needs {taken} ")),
                "{error}"
            );
        }
        assert_eq!(error_of(r#"{"path":"/home/ann/app","mount":"same-path"}"#), None);
        assert_eq!(error_of(r#"{"path":"/tmp/x"}"#), None);
        assert!(error_of(r#"{"path":"/home/a:b","mount":"same-path"}"#).expect("colon").contains("colon"));
    }

    #[test]
    fn further_workspaces_have_names_and_places_of_their_own() {
        let other = |name: &str, path: &str| format!(r#"{{"name":"{name}","path":"{path}"}}"#);
        let with =
            |others: &[String]| error_of(&format!(r#"{{"path":"/w/a","others":[{}]}}"#, others.join(",")));
        assert_eq!(with(&[other("lib", "/w/b"), other("docs_2", "/w/c")]), None);
        assert!(with(&[other("Lib", "/w/b")]).expect("name").starts_with("workspace.others[0].name"));
        assert!(
            with(&[other("a", "/w/b"), other("a", "/w/c")])
                .expect("twice")
                .starts_with("workspace.others[1].name")
        );
        assert!(with(&[other("a", "b")]).expect("relative").starts_with("workspace.others[0].path"));
        let many: Vec<String> = (0..9).map(|n| other(&format!("n{n}"), "/w/b")).collect();
        assert!(with(&many).expect("many").contains("at most 8"));
        let inside = r#"{"path":"/w/a","mount":"same-path","others":[{"name":"b","path":"/w/a/b","mount":"same-path"}]}"#;
        assert!(error_of(inside).expect("overlap").contains("another one's"));
    }

    #[test]
    fn what_is_hidden_besides_is_checked_with_its_key() {
        assert_eq!(error_of(r#"{"path":"/w","hide":[".env*","secrets/"]}"#), None);
        let error = error_of(r#"{"path":"/w","hide":["ok","../up"]}"#).expect("climbs");
        assert!(error.starts_with("workspace.hide[1]: "), "{error}");
    }
}
