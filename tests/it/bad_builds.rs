//! What people meet when a build in a cell goes wrong: a program that is not there, a host that is closed, a cache
//! without a place. Real package managers in real cells; nothing but this process is ever dialled.

use std::process::Command;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::packages::packages;
use crate::packages::server::Registries;
use crate::world::{World, one_command};

/// The words of the failure of a setup command.
#[track_caller]
fn setup_failure(world: &World, policy: &str, image: &str, command: &str) -> String {
    let (_, job) = world.job(&json!({
        "prompt": "nobody gets so far", "policy": policy, "image": image, "limits": { "disk_mib": 256 },
        "setup": { "commands": [command] },
    }));
    assert_eq!((&job["outcome"], &job["reason"]), (&json!("failed"), &json!("setup_failed")), "{job:#}");
    job["message"].as_str().unwrap().to_owned()
}

fn ours(message: &str) -> Vec<&str> {
    message.lines().filter(|line| line.starts_with("hotcell: ")).collect()
}

#[test]
fn a_toolchain_that_is_not_in_the_image_is_named_with_the_image_that_has_it() {
    let world = World::new(&one_command("true"));
    for (command, tool, image) in
        [("cargo build", "cargo", "hotcell/rust"), ("cd /tmp && go test ./...", "go", "hotcell/go")]
    {
        let message = setup_failure(&world, "refactor", "hotcell/cell", command);
        assert!(message.contains("code 127") && message.contains("not found"), "{message}");
        let line = ours(&message).pop().unwrap_or_else(|| panic!("{message}"));
        assert!(line.contains(&format!("`{tool}` is in the image {image}:")), "{line}");
        assert!(line.contains("image = \"auto\""), "{line}");
    }
    let output = world.hotcell().args(["exec", "--", "mvn", "-v"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(127), "{said}");
    assert!(said.contains("hotcell/java"), "{said}");
    world.end();
}

#[test]
fn a_closed_host_is_named_with_the_line_that_would_open_it_beside_the_package_managers_own_words() {
    let registries = Registries::new(&packages().join("mirror"));
    let policies = tempfile::tempdir().unwrap();
    let refactor = include_str!("../../policies/refactor.toml");
    let sets = refactor.lines().find(|line| line.starts_with("sets = ")).unwrap();
    for (name, open) in [("closed", "sets = [\"debian\"]"), ("nothing", "sets = []")] {
        std::fs::write(policies.path().join(format!("{name}.toml")), refactor.replace(sets, open)).unwrap();
    }
    let more = format!("policy_dirs = [{:?}]\n{}", policies.path(), registries.mirrors());
    let world = World::with(&one_command("true"), &more);
    let cargo = "mkdir -p src && touch src/lib.rs && printf '[package]\\nname = \"p\"\\nversion = \"0.1.0\"\\n[dependencies]\\n\
         serde = \"1\"\\n' > Cargo.toml && cargo fetch";
    for (image, command, host, set, own_words) in [
        (
            "hotcell/node",
            "npm install --no-audit balanced-match",
            "registry.npmjs.org:443",
            "npm",
            "npm error",
        ),
        (
            "hotcell/python",
            "python3 -m pip download --no-deps iniconfig",
            "pypi.org:443",
            "pypi",
            "ProxyError",
        ),
        ("hotcell/rust", cargo, "index.crates.io:443", "crates", "error: "),
    ] {
        let message = setup_failure(&world, "closed", image, command);
        assert!(message.contains(own_words), "{message}");
        let [line] = ours(&message)[..] else { panic!("one line of ours:\n{message}") };
        assert!(line.contains(&format!("{host} is not among the hosts")), "{line}");
        assert!(
            line.contains(&format!("`sets = [\"{set}\"]` under [egress] of the policy closed would open it")),
            "{line}"
        );
    }
    // Without any way out nobody is there who could name the host; and who does not ask the proxy meets nobody either.
    for (policy, command, told) in [
        ("nothing", "curl -sS https://pypi.org/", "[egress] of the policy nothing opens no host"),
        ("closed", "curl -sS --noproxy '*' https://deb.debian.org/", "the proxy of HTTP_PROXY"),
    ] {
        let message = setup_failure(&world, policy, "hotcell/cell", command);
        let [line] = ours(&message)[..] else { panic!("one line of ours:\n{message}") };
        assert!(message.contains("Could not resolve") && line.contains(told), "{message}");
    }
    assert!(registries.take_seen().is_empty(), "nothing went out");
    world.end();
}

/// A tiny file system; gone when dropped.
struct Tiny(std::path::PathBuf);

impl Tiny {
    fn mount(at: &std::path::Path) -> Self {
        let status =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k,mode=0700", "tiny"]).arg(at).status();
        assert!(status.unwrap().success());
        Self(at.to_owned())
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_of_the_package_cache_fails_no_job_and_is_told_once() {
    let registries = Registries::new(&packages().join("mirror"));
    let more = format!("[cache]\nbytes_max = 1000000000\nfree_bytes_min = 0\n{}", registries.mirrors());
    let mut world = World::without_daemon(&one_command("true"), &more);
    let place = world.state_dir().join("packages");
    std::fs::create_dir_all(&place).unwrap();
    let tiny = Tiny::mount(&place);
    world.start();
    let path = "packages/2a/83/pytest-8.1.1-py3-none-any.whl";
    let fetch = format!("curl -sSf -o /tmp/it https://files.pythonhosted.org/{path} && sha256sum </tmp/it");
    let (events, job) = world.job(&json!({
        "prompt": "fetch it", "policy": "refactor", "setup": { "commands": [fetch, fetch] },
    }));
    assert_eq!(job["outcome"], "succeeded", "{job:#}");
    let file = std::fs::read(packages().join("mirror/files.pythonhosted.org").join(path)).unwrap();
    assert!(file.len() > 256 << 10, "it does not fit");
    let sum = format!("{:x}", Sha256::digest(&file));
    let printed: Vec<&str> =
        events.iter().filter(|e| e["type"] == "output").filter_map(|e| e["text"].as_str()).collect();
    assert_eq!(printed.iter().filter(|text| text.starts_with(&sum)).count(), 2, "{printed:?}");
    let whole = registries.take_seen().iter().filter(|s| (s.status, s.bytes) == (200, file.len())).count();
    assert_eq!(
        (whole, &job["totals"]["egress"]["cached_bytes"]),
        (2, &json!(0)),
        "fetched each time: {job:#}"
    );
    let log = world.log();
    assert_eq!(log.matches("the package cache cannot keep anything").count(), 1, "{log}");
    let metrics = world.call("GET", "/metrics", "").body;
    assert!(metrics.contains("hotcell_cache_failures_total 2"), "{metrics}");
    assert_eq!(std::fs::read_dir(&place).unwrap().flatten().filter(|e| e.path().is_file()).count(), 0);
    drop(tiny);
    world.end();
}
