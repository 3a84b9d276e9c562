//! What a cell looks like from inside.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Seen, run, world};

fn look(policy: &str, mode: &str) -> Seen {
    let world = world();
    let workspace = json!({ "path": super::agents(&world), "mode": mode });
    let seen = run(&world, "python3 look.py", &json!({ "policy": policy, "workspace": workspace }));
    seen.succeeded();
    world.end();
    seen
}

#[track_caller]
fn all(of: &Value, allowed: &[&str]) {
    for (name, result) in of.as_object().unwrap() {
        assert!(allowed.contains(&result.as_str().unwrap()), "{name}: {result}");
    }
}

#[track_caller]
fn mount<'a>(seen: &'a Seen, at: &str) -> (&'a Value, BTreeSet<&'a str>) {
    let mounts = seen.get("mounts").as_array().unwrap();
    let found = mounts.iter().rfind(|m| m["at"] == at).unwrap_or_else(|| panic!("no mount at {at}"));
    (found, found["options"].as_str().unwrap().split(',').collect())
}

#[test]
fn a_cell_has_no_rights_no_network_and_nothing_to_write_but_its_own() {
    let seen = look("default", "read-only");
    who_it_is(&seen);
    what_it_writes(&seen, &["/home/agent/zoo", "/tmp/zoo", "/dev/shm/zoo", "/dev/mqueue/zoo"]);
    whom_it_reaches(&seen);
    what_it_sees(&seen);
    let refused = ["EPERM", "EACCES", "EXDEV", "1", "38"];
    all(seen.get("calls"), &refused);
    let (_, options) = mount(&seen, "/workspace");
    assert!(options.is_superset(&["ro", "nosuid", "nodev"].into()), "{options:?}");
}

#[test]
fn a_workspace_that_is_a_copy_or_in_place_is_the_one_thing_more_to_write() {
    for (policy, mode) in [("default", "copy"), ("trusted", "bind")] {
        let seen = look(policy, mode);
        who_it_is(&seen);
        what_it_writes(
            &seen,
            &["/home/agent/zoo", "/tmp/zoo", "/dev/shm/zoo", "/dev/mqueue/zoo", "/workspace/zoo"],
        );
        whom_it_reaches(&seen);
        what_it_sees(&seen);
        in_a_writable_workspace(&seen);
    }
}

fn in_a_writable_workspace(seen: &Seen) {
    let refused = ["EPERM", "EACCES", "EXDEV", "1", "38"];
    all(seen.get("calls"), &refused);
    let (_, options) = mount(seen, "/workspace");
    assert!(options.is_superset(&["rw", "nosuid", "nodev"].into()), "{options:?}");
}

fn who_it_is(seen: &Seen) {
    let uid = seen.get("uid").as_u64().unwrap();
    assert!((0x6000_0000..0x8000_0000).contains(&uid), "{uid} is not a private id");
    assert_eq!(seen.get("gid"), seen.get("uid"));
    assert!(!seen.get("groups").as_array().unwrap().contains(&json!(0)));
    let none = "0000000000000000";
    let expected = json!({ "CapInh": none, "CapPrm": none, "CapEff": none, "CapBnd": none, "CapAmb": none,
        "NoNewPrivs": "1", "Seccomp": "2" });
    assert_eq!(*seen.get("status"), expected);
    assert_eq!(*seen.get("hostname"), "cell");
    assert_eq!(*seen.get("core"), json!([0, 0]));
    assert!(seen.get("nofile")[1].as_u64().unwrap() <= 65_536);
}

fn what_it_writes(seen: &Seen, expected: &[&str]) {
    for (path, result) in seen.get("writes").as_object().unwrap() {
        let done = result == "done";
        assert_eq!(done, expected.contains(&path.as_str()), "{path}: {result}");
    }
    let (root, options) = mount(seen, "/");
    assert!(options.contains("ro"), "{root}");
    for at in ["/tmp", "/home/agent"] {
        let (mount, options) = mount(seen, at);
        assert_ne!(mount["type"], "tmpfs", "{mount}");
        assert!(options.is_superset(&["rw", "nosuid", "nodev"].into()), "{mount}");
    }
}

fn whom_it_reaches(seen: &Seen) {
    assert_eq!(*seen.get("devices_of_net"), json!(["lo"]));
    assert_eq!((seen.get("routes"), seen.get("routes6")), (&json!([]), &json!([])));
    assert_eq!(*seen.get("resolv"), json!(["nameserver", "127.0.0.1"]));
    let hosts = seen.get("hosts").to_string();
    assert!(hosts.contains("localhost") && !hosts.contains("172."), "{hosts}");
    all(seen.get("dns"), &["ECONNREFUSED", "ENETUNREACH", "TimeoutError"]);
    assert_eq!(*seen.get("name"), "gaierror");
    all(seen.get("reach"), &["ENETUNREACH", "ECONNREFUSED", "EADDRNOTAVAIL", "ENOENT"]);
    assert_eq!((seen.get("abstract"), seen.get("sockets")), (&json!([]), &json!([])));
}

fn what_it_sees(seen: &Seen) {
    // Its own two sockets by name; the directory cannot be listed.
    assert_eq!(*seen.get("run"), "EACCES");
    assert_eq!(*seen.get("cells"), json!(["ctl.sock", "api.sock", ".."]));
    assert_eq!(*seen.get("setuid"), json!([]));
    let devices: BTreeSet<&str> =
        seen.get("devices").as_array().unwrap().iter().map(|d| d.as_str().unwrap()).collect();
    let known = ["null", "zero", "full", "random", "urandom", "tty", "pts/ptmx", "console"]
        .map(|d| format!("/dev/{d}"));
    assert!(devices.iter().all(|d| known.iter().any(|k| k == d)), "{devices:?}");
    for (path, content) in seen.get("masked").as_object().unwrap() {
        let empty = *content == json!("") || *content == json!([]) || *content == json!("error 2");
        assert!(empty, "{path} shows {content}");
    }
    // The files behind loop devices are named by their paths on the host: those are other cells.
    assert_eq!((seen.get("backing"), seen.get("dmi")), (&json!([]), &json!([])));
    let known = [
        "/",
        "/proc",
        "/dev",
        "/dev/pts",
        "/dev/mqueue",
        "/dev/shm",
        "/sys",
        "/sys/fs/cgroup",
        "/workspace",
        "/tmp",
        "/home/agent",
        "/.hotcell",
        "/.hotcell-git",
        "/.hotcell-init",
        "/.hotcell-agent/claude",
        "/etc/passwd",
        "/etc/group",
        "/etc/claude-code",
        "/etc/resolv.conf",
        "/etc/hosts",
        "/etc/hostname",
    ];
    for mount in seen.get("mounts").as_array().unwrap() {
        let at = mount["at"].as_str().unwrap();
        // Masked and read-only paths are mounts too, and cgroup version 1 has one a controller.
        let ours = known.contains(&at) || at.starts_with("/proc/") || at.starts_with("/sys/");
        assert!(ours, "an unexpected mount: {mount}");
        let read_only = at.starts_with("/.hotcell")
            || at.starts_with("/etc/") && !at.ends_with("conf") && !at.contains("/host");
        let options = mount["options"].as_str().unwrap();
        assert!(!read_only || options.starts_with("ro"), "{mount}");
    }
}
