//! Rules on tool calls: what a `[[rule]]` of a policy says, and whether it speaks of a call. Pure. What a rule
//! compares is guidance and audit, not a wall: a shell can spell one thing in many ways. The wall is the cell.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::globs::{Globs, glob};
use super::matches;

/// Most rules of one policy.
pub const RULES_MAX: usize = 256;
/// Most patterns of all rules of one policy together: tools, paths, commands and fields of inputs.
pub const RULE_PATTERNS_MAX: usize = 1024;
/// Longest pattern of a rule, and longest name of a field, in bytes.
pub const RULE_PATTERN_BYTES_MAX: usize = 1024;
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
    #[serde(default, deserialize_with = "one_or_many")]
    #[schemars(with = "OneOrMany")]
    pub tool: Vec<String>,
    /// Globs of absolute paths in the cell: `*` within one name, `**` over many. Compared with the paths that the
    /// call names, with symbolic links followed. `deny`, `rewrite` and `hook` fit where one path fits, `allow`
    /// only where all do.
    #[serde(default)]
    #[schemars(with = "OneOrMany")]
    pub path: Globs,
    /// Patterns of a shell command: `*` stands for any text. Compared with the whole command and with each part
    /// between `;`, `&`, `|` and line feeds. `allow` fits only where every part does.
    #[serde(default, deserialize_with = "one_or_many")]
    #[schemars(with = "OneOrMany")]
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

/// Whether a shell command, or a part of it, is what the CLI's own pattern `Bash(…)` means: the words themselves, with
/// `*` for any text; `git push:*` and `git push *` also mean `git push` alone.
pub(super) fn command_fits(pattern: &str, input: &Value) -> bool {
    let Some(command) = input.get("command").and_then(Value::as_str) else { return false };
    let patterns = match pattern.strip_suffix(":*").or_else(|| pattern.strip_suffix(" *")) {
        Some(words) => vec![words.to_owned(), format!("{words} *")],
        None => vec![pattern.to_owned()],
    };
    commands_fit(&patterns, command, false)
}

fn commands_fit(patterns: &[String], command: &str, all: bool) -> bool {
    let fits = |text: &str| patterns.iter().any(|pattern| star_matches(pattern, text));
    let mut parts = parts(command);
    if all { parts.all(fits) } else { fits(command.trim()) || parts.any(fits) }
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

/// A text or a list of texts.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

pub(super) fn one_or_many<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    Ok(match OneOrMany::deserialize(from)? {
        OneOrMany::One(text) => vec![text],
        OneOrMany::Many(list) => list,
    })
}

impl Rule {
    /// What it is called where it has no name: its place, counted from 1.
    pub fn called(&self, index: usize) -> String {
        if self.name.is_empty() { format!("rule {}", index + 1) } else { self.name.clone() }
    }

    /// True where it is about this tool and its paths have to be known to say more.
    pub(super) fn wants_paths(&self, tool: &str) -> bool {
        !self.path.is_empty() && self.names(tool)
    }

    fn names(&self, tool: &str) -> bool {
        self.tool.is_empty() || self.tool.iter().any(|pattern| matches(pattern, tool))
    }

    /// Whether it speaks of a call. `paths` are those that the call names, canonical.
    pub(super) fn fits(&self, tool: &str, input: &Value, paths: &[String]) -> bool {
        let all = self.action == Action::Allow;
        self.names(tool)
            && (self.path.is_empty() || self.paths_fit(paths, all))
            && (self.command.is_empty() || self.command_fits(input, all))
            && self.input.iter().all(|(field, pattern)| {
                let value = field_of(input, field).map(shown);
                value.is_some_and(|text| star_matches(pattern, &text))
            })
    }

    fn paths_fit(&self, paths: &[String], all: bool) -> bool {
        let fits = |path: &String| self.path.fit(path);
        if all { !paths.is_empty() && paths.iter().all(fits) } else { paths.iter().any(fits) }
    }

    fn command_fits(&self, input: &Value, all: bool) -> bool {
        let Some(command) = input.get("command").and_then(Value::as_str) else { return false };
        commands_fit(&self.command, command, all)
    }

    /// The input after a `rewrite`.
    pub(super) fn rewritten(&self, input: &Value) -> Value {
        let mut new = input.clone();
        for (field, value) in &self.set {
            let value = match value {
                Value::String(text) => Value::String(filled(text, input)),
                other => other.clone(),
            };
            put(&mut new, field, value);
        }
        new
    }

    /// Key and problem of the first thing that cannot be.
    pub(super) fn check_all(rules: &[Self]) -> Result<(), (String, String)> {
        if rules.len() > RULES_MAX {
            return Err(("rule".into(), format!("{} rules; at most {RULES_MAX} are read", rules.len())));
        }
        let mut patterns = 0;
        for (index, rule) in rules.iter().enumerate() {
            // Before anything is compiled.
            patterns += rule.patterns().count();
            if patterns > RULE_PATTERNS_MAX {
                let problem = format!(
                    "is one pattern too many: at most {RULE_PATTERNS_MAX} are read, of all rules together"
                );
                return Err((format!("rule[{index}]"), problem));
            }
            rule.check().map_err(|(key, problem)| {
                let place = format!("rule[{index}]");
                (if key.is_empty() { place } else { format!("{place}.{key}") }, problem)
            })?;
            if let Some(earlier) =
                rules[..index].iter().position(|r| !r.name.is_empty() && r.name == rule.name)
            {
                let problem = format!("{:?} is also the name of rule {}", rule.name, earlier + 1);
                return Err((format!("rule[{index}].name"), problem));
            }
        }
        Ok(())
    }

    /// Every pattern with its key.
    fn patterns(&self) -> impl Iterator<Item = (String, &str)> {
        let lists = [("tool", &self.tool[..]), ("path", self.path.texts()), ("command", &self.command[..])];
        let listed = lists.into_iter().flat_map(|(key, list)| {
            list.iter().enumerate().map(move |(index, text)| (format!("{key}[{index}]"), text.as_str()))
        });
        let fields = self.input.iter().flat_map(|(field, text)| {
            let key = if field.len() > RULE_PATTERN_BYTES_MAX {
                "input".to_owned()
            } else {
                format!("input.{field}")
            };
            [(key.clone(), field.as_str()), (key, text.as_str())]
        });
        listed.chain(fields)
    }

    fn check(&self) -> Result<(), (String, String)> {
        let wrong = |key: &str, problem: &str| Err((key.to_owned(), problem.to_owned()));
        if let Some((key, long)) = self.patterns().find(|(_, text)| text.len() > RULE_PATTERN_BYTES_MAX) {
            let problem = format!("has {} bytes; at most {RULE_PATTERN_BYTES_MAX} are read", long.len());
            return wrong(&key, &problem);
        }
        for (index, pattern) in self.tool.iter().enumerate() {
            if !super::is_pattern(pattern) {
                return wrong(&format!("tool[{index}]"), "a '*' may stand only at the end of a tool's name");
            }
            if pattern.contains(['(', ')']) {
                let problem = "names tools only: what a call does is said by command, path or input";
                return wrong(&format!("tool[{index}]"), problem);
            }
        }
        for (index, pattern) in self.path.texts().iter().enumerate() {
            let key = format!("path[{index}]");
            if !pattern.starts_with('/') && !pattern.starts_with("**") {
                return wrong(
                    &key,
                    "must begin with '/' (paths in the cell are absolute: the workspace is /workspace) or with '**'",
                );
            }
            if let Err(error) = glob(pattern) {
                return wrong(&key, &format!("is no glob: {error}"));
            }
        }
        if self.command.iter().any(|c| c.is_empty()) {
            return wrong("command", "holds an empty pattern, which fits nothing");
        }
        if self.timeout_s == 0 || self.timeout_s > HOOK_TIMEOUT_S_MAX {
            return wrong("timeout_s", &format!("must be from 1 to {HOOK_TIMEOUT_S_MAX}"));
        }
        let only = |key: &str, here: bool, action: &str| {
            if here { wrong(key, &format!("belongs to action = {action:?} only")) } else { Ok(()) }
        };
        if self.action != Action::Rewrite {
            only("set", !self.set.is_empty(), "rewrite")?;
        }
        if self.action != Action::Hook {
            only("run", !self.run.is_empty(), "hook")?;
            only("when", self.when == When::After, "hook")?;
        }
        match self.action {
            Action::Rewrite if self.set.is_empty() => {
                wrong("set", "is missing: what shall the input become?")
            }
            Action::Hook if self.run.is_empty() => wrong("run", "is missing: which program shall be asked?"),
            Action::Hook if !self.run[0].is_absolute() => wrong("run[0]", "must be an absolute path"),
            Action::Deny if self.reason.is_empty() => {
                wrong("reason", "is missing: the agent has to read why it was denied")
            }
            Action::Allow | Action::Deny | Action::Rewrite | Action::Hook => Ok(()),
        }
    }
}

/// The parts of a shell command between `;`, `&`, `|` and line feeds, as far as they can be told by looking: quotes
/// are not read, so a part may be cut where none is.
fn parts(command: &str) -> impl Iterator<Item = &str> {
    command.split([';', '&', '|', '\n']).map(str::trim).filter(|part| !part.is_empty())
}

/// `*` in `pattern` stands for any text, everything else for itself.
pub fn star_matches(pattern: &str, text: &str) -> bool {
    let mut pieces = pattern.split('*');
    let Some(rest) = pieces.next().and_then(|first| text.strip_prefix(first)) else { return false };
    if !pattern.contains('*') {
        return rest.is_empty();
    }
    let mut rest = rest;
    let mut pieces = pieces.peekable();
    while let Some(piece) = pieces.next() {
        if pieces.peek().is_none() {
            return rest.ends_with(piece);
        }
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.is_empty()
}

/// A field of an input by its dotted name.
pub(super) fn field_of<'v>(input: &'v Value, field: &str) -> Option<&'v Value> {
    field.split('.').try_fold(input, |value, name| match value {
        Value::Object(map) => map.get(name),
        Value::Array(list) => list.get(name.parse::<usize>().ok()?),
        _ => None,
    })
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn put(input: &mut Value, field: &str, value: Value) {
    let (mut place, mut names) = (input, field.split('.').peekable());
    while let Some(name) = names.next() {
        if !place.is_object() {
            *place = Value::Object(serde_json::Map::new());
        }
        let Value::Object(map) = place else { return };
        if names.peek().is_none() {
            map.insert(name.to_owned(), value);
            return;
        }
        place = map.entry(name).or_insert(Value::Null);
    }
}

/// `{name}` replaced by the field of that name; a brace that names no field stays as it is.
fn filled(text: &str, input: &Value) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(open) = rest.find('{') {
        out.push_str(&rest[..open]);
        rest = &rest[open..];
        let field = rest.find('}').map(|close| (&rest[1..close], close));
        match field.and_then(|(name, close)| Some((field_of(input, name)?, close))) {
            Some((value, close)) => {
                out.push_str(&shown(value));
                rest = &rest[close + 1..];
            }
            None => {
                out.push('{');
                rest = &rest[1..];
            }
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn rule(text: &str) -> Rule {
        toml::from_str(text).expect("rule")
    }

    #[test]
    fn a_denial_fits_one_part_of_a_command_and_an_approval_needs_all() {
        let deny = rule("tool = 'Bash'\ncommand = 'git push*'\naction = 'deny'\nreason = 'no'");
        let bash = |command: &str| json!({ "command": command });
        for command in ["git push", "git push -f", "ls && git push origin", "ls;git push", "ls\ngit push|cat"]
        {
            assert!(deny.fits("Bash", &bash(command), &[]), "{command}");
        }
        assert!(!deny.fits("Bash", &bash("git pull"), &[]));
        assert!(!deny.fits("Read", &bash("git push"), &[]));
        let allow = rule("tool = ['Bash']\ncommand = ['ls*', 'git status']\naction = 'allow'");
        assert!(allow.fits("Bash", &bash("ls -l | ls"), &[]));
        assert!(!allow.fits("Bash", &bash("ls; rm -rf /"), &[]));
    }

    #[test]
    fn a_denial_fits_one_path_and_an_approval_needs_all() {
        let paths = |list: &[&str]| list.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
        let both = paths(&["/workspace/src/a.rs", "/etc/passwd"]);
        let deny = rule("path = '/etc/**'\naction = 'deny'\nreason = 'no'");
        assert!(deny.fits("Read", &json!({}), &both));
        assert!(!deny.fits("Read", &json!({}), &paths(&["/workspace/etc/x"])));
        let allow = rule("path = '/workspace/**'\naction = 'allow'");
        assert!(!allow.fits("Read", &json!({}), &both));
        assert!(allow.fits("Read", &json!({}), &both[..1]));
        assert!(!allow.fits("Bash", &json!({}), &[]), "a call without paths is not within them");
        let one_level = rule("path = '/workspace/*'\naction = 'deny'\nreason = 'no'");
        assert!(!one_level.fits("Read", &json!({}), &both));
    }

    #[test]
    fn fields_are_compared_and_rewritten_by_their_names() {
        let rule = rule(
            "input = { 'options.level' = '3' }\naction = 'rewrite'\nset = { command = 'timeout 5 sh -c {command} {x', 'options.level' = 1 }",
        );
        let input = json!({ "command": "ls", "options": { "level": 3 } });
        assert!(rule.fits("Any", &input, &[]));
        assert!(!rule.fits("Any", &json!({ "options": {} }), &[]));
        assert_eq!(
            rule.rewritten(&input),
            json!({ "command": "timeout 5 sh -c ls {x", "options": { "level": 1 } })
        );
    }

    #[test]
    fn what_cannot_be_is_named_by_its_place() {
        let error = |text: &str| Rule::check_all(&[rule(text)]).expect_err("refused");
        assert_eq!(error("action = 'deny'").0, "rule[0].reason");
        assert_eq!(error("action = 'hook'").0, "rule[0].run");
        assert_eq!(error("action = 'hook'\nrun = ['x']").0, "rule[0].run[0]");
        assert_eq!(error("action = 'allow'\npath = 'src/**'").0, "rule[0].path[0]");
        assert_eq!(error("action = 'allow'\npath = '/[a'").0, "rule[0].path[0]");
        assert_eq!(error("action = 'allow'\nset = { a = 1 }").0, "rule[0].set");
        assert_eq!(error("action = 'allow'\ntimeout_s = 0").0, "rule[0].timeout_s");
        let twins = [rule("name = 'a'\naction = 'allow'"), rule("name = 'a'\naction = 'allow'")];
        assert_eq!(Rule::check_all(&twins).expect_err("twins").0, "rule[1].name");
    }

    #[test]
    fn patterns_are_bounded_in_number_and_length() {
        let paths = |count: usize| {
            let list = (0..count).map(|n| format!("'/{n}/**'")).collect::<Vec<_>>().join(", ");
            rule(&format!("path = [{list}]\naction = 'allow'"))
        };
        assert_eq!(Rule::check_all(&[paths(RULE_PATTERNS_MAX)]), Ok(()));
        for many in [vec![paths(RULE_PATTERNS_MAX + 1)], vec![paths(1), paths(RULE_PATTERNS_MAX)]] {
            let (key, problem) = Rule::check_all(&many).expect_err("too many");
            assert_eq!(key, format!("rule[{}]", many.len() - 1));
            assert!(problem.contains(&RULE_PATTERNS_MAX.to_string()), "{problem}");
        }
        let long = "a".repeat(RULE_PATTERN_BYTES_MAX);
        for (key, at) in [("tool", "tool[0]"), ("path", "path[0]"), ("command", "command[0]")] {
            let with =
                |text: String| Rule::check_all(&[rule(&format!("{key} = '{text}'\naction = 'allow'"))]);
            assert_eq!(with(format!("/{}", &long[1..])), Ok(()), "{key}");
            let (named, problem) = with(format!("/{long}")).expect_err(key);
            assert_eq!(named, format!("rule[0].{at}"));
            assert!(problem.contains("1025 bytes; at most 1024"), "{problem}");
        }
        let input =
            |text: String| Rule::check_all(&[rule(&format!("input = {{ {text} }}\naction = 'allow'"))]);
        assert_eq!(input(format!("a = 'x{long}'")).expect_err("pattern").0, "rule[0].input.a");
        assert_eq!(input(format!("x{long} = 'a'")).expect_err("field").0, "rule[0].input");
    }

    proptest! {
        #[test]
        fn stars_stand_for_any_text(parts in proptest::collection::vec("[ab]{0,3}", 1..5), between in "[abc]{0,3}") {
            let pattern = parts.join("*");
            prop_assert!(star_matches(&pattern, &parts.join(&between)) || parts.len() == 1);
            prop_assert!(!star_matches(&pattern, "zzz") || pattern.chars().all(|c| c == '*') && !pattern.is_empty());
        }

        #[test]
        fn no_input_panics(pattern in ".{0,20}", text in ".{0,20}", field in "[a.0{}]{0,8}") {
            let _ = star_matches(&pattern, &text);
            let mut value = serde_json::json!({ "a": [1, { "a": "x" }] });
            let _ = filled(&text, &value);
            put(&mut value, &field, serde_json::json!(1));
        }
    }
}
