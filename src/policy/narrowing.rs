//! A user's own policy file: every key may be left out, and what stands there can only narrow. A thing is allowed
//! only where the policy and this file allow it; a smaller limit of either holds.
//!
//! *Invariant*: no plan made with a narrowing allows what the same plan without it refuses.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::changes::Changes;
use super::egress::Egress;
use super::error::PolicyError;
use super::file::{Agents, Env, Images, Models, Policy, Providers, Tools};
use super::narrow::{Layer, NarrowError};
use super::requests::Requests;
use super::rule::Rule;
use super::sets::Sets;
use super::steps::StepTable;
use crate::job::spec::{LimitsSpec, PermissionMode, Runtime, WorkspaceMode};

/// What a user's own file says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Narrowing {
    /// What it is called in refusals.
    #[serde(skip)]
    pub name: String,
    /// One line for people.
    #[serde(default)]
    pub description: Option<String>,
    /// `false` keeps the repository's own settings out.
    #[serde(default)]
    pub project_settings: Option<bool>,
    /// Permission modes; the first that the policy has too is the default.
    #[serde(default)]
    pub permission_modes: Option<Vec<PermissionMode>>,
    /// Models.
    #[serde(default)]
    pub models: Option<Models>,
    /// Images.
    #[serde(default)]
    pub images: Option<Images>,
    /// Versions of the CLI.
    #[serde(default)]
    pub agents: Option<Agents>,
    /// Model providers.
    #[serde(default)]
    pub providers: Option<Providers>,
    /// Tools.
    #[serde(default)]
    pub tools: Option<Tools>,
    /// Workspaces.
    #[serde(default)]
    pub workspace: NarrowWorkspaces,
    /// Environment variables.
    #[serde(default)]
    pub env: Option<Env>,
    /// Limits; the smaller one holds.
    #[serde(default)]
    pub limits: LimitsSpec,
    /// What isolates the cell; one of the policy's, and no other one will do then.
    #[serde(default)]
    pub runtime: Option<Runtime>,
    /// What a job may reach beside its model.
    #[serde(default)]
    pub egress: Option<Egress>,
    /// The steps before the agent; what they reach is as `egress` here where this says nothing.
    #[serde(default)]
    pub setup: StepTable,
    /// The steps after it.
    #[serde(default)]
    pub verify: StepTable,
    /// What its requests for the model may hold.
    #[serde(default)]
    pub requests: Option<Requests>,
    /// What is done with kinds of change; the stricter word holds.
    #[serde(default)]
    pub changes: Option<Changes>,
    /// Rules on tool calls. An `allow` here ends the reading of this file only.
    #[serde(default, rename = "rule")]
    pub rules: Vec<Rule>,
}

/// Workspaces a job may have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NarrowWorkspaces {
    /// Modes; the first that the policy has too is the default.
    #[serde(default)]
    pub modes: Option<Vec<WorkspaceMode>>,
    /// What can be written with `bind`, as paths relative to the workspace.
    #[serde(default)]
    pub writable: Option<Vec<PathBuf>>,
    /// More that the cell never sees, beside what the policy hides.
    #[serde(default)]
    pub hide: Vec<String>,
}

impl Narrowing {
    /// Parses and checks the text of a user's file, with the built-in sets of hosts.
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
        let mut narrowing: Self = toml::from_str(text).map_err(|e| PolicyError::syntax(name, text, &e))?;
        name.clone_into(&mut narrowing.name);
        let checked = narrowing.check().and_then(|()| narrowing.open(sets));
        checked.map_err(|(key, problem)| PolicyError::at(name, text, key, problem))?;
        Ok(narrowing)
    }

    /// What in it can have no effect, as (key, words).
    pub fn warnings(&self) -> Vec<(String, String)> {
        super::warn::narrowing(self)
    }

    /// Opens the sets that it names.
    fn open(&mut self, sets: &Sets) -> Result<(), (String, String)> {
        if let Some(egress) = &mut self.egress {
            egress.open("egress", sets)?;
        }
        self.setup.open("setup", sets)?;
        self.verify.open("verify", sets)
    }

    fn check(&self) -> Result<(), (String, String)> {
        let wrong = |key: &str, problem: &str| Err((key.to_owned(), problem.to_owned()));
        if self.models.as_ref().is_some_and(|models| models.unpriced.is_some()) {
            return wrong("models.unpriced", "only the policy itself can name a price");
        }
        super::writable::check(self.workspace.writable.as_deref())?;
        super::file::check_hide(&self.workspace.hide)?;
        let empty = "is empty: no job could run";
        if self.permission_modes.as_ref().is_some_and(Vec::is_empty) {
            return wrong("permission_modes", empty);
        }
        if self.workspace.modes.as_ref().is_some_and(Vec::is_empty) {
            return wrong("workspace.modes", empty);
        }
        super::file::check_patterns(&[
            ("models.allow", self.models.as_ref().map(|m| &m.allow)),
            ("images.allow", self.images.as_ref().map(|m| &m.allow)),
            ("agents.allow", self.agents.as_ref().map(|m| &m.allow)),
            ("providers.allow", self.providers.as_ref().map(|m| &m.allow)),
            ("tools.allow", self.tools.as_ref().map(|m| &m.allow)),
            ("tools.deny", self.tools.as_ref().map(|m| &m.deny)),
            ("env.allow", self.env.as_ref().map(|m| &m.allow)),
        ])?;
        super::writable::check(self.workspace.writable.as_deref())?;
        if let Some(egress) = &self.egress {
            egress.check("egress")?;
        }
        self.setup.check("setup")?;
        self.verify.check("verify")?;
        if let Some(requests) = &self.requests {
            requests.check()?;
        }
        if let Some(changes) = &self.changes {
            changes.check()?;
        }
        Rule::check_all(&self.rules)
    }

    /// `policy` with everything that is one value narrowed; what is a pattern stays and is asked of both.
    ///
    /// # Errors
    /// [`NarrowError`] where nothing is left of a list.
    pub(super) fn narrowed(&self, policy: &Policy) -> Result<Policy, NarrowError> {
        let nothing = |key: &str, asked: String, allowed: String| NarrowError {
            key: format!("narrow: {key}"),
            asked,
            policy: policy.name.clone(),
            allowed,
        };
        let mut own = policy.clone();
        own.project_settings &= self.project_settings.unwrap_or(true);
        if let Some(modes) = &self.permission_modes {
            own.permission_modes = common(modes, &policy.permission_modes);
            if own.permission_modes.is_empty() {
                let list = |modes: &[PermissionMode]| {
                    modes.iter().map(|m| m.as_str()).collect::<Vec<_>>().join(", ")
                };
                return Err(nothing("permission_modes", list(modes), list(&policy.permission_modes)));
            }
        }
        if let Some(modes) = &self.workspace.modes {
            own.workspace.modes = common(modes, &policy.workspace.modes);
        }
        if let Some(paths) = &self.workspace.writable {
            let within = |path: &Path| match &policy.workspace.writable {
                Some(ceiling) => ceiling.iter().any(|top| path.starts_with(top)),
                None => true,
            };
            own.workspace.writable = Some(paths.iter().filter(|path| within(path)).cloned().collect());
        }
        for rule in &self.workspace.hide {
            if !own.workspace.hide.contains(rule) {
                own.workspace.hide.push(rule.clone());
            }
        }
        if let Some(runtime) = self.runtime {
            let all: Vec<Runtime> =
                [policy.runtime].into_iter().chain(policy.runtime_fallback.clone()).collect();
            if !all.contains(&runtime) {
                let allowed = all.iter().map(|r| r.as_str()).collect::<Vec<_>>().join(", ");
                return Err(nothing("runtime", runtime.as_str().to_owned(), allowed));
            }
            (own.runtime, own.runtime_fallback) = (runtime, Vec::new());
        }
        if let Some(changes) = &self.changes {
            own.changes = policy.changes.stricter(changes);
        }
        let (limits, asked) = (&mut own.limits, &self.limits);
        limits.cost_usd = asked.cost_usd.map_or(limits.cost_usd, |x| x.min(limits.cost_usd));
        limits.cpus = asked.cpus.map_or(limits.cpus, |x| x.min(limits.cpus));
        for (top, asked) in [
            (&mut limits.max_turns, asked.max_turns),
            (&mut limits.wall_s, asked.wall_s),
            (&mut limits.silence_s, asked.silence_s),
            (&mut limits.memory_mib, asked.memory_mib),
            (&mut limits.pids, asked.pids),
            (&mut limits.disk_mib, asked.disk_mib),
        ] {
            *top = asked.map_or(*top, |x| x.min(*top));
        }
        Ok(own)
    }

    /// What it says about single things. Where it says nothing, the policy's word is repeated.
    pub(super) fn layer(&self, policy: &Policy) -> Layer {
        let every = || vec!["*".to_owned()];
        let tools = self.tools.as_ref();
        // What this file says of a step, else of all, else nothing: then the policy's word is repeated.
        let step = |own: &StepTable, policys: &StepTable| match (&own.egress, &self.egress) {
            (Some(own), _) => Some(own.clone()),
            (None, Some(_)) => None,
            (None, None) => policys.egress.clone(),
        };
        Layer {
            name: self.name.clone(),
            tools_allow: tools.map_or_else(every, |t| t.allow.clone()),
            tools_deny: tools.map_or_else(Vec::new, |t| t.deny.clone()),
            models_allow: self.models.as_ref().map_or_else(every, |m| m.allow.clone()),
            rules: self.rules.clone(),
            egress: self.egress.clone().unwrap_or_else(|| policy.egress.clone()),
            setup_egress: step(&self.setup, &policy.setup),
            verify_egress: step(&self.verify, &policy.verify),
            requests: self.requests.clone().unwrap_or_else(|| policy.requests.clone()),
            ..Layer::default()
        }
    }
}

/// What is in both, in the order of the first.
fn common<T: Copy + PartialEq>(first: &[T], second: &[T]) -> Vec<T> {
    first.iter().copied().filter(|item| second.contains(item)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Flag, Verdict};
    use proptest::prelude::*;

    #[test]
    fn a_writable_path_does_not_lead_out_of_the_policys() {
        for path in ["src/../secret", "src/..", "/etc", "src/.git/hooks"] {
            let text = format!("[workspace]\nwritable = [{path:?}]");
            let error = Narrowing::parse("narrow", &text).expect_err(path).to_string();
            assert!(error.contains("workspace.writable"), "{error}");
        }
    }

    #[test]
    fn changes_only_become_stricter_and_a_mistake_is_named() {
        let policy = include_str!("../../policies/default.toml");
        let policy = Policy::parse("p", policy).expect("policy");
        let own = Narrowing::parse("narrow", "[changes]\nplain = ['hidden']\nrefused = ['ci']").expect("own");
        let own = own.narrowed(&policy).expect("narrowed").changes;
        let of = |flag| (own.of(flag), policy.changes.of(flag));
        assert_eq!(of(Flag::Ci).0, Verdict::Refused);
        assert_eq!(of(Flag::Hidden).0, of(Flag::Hidden).1);
        let error =
            Narrowing::parse("narrow", "[changes]\nplain = ['special']").expect_err("special").to_string();
        assert!(error.contains("changes.plain[0]"), "{error}");
    }

    #[test]
    fn a_pattern_of_calls_is_no_tool() {
        for key in ["tools.deny", "tools.allow"] {
            let error = Narrowing::parse("narrow", &format!("{key} = ['Bash(git push:*)']")).expect_err(key);
            assert!(error.to_string().contains(&format!("{key}[0]")), "{error}");
        }
        let rule = "[[rule]]\ntool = 'Bash(rm *)'\naction = 'deny'\nreason = 'no'";
        let error = Narrowing::parse("narrow", rule).expect_err("rule").to_string();
        assert!(error.contains("rule[0].tool[0]"), "{error}");
    }

    proptest! {
        #[test]
        fn no_text_of_a_submitter_panics(pattern in "[a*é\u{fdfa}]{0,4}", key in prop::sample::select(vec![
            "tools.allow", "tools.deny", "models.allow", "images.allow", "requests.betas", "requests.file_ids",
            "requests.url_sources", "requests.mcp_servers",
        ])) {
            let _ = Narrowing::parse("narrow", &format!("{key} = [{pattern:?}]"));
            let rule = format!("[[rule]]\ntool = {pattern:?}\npath = {pattern:?}\naction = 'allow'");
            let _ = Narrowing::parse("narrow", &rule);
        }
    }
}
