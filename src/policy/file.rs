//! A policy file: TOML → [`Policy`]. Unknown keys, empty lists and limits that no job could meet are
//! errors that name the file, the line and the key. Parsing only; reading the file is the daemon's.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::changes::Changes;
use super::egress::Egress;
use super::error::PolicyError;
use super::output::Output;
use super::requests::Requests;
use super::rule::Rule;
use super::sets::Sets;
use super::steps::StepTable;
use crate::change::hide::{HideError, HideRules};
use crate::job::spec::{AUTO_IMAGE, BUILD_IMAGE, PermissionMode, Runtime, WorkspaceMode};
use crate::money::MicroUsd;

/// What jobs under this policy may do and spend: the ceiling.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// The file's name without `.toml`.
    #[serde(skip)]
    pub name: String,
    /// SHA-256 of the file, in hex: what a stored plan was made from.
    #[serde(skip)]
    pub hash: String,
    /// One line for `hotcell policy ls` and for whoever chooses one.
    pub description: String,
    /// Let the repository's own CLAUDE.md, skills, agents, commands and settings load natively. Its command
    /// hooks and its permission rules never loosen the gate.
    #[serde(default)]
    pub project_settings: bool,
    /// Where `project_settings` is off: hand the repository's CLAUDE.md over in the system prompt.
    #[serde(default = "yes")]
    pub hand_over_claude_md: bool,
    /// Permission modes a job may choose; the first is the default.
    pub permission_modes: Vec<PermissionMode>,
    /// Models.
    pub models: Models,
    /// Images.
    pub images: Images,
    /// Versions of the CLI.
    #[serde(default)]
    pub agents: Agents,
    /// Tools.
    #[serde(default)]
    pub tools: Tools,
    /// Workspaces.
    pub workspace: Workspaces,
    /// Environment variables.
    #[serde(default)]
    pub env: Env,
    /// Ceilings, which are also the defaults.
    pub limits: Limits,
    /// What isolates the cell: required, not wished for.
    #[serde(default)]
    pub runtime: Runtime,
    /// Runtimes that do as well, tried in order where the machine has not the one above. Empty: none does.
    #[serde(default)]
    pub runtime_fallback: Vec<Runtime>,
    /// Model providers.
    #[serde(default)]
    pub providers: Providers,
    /// What a job may reach beside its model.
    #[serde(default)]
    pub egress: Egress,
    /// The steps before the agent.
    #[serde(default)]
    pub setup: StepTable,
    /// The steps after it.
    #[serde(default)]
    pub verify: StepTable,
    /// What its requests for the model may hold.
    #[serde(default)]
    pub requests: Requests,
    /// What is done with kinds of change that a person should see.
    #[serde(default)]
    pub changes: Changes,
    /// What comes out of it.
    #[serde(default)]
    pub output: Output,
    /// Rules on tool calls, in order.
    #[serde(default, rename = "rule")]
    pub rules: Vec<Rule>,
    /// Variables of the sets that it opens.
    #[serde(skip)]
    pub set_env: BTreeMap<String, String>,
    /// All sets that there are, with their hosts as `name:port`: for the words of refusals.
    #[serde(skip)]
    pub known_sets: BTreeMap<String, Vec<String>>,
}

/// Model providers a job may use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Providers {
    /// Names of the daemon's configuration, or beginnings of names with a final `*`.
    #[serde(default = "every")]
    pub allow: Vec<String>,
    /// What a job gets that names none; the daemon's default where absent.
    #[serde(default)]
    pub default: Option<String>,
}

impl Default for Providers {
    fn default() -> Self {
        Self { allow: every(), default: None }
    }
}

/// Models a job may use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Models {
    /// Names, or beginnings of names with a final `*`. The CLI's side requests count too.
    pub allow: Vec<String>,
    /// What a job gets that names none; the daemon's default where absent.
    #[serde(default)]
    pub default: Option<String>,
    /// The price of models that have none, in USD per million tokens: the highest that any of them may have.
    /// Absent: a model without a price is refused.
    #[serde(default)]
    pub unpriced: Option<Unpriced>,
}

/// The highest price of a model without one, in USD per million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Unpriced {
    /// Input; cache writes cost twice as much.
    pub input: f64,
    /// Output.
    pub output: f64,
}

/// Images a job may use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Images {
    /// References, or beginnings of references with a final `*`.
    pub allow: Vec<String>,
    /// What a job gets that names none; the daemon's default where absent.
    #[serde(default)]
    pub default: Option<String>,
    /// `true`: a job may have the workspace's own Dockerfile or devcontainer built (`image = "build"`), which runs its
    /// code on the host's engine. Not so where absent. What it is built on has to be among `allow`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<bool>,
}

impl Images {
    /// Whether a default is no image but a wish for one; what becomes of it is held against the list.
    fn is_wish(&self) -> bool {
        match self.default.as_deref() {
            Some(AUTO_IMAGE) => true,
            Some(BUILD_IMAGE) => self.build == Some(true),
            Some(_) | None => false,
        }
    }
}

/// Versions of the CLI a job may use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Agents {
    /// Versions, or beginnings of versions with a final `*`.
    #[serde(default = "every")]
    pub allow: Vec<String>,
    /// What a job gets that names none; the daemon's, else the active bundle where absent.
    #[serde(default)]
    pub default: Option<String>,
}

impl Default for Agents {
    fn default() -> Self {
        Self { allow: every(), default: None }
    }
}

/// Tools a job may call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tools {
    /// Names, or beginnings of names with a final `*`; `mcp__server__tool` for MCP.
    #[serde(default = "every")]
    pub allow: Vec<String>,
    /// The same; wins over `allow`.
    #[serde(default)]
    pub deny: Vec<String>,
}

impl Default for Tools {
    fn default() -> Self {
        Self { allow: every(), deny: Vec::new() }
    }
}

/// Workspaces a job may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Workspaces {
    /// Modes a job may choose; the first is the default for a job that names a directory.
    pub modes: Vec<WorkspaceMode>,
    /// With `bind` and `copy`: what can be written, as paths relative to the workspace (files or directories that exist);
    /// the rest is read-only. Absent: all of it. The CLI's own Write and Edit write beside a file and rename it, so
    /// they need its directory to be listed; a single file is written with the shell.
    #[serde(default)]
    pub writable: Option<Vec<std::path::PathBuf>>,
    /// Names of files and directories that the cell never sees, in every mode: globs as in `.gitignore`, a name
    /// without a slash at any depth.
    #[serde(default)]
    pub hide: Vec<String>,
}

/// Environment variables a job may set for its agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Env {
    /// Names, or beginnings of names with a final `*`. What steers the CLI or the way out is never allowed.
    #[serde(default)]
    pub allow: Vec<String>,
}

/// What a job may use up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Money per job, in USD.
    pub cost_usd: f64,
    /// Turns of the model.
    pub max_turns: u32,
    /// Seconds from the start of the cell.
    pub wall_s: u32,
    /// Seconds without any output or request.
    pub silence_s: u32,
    /// Processor cores.
    pub cpus: f64,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// Processes and threads.
    pub pids: u32,
    /// Disk space for HOME and /tmp, in MiB.
    pub disk_mib: u32,
    /// Jobs under this policy that run at once, of all users; as many as there are slots where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<u32>,
}

/// Most entries of one list of names.
pub const LIST_ENTRIES_MAX: usize = 256;
/// Longest entry of such a list, in bytes.
pub const LIST_ENTRY_BYTES_MAX: usize = 512;

/// A list of names is bounded, and so is each of them.
pub(super) fn check_bounds(key: &str, entries: &[String]) -> Result<(), (String, String)> {
    if entries.len() > LIST_ENTRIES_MAX {
        let problem = format!("has {} entries; at most {LIST_ENTRIES_MAX} are read", entries.len());
        return Err((key.to_owned(), problem));
    }
    match entries.iter().enumerate().find(|(_, entry)| entry.len() > LIST_ENTRY_BYTES_MAX) {
        Some((index, long)) => {
            let problem = format!("has {} bytes; at most {LIST_ENTRY_BYTES_MAX} are read", long.len());
            Err((format!("{key}[{index}]"), problem))
        }
        None => Ok(()),
    }
}

/// Lists are bounded, and patterns have their `*` at the end only.
pub(super) fn check_patterns(lists: &[(&str, Option<&Vec<String>>)]) -> Result<(), (String, String)> {
    for (key, list) in lists {
        check_bounds(key, list.map_or(&[][..], |list| list))?;
        let mut patterns = list.iter().copied().flatten().enumerate();
        if let Some((index, bad)) = patterns.find(|(_, p)| !super::is_pattern(p)) {
            let problem = format!("{bad:?}: a name, or the beginning of one with a '*' at its end");
            return Err((format!("{key}[{index}]"), problem));
        }
        // The CLI has patterns such as Bash(git push:*); here they would mean no tool at all, and refuse nothing.
        let mut patterns = list.iter().copied().flatten().enumerate();
        let with_input = patterns.find(|(_, p)| key.starts_with("tools.") && p.contains(['(', ')']));
        if let Some((index, bad)) = with_input {
            let problem = format!(
                "{bad:?}: names tools only; a [[rule]] with tool and command or path speaks of single calls"
            );
            return Err((format!("{key}[{index}]"), problem));
        }
    }
    Ok(())
}

/// Rules of `[workspace] hide` that can be meant.
pub(super) fn check_hide(rules: &[String]) -> Result<(), (String, String)> {
    match HideRules::new(rules) {
        Ok(_) => Ok(()),
        Err(HideError::Bad { index, rule, problem }) => {
            Err((format!("workspace.hide[{index}]"), format!("{rule:?} {problem}")))
        }
        Err(error @ (HideError::TooMany { .. } | HideError::TooLarge(_))) => {
            Err(("workspace.hide".to_owned(), error.to_string()))
        }
    }
}

fn yes() -> bool {
    true
}

fn every() -> Vec<String> {
    vec!["*".to_owned()]
}

impl Policy {
    /// What in it can have no effect, as (key, words): worth a look, no error.
    pub fn warnings(&self) -> Vec<(String, String)> {
        super::warn::policy(self)
    }

    /// Line and column of a key in a policy's text, counted from 1.
    pub fn place_of(text: &str, key: &str) -> Option<(usize, usize)> {
        super::place::place_of(text, key)
    }

    /// Parses and checks the text of the file `<name>.toml`, with the built-in sets of hosts.
    ///
    /// # Errors
    /// [`PolicyError`], naming file, line and key.
    pub fn parse(name: &str, text: &str) -> Result<Self, PolicyError> {
        Self::parse_with(name, text, &Sets::built_in())
    }

    /// The same with these sets.
    ///
    /// # Errors
    /// [`PolicyError`], naming file, line and key.
    pub fn parse_with(name: &str, text: &str, sets: &Sets) -> Result<Self, PolicyError> {
        let file = format!("{name}.toml");
        let mut policy: Self = toml::from_str(text).map_err(|e| PolicyError::syntax(&file, text, &e))?;
        name.clone_into(&mut policy.name);
        policy.hash = Sha256::digest(text.as_bytes()).iter().map(|b| format!("{b:02x}")).collect();
        let checked = policy.check().and_then(|()| policy.open(sets));
        checked.map_err(|(key, problem)| PolicyError::at(&file, text, key, problem))?;
        Ok(policy)
    }

    /// Opens the sets that it names.
    fn open(&mut self, sets: &Sets) -> Result<(), (String, String)> {
        self.egress.open("egress", sets)?;
        self.setup.open("setup", sets)?;
        self.verify.open("verify", sets)?;
        let steps = [&self.setup, &self.verify];
        let names = steps.into_iter().flat_map(StepTable::sets).chain(&self.egress.sets);
        self.set_env = sets.env(names);
        self.known_sets = sets.hosts();
        Ok(())
    }

    fn check(&self) -> Result<(), (String, String)> {
        let filled = [
            ("permission_modes", self.permission_modes.is_empty()),
            ("models.allow", self.models.allow.is_empty()),
            ("images.allow", self.images.allow.is_empty()),
            ("agents.allow", self.agents.allow.is_empty()),
            ("tools.allow", self.tools.allow.is_empty()),
            ("providers.allow", self.providers.allow.is_empty()),
            ("workspace.modes", self.workspace.modes.is_empty()),
        ];
        if let Some((key, _)) = filled.into_iter().find(|(_, empty)| *empty) {
            return Err((key.into(), "is empty: no job could run".into()));
        }
        check_patterns(&[
            ("models.allow", Some(&self.models.allow)),
            ("images.allow", Some(&self.images.allow)),
            ("agents.allow", Some(&self.agents.allow)),
            ("tools.allow", Some(&self.tools.allow)),
            ("tools.deny", Some(&self.tools.deny)),
            ("providers.allow", Some(&self.providers.allow)),
            ("env.allow", Some(&self.env.allow)),
        ])?;
        for (key, default, allow) in [
            ("models.default", &self.models.default, &self.models.allow),
            ("images.default", &self.images.default, &self.images.allow),
            ("agents.default", &self.agents.default, &self.agents.allow),
            ("providers.default", &self.providers.default, &self.providers.allow),
        ] {
            let picked = key == "images.default" && self.images.is_wish();
            if let Some(name) = default
                && !picked
                && !allow.iter().any(|p| super::matches(p, name))
            {
                return Err((
                    key.into(),
                    format!("{name} is not among what the policy allows ({})", allow.join(", ")),
                ));
            }
        }
        for (key, runtimes) in [("runtime_fallback", &self.runtime_fallback)] {
            if runtimes.contains(&self.runtime) {
                return Err((key.into(), "holds the runtime itself".into()));
            }
        }
        self.models.unpriced.map_or(Ok(()), |unpriced| unpriced.rates().map(|_| ()))?;
        self.egress.check("egress")?;
        self.setup.check("setup")?;
        self.verify.check("verify")?;
        self.requests.check()?;
        self.output.check()?;
        super::writable::check(self.workspace.writable.as_deref())?;
        self.changes.check()?;
        check_hide(&self.workspace.hide)?;
        Rule::check_all(&self.rules)?;
        self.limits.check().map_err(|(key, problem)| (key.into(), problem))
    }
}

impl Unpriced {
    /// Input and output in micro-USD per million tokens.
    ///
    /// # Errors
    /// (key, problem): a figure that is no price, or zero, which would let such a model be used for nothing.
    pub fn rates(&self) -> Result<(MicroUsd, MicroUsd), (String, String)> {
        let rate = |name: &str, usd: f64| match MicroUsd::from_usd(usd) {
            Ok(MicroUsd::ZERO) => Err((format!("models.unpriced.{name}"), "must be above 0".to_owned())),
            Ok(rate) => Ok(rate),
            Err(error) => Err((format!("models.unpriced.{name}"), error.to_string())),
        };
        Ok((rate("input", self.input)?, rate("output", self.output)?))
    }
}

impl Limits {
    fn check(&self) -> Result<(), (&'static str, String)> {
        MicroUsd::from_usd(self.cost_usd).map_err(|e| ("limits.cost_usd", e.to_string()))?;
        for (key, value, min) in [
            ("limits.max_turns", self.max_turns, 1),
            ("limits.wall_s", self.wall_s, 1),
            ("limits.silence_s", self.silence_s, 1),
            ("limits.memory_mib", self.memory_mib, 256),
            ("limits.pids", self.pids, 32),
            ("limits.disk_mib", self.disk_mib, 16),
        ] {
            if value < min {
                return Err((key, format!("is {value}; the least that a job can run with is {min}")));
            }
        }
        if self.slots == Some(0) {
            return Err(("limits.slots", "is 0; under such a policy no job would ever run".into()));
        }
        if !self.cpus.is_finite() || !(0.1..=1024.0).contains(&self.cpus) {
            return Err(("limits.cpus", "must be from 0.1 to 1024".into()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT: &str = include_str!("../../policies/default.toml");

    #[test]
    fn a_mistake_is_named_with_file_line_and_key() {
        let text = DEFAULT.replace("max_turns", "max_turn");
        let error = Policy::parse("mine", &text).expect_err("unknown key").to_string();
        assert!(error.starts_with("mine.toml:") && error.contains(": limits.max_turn: "), "{error}");
        let text = DEFAULT.replace("cost_usd = 1.0", "cost_usd = -1.0");
        let error = Policy::parse("mine", &text).expect_err("negative").to_string();
        assert!(error.contains("limits.cost_usd"), "{error}");
        let text = DEFAULT.replace(r#"allow = ["claude-*"]"#, r#"allow = ["cl*de"]"#);
        let error = Policy::parse("mine", &text).expect_err("star inside").to_string();
        assert!(error.contains("models.allow"), "{error}");
    }

    #[test]
    fn lists_are_bounded_in_number_and_length() {
        let with = |list: Vec<String>| {
            let text = DEFAULT.replace(r#"allow = ["claude-*"]"#, &format!("allow = {list:?}"));
            Policy::parse("p", &text).map(|_| ()).map_err(|error| error.key.unwrap_or_default())
        };
        let base = || vec!["claude-*".to_owned(); LIST_ENTRIES_MAX - 1];
        let entry = |bytes: usize| vec!["m".repeat(bytes)];
        assert_eq!(with([base(), entry(LIST_ENTRY_BYTES_MAX)].concat()), Ok(()));
        assert_eq!(with([base(), entry(1), entry(1)].concat()), Err("models.allow".to_owned()));
        assert_eq!(
            with([base(), entry(LIST_ENTRY_BYTES_MAX + 1)].concat()),
            Err("models.allow[255]".to_owned())
        );
    }

    #[test]
    fn the_shipped_policies_load() {
        assert!(!Policy::parse("default", DEFAULT).expect("default").project_settings);
        let trusted = Policy::parse("trusted", include_str!("../../policies/trusted.toml")).expect("trusted");
        assert!(trusted.project_settings);
    }

    #[test]
    fn a_price_for_models_without_one_must_be_a_price() {
        let with = |unpriced: &str| DEFAULT.replace("[models]", &format!("[models]\nunpriced = {unpriced}"));
        assert!(Policy::parse("p", &with("{ input = 20, output = 100.0 }")).is_ok());
        for (bad, key) in [
            ("{ input = 0, output = 1 }", "models.unpriced.input"),
            ("{ input = 1, output = -1 }", "models.unpriced.output"),
            ("{ input = nan, output = 1 }", "models.unpriced.input"),
            ("{ input = 1, output = inf }", "models.unpriced.output"),
            ("{ input = 1 }", "output"),
        ] {
            let error = Policy::parse("p", &with(bad)).unwrap_err().to_string();
            assert!(error.contains(key), "{bad}: {error}");
        }
    }
}
