//! Whether a cell kept its promises: what an attack printed in it against what every cell promises. Pure. A promise
//! holds only where each of its attempts was made and failed: what is missing, said twice or not understood proves
//! nothing, and that counts as broken.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::api::wire::{Check, CheckVerdict};
use crate::job::spec::Runtime;
use crate::job::{FailReason, Outcome};

/// Most lines of an attack that are read.
const LINES_MAX: usize = 1000;
/// Most attempts that are named in one row.
const NAMED_MAX: usize = 4;
/// Fewest files that a search for secrets must have opened to be one.
const FILES_MIN: u64 = 2;

/// What the daemon knows of the cell that was attacked, from nobody in it.
#[derive(Debug, Clone)]
pub(super) struct Expected {
    /// What isolates the cell.
    pub(super) runtime: Runtime,
    /// Release of the host's kernel.
    pub(super) kernel: String,
    /// The limits of the cell.
    pub(super) limits: Limits,
    /// The policy lets the name through that nobody has.
    pub(super) opens_any: bool,
    /// Hosts that the policy opens.
    pub(super) opens: Vec<String>,
}

/// Limits of the attack's cell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) pids: u32,
    pub(super) memory_mib: u32,
    pub(super) disk_mib: u32,
}

/// What an attack saw.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    findings: BTreeMap<String, String>,
    /// Said more than once: nobody knows which is true.
    twice: BTreeSet<String>,
    /// Lines that are none of the attack's.
    foreign: usize,
    /// Floods with which the whole cell ended, as the daemon saw it.
    ended: BTreeSet<&'static str>,
}

/// One line of an attack.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    nonce: String,
    name: String,
    seen: String,
}

/// Reads what the attack printed in a cell that ended so.
pub(super) fn read(output: &str, nonce: &str, outcome: &Outcome) -> Seen {
    let mut seen = Seen::default();
    for line in output.lines().take(LINES_MAX) {
        match serde_json::from_str::<Line>(line) {
            Ok(line) if line.nonce == nonce => {
                if seen.findings.insert(line.name.clone(), line.seen).is_some() {
                    seen.twice.insert(line.name);
                }
            }
            Ok(_) | Err(_) => seen.foreign += 1,
        }
    }
    seen.foreign += output.lines().skip(LINES_MAX).count();
    let by_a_limit = match outcome {
        Outcome::Failed(failure) => {
            matches!(failure.reason, FailReason::Oom | FailReason::CellLost | FailReason::DiskFull)
        }
        Outcome::Succeeded | Outcome::Lost | Outcome::Stopped { .. } => false,
    };
    if by_a_limit {
        let half = |name: &&str| seen.of(&begun(name)).is_some() && seen.of(&flooded(name)).is_none();
        seen.ended = FLOODS.into_iter().filter(half).collect();
    }
    seen
}

/// Floods by their names.
const FLOODS: [&str; 3] = ["processes", "memory", "disk"];

fn flooded(name: &str) -> String {
    format!("flood.{name}")
}

fn begun(name: &str) -> String {
    format!("flood.{name}.begun")
}

/// What must have been seen of one attempt.
#[derive(Debug, Clone, Copy)]
enum Rule {
    /// It failed by an error of the system.
    Refused,
    /// Exactly this.
    Is(&'static str),
    /// Some of these words and no other.
    Only(&'static [&'static str]),
    /// Not there, not readable, or empty.
    Hidden,
    /// The proxy said no, or nobody listens.
    NotLetThrough,
    /// At least so many.
    AtLeast(u64),
    /// No id of root among them.
    NotRoot,
    /// Anything: that it was tried is what counts.
    Tried,
    /// Only where the host's kernel is the cell's. gVisor's does not tell all of it, and opens more of PID 1 to others
    /// of its user: nothing of that is a secret or leads anywhere, unlike its memory.
    OnHost(&'static Rule),
}

impl Rule {
    fn holds(self, seen: &str) -> bool {
        let errno =
            |text: &str| text.strip_prefix("errno ").is_some_and(|n| n.parse::<u32>().is_ok_and(|n| n > 0));
        match self {
            Self::Refused => errno(seen),
            Self::Is(wanted) => seen == wanted,
            Self::Only(known) => {
                !seen.is_empty() && seen.split_whitespace().all(|word| known.contains(&word))
            }
            Self::Hidden => seen == "empty" || errno(seen),
            Self::NotLetThrough => seen == "status 403" || errno(seen),
            Self::AtLeast(least) => seen.parse::<u64>().is_ok_and(|n| n >= least),
            Self::NotRoot => !seen.is_empty() && seen.split_whitespace().all(|id| id != "0"),
            Self::Tried => true,
            Self::OnHost(rule) => rule.holds(seen),
        }
    }
}

/// One promise of every cell.
struct Promise {
    name: &'static str,
    promise: &'static str,
    hint: &'static str,
    attempts: &'static [(&'static str, Rule)],
    /// Where the host's kernel is not the cell's, its own surface is another matter.
    of_the_hosts_kernel: bool,
}

const NO_RIGHT: Rule = Rule::Is("0000000000000000");
const UPDATE: &str = "bring engine, runtime and kernel up to date; `hotcell doctor` names their versions";
const REPORT: &str =
    "stop using this machine for code that you do not trust, and report this: hotcell support JOB";

const PROMISES: [Promise; 11] = [
    Promise {
        name: "rights",
        promise: "who runs in a cell is nobody on this machine, has no rights and gets none",
        hint: UPDATE,
        attempts: &[
            ("status.Uid", Rule::NotRoot),
            ("status.Gid", Rule::NotRoot),
            ("status.Groups", Rule::Tried),
            ("status.CapInh", NO_RIGHT),
            ("status.CapPrm", NO_RIGHT),
            ("status.CapEff", NO_RIGHT),
            ("status.CapBnd", NO_RIGHT),
            ("status.CapAmb", Rule::OnHost(&NO_RIGHT)),
            ("no_new_privs", Rule::Is("1")),
            ("setuid", Rule::Refused),
        ],
        of_the_hosts_kernel: false,
    },
    Promise {
        name: "calls",
        promise: "the kernel refuses a cell every call that other programs have escaped by",
        hint: UPDATE,
        attempts: &[
            ("status.Seccomp", Rule::Is("2")),
            ("call.unix", Rule::Is("done")),
            ("call.netlink_audit", Rule::Refused),
            ("call.inet_icmp", Rule::Refused),
            ("call.packet", Rule::Refused),
            ("call.af_alg", Rule::Refused),
            ("call.vsock", Rule::Refused),
            ("call.vsock_high_bits", Rule::Refused),
            ("call.ptrace", Rule::Refused),
            ("call.process_vm_readv", Rule::Refused),
            ("call.pidfd_getfd", Rule::Refused),
            ("call.unshare_user", Rule::Refused),
            ("call.setns", Rule::Refused),
            ("call.clone_newuser", Rule::Refused),
            ("call.clone3", Rule::Is("errno 38")),
            ("call.openat2", Rule::Is("errno 38")),
            ("call.io_uring_setup", Rule::Is("errno 38")),
            ("call.memfd_secret", Rule::Is("errno 38")),
            ("call.userfaultfd", Rule::Is("errno 38")),
            ("call.bpf", Rule::Is("errno 1")),
            ("call.keyctl", Rule::Is("errno 1")),
            ("call.perf_event_open", Rule::Is("errno 1")),
            ("call.mount", Rule::Is("errno 1")),
            ("call.vmsplice", Rule::Is("errno 1")),
            ("call.personality_read_implies_exec", Rule::Refused),
            ("call.ioctl_tiocsti", Rule::Is("errno 1")),
            ("call.ioctl_tiocsti_high_bits", Rule::Is("errno 1")),
            ("call.ioctl_tioclinux", Rule::Is("errno 1")),
            ("call.ioctl_tiocsetd", Rule::Is("errno 1")),
            ("call.chmod_setuid", Rule::Refused),
            ("call.chmod_setgid", Rule::Refused),
            ("call.fchmodat2_setuid", Rule::Refused),
            ("call.open_setuid", Rule::Refused),
            ("call.mknod_setuid", Rule::Refused),
            ("call.mknod_whiteout", Rule::Refused),
        ],
        of_the_hosts_kernel: true,
    },
    Promise {
        name: "writes",
        promise: "nothing can be written but the cell's own HOME, /tmp and workspace",
        hint: UPDATE,
        attempts: &[
            ("write./attack", Rule::Refused),
            ("write./etc/attack", Rule::Refused),
            ("write./usr/bin/attack", Rule::Refused),
            ("write./etc/passwd", Rule::Refused),
            ("write./etc/hosts", Rule::Refused),
            ("write./.hotcell/attack", Rule::Refused),
            ("write./.hotcell-init", Rule::Refused),
            ("write./proc/sys/kernel/core_pattern", Rule::Refused),
            ("write./proc/sysrq-trigger", Rule::Refused),
            ("write./proc/1/oom_score_adj", Rule::Refused),
            ("write./sys/attack", Rule::Refused),
            ("write./sys/fs/cgroup/cgroup.procs", Rule::Refused),
            ("write./sys/fs/cgroup/attack", Rule::Refused),
            ("mkdir./sys/fs/cgroup/attack", Rule::Refused),
            ("write./dev/attack", Rule::Refused),
        ],
        of_the_hosts_kernel: false,
    },
    Promise {
        name: "hidden",
        promise: "a cell does not see the host's kernel, devices and other cells",
        hint: UPDATE,
        attempts: &[
            ("hidden./proc/cmdline", Rule::Hidden),
            ("hidden./proc/config.gz", Rule::Hidden),
            ("hidden./proc/diskstats", Rule::Hidden),
            ("hidden./proc/iomem", Rule::Hidden),
            ("hidden./proc/kallsyms", Rule::Hidden),
            ("hidden./proc/kcore", Rule::Hidden),
            ("hidden./proc/keys", Rule::Hidden),
            ("hidden./proc/modules", Rule::Hidden),
            ("hidden./proc/partitions", Rule::Hidden),
            ("hidden./sys/block", Rule::Hidden),
            ("hidden./sys/firmware", Rule::Hidden),
            ("hidden./sys/fs/bpf", Rule::Hidden),
            ("hidden./sys/kernel/debug", Rule::Hidden),
            ("hidden./sys/kernel/security", Rule::Hidden),
        ],
        of_the_hosts_kernel: true,
    },
    Promise {
        name: "devices",
        promise: "there is no device but those that every program has",
        hint: UPDATE,
        attempts: &[(
            "devices",
            Rule::Only(&[
                "/dev/null",
                "/dev/zero",
                "/dev/full",
                "/dev/random",
                "/dev/urandom",
                "/dev/tty",
                "/dev/console",
                "/dev/ptmx",
                "/dev/pts/ptmx",
            ]),
        )],
        of_the_hosts_kernel: true,
    },
    Promise {
        name: "sockets",
        promise: "no socket of an engine or a daemon of the host can be reached",
        hint: "an image or a mount brings it in: look at the policy's image",
        attempts: &[
            ("socket./var/run/docker.sock", Rule::Refused),
            ("socket./run/docker.sock", Rule::Refused),
            ("socket./run/podman/podman.sock", Rule::Refused),
            ("socket./run/containerd/containerd.sock", Rule::Refused),
            ("socket./run/hotcell/hotcell.sock", Rule::Refused),
            ("socket./run/hotcell/engine.sock", Rule::Refused),
            ("socket./proc/1/root/run/docker.sock", Rule::Refused),
        ],
        of_the_hosts_kernel: false,
    },
    Promise {
        name: "pid1",
        promise: "nobody looks into PID 1 of the cell, which holds the key to the daemon",
        hint: REPORT,
        attempts: &[
            ("pid1.environ", Rule::OnHost(&Rule::Refused)),
            ("pid1.mem", Rule::Refused),
            ("pid1.maps", Rule::OnHost(&Rule::Refused)),
            ("pid1.fd", Rule::OnHost(&Rule::Refused)),
            ("pid1.root", Rule::Refused),
            ("pid1.ptrace", Rule::Refused),
        ],
        of_the_hosts_kernel: false,
    },
    Promise {
        name: "network",
        promise: "a cell has no network: no device but lo, no route, no resolver",
        hint: "another tool connects the engine's containers to a network: it must leave those of hotcell alone",
        attempts: &[
            ("net.devices", Rule::Is("lo")),
            ("net.routes", Rule::Is("0")),
            ("dns.servers", Rule::Is("127.0.0.1")),
            ("dns.answer", Rule::Refused),
        ],
        of_the_hosts_kernel: false,
    },
    Promise {
        name: "metadata",
        promise: "the proxy leads to no address of this machine or its cloud",
        hint: REPORT,
        attempts: &[
            ("proxy.metadata", Rule::NotLetThrough),
            ("proxy.metadata_http", Rule::NotLetThrough),
            ("proxy.loopback", Rule::NotLetThrough),
        ],
        of_the_hosts_kernel: false,
    },
    Promise {
        name: "secrets",
        promise: "no credential is in a cell: not in its variables, its processes, its files",
        hint: "take it out of the image or of the policy's [env], and renew it",
        attempts: &[
            ("secrets.control", Rule::Is("found")),
            ("secrets.looked", Rule::AtLeast(FILES_MIN)),
            ("secrets.variables", Rule::Is("none")),
            ("secrets.processes", Rule::Is("none")),
            ("secrets.files", Rule::Is("none")),
        ],
        of_the_hosts_kernel: false,
    },
    Promise {
        name: "result",
        promise: "what the daemon is told comes from PID 1 alone",
        hint: REPORT,
        attempts: &[
            ("result.fd1", Rule::OnHost(&Rule::Refused)),
            ("result.fd2", Rule::OnHost(&Rule::Refused)),
            ("result.spoken", Rule::Tried),
            ("looked", Rule::AtLeast(50)),
        ],
        of_the_hosts_kernel: false,
    },
];

/// Every promise, in the order of the table.
pub(super) fn judge(expected: &Expected, seen: &Seen) -> Vec<Check> {
    let mut rows: Vec<Check> = PROMISES.iter().map(|promise| row(promise, expected, seen)).collect();
    rows.push(egress(expected, seen));
    let Limits { pids, memory_mib, disk_mib } = expected.limits;
    rows.push(flood(seen, ("processes", "processes are bounded"), ("errno 11", pids), "processes"));
    rows.push(flood(seen, ("memory", "memory is bounded"), ("signal 9", memory_mib), "MiB"));
    rows.push(flood(seen, ("disk", "disk space is bounded"), ("errno 28", disk_mib), "MiB"));
    rows
}

fn made(name: &str, promise: &str, verdict: CheckVerdict, words: String, hint: &str) -> Check {
    let hint = (verdict != CheckVerdict::Pass).then(|| hint.to_owned());
    Check { name: name.to_owned(), verdict, words, hint, promise: Some(promise.to_owned()) }
}

/// The names of some attempts.
fn some(names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMED_MAX);
    let named = names[..names.len().min(NAMED_MAX)].join(", ");
    if more == 0 { named } else { format!("{named} and {more} more") }
}

impl Seen {
    /// Adds what was seen in another cell of the same attack.
    pub(super) fn add(&mut self, other: Self) {
        for (name, seen) in other.findings {
            if self.findings.insert(name.clone(), seen).is_some() {
                self.twice.insert(name);
            }
        }
        self.twice.extend(other.twice);
        self.ended.extend(other.ended);
        self.foreign += other.foreign;
    }

    /// Whether the attack said nothing at all.
    pub(super) fn is_empty(&self) -> bool {
        self.findings.is_empty()
    }

    /// What was seen of one attempt, where that is known.
    fn of(&self, name: &str) -> Option<&str> {
        self.findings.get(name).map(String::as_str).filter(|_| !self.twice.contains(name))
    }
}

fn row(promise: &Promise, expected: &Expected, seen: &Seen) -> Check {
    let row = |verdict, words: String| made(promise.name, promise.promise, verdict, words, promise.hint);
    if promise.name == "result"
        && (seen.foreign > 0 || seen.findings.contains_key("forged") || !seen.twice.is_empty())
    {
        let words = format!(
            "{} lines came out of the cell that the attack did not print once",
            seen.foreign + seen.twice.len() + usize::from(seen.findings.contains_key("forged"))
        );
        return row(CheckVerdict::Fail, words);
    }
    if promise.of_the_hosts_kernel && expected.runtime == Runtime::Runsc {
        let release = seen.of("kernel").unwrap_or_default();
        let told = release.starts_with(|c: char| c.is_ascii_digit());
        return if !told || release == expected.kernel {
            row(CheckVerdict::Fail, format!("not proven: gVisor's kernel should answer, and {release:?} did"))
        } else {
            row(CheckVerdict::Pass, format!("gVisor's own kernel ({release}) answers in place of the host's"))
        };
    }
    let (mut broken, mut missing, mut count) = (Vec::new(), Vec::new(), 0);
    for (name, rule) in promise.attempts {
        if matches!(rule, Rule::OnHost(_)) && expected.runtime == Runtime::Runsc {
            continue;
        }
        count += 1;
        match seen.of(name) {
            None => missing.push((*name).to_owned()),
            Some(seen) if !rule.holds(seen) => broken.push(format!("{name}: {seen}")),
            Some(_) => {}
        }
    }
    if !broken.is_empty() {
        return row(CheckVerdict::Fail, format!("broken: {}", some(&broken)));
    }
    if !missing.is_empty() {
        return row(CheckVerdict::Fail, format!("not proven, nothing was said of {}", some(&missing)));
    }
    row(
        CheckVerdict::Pass,
        format!(
            "{} as promised",
            if count == 1 { "one try".to_owned() } else { format!("{count} tries, all") }
        ),
    )
}

/// What the policy opens is no broken promise, but whoever asks should see it.
fn egress(expected: &Expected, seen: &Seen) -> Check {
    let promise = "hosts that the policy does not name cannot be reached";
    let row = |verdict, words: String, hint: &str| made("egress", promise, verdict, words, hint);
    let close = "close it in the policy's [egress] where jobs need it not";
    let Some(asked) = seen.of("proxy.name") else {
        return row(CheckVerdict::Fail, "not proven, nothing was said of proxy.name".to_owned(), REPORT);
    };
    if expected.opens_any {
        let words = format!("the policy lets any name through: doctor.invalid was asked for ({asked})");
        return row(CheckVerdict::Note, words, close);
    }
    if !Rule::NotLetThrough.holds(asked) {
        return row(
            CheckVerdict::Fail,
            format!("broken: doctor.invalid, which no rule names: {asked}"),
            REPORT,
        );
    }
    if expected.opens.is_empty() {
        return row(CheckVerdict::Pass, format!("doctor.invalid: {asked}; the policy opens no host"), "");
    }
    let words = format!("doctor.invalid: {asked}; the policy opens {}", some(&expected.opens));
    row(CheckVerdict::Note, words, close)
}

/// A flood that was stopped: by an error at the limit, or by the end of the whole cell.
fn flood(seen: &Seen, (name, promise): (&str, &str), (stop, limit): (&str, u32), unit: &str) -> Check {
    let row = |verdict, words: String| made(name, promise, verdict, words, UPDATE);
    let tried = flooded(name);
    let Some(told) = seen.of(&tried) else {
        return if seen.ended.contains(name) {
            row(CheckVerdict::Pass, format!("the whole cell was ended for its limit of {limit} {unit}"))
        } else {
            row(CheckVerdict::Fail, format!("not proven, nothing was said of {tried}"))
        };
    };
    let (end, count) = told.rsplit_once(" after ").unwrap_or((told, ""));
    match count.parse::<u32>() {
        Ok(count) if end == stop && count > 0 && count <= limit => {
            row(CheckVerdict::Pass, format!("stopped at {count} of {limit} {unit}"))
        }
        Ok(_) | Err(_) => row(CheckVerdict::Fail, format!("broken: {told}, with a limit of {limit} {unit}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Phase;
    use crate::job::outcome::Failure;

    const NONCE: &str = "n0nce";

    fn expected() -> Expected {
        Expected {
            runtime: Runtime::Runc,
            kernel: "6.1.0".to_owned(),
            limits: Limits { pids: 64, memory_mib: 256, disk_mib: 64 },
            opens_any: false,
            opens: Vec::new(),
        }
    }

    fn line(name: &str, seen: &str) -> String {
        format!("{}\n", serde_json::json!({ "nonce": NONCE, "name": name, "seen": seen }))
    }

    /// What an attack prints in a cell that keeps every promise.
    fn good() -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        for (name, rule) in PROMISES.iter().flat_map(|promise| promise.attempts) {
            let seen = match rule {
                Rule::Refused | Rule::NotLetThrough | Rule::Hidden => "errno 13",
                Rule::Is(seen) => seen,
                Rule::Only(seen) => seen[0],
                Rule::AtLeast(_) => "99",
                Rule::NotRoot => "1610612736 1610612736",
                Rule::Tried => "done",
                Rule::OnHost(Rule::Is(seen)) => seen,
                Rule::OnHost(_) => "errno 13",
            };
            all.insert((*name).to_owned(), seen.to_owned());
        }
        for (name, seen) in [
            ("kernel", "6.1.0"),
            ("proxy.name", "status 403"),
            ("flood.processes.begun", "done"),
            ("flood.processes", "errno 11 after 60"),
            ("flood.memory.begun", "done"),
            ("flood.memory", "signal 9 after 240"),
            ("flood.disk.begun", "done"),
            ("flood.disk", "errno 28 after 62"),
            ("end", "done"),
        ] {
            all.insert(name.to_owned(), seen.to_owned());
        }
        all
    }

    fn printed(all: &BTreeMap<String, String>) -> String {
        all.iter().map(|(name, seen)| line(name, seen)).collect()
    }

    fn judged(expected: &Expected, output: &str) -> BTreeMap<String, Check> {
        after(expected, output, &Outcome::Succeeded)
    }

    fn after(expected: &Expected, output: &str, outcome: &Outcome) -> BTreeMap<String, Check> {
        let rows = judge(expected, &read(output, NONCE, outcome));
        rows.into_iter().map(|row| (row.name.clone(), row)).collect()
    }

    #[track_caller]
    fn fails(rows: &BTreeMap<String, Check>, names: &[&str]) {
        let failed: Vec<&str> = rows
            .values()
            .filter(|row| row.verdict == CheckVerdict::Fail)
            .map(|row| row.name.as_str())
            .collect();
        assert_eq!(failed, names, "{rows:#?}");
    }

    #[test]
    fn a_cell_that_keeps_its_promises_passes_each_of_them() {
        let rows = judged(&expected(), &printed(&good()));
        assert!(
            rows.values().all(|row| row.verdict == CheckVerdict::Pass && row.hint.is_none()),
            "{rows:#?}"
        );
        assert_eq!(rows.len(), PROMISES.len() + 4, "no two rows have one name");
    }

    /// Each attempt for itself: missing it is not proven, and what no attempt may see breaks its promise.
    #[test]
    fn every_attempt_counts_missing_or_successful() {
        for promise in &PROMISES {
            for (name, rule) in promise.attempts {
                let mut all = good();
                all.remove(*name);
                let rows = judged(&expected(), &printed(&all));
                fails(&rows, &[promise.name]);
                assert!(rows[promise.name].words.contains("not proven"), "{name}: {rows:#?}");
                if !matches!(rule, Rule::Tried) && *name != "call.unix" {
                    all.insert((*name).to_owned(), "0 done".to_owned());
                    fails(&judged(&expected(), &printed(&all)), &[promise.name]);
                }
            }
        }
    }

    #[test]
    fn nothing_printed_proves_nothing() {
        let rows = judged(&expected(), "");
        assert!(
            rows.values().all(|row| row.verdict == CheckVerdict::Fail && row.hint.is_some()),
            "{rows:#?}"
        );
    }

    #[test]
    fn a_line_that_the_attack_did_not_print_breaks_the_result() {
        let good = printed(&good());
        let other = serde_json::json!({ "nonce": "other", "name": "setuid", "seen": "errno 1" }).to_string();
        for forged in [line("forged", "written"), "all is well\n".to_owned(), format!("{other}\n")] {
            fails(&judged(&expected(), &format!("{good}{forged}")), &["result"]);
        }
        // Said twice it is not known which one is true.
        let again = format!("{good}{}", line("setuid", "errno 1"));
        fails(&judged(&expected(), &again), &["result", "rights"]);
        let flood = format!("{good}{}", "x\n".repeat(LINES_MAX * 2));
        fails(&judged(&expected(), &flood), &["result"]);
    }

    #[test]
    fn a_flood_is_stopped_by_an_error_or_with_the_whole_cell() {
        let mut all = good();
        for (name, seen) in [("flood.processes", "no end after 4096"), ("flood.memory", "no end after 576")] {
            all.insert(name.to_owned(), seen.to_owned());
        }
        all.insert("flood.disk".to_owned(), "errno 28 after 500".to_owned());
        fails(&judged(&expected(), &printed(&all)), &["disk", "memory", "processes"]);
        let mut all = good();
        all.remove("flood.memory");
        fails(&judged(&expected(), &printed(&all)), &["memory"]);
        let failed = |reason| Outcome::Failed(Failure::new(Phase::Run, reason, "x"));
        fails(&after(&expected(), &printed(&all), &failed(FailReason::Oom)), &[]);
        fails(&after(&expected(), &printed(&all), &failed(FailReason::CommandFailed)), &["memory"]);
        all.remove("flood.memory.begun");
        fails(&after(&expected(), &printed(&all), &failed(FailReason::Oom)), &["memory"]);
    }

    #[test]
    fn what_several_cells_say_is_put_together_and_a_thing_said_in_two_proves_nothing() {
        let (mut first, mut second) = (good(), BTreeMap::new());
        for name in ["flood.memory.begun", "flood.memory"] {
            second.extend(first.remove_entry(name));
        }
        let both = |second: &BTreeMap<String, String>| {
            let mut seen = read(&printed(&first), NONCE, &Outcome::Succeeded);
            seen.add(read(&printed(second), NONCE, &Outcome::Succeeded));
            judge(&expected(), &seen).into_iter().map(|row| (row.name.clone(), row)).collect()
        };
        fails(&both(&second), &[]);
        second.insert("setuid".to_owned(), "errno 1".to_owned());
        fails(&both(&second), &["result", "rights"]);
    }

    #[test]
    fn what_the_policy_opens_is_said_and_what_it_does_not_is_broken() {
        let mut all = good();
        let some = Expected { opens: vec!["registry.npmjs.org".to_owned()], ..expected() };
        let row = judged(&some, &printed(&all)).remove("egress").expect("a row");
        assert!(row.verdict == CheckVerdict::Note && row.words.contains("registry.npmjs.org"), "{row:?}");
        all.insert("proxy.name".to_owned(), "status 502".to_owned());
        fails(&judged(&some, &printed(&all)), &["egress"]);
        let any = Expected { opens_any: true, ..expected() };
        let row = judged(&any, &printed(&all)).remove("egress").expect("a row");
        assert!(row.verdict == CheckVerdict::Note && row.words.contains("any name"), "{row:?}");
        all.remove("proxy.name");
        fails(&judged(&any, &printed(&all)), &["egress"]);
    }

    #[test]
    fn under_gvisor_the_kernel_must_be_another_one() {
        let mut all = good();
        all.insert("kernel".to_owned(), "4.4.0".to_owned());
        for name in ["call.unshare_user", "pid1.environ", "result.fd1"] {
            all.insert(name.to_owned(), "done".to_owned());
        }
        all.remove("status.CapAmb");
        let gvisor = Expected { runtime: Runtime::Runsc, ..expected() };
        fails(&judged(&gvisor, &printed(&all)), &[]);
        all.insert("kernel".to_owned(), "errno 2".to_owned());
        fails(&judged(&gvisor, &printed(&all)), &["calls", "devices", "hidden"]);
        all.insert("kernel".to_owned(), "6.1.0".to_owned());
        fails(&judged(&gvisor, &printed(&all)), &["calls", "devices", "hidden"]);
        all.remove("kernel");
        fails(&judged(&gvisor, &printed(&all)), &["calls", "devices", "hidden"]);
    }
}
