//! The processes of a container as the kernel shows them, for the times when the engine does not answer or says what is
//! not so. They are known by their cgroup, whose path holds the container's id and which nothing in a cell can leave.
//! It must never signal a process whose cgroup it did not look at after it had got hold of it: process ids are used
//! again. All of it blocks, for milliseconds, but for [`end`].

use std::fs;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Between two looks while processes end.
const POLL: Duration = Duration::from_millis(20);
/// Digits of a container's id: a name says nothing of a cgroup.
const ID_DIGITS: usize = 64;

/// Whether processes of a container can be found by `text`.
pub(super) fn is_id(text: &str) -> bool {
    text.len() == ID_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// A process that was seen in its container.
pub(super) struct Held {
    /// Its id on the host; another's once it has ended.
    pub(super) pid: u32,
    /// Readable once it has ended.
    pub(super) fd: OwnedFd,
}

/// Gets hold of a process of the container. None where it has ended, or is another one's.
pub(super) fn hold(pid: u32, container: &str) -> Option<Held> {
    let fd = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()?;
    // Only now: if it has ended and its id is another's by now, what is held hears no signal.
    is_of(pid, container).then_some(Held { pid, fd })
}

/// The first process of the container, with all others of its namespace: its end is theirs.
pub(super) fn hold_first(container: &str) -> Option<Held> {
    let mut found = all(container);
    let first = found.iter().position(|held| is_first(held.pid)).unwrap_or(0);
    (!found.is_empty()).then(|| found.swap_remove(first))
}

/// SIGKILL to all processes of the container until none is left, for at most `limit`. True when none is.
pub(super) fn end(container: &str, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        let found = all(container);
        if found.is_empty() {
            return true;
        }
        for held in &found {
            // One that has ended meanwhile is what is wanted.
            let _ = pidfd_send_signal(&held.fd, Signal::KILL);
            thaw(held.pid);
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(POLL);
    }
}

fn all(container: &str) -> Vec<Held> {
    if !is_id(container) {
        return Vec::new();
    }
    let listed = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = listed.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| is_of(*pid, container)).filter_map(|pid| hold(pid, container)).collect()
}

/// Zombies are none: what they were has ended, whoever has yet to hear of it.
fn is_of(pid: u32, container: &str) -> bool {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    names(&cgroups, container)
        && !has_ended(&fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default())
}

/// Whether a `/proc/PID/cgroup` is that of a process in the container: `…/ID`, or `…-ID.scope` where systemd keeps
/// cgroups. Podman's own process beside a container is none of it.
fn names(cgroups: &str, container: &str) -> bool {
    let paths = cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths.flat_map(|path| path.split('/')).any(|part| {
        let scope = part.strip_suffix(".scope").and_then(|scope| scope.rsplit_once('-'));
        match scope {
            Some((before, id)) => id == container && !before.ends_with("conmon"),
            None => part == container,
        }
    })
}

/// From a `/proc/PID/stat`: the state stands after the name, which may hold anything.
fn has_ended(stat: &str) -> bool {
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next());
    matches!(state, None | Some("Z" | "X"))
}

/// PID 1 of its own namespace. Under gVisor there is none that the host can see.
fn is_first(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    let ids: Vec<&str> = ids.split_whitespace().collect();
    ids.len() > 1 && ids.last() == Some(&"1")
}

/// In cgroups of version 1 a frozen process dies only once it is thawed.
fn thaw(pid: u32) {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if let Some(file) = freezer(&cgroups, &mounts)
        && fs::read_to_string(&file).is_ok_and(|state| state.trim() != "THAWED")
    {
        // Where it cannot be done the caller sees that the process does not end.
        let _ = fs::write(&file, "THAWED");
    }
}

/// The file that says whether the processes of a cgroup are frozen, where the hierarchy is mounted whole.
fn freezer(cgroups: &str, mounts: &str) -> Option<String> {
    let is_freezer = |list: &str| list.split(',').any(|name| name == "freezer");
    let path = cgroups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        fields.next().filter(|controllers| is_freezer(controllers))?;
        fields.next()
    })?;
    let point = mounts.lines().find_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, point) = (mount.next()?, mount.next()?);
        let mut system = system.split(' ');
        let kind = system.next().filter(|kind| *kind == "cgroup" && root == "/");
        kind.and(system.nth(1)).filter(|options| is_freezer(options)).map(|_| point)
    })?;
    Some(format!("{point}{path}/freezer.state"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4f8a0c5d4f8a0c5d4f8a0c5d4f8a0c5d4f8a0c5d4f8a0c5d4f8a0c5d4f8a0c5d";

    #[test]
    fn a_process_is_known_by_its_cgroup_however_the_engine_names_it() {
        let of = |path: &str| names(&format!("4:memory:/other\n0::{path}\n"), ID);
        assert!(of(&format!("/docker/{ID}")));
        assert!(of(&format!("/docker/{ID}/below")));
        assert!(of(&format!("/system.slice/docker-{ID}.scope")));
        assert!(of(&format!("/machine.slice/libpod-{ID}.scope/container")));
        assert!(!of(&format!("/machine.slice/libpod-conmon-{ID}.scope")), "podman's helper");
        assert!(!of(&format!("/docker/x{ID}")) && !of("/docker/") && !of(&format!("/docker/{}", &ID[1..])));
        assert!(names(&format!("9:name=systemd:/docker/{ID}\n"), ID));
        assert!(is_id(ID) && !is_id("hotcell-x-c1") && !is_id(&ID[1..]));
    }

    #[test]
    fn a_zombie_has_ended_whatever_it_calls_itself() {
        assert!(has_ended("12 (a) S) b) Z 1 2 3"));
        assert!(!has_ended("12 (a) Z) S 1 2 3"));
        assert!(has_ended(""), "it is gone");
    }

    #[test]
    fn the_freezer_of_a_cgroup_is_found_where_it_is_mounted() {
        let cgroups = format!("6:freezer:/docker/{ID}\n0::/\n");
        let mounts = "30 29 0:26 / /cg/memory rw - cgroup cgroup rw,memory\n\
                      31 29 0:27 / /cg/freezer rw,relatime shared:9 - cgroup cgroup rw,freezer\n";
        assert_eq!(freezer(&cgroups, mounts), Some(format!("/cg/freezer/docker/{ID}/freezer.state")));
        assert_eq!(freezer("0::/docker\n", mounts), None);
        assert_eq!(freezer(&cgroups, "31 29 0:27 /part /cg/freezer rw - cgroup cgroup rw,freezer\n"), None);
    }

    #[test]
    fn a_process_of_no_container_is_not_held() {
        assert!(hold(std::process::id(), ID).is_none());
        assert!(hold_first(ID).is_none());
        assert!(end(ID, Duration::ZERO), "none is left of what never was");
    }
}
