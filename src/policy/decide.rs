//! The one place that says yes or no while a job runs; for tool calls it is [`super::judge`]. A pure function of the stored plan and the
//! question, so that `explain`, the audit and the real decision can never differ.
//!
//! *Invariant*: a [`Permit`] cannot be built outside this file:
//!
//! ```compile_fail
//! let forged = hotcell::policy::Permit { rule: "mine".into(), seal: () };
//! ```

use super::Plan;
use super::egress;
use super::matches;
use super::narrow::Layer;
use super::requests::{self, Part};

/// A question about a running job.
#[derive(Debug, Clone, Copy)]
pub enum Ask<'a> {
    /// May this model be asked, with the provider's credential?
    Model {
        /// The model's name as in the request.
        name: &'a str,
    },
    /// May a request for the model hold this?
    Request {
        /// The part in question.
        part: Part<'a>,
    },
    /// May this host be reached, and how?
    Egress(egress::EgressAsk<'a>),
}

/// Proof that the policy allowed something. Secrets are attached only against one.
#[derive(Debug, Clone)]
pub struct Permit {
    rule: String,
    // Keeps the struct from being built anywhere else.
    #[allow(dead_code)]
    seal: (),
}

impl Permit {
    /// The rule that allowed it, named as in the policy file.
    pub fn rule(&self) -> &str {
        &self.rule
    }
}

/// A refusal, with words for whoever asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Denial {
    /// The rule that refused it, named as in the policy file.
    pub rule: String,
    /// What the agent reads.
    pub reason: String,
}

/// Answers `ask` from the plan.
///
/// # Errors
/// [`Denial`] when no rule allows it; what no rule names is denied.
pub fn decide(plan: &Plan, ask: Ask<'_>) -> Result<Permit, Denial> {
    match ask {
        Ask::Model { name } => each(plan, |layer| allow(layer, &layer.models_allow, "models.allow", name)),
        Ask::Request { part } => each(plan, |layer| requests::decide(layer, part)),
        Ask::Egress(ask) => egress::decide_egress(&plan.layers, &ask).map(|terms| terms.permit),
    }
}

/// Every layer must allow it; the last one's permit stands for all.
fn each(plan: &Plan, ask: impl Fn(&Layer) -> Result<Permit, Denial>) -> Result<Permit, Denial> {
    let none = Err(Denial { rule: "layers".into(), reason: "the job has no policy".into() });
    plan.layers.iter().try_fold(none, |_, layer| Ok(Ok(ask(layer)?)))?
}

/// For the other files of the policy: what they allow, they allow here.
pub(super) fn permit(rule: String) -> Permit {
    Permit { rule, seal: () }
}

fn allow(layer: &Layer, patterns: &[String], key: &str, name: &str) -> Result<Permit, Denial> {
    match patterns.iter().find(|p| matches(p, name)) {
        Some(pattern) => Ok(permit(format!("{key} {pattern}"))),
        None => refuse(layer, key.to_owned(), format!("{name} is not in {key}")),
    }
}

fn refuse(layer: &Layer, rule: String, reason: String) -> Result<Permit, Denial> {
    let reason = format!("{reason} (policy {}, rule {rule})", layer.name);
    Err(Denial { rule, reason })
}
