//! How the CLI is started in a cell: its arguments and its whole environment, from the plan. The flags
//! that make the gate hold are here and in no other place; each says why.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::provider::ProviderView;
use super::surroundings;
use crate::job::spec::PermissionMode;
use crate::policy::requests::web_search_uses_max;
use crate::policy::{Plan, judge};

/// Where the CLI is mounted in a cell.
pub const CLI_PATH: &str = "/.hotcell-agent/claude";
/// Port on the cell's loopback where init answers for the model API.
pub const MODEL_PORT: u16 = 3129;
/// HOME of the agent.
pub const HOME: &str = "/home/agent";
/// Where git in a cell finds its hooks: hotcell's, which call the repository's own.
pub const GIT_HOOKS: &str = "/.hotcell-git";
/// Where the workspace is mounted.
pub const WORKSPACE: &str = "/workspace";
/// Hook callback id of the gate in the modes that keep the CLI's own decisions.
pub const GATE_CALLBACK: &str = "hotcell-gate";
/// Hook callback id of what is asked after calls.
pub const AFTER_CALLBACK: &str = "hotcell-after";
/// How long the CLI waits for the gate's answer before it denies, in seconds. The daemon may be restarted
/// meanwhile; a pending callback is denied when it runs out and never allowed.
pub const GATE_TIMEOUT_S: u32 = 3600;

/// Hooks of settings and skills never run: a PermissionRequest hook would race the gate.
const MANAGED_SETTINGS: &str = r#"--managed-settings={"allowManagedHooksOnly":true}"#;

/// Nor does anything else that a repository names for the CLI itself to run: programs in its settings (the key
/// that such a helper gives would also go out beside the job's own), and shell commands within the text of
/// its skills and commands, which no gate sees in the modes that ask. Nor does WebFetch ask its vendor's host
/// about every other one: which hosts are reached, egress decides. These win over the repository's; as
/// managed settings they are ignored (seen with 2.1.197).
const FLAG_SETTINGS: &str = r#"--settings={"apiKeyHelper":"","proxyAuthHelper":"","awsAuthRefresh":"","awsCredentialExport":"","gcpAuthRefresh":"","otelHeadersHelper":"","disableSkillShellExecution":true,"skipWebFetchPreflight":true}"#;

/// Tools that need a person, or a network that the cell does not have.
const REMOVED_TOOLS: [&str; 5] =
    ["AskUserQuestion", "EnterPlanMode", "ExitPlanMode", "WebSearch", "WebFetch"];

/// What no CLI of this plan has: WebFetch stays where egress allows some host, WebSearch where requests may hold it.
fn removed_tools(plan: &Plan) -> Vec<&'static str> {
    let stays = |tool: &str| match tool {
        "WebFetch" => plan.has_egress(),
        "WebSearch" => web_search_uses_max(&plan.layers).is_some(),
        _ => false,
    };
    REMOVED_TOOLS.into_iter().filter(|tool| !stays(tool)).collect()
}

/// Where below HOME the CLI keeps the record of a conversation in the directory `workspace` of its cell.
pub fn session_file(session_id: &str, workspace: &str) -> PathBuf {
    let project = workspace.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    PathBuf::from(format!(".claude/projects/{project}/{session_id}.jsonl"))
}

/// The CLI's arguments, its path first. `resumed`: the conversation is gone on with, from its record in HOME.
pub fn argv(plan: &Plan, session_id: &str, resumed: bool) -> Vec<String> {
    let mut argv: Vec<String> = [
        CLI_PATH,
        "-p",
        "--input-format=stream-json",
        "--output-format=stream-json",
        "--verbose",
        // Every transcript entry also comes on stdout, so that the journal holds the conversation.
        "--session-mirror",
        // Prompts of the CLI come to us as `can_use_tool`, which fails closed.
        "--permission-prompt-tool=stdio",
        // No MCP server of the repository starts by itself.
        "--strict-mcp-config",
        MANAGED_SETTINGS,
        FLAG_SETTINGS,
    ]
    .map(str::to_owned)
    .into();
    argv.push(format!("--permission-mode={}", plan.permission_mode.as_str()));
    // Never `user`: the agent can write its own HOME in mid-run.
    argv.push(format!("--setting-sources={}", if plan.project_settings { "project" } else { "" }));
    // With `--resume` alone the conversation keeps its id.
    argv.push(format!("{}={session_id}", if resumed { "--resume" } else { "--session-id" }));
    argv.push(format!("--model={}", plan.model));
    argv.push(format!("--max-turns={}", plan.limits.max_turns));
    if let Some(fallback) = &plan.fallback_model {
        argv.push(format!("--fallback-model={fallback}"));
    }
    if let Some(tools) = built_in_tools(plan) {
        argv.push(format!("--tools={}", tools.join(",")));
    }
    if !plan.allowed_tools.is_empty() {
        argv.push(format!("--allowedTools={}", plan.allowed_tools.join(",")));
    }
    let mut refused: Vec<&str> = removed_tools(plan);
    let denied = plan.layers.iter().flat_map(|layer| &layer.tools_deny);
    for name in denied.chain(&plan.disallowed_tools).map(String::as_str).filter(|p| !p.ends_with('*')) {
        if !refused.contains(&name) {
            refused.push(name);
        }
    }
    argv.push(format!("--disallowedTools={}", refused.join(",")));
    argv
}

/// The built-in tools that exist for the agent; `None` for all. A tool that no call of could be allowed is left out:
/// the model should not spend a turn on it.
fn built_in_tools(plan: &Plan) -> Option<Vec<String>> {
    let mut tools = plan.tools.clone();
    for layer in &plan.layers {
        let named = layer.tools_allow.iter().filter(|pattern| !pattern.starts_with("mcp__"));
        if named.clone().any(|pattern| pattern.ends_with('*')) {
            continue;
        }
        let named: Vec<String> = named.cloned().collect();
        tools = Some(match tools {
            Some(tools) => tools.into_iter().filter(|tool| named.contains(tool)).collect(),
            None => named,
        });
    }
    tools
}

/// The agent's whole environment but its way out; nothing of the daemon's is inherited, and of the image's no more than
/// [`surroundings`] lets through. `token` opens this cell's gateway socket and is worth nothing anywhere else; how it
/// stands there is `provider`'s.
pub fn environment(
    plan: &Plan,
    image: &[(String, String)],
    provider: &ProviderView,
    token: &str,
) -> BTreeMap<String, String> {
    let mut env = surroundings::defaults(plan, image);
    let path = env.remove("PATH").filter(|path| !path.is_empty());
    let path = path.as_deref().unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let path = format!("{path}:{HOME}/{}", surroundings::OWN_PROGRAMS);
    env.extend(plan.env.clone());
    for (name, value) in [
        ("PATH", path.as_str()),
        ("HOME", HOME),
        ("TMPDIR", "/tmp"),
        ("LANG", "C.UTF-8"),
        ("USER", "agent"),
        ("TERM", "dumb"),
    ] {
        env.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    }
    for (name, value) in [
        // Settings of the repository cannot redirect the provider.
        ("CLAUDE_CODE_PROVIDER_MANAGED_BY_HOST", "1"),
        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"),
        ("DISABLE_AUTOUPDATER", "1"),
        ("IS_SANDBOX", "1"),
        ("NO_PROXY", "127.0.0.1,localhost"),
        ("no_proxy", "127.0.0.1,localhost"),
        ("HOME", HOME),
    ] {
        env.insert(name.to_owned(), value.to_owned());
    }
    env.extend(provider.environment(token).into_iter().map(|(name, value)| (name.to_owned(), value)));
    env
}

/// The `initialize` request: system prompts, and the gate's callback in the modes that need it.
pub fn initialize(plan: &Plan, system_prompt: Option<&str>, append: &str) -> Value {
    let mut request = json!({ "subtype": "initialize" });
    if let Some(text) = system_prompt {
        request["systemPrompt"] = json!([text]);
    }
    if !append.is_empty() {
        request["appendSystemPrompt"] = json!(append);
    }
    let callback = |id: &str| json!([{ "hookCallbackIds": [id], "timeout": GATE_TIMEOUT_S }]);
    if plan.permission_mode != PermissionMode::BypassPermissions {
        request["hooks"]["PreToolUse"] = callback(GATE_CALLBACK);
    }
    if judge::asks_after(plan) {
        request["hooks"]["PostToolUse"] = callback(AFTER_CALLBACK);
    }
    request
}

/// The `apply_flag_settings` request: in `bypassPermissions` every call of every tool is asked for.
pub fn flag_settings(plan: &Plan) -> Value {
    let mut settings = json!({});
    if plan.permission_mode == PermissionMode::BypassPermissions {
        settings["permissions"] = json!({ "ask": ["*"] });
    }
    if let Some(effort) = plan.effort {
        settings["effortLevel"] = json!(effort.as_str());
    }
    json!({ "subtype": "apply_flag_settings", "settings": settings })
}
