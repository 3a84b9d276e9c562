//! What `hotcell support` packs of real jobs: all that its manifest names, no credential in any byte of it, nothing
//! that was said or written unless asked for, and nothing of anybody else's.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::fake_agent;
use crate::world::{CANARY, World, one_command};

const ANN: u32 = 4242;
const BOB: u32 = 4243;

const ANTHROPIC: &str = "sk-ant-api03-AbCdEf0123456789ghIJklMN";
const GITHUB: &str = "ghp_0123456789abcdefghijABCDEFGHIJklmnop";

/// The files of an archive, by their names in it, as `tar` gives them.
fn unpacked(archive: &Path) -> BTreeMap<String, String> {
    let tar = |args: &[&str]| {
        let output = Command::new("tar").args(args).arg(archive).output().expect("tar");
        assert!(output.status.success(), "tar {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let names = String::from_utf8(tar(&["-tzf"])).unwrap();
    names
        .lines()
        .map(|name| {
            let output = Command::new("tar").arg("-xzOf").arg(archive).arg(name).output().expect("tar");
            let (dir, file) = name.split_once('/').expect("one directory");
            assert!(dir.starts_with("hotcell-support-j") && !file.contains('/'), "{name}");
            (file.to_owned(), String::from_utf8(output.stdout).expect("UTF-8"))
        })
        .collect()
}

/// The same, with what holds for each: the manifest names all of it, and no credential is in it.
fn checked(archive: &Path) -> (BTreeMap<String, String>, Value) {
    let files = unpacked(archive);
    let manifest: Value = serde_json::from_str(&files["MANIFEST.json"]).unwrap();
    let mut named: Vec<&str> =
        manifest["entries"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    named.push("MANIFEST.json");
    named.sort_unstable();
    assert_eq!(files.keys().map(String::as_str).collect::<Vec<_>>(), named);
    for (name, text) in &files {
        for canary in [CANARY, ANTHROPIC, GITHUB] {
            assert!(!text.contains(canary), "{name} has {canary}: {text}");
        }
        if name.ends_with(".ndjson") {
            text.lines().for_each(|line| drop(serde_json::from_str::<Value>(line).expect(name)));
        } else if name.ends_with(".json") {
            drop(serde_json::from_str::<Value>(text).expect(name));
        }
    }
    (files, manifest)
}

fn redactions(manifest: &Value, file: &str) -> Value {
    let entries = manifest["entries"].as_array().unwrap();
    entries
        .iter()
        .find(|entry| entry["name"] == file)
        .map_or(Value::Null, |entry| entry["redactions"].clone())
}

#[test]
fn a_pack_has_what_happened_and_neither_credentials_nor_what_was_said() {
    let command = format!(
        "echo TOOLOUTPUT $(cat env.txt) {ANTHROPIC}; printf 'CHANGED token={GITHUB}\\nkey={CANARY}\\n' > new.txt"
    );
    let world = World::new(&one_command(&command));
    let workspace = world.workspace("repo", ANN);
    std::fs::write(workspace.join("env.txt"), format!("KEY={CANARY}\n")).unwrap();
    let spec = json!({
        "prompt": format!("PROMPTTEXT with {CANARY}"), "policy": "trusted",
        "append_system_prompt": "SYSTEMTEXT", "workspace": { "path": workspace, "mode": "copy" },
    });
    let answer = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(ANN)).unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    let events = world.follow(&id);
    assert_eq!(world.show(&id)["outcome"], "succeeded");
    assert!(events.iter().any(|event| event.to_string().contains(ANTHROPIC)), "it is there to be taken out");

    let plain = world.path("plain.tar.gz");
    let (code, out, err) = world.run(&["support", &id, "--json", "-o", plain.to_str().unwrap()]);
    assert_eq!(code, 0, "{out}{err}");
    let said: Value = serde_json::from_str(&out).unwrap();
    let meta = std::fs::metadata(&plain).unwrap();
    assert_eq!((meta.permissions().mode() & 0o777, &said["bytes"]), (0o600, &json!(meta.len())));
    let (files, manifest) = checked(&plain);
    assert_eq!(said["entries"], files.len());
    for name in [
        "README",
        "versions.json",
        "health.json",
        "doctor.json",
        "job.json",
        "spec.json",
        "plan.json",
        "events.ndjson",
        "audit.ndjson",
        "changes.json",
        "cost.json",
        "log.ndjson",
        "daemon.log.ndjson",
    ] {
        assert!(!files[name].is_empty(), "{name}: {manifest:#}");
    }
    for (name, text) in &files {
        for word in ["PROMPTTEXT", "SYSTEMTEXT", "TOOLOUTPUT", "CHANGED"] {
            assert!(!text.contains(word), "{name} has {word}: {text}");
        }
    }
    assert_eq!(files["events.ndjson"].lines().count(), events.len());
    assert!(files["changes.json"].contains("new.txt") && files["log.ndjson"].contains(&id));
    let versions: Value = serde_json::from_str(&files["versions.json"]).unwrap();
    for part in [
        "/hotcell/daemon",
        "/hotcell/client",
        "/agent/active",
        "/engine/version",
        "/engine/runtimes/runc",
        "/kernel/release",
    ] {
        assert!(versions.pointer(part).is_some_and(|version| !version.is_null()), "{part}: {versions}");
    }

    let full = world.path("full.tar.gz");
    let full_name = full.to_str().unwrap();
    let (code, out, err) = world.run(&["support", &id, "--with-prompt", "--with-contents", "-o", full_name]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains(full_name) && out.contains("redacted"), "{out}");
    let (files, manifest) = checked(&full);
    assert!(files["spec.json"].contains("PROMPTTEXT with [redacted: credential of the daemon]"));
    assert!(files["spec.json"].contains("SYSTEMTEXT") && files["events.ndjson"].contains("TOOLOUTPUT"));
    assert!(
        files["changes.patch"].contains("+CHANGED token=[redacted: GitHub token]"),
        "{}",
        files["changes.patch"]
    );
    assert_eq!(
        redactions(&manifest, "changes.patch"),
        json!({ "GitHub token": 1, "credential of the daemon": 1 })
    );
    assert!(redactions(&manifest, "events.ndjson")["Anthropic key"].as_u64().unwrap() >= 2, "{manifest:#}");

    // What is there is left alone; the same bytes can go to a pipe.
    let (code, _, err) = world.run(&["support", &id, "-o", full_name]);
    assert_eq!((code, std::fs::metadata(&full).unwrap().permissions().mode() & 0o777), (2, 0o600), "{err}");
    assert!(err.contains("is already there") && err.contains("hint"), "{err}");
    let output = world.hotcell().args(["support", &id, "-o", "-"]).output().unwrap();
    assert!(output.status.success() && output.stdout.starts_with(&[0x1f, 0x8b]));
    let (code, _, err) = world.run(&["support", &id, "--json", "-o", "-"]);
    assert_eq!(code, 2, "{err}");
    let output = world.hotcell().args(["support", &id]).current_dir(world.dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    checked(&world.path(&format!("hotcell-support-{id}.tar.gz")));
    world.end();
}

#[test]
fn running_and_failed_jobs_give_packs_and_nobody_gets_anothers() {
    let mut world = fake_agent::world("");
    let submit = |world: &World, uid, task: &str| {
        let spec = fake_agent::spec(task).to_string();
        let answer = world.curl("POST", "/v1/jobs", &spec, &[], Some(uid)).unwrap();
        answer.json()["id"].as_str().unwrap().to_owned()
    };
    let failed = submit(&world, ANN, "exit 7");
    fake_agent::done(&mut world, &failed);
    let bobs = submit(&world, BOB, "ask 1");
    fake_agent::done(&mut world, &bobs);
    let running = submit(&world, ANN, "ask 1;sleep 300");
    fake_agent::until_state(&mut world, &running, "running");

    let own = world.workspace("own", ANN);
    let get = |world: &World, uid, job: &str| {
        let file = own.join(format!("{uid}-{job}.tar.gz"));
        let path = format!("/v1/jobs/{job}/support");
        let answer = world.curl("GET", &path, "", &["-o", file.to_str().unwrap()], Some(uid)).unwrap();
        (answer.status, file)
    };
    for job in [&failed, &running] {
        let (status, file) = get(&world, ANN, job);
        assert_eq!(status, 200);
        let (files, manifest) = checked(&file);
        assert_eq!((&manifest["admin"], &manifest["made_for_uid"]), (&json!(false), &json!(ANN)));
        assert!(!files.contains_key("daemon.log.ndjson"), "the daemon's own lines are for admins");
        assert!(files["log.ndjson"].lines().count() > 0, "there are lines about it");
        for line in files["log.ndjson"].lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            assert_eq!(&line["fields"]["job"], job.as_str(), "{line}");
        }
        for (name, text) in &files {
            assert!(!text.contains(&bobs), "{name} tells of another's job: {text}");
        }
        assert!(manifest["left_out"].to_string().contains("changes.json"), "{manifest:#}");
    }
    let (status, _) = get(&world, ANN, &bobs);
    let never = world.curl("GET", "/v1/jobs/j0dq2v7hzzzzzzzz/support", "", &[], Some(ANN)).unwrap();
    assert_eq!((status, never.status), (404, 404));
    let wrong =
        world.curl("GET", &format!("/v1/jobs/{failed}/support?with_all=1"), "", &[], Some(ANN)).unwrap();
    assert_eq!(wrong.status, 400, "{}", wrong.body);

    // An admin's tells of the daemon, too.
    let file = world.path("admin.tar.gz");
    let (code, out, err) = world.run(&["support", &failed, "-o", file.to_str().unwrap()]);
    assert_eq!(code, 0, "{out}{err}");
    let (files, _) = checked(&file);
    assert!(
        files["daemon.log.ndjson"].contains("hotcell serves") && files["daemon.log.ndjson"].contains(&bobs)
    );
    let (code, _, err) =
        world.run(&["support", "j0dq2v7hzzzzzzzz", "-o", world.path("no.tar.gz").to_str().unwrap()]);
    assert_eq!((code, world.path("no.tar.gz").exists()), (2, false), "{err}");

    let log = world.state_dir().join("log");
    assert_eq!(std::fs::metadata(&log).unwrap().permissions().mode() & 0o777, 0o700);
    world.call("POST", &format!("/v1/jobs/{running}/cancel"), "");
    fake_agent::done(&mut world, &running);
    // What it logged is there for the next one, whatever became of it.
    world.kill();
    world.start();
    let file = world.path("again.tar.gz");
    assert_eq!(world.run(&["support", &bobs, "-o", file.to_str().unwrap()]).0, 0);
    let (files, _) = checked(&file);
    assert_eq!(files["daemon.log.ndjson"].matches("hotcell serves").count(), 2);
    assert!(files["log.ndjson"].contains("job done"));
    world.end();
}
