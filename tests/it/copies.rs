//! What agents do to workspaces, mode by mode, with the real CLI in real cells: copies leave the original alone, what
//! is hidden stays out, and what would be obeyed on the host is neither changed nor left.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::bad_input::Cable;
use crate::fake_agent;
use crate::world::{World, one_command, tool_results};

const EDIT_AND_RUN: &str = include_str!("../scripts/edit-and-run.toml");
const ANN: u32 = 4242;
const TOKEN: &str = "ghp_notForTheAgent0123456789";

fn notes(events: &[Value]) -> Vec<&str> {
    events.iter().filter(|e| e["type"] == "note").filter_map(|e| e["text"].as_str()).collect()
}

/// Every path below `dir` with kind, owner, mode, content and times.
fn snapshot(dir: &Path) -> String {
    let line =
        "find . -printf '%p %y %U:%G %m %s %T@ %l\\n' | sort; find . -type f | sort | xargs -r sha256sum";
    let output = Command::new("sh").args(["-c", line]).current_dir(dir).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a shell line in `dir` as Ann.
#[track_caller]
fn sh(dir: &Path, line: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-ec", line]).current_dir(dir).uid(ANN).gid(ANN).env("HOME", "/nonexistent");
    for (name, value) in [("GIT_AUTHOR_NAME", "Ann"), ("GIT_AUTHOR_EMAIL", "ann@example.org")] {
        command.env(name, value).env(name.replace("AUTHOR", "COMMITTER"), value);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A job of Ann's, followed to its end: the answer to its submit, its events and its view.
#[track_caller]
fn job(world: &World, spec: &Value) -> (Value, Vec<Value>, Value) {
    let answer = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(ANN)).unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    let events = world.follow(&id);
    let view = world.show(&id);
    assert_eq!(view["outcome"], "succeeded", "{view:#}\n{}", world.log());
    (answer.json(), events, view)
}

/// A repository of Ann's with a commit, a token in its configuration, and secrets beside it.
fn repository(world: &World, name: &str) -> PathBuf {
    let dir = world.workspace(name, ANN);
    sh(
        &dir,
        &format!(
            "git init -q -b main && echo hello >greeting.txt && git add . && git commit -qm first && \
         git remote add origin https://ann:{TOKEN}@example.org/app.git && mkdir -p sub .claude && \
         echo K={TOKEN} >.env && echo {TOKEN} >sub/server.pem && echo '{{}}' >.claude/settings.json && echo x >sub/plain"
        ),
    );
    dir
}

#[test]
fn an_agent_edits_a_copy_and_the_original_stays_as_it_was() {
    let world = World::new(EDIT_AND_RUN);
    let dir = repository(&world, "repo");
    std::fs::write(dir.join(".htpasswd"), "x").unwrap();
    chown(dir.join(".htpasswd"), Some(ANN), Some(ANN)).unwrap();
    let before = snapshot(&dir);
    // The strict policy's first mode: nobody asked for a copy.
    let (submitted, events, view) =
        job(&world, &json!({ "prompt": "greeting", "workspace": { "path": dir } }));
    assert_eq!(view["workspace_mode"], "copy");
    assert!(tool_results(&events).contains("hello, world"), "{}", tool_results(&events));
    assert_eq!(snapshot(&dir), before);
    // What is hidden is told, what looks like a secret and is not is a warning.
    let notes = notes(&events);
    assert!(notes.iter().any(|n| n.contains("hidden from the agent") && n.contains(".env")), "{notes:?}");
    assert!(notes.iter().any(|n| n.contains("credentials are left out of .git/config")), "{notes:?}");
    let warnings = submitted["warnings"].to_string();
    assert!(warnings.contains(".htpasswd") && !warnings.contains(".env"), "{warnings}");
    assert!(notes.iter().any(|n| n.contains(".htpasswd") && n.contains("looks like a secret")), "{notes:?}");
    world.end();
}

const LOOK: &str = "cat .env; cat sub/server.pem; cat .git/config; git remote -v; ls -A . sub; git log --format=%s; \
    echo x >>sub/plain && echo plain-written; mv .git g2 && echo git-moved; echo x >>.git/config && echo config-written; \
    mkdir -p .git/hooks && echo x >.git/hooks/post-commit && echo hook-written; \
    echo x >.claude/settings.json && echo settings-written; mv .claude c2 && echo claude-moved; \
    mkdir -p deep/.git/hooks && echo deep-made; echo '{}' >.mcp.json; ln -s /etc/passwd .claude/settings.local.json; true";

#[test]
fn what_is_hidden_stays_out_in_every_mode_and_in_place_git_and_settings_are_safe() {
    let world = World::new(&one_command(LOOK));
    for mode in ["copy", "read-only", "bind"] {
        let dir = repository(&world, mode);
        let before = snapshot(&dir);
        let spec = json!({ "prompt": "x", "policy": "trusted", "workspace": { "path": dir, "mode": mode } });
        let (_, events, view) = job(&world, &spec);
        let text = tool_results(&events);
        assert!(!text.contains(TOKEN), "{mode}: {text}");
        assert!(text.contains("first") && text.contains("example.org/app.git"), "{mode}: {text}");
        assert_eq!(text.contains("plain-written"), mode != "read-only", "{mode}: {text}");
        if mode != "bind" {
            assert_eq!(snapshot(&dir), before, "{mode}");
            assert!(!text.contains("server.pem\n"), "{mode}: {text}");
            continue;
        }
        for word in ["git-moved", "config-written", "hook-written", "settings-written", "claude-moved"] {
            assert!(!text.contains(word), "{word}: {text}");
        }
        assert!(text.contains("deep-made"), "{text}");
        let config = std::fs::read_to_string(dir.join(".git/config")).unwrap();
        assert!(config.contains(TOKEN), "the user's own file is as it was: {config}");
        assert_eq!(std::fs::read_to_string(dir.join(".claude/settings.json")).unwrap(), "{}\n");
        let told: Vec<&str> = notes(&events).into_iter().filter(|n| n.starts_with("quarantined: ")).collect();
        for name in ["deep/.git", ".mcp.json", ".claude/settings.local.json"] {
            assert!(told.iter().any(|n| n.contains(&format!(" {name} appeared"))), "{name}: {told:?}");
            assert!(std::fs::symlink_metadata(dir.join(name)).is_err(), "{name} is still there");
        }
        assert_eq!(told.len(), 3, "{told:?}");
        // The outcome says so too, for programs and for people.
        let aside = view["totals"]["quarantined"].as_array().unwrap();
        assert_eq!(aside.len(), 3, "{view:#}");
        for one in aside {
            let (path, now) = (one["path"].as_str().unwrap(), one["moved_to"].as_str().unwrap());
            assert!(now.starts_with(&format!("{path}.quarantined-")), "{one}");
            assert!(std::fs::symlink_metadata(dir.join(now)).is_ok(), "{one}");
        }
        let (code, shown, _) = world.run(&["show", view["id"].as_str().unwrap()]);
        assert!(code == 0 && shown.contains("deep/.git appeared during the job and is now"), "{shown}");
        let left = sh(&dir, "find . -name '*.quarantined-*' | wc -l");
        assert_eq!(left.trim(), "3");
    }
    world.end();
}

#[test]
fn a_cell_can_see_a_workspace_at_its_own_path_beside_others() {
    let world = World::without_daemon("", "");
    let (dir, lib, tmp) =
        (world.workspace("app", ANN), world.workspace("lib", ANN), world.workspace("tmpl", ANN));
    drop(world);
    let at = dir.display().to_string();
    let read = |path: &str| format!("{{ tool = \"Read\", input = {{ file_path = {path:?} }} }}");
    let script = format!(
        "usage = {{ input = 10, output = 20 }}\n[[reply]]\nwhen = {{ turn = 0, tools = true }}\nblocks = [{}, {}, \
         {{ tool = \"Bash\", input = {{ command = \"pwd; cat a; echo x >b && ls; cat /workspaces/lib/l; echo x >/workspaces/lib/y; \
         echo x >>/workspaces/tmpl/t && cat /workspaces/tmpl/t\", description = \"look\" }} }}]\n[default]\ntext = \"done\"\n",
        read(&format!("{at}/a")),
        read(&format!("{at}/secret"))
    );
    let policies = tempfile::tempdir().unwrap();
    let text = format!(
        "{}\n[[rule]]\ntool = \"Read\"\npath = \"/workspace/secret\"\naction = \"deny\"\nreason = \"not this one\"\n",
        include_str!("../../policies/trusted.toml")
    );
    std::fs::write(policies.path().join("ruled.toml"), text).unwrap();
    let world = World::with(&script, &format!("policy_dirs = [{:?}]", policies.path()));
    for path in [&dir, &lib, &tmp] {
        std::fs::create_dir_all(path).unwrap();
    }
    for (path, text) in [
        (dir.join("a"), "text of a\n"),
        (dir.join("secret"), "top\n"),
        (lib.join("l"), "of lib\n"),
        (tmp.join("t"), "of tmpl\n"),
    ] {
        std::fs::write(&path, text).unwrap();
    }
    for path in [&dir, &lib, &tmp] {
        assert!(Command::new("chown").args(["-R", "4242:4242"]).arg(path).status().unwrap().success());
    }
    let others = json!([{ "name": "lib", "path": lib }, { "name": "tmpl", "path": tmp, "mode": "copy" }]);
    let spec = json!({ "prompt": "x", "policy": "ruled", "workspace": { "path": dir, "mount": "same-path", "others": others } });
    let (_, events, _) = job(&world, &spec);
    let text = tool_results(&events);
    for words in [&*at, "text of a", "not this one", "of lib", "Read-only file system", "of tmpl\nx"] {
        assert!(text.contains(words), "{words:?}: {text}");
    }
    assert!(!text.contains("top"), "{text}");
    assert!(!dir.join("b").exists() && std::fs::read_to_string(tmp.join("t")).unwrap() == "of tmpl\n");
    for (more, words) in [
        (json!({ "mount": "same-path", "path": "/tmp/x" }), "a cell needs /tmp"),
        (json!({ "path": dir, "others": [{ "name": "A b", "path": lib }] }), "others[0].name"),
        (json!({ "path": dir, "others": [{ "name": "a", "path": lib, "mode": "bind" }] }), "bind"),
        (json!({ "path": dir, "hide": ["!x"] }), "workspace.hide[0]"),
        (json!({ "path": dir, "others": [{ "name": "a", "path": "/etc" }] }), "others[0].path"),
    ] {
        let spec = json!({ "prompt": "x", "policy": "trusted", "workspace": more });
        let answer = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(ANN)).unwrap();
        assert!(answer.status == 400 && answer.body.contains(words), "{words}: {}", answer.body);
    }
    for path in [&dir, &lib, &tmp] {
        std::fs::remove_dir_all(path).unwrap();
    }
    let base = dir.parent().unwrap().to_owned();
    world.end();
    std::fs::remove_dir(base).unwrap();
}

#[test]
fn a_worktree_has_its_repository_and_a_forged_link_has_nothing() {
    let command = "git status --short; git log --format=%s; echo more >>greeting.txt; \
        git -c user.name=x -c user.email=x@example.org commit -qam second && git log --format=%s -1; cat .git; cat /workspace.git/config";
    let world = World::new(&one_command(command));
    let main = repository(&world, "main");
    let trees = world.workspace("trees", ANN);
    let tree = trees.join("feature");
    sh(&main, &format!("git worktree add -q -b feature {}", tree.display()));
    let (before, main_before) = (snapshot(&tree), snapshot(&main));
    let spec = json!({ "prompt": "x", "policy": "trusted", "workspace": { "path": tree } });
    let (_, events, _) = job(&world, &spec);
    let text = tool_results(&events);
    assert!(
        text.contains("first")
            && text.contains("second")
            && text.contains("/workspace.git/worktrees/feature"),
        "{text}"
    );
    assert!(!text.contains(TOKEN), "{text}");
    assert_eq!((snapshot(&tree), snapshot(&main)), (before, main_before));
    // What a `.git` file names has to name the worktree too: nobody can have another directory shown.
    let forged = world.workspace("forged", ANN);
    std::fs::write(forged.join(".git"), format!("gitdir: {}/.git/worktrees/feature\n", main.display()))
        .unwrap();
    let spec = json!({ "prompt": "x", "policy": "trusted", "workspace": { "path": forged } });
    let (_, events, _) = job(&world, &spec);
    let text = tool_results(&events);
    assert!(!text.contains("first") && !text.contains("second"), "{text}");
    assert!(notes(&events).iter().any(|n| n.contains("its repository is not shown")), "{:?}", notes(&events));
    world.end();
}

#[test]
fn a_daemon_of_an_ordinary_user_copies_every_file_and_says_why() {
    let mut world = World::without_daemon("[default]\ntext = \"never asked\"\n", "");
    fake_agent::install(&world.state_dir());
    let cable = Cable::lay(world.path("engine.sock"));
    std::fs::set_permissions(&cable.path, std::fs::Permissions::from_mode(0o666)).unwrap();
    world.set_engine(&format!("unix://{}", cable.path.display()));
    let dir = world.workspace("repo", ANN);
    for (name, text) in [("a", "original"), (".env", TOKEN)] {
        std::fs::write(dir.join(name), text).unwrap();
        chown(dir.join(name), Some(ANN), Some(ANN)).unwrap();
    }
    let images = world.state_dir().join("images");
    let records = std::fs::canonicalize(&images).unwrap();
    std::fs::remove_file(&images).unwrap();
    for (program, args) in [
        ("cp", vec!["-r".into(), records, images]),
        ("chown", vec!["-R".into(), "4242:4242".into(), world.dir.path().to_owned()]),
    ] {
        assert!(Command::new(program).args(&args).status().unwrap().success(), "{program} {args:?}");
    }
    world.daemon_uid = Some(ANN);
    world.daemon_env.push(("HOME".to_owned(), world.dir.path().display().to_string()));
    world.start();
    let health = world.call("GET", "/healthz", "").json();
    assert_eq!(health["notes"], json!(["workspaces are copied file by file: the daemon is not root"]));
    let before = snapshot(&dir);
    let mut spec = fake_agent::spec("sleep 600");
    spec["workspace"] = json!({ "path": dir });
    let answer = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(ANN)).unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    fake_agent::until_state(&mut world, &id, "running");
    let cell = std::fs::read_dir(world.state_dir().join("cells")).unwrap().flatten().next().unwrap().path();
    let parts = hotcell::workspace::parts_of(&cell, None).expect("a copy");
    assert_eq!(parts.form, hotcell::workspace::Form::Whole);
    // The agent's side of it.
    assert_eq!(std::fs::metadata(parts.dir.join("a")).unwrap().uid(), ANN);
    assert!(!parts.dir.join(".env").exists());
    std::fs::write(parts.dir.join("a"), "changed").unwrap();
    let journal = fake_agent::journal(&world, &id);
    assert!(journal.contains("workspaces are copied file by file: the daemon is not root"), "{journal}");
    let stopped = world.curl("POST", &format!("/v1/jobs/{id}/cancel"), "", &[], Some(ANN)).unwrap();
    assert!(stopped.status < 300, "{}", stopped.body);
    let (_, view) = fake_agent::done(&mut world, &id);
    assert_eq!(view["outcome"], "stopped", "{view}");
    assert_eq!(snapshot(&dir), before);
    world.end();
}

#[test]
fn nothing_is_left_of_a_copy_when_the_daemon_is_killed_and_the_job_goes_on() {
    let mut world = fake_agent::world("");
    let dir = world.workspace("repo", ANN);
    std::fs::write(dir.join("a"), "original").unwrap();
    let mut spec = fake_agent::spec("sleep 3");
    spec["workspace"] = json!({ "path": dir });
    let id = world.submit(&spec);
    fake_agent::until_state(&mut world, &id, "running");
    let cell = std::fs::read_dir(world.state_dir().join("cells")).unwrap().flatten().next().unwrap().path();
    let parts = hotcell::workspace::parts_of(&cell, None).expect("a copy");
    assert_eq!(parts.form, hotcell::workspace::Form::Overlay);
    world.kill();
    world.start();
    let (_, view) = fake_agent::done(&mut world, &id);
    assert_eq!(view["outcome"], "succeeded", "{view}");
    // Killed while it is made, or while it is taken down: whatever the moment, the next daemon takes the rest away.
    for wait_ms in [0, 20, 40, 60, 80, 100, 130, 160, 200, 250] {
        let mut spec = fake_agent::spec("sleep 0");
        spec["workspace"] = json!({ "path": dir });
        let id = world.submit(&spec);
        std::thread::sleep(std::time::Duration::from_millis(wait_ms));
        world.kill();
        world.start();
        fake_agent::done(&mut world, &id);
        world.nothing_left();
    }
    assert_eq!(std::fs::read_to_string(dir.join("a")).unwrap(), "original");
    world.end();
}

#[test]
fn nothing_is_left_of_either_half_of_a_copy_when_the_other_one_fails() {
    let mut world = fake_agent::world("");
    let dir = world.workspace("repo", ANN);
    let job = |world: &mut World, dir: &Path| {
        let mut spec = fake_agent::spec("sleep 0");
        spec["workspace"] = json!({ "path": dir });
        let id = world.submit(&spec);
        let (_, view) = fake_agent::done(world, &id);
        world.nothing_left();
        view
    };
    let view = job(&mut world, &dir);
    assert_eq!(view["outcome"], "succeeded", "{view}");
    // The workspace is mounted and listed; there is no scratch space.
    let templates = world.state_dir().join("scratch-templates");
    let aside = world.state_dir().join("aside");
    std::fs::rename(&templates, &aside).unwrap();
    std::fs::write(&templates, "").unwrap();
    let view = job(&mut world, &dir);
    assert_eq!(view["reason"], "workspace_setup", "{view}");
    assert!(view["message"].to_string().contains("scratch-templates"), "{view}");
    std::fs::remove_file(&templates).unwrap();
    std::fs::rename(&aside, &templates).unwrap();
    // There is a scratch space; the workspace is deeper than any that is listed.
    let deep = world.workspace("deep", ANN);
    std::fs::create_dir_all(deep.join("d/".repeat(1025))).unwrap();
    let view = job(&mut world, &deep);
    assert_eq!(view["reason"], "workspace_setup", "{view}");
    assert!(view["message"].to_string().contains("deeper than 1024"), "{view}");
    let view = job(&mut world, &dir);
    assert_eq!(view["outcome"], "succeeded", "{view}");
    world.end();
}
