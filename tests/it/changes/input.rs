//! Workspaces and targets that cannot be: each is named, and nothing is half written.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;

use serde_json::json;

use super::*;
use crate::fake_agent::{self, done};

#[test]
fn a_workspace_that_cannot_be_copied_is_named() {
    let world = World::new("[default]\ntext = \"never asked\"\n");
    let base = world.dir.path().canonicalize().unwrap();
    let own = world.workspace("own", ANN);
    std::fs::write(base.join("file"), "x").unwrap();
    let _socket = UnixListener::bind(base.join("sock")).unwrap();
    symlink(&own, base.join("link")).unwrap();
    let private = world.workspace("private", BOB);
    std::fs::set_permissions(&private, PermissionsExt::from_mode(0o700)).unwrap();
    for (path, words) in [
        (base.join("missing"), "does not exist"),
        (base.join("file"), "is a file, not a directory"),
        (base.join("sock"), "is a socket, not a directory"),
        (base.join("link"), "symlink"),
        (private.clone(), "uid 4242 may not"),
        (private.join("below"), "4242"),
        (PathBuf::from("/"), "system directory"),
        (PathBuf::from("/etc"), "system directory"),
        (PathBuf::from("/home"), "system directory"),
        (PathBuf::from("/proc/self"), "system directory"),
        (PathBuf::from("/sys/kernel"), "system directory"),
        (PathBuf::from("/dev/shm"), "system directory"),
        (world.state_dir(), "hotcell's own state"),
        (world.state_dir().join("changes"), "hotcell's own state"),
        (base.clone(), "hotcell's own state"),
    ] {
        let answer = world.curl("POST", "/v1/jobs", &spec("x", &path).to_string(), &[], Some(ANN)).unwrap();
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (400, &json!("workspace")),
            "{path:?}: {}",
            answer.body
        );
        for word in [words, path.to_str().unwrap()] {
            assert!(answer.body.contains(word), "{word}: {}", answer.body);
        }
        // The command resolves a link that a person names.
        if !path.ends_with("link") {
            let args = ["run", "x", "-p", "trusted", "--mode", "copy", "-w", path.to_str().unwrap()];
            let (code, _, err) = run_as(&world, ANN, &args);
            assert!(code == 2 && !err.is_empty(), "{path:?}: {err}");
        }
    }
    // The home of who asks.
    let answer = world.call("POST", "/v1/jobs", &spec("x", Path::new("/root")).to_string());
    assert!(answer.status == 400 && answer.body.contains("/root"), "{}", answer.body);
    assert_eq!(world.sql("SELECT count(*) FROM jobs"), "0");
    world.end();
}

#[test]
fn a_target_that_cannot_be_written_is_named_and_nothing_is_half_written() {
    let mut world = fake_agent::world("");
    let dir = world.workspace("work", ANN);
    sh(&dir, "echo base >base");
    let mut spec = fake_agent::spec("fill 200; write base x; write new y");
    spec["workspace"] = json!({ "path": dir, "mode": "copy" });
    let id = submit(&world, &spec);
    done(&mut world, &id);
    let before = sh(&dir, ALL);
    let base = world.dir.path().canonicalize().unwrap();
    let others = world.workspace("others", BOB);
    std::fs::write(base.join("file"), "x").unwrap();
    for (to, words) in [
        (PathBuf::from("/"), "system directory"),
        (PathBuf::from("/etc"), "system directory"),
        (PathBuf::from("/proc/self"), "system directory"),
        (base.join("file"), "not a directory"),
        (others.clone(), "may not write"),
        (world.state_dir(), "own state"),
    ] {
        let request = json!({ "to": to });
        let path = format!("/v1/jobs/{id}/apply");
        let answer = world.curl("POST", &path, &request.to_string(), &[], Some(ANN)).unwrap();
        assert!(answer.status == 400 && answer.body.contains(words), "{to:?}: {}", answer.body);
    }
    for request in [json!({ "only": ["["] }), json!({ "onyl": [] }), json!({ "to": "relative" })] {
        let path = format!("/v1/jobs/{id}/apply");
        let answer = world.curl("POST", &path, &request.to_string(), &[], Some(ANN)).unwrap();
        assert!(answer.status == 400 || answer.status == 422, "{request}: {} {}", answer.status, answer.body);
    }
    // A disk that is full in the middle.
    let full = world.workspace("full", ANN);
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "nr_inodes=120,uid=4242,gid=4242", "hotcell-test"])
        .arg(&full)
        .status();
    assert!(mount.unwrap().success());
    sh(&full, "echo base >base");
    let was = sh(&full, TREE);
    let (code, _, err) = run_as(&world, ANN, &["apply", &id, "--to", full.to_str().unwrap()]);
    let now = sh(&full, TREE);
    assert!(Command::new("umount").arg(&full).status().unwrap().success());
    assert!(
        code == 1 && err.contains("the disk is full") && err.contains("nothing was changed"),
        "{code}: {err}"
    );
    assert_eq!(now, was);
    // A directory that is not the one of the job any more.
    let away = dir.with_extension("away");
    std::fs::rename(&dir, &away).unwrap();
    let _another = world.workspace("work", ANN);
    let (code, _, err) = run_as(&world, ANN, &["apply", &id]);
    assert!(code == 2 && err.contains(dir.to_str().unwrap()) && err.contains("--to"), "{code}: {err}");
    assert_eq!(sh(&away, ALL), before);
    let out = ann(&world, &["apply", &id, "--to", away.to_str().unwrap()]);
    assert!(out.contains("202 changes applied"), "{out}");
    world.end();
}
