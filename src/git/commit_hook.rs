//! What makes an agent's commits carry the submitter's identity and the job's name: variables of the cell, and a
//! directory of hooks that the cell cannot write. A repository's own hooks still run in the cell, after or before
//! ours. A courtesy for people who read the history, no wall: an agent can commit without it. Pure.

use super::identity::GitIdentity;
use crate::job::JobId;

/// The trailer's key.
pub const TRAILER: &str = "Hotcell-Job";

/// Every hook that git runs on the client's side (githooks(5)) and whose mere presence changes nothing.
const HOOKS: [&str; 20] = [
    "applypatch-msg",
    "pre-applypatch",
    "post-applypatch",
    "pre-commit",
    "pre-merge-commit",
    "prepare-commit-msg",
    "commit-msg",
    "post-commit",
    "pre-rebase",
    "post-checkout",
    "post-merge",
    "pre-push",
    "pre-receive",
    "update",
    "post-receive",
    "post-update",
    "reference-transaction",
    "pre-auto-gc",
    "post-rewrite",
    "post-index-change",
];

/// Runs the repository's hook of the same name, as git would have found it without us.
const CHAIN: &str = r#"#!/bin/sh
# Made by hotcell: the repository's own hook of this name still runs.
ours=${0%/*}
name=${0##*/}
own=$(GIT_CONFIG_COUNT=0; export GIT_CONFIG_COUNT; git rev-parse --git-path hooks 2>/dev/null) || own=
"#;
const CHAIN_END: &str = r#"
case $own in
'' | "$ours" | "$ours/") exit 0 ;;
esac
[ -x "$own/$name" ] && [ -f "$own/$name" ] || exit 0
exec "$own/$name" "$@"
"#;
const TRAIL: &str = r#"
case $own in
'' | "$ours" | "$ours/") ;;
*) if [ -x "$own/$name" ] && [ -f "$own/$name" ]; then "$own/$name" "$@" || exit $?; fi ;;
esac
# An empty message stays empty, so that git still refuses it.
said=
while IFS= read -r line || [ -n "$line" ]; do
    case $line in
    '' | '#'* | 'Signed-off-by:'*) ;;
    *) said=1; break ;;
    esac
done < "$1"
[ -n "$said" ] || exit 0
GIT_CONFIG_COUNT=0 git -c trailer.separators=: interpret-trailers --in-place \
    --if-exists addIfDifferent --trailer 'KEY: JOB' "$1" 2>/dev/null
exit 0
"#;

/// A file of the hooks' directory: its name, its permission bits, its text. To be owned by root, and read-only in the
/// cell.
pub fn hook_files(job: &JobId) -> Vec<(&'static str, u32, String)> {
    let file = |name: &'static str| {
        let end = match name {
            "prepare-commit-msg" | "commit-msg" => TRAIL.replace("KEY", TRAILER).replace("JOB", job.as_str()),
            _ => CHAIN_END.to_owned(),
        };
        (name, 0o755, format!("{CHAIN}{end}"))
    };
    HOOKS.into_iter().map(file).collect()
}

/// Variables of the cell: the submitter's identity, and settings above a repository's own. `hooks_dir` is where
/// [`hook_files`] lie in the cell.
pub fn cell_environment(identity: &GitIdentity, hooks_dir: &str) -> Vec<(String, String)> {
    let mut variables: Vec<(String, String)> = [
        ("GIT_AUTHOR_NAME", identity.name.as_str()),
        ("GIT_AUTHOR_EMAIL", &identity.email),
        ("GIT_COMMITTER_NAME", &identity.name),
        ("GIT_COMMITTER_EMAIL", &identity.email),
        ("GIT_TERMINAL_PROMPT", "0"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    let settings = [
        ("core.hooksPath", hooks_dir),
        // There is no key to sign with in a cell.
        ("commit.gpgSign", "false"),
        ("tag.gpgSign", "false"),
        // The workspace may belong to another id than the agent's.
        ("safe.directory", "*"),
    ];
    for (at, (key, value)) in settings.iter().enumerate() {
        variables.push((format!("GIT_CONFIG_KEY_{at}"), (*key).to_owned()));
        variables.push((format!("GIT_CONFIG_VALUE_{at}"), (*value).to_owned()));
    }
    variables.push(("GIT_CONFIG_COUNT".to_owned(), settings.len().to_string()));
    variables
}

#[cfg(test)]
#[path = "commit_hook/tests.rs"]
mod tests;
