//! The steps around an agent, setup before it and verify after it: what they may reach. Each file says it in a table
//! of its own, else as for the agent, and a job may name less. It must never open to a step what its layers do not.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::egress::{Egress, Host, HostRule};
use super::narrow::{Layer, NarrowError, Plan};
use super::sets::Sets;

/// Name of the layer that is a job's own word.
const JOB: &str = "(job)";

/// A step around an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StepKind {
    /// Commands before the agent.
    Setup,
    /// Commands after it, in a fresh cell, without any credential.
    Verify,
}

impl fmt::Display for StepKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Setup => "setup",
            Self::Verify => "verify",
        })
    }
}

/// What a policy says of a step: `[setup]`, `[verify]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StepTable {
    /// What its commands may reach; as the agent where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
}

impl StepTable {
    pub(super) fn check(&self, key: &str) -> Result<(), (String, String)> {
        self.egress.as_ref().map_or(Ok(()), |egress| egress.check(&format!("{key}.egress")))
    }

    pub(super) fn open(&mut self, key: &str, sets: &Sets) -> Result<(), (String, String)> {
        self.egress.as_mut().map_or(Ok(()), |egress| egress.open(&format!("{key}.egress"), sets))
    }

    pub(super) fn warnings(&self, key: &str) -> Vec<(String, String)> {
        self.egress.as_ref().map(|egress| egress.warnings(&format!("{key}.egress"))).unwrap_or_default()
    }

    /// The sets that it names.
    pub(super) fn sets(&self) -> impl Iterator<Item = &String> {
        self.egress.iter().flat_map(|egress| &egress.sets)
    }
}

impl Layer {
    /// The key of its table of hosts.
    pub(super) fn egress_key(&self) -> String {
        self.egress_of.map_or_else(|| "egress".to_owned(), |step| format!("{step}.egress"))
    }

    /// True for a job's own word.
    pub(super) fn is_of_the_job(&self) -> bool {
        self.name == JOB
    }

    /// What a step may reach.
    fn egress_for(&self, step: StepKind) -> &Egress {
        let own = match step {
            StepKind::Setup => &self.setup_egress,
            StepKind::Verify => &self.verify_egress,
        };
        own.as_ref().unwrap_or(&self.egress)
    }

    /// It as a step has it.
    fn entered(&self, step: StepKind) -> Self {
        let mut layer = self.clone();
        let own = match step {
            StepKind::Setup => layer.setup_egress.take(),
            StepKind::Verify => layer.verify_egress.take(),
        };
        (layer.setup_egress, layer.verify_egress) = (None, None);
        if let Some(own) = own {
            (layer.egress, layer.egress_of) = (own, Some(step));
        }
        if step == StepKind::Verify {
            let with = |rule: &&mut HostRule| rule.credential.is_some();
            layer.egress.hosts.iter_mut().filter(with).for_each(HostRule::close);
        }
        layer
    }
}

impl Plan {
    /// The plan as the steps before the agent have it: what they may reach in place of what the agent may, and no
    /// more than the sets and hosts of `names`, where they are given.
    pub fn for_setup(&self, names: Option<&[String]>) -> Self {
        self.for_step(StepKind::Setup, names)
    }

    /// The same of the steps after it. No rule that adds a credential is open to them.
    pub fn for_verify(&self, names: Option<&[String]>) -> Self {
        self.for_step(StepKind::Verify, names)
    }

    fn for_step(&self, step: StepKind, names: Option<&[String]>) -> Self {
        let mut plan = self.clone();
        plan.layers = self.layers.iter().map(|layer| layer.entered(step)).collect();
        let own = names.and_then(|names| Some(job_layer(plan.layers.first()?, step, names)));
        plan.layers.extend(own);
        plan
    }

    /// Whether the cell of the agent has a way out: for the agent, or for the steps before it.
    pub fn cell_has_egress(&self) -> bool {
        let setup = self.layers.iter().all(|layer| !layer.egress_for(StepKind::Setup).is_empty());
        self.has_egress() || !self.layers.is_empty() && setup
    }

    /// Whether some host of it is looked into, so that the cell needs a certificate authority of its own.
    pub fn cell_inspects_egress(&self) -> bool {
        let inspects =
            |layer: &Layer| layer.egress.inspects() || layer.egress_for(StepKind::Setup).inspects();
        self.cell_has_egress() && self.layers.iter().any(inspects)
    }
}

/// What a job's own word leaves of its policy: a further layer, so that it can only take away.
fn job_layer(policy: &Layer, step: StepKind, names: &[String]) -> Layer {
    let every = || vec!["*".to_owned()];
    let mut hosts: Vec<HostRule> = Vec::new();
    for rule in names.iter().flat_map(|name| named(&policy.egress, name)) {
        if !hosts.contains(&rule) {
            hosts.push(rule);
        }
    }
    Layer {
        name: JOB.to_owned(),
        tools_allow: every(),
        models_allow: every(),
        egress: Egress { hosts, ..Egress::default() },
        egress_of: Some(step),
        requests: policy.requests.clone(),
        ..Layer::default()
    }
}

/// The rules that a name stands for: those of a set, or those that speak for a host, with its own name.
fn named(egress: &Egress, name: &str) -> Vec<HostRule> {
    let of_set: Vec<HostRule> =
        egress.hosts.iter().filter(|rule| rule.set.as_deref() == Some(name)).cloned().collect();
    let Ok(host) = Host::parse(name) else { return of_set };
    if !of_set.is_empty() {
        return of_set;
    }
    let narrowed = |rule: &HostRule| {
        let speaks =
            |port: &u16| egress.speaking(&host, *port).iter().any(|other| std::ptr::eq(*other, rule));
        let ports: Vec<u16> = rule.ports.iter().copied().filter(speaks).collect();
        (!ports.is_empty()).then(|| HostRule { name: host.to_string(), ports, ..rule.clone() })
    };
    egress.hosts.iter().filter_map(narrowed).collect()
}

/// Holds the names of a step's `egress` in a job against its plan: each must be a set or a host that is open to it.
///
/// # Errors
/// [`NarrowError`] with the key, the name and what is open.
pub fn check_step_egress(plan: &Plan, step: StepKind, names: &[String]) -> Result<(), NarrowError> {
    let layers: Vec<Layer> = plan.layers.iter().map(|layer| layer.entered(step)).collect();
    let Some((policy, others)) = layers.split_first() else { return Ok(()) };
    for (index, name) in names.iter().enumerate() {
        let refused = |allowed: String| NarrowError {
            key: format!("{step}.egress[{index}]"),
            asked: name.clone(),
            policy: plan.policy.clone(),
            allowed,
        };
        let rules: Vec<HostRule> =
            named(&policy.egress, name).into_iter().filter(|rule| !rule.is_closed()).collect();
        if rules.is_empty() {
            return Err(refused(format!("{} opens {}", policy.egress_key(), opened(&policy.egress))));
        }
        let meets = |layer: &&Layer| !rules.iter().any(|rule| layer.egress.meets(rule));
        if let Some(own) = others.iter().find(meets) {
            let opened = opened(&own.egress);
            return Err(refused(format!("narrowed by your own file {} to {opened}", own.name)));
        }
    }
    Ok(())
}

/// Names of what a table opens.
fn opened(egress: &Egress) -> String {
    let mut names: Vec<&str> = Vec::new();
    for rule in egress.hosts.iter().filter(|rule| !rule.is_closed()) {
        let name = rule.set.as_deref().unwrap_or(&rule.name);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests;
