//! What a submitter asks for: the job spec as JSON. Parsing gives a value whose every field is within its
//! limit, or an error that names the key and its place. A spec asks; the policy decides
//! (`policy::narrow`): nothing here grants anything.

mod steps;
mod workspace;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

pub use steps::{CommandSpec, SetupSpec, StepCommand, TerminalSize, VerifySpec};
pub use workspace::{MountAt, OTHERS_MAX, OtherMode, OtherSpec, WORKSPACE, WorkspaceSpec, taken_at};

/// Longest prompt, in bytes.
pub const PROMPT_BYTES_MAX: usize = 1024 * 1024;
/// Longest system prompt or appended system prompt, in bytes.
pub const SYSTEM_PROMPT_BYTES_MAX: usize = 256 * 1024;
/// Longest policy of a user's own, in bytes.
pub const NARROW_BYTES_MAX: usize = 128 * 1024;
/// Most entries of a list (tools, labels, environment variables).
pub const ENTRIES_MAX: usize = 256;
/// In the place of an image: the one that fits the workspace.
pub const AUTO_IMAGE: &str = "auto";
/// In the place of an image: the one that the workspace's own Dockerfile or devcontainer gives.
pub const BUILD_IMAGE: &str = "build";
/// Longest name (model, image, tool pattern, label), in bytes.
pub const NAME_BYTES_MAX: usize = 512;
/// Longest value of an environment variable, in bytes.
pub const ENV_VALUE_BYTES_MAX: usize = 32 * 1024;
/// Longest spec as JSON, in bytes.
pub const SPEC_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A spec that cannot be accepted, whoever submits it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not JSON, an unknown key, a missing key or a wrong type: serde's words, with line and column.
    #[error("the job spec is not valid: {0}")]
    Syntax(String),
    /// A field is outside its limit.
    #[error("{key}: {problem}")]
    Field {
        /// The key, with dots for nesting.
        key: String,
        /// What is wrong and what is allowed.
        problem: String,
    },
}

/// One task for an agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("oneOf" = [{ "required": ["prompt"] }, { "required": ["command"] }]))]
pub struct JobSpec {
    /// What the agent shall do; 1 byte to 1 MiB. A job has this or a command.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub prompt: String,
    /// A command that runs in the cell in place of an agent: no model, no cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<CommandSpec>,
    /// What runs in the cell before the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub setup: Option<SetupSpec>,
    /// What judges the changed workspace after the agent, in a fresh cell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<VerifySpec>,
    /// The directory it works on; none means an empty one that is thrown away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<WorkspaceSpec>,
    /// A job of the submitter's own that is done: this one goes on with what that one changed, on the same workspace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The policy's name; the daemon's default where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// The image of the cell; the policy's default where absent. `auto`: picked by the files at the workspace's top;
    /// `build`: built from its own Dockerfile or devcontainer, where the policy allows that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What isolates the cell; the policy's where absent. A runtime that is named is required.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<Runtime>,
    /// The model provider, by its name in the daemon's configuration; the policy's default where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// The user's own policy, as the text of a TOML file: it can only narrow the one named by `policy`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub narrow: Option<String>,
    /// Jobs of one submitter with the same batch share its budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<BatchSpec>,
    /// The version of the CLI; the active bundle where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// The model; the policy's default where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The model to fall back to while the first one is overloaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback_model: Option<String>,
    /// How hard the model thinks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effort: Option<Effort>,
    /// The CLI's permission mode; the policy's first one where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub permission_mode: Option<PermissionMode>,
    /// The built-in tools that exist at all; every one the policy allows where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<String>>,
    /// Tools that need no further asking in the modes that ask.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_tools: Vec<String>,
    /// Tools that are refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disallowed_tools: Vec<String>,
    /// Replaces the CLI's own system prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_prompt: Option<String>,
    /// Is added to the system prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append_system_prompt: Option<String>,
    /// What it may use up; each one at most the policy's.
    #[serde(default)]
    pub limits: LimitsSpec,
    /// Environment variables of the agent, where the policy allows their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The submitter's own notes, to find jobs by.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Higher goes first among one user's jobs; -100 to 100.
    #[serde(default)]
    pub priority: i8,
}

/// A group of jobs that share a budget.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchSpec {
    /// Its name among the submitter's batches.
    pub name: String,
    /// What all its jobs may spend together, in USD. The first job with the name decides; another figure later
    /// is an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_usd: Option<f64>,
}

/// How the workspace is mounted into the cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WorkspaceMode {
    /// A private copy, made when the job starts: the directory itself is never changed. What the agent did to the copy
    /// is a change set, to be applied when somebody says so.
    Copy,
    /// In place: what the agent writes is written to the directory itself, as the submitter.
    Bind,
    /// The agent can read it and write nothing.
    ReadOnly,
    /// An empty directory that is thrown away.
    None,
}

impl WorkspaceMode {
    /// Its name in specs and policies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Bind => "bind",
            Self::ReadOnly => "read-only",
            Self::None => "none",
        }
    }
}

/// What isolates a cell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    /// Namespaces, seccomp and dropped capabilities of the host's kernel.
    #[default]
    Runc,
    /// gVisor: a kernel of its own in user space.
    Runsc,
}

/// No runtime of this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither runc nor runsc")]
pub struct NoRuntime(String);

impl std::str::FromStr for Runtime {
    type Err = NoRuntime;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "runc" => Ok(Self::Runc),
            "runsc" => Ok(Self::Runsc),
            other => Err(NoRuntime(other.to_owned())),
        }
    }
}

impl Runtime {
    /// The name the engine knows it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Runsc => "runsc",
        }
    }
}

/// The CLI's permission modes that a policy can allow (`auto` is not among them: it is refused by name).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum PermissionMode {
    /// Everything that the daemon's policy allows runs.
    BypassPermissions,
    /// The CLI asks before each risky call.
    Default,
    /// Edits of files run, other risky calls are asked for.
    AcceptEdits,
    /// Nothing is changed; the agent makes a plan.
    Plan,
    /// What is not allowed beforehand is denied without asking.
    DontAsk,
}

impl PermissionMode {
    /// The CLI's own spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BypassPermissions => "bypassPermissions",
            Self::Default => "default",
            Self::AcceptEdits => "acceptEdits",
            Self::Plan => "plan",
            Self::DontAsk => "dontAsk",
        }
    }
}

/// How hard the model thinks (the CLI's `effortLevel`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Effort {
    /// Little.
    Low,
    /// Some.
    Medium,
    /// Much.
    High,
    /// More still.
    Xhigh,
    /// All there is.
    Max,
}

impl Effort {
    /// The CLI's own spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Xhigh => "xhigh",
            Self::Max => "max",
        }
    }
}

/// What a job may use up. Absent means the policy's ceiling.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsSpec {
    /// Money, in USD.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_usd: Option<f64>,
    /// Turns of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_turns: Option<u32>,
    /// Seconds from the start of the cell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wall_s: Option<u32>,
    /// Seconds without any output or request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silence_s: Option<u32>,
    /// Processor cores, e.g. 1.5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<f64>,
    /// Memory, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// Processes and threads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids: Option<u32>,
    /// Disk space for HOME and /tmp, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mib: Option<u32>,
}

impl JobSpec {
    /// Parses and checks a spec.
    ///
    /// # Errors
    /// [`SpecError`], naming the key.
    pub fn parse(json: &[u8]) -> Result<Self, SpecError> {
        if json.len() > SPEC_BYTES_MAX {
            let problem = format!("{} bytes; a spec may have at most {SPEC_BYTES_MAX}", json.len());
            return Err(SpecError::Field { key: "(whole spec)".into(), problem });
        }
        let spec: Self = serde_json::from_slice(json).map_err(|e| SpecError::Syntax(e.to_string()))?;
        spec.check()?;
        Ok(spec)
    }

    fn check(&self) -> Result<(), SpecError> {
        self.check_work()?;
        text("prompt", &self.prompt, PROMPT_BYTES_MAX)?;
        for (key, value) in
            [("system_prompt", &self.system_prompt), ("append_system_prompt", &self.append_system_prompt)]
        {
            text(key, value.as_deref().unwrap_or(""), SYSTEM_PROMPT_BYTES_MAX)?;
        }
        for (key, value) in [
            ("from", &self.from),
            ("policy", &self.policy),
            ("image", &self.image),
            ("agent", &self.agent),
            ("provider", &self.provider),
            ("model", &self.model),
            ("fallback_model", &self.fallback_model),
        ] {
            if let Some(value) = value {
                name(key, value)?;
            }
        }
        let tools = self.tools.as_deref().unwrap_or(&[]);
        for (key, list) in [
            ("tools", tools),
            ("allowed_tools", &self.allowed_tools),
            ("disallowed_tools", &self.disallowed_tools),
        ] {
            entries(key, list.len())?;
            for (index, tool) in list.iter().enumerate() {
                name(&format!("{key}[{index}]"), tool)?;
                // The CLI splits its lists at commas outside parentheses; ours are lists already.
                if key == "tools" && tool.contains([',', '(', ' ']) {
                    return Err(field(&format!("{key}[{index}]"), "is not the plain name of a tool"));
                }
            }
        }
        if let Some(workspace) = &self.workspace {
            workspace.check()?;
        }
        text("narrow", self.narrow.as_deref().unwrap_or(""), NARROW_BYTES_MAX)?;
        if let Some(batch) = &self.batch {
            name("batch.name", &batch.name)?;
            if let Some(Err(e)) = batch.cost_usd.map(crate::money::MicroUsd::from_usd) {
                return Err(field("batch.cost_usd", &e.to_string()));
            }
        }
        self.check_maps()?;
        if !(-100..=100).contains(&self.priority) {
            return Err(field("priority", "must be from -100 to 100"));
        }
        self.limits.check()
    }

    /// What the job does: a task for an agent, or a command.
    fn check_work(&self) -> Result<(), SpecError> {
        match (&self.command, self.prompt.trim().is_empty()) {
            (None, true) => return Err(field("prompt", "is empty, and there is no command")),
            (Some(_), false) => {
                return Err(field("command", "stands beside a prompt: a job has one of them"));
            }
            (Some(_), true) if self.verify.is_some() => {
                return Err(field("verify", "stands beside a command: it judges the work of an agent"));
            }
            (Some(command), true) => command.check()?,
            (None, false) => {}
        }
        self.setup.as_ref().map_or(Ok(()), SetupSpec::check)?;
        self.verify.as_ref().map_or(Ok(()), VerifySpec::check)
    }

    /// What the job does, in the words of whoever submitted it.
    pub fn task(&self) -> String {
        match &self.command {
            Some(command) if command.argv.is_empty() => "(shell)".to_owned(),
            Some(command) => command.argv.join(" "),
            None => self.prompt.clone(),
        }
    }

    fn check_maps(&self) -> Result<(), SpecError> {
        entries("env", self.env.len())?;
        entries("labels", self.labels.len())?;
        for (key, value) in &self.env {
            let place = format!("env.{key}");
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if key.is_empty()
                || key.len() > 128
                || !key.chars().all(plain)
                || key.as_bytes()[0].is_ascii_digit()
            {
                return Err(field(&place, "is not a name of an environment variable"));
            }
            text(&place, value, ENV_VALUE_BYTES_MAX)?;
        }
        for (key, value) in &self.labels {
            name(&format!("labels.{key}"), key)?;
            text(&format!("labels.{key}"), value, NAME_BYTES_MAX)?;
        }
        Ok(())
    }
}

impl LimitsSpec {
    fn check(&self) -> Result<(), SpecError> {
        let whole = [
            ("limits.max_turns", self.max_turns, 100_000),
            ("limits.wall_s", self.wall_s, 7 * 86_400),
            ("limits.silence_s", self.silence_s, 7 * 86_400),
            ("limits.memory_mib", self.memory_mib, 4 * 1024 * 1024),
            ("limits.pids", self.pids, 1_000_000),
            ("limits.disk_mib", self.disk_mib, 64 * 1024 * 1024),
        ];
        for (key, value, max) in whole {
            if value.is_some_and(|v| v == 0 || v > max) {
                return Err(field(key, &format!("must be from 1 to {max}")));
            }
        }
        if self.memory_mib.is_some_and(|m| m < 256) {
            return Err(field(
                "limits.memory_mib",
                "must be at least 256: the CLI alone needs about 220 MiB",
            ));
        }
        if self.pids.is_some_and(|p| p < 32) {
            return Err(field("limits.pids", "must be at least 32: the CLI alone has about 20 threads"));
        }
        if self.cpus.is_some_and(|c| !c.is_finite() || !(0.1..=1024.0).contains(&c)) {
            return Err(field("limits.cpus", "must be from 0.1 to 1024"));
        }
        if let Some(Err(e)) = self.cost_usd.map(crate::money::MicroUsd::from_usd) {
            return Err(field("limits.cost_usd", &e.to_string()));
        }
        Ok(())
    }
}

fn field(key: &str, problem: &str) -> SpecError {
    SpecError::Field { key: key.to_owned(), problem: problem.to_owned() }
}

fn entries(key: &str, count: usize) -> Result<(), SpecError> {
    if count > ENTRIES_MAX {
        return Err(field(key, &format!("has {count} entries; at most {ENTRIES_MAX} are allowed")));
    }
    Ok(())
}

fn text(key: &str, value: &str, bytes_max: usize) -> Result<(), SpecError> {
    if value.len() > bytes_max {
        return Err(field(key, &format!("has {} bytes; at most {bytes_max} are allowed", value.len())));
    }
    if value.contains('\0') {
        return Err(field(key, "holds a NUL byte"));
    }
    Ok(())
}

/// Names reach command lines and headers: printable, bounded, never a flag.
fn name(key: &str, value: &str) -> Result<(), SpecError> {
    text(key, value, NAME_BYTES_MAX)?;
    if value.is_empty() || value.starts_with('-') || value.chars().any(char::is_control) {
        return Err(field(key, "must not be empty, start with '-' or hold control characters"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(json: &str) -> String {
        JobSpec::parse(json.as_bytes()).map(|_| ()).map_err(|e| e.to_string()).expect_err("must be refused")
    }

    #[test]
    fn the_smallest_spec_is_a_prompt() {
        let spec = JobSpec::parse(br#"{"prompt":"hi"}"#).expect("valid");
        let again = serde_json::to_vec(&spec).expect("json");
        assert_eq!(JobSpec::parse(&again), Ok(spec));
    }

    #[test]
    fn errors_name_the_key_and_its_place() {
        assert!(error_of(r#"{"prompt":"x","promt":"y"}"#).contains("unknown field `promt`"));
        assert!(error_of(r#"{"prompt":"x","promt":"y"}"#).contains("column"));
        assert!(error_of(r#"{"prompt":" "}"#).contains("prompt: is empty"));
        assert!(error_of(r#"{"prompt":"x","limits":{"wall_s":0}}"#).contains("limits.wall_s"));
        assert!(error_of(r#"{"prompt":"x","limits":{"cost_usd":-1}}"#).contains("limits.cost_usd"));
        assert!(error_of(r#"{"prompt":"x","model":"--help"}"#).contains("model"));
        assert!(error_of(r#"{"prompt":"x","env":{"A B":"1"}}"#).contains("env.A B"));
        assert!(error_of(r#"{"prompt":"x","workspace":{"path":"a/../b"}}"#).contains("workspace.path"));
        assert!(error_of(r#"{"prompt":"x","permission_mode":"auto"}"#).contains("auto"));
        for (workspace, words) in [
            (r#"{}"#, "workspace: needs a path, or a git repository"),
            (r#"{"path":"/a","git":{"url":"/r"}}"#, "workspace.git: cannot be given beside"),
            (r#"{"git":{"url":"ext::sh"}}"#, "workspace.git.url: names a program"),
            (r#"{"git":{"url":"/r","ref":"-x"}}"#, "workspace.git.ref: begins or ends"),
            (r#"{"git":{"url":"/r"},"mode":"bind"}"#, "workspace.mode: bind is for a directory"),
            (r#"{"git":{"url":"/r"},"mount":"same-path"}"#, "workspace.mount: same-path is for"),
            (r#"{"git":{"uri":"/r"}}"#, "unknown field `uri`"),
        ] {
            let error = error_of(&format!(r#"{{"prompt":"x","workspace":{workspace}}}"#));
            assert!(error.contains(words), "{workspace}: {error}");
        }
        let long = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(PROMPT_BYTES_MAX + 1));
        assert!(error_of(&long).contains("prompt: has 1048577 bytes"));
    }
}
