//! What a person has to look at before it takes effect, and what never does.

use super::*;

/// Everything that is set apart, and one plain change.
const MAKE: &str = "echo plain >plain.txt; echo 'export X=1' >.envrc; mkdir -p .github/workflows .claude .vscode deep; \
    echo 'on: push' >.github/workflows/ci.yml; echo '{}' >.claude/settings.json; echo '{}' >.vscode/tasks.json; \
    echo '{\"scripts\":{\"postinstall\":\"x\"}}' >package.json; ln -s /etc/shadow out; ln -s ../../.. deep/up; \
    echo 'key = \"AKIAQ3EGRXYZ7UVWABCD\"' >notes.txt; echo x >.git/hooks/post-checkout; chmod +x .git/hooks/post-checkout; \
    git config core.fsmonitor /tmp/x; mkfifo pipe; git init -q nested; echo n >nested/file; echo '#!/bin/sh' >tool.sh; chmod +x tool.sh; \
    cp /bin/true suid; chmod 4755 suid || echo NO-SETUID; echo '-----BEGIN OPENSSH PRIVATE KEY-----' >id_rsa; true";

const FLAGGED: [(&str, &str); 6] = [
    (".envrc", "shell"),
    (".github/workflows/ci.yml", "ci"),
    (".claude/settings.json", "agent-settings"),
    (".vscode/tasks.json", "editor"),
    ("package.json", "package"),
    ("tool.sh", "executable"),
];
const REFUSED: [(&str, &str); 5] = [
    ("out", "symlink-outside"),
    ("deep/up", "symlink-outside"),
    (".git/hooks/post-checkout", "git"),
    (".git/config", "git"),
    ("pipe", "special"),
];

#[test]
fn what_takes_effect_by_itself_is_set_apart_and_applied_only_with_a_word() {
    let world = World::new(&script(&[("flags", MAKE)]));
    let dir = repository(&world, "repo", "echo a >a; echo '{}' >package.json");
    let config = std::fs::read_to_string(dir.join(".git/config")).unwrap();
    let (id, events, view) = job(&world, "flags", &dir);
    let said = crate::world::tool_results(&events);
    assert!(said.contains("NO-SETUID"), "{said}");
    let set = ann_json(&world, &["diff", &id, "--json"]);
    let stat = ann(&world, &["diff", &id, "--stat"]);
    for (list, verdict) in [(&FLAGGED[..], "flagged"), (&REFUSED[..], "refused")] {
        for (path, flag) in list {
            let entry = entry(&set, path);
            assert_eq!(entry["verdict"], verdict, "{entry}");
            assert!(entry["flags"].as_array().unwrap().iter().any(|f| f == flag), "{flag}: {entry}");
            assert!(stat.lines().any(|l| l.trim_start().starts_with(path) && l.contains(flag)), "{path}: {stat}");
        }
    }
    assert_eq!(entry(&set, "notes.txt")["verdict"], "flagged", "{:#}", entry(&set, "notes.txt"));
    assert!(view["totals"]["changes"]["refused"].as_u64().unwrap() >= REFUSED.len() as u64, "{view:#}");

    let applied = ann_json(&world, &["apply", &id, "--json"]);
    let left_out = paths(&applied["left_out"]);
    for (path, _) in FLAGGED.iter().chain(&REFUSED) {
        assert!(left_out.contains(path), "{path}: {applied:#}");
    }
    let is = |path: &str| dir.join(path).symlink_metadata().is_ok();
    assert!(is("plain.txt") && !is("nested"), "{applied:#}");
    for (path, _) in FLAGGED.iter().chain(&REFUSED).filter(|(p, _)| !matches!(*p, "package.json" | ".git/config")) {
        assert!(!is(path), "{path} was applied");
    }
    assert_eq!(std::fs::read_to_string(dir.join("package.json")).unwrap(), "{}\n");

    let applied = ann_json(&world, &["apply", &id, "--include-flagged", "--json"]);
    for (path, _) in FLAGGED {
        assert!(is(path) && paths(&applied["applied"]).contains(&path), "{path}: {applied:#}");
    }
    for (path, _) in REFUSED.iter().filter(|(p, _)| *p != ".git/config") {
        assert!(!is(path), "{path} was applied");
    }
    assert_eq!(std::fs::read_to_string(dir.join(".git/config")).unwrap(), config);
    assert!(is("nested/file") && !is("nested/.git"), "a repository that was not there");
    let mode = std::os::unix::fs::MetadataExt::mode(&dir.join("suid").symlink_metadata().unwrap());
    assert_eq!(mode & 0o6000, 0);
    world.end();
}
