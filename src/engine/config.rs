//! The one container configuration that cells have, as JSON of the Engine API. Pure, and held by a snapshot:
//! any change of it is seen in review. A `CellSpec` fills in names, limits and mounts and can loosen nothing.
//!
//! Why, where it is not plain:
//! - **No network device but lo**; every way out is a unix socket in a bound directory. `Dns` is set
//!   because the engine would copy the host's resolver into resolv.conf otherwise.
//! - **`Init: false`, `Healthcheck: NONE`, `Entrypoint`** replace what an engine's defaults or an image would run.
//! - **`MaskedPaths`** replaces the engine's list, so it repeats it, then hides what tells about the host. Block
//!   devices are hidden by all their names: a loop device tells the path of the file behind it, which is
//!   the scratch space of another cell.
//! - **Memory = MemorySwap**: no swap beyond the limit. No `nproc` limit: it counts per host uid, over all
//!   cells of that uid; `PidsLimit` counts the cell.
//! - **No tmpfs** for /tmp and HOME: they would count as memory. They are mounts that the caller gives.
//! - **Log driver `none`**: init carries the streams; the engine would write them to the host's disk.
//! - **seccomp** is our own profile, inline, so that no file of the host is involved and no default of an
//!   engine matters. Its rules carry their reasons as `comment`. In short: default is EPERM; native
//!   architecture only; sockets are unix, inet and route netlink; no new namespaces; no setuid or setgid
//!   bit can be created; nothing looks into another process. An argument that a filter compares is cut
//!   to the width the kernel reads (mask), or a caller slips by with high bits set. A filter cannot read
//!   memory, so calls that take flags or modes by pointer (clone3, openat2) are answered with ENOSYS.
//!   Names that an older libseccomp does not know are left out by the runtime, hence denied.

use std::path::Path;

use serde_json::{Value, json};

use super::{CellLimits, CellSpec, EngineError, LABEL_CELL, LABEL_INSTANCE};

/// Our seccomp profile, as the engine takes it.
pub const SECCOMP_PROFILE: &str = include_str!("../../policies/seccomp.json");

/// Locked memory per process, in bytes (the kernel's own default).
const MEMLOCK_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// /dev/shm, in bytes (the engine's default; counts as the cell's memory).
const SHM_BYTES: u64 = 64 * 1024 * 1024;
/// Cells die before the daemon and the engine do when the host runs out of memory.
const OOM_SCORE_ADJ: i64 = 500;
/// Engines refuse less than this.
const MEMORY_BYTES_MIN: u64 = 6 * 1024 * 1024;

const MASKED_PATHS: &[&str] = &[
    // the engine's own list
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    // ours: the host's identity, kernel and devices
    "/proc/cmdline",
    "/proc/config.gz",
    "/proc/diskstats",
    "/proc/iomem",
    "/proc/ioports",
    "/proc/kallsyms",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/modules",
    "/proc/partitions",
    "/proc/slabinfo",
    "/proc/swaps",
    "/proc/vmallocinfo",
    "/sys/block",
    "/sys/class/block",
    "/sys/class/dmi",
    "/sys/dev",
    "/sys/devices/pci0000:00",
    "/sys/devices/virtual/block",
    "/sys/devices/virtual/dmi",
    "/sys/fs/bpf",
    "/sys/kernel/debug",
    "/sys/kernel/mm",
    "/sys/kernel/security",
    "/sys/kernel/tracing",
    "/sys/kernel/vmcoreinfo",
    "/sys/module",
];
const READONLY_PATHS: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The body of a create call: the process, and `host_config` around it.
///
/// # Errors
/// `BadSpec` for what no cell may have: user or group 0, an image by name, a relative path, an empty
/// command, a limit of zero, text with NUL in it.
pub fn container_config(spec: &CellSpec) -> Result<Value, EngineError> {
    check(spec)?;
    let env: Vec<String> = spec.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    Ok(json!({
        "Hostname": "cell",
        "User": format!("{}:{}", spec.user.0, spec.user.1),
        "AttachStdin": true,
        "AttachStdout": false,
        "AttachStderr": false,
        "OpenStdin": true,
        "StdinOnce": true,
        "Tty": false,
        "Env": env,
        "Entrypoint": spec.argv,
        "Cmd": [],
        "Healthcheck": { "Test": ["NONE"] },
        "Image": spec.image_id,
        "WorkingDir": spec.working_dir,
        "Labels": { LABEL_INSTANCE: spec.instance.as_str(), LABEL_CELL: spec.cell.as_str() },
        "HostConfig": host_config(spec)?,
    }))
}

/// Everything a cell is held by.
///
/// # Errors
/// As `container_config`.
pub fn host_config(spec: &CellSpec) -> Result<Value, EngineError> {
    check(spec)?;
    let CellLimits { memory_bytes, cpus_milli, pids_max, nofile_max } = spec.limits;
    let groups: Vec<String> = spec.groups.iter().map(u32::to_string).collect();
    let mut config = json!({
        "NetworkMode": "none",
        "Dns": ["127.0.0.1"],
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "PidMode": "",
        "UTSMode": "",
        "Privileged": false,
        "PublishAllPorts": false,
        "ReadonlyRootfs": true,
        "CapAdd": [],
        "CapDrop": ["ALL"],
        "GroupAdd": groups,
        "SecurityOpt": ["no-new-privileges", format!("seccomp={}", seccomp_compact()?)],
        "MaskedPaths": MASKED_PATHS,
        "ReadonlyPaths": READONLY_PATHS,
        "Memory": memory_bytes,
        "MemorySwap": memory_bytes,
        "NanoCpus": u64::from(cpus_milli) * 1_000_000,
        "PidsLimit": pids_max,
        "OomScoreAdj": OOM_SCORE_ADJ,
        "OomKillDisable": false,
        "ShmSize": SHM_BYTES,
        "Ulimits": [
            { "Name": "core", "Soft": 0, "Hard": 0 },
            { "Name": "nofile", "Soft": nofile_max, "Hard": nofile_max },
            { "Name": "memlock", "Soft": MEMLOCK_BYTES_MAX, "Hard": MEMLOCK_BYTES_MAX },
        ],
        "Init": false,
        "LogConfig": { "Type": "none", "Config": {} },
        "RestartPolicy": { "Name": "no", "MaximumRetryCount": 0 },
        "AutoRemove": false,
        "Mounts": mounts(spec)?,
    });
    if let Some(runtime) = &spec.runtime {
        config["Runtime"] = json!(runtime);
    }
    Ok(config)
}

/// Compares what was asked with what the engine says the container has: an engine may drop an option that
/// its kernel or its compatibility layer lacks with no more than a warning. Options are compared that hold
/// a cell; `MemorySwap` is not, as hosts without swap accounting are common and the memory limit holds.
///
/// # Errors
/// `OptionIgnored` for the first that is not as asked.
pub(super) fn check_applied(asked: &Value, got: &Value) -> Result<(), EngineError> {
    let exact =
        ["NetworkMode", "Privileged", "ReadonlyRootfs", "Memory", "NanoCpus", "PidsLimit", "AutoRemove"];
    for option in exact {
        if asked[option] != got[option] {
            return Err(ignored(option, &asked[option], &got[option]));
        }
    }
    let has = |list: &Value, start: &str| {
        list.as_array().is_some_and(|l| l.iter().any(|v| v.as_str().is_some_and(|s| s.starts_with(start))))
    };
    if !asked["Runtime"].is_null() && asked["Runtime"] != got["Runtime"] {
        return Err(ignored("Runtime", &asked["Runtime"], &got["Runtime"]));
    }
    // Podman expands ALL into the single capabilities.
    if !has(&got["CapDrop"], "ALL") && !has(&got["CapDrop"], "CAP_") {
        return Err(ignored("CapDrop", &asked["CapDrop"], &got["CapDrop"]));
    }
    if has(&got["CapAdd"], "") {
        return Err(ignored("CapAdd", &asked["CapAdd"], &got["CapAdd"]));
    }
    for start in ["no-new-privileges", "seccomp="] {
        if !has(&got["SecurityOpt"], start) {
            return Err(ignored("SecurityOpt", &json!(start), &json!("without it")));
        }
    }
    if has(&got["SecurityOpt"], "seccomp=unconfined") {
        return Err(ignored("SecurityOpt", &json!("our seccomp profile"), &json!("unconfined")));
    }
    Ok(())
}

fn ignored(option: &'static str, asked: &Value, got: &Value) -> EngineError {
    EngineError::OptionIgnored { option, asked: asked.to_string(), got: got.to_string() }
}

/// The profile without white space and comments: engines store it with every container.
fn seccomp_compact() -> Result<String, EngineError> {
    let unreadable = |e: serde_json::Error| EngineError::BadSpec { reason: format!("seccomp profile: {e}") };
    let mut profile: Value = serde_json::from_str(SECCOMP_PROFILE).map_err(unreadable)?;
    for rule in profile["syscalls"].as_array_mut().into_iter().flatten() {
        if let Some(rule) = rule.as_object_mut() {
            rule.remove("comment");
        }
    }
    Ok(profile.to_string())
}

fn mounts(spec: &CellSpec) -> Result<Vec<Value>, EngineError> {
    spec.mounts
        .iter()
        .map(|mount| {
            let source = mount.source.to_str().ok_or_else(|| bad("a mount source is not UTF-8"))?;
            Ok(json!({
                "Type": "bind",
                "Source": source,
                "Target": mount.target,
                "ReadOnly": mount.read_only,
                "BindOptions": { "Propagation": "rprivate" },
            }))
        })
        .collect()
}

fn bad(reason: &str) -> EngineError {
    EngineError::BadSpec { reason: reason.to_owned() }
}

fn check(spec: &CellSpec) -> Result<(), EngineError> {
    let (uid, gid) = spec.user;
    if uid == 0 || gid == 0 || spec.groups.contains(&0) {
        return Err(bad("user, group and supplementary groups of a cell are never 0"));
    }
    check_image_id(&spec.image_id)?;
    if spec.argv.first().is_none_or(|program| !program.starts_with('/')) {
        return Err(bad("PID 1 must be an absolute path"));
    }
    if !spec.working_dir.starts_with('/') {
        return Err(bad("the working directory must be an absolute path"));
    }
    let limits = &spec.limits;
    if limits.memory_bytes < MEMORY_BYTES_MIN || limits.memory_bytes > i64::MAX as u64 {
        return Err(bad("the memory limit must be at least 6 MiB"));
    }
    if limits.cpus_milli == 0 || limits.pids_max == 0 || limits.nofile_max == 0 {
        return Err(bad("limits of cpu, processes and open files must not be 0"));
    }
    for mount in &spec.mounts {
        if !mount.source.is_absolute() || !mount.target.starts_with('/') || mount.target == "/" {
            return Err(bad("mounts need absolute paths, and none may cover /"));
        }
        if is_engine_socket(&mount.source) {
            return Err(bad("the engine's socket is never mounted into a cell"));
        }
    }
    if spec
        .env
        .iter()
        .any(|(name, value)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0'))
    {
        return Err(bad("an environment variable has an empty name, or '=' or NUL where it cannot be"));
    }
    Ok(())
}

fn is_engine_socket(source: &Path) -> bool {
    source
        .file_name()
        .is_some_and(|name| name == "docker.sock" || name == "podman.sock" || name == "engine.sock")
}

/// # Errors
/// `BadSpec` unless it is `sha256:` and 64 hex digits.
pub(super) fn check_image_id(image_id: &str) -> Result<(), EngineError> {
    let digits = image_id.strip_prefix("sha256:").unwrap_or("");
    if digits.len() == 64 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Ok(());
    }
    let shown: String = image_id.chars().take(80).collect();
    Err(EngineError::BadSpec { reason: format!("cells are created by image id (sha256:…), not {shown:?}") })
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::BindMount;
    use super::*;

    pub(crate) fn spec() -> CellSpec {
        CellSpec {
            instance: "h2v7hk0x".parse().unwrap(),
            cell: "c7hk0x3m9ra2v".parse().unwrap(),
            image_id: format!("sha256:{}", "ab".repeat(32)),
            user: (0x6000_0001, 0x6000_0001),
            groups: vec![0x6000_0064],
            limits: CellLimits {
                memory_bytes: 4 << 30,
                cpus_milli: 1500,
                pids_max: 1024,
                nofile_max: 65_536,
            },
            mounts: vec![
                BindMount { source: "/state/run".into(), target: "/.hotcell".to_owned(), read_only: true },
                BindMount { source: "/state/work".into(), target: "/workspace".to_owned(), read_only: false },
            ],
            runtime: None,
            working_dir: "/workspace".to_owned(),
            argv: vec!["/.hotcell-init".to_owned()],
            env: vec![("ANTHROPIC_API_KEY".to_owned(), "token-of-this-job".to_owned())],
        }
    }

    #[test]
    fn the_configuration_of_a_cell_is_the_golden_one() {
        let mut config = container_config(&spec()).unwrap();
        let profile = config["HostConfig"]["SecurityOpt"][1].take();
        assert!(profile.as_str().unwrap().starts_with("seccomp={"));
        insta::assert_snapshot!(serde_json::to_string_pretty(&config).unwrap());
    }

    #[test]
    fn a_runtime_that_is_asked_for_is_all_that_differs() {
        let plain = host_config(&spec()).unwrap();
        let mut gvisor = host_config(&CellSpec { runtime: Some("runsc".to_owned()), ..spec() }).unwrap();
        assert_eq!(plain.get("Runtime"), None);
        assert_eq!(gvisor.as_object_mut().unwrap().remove("Runtime"), Some(json!("runsc")));
        assert_eq!(gvisor, plain, "gVisor's cells are held by everything that runc's are");
    }

    #[test]
    fn the_configuration_of_a_gvisor_cell_is_the_golden_one() {
        let mut config = container_config(&CellSpec { runtime: Some("runsc".to_owned()), ..spec() }).unwrap();
        let profile = config["HostConfig"]["SecurityOpt"][1].take();
        assert!(profile.as_str().unwrap().starts_with("seccomp={"));
        insta::assert_snapshot!(serde_json::to_string_pretty(&config).unwrap());
    }

    #[test]
    fn what_no_cell_may_have_is_refused() {
        let mount = |source: &str, target: &str| {
            vec![BindMount { source: source.into(), target: target.to_owned(), read_only: true }]
        };
        let no_memory = CellLimits { memory_bytes: 0, ..spec().limits };
        let no_pids = CellLimits { pids_max: 0, ..spec().limits };
        let cases = [
            ("root", CellSpec { user: (0, 1), ..spec() }),
            ("root group", CellSpec { user: (1, 0), ..spec() }),
            ("supplementary root", CellSpec { groups: vec![7, 0], ..spec() }),
            ("image by name", CellSpec { image_id: "node:22".to_owned(), ..spec() }),
            ("no command", CellSpec { argv: vec![], ..spec() }),
            ("relative command", CellSpec { argv: vec!["sh".to_owned()], ..spec() }),
            ("relative directory", CellSpec { working_dir: "w".to_owned(), ..spec() }),
            ("no memory limit", CellSpec { limits: no_memory, ..spec() }),
            ("no process limit", CellSpec { limits: no_pids, ..spec() }),
            ("relative mount", CellSpec { mounts: mount("here", "/x"), ..spec() }),
            ("mount over /", CellSpec { mounts: mount("/x", "/"), ..spec() }),
            ("engine socket", CellSpec { mounts: mount("/var/run/docker.sock", "/d"), ..spec() }),
            ("split variable", CellSpec { env: vec![("A=B".to_owned(), String::new())], ..spec() }),
        ];
        for (name, spec) in cases {
            assert!(matches!(container_config(&spec), Err(EngineError::BadSpec { .. })), "{name}");
        }
    }

    #[test]
    fn an_option_that_the_engine_dropped_is_named() {
        let asked = host_config(&CellSpec { runtime: Some("runsc".to_owned()), ..spec() }).unwrap();
        assert_eq!(check_applied(&asked, &asked), Ok(()));
        let changes = [
            ("Memory", json!(0)),
            ("PidsLimit", Value::Null),
            ("NanoCpus", json!(0)),
            ("NetworkMode", json!("default")),
            ("ReadonlyRootfs", json!(false)),
            ("Runtime", json!("runc")),
            ("CapDrop", Value::Null),
            ("CapAdd", json!(["CAP_SYS_ADMIN"])),
            ("SecurityOpt", json!(["no-new-privileges"])),
            ("SecurityOpt", json!(["no-new-privileges", "seccomp=unconfined"])),
        ];
        for (name, value) in changes {
            let mut got = asked.clone();
            got[name] = value;
            let error = check_applied(&asked, &got).unwrap_err();
            assert!(
                matches!(error, EngineError::OptionIgnored { option, .. } if option == name),
                "{name}: {error}"
            );
        }
    }

    fn profile() -> &'static Value {
        static PROFILE: std::sync::LazyLock<Value> =
            std::sync::LazyLock::new(|| serde_json::from_str(SECCOMP_PROFILE).unwrap());
        &PROFILE
    }

    fn rules_for(name: &str) -> Vec<&'static Value> {
        let names = |rule: &Value| rule["names"].as_array().unwrap().iter().any(|n| n == name);
        profile()["syscalls"].as_array().unwrap().iter().filter(|rule| names(rule)).collect()
    }

    #[test]
    fn the_profile_denies_by_default_and_knows_native_calls_only() {
        let profile = profile();
        assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
        for arch in profile["archMap"].as_array().unwrap() {
            assert_eq!(arch["subArchitectures"], json!([]));
        }
        for rule in profile["syscalls"].as_array().unwrap() {
            assert!(
                rule["comment"].as_str().is_some_and(|c| !c.is_empty()),
                "a rule without a reason: {rule}"
            );
        }
    }

    #[test]
    fn no_call_is_both_allowed_and_denied() {
        let profile = profile();
        let mut seen = std::collections::BTreeMap::new();
        for rule in profile["syscalls"].as_array().unwrap() {
            for name in rule["names"].as_array().unwrap() {
                let kind = (rule["action"].clone().to_string(), rule.get("args").is_some());
                let before = seen.entry(name.to_string()).or_insert_with(|| kind.clone());
                assert_eq!(*before, kind, "{name}: rules of different kinds");
                assert!(kind.1 || rules_for(name.as_str().unwrap()).len() == 1, "{name} is listed twice");
            }
        }
    }

    /// What a filter of our rules answers: allowed if any rule matches all its masked comparisons.
    fn allows(name: &str, args: &[u64]) -> bool {
        rules_for(name).iter().any(|rule| {
            let conditions = rule.get("args").and_then(Value::as_array);
            rule["action"] == "SCMP_ACT_ALLOW"
                && conditions.into_iter().flatten().all(|c| {
                    assert_eq!(c["op"], "SCMP_CMP_MASKED_EQ", "{name}: high bits could slip by");
                    let index = c["index"].as_u64().unwrap() as usize;
                    args[index] & c["value"].as_u64().unwrap() == c["valueTwo"].as_u64().unwrap()
                })
        })
    }

    #[test]
    fn dangerous_terminal_controls_are_denied_whatever_the_high_bits() {
        for denied in [0x5412, 0x541C, 0x541D, 0x5423] {
            assert!(!allows("ioctl", &[0, denied]) && !allows("ioctl", &[0, denied | 1 << 40]), "{denied:x}");
        }
        for cmd in (0..0x1_0000).chain([0x8004_5430, 0x4004_5431, 0x4004_9409]) {
            assert_eq!(
                allows("ioctl", &[0, cmd]),
                ![0x5412, 0x541C, 0x541D, 0x5423].contains(&cmd),
                "{cmd:x}"
            );
        }
    }

    #[test]
    fn sockets_are_unix_inet_and_route_netlink() {
        for family in 0..64 {
            for protocol in [0, 1, 6, 9, 17, 132, 262] {
                let expected = match family {
                    1 => true,
                    2 | 10 => [0, 6, 17].contains(&protocol),
                    16 => protocol == 0,
                    _ => false,
                };
                assert_eq!(allows("socket", &[family, 1, protocol]), expected, "{family} {protocol}");
            }
        }
    }

    #[test]
    fn no_mode_with_setuid_or_setgid_passes() {
        for bits in [0o4000, 0o2000, 0o6000] {
            let mode = bits | 0o755;
            assert!(
                !allows("chmod", &[0, mode]) && !allows("fchmod", &[0, mode]) && !allows("creat", &[0, mode])
            );
            assert!(!allows("fchmodat", &[0, 0, mode]) && !allows("fchmodat2", &[0, 0, mode, 0]));
            for create in [0o100, 0o20_000_000, 0o20_200_000] {
                assert!(!allows("open", &[0, create, mode]) && !allows("openat", &[0, 0, create, mode]));
            }
            // Without O_CREAT the mode is a left-over in a register.
            assert!(allows("open", &[0, 0, mode]) && allows("openat", &[0, 0, 0o200_000, mode]));
            assert!(!allows("mknod", &[0, 0o100_000 | mode, 0]) && !allows("mknodat", &[0, 0, mode, 0]));
        }
        assert!(allows("chmod", &[0, 0o1777]) && allows("openat", &[0, 0, 0o101, 0o666]));
        for device in [0o020_000, 0o060_000] {
            assert!(!allows("mknod", &[0, device | 0o600, 0]), "devices, and whiteouts among them");
        }
        assert!(allows("mknod", &[0, 0o010_644, 0]));
    }

    #[test]
    fn no_namespace_can_be_made() {
        for flag in
            [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000]
        {
            assert!(!allows("clone", &[flag | 17]) && !allows("unshare", &[flag]), "{flag:x}");
        }
        assert!(!allows("unshare", &[0x80]), "time namespace");
        assert!(allows("clone", &[0x003d_0f00]) && allows("clone", &[17]) && allows("unshare", &[0x200]));
        let denied =
            ["clone3", "setns", "mount", "ptrace", "bpf", "io_uring_setup", "openat2", "memfd_secret"];
        for name in denied {
            assert!(!allows(name, &[0; 6]), "{name}");
        }
    }
}
