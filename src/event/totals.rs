//! What is known of a job at its end: figures of its money, its cell, its change set and its way out. Facts only; who
//! measures them says so.

use serde::{Deserialize, Serialize};

use super::{Decision, Line};
use crate::change::{Quarantined, Summary};
use crate::job::spec::Runtime;
use crate::money::MicroUsd;
use crate::pricing::Usage;

/// Bytes that a job exchanged with hosts beside its model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct EgressBytes {
    /// Left its cells, over the network.
    pub bytes_up: u64,
    /// Came to them, over the network.
    pub bytes_down: u64,
    /// Came to them from the package cache.
    pub cached_bytes: u64,
}

/// Totals of one job.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Totals {
    /// What the ledger charged, in micro-USD.
    #[schemars(with = "u64")]
    pub charged_micro_usd: MicroUsd,
    /// The CLI's own figure, in micro-USD (advice; the ledger is the truth).
    #[schemars(with = "Option<u64>")]
    pub cli_micro_usd: Option<MicroUsd>,
    /// Messages of the model (distinct ids, subagents not counted).
    pub turns: u64,
    /// Tokens as the provider billed them.
    pub usage: Usage,
    /// Requests that reached the provider.
    pub requests: u64,
    /// Tool calls judged.
    pub tool_calls: u64,
    /// Tool calls denied.
    pub tool_denials: u64,
    /// Most memory the cell used, in bytes.
    pub peak_memory_bytes: u64,
    /// CPU time of the cell, in microseconds.
    pub cpu_us: u64,
    /// What isolated the cell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<Runtime>,
    /// Length of the report that was kept, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report_bytes: Option<u64>,
    /// What it changed in its workspace, where that was a copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<Summary>,
    /// What it left in a directory that it worked on in place, and would be obeyed there: set aside.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quarantined: Vec<Quarantined>,
    /// What became of its verification, where it has one and came to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verified>,
    /// Bytes to and from hosts beside its model.
    #[serde(default)]
    pub egress: EgressBytes,
    /// What it ran on and how long each part took.
    #[serde(default)]
    pub ran: Ran,
}

/// What became of a job's verification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Verified {
    /// Whether every command ended well, the last time.
    pub passed: bool,
    /// How often the agent was given another try.
    pub repairs: u32,
}

/// What a job ran on, how long each part took, and what it reached: read from its journal when it ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct Ran {
    /// The image's digest, as the engine names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The version of the agent's CLI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// Milliseconds in each state, by its name: `queued`, `preparing`, `running`, `parked`, …
    pub phases_ms: std::collections::BTreeMap<String, u64>,
    /// Connections and requests to hosts beside the model, allowed and denied.
    pub egress_allowed: u64,
    /// See `egress_allowed`.
    pub egress_denied: u64,
    /// Bytes that left the cell for them.
    pub egress_bytes_up: u64,
    /// Bytes that came from them.
    pub egress_bytes_down: u64,
    /// Bytes that came from the package cache in their place.
    pub egress_cached_bytes: u64,
}

impl Ran {
    /// The sums of its way out.
    pub fn egress(&self) -> EgressBytes {
        EgressBytes {
            bytes_up: self.egress_bytes_up,
            bytes_down: self.egress_bytes_down,
            cached_bytes: self.egress_cached_bytes,
        }
    }

    /// Takes one event of the journal; `last` is the state before it and since when.
    pub fn take(&mut self, line: &Line<'_>, last: &mut Option<(String, u64)>) {
        match line.kind {
            "state" => {
                if let Some((name, since_ms)) = last.take() {
                    *self.phases_ms.entry(name).or_default() += line.at_ms.saturating_sub(since_ms);
                }
                *last = line.state.as_deref().map(|name| (name.to_owned(), line.at_ms));
            }
            "cell" => {
                self.image = line.image.as_deref().map(str::to_owned);
                self.agent = line.agent.as_deref().map(str::to_owned);
            }
            "egress" => {
                match line.decision {
                    Some(Decision::Deny) => self.egress_denied += 1,
                    Some(Decision::Allow | Decision::Rewrite) | None => self.egress_allowed += 1,
                }
                self.egress_bytes_up = self.egress_bytes_up.saturating_add(line.bytes_up);
                self.egress_bytes_down = self.egress_bytes_down.saturating_add(line.bytes_down);
                self.egress_cached_bytes = self.egress_cached_bytes.saturating_add(line.cached_bytes);
            }
            _ => {}
        }
    }
}
