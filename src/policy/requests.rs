//! What a request for the model may hold beside text: tools that the provider runs, remote sources, beta
//! features. Pure: the keys of a policy's `[requests]` and what they mean.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What requests may hold. Empty: what the CLI itself sends.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Requests {}

impl Requests {
    /// Key and problem of the first thing that cannot be.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        Ok(())
    }
}
