//! What a cell may reach beside its model: hosts, ports, methods, paths. Pure: the rules as they stand in a
//! policy file, and the one function that answers whether something may be dialled. Never resolves a name.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a job may reach. Empty: nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Egress {}

impl Egress {
    /// Key and problem of the first thing that cannot be.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        Ok(())
    }
}
