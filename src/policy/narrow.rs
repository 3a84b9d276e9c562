//! A job's spec against its policy, once, at submit: what is within the policy becomes the [`Plan`] that
//! is stored with the job; what is above it is an error that names the key, what was asked and the
//! ceiling. Nothing is silently lowered.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::changes::Changes;
use super::egress::Egress;
use super::file::{Policy, Unpriced};
use super::matches;
use super::narrowing::Narrowing;
use super::output::Output;
use super::requests::Requests;
use super::rule::Rule;
use super::steps::StepKind;
use crate::job::spec::{
    AUTO_IMAGE, BUILD_IMAGE, Effort, JobSpec, PermissionMode, Runtime, WORKSPACE, WorkspaceMode,
    WorkspaceSpec,
};
use crate::money::MicroUsd;

/// Variables that steer the CLI, the loader or the way out: no job may set them, whatever its policy says.
pub(super) const ENV_RESERVED: [&str; 27] = [
    "ANTHROPIC_*",
    "CLAUDE_*",
    "CLAUDECODE",
    "AWS_*",
    "GOOGLE_*",
    "CLOUD_ML_*",
    "VERTEX_*",
    "AZURE_*",
    "HOTCELL_*",
    "LD_*",
    "NODE_OPTIONS",
    "NODE_EXTRA_CA_CERTS",
    "NODE_TLS_REJECT_UNAUTHORIZED",
    "NODE_USE_ENV_PROXY",
    "BUN_*",
    "SSL_CERT_FILE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "HOME",
    "IS_SANDBOX",
    "OTEL_*",
];

/// True for a variable that steers the CLI, the loader or the way out: it is the daemon's, whoever asks.
pub fn is_reserved_variable(name: &str) -> bool {
    ENV_RESERVED.iter().any(|pattern| matches(pattern, name))
}

/// A job that asks for more than its policy allows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {asked} is not allowed by the policy {policy} ({allowed})")]
pub struct NarrowError {
    /// The key of the spec.
    pub key: String,
    /// What the job asked for.
    pub asked: String,
    /// The policy's name.
    pub policy: String,
    /// What it allows.
    pub allowed: String,
}

/// What the daemon's configuration names where neither job nor policy does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// The model.
    pub model: String,
    /// The image.
    pub image: String,
    /// The model provider.
    pub provider: String,
}

/// Everything that a job may do and spend, with nothing left open: stored in its row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The policy's name.
    pub policy: String,
    /// SHA-256 of the policy file it was made from.
    pub policy_hash: String,
    /// The image's reference.
    pub image: String,
    /// The CLI's version, where the job asked for one.
    pub agent: Option<String>,
    /// The model.
    pub model: String,
    /// The model to fall back to.
    pub fallback_model: Option<String>,
    /// How hard the model thinks.
    pub effort: Option<Effort>,
    /// The CLI's permission mode.
    pub permission_mode: PermissionMode,
    /// Built-in tools that exist; all where absent.
    pub tools: Option<Vec<String>>,
    /// Tools that the CLI need not ask for in the modes that ask.
    pub allowed_tools: Vec<String>,
    /// Tools the job refuses.
    pub disallowed_tools: Vec<String>,
    /// The policy, and what narrows it: a thing is allowed only where every layer allows it.
    pub layers: Vec<Layer>,
    /// What isolates the cell: the first is required, each further one does as well where the machine has not
    /// the one before.
    pub runtimes: Vec<Runtime>,
    /// The model provider.
    pub provider: String,
    /// The price of models that have none.
    pub unpriced: Option<Unpriced>,
    /// What of the workspace can be written in `bind`; all of it where absent.
    pub writable: Option<Vec<PathBuf>>,
    /// Names of files and directories of the workspace that the cell never sees, as globs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hide: Vec<String>,
    /// What is done with kinds of change.
    #[serde(default)]
    pub changes: Changes,
    /// What comes out of the job.
    pub output: Output,
    /// Let the repository's own settings load.
    pub project_settings: bool,
    /// Hand CLAUDE.md over in the system prompt.
    pub hand_over_claude_md: bool,
    /// How the workspace is mounted.
    pub workspace_mode: WorkspaceMode,
    /// Where the cell sees it.
    #[serde(default = "usual_place")]
    pub workspace_at: String,
    /// Environment variables of the agent.
    pub env: BTreeMap<String, String>,
    /// Variables of the sets of hosts that its policy opens; those above win.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub set_env: BTreeMap<String, String>,
    /// What it may use up.
    pub limits: PlanLimits,
}

/// What a job may use up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanLimits {
    /// Money, in micro-USD.
    pub cost_micro_usd: MicroUsd,
    /// Turns of the model.
    pub max_turns: u32,
    /// Milliseconds from the start of the cell.
    pub wall_ms: u64,
    /// Milliseconds without any output.
    pub silence_ms: u64,
    /// Thousandths of a processor core.
    pub cpus_milli: u32,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub pids_max: u32,
    /// Disk space for HOME and /tmp, in bytes.
    pub disk_bytes: u64,
    /// Jobs under its policy that run at once, of all users; as many as there are slots where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<u32>,
}

/// What one file says about single things: tools, models, hosts, requests.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The file's name, for the words of a refusal.
    pub name: String,
    /// Patterns of tools allowed.
    pub tools_allow: Vec<String>,
    /// Patterns of tools denied; they win.
    pub tools_deny: Vec<String>,
    /// Patterns of models allowed.
    pub models_allow: Vec<String>,
    /// Rules on tool calls, in order.
    pub rules: Vec<Rule>,
    /// What may be reached.
    pub egress: Egress,
    /// What the steps before the agent may reach; as `egress` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub setup_egress: Option<Egress>,
    /// What the steps after it may reach; as `egress` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify_egress: Option<Egress>,
    /// Which step's `egress` is, where it is not the agent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_of: Option<StepKind>,
    /// All sets of hosts that there are, with their hosts as `name:port`: for the words of refusals.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub known_sets: BTreeMap<String, Vec<String>>,
    /// What requests for the model may hold.
    pub requests: Requests,
}

impl Layer {
    fn of(policy: &Policy) -> Self {
        Self {
            name: policy.name.clone(),
            tools_allow: policy.tools.allow.clone(),
            tools_deny: policy.tools.deny.clone(),
            models_allow: policy.models.allow.clone(),
            rules: policy.rules.clone(),
            egress: policy.egress.clone(),
            setup_egress: policy.setup.egress.clone(),
            verify_egress: policy.verify.egress.clone(),
            egress_of: None,
            known_sets: policy.known_sets.clone(),
            requests: policy.requests.clone(),
        }
    }
}

/// Narrows `spec` to `policy`.
///
/// # Errors
/// [`NarrowError`] for the first key that asks for more than the policy allows.
pub fn narrow(
    spec: &JobSpec,
    policy: &Policy,
    narrowing: Option<&Narrowing>,
    defaults: &Defaults,
) -> Result<Plan, NarrowError> {
    let narrowed = narrowing.map(|own| own.narrowed(policy)).transpose()?;
    let policy = narrowed.as_ref().unwrap_or(policy);
    let asked = Asked { spec, policy, own: narrowing };
    let names = asked.names(defaults)?;
    let permission_mode = asked.permission_mode()?;
    asked.tools()?;
    asked.env()?;
    Ok(Plan {
        policy: policy.name.clone(),
        policy_hash: policy.hash.clone(),
        image: names.image,
        agent: names.agent,
        model: names.model,
        fallback_model: spec.fallback_model.clone(),
        effort: spec.effort,
        permission_mode,
        tools: spec.tools.clone(),
        allowed_tools: spec.allowed_tools.clone(),
        disallowed_tools: spec.disallowed_tools.clone(),
        layers: [Layer::of(policy)].into_iter().chain(narrowing.map(|own| own.layer(policy))).collect(),
        runtimes: runtimes(spec, policy)?,
        provider: names.provider,
        unpriced: policy.models.unpriced,
        writable: policy.workspace.writable.clone(),
        hide: hidden(spec, policy),
        changes: policy.changes.clone(),
        output: policy.output.clone(),
        project_settings: policy.project_settings,
        hand_over_claude_md: policy.hand_over_claude_md,
        workspace_mode: workspace_mode(spec, policy)?,
        workspace_at: spec.workspace.as_ref().map_or_else(usual_place, WorkspaceSpec::seen_at),
        env: spec.env.clone(),
        set_env: policy.set_env.clone(),
        limits: limits(spec, policy)?,
    })
}

/// What a job asks for, and what it is held against.
#[derive(Clone, Copy)]
struct Asked<'a> {
    spec: &'a JobSpec,
    /// With everything that is one value narrowed.
    policy: &'a Policy,
    own: Option<&'a Narrowing>,
}

/// What a job named, or got since it named nothing.
struct Names {
    model: String,
    image: String,
    provider: String,
    agent: Option<String>,
}

impl Asked<'_> {
    fn deny(&self, key: &str, asked: &str, allowed: String) -> NarrowError {
        NarrowError {
            key: key.to_owned(),
            asked: asked.to_owned(),
            policy: self.policy.name.clone(),
            allowed,
        }
    }

    /// A name has to fit the policy's list and that of the user's own file.
    fn one_of(
        &self,
        key: &str,
        asked: &str,
        patterns: &[String],
        own: impl Fn(&Narrowing) -> Option<&Vec<String>>,
    ) -> Result<(), NarrowError> {
        let fits = |patterns: &[String]| patterns.iter().any(|p| matches(p, asked));
        match self.own.and_then(own) {
            _ if !fits(patterns) => Err(self.deny(key, asked, patterns.join(", "))),
            Some(own) if !fits(own) => {
                Err(self.deny(key, asked, format!("narrowed by your own file to {}", own.join(", "))))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// The first that is named: by the job, by its own file, by the policy, by the daemon.
    fn named(
        &self,
        job: &Option<String>,
        own: impl Fn(&Narrowing) -> Option<String>,
        policy: &Option<String>,
        default: &str,
    ) -> String {
        let named = job.clone().or_else(|| self.own.and_then(own)).or_else(|| policy.clone());
        named.unwrap_or_else(|| default.to_owned())
    }

    fn names(&self, defaults: &Defaults) -> Result<Names, NarrowError> {
        let Self { spec, policy, .. } = *self;
        let own = |n: &Narrowing| n.models.as_ref()?.default.clone();
        let model = self.named(&spec.model, own, &policy.models.default, &defaults.model);
        for (key, model) in [("model", Some(&model)), ("fallback_model", spec.fallback_model.as_ref())] {
            if let Some(model) = model {
                self.one_of(key, model, &policy.models.allow, |n| n.models.as_ref().map(|m| &m.allow))?;
            }
        }
        let own = |n: &Narrowing| n.images.as_ref()?.default.clone();
        let image = self.named(&spec.image, own, &policy.images.default, &defaults.image);
        if image == BUILD_IMAGE {
            self.may_build()?;
        } else if image != AUTO_IMAGE {
            // What is picked comes here once it is known.
            self.one_of("image", &image, &policy.images.allow, |n| n.images.as_ref().map(|m| &m.allow))?;
        }
        let own = |n: &Narrowing| n.providers.as_ref()?.default.clone();
        let provider = self.named(&spec.provider, own, &policy.providers.default, &defaults.provider);
        self.one_of("provider", &provider, &policy.providers.allow, |n| {
            n.providers.as_ref().map(|p| &p.allow)
        })?;
        let agent = spec.agent.clone().or_else(|| policy.agents.default.clone());
        if let Some(agent) = &agent {
            self.one_of("agent", agent, &policy.agents.allow, |n| n.agents.as_ref().map(|a| &a.allow))?;
        }
        Ok(Names { model, image, provider, agent })
    }

    /// What it is built on comes here once it is known.
    fn may_build(&self) -> Result<(), NarrowError> {
        let own = self.own.and_then(|own| own.images.as_ref()).and_then(|images| images.build);
        let allowed = match (self.policy.images.build, own) {
            (Some(true), Some(true) | None) => return Ok(()),
            (Some(true), Some(false)) => "taken away by `images.build = false` in your own file".to_owned(),
            (Some(false) | None, _) => format!(
                "it runs the repository's code on the host's engine, which takes `build = true` under [images] in the \
                 file of the policy {}",
                self.policy.name
            ),
        };
        Err(self.deny("image", BUILD_IMAGE, allowed))
    }

    fn permission_mode(&self) -> Result<PermissionMode, NarrowError> {
        let modes = &self.policy.permission_modes;
        let mode = self.spec.permission_mode.unwrap_or(modes[0]);
        if modes.contains(&mode) {
            return Ok(mode);
        }
        let allowed = modes.iter().map(|m| m.as_str()).collect::<Vec<_>>().join(", ");
        Err(self.deny("permission_mode", mode.as_str(), allowed))
    }

    fn tools(&self) -> Result<(), NarrowError> {
        let tools = &self.policy.tools;
        for (index, tool) in self.spec.tools.iter().flatten().enumerate() {
            let key = format!("tools[{index}]");
            self.one_of(&key, tool, &tools.allow, |n| n.tools.as_ref().map(|m| &m.allow))?;
            if let Some(pattern) = tools.deny.iter().find(|p| matches(p, tool)) {
                return Err(self.deny(&key, tool, format!("tools.deny has {pattern}")));
            }
        }
        Ok(())
    }

    fn env(&self) -> Result<(), NarrowError> {
        for name in self.spec.env.keys() {
            let key = format!("env.{name}");
            if is_reserved_variable(name) {
                let why = "this variable steers the CLI or its way out and is the daemon's";
                return Err(self.deny(&key, name, why.to_owned()));
            }
            self.one_of(&key, name, &self.policy.env.allow, |n| n.env.as_ref().map(|m| &m.allow))?;
        }
        Ok(())
    }
}

fn runtimes(spec: &JobSpec, policy: &Policy) -> Result<Vec<Runtime>, NarrowError> {
    let all: Vec<Runtime> = [policy.runtime].into_iter().chain(policy.runtime_fallback.clone()).collect();
    match spec.runtime {
        // Asked for by name: no other one will do.
        Some(asked) if all.contains(&asked) => Ok(vec![asked]),
        Some(asked) => Err(NarrowError {
            key: "runtime".into(),
            asked: asked.as_str().into(),
            policy: policy.name.clone(),
            allowed: all.iter().map(|r| r.as_str()).collect::<Vec<_>>().join(", "),
        }),
        None => Ok(all),
    }
}

fn usual_place() -> String {
    WORKSPACE.to_owned()
}

/// What is hidden: what the policy hides, and what its submitter hides besides.
fn hidden(spec: &JobSpec, policy: &Policy) -> Vec<String> {
    let mut hide = policy.workspace.hide.clone();
    for rule in spec.workspace.iter().flat_map(|workspace| &workspace.hide) {
        if !hide.contains(rule) {
            hide.push(rule.clone());
        }
    }
    hide
}

fn workspace_mode(spec: &JobSpec, policy: &Policy) -> Result<WorkspaceMode, NarrowError> {
    let Some(workspace) = &spec.workspace else { return Ok(WorkspaceMode::None) };
    // "none" as a policy's first mode is no default for a job that names a directory.
    let first = policy.workspace.modes.iter().copied().find(|m| *m != WorkspaceMode::None);
    let wanted = workspace.mode.or(first);
    for (index, other) in workspace.others.iter().enumerate() {
        if !policy.workspace.modes.contains(&other.mode.as_mode()) {
            return Err(NarrowError {
                key: format!("workspace.others[{index}].mode"),
                asked: other.mode.as_mode().as_str().to_owned(),
                policy: policy.name.clone(),
                allowed: policy.workspace.modes.iter().map(|m| m.as_str()).collect::<Vec<_>>().join(", "),
            });
        }
    }
    match wanted {
        Some(mode) if policy.workspace.modes.contains(&mode) => Ok(mode),
        Some(_) | None => Err(NarrowError {
            key: "workspace.mode".into(),
            asked: wanted.map_or("a directory", WorkspaceMode::as_str).to_owned(),
            policy: policy.name.clone(),
            allowed: policy.workspace.modes.iter().map(|m| m.as_str()).collect::<Vec<_>>().join(", "),
        }),
    }
}

fn limits(spec: &JobSpec, policy: &Policy) -> Result<PlanLimits, NarrowError> {
    let (asked, top) = (&spec.limits, &policy.limits);
    let above = |key: &str, asked: String, top: String| NarrowError {
        key: format!("limits.{key}"),
        asked,
        policy: policy.name.clone(),
        allowed: format!("at most {top}"),
    };
    let whole = |key: &str, asked: Option<u32>, top: u32| match asked {
        Some(value) if value > top => Err(above(key, value.to_string(), top.to_string())),
        Some(value) => Ok(value),
        None => Ok(top),
    };
    let real = |key: &str, asked: Option<f64>, top: f64| match asked {
        Some(value) if value > top => Err(above(key, value.to_string(), top.to_string())),
        Some(value) => Ok(value),
        None => Ok(top),
    };
    let mib = |value: u32| u64::from(value) * 1024 * 1024;
    let cost = real("cost_usd", asked.cost_usd, top.cost_usd)?;
    Ok(PlanLimits {
        cost_micro_usd: MicroUsd::from_usd(cost)
            .map_err(|e| above("cost_usd", e.to_string(), top.cost_usd.to_string()))?,
        max_turns: whole("max_turns", asked.max_turns, top.max_turns)?,
        wall_ms: u64::from(whole("wall_s", asked.wall_s, top.wall_s)?) * 1000,
        silence_ms: u64::from(whole("silence_s", asked.silence_s, top.silence_s)?) * 1000,
        cpus_milli: (real("cpus", asked.cpus, top.cpus)? * 1000.0) as u32,
        memory_bytes: mib(whole("memory_mib", asked.memory_mib, top.memory_mib)?),
        pids_max: whole("pids", asked.pids, top.pids)?,
        disk_bytes: mib(whole("disk_mib", asked.disk_mib, top.disk_mib)?),
        slots: top.slots,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::judge::{Call, Findings, Judgement, judge};
    use crate::policy::{Ask, decide};
    use proptest::prelude::*;

    fn policy(name: &str) -> Policy {
        let text = if name == "trusted" {
            include_str!("../../policies/trusted.toml")
        } else {
            include_str!("../../policies/default.toml")
        };
        Policy::parse(name, text).expect("shipped policy")
    }

    fn defaults() -> Defaults {
        Defaults {
            model: "claude-sonnet-4-6".into(),
            image: "hotcell/cell".into(),
            provider: "anthropic".into(),
        }
    }

    fn refused(json: &str) -> NarrowError {
        let spec = JobSpec::parse(json.as_bytes()).expect("spec");
        narrow(&spec, &policy("default"), None, &defaults()).expect_err("must be refused")
    }

    #[test]
    fn asking_for_more_names_the_key_and_the_ceiling() {
        let error = refused(r#"{"prompt":"x","limits":{"cost_usd":5}}"#);
        assert_eq!(error.to_string(), "limits.cost_usd: 5 is not allowed by the policy default (at most 1)");
        assert_eq!(
            refused(r#"{"prompt":"x","workspace":{"path":"/w","mode":"bind"}}"#).key,
            "workspace.mode"
        );
        assert_eq!(refused(r#"{"prompt":"x","model":"gpt"}"#).key, "model");
        assert_eq!(refused(r#"{"prompt":"x","image":"evil"}"#).key, "image");
        // A wish, judged once it is known what it comes to.
        let spec = JobSpec::parse(br#"{"prompt":"x","image":"auto"}"#).expect("spec");
        assert_eq!(
            narrow(&spec, &policy("default"), None, &defaults()).map(|plan| plan.image),
            Ok("auto".into())
        );
        let text = include_str!("../../policies/default.toml").replace("deny = []", "deny = ['WebFetch']");
        let strict = Policy::parse("strict", &text).expect("policy");
        let spec = JobSpec::parse(br#"{"prompt":"x","tools":["Read","WebFetch"]}"#).expect("spec");
        assert_eq!(narrow(&spec, &strict, None, &defaults()).expect_err("denied").key, "tools[1]");
        assert_eq!(
            refused(r#"{"prompt":"x","env":{"ANTHROPIC_BASE_URL":"http://evil"}}"#).key,
            "env.ANTHROPIC_BASE_URL"
        );
        assert_eq!(refused(r#"{"prompt":"x","env":{"FOO":"1"}}"#).key, "env.FOO");
    }

    #[test]
    fn reserved_variables_stay_reserved_where_every_name_is_allowed() {
        let spec = JobSpec::parse(br#"{"prompt":"x","env":{"LD_PRELOAD":"/tmp/x.so"}}"#).expect("spec");
        assert!(narrow(&spec, &policy("trusted"), None, &defaults()).is_err());
    }

    #[test]
    fn a_tool_that_nothing_names_is_denied() {
        let spec = JobSpec::parse(br#"{"prompt":"x","tools":["Read"],"disallowed_tools":["mcp__a__*"]}"#)
            .expect("spec");
        let plan = narrow(&spec, &policy("default"), None, &defaults()).expect("plan");
        let input = serde_json::json!({});
        let allowed = |tool| {
            matches!(
                judge(&plan, Call { tool, input: &input }, &Findings::default()),
                Judgement::Allow { .. }
            )
        };
        assert!(allowed("Read"));
        for denied in ["Bash", "WebFetch", "mcp__a__b"] {
            assert!(!allowed(denied), "{denied}");
        }
        assert!(decide(&plan, Ask::Model { name: "gpt-9" }).is_err());
    }

    proptest! {
        #[test]
        fn no_plan_is_above_its_policy(cost in proptest::option::of(0.0f64..10.0), wall in proptest::option::of(1u32..100_000), turns in proptest::option::of(1u32..5_000)) {
            let policy = policy("default");
            let spec = serde_json::json!({"prompt":"x","limits":{"cost_usd":cost,"wall_s":wall,"max_turns":turns}}).to_string();
            let spec = JobSpec::parse(spec.as_bytes()).expect("spec");
            match narrow(&spec, &policy, None, &defaults()) {
                Ok(plan) => {
                    prop_assert!(plan.limits.cost_micro_usd.as_usd() <= policy.limits.cost_usd + 1e-6);
                    prop_assert!(plan.limits.wall_ms <= u64::from(policy.limits.wall_s) * 1000);
                    prop_assert!(plan.limits.max_turns <= policy.limits.max_turns);
                }
                Err(_) => prop_assert!(cost.unwrap_or(0.0) > 1.0 || wall.unwrap_or(0) > 1800 || turns.unwrap_or(0) > 100),
            }
        }
    }

    fn own(text: &str) -> Narrowing {
        Narrowing::parse("mine.toml", text).expect("narrowing")
    }

    fn spec(json: &str) -> JobSpec {
        JobSpec::parse(json.as_bytes()).expect("spec")
    }

    #[test]
    fn a_users_file_narrows_and_says_so() {
        let policy = policy("trusted");
        let own = own(
            "permission_modes = ['plan']\n[limits]\ncost_usd = 0.5\nwall_s = 999999\n[models]\nallow = ['claude-haiku-*']\n[tools]\ndeny = ['Bash']\n[workspace]\nwritable = ['src']",
        );
        let error = narrow(&spec(r#"{"prompt":"x"}"#), &policy, Some(&own), &defaults()).expect_err("model");
        assert!(error.to_string().contains("your own file"), "{error}");
        let plan =
            narrow(&spec(r#"{"prompt":"x","model":"claude-haiku-4-5"}"#), &policy, Some(&own), &defaults());
        let plan = plan.expect("plan");
        assert_eq!(plan.limits.cost_micro_usd, MicroUsd(500_000));
        assert_eq!(plan.limits.wall_ms, u64::from(policy.limits.wall_s) * 1000);
        assert_eq!(plan.permission_mode, PermissionMode::Plan);
        assert_eq!(plan.writable, Some(vec!["src".into()]));
        let input = serde_json::json!({});
        let judged = judge(&plan, Call { tool: "Bash", input: &input }, &Findings::default());
        assert!(matches!(judged, Judgement::Deny(denial) if denial.reason.contains("mine.toml")));
        let more = spec(r#"{"prompt":"x","model":"claude-haiku-4-5","limits":{"cost_usd":1}}"#);
        assert_eq!(narrow(&more, &policy, Some(&own), &defaults()).expect_err("cost").key, "limits.cost_usd");
    }

    #[test]
    fn an_error_in_a_file_names_line_and_key() {
        let error = Narrowing::parse("mine.toml", "\n[tools]\nallow = ['A*b']").expect_err("pattern");
        assert!(error.to_string().starts_with("mine.toml:3: tools.allow[0]: "), "{error}");
        let error = Narrowing::parse("mine.toml", "[limits]\ncost = 1").expect_err("key");
        assert!(error.to_string().starts_with("mine.toml:2: limits.cost: "), "{error}");
        let text = include_str!("../../policies/trusted.toml").replace("max_turns = 1000", "max_turns = 0");
        let error = Policy::parse("bad", &text).expect_err("limit").to_string();
        assert!(error.starts_with("bad.toml:") && error.contains(": limits.max_turns: "), "{error}");
    }

    proptest! {
        #[test]
        fn a_narrowing_never_widens(modes in proptest::sample::subsequence(vec!["plan", "default", "bypassPermissions"], 1..3), cost in 0.0f64..50.0, pids in 1u32..10_000, tool in "(Bash|Read|WebFetch)", deny in "(Bash|Re\\*|\\*)") {
            let text = format!("permission_modes = {modes:?}\n[limits]\ncost_usd = {cost:?}\npids = {pids}\n[tools]\nallow = ['*']\ndeny = ['{deny}']");
            let policy = policy("trusted");
            let plain = narrow(&spec(r#"{"prompt":"x"}"#), &policy, None, &defaults()).expect("plan");
            let Ok(small) = narrow(&spec(r#"{"prompt":"x"}"#), &policy, Some(&own(&text)), &defaults()) else { return Ok(()) };
            prop_assert!(small.limits.cost_micro_usd <= plain.limits.cost_micro_usd);
            prop_assert!(small.limits.pids_max <= plain.limits.pids_max);
            let input = serde_json::json!({});
            let runs = |plan: &Plan| matches!(judge(plan, Call { tool: &tool, input: &input }, &Findings::default()), Judgement::Allow { .. });
            prop_assert!(!runs(&small) || runs(&plain));
        }
    }
}
