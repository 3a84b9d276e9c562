//! Rules on tool calls: what a `[[rule]]` of a policy says, and whether it speaks of a call. Pure. What a rule
//! compares is guidance and audit, not a wall: a shell can spell one thing in many ways. The wall is the cell.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Most rules of one policy.
pub const RULES_MAX: usize = 256;
/// Longest run of a hook, in seconds.
pub const HOOK_TIMEOUT_S_MAX: u32 = 600;

/// One rule. Everything it names must fit for it to speak; what it leaves out fits always.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What it is called in the audit and in `explain`; its place in the file where absent.
    #[serde(default)]
    pub name: String,
    /// Tools: names, or beginnings of names with a final `*`. Empty: every tool.
    #[serde(default)]
    pub tool: Vec<String>,
    /// Globs of absolute paths in the cell: `*` within one name, `**` over many. Compared with the paths that the
    /// call names, with symbolic links followed. `deny`, `rewrite` and `hook` fit where one path fits, `allow`
    /// only where all do.
    #[serde(default)]
    pub path: Vec<String>,
    /// Patterns of a shell command: `*` stands for any text. Compared with the whole command and with each part
    /// between `;`, `&`, `|` and line feeds. `allow` fits only where every part does.
    #[serde(default)]
    pub command: Vec<String>,
    /// Any field of the input, with dots for nesting → a pattern with `*`.
    #[serde(default)]
    pub input: BTreeMap<String, String>,
    /// What it does.
    pub action: Action,
    /// What the agent reads when it is denied.
    #[serde(default)]
    pub reason: String,
    /// For `rewrite`: fields of the input → new values. `{name}` in a text stands for the field as it was.
    #[serde(default)]
    pub set: BTreeMap<String, Value>,
    /// For `hook`: program and arguments, run outside the cell as the submitting user.
    #[serde(default)]
    pub run: Vec<PathBuf>,
    /// For `hook`: before the call or after it.
    #[serde(default)]
    pub when: When,
    /// For `hook`: longest run, in seconds. A hook that takes longer denies.
    #[serde(default = "ten")]
    pub timeout_s: u32,
}

/// What a rule does with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// No further rule of this file is read.
    Allow,
    /// The call does not run; the agent reads the reason.
    Deny,
    /// The input is changed; later rules see the new one.
    Rewrite,
    /// A program is asked.
    Hook,
}

/// When a hook is asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum When {
    /// Before the call: it can deny it or change its input.
    #[default]
    Before,
    /// After it: it can tell the agent what is wrong with the result.
    After,
}

fn ten() -> u32 {
    10
}

impl Rule {
    /// Key and problem of the first thing that cannot be.
    pub(super) fn check_all(rules: &[Self]) -> Result<(), (String, String)> {
        if rules.len() > RULES_MAX {
            return Err(("rule".into(), format!("{} rules; at most {RULES_MAX} are read", rules.len())));
        }
        Ok(())
    }
}
