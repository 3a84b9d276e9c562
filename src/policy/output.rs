//! What comes out of a job beside its events: a policy's `[output]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What comes out of a job.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Output {}

impl Output {
    /// Key and problem of the first thing that cannot be.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        Ok(())
    }
}
