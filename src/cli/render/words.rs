//! Figures and advice in words: durations, money, sizes, and what to do about each way a job can end. Pure.

use crate::job::spec::Runtime;
use crate::job::{Blame, FailReason, Outcome, ParkReason, Parked, StopReason};
use crate::money::MicroUsd;

/// A duration: `0.4 s`, `42.1 s`, `3m 05s`, `1h 02m`.
pub(crate) fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..60 => format!("{}.{} s", s, ms % 1000 / 100),
        60..3600 => format!("{}m {:02}s", s / 60, s % 60),
        _ => format!("{}h {:02}m", s / 3600, s % 3600 / 60),
    }
}

/// The same without fractions, for a line that changes in place.
pub(crate) fn clock(ms: u64) -> String {
    let s = ms / 1000;
    if s < 60 { format!("{s}s") } else { duration(ms) }
}

/// How long ago: `5s`, `12m`, `3h`, `2d`.
pub(crate) fn age(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m", s / 60),
        3600..86_400 => format!("{}h", s / 3600),
        _ => format!("{}d", s / 86_400),
    }
}

/// Money as the ledger has it, to a hundredth of a cent.
pub(crate) fn usd(amount: MicroUsd) -> String {
    dollars(amount.as_usd())
}

/// Money from a JSON number.
pub(crate) fn dollars(amount: f64) -> String {
    format!("${amount:.4}")
}

/// A limit: whole cents where it has no more.
pub(crate) fn dollars_limit(amount: f64) -> String {
    let cents = amount * 100.0;
    if (cents - cents.round()).abs() < 1e-6 { format!("${amount:.2}") } else { dollars(amount) }
}

/// A count of tokens: `980`, `12.3k`, `4.5M`.
pub(crate) fn count(n: u64) -> String {
    match n {
        0..1_000 => n.to_string(),
        1_000..1_000_000 => format!("{}.{}k", n / 1000, n % 1000 / 100),
        _ => format!("{}.{}M", n / 1_000_000, n % 1_000_000 / 100_000),
    }
}

/// A size: `512 MiB`, `3.9 GiB`.
pub(crate) fn bytes(n: u64) -> String {
    let mib = n >> 20;
    if mib < 1024 { format!("{mib} MiB") } else { format!("{:.1} GiB", mib as f64 / 1024.0) }
}

/// A size that may be small: `17 B`, `3 KiB`, `512 MiB`.
pub(crate) fn size(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..0x10_0000 => format!("{} KiB", n >> 10),
        _ => bytes(n),
    }
}

/// `1 turn`, `2 turns`.
pub(crate) fn plural(n: u64, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}

/// Whose fault something is.
pub(crate) fn blame(blame: Blame) -> &'static str {
    match blame {
        Blame::Job => "the job: the same again would end the same",
        Blame::Host => "this machine or the daemon: trying again may help",
        Blame::Provider => "the model provider: trying again later may help",
    }
}

/// A stop in words.
pub(crate) fn stop(reason: StopReason) -> &'static str {
    match reason {
        StopReason::Cancelled => "cancelled",
        StopReason::Deadline => "its time limit",
        StopReason::Silent => "its silence limit: the agent said nothing for too long",
        StopReason::Budget => "its cost limit, or a budget that it shares",
        StopReason::Turns => "its turn limit",
        StopReason::Drain => "the daemon was told to stop",
    }
}

/// Until when a job is parked, and what for.
pub(crate) fn parked(parked: &Parked) -> String {
    let why = match parked.why {
        ParkReason::ProviderLimit => "the provider limits its credential",
        ParkReason::UserDayBudget => "its user's budget of the day has no room",
        ParkReason::DayBudget => "the budget of the day has no room",
        ParkReason::MonthBudget => "the budget of the month has no room",
        ParkReason::HostFault => "this machine failed it, and it is tried again",
    };
    format!("parked until {} because {why}", crate::clock::rfc3339(parked.until_ms))
}

/// What to do about an end, where there is something; `job` is the id.
pub(crate) fn next_step(outcome: &Outcome, job: &str) -> Option<String> {
    match outcome {
        Outcome::Succeeded => None,
        Outcome::Lost => Some(format!("hotcell logs {job} shows how far it came; submit it again")),
        Outcome::Stopped { reason } => after_stop(*reason),
        Outcome::Failed(failure) => Some(after_failure(failure.reason, job)),
    }
}

fn after_stop(reason: StopReason) -> Option<String> {
    let more = |flag: &str| Some(format!("submit it with a higher {flag}; its policy is the ceiling"));
    match reason {
        StopReason::Cancelled => None,
        StopReason::Deadline => more("--time"),
        StopReason::Silent => more("--silence"),
        StopReason::Budget => Some(
            "submit it with a higher --cost (its policy is the ceiling), or when the budget that it shares has room"
                .into(),
        ),
        StopReason::Turns => more("--max-turns"),
        StopReason::Drain => Some("submit it again when the daemon is back".into()),
    }
}

/// What isolates a cell, for people.
pub(crate) fn runtime(runtime: Runtime) -> &'static str {
    match runtime {
        Runtime::Runc => "runc",
        Runtime::Runsc => "runsc (gVisor)",
    }
}

fn after_failure(reason: FailReason, job: &str) -> String {
    match reason {
        FailReason::ImageUnavailable => {
            "hotcell image build makes the default image; any other must be on this machine already".into()
        }
        FailReason::ImageUnsuitable => {
            "choose another image with --image: it needs a shell and glibc or musl".into()
        }
        FailReason::ImageBuildFailed => {
            format!("hotcell logs {job} shows the whole build; `hotcell image plan DIR` lists what would run")
        }
        FailReason::RuntimeUnavailable => {
            "`make gvisor` installs gVisor for the engine; or list one that does as well in the policy's runtime_fallback".into()
        }
        FailReason::AgentMissing => {
            "hotcell agent ls shows the versions here, hotcell agent install adds one".into()
        }
        FailReason::WorkspaceMoved => {
            "the directory was moved or replaced after the submit: submit it again".into()
        }
        FailReason::WorkspaceSetup => {
            format!("hotcell logs {job} and the daemon's log say which mount failed")
        }
        FailReason::EngineUnavailable => {
            "hotcell health says what the engine answers; start it, then submit again".into()
        }
        FailReason::ContainerCreate | FailReason::ContainerStart => {
            "the daemon's log has the engine's own words; hotcell health checks the engine".into()
        }
        FailReason::CellLost => "submit it again; if it happens often, the daemon's log says more".into(),
        FailReason::SetupFailed | FailReason::VerifyFailed => {
            format!("hotcell logs {job} shows what it printed; hotcell shell with the same policy and image lets you try it")
        }
        FailReason::SetupDeadline => "give it more with setup.timeout_s; hotcell logs shows where it hung".into(),
        FailReason::VerifyDeadline => {
            "give it more with verify.timeout_s; hotcell logs shows where it hung".into()
        }
        FailReason::CommandFailed => format!("hotcell logs {job} shows what it printed"),
        FailReason::AgentStart => {
            "the message ends with what the CLI printed; try another image or version (--image, --agent)"
                .into()
        }
        FailReason::AgentError => format!("hotcell logs {job} shows what the agent did before"),
        FailReason::AgentProtocol => "this version of the CLI may not be supported: hotcell agent ls".into(),
        FailReason::Oom => "give it more with --memory; its policy is the ceiling".into(),
        FailReason::DiskFull => "give it more with --disk; its policy is the ceiling".into(),
        FailReason::GatewayRefused => {
            format!("its policy does not allow what it asked of the model; hotcell logs {job} shows what")
        }
        FailReason::ProviderAuth => {
            "the daemon's credential was refused: see its providers and credentials in the configuration".into()
        }
        FailReason::ProviderLimit => "wait and submit it again, or name a --fallback-model".into(),
        FailReason::ProviderError => format!("submit it again later; hotcell logs {job} shows the answers"),
        FailReason::ProviderRejected => {
            format!("is the model's name right? hotcell logs {job} shows the answer")
        }
        FailReason::Internal => "a fault of hotcell itself: its log has the details".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short_and_keep_their_unit() {
        let d = [0, 420, 42_100, 185_000, 3_720_000].map(duration);
        assert_eq!(d, ["0.0 s", "0.4 s", "42.1 s", "3m 05s", "1h 02m"]);
        assert_eq!([5_000, 720_000, 10_800_000, 200_000_000].map(age), ["5s", "12m", "3h", "2d"]);
        assert_eq!([980, 12_345, 4_567_890].map(count), ["980", "12.3k", "4.5M"]);
        assert_eq!([1.0, 0.5, 0.1234, 20.0].map(dollars_limit), ["$1.00", "$0.50", "$0.1234", "$20.00"]);
        assert_eq!([512 << 20, 4 << 30].map(bytes), ["512 MiB", "4.0 GiB"]);
    }

    #[test]
    fn every_end_but_success_and_cancel_has_a_next_step() {
        for reason in FailReason::ALL {
            assert!(!after_failure(reason, "j1").is_empty());
        }
        for reason in StopReason::ALL {
            assert_eq!(after_stop(reason).is_none(), reason == StopReason::Cancelled);
        }
    }
}
