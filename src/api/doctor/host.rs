//! What the doctor says of the machine itself: versions against holes that are known, the kernel, the clock, the
//! credentials. Facts are gathered here, the verdicts are pure. It must never run anything or show a credential, nor
//! call a version safe that only looks so.

use std::time::{Duration, SystemTime};

use super::check;
use crate::api::wire::{Check, CheckVerdict};
use crate::engine::EngineInfo;
use crate::gateway::credentials::Standing;

/// A hole, and the releases in which it is closed: the first one of each line of releases, the oldest line first.
struct Hole {
    /// The engine's name for the component.
    component: &'static str,
    cve: &'static str,
    what: &'static str,
    fixed: &'static [&'static str],
    /// Beginnings of versions of packages that carry the fix under an older number.
    packages: &'static [&'static str],
}

const HOLES: [Hole; 6] = [
    Hole {
        component: "runc",
        cve: "CVE-2024-21626",
        what: "a working directory that leads out of the container",
        fixed: &["1.1.12"],
        packages: &["1.1.5+ds1-1+deb12u"],
    },
    Hole {
        component: "runc",
        cve: "CVE-2025-31133, CVE-2025-52565, CVE-2025-52881",
        what: "masked paths and mounts that are redirected while the container starts",
        fixed: &["1.2.8", "1.3.3", "1.4.0-rc.3"],
        packages: &[],
    },
    Hole {
        component: "containerd",
        cve: "CVE-2022-23648",
        what: "an image that reads files of the host",
        fixed: &["1.4.13", "1.5.10", "1.6.1"],
        packages: &[],
    },
    Hole {
        component: "containerd",
        cve: "CVE-2023-25173",
        what: "supplementary groups that are not set up",
        fixed: &["1.5.18", "1.6.18"],
        packages: &[],
    },
    Hole {
        component: "Engine",
        cve: "CVE-2021-41091",
        what: "directories of containers that every user of the host can enter",
        fixed: &["20.10.9"],
        packages: &[],
    },
    Hole {
        component: "Engine",
        cve: "CVE-2022-36109",
        what: "supplementary groups that are not set up",
        fixed: &["20.10.18"],
        packages: &[],
    },
];

/// A version as far as it orders releases; a release candidate comes before its release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    line: (u32, u32),
    patch: u32,
    /// Of a release candidate its number.
    candidate: u32,
}

impl Version {
    /// `1.1.5`, `v1.1.5`, `1.1.5+ds1`, `1.4.0-rc.3`, `1.6.20~ds1`; none where it does not begin as one.
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_start_matches('v');
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (numbers, rest) = text.split_at(end);
        let mut numbers = numbers.split('.').map(str::parse::<u32>);
        let major = numbers.next()?.ok()?;
        let minor = numbers.next()?.ok()?;
        let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
        let candidate = rest.trim_start_matches(['-', '~']).strip_prefix("rc").map(|rest| {
            rest.trim_start_matches('.').chars().take_while(char::is_ascii_digit).collect::<String>()
        });
        let candidate = candidate.map_or(u32::MAX, |digits| digits.parse().unwrap_or(0));
        Some(Self { line: (major, minor), patch, candidate })
    }

    /// Whether a hole that is closed from these releases on is closed in this one.
    fn has(self, fixed: &[&str]) -> bool {
        let fixed: Vec<Self> = fixed.iter().filter_map(|text| Self::parse(text)).collect();
        let newer = fixed.iter().map(|fix| fix.line).max().is_some_and(|last| self.line > last);
        newer || fixed.iter().any(|fix| fix.line == self.line && self >= *fix)
    }
}

/// Versions of the engine and what it is made of. A number below a fix is a note and no fault: distributions close
/// holes without changing the number, and the engine tells no more than that.
pub(super) fn versions(info: &EngineInfo) -> Check {
    let mut told = Vec::new();
    let mut holes = Vec::new();
    for component in ["Engine", "containerd", "runc"] {
        let text = info.components.get(component);
        let text = text.or((component == "Engine").then_some(&info.version)).filter(|text| !text.is_empty());
        let Some(text) = text else {
            told.push(format!("{component} ?"));
            continue;
        };
        told.push(format!("{component} {text}"));
        let version = Version::parse(text);
        for hole in HOLES.iter().filter(|hole| hole.component == component) {
            let packaged = hole.packages.iter().any(|start| text.starts_with(start));
            if !packaged && version.is_some_and(|version| !version.has(hole.fixed)) {
                let fixed = hole.fixed.join(", ");
                holes.push(format!(
                    "{component} {text} as released has {} ({}; fixed in {fixed})",
                    hole.cve, hole.what
                ));
            }
        }
        if version.is_none() {
            holes.push(format!("{component}: {text:?} is no version that can be compared"));
        }
    }
    let told = told.join(", ");
    if holes.is_empty() {
        let unknown = told.contains('?');
        let verdict = if unknown { CheckVerdict::Note } else { CheckVerdict::Pass };
        let words = if unknown { "the engine does not tell all versions" } else { "no hole known here" };
        return check("versions", verdict, format!("{told}: {words}"));
    }
    let words = format!(
        "{told}: {}. Whether this build has the fix cannot be told by its number: a distribution may have put it in \
         without changing that, as Debian did with CVE-2024-21626 in runc 1.1.5+ds1-1+deb12u1",
        holes.join("; ")
    );
    check("versions", CheckVerdict::Note, words)
        .hint("compare your package's changelog with the names above, or install a release that is fixed")
}

/// What the kernel shows of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kernel {
    seccomp: bool,
    user_namespaces: bool,
    overlay: bool,
}

impl Kernel {
    /// Looks.
    pub(super) fn look() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            seccomp: std::fs::metadata("/proc/sys/kernel/seccomp").is_ok(),
            user_namespaces: read("/proc/sys/user/max_user_namespaces")
                .trim()
                .parse::<u64>()
                .is_ok_and(|n| n > 0),
            overlay: read("/proc/filesystems").lines().any(|line| line.trim().ends_with("overlay")),
        }
    }
}

/// Mounts with an id map of their own are there from this line of releases on.
const ID_MAPS: (u32, u32) = (5, 12);

/// What cells need of the kernel.
pub(super) fn kernel(info: &EngineInfo, kernel: &Kernel) -> Check {
    let release = if info.kernel.is_empty() { "?" } else { &info.kernel };
    let version = Version::parse(release);
    let has = |there: bool, name: &'static str| (there, name);
    let filters = info.security.is_empty() || info.security.iter().any(|option| option.contains("seccomp"));
    let features = [
        has(kernel.seccomp, "seccomp"),
        has(filters, "seccomp in the engine"),
        has(kernel.user_namespaces, "user namespaces"),
        has(version.is_some_and(|version| version.line >= ID_MAPS), "id-mapped mounts"),
        has(kernel.overlay, "overlay"),
    ];
    let cgroup = if info.cgroup_version.is_empty() { "?" } else { &info.cgroup_version };
    let there: Vec<&str> = features.iter().filter(|(there, _)| *there).map(|(_, name)| *name).collect();
    let missing: Vec<&str> = features.iter().filter(|(there, _)| !there).map(|(_, name)| *name).collect();
    let words = format!("{release}: {}, cgroup v{cgroup}", there.join(", "));
    if missing.is_empty() {
        return check("kernel", CheckVerdict::Pass, words);
    }
    let words = format!("{words}; missing: {}", missing.join(", "));
    if missing.iter().any(|name| name.starts_with("seccomp")) {
        return check("kernel", CheckVerdict::Fail, words)
            .hint("cells are held by a filter of system calls: use a kernel and an engine with seccomp");
    }
    check("kernel", CheckVerdict::Note, words)
        .hint("workspaces are then copied and given over instead of mapped; a newer kernel, or its modules, change that")
}

/// Whether somebody keeps the clock right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    Yes,
    No,
    Unknown,
}

/// Asks the kernel, changing nothing.
pub(super) fn clock_kept() -> Kept {
    /// The kernel's answer where the clock is not synchronised.
    const TIME_ERROR: i32 = 5;
    // SAFETY: `timex` is plain data; with no modes set the call only reads, through a valid pointer.
    let state = unsafe {
        let mut time: libc::timex = std::mem::zeroed();
        libc::adjtimex(&raw mut time)
    };
    match state {
        TIME_ERROR => Kept::No,
        0.. => Kept::Yes,
        _ => Kept::Unknown,
    }
}

/// When this program was written to the disk: no clock may be before that.
pub(super) fn built() -> Option<SystemTime> {
    std::env::current_exe().and_then(std::fs::metadata).and_then(|meta| meta.modified()).ok()
}

/// The clock: certificates, budgets of a day and short-lived credentials go by it.
pub(super) fn clock(now: SystemTime, built: Option<SystemTime>, kept: Kept) -> Check {
    const SLACK: Duration = Duration::from_secs(86_400);
    let ms = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
    let shown = crate::clock::rfc3339(ms);
    if built.is_some_and(|built| now + SLACK < built) {
        let words = format!("{shown} is before this program was made");
        return check("clock", CheckVerdict::Fail, words)
            .hint("set the clock: certificates and budgets of a day go by it");
    }
    match kept {
        Kept::Yes => check("clock", CheckVerdict::Pass, format!("{shown}, synchronised")),
        Kept::No => check("clock", CheckVerdict::Note, format!("{shown}, not synchronised"))
            .hint("let chrony or systemd-timesyncd keep it: budgets of a day go by it"),
        Kept::Unknown => {
            check("clock", CheckVerdict::Pass, format!("{shown}; whether it is synchronised cannot be read"))
        }
    }
}

/// The credentials, of which one is that of the default provider.
pub(super) fn keys(default: &str, all: &[Standing]) -> Check {
    let wrong = |one: &&Standing| one.problem.is_some();
    let fails = all.iter().filter(wrong).any(|one| one.required || one.name == default);
    let list = |wanted: bool| {
        let some = all.iter().filter(|one| one.problem.is_some() == wanted);
        some.map(|one| match &one.problem {
            Some(problem) => format!("{}: {problem}", one.name),
            None => format!("{} ({})", one.name, one.source),
        })
        .collect::<Vec<_>>()
        .join(", ")
    };
    let (there, missing) = (list(false), list(true));
    if missing.is_empty() {
        return check("keys", CheckVerdict::Pass, there);
    }
    let words = if there.is_empty() { missing } else { format!("{missing}; {there}") };
    let verdict = if fails { CheckVerdict::Fail } else { CheckVerdict::Note };
    check("keys", verdict, words).hint("put it where the configuration names it, then send the daemon SIGHUP")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(components: &[(&str, &str)]) -> EngineInfo {
        let text = str::to_owned;
        EngineInfo {
            version: text("28.5.1"),
            api_version: text("1.51"),
            arch: text("x64"),
            os: text("linux"),
            runtimes: std::collections::BTreeMap::new(),
            default_runtime: text("runc"),
            cgroup_version: text("2"),
            root_dir: "/nowhere".into(),
            components: components.iter().map(|(name, version)| (text(name), text(version))).collect(),
            security: vec![text("name=seccomp,profile=default")],
            kernel: text("6.1.0-18-amd64"),
        }
    }

    #[test]
    fn a_release_has_a_fix_of_its_own_line_or_is_of_a_newer_one() {
        let fixed = ["1.2.8", "1.3.3", "1.4.0-rc.3"];
        for (version, has) in [
            ("1.1.15", false),
            ("1.2.7", false),
            ("1.2.8", true),
            ("1.3.0", false),
            ("v1.3.3", true),
            ("1.4.0-rc.2", false),
            ("1.4.0-rc.3", true),
            ("1.4.0", true),
            ("1.5.0", true),
            ("1.1.5+ds1", false),
        ] {
            let parsed = Version::parse(version).unwrap_or_else(|| panic!("{version}"));
            assert_eq!(parsed.has(&fixed), has, "{version}");
        }
        assert!(Version::parse("1.1.12").is_some_and(|version| version.has(&["1.1.12"])));
        assert!(Version::parse("1.1.5").is_some_and(|version| !version.has(&["1.1.12"])));
        assert_eq!(Version::parse("dev"), None);
    }

    #[test]
    fn an_old_number_is_a_note_that_says_what_is_not_known() {
        let old =
            versions(&info(&[("Engine", "20.10.24"), ("containerd", "1.6.20~ds1"), ("runc", "1.1.5+ds1")]));
        assert_eq!(old.verdict, CheckVerdict::Note, "{old:?}");
        for part in
            ["runc 1.1.5+ds1 as released has CVE-2024-21626", "CVE-2025-31133", "deb12u1", "cannot be told"]
        {
            assert!(old.words.contains(part), "{part}: {}", old.words);
        }
        assert!(!old.words.contains("containerd 1.6.20~ds1 as released"), "{}", old.words);
        let debian = versions(&info(&[("containerd", "2.1.5"), ("runc", "1.1.5+ds1-1+deb12u1")]));
        assert!(!debian.words.contains("released has CVE-2024-21626"), "{}", debian.words);
        assert!(debian.words.contains("released has CVE-2025-31133"), "{}", debian.words);
        let new = versions(&info(&[("Engine", "28.5.1"), ("containerd", "2.1.5"), ("runc", "1.3.3")]));
        assert_eq!((new.verdict, new.hint.is_none()), (CheckVerdict::Pass, true), "{new:?}");
        let silent = versions(&info(&[("Engine", "28.5.1")]));
        assert_eq!(
            silent.verdict,
            CheckVerdict::Note,
            "what is not told is not known to be good: {silent:?}"
        );
        let odd = versions(&info(&[("containerd", "2.1.5"), ("runc", "unknown")]));
        assert_eq!(odd.verdict, CheckVerdict::Note, "{odd:?}");
    }

    #[test]
    fn without_seccomp_nothing_runs_and_without_the_rest_less_well() {
        let all = Kernel { seccomp: true, user_namespaces: true, overlay: true };
        assert_eq!(kernel(&info(&[]), &all).verdict, CheckVerdict::Pass);
        let none = kernel(&info(&[]), &Kernel { seccomp: false, ..all.clone() });
        assert_eq!(none.verdict, CheckVerdict::Fail, "{none:?}");
        let unconfined = EngineInfo { security: vec!["name=apparmor".to_owned()], ..info(&[]) };
        assert_eq!(kernel(&unconfined, &all).verdict, CheckVerdict::Fail);
        let old = EngineInfo { kernel: "5.10.0".to_owned(), ..info(&[]) };
        let old = kernel(&old, &all);
        assert!(
            old.verdict == CheckVerdict::Note && old.words.contains("missing: id-mapped mounts"),
            "{old:?}"
        );
        let flat = kernel(&info(&[]), &Kernel { overlay: false, user_namespaces: false, ..all });
        assert!(flat.words.contains("missing: user namespaces, overlay"), "{flat:?}");
    }

    #[test]
    fn a_clock_before_the_program_is_wrong_and_one_that_nobody_keeps_a_note() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let later = now + Duration::from_secs(10 * 86_400);
        assert_eq!(clock(now, Some(later), Kept::Yes).verdict, CheckVerdict::Fail);
        assert_eq!(clock(later, Some(now), Kept::Yes).verdict, CheckVerdict::Pass);
        assert_eq!(clock(later, Some(now), Kept::No).verdict, CheckVerdict::Note);
        assert_eq!(clock(later, None, Kept::Unknown).verdict, CheckVerdict::Pass);
    }

    #[test]
    fn a_missing_key_fails_where_jobs_need_it_and_is_never_shown() {
        let one = |name: &str, problem: Option<&str>| Standing {
            name: name.to_owned(),
            required: false,
            source: "a file".to_owned(),
            problem: problem.map(str::to_owned),
        };
        let all = [one("anthropic", None), one("github", Some("the environment variable GH is not set"))];
        assert_eq!(keys("anthropic", &all).verdict, CheckVerdict::Note);
        let fails = keys("github", &all);
        assert!(
            fails.verdict == CheckVerdict::Fail && fails.words.contains("github: the environment"),
            "{fails:?}"
        );
        assert_eq!(keys("anthropic", &all[..1]).verdict, CheckVerdict::Pass);
    }
}
