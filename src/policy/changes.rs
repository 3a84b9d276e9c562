//! `[changes]`: which kinds of change a policy lets pass, flags for a person's word, or refuses. Pure.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::change::Flag;

/// The policy's word on changes. A kind that no list names keeps its default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Changes {
    /// Kinds that are applied like any other change.
    pub plain: Vec<Flag>,
    /// Kinds that are applied only when somebody says so.
    pub flagged: Vec<Flag>,
    /// Kinds that are never applied.
    pub refused: Vec<Flag>,
}
