//! What a job may do and spend. A policy is a TOML file that an operator writes ([`mod@file`]); a job's spec
//! is narrowed against it once, at submit, into a [`Plan`] that is stored with the job ([`narrow()`]); every
//! later question is answered from that plan alone ([`decide()`]), so a policy edited meanwhile changes
//! nothing for jobs already accepted.
//!
//! *Invariant*: a plan never allows more than its policy. Nothing here reads a file, a clock or the
//! environment, and nothing answers "yes" but by building a [`Permit`], which only this module can.

pub mod access;
pub mod changes;
pub mod decide;
pub mod egress;
pub mod error;
pub mod file;
pub mod globs;
pub mod judge;
pub mod narrow;
pub mod narrowing;
pub mod output;
mod place;
pub mod requests;
pub mod rule;
pub mod sets;
pub mod steps;
mod warn;
pub mod writable;

pub use access::{Access, AccessError, Grant};
pub use decide::{Ask, Denial, Permit, decide};
pub use egress::{Act, EgressAsk, Host, decide_egress};
pub use error::PolicyError;
pub use file::{Policy, Unpriced};
pub use narrow::{Defaults, Layer, NarrowError, Plan, PlanLimits, is_reserved_variable, narrow};
pub use narrowing::Narrowing;
pub use sets::{EgressSet, Sets};
pub use steps::{StepKind, check_step_egress};

/// True where a text is what [`matches`] takes: a name, or the beginning of one with a final `*`.
pub(crate) fn is_pattern(text: &str) -> bool {
    !text.is_empty() && !text.strip_suffix('*').unwrap_or(text).contains('*')
}

/// True when `name` is `pattern`, or begins with what stands before a final `*` in it.
pub fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => pattern == name,
    }
}
