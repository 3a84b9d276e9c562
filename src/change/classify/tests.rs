//! The tables, row by row; contents and kinds.

use proptest::prelude::*;

use super::super::{Raw, Special};
use super::*;

fn path(text: impl Into<Vec<u8>>) -> TreePath {
    TreePath::new(text).expect("a path")
}

fn file(mode: u32, bytes: u64) -> Node {
    Node::File { mode, bytes, blob: None }
}

fn link(target: &[u8]) -> Node {
    Node::Symlink { target: Raw(target.to_vec()) }
}

fn of(
    at: &TreePath,
    before: Option<&Node>,
    after: Option<&Node>,
    before_head: &[u8],
    head: &[u8],
) -> Vec<Flag> {
    flags(&Facts { path: at, before, after, before_head, head, large_bytes: 1000 })
}

fn of_name(name: impl Into<Vec<u8>>) -> Vec<Flag> {
    of(&path(name), None, Some(&file(0o644, 0)), b"", b"")
}

#[test]
fn names_that_something_obeys_are_flagged_at_any_depth_and_in_any_case() {
    use Flag::{AgentSettings, Ci, Editor, Package, Shell, Submodule};
    for (flag, names) in [
        (
            Ci,
            &[
                ".github/workflows/ci.yml",
                ".gitlab-ci.yml",
                ".circleci/config.yml",
                "Jenkinsfile",
                ".travis.yml",
                "azure-pipelines.yml",
                ".drone.yml",
                ".buildkite/pipeline.yml",
                ".woodpecker/x.yml",
                "bitbucket-pipelines.yml",
                ".pre-commit-config.yaml",
                ".husky/pre-commit",
                ".github/CODEOWNERS",
                ".forgejo/workflows/a.yaml",
                "cloudbuild.yaml",
                "appveyor.yml",
                ".github/actions/x/action.yml",
            ][..],
        ),
        (
            AgentSettings,
            &[
                ".claude/settings.json",
                ".claude/settings.local.json",
                ".claude/hooks/x.sh",
                ".mcp.json",
                "CLAUDE.md",
                "CLAUDE.local.md",
                "AGENTS.md",
                "GEMINI.md",
                ".cursor/rules/x.mdc",
                ".cursorrules",
                ".codex/config.toml",
                ".gemini/settings.json",
                ".github/copilot-instructions.md",
                ".github/instructions/a.instructions.md",
                ".windsurfrules",
                ".clinerules/x.md",
                ".roo/rules/x.md",
                ".kiro/steering/x.md",
                ".aider.conf.yml",
                ".continue/config.yaml",
                "opencode.json",
                ".junie/guidelines.md",
            ],
        ),
        (
            Editor,
            &[
                ".vscode/tasks.json",
                ".vscode/launch.json",
                "x.code-workspace",
                ".idea/workspace.xml",
                ".zed/tasks.json",
                ".exrc",
                ".nvim.lua",
                ".devcontainer/devcontainer.json",
                ".dir-locals.el",
                ".gdbinit",
                ".vs/tasks.vs.json",
                ".vimrc",
            ],
        ),
        (
            Shell,
            &[
                ".envrc",
                ".mise.toml",
                "mise.local.toml",
                ".bashrc",
                ".profile",
                ".zshenv",
                "shell.nix",
                ".npmrc",
            ],
        ),
        (
            Package,
            &[
                "package.json",
                "package-lock.json",
                "yarn.lock",
                "pnpm-lock.yaml",
                "Cargo.toml",
                "Cargo.lock",
                "build.rs",
                ".cargo/config.toml",
                "go.mod",
                "go.sum",
                "setup.py",
                "pyproject.toml",
                "requirements-dev.txt",
                "Pipfile.lock",
                "poetry.lock",
                "uv.lock",
                "Gemfile",
                "Makefile",
                "makefile.inc",
                "GNUmakefile",
                "CMakeLists.txt",
                "build.gradle.kts",
                "gradlew",
                "pom.xml",
                "composer.json",
                "Dockerfile",
                "docker-compose.yml",
                "conftest.py",
                "webpack.config.js",
                "x.csproj",
                "evil.pth",
            ],
        ),
        (Submodule, &[".gitmodules", ".gitattributes", ".lfsconfig"]),
    ] {
        for name in names {
            for place in [(*name).to_owned(), format!("a/b/{name}"), name.to_uppercase()] {
                assert!(of_name(place.as_str()).contains(&flag), "{place}: {:?}", of_name(place.as_str()));
            }
        }
    }
}

#[test]
fn ordinary_names_are_plain() {
    for name in [
        "src/main.rs",
        "README.md",
        "claude.rs",
        "docs/agents.rst",
        ".editorconfig",
        ".tool-versions",
        ".gitignore",
        "github/workflows/x.yml",
        "x.claude/y",
        "vscode/tasks.json",
        "src/package.rs",
        "lib/build/x.c",
        "a.lock",
        "envrc",
        "profile",
        "test/x.json",
        ".gitkeep",
        "git/config",
        "hooks/pre-commit",
        "config",
        "foo.git/HEAD",
        "gitx",
        ".gitx",
        ".git.x",
        "git~10",
    ] {
        assert_eq!(of_name(name), [], "{name}");
    }
    assert_eq!(of_name(&b"\xff\xfe.rs"[..]), []);
    // One path, several reasons.
    assert_eq!(of_name(".github/copilot-instructions.md"), [Flag::Ci, Flag::AgentSettings]);
}

#[test]
fn where_git_looks_is_known() {
    use GitPlace::{Disguised, Inside, Outside, Runs, Top};
    for (name, place) in [
        (".git", Top),
        ("sub/.git", Top),
        (".git/index", Inside),
        (".git/refs/heads/hooks", Inside),
        (".git/objects/ab/cd", Inside),
        (".git/hooks/pre-commit", Runs),
        (".git/hooks", Runs),
        (".git/config", Runs),
        (".git/config.worktree", Runs),
        (".git/info/attributes", Runs),
        (".git/info/exclude", Inside),
        (".git/commondir", Runs),
        (".git/modules/x/hooks/post-checkout", Runs),
        (".git/modules/a/b/config", Runs),
        (".git/worktrees/w/gitdir", Runs),
        (".git/worktrees/w/HEAD", Inside),
        (".git/objects/info/alternates", Runs),
        ("n/.git/hooks/x", Runs),
        ("src", Outside),
        (".gitignore", Outside),
        ("a.git", Outside),
        (".GIT", Disguised),
        (".Git/config", Disguised),
        ("x/.giT/y", Disguised),
        (".git ", Disguised),
        (".git.", Disguised),
        (".git. . ", Disguised),
        (".git::$INDEX_ALLOCATION", Disguised),
        (".git:x", Disguised),
        ("git~1", Disguised),
        ("GIT~1/config", Disguised),
        ("git~1.", Disguised),
        (".g\u{200c}it", Disguised),
        (".gi\u{feff}T/x", Disguised),
        ("\u{206a}.git", Disguised),
        ("a\\.git\\config", Disguised),
        (".git\\config", Disguised),
        ("git~2", Outside),
        (".gitt", Outside),
        (". git", Outside),
    ] {
        assert_eq!(git_place(&path(name)), place, "{name:?}");
    }
}

#[test]
fn a_git_directory_is_flagged_where_it_appears_goes_or_changes_its_kind() {
    let (dir, pointer) = (Node::Dir { mode: 0o755 }, file(0o644, 20));
    let of_git = |before, after| of(&path("sub/.git"), before, after, b"", b"");
    assert_eq!(of_git(None, Some(&dir)), [Flag::Git]);
    assert_eq!(of_git(Some(&dir), None), [Flag::Git]);
    assert_eq!(of_git(Some(&dir), Some(&pointer)), [Flag::Git]);
    assert_eq!(of_git(Some(&pointer), Some(&pointer)), [Flag::Git]);
    assert_eq!(of_git(Some(&dir), Some(&Node::Dir { mode: 0o700 })), []);
    assert!(of(&path(".git/refs"), None, Some(&link(b"../x")), b"", b"").contains(&Flag::Git));
    assert_eq!(of_name(".git/index"), []);
}

#[test]
fn links_are_judged_by_where_their_text_leads() {
    use Flag::{Git, SymlinkInside, SymlinkOutside};
    for (at, target, expected) in [
        ("l", "file", &[SymlinkInside][..]),
        ("l", "a/b/c", &[SymlinkInside]),
        ("a/l", "../b", &[SymlinkInside]),
        ("a/l", "..", &[SymlinkInside]),
        ("a/b/l", "../../c", &[SymlinkInside]),
        ("l", ".", &[SymlinkInside]),
        ("l", "./x//y/", &[SymlinkInside]),
        ("l", "..", &[SymlinkOutside]),
        ("l", "/etc/passwd", &[SymlinkOutside]),
        ("a/l", "../../x", &[SymlinkOutside]),
        ("l", "../ws/x", &[SymlinkOutside]),
        ("a/b/l", "d/../x", &[SymlinkOutside]),
        ("l", "/workspace/x", &[SymlinkOutside]),
        ("l", "//x", &[SymlinkOutside]),
        ("l", "/proc/self/root", &[SymlinkOutside]),
        ("l", ".git/hooks", &[SymlinkInside, Git]),
        ("a/l", "../.git/config", &[SymlinkInside, Git]),
        ("l", ".GIT", &[SymlinkInside, Git]),
    ] {
        let mut expected = expected.to_vec();
        expected.sort_unstable();
        assert_eq!(
            of(&path(at), None, Some(&link(target.as_bytes())), b"", b""),
            expected,
            "{at} -> {target}"
        );
    }
    assert_eq!(of(&path("l"), Some(&link(b"/etc")), None, b"", b""), [], "a link that goes leads nowhere");
}

#[test]
fn bits_and_kinds() {
    let at = path("x");
    let one = |before: Option<&Node>, after: Option<&Node>| of(&at, before, after, b"", b"");
    assert_eq!(one(None, Some(&file(0o755, 1))), [Flag::Executable]);
    assert_eq!(one(Some(&file(0o644, 1)), Some(&file(0o654, 1))), [Flag::Executable]);
    assert_eq!(one(Some(&file(0o700, 1)), Some(&file(0o755, 2))), [], "it could run before");
    assert_eq!(one(Some(&file(0o755, 1)), Some(&file(0o644, 1))), []);
    for bits in [0o4000, 0o2000, 0o1000] {
        assert_eq!(one(None, Some(&file(0o644 | bits, 1))), [Flag::Special]);
    }
    assert_eq!(one(None, Some(&Node::Dir { mode: 0o2775 })), [], "a directory of a shared group");
    for what in [Special::Device, Special::Fifo, Special::Socket] {
        assert_eq!(one(None, Some(&Node::Special { what })), [Flag::Special]);
    }
    assert_eq!(one(Some(&file(0o4755, 1)), None), []);
}

#[test]
fn large_binaries_and_large_texts_differ() {
    let (at, big, small) = (path("x"), file(0o644, 1001), file(0o644, 1000));
    assert_eq!(of(&at, None, Some(&big), b"", b"a\0b"), [Flag::LargeBinary]);
    assert_eq!(of(&at, None, Some(&small), b"", b"a\0b"), []);
    assert_eq!(of(&at, None, Some(&big), b"", b"text"), []);
}

/// Put together here, so that no scanner finds them in this file.
fn samples() -> Vec<(&'static str, String)> {
    let tail = "Ab3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hJ6kL9nP2rS5uV8xA1cD4fG7iM0oB3q";
    let upper = "Q3XJ7ZK2W9P4M8VT5R6";
    let key = |kind: &str| format!("-----BEGIN {kind}PRIVATE {}-----\nMIIEabc\n", "KEY");
    vec![
        ("AWS access key", format!("AKI{}{}", "A", &upper[..16])),
        ("GitHub token", format!("gh{}_{}", "p", &tail[..36])),
        ("GitHub token", format!("gh{}_{}", "o", &tail[..36])),
        ("GitHub token", format!("github_{}_11{}", "pat", &tail[..40])),
        ("Anthropic key", format!("sk-{}-api03-{}", "ant", &tail[..40])),
        ("API key", format!("sk-{}-{}", "proj", &tail[..40])),
        ("Slack token", format!("xox{}-12345-{}", "b", &tail[..20])),
        ("Google API key", format!("AI{}{}", "za", &tail[..35])),
        ("npm token", format!("np{}_{}", "m", &tail[..36])),
        ("Stripe key", format!("sk_{}_{}", "live", &tail[..24])),
        ("JSON Web Token", format!("ey{}hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.{}", "J", &tail[..43])),
        ("private key", key("RSA ")),
        ("private key", key("OPENSSH ")),
        ("private key", key("")),
    ]
}

#[test]
fn secrets_are_seen_wherever_they_stand_and_only_where_they_are_new() {
    let (at, node) = (path("x"), file(0o644, 10));
    for (kind, secret) in samples() {
        for text in [secret.clone(), format!("key = \"{secret}\"\n"), format!("a\0b\n{secret}\n")] {
            assert!(secrets(text.as_bytes()).iter().any(|(k, _)| *k == kind), "{kind}: {text}");
            assert_eq!(of(&at, None, Some(&node), b"", text.as_bytes()), [Flag::Secret], "{kind}");
            let moved = format!("first line\n{text}\nlast line\n");
            assert_eq!(
                of(&at, Some(&node), Some(&node), text.as_bytes(), moved.as_bytes()),
                [],
                "{kind}: no news"
            );
            assert_eq!(of(&at, Some(&node), None, text.as_bytes(), b""), [], "{kind}: gone");
        }
    }
    let (first, second) = (samples()[1].1.clone(), samples()[2].1.clone());
    assert_eq!(of(&at, Some(&node), Some(&node), first.as_bytes(), second.as_bytes()), [Flag::Secret]);
}

#[test]
fn what_only_begins_like_a_secret_is_none() {
    for text in [
        "AKIA",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_short",
        "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "task-manager-with-a-very-long-name-indeed-yes",
        "risk-assessment-of-something-that-is-long-0123456789",
        "sk-learn",
        "eyJhbGciOiJIUzI1NiJ9",
        "-----BEGIN PUBLIC KEY-----",
        "-----BEGIN CERTIFICATE-----",
        "PRIVATE KEY-----",
        "xoxb-",
        "AIzaShort",
        "the sk- prefix",
    ] {
        assert_eq!(secrets(text.as_bytes()), [], "{text}");
    }
}

proptest! {
    #[test]
    fn nothing_panics_and_flags_stand_in_their_order_once(
        name in prop::collection::vec(any::<u8>(), 1..40), target in prop::collection::vec(any::<u8>(), 0..40),
        head in prop::collection::vec(any::<u8>(), 0..200), mode in 0u32..0o10000,
    ) {
        if let Ok(path) = TreePath::new(name) {
            for node in [file(mode, 5000), link(&target), Node::Dir { mode }] {
                let flags = of(&path, None, Some(&node), b"", &head);
                prop_assert!(flags.windows(2).all(|pair| pair[0] < pair[1]));
            }
        }
    }

    #[test]
    fn no_way_of_writing_dot_git_passes(
        cases in prop::collection::vec(any::<bool>(), 3), at in 0usize..5, hidden in prop::sample::select(vec!["", "\u{200d}", "\u{202b}", "\u{feff}"]),
        tail in prop::sample::select(vec!["", ".", " ", " . ", ":x"]), above in prop::sample::select(vec!["", "a/"]), below in prop::sample::select(vec!["", "/config"]),
    ) {
        let mut name: String = ".git".chars().enumerate().map(|(i, c)| if i > 0 && cases[i - 1] { c.to_ascii_uppercase() } else { c }).collect();
        name.insert_str(at.min(name.len()), hidden);
        let full = format!("{above}{name}{tail}{below}");
        prop_assert_ne!(git_place(&path(full.as_str())), GitPlace::Outside);
    }
}
