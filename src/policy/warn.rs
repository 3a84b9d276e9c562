//! What in a policy file can have no effect: names that nothing has, rules that no call can reach or fit, settings
//! that nothing asks for. Worth a look and no error: another version of the CLI may have other tools.

use super::file::Policy;
use super::matches;
use super::narrow::ENV_RESERVED;
use super::narrowing::Narrowing;
use super::rule::{Action, Rule, When, star_matches};
use crate::agent::tools::BUILT_IN_TOOLS;
use crate::job::spec::WorkspaceMode;

/// A key, and what to look at there.
type Warning = (String, String);

/// What in a policy can have no effect.
pub(super) fn policy(policy: &Policy) -> Vec<Warning> {
    let mut found = tools(&policy.tools.allow, &policy.tools.deny);
    found.extend(env(&policy.env.allow));
    found.extend(writable(Some(&policy.workspace.modes), policy.workspace.writable.is_some()));
    found.extend(rules(&policy.rules, &policy.tools.allow, &policy.tools.deny));
    found.extend(policy.egress.warnings("egress"));
    found.extend(
        [("setup", &policy.setup), ("verify", &policy.verify)]
            .iter()
            .flat_map(|(key, step)| step.warnings(key)),
    );
    found
}

/// The same of a user's own file.
pub(super) fn narrowing(own: &Narrowing) -> Vec<Warning> {
    let every = ["*".to_owned()];
    let lists = own.tools.as_ref();
    let (allow, deny) = (lists.map_or(&every[..], |t| &t.allow), lists.map_or(&[][..], |t| &t.deny));
    let mut found = tools(allow, deny);
    found.extend(env(own.env.as_ref().map_or(&[][..], |env| &env.allow)));
    found.extend(writable(own.workspace.modes.as_deref(), own.workspace.writable.is_some()));
    found.extend(rules(&own.rules, allow, deny));
    found.extend(own.egress.iter().flat_map(|egress| egress.warnings("egress")));
    found.extend(
        [("setup", &own.setup), ("verify", &own.verify)].iter().flat_map(|(key, step)| step.warnings(key)),
    );
    found
}

fn tools(allow: &[String], deny: &[String]) -> Vec<Warning> {
    let mut found = Vec::new();
    for (key, list) in [("tools.allow", allow), ("tools.deny", deny)] {
        for (index, pattern) in list.iter().enumerate() {
            let words = if !is_known(pattern) {
                unknown(pattern)
            } else if key == "tools.deny" && !allow.iter().any(|a| overlaps(a, pattern)) {
                format!("{pattern} has no effect: tools.allow has none of it")
            } else if let Some(denied) = deny.iter().find(|d| key == "tools.allow" && covers(d, pattern)) {
                format!("{pattern} has no effect: tools.deny has {denied}")
            } else {
                continue;
            };
            found.push((format!("{key}[{index}]"), words));
        }
    }
    found
}

/// True for a name, or the beginning of one, that the CLI or an MCP server may have.
fn is_known(pattern: &str) -> bool {
    overlaps(pattern, "mcp__*") || BUILT_IN_TOOLS.iter().any(|tool| matches(pattern, tool))
}

fn unknown(pattern: &str) -> String {
    let close = |tool: &&&str| tool.eq_ignore_ascii_case(pattern);
    let meant = BUILT_IN_TOOLS.iter().find(close).map(|tool| format!(" (is {tool} meant?)"));
    format!(
        "{pattern} can never match: the CLI has no such tool, and those of MCP servers are mcp__server__tool{}",
        meant.unwrap_or_default()
    )
}

fn env(allow: &[String]) -> Vec<Warning> {
    let problem = |pattern: &String| {
        let name = pattern.strip_suffix('*').unwrap_or(pattern);
        let legal = name
            .bytes()
            .enumerate()
            .all(|(at, b)| b == b'_' || b.is_ascii_alphabetic() || (at > 0 && b.is_ascii_digit()));
        if !legal {
            return Some("names of variables have letters, digits and '_' only".to_owned());
        }
        let reserved = ENV_RESERVED.iter().find(|reserved| covers(reserved, pattern));
        reserved.map(|reserved| format!("{reserved} is the daemon's, whatever a policy says"))
    };
    let found = allow.iter().enumerate().filter_map(|(index, pattern)| {
        Some((format!("env.allow[{index}]"), format!("{pattern} can never match: {}", problem(pattern)?)))
    });
    found.collect()
}

fn writable(modes: Option<&[WorkspaceMode]>, given: bool) -> Option<Warning> {
    let never = modes.is_some_and(|modes| !modes.contains(&WorkspaceMode::Bind));
    let words = "has no effect: workspace.modes has no \"bind\", and nothing can be written in the others";
    (given && never).then(|| ("workspace.writable".to_owned(), words.to_owned()))
}

/// What makes rules pointless, in words.
fn rules(rules: &[Rule], allow: &[String], deny: &[String]) -> Vec<Warning> {
    let mut found = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let mut tell = |key: &str, words: String| found.push((format!("rule[{index}]{key}"), words));
        for (number, pattern) in rule.tool.iter().enumerate().filter(|(_, pattern)| !is_known(pattern)) {
            tell(&format!(".tool[{number}]"), unknown(pattern));
        }
        for words in alone(rule, allow, deny) {
            tell("", format!("can never fit: {words}"));
        }
        if let Some(earlier) = rules[..index].iter().position(|earlier| ends_all_of(earlier, rule)) {
            let name = rules[earlier].called(earlier);
            tell("", format!("can never fit: {name} decides every such call before"));
        }
    }
    found
}

/// Why a rule can never fit, whatever the others say.
fn alone(rule: &Rule, allow: &[String], deny: &[String]) -> Vec<&'static str> {
    let dead =
        |tool: &String| !allow.iter().any(|a| overlaps(a, tool)) || deny.iter().any(|d| covers(d, tool));
    let shells = |tool: &String| overlaps(tool, "Bash") || tool.starts_with("mcp__");
    let named = !rule.tool.is_empty();
    let mut found = Vec::new();
    if named && rule.tool.iter().all(dead) {
        found.push("tools.allow and tools.deny leave none of its tools");
    }
    if !rule.command.is_empty() && named && !rule.tool.iter().any(shells) {
        found.push("none of its tools has a command");
    }
    if !rule.path.is_empty() && named && rule.tool.iter().all(|tool| tool == "Bash") {
        found.push("a Bash call names no paths (use command)");
    }
    if !rule.path.is_empty() && rule.path.texts().iter().all(|path| !can_be_canonical(path)) {
        found.push("no canonical path has `//`, `.` or `..` in it");
    }
    found
}

/// True where every call that `later` could speak of is decided by `earlier`, as far as their patterns tell.
fn ends_all_of(earlier: &Rule, later: &Rule) -> bool {
    // An approval speaks of a call only where all its paths fit, everything else where one does.
    let (approves, needs_all) = match earlier.action {
        Action::Allow => (true, later.action == Action::Allow),
        Action::Deny => (false, true),
        Action::Rewrite | Action::Hook => return false,
    };
    let within = |own: &[String], theirs: &[String], wide: fn(&str, &str) -> bool| {
        own.is_empty()
            || !theirs.is_empty() && theirs.iter().all(|text| own.iter().any(|own| wide(own, text)))
    };
    let parts = earlier.path.is_empty() && earlier.command.is_empty() || !approves || needs_all;
    let input = |(field, own): (&String, &String)| {
        later.input.get(field).is_some_and(|theirs| star_matches(own, theirs))
    };
    later.when == When::Before
        && parts
        && within(&earlier.tool, &later.tool, covers)
        && within(earlier.path.texts(), later.path.texts(), path_covers)
        && within(&earlier.command, &later.command, star_matches)
        && earlier.input.iter().all(input)
}

/// True where every path that `glob` fits is surely one that `wide` fits.
fn path_covers(wide: &str, glob: &str) -> bool {
    let plain = |folder: &&str| !folder.contains(['*', '?', '[', ']', '{', '}', '\\']);
    let below = wide.strip_suffix("/**").filter(plain);
    wide == glob
        || below.is_some_and(|folder| {
            glob.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/') && rest.len() > 1)
        })
}

/// False for a glob of paths that no canonical path fits: links, `.` and `..` are resolved before it is asked.
fn can_be_canonical(glob: &str) -> bool {
    let mut parts = glob.split('/').skip(1);
    glob == "/" || !parts.any(|part| matches!(part, "" | "." | ".."))
}

/// True where every name that `pattern` fits is one that `wide` fits.
fn covers(wide: &str, pattern: &str) -> bool {
    match (wide.strip_suffix('*'), pattern.strip_suffix('*')) {
        (Some(wide), Some(narrow)) => narrow.starts_with(wide),
        (None, Some(_)) => false,
        (_, None) => matches(wide, pattern),
    }
}

fn overlaps(a: &str, b: &str) -> bool {
    covers(a, b) || covers(b, a)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> Vec<String> {
        let own = Narrowing::parse("n", text).unwrap_or_else(|error| panic!("{error}"));
        own.warnings().into_iter().map(|(key, words)| format!("{key} {words}")).collect()
    }

    #[test]
    fn rules_that_can_never_fit_are_told() {
        let file = "[tools]\ndeny = ['Web*']
            [[rule]]\ntool = 'Bash'\naction = 'allow'
            [[rule]]\ntool = 'Bash'\ncommand = 'rm *'\naction = 'deny'\nreason = 'no'
            [[rule]]\ntool = 'WebFetch'\naction = 'deny'\nreason = 'no'
            [[rule]]\ntool = 'Read'\ncommand = 'x'\naction = 'deny'\nreason = 'no'
            [[rule]]\ntool = 'Read'\npath = '/x'\naction = 'deny'\nreason = 'no'
            [[rule]]\ntool = 'Read'\npath = ['/a/../b', '/a//b']\naction = 'deny'\nreason = 'no'
            [[rule]]\ntool = 'Read'\npath = ['/', '/a/./b', '**/.env']\naction = 'deny'\nreason = 'no'";
        let told = told(file);
        let places: Vec<&str> = told.iter().filter_map(|t| t.split_once(' ').map(|(key, _)| key)).collect();
        assert_eq!(places, ["rule[1]", "rule[2]", "rule[3]", "rule[5]"], "{told:?}");
    }

    #[test]
    fn a_rule_behind_one_of_the_same_shape_is_told_and_a_narrower_one_before_it_is_not() {
        let pair = |first: &str, second: &str| {
            let rule = |text: &str| {
                let reason = if text.contains("'deny'") { "\nreason = 'no'" } else { "" };
                format!("[[rule]]\n{text}{reason}\n")
            };
            told(&(rule(first) + &rule(second)))
                .iter()
                .any(|words| words.starts_with("rule[1] can never fit: rule 1"))
        };
        let (deny, allow) = ("action = 'deny'", "action = 'allow'");
        for (first, second, shadowed) in [
            (
                format!("command = 'git *'\n{deny}"),
                format!("command = ['git push*', 'git *']\n{allow}"),
                true,
            ),
            (format!("command = 'git push*'\n{deny}"), format!("command = 'git *'\n{allow}"), false),
            // A command may have a part that the approval does not speak of.
            (format!("command = 'git *'\n{allow}"), format!("command = 'git push*'\n{deny}"), false),
            (format!("command = 'git *'\n{allow}"), format!("command = 'git push*'\n{allow}"), true),
            (
                format!("path = '/workspace/**'\n{deny}"),
                format!("tool = 'Read'\npath = '/workspace/src/*'\n{deny}"),
                true,
            ),
            (format!("path = '/workspace/*'\n{deny}"), format!("path = '/workspace/src/*'\n{deny}"), false),
            (format!("path = '/workspac/**'\n{deny}"), format!("path = '/workspace/src/*'\n{deny}"), false),
            (format!("tool = 'Read'\npath = '/a'\n{deny}"), format!("path = '/a'\n{deny}"), false),
            (
                format!("input = {{ a = '1*' }}\n{deny}"),
                format!("input = {{ a = '1', b = '2' }}\n{deny}"),
                true,
            ),
            (
                format!("input = {{ a = '1', b = '2' }}\n{deny}"),
                format!("input = {{ a = '1' }}\n{deny}"),
                false,
            ),
            (format!("command = 'x'\n{deny}"), format!("path = '/x'\n{deny}"), false),
        ] {
            assert_eq!(pair(&first, &second), shadowed, "{first}\n{second}");
        }
    }

    #[test]
    fn names_that_nothing_has_are_told() {
        let told = told(
            "[tools]\nallow = ['Read', 'Task*', 'bash', 'mcp__a__b', 'mcp_*', 'MultiEdit', 'WebFetch']
             deny = ['Web*', 'Todo*', 'Edit']
             [env]\nallow = ['CI', 'A-B', '1X', 'ANTHROPIC_MODEL', 'AWS_*', 'LD_PRELOAD*', 'A*']
             [workspace]\nmodes = ['read-only']\nwritable = ['src']
             [[rule]]\ntool = ['Read', 'LS']\naction = 'allow'",
        );
        let keys: Vec<&str> = told.iter().filter_map(|t| t.split_once(' ').map(|(key, _)| key)).collect();
        let wanted = [
            "tools.allow[2]",
            "tools.allow[5]",
            "tools.allow[6]",
            "tools.deny[1]",
            "tools.deny[2]",
            "env.allow[1]",
            "env.allow[2]",
            "env.allow[3]",
            "env.allow[4]",
            "env.allow[5]",
            "workspace.writable",
            "rule[0].tool[1]",
        ];
        assert_eq!(keys, wanted, "{told:#?}");
        assert!(told[0].contains("is Bash meant?"), "{}", told[0]);
    }

    #[test]
    fn nothing_is_told_of_the_shipped_policies() {
        for (name, text) in [
            ("default", include_str!("../../policies/default.toml")),
            ("untrusted", include_str!("../../policies/untrusted.toml")),
            ("review", include_str!("../../policies/review.toml")),
            ("refactor", include_str!("../../policies/refactor.toml")),
            ("trusted", include_str!("../../policies/trusted.toml")),
        ] {
            let told = Policy::parse(name, text).expect(name).warnings();
            assert!(told.is_empty(), "{name}: {told:?}");
        }
    }
}
