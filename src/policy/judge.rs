//! Whether a tool call may run, and with which input. A pure function of the stored plan, the call and what was
//! found out about it so far: where it needs to know more (where a path really leads, what a hook says) it says so
//! and is asked again. The gate, the audit and `hotcell policy explain` all ask this one function.
//!
//! *Invariant*: a call runs only where every layer of the plan allows it, with the input that the last of them saw.
//! What is not known denies: a path that cannot be followed, a hook that failed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::decide::{Denial, Permit, permit};
use super::matches;
use super::narrow::{Layer, Plan};
use super::rule::{Action, Rule, When, command_fits};

/// Where the agent works, in the cell.
const WORKSPACE: &str = "/workspace";
/// Fields of an input that name a path.
const PATH_FIELDS: [&str; 3] = ["file_path", "notebook_path", "path"];
/// Tools that look below the workspace where they name no path.
const SEARCH_TOOLS: [&str; 3] = ["Glob", "Grep", "LS"];
/// Longest reason of a hook that an agent reads, in characters.
const REASON_CHARS_MAX: usize = 4000;

/// A tool call as the CLI tells it.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// The tool's name, `mcp__server__tool` for MCP.
    pub tool: &'a str,
    /// Its input.
    pub input: &'a Value,
}

/// Names a hook within a plan: the layer and the rule, counted from 0.
pub type HookId = (usize, usize);

/// What was found out about a call.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Findings {
    /// Paths as the call names them → where they lead; `None` where they cannot be followed.
    pub paths: BTreeMap<String, Option<String>>,
    /// What hooks said.
    pub hooks: BTreeMap<HookId, HookAnswer>,
    /// Where the cell sees its workspace, where that is not `/workspace`: paths that are not absolute begin there. In
    /// rules, and in what is found out about paths, it is `/workspace` all the same.
    pub workspace: Option<String>,
}

/// What a hook said.
#[derive(Debug, Clone, PartialEq)]
pub enum HookAnswer {
    /// It has nothing against it; with another input where one is given.
    Pass(Option<Value>),
    /// It denies.
    Deny(String),
    /// It failed, hung or talked nonsense: that denies too.
    Failed(String),
}

/// What has to be found out.
#[derive(Debug, Clone, PartialEq)]
pub enum Need {
    /// Where these paths lead.
    Paths(Vec<String>),
    /// What a hook says.
    Hook(Hook),
}

/// A program to be asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Hook {
    /// Which one.
    pub id: HookId,
    /// Its rule's name.
    pub name: String,
    /// Program and arguments.
    pub run: Vec<PathBuf>,
    /// Longest run, in seconds.
    pub timeout_s: u32,
    /// The input as earlier rules left it.
    pub input: Value,
}

/// The answer.
#[derive(Debug, Clone)]
pub enum Judgement {
    /// It may run, with another input where one is given.
    Allow {
        /// The policy's word.
        permit: Permit,
        /// The input it has to run with, where that is not its own.
        input: Option<Value>,
    },
    /// It may not.
    Deny(Denial),
    /// Ask again when this is known.
    Need(Need),
}

/// One step of a judgement, for `explain`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Step {
    /// The file.
    pub layer: String,
    /// The rule, or the key.
    pub rule: String,
    /// What it said.
    pub said: String,
}

/// Judges a call before it runs.
pub fn judge(plan: &Plan, call: Call<'_>, found: &Findings) -> Judgement {
    judge_traced(plan, call, found, &mut |_| {})
}

/// The same, telling each step.
pub fn judge_traced(plan: &Plan, call: Call<'_>, found: &Findings, tell: &mut dyn FnMut(Step)) -> Judgement {
    if plan.layers.is_empty() {
        return Judgement::Deny(Denial { rule: "layers".into(), reason: "the job has no policy".into() });
    }
    let mut input: Option<Value> = None;
    let mut word: Option<String> = None;
    if let Some(denial) = refused_by_job(plan, call) {
        tell(Step { layer: "job".into(), rule: denial.rule.clone(), said: "denies".into() });
        return Judgement::Deny(denial);
    }
    // From the last to the first: what a narrowing makes of the input is judged by the policy, which has the last
    // word. A policy's own rewriting is not judged again by what narrows it.
    for (index, layer) in plan.layers.iter().enumerate().rev() {
        let mut step = |rule: &str, said: &str| {
            tell(Step { layer: layer.name.clone(), rule: rule.to_owned(), said: said.to_owned() });
        };
        let listed = match lists(plan, layer, call.tool) {
            Ok(listed) => listed,
            Err(denial) => {
                step(&denial.rule, "denies");
                return Judgement::Deny(denial);
            }
        };
        step(&listed, "allows the tool");
        let judged = rules(index, layer, call, &mut input, found, &mut step);
        match judged {
            Ok(decided) => word = word.or(Some(decided.unwrap_or(listed))),
            Err(End::Deny(denial)) => return Judgement::Deny(denial),
            Err(End::Need(need)) => return Judgement::Need(need),
        }
    }
    let last = Call { tool: call.tool, input: input.as_ref().unwrap_or(call.input) };
    if let Some(denial) = refused_by_job(plan, last) {
        tell(Step { layer: "job".into(), rule: denial.rule.clone(), said: "denies".into() });
        return Judgement::Deny(denial);
    }
    Judgement::Allow { permit: permit(word.unwrap_or_default()), input }
}

/// Which hooks have to be asked after a call, in order; the first denial is told to the agent.
pub fn judge_after(plan: &Plan, call: Call<'_>, found: &Findings) -> Judgement {
    let mut word = "no rule".to_owned();
    for (index, layer) in plan.layers.iter().enumerate() {
        for (number, rule) in layer.rules.iter().enumerate().filter(|(_, r)| r.when == When::After) {
            let paths = match paths_of(rule, layer, number, call.tool, call.input, found) {
                Ok(paths) => paths,
                Err(End::Deny(denial)) => return Judgement::Deny(denial),
                Err(End::Need(need)) => return Judgement::Need(need),
            };
            if !rule.fits(call.tool, call.input, &paths) {
                continue;
            }
            let name = rule.called(number);
            match found.hooks.get(&(index, number)) {
                None => return Judgement::Need(hook(index, number, rule, call.input)),
                Some(HookAnswer::Pass(_)) => word = name,
                Some(HookAnswer::Deny(why) | HookAnswer::Failed(why)) => {
                    return Judgement::Deny(Denial { rule: name, reason: why.clone() });
                }
            }
        }
    }
    Judgement::Allow { permit: permit(word), input: None }
}

/// True where some rule has to be asked after calls.
pub fn asks_after(plan: &Plan) -> bool {
    plan.layers.iter().flat_map(|layer| &layer.rules).any(|rule| rule.when == When::After)
}

/// Whether one layer's lists, and the job's own, have the tool.
fn lists(plan: &Plan, layer: &Layer, tool: &str) -> Result<String, Denial> {
    let refuse = |rule: String, reason: String| Err(denial(layer, rule, &reason));
    if let Some(pattern) = layer.tools_deny.iter().find(|p| matches(p, tool)) {
        return refuse(format!("tools.deny {pattern}"), format!("the tool {tool} is not allowed"));
    }
    if let Some(list) = &plan.tools
        && !tool.starts_with("mcp__")
        && !list.iter().any(|name| name == tool)
    {
        return refuse("job tools".into(), format!("the job's tools do not include {tool}"));
    }
    match layer.tools_allow.iter().find(|p| matches(p, tool)) {
        Some(pattern) => Ok(format!("tools.allow {pattern}")),
        None => refuse("tools.allow".into(), format!("{tool} is not in tools.allow")),
    }
}

/// What the job itself refuses: asked of the call as it came, and as rules left it.
fn refused_by_job(plan: &Plan, call: Call<'_>) -> Option<Denial> {
    let pattern = plan.disallowed_tools.iter().find(|p| refuses(p, call))?;
    let rule = format!("job disallowed_tools {pattern}");
    Some(Denial { reason: format!("the job refuses {} (rule {rule})", call.tool), rule })
}

/// Whether an entry of `disallowed_tools` speaks of a call: a tool, or `Bash(…)` with a command's pattern. The CLI has
/// these too, but where every call asks the daemon it does not look at patterns of commands. Those of paths it does
/// look at in every mode, before it asks.
fn refuses(entry: &str, call: Call<'_>) -> bool {
    match entry.split_once('(').map(|(tool, rest)| (tool, rest.strip_suffix(')').unwrap_or(rest))) {
        None => matches(entry, call.tool),
        Some(("Bash", pattern)) if call.tool == "Bash" => command_fits(pattern, call.input),
        Some(_) => false,
    }
}

/// Why the reading of rules ended.
enum End {
    Deny(Denial),
    Need(Need),
}

/// Reads one layer's rules; gives the rule that decided, where one did. Rewrites go into `input`.
fn rules(
    index: usize,
    layer: &Layer,
    call: Call<'_>,
    input: &mut Option<Value>,
    found: &Findings,
    step: &mut dyn FnMut(&str, &str),
) -> Result<Option<String>, End> {
    for (number, rule) in layer.rules.iter().enumerate().filter(|(_, r)| r.when == When::Before) {
        let current = input.as_ref().unwrap_or(call.input);
        let paths = paths_of(rule, layer, number, call.tool, current, found)?;
        let name = rule.called(number);
        if !rule.fits(call.tool, current, &paths) {
            step(&name, "does not fit");
            continue;
        }
        match rule.action {
            Action::Allow => {
                step(&name, "allows");
                return Ok(Some(name));
            }
            Action::Deny => {
                step(&name, "denies");
                return Err(End::Deny(denial(layer, name, &rule.reason)));
            }
            Action::Rewrite => {
                step(&name, "rewrites the input");
                *input = Some(rule.rewritten(current));
            }
            Action::Hook => match found.hooks.get(&(index, number)) {
                None => {
                    step(&name, "asks its program");
                    return Err(End::Need(hook(index, number, rule, current)));
                }
                Some(HookAnswer::Pass(new)) => {
                    step(&name, "its program has nothing against it");
                    if let Some(new) = new {
                        *input = Some(new.clone());
                    }
                }
                Some(HookAnswer::Deny(why)) => {
                    step(&name, "its program denies");
                    return Err(End::Deny(denial(layer, name, &cut(why))));
                }
                Some(HookAnswer::Failed(why)) => {
                    step(&name, "its program failed, which denies");
                    let words = format!("the hook of this rule failed, so the call is denied: {}", cut(why));
                    return Err(End::Deny(denial(layer, name, &words)));
                }
            },
        }
    }
    Ok(None)
}

fn hook(index: usize, number: usize, rule: &Rule, input: &Value) -> Need {
    Need::Hook(Hook {
        id: (index, number),
        name: rule.called(number),
        run: rule.run.clone(),
        timeout_s: rule.timeout_s,
        input: input.clone(),
    })
}

fn denial(layer: &Layer, rule: String, reason: &str) -> Denial {
    Denial { reason: format!("{reason} (policy {}, rule {rule})", layer.name), rule }
}

fn cut(text: &str) -> String {
    text.chars().take(REASON_CHARS_MAX).collect()
}

/// The canonical paths that a rule has to compare.
fn paths_of(
    rule: &Rule,
    layer: &Layer,
    number: usize,
    tool: &str,
    input: &Value,
    found: &Findings,
) -> Result<Vec<String>, End> {
    if !rule.wants_paths(tool) {
        return Ok(Vec::new());
    }
    let named = named_paths(tool, input, found.workspace.as_deref().unwrap_or(WORKSPACE));
    let unknown: Vec<String> = named.iter().filter(|p| !found.paths.contains_key(*p)).cloned().collect();
    if !unknown.is_empty() {
        return Err(End::Need(Need::Paths(unknown)));
    }
    let mut paths = Vec::new();
    for path in named {
        match found.paths.get(&path).cloned().flatten() {
            Some(canonical) => paths.push(canonical),
            None => {
                let words = format!("the path {:?} cannot be followed", cut(&path));
                return Err(End::Deny(denial(layer, rule.called(number), &words)));
            }
        }
    }
    Ok(paths)
}

/// The paths that a call names, absolute, otherwise as they stand.
fn named_paths(tool: &str, input: &Value, at: &str) -> Vec<String> {
    let absolute = |path: &str| absolute(path, at);
    let mut paths: Vec<String> =
        PATH_FIELDS.iter().filter_map(|field| input.get(field)?.as_str()).map(absolute).collect();
    if SEARCH_TOOLS.contains(&tool) {
        if paths.is_empty() {
            paths.push(at.to_owned());
        }
        // A pattern may lead elsewhere by itself.
        let pattern = input.get("pattern").and_then(Value::as_str).unwrap_or_default();
        if tool == "Glob" && (pattern.starts_with('/') || pattern.contains("..")) {
            let plain = pattern.split(['*', '?', '[', '{']).next().unwrap_or_default();
            let base = if pattern.starts_with('/') { String::new() } else { format!("{}/", paths[0]) };
            paths.push(absolute(&format!("{base}{plain}")));
        }
    }
    paths
}

fn absolute(path: &str, at: &str) -> String {
    match path.strip_prefix("~") {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => format!("/home/agent{rest}"),
        _ if path.starts_with('/') => path.to_owned(),
        _ => format!("{at}/{path}"),
    }
}

/// What a hook reads on its standard input: as Claude Code's own hooks do.
pub fn hook_input(
    event: &str,
    call: Call<'_>,
    tool_use_id: &str,
    (mode, cwd): (&str, &str),
    response: Option<&Value>,
) -> Value {
    let mut value = json!({
        "session_id": "", "transcript_path": "", "cwd": cwd, "permission_mode": mode,
        "hook_event_name": event, "tool_name": call.tool, "tool_input": call.input, "tool_use_id": tool_use_id,
    });
    if let Some(response) = response {
        value["tool_response"] = response.clone();
    }
    value
}

/// What a hook's exit status and output mean: as for Claude Code's own hooks, but every failure denies.
pub fn hook_answer(code: i32, stdout: &[u8], stderr: &[u8]) -> HookAnswer {
    let words = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match code {
        0 => {}
        2 => {
            let why = words(stderr);
            return HookAnswer::Deny(if why.is_empty() { "denied by a hook".into() } else { why });
        }
        code => return HookAnswer::Failed(format!("it ended with code {code}: {}", words(stderr))),
    }
    let text = words(stdout);
    if text.is_empty() {
        return HookAnswer::Pass(None);
    }
    let Ok(Value::Object(said)) = serde_json::from_str::<Value>(&text) else {
        return HookAnswer::Failed("its output is no JSON object".into());
    };
    let said = Value::Object(said);
    let specific = &said["hookSpecificOutput"];
    let reason = [&specific["permissionDecisionReason"], &said["reason"], &said["stopReason"]];
    let reason = reason.into_iter().find_map(Value::as_str).unwrap_or("denied by a hook").to_owned();
    if said["continue"] == json!(false) {
        return HookAnswer::Deny(reason);
    }
    let decision = [&specific["permissionDecision"], &said["decision"]].into_iter().find(|v| !v.is_null());
    match decision.map(|v| v.as_str().unwrap_or_default()) {
        None | Some("allow" | "approve") => match &specific["updatedInput"] {
            Value::Null => HookAnswer::Pass(None),
            input @ Value::Object(_) => HookAnswer::Pass(Some(input.clone())),
            _ => HookAnswer::Failed("its updatedInput is no object".into()),
        },
        Some("deny" | "block") => HookAnswer::Deny(reason),
        Some("ask") => {
            HookAnswer::Deny(format!("{reason} (a hook wants a person to be asked, and there is none)"))
        }
        Some(other) => HookAnswer::Failed(format!("its decision {other:?} is none")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobSpec;
    use crate::policy::{Defaults, Policy, narrow};
    use proptest::prelude::*;

    fn plan(rules: &str) -> Plan {
        let text = format!("{}\n{rules}", include_str!("../../policies/trusted.toml"));
        let policy = Policy::parse("test", &text).expect("policy");
        let defaults = Defaults {
            model: "claude-sonnet-4-6".into(),
            image: "hotcell/cell".into(),
            provider: "anthropic".into(),
        };
        narrow(&JobSpec::parse(br#"{"prompt":"x"}"#).expect("spec"), &policy, None, &defaults).expect("plan")
    }

    fn call<'a>(tool: &'a str, input: &'a Value) -> Call<'a> {
        Call { tool, input }
    }

    fn paths(list: &[(&str, Option<&str>)]) -> Findings {
        let paths = list.iter().map(|(raw, to)| ((*raw).to_owned(), to.map(str::to_owned))).collect();
        Findings { paths, ..Findings::default() }
    }

    #[test]
    fn a_path_is_compared_where_it_leads_and_one_that_cannot_be_followed_denies() {
        let plan = plan("[[rule]]\npath = '/etc/**'\naction = 'deny'\nreason = 'secrets'");
        let input = json!({ "file_path": "link" });
        let Judgement::Need(Need::Paths(asked)) = judge(&plan, call("Read", &input), &Findings::default())
        else {
            panic!("a path is needed");
        };
        assert_eq!(asked, ["/workspace/link"]);
        let to = |target| paths(&[("/workspace/link", target)]);
        assert!(matches!(judge(&plan, call("Read", &input), &to(Some("/etc/shadow"))), Judgement::Deny(_)));
        assert!(matches!(judge(&plan, call("Read", &input), &to(None)), Judgement::Deny(_)));
        assert!(matches!(
            judge(&plan, call("Read", &input), &to(Some("/workspace/a"))),
            Judgement::Allow { .. }
        ));
        // A call without paths needs none.
        let command = json!({ "command": "cat link" });
        let free = judge(&plan, call("Bash", &command), &Findings::default());
        assert!(matches!(free, Judgement::Allow { .. }));
    }

    #[test]
    fn a_pattern_that_leads_elsewhere_is_a_path_too() {
        assert_eq!(
            named_paths("Glob", &json!({ "pattern": "/etc/*.conf" }), WORKSPACE),
            ["/workspace", "/etc/"]
        );
        assert_eq!(
            named_paths("Glob", &json!({ "pattern": "../../x*" }), WORKSPACE),
            ["/workspace", "/workspace/../../x"]
        );
        assert_eq!(named_paths("Grep", &json!({ "pattern": "/etc" }), WORKSPACE), ["/workspace"]);
        assert_eq!(named_paths("Read", &json!({ "file_path": "~/x" }), WORKSPACE), ["/home/agent/x"]);
        assert_eq!(
            named_paths("Read", &json!({ "file_path": "../x" }), "/home/ann/app"),
            ["/home/ann/app/../x"]
        );
        assert_eq!(named_paths("Grep", &json!({ "pattern": "x" }), "/home/ann/app"), ["/home/ann/app"]);
    }

    #[test]
    fn rules_see_the_input_that_earlier_ones_left() {
        let plan = plan(
            "[[rule]]\ntool = 'Bash'\naction = 'rewrite'\nset = { command = 'nice {command}' }\n\
             [[rule]]\ntool = 'Bash'\ncommand = 'nice rm*'\naction = 'deny'\nreason = 'no'",
        );
        let input = json!({ "command": "rm x" });
        assert!(matches!(judge(&plan, call("Bash", &input), &Findings::default()), Judgement::Deny(_)));
        let input = json!({ "command": "ls" });
        let Judgement::Allow { input, .. } = judge(&plan, call("Bash", &input), &Findings::default()) else {
            panic!("allowed");
        };
        assert_eq!(input, Some(json!({ "command": "nice ls" })));
    }

    #[test]
    fn a_command_that_the_job_refuses_is_refused_by_the_judge_too() {
        let mut plan = plan("");
        plan.disallowed_tools =
            ["Bash(git push:*)", "Bash(rm *)", "Bash(make all)", "Read(x)", "Glo*"].map(str::to_owned).into();
        let refused = |tool: &str, command: &str| {
            let input = json!({ "command": command });
            matches!(judge(&plan, call(tool, &input), &Findings::default()), Judgement::Deny(_))
        };
        for command in ["git push", "git push origin", "cd x && git push", "rm", "rm -r x", "make all"] {
            assert!(refused("Bash", command), "{command}");
        }
        for command in ["git pushed", "git status", "rmdir x", "make", "make all-of-it", ""] {
            assert!(!refused("Bash", command), "{command}");
        }
        assert!(refused("Glob", "") && !refused("Grep", "rm x"));
        // The CLI looks at patterns of paths itself.
        assert!(!refused("Read", "x"));
    }

    #[test]
    fn a_hook_decides_only_by_what_it_says() {
        let plan = plan("[[rule]]\ntool = 'Bash'\naction = 'hook'\nrun = ['/bin/check']");
        let input = json!({ "command": "ls" });
        let with = |answer: Option<HookAnswer>| {
            let hooks = answer.map(|a| ((0, 0), a)).into_iter().collect();
            judge(&plan, call("Bash", &input), &Findings { hooks, ..Findings::default() })
        };
        assert!(matches!(with(None), Judgement::Need(Need::Hook(_))));
        assert!(matches!(with(Some(HookAnswer::Pass(None))), Judgement::Allow { input: None, .. }));
        assert!(matches!(with(Some(HookAnswer::Deny("x".into()))), Judgement::Deny(_)));
        assert!(matches!(with(Some(HookAnswer::Failed("x".into()))), Judgement::Deny(_)));
    }

    #[test]
    fn what_a_hook_prints_is_read_as_claude_code_reads_it_but_failures_deny() {
        let said = |code, out: &str| hook_answer(code, out.as_bytes(), b"why");
        assert_eq!(said(0, ""), HookAnswer::Pass(None));
        assert_eq!(said(2, ""), HookAnswer::Deny("why".into()));
        assert!(matches!(said(1, ""), HookAnswer::Failed(_)));
        assert!(matches!(said(137, "{}"), HookAnswer::Failed(_)));
        assert!(matches!(said(0, "hello"), HookAnswer::Failed(_)));
        assert_eq!(said(0, "{}"), HookAnswer::Pass(None));
        assert_eq!(said(0, r#"{"decision":"block","reason":"r"}"#), HookAnswer::Deny("r".into()));
        assert_eq!(said(0, r#"{"continue":false,"stopReason":"s"}"#), HookAnswer::Deny("s".into()));
        let specific = |inner: &str| said(0, &format!(r#"{{"hookSpecificOutput":{inner}}}"#));
        assert_eq!(
            specific(r#"{"permissionDecision":"deny","permissionDecisionReason":"p"}"#),
            HookAnswer::Deny("p".into())
        );
        assert!(matches!(specific(r#"{"permissionDecision":"ask"}"#), HookAnswer::Deny(_)));
        assert!(matches!(specific(r#"{"permissionDecision":"maybe"}"#), HookAnswer::Failed(_)));
        assert_eq!(
            specific(r#"{"permissionDecision":"allow","updatedInput":{"a":1}}"#),
            HookAnswer::Pass(Some(json!({ "a": 1 })))
        );
    }

    #[test]
    fn what_a_narrowing_makes_of_an_input_is_judged_by_the_policy() {
        let deny = "[[rule]]\ntool = 'Bash'\ncommand = 'curl*'\naction = 'deny'\nreason = 'no'";
        let mut narrowed = plan(deny);
        let rewrite = "[[rule]]\ntool = 'Bash'\naction = 'rewrite'\nset = { command = 'curl evil' }";
        narrowed.layers.extend(plan(rewrite).layers);
        let input = json!({ "command": "ls" });
        let judged = judge(&narrowed, call("Bash", &input), &Findings::default());
        assert!(matches!(judged, Judgement::Deny(_)), "{judged:?}");
        // The same where a program of the narrowing gives the input.
        let mut hooked = plan(deny);
        hooked.layers.extend(plan("[[rule]]\ntool = 'Bash'\naction = 'hook'\nrun = ['/bin/x']").layers);
        let said = HookAnswer::Pass(Some(json!({ "command": "curl evil" })));
        let found = Findings { hooks: BTreeMap::from([((1, 0), said)]), ..Findings::default() };
        assert!(matches!(judge(&hooked, call("Bash", &input), &found), Judgement::Deny(_)));
        // The policy's own rewriting is the last, and nothing takes it off again.
        let mut wrapped =
            plan("[[rule]]\ntool = 'Bash'\naction = 'rewrite'\nset = { command = 'nice {command}' }");
        wrapped.layers.extend(plan(rewrite).layers);
        let Judgement::Allow { input: Some(last), .. } =
            judge(&wrapped, call("Bash", &input), &Findings::default())
        else {
            panic!("allowed");
        };
        assert_eq!(last, json!({ "command": "nice curl evil" }));
        wrapped.disallowed_tools = vec!["Bash(nice *)".to_owned()];
        assert!(matches!(judge(&wrapped, call("Bash", &input), &Findings::default()), Judgement::Deny(_)));
    }

    proptest! {
        #[test]
        fn a_denial_of_any_layer_holds(first in 0usize..3, second in 0usize..3, command in "[a-c]{1,3}") {
            let rules = [
                "",
                "[[rule]]\ntool = 'Bash'\ncommand = 'a*'\naction = 'deny'\nreason = 'no'",
                "[[rule]]\ntool = 'Bash'\naction = 'allow'",
            ];
            let mut both = plan(rules[first]);
            both.layers.extend(plan(rules[second]).layers);
            let input = json!({ "command": command });
            let denies = |at: usize| at == 1 && command.starts_with('a');
            let allowed = matches!(judge(&both, call("Bash", &input), &Findings::default()), Judgement::Allow { .. });
            prop_assert_eq!(allowed, !denies(first) && !denies(second));
        }

        #[test]
        fn no_output_of_a_hook_panics(code in any::<i32>(), out in ".{0,40}") {
            let _ = hook_answer(code, out.as_bytes(), out.as_bytes());
        }
    }
}
