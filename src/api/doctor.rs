//! `GET /v1/doctor`: each thing that jobs need of this machine, whether it is there, and what to do where it is not.
//! It asks and looks; it must never fetch, start or change anything, and never wait long for an engine that hangs.
//! [`attack`] is the part that tries the walls.

pub mod attack;
mod host;
mod judge;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::State;

use super::wire::{Check, CheckVerdict, Doctor};
use super::{Api, ApiError};
use crate::agent_bundle::Qualification;
use crate::cell::Parts;
use crate::engine::EngineInfo;
use crate::job::spec::Runtime;
use crate::workspace::{form_here, host_free_bytes};

/// Longest wait for one answer of the engine.
const ENGINE_WAIT: Duration = Duration::from_secs(5);

/// Looks at everything once.
///
/// # Errors
/// When a look died.
pub async fn doctor(State(api): State<Arc<Api>>) -> Result<Json<Doctor>, ApiError> {
    let (checks, _) = quick(&api).await?;
    Ok(Json(Doctor { status: status(&checks), checks, attack: None }))
}

/// What is seen without running anything, and the release of the engine's kernel.
async fn quick(api: &Api) -> Result<(Vec<Check>, String), ApiError> {
    let parts = &api.parts;
    let info = match tokio::time::timeout(ENGINE_WAIT, parts.engine.info()).await {
        Ok(info) => info.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {} s", ENGINE_WAIT.as_secs())),
    };
    let mut checks = vec![daemon(parts), engine(&api.engine_address, info.as_ref())];
    if let Ok(info) = &info {
        checks.extend([host::versions(info), host::kernel(info, &host::Kernel::look()), gvisor(info)]);
        checks.push(image(api, info).await);
    }
    let parts = Arc::clone(parts);
    let disk = tokio::task::spawn_blocking(move || [agent(&parts), workspaces(), space(&parts)]).await;
    checks.extend(disk.map_err(|error| ApiError::new(super::ErrorCode::Internal, error))?);
    checks.push(host::clock(SystemTime::now(), host::built(), host::clock_kept()));
    let gateway = &api.parts.gateway;
    let of_default = gateway.credential_of(gateway.default_provider());
    checks.push(host::keys(&of_default, &gateway.credentials().standing().await));
    api.policies().await?;
    checks.push(policies(&api.policies.problems()));
    checks.extend(problems(api));
    Ok((checks, info.map(|info| info.kernel).unwrap_or_default()))
}

/// A broken promise is graver than a machine that lacks something.
fn status(checks: &[Check]) -> String {
    let failed = |promise: bool| {
        checks.iter().any(|check| check.verdict == CheckVerdict::Fail && check.promise.is_some() == promise)
    };
    let word = match (failed(true), failed(false)) {
        (true, _) => "broken",
        (false, true) => "degraded",
        (false, false) => "ok",
    };
    word.to_owned()
}

fn check(name: &str, verdict: CheckVerdict, words: impl Into<String>) -> Check {
    Check { name: name.to_owned(), verdict, words: words.into(), hint: None, promise: None }
}

impl Check {
    fn hint(mut self, hint: &str) -> Self {
        self.hint = Some(hint.to_owned());
        self
    }
}

fn daemon(parts: &Parts) -> Check {
    let version = format!("hotcell {}, instance {}", env!("CARGO_PKG_VERSION"), parts.store.instance());
    if rustix::process::geteuid().is_root() {
        return check("daemon", CheckVerdict::Pass, format!("{version}, runs as root"));
    }
    let uid = rustix::process::geteuid().as_raw();
    let words = format!(
        "{version}, runs as user {uid}: it serves this user alone, without id maps and without hard limits of disk space"
    );
    check("daemon", CheckVerdict::Note, words).hint("run it as root to serve others, with all walls")
}

fn engine(address: &str, info: Result<&EngineInfo, &String>) -> Check {
    match info {
        Ok(info) => {
            let cgroup = if info.cgroup_version.is_empty() { "?" } else { &info.cgroup_version };
            let words = format!(
                "{} (API {}, {}, cgroup v{cgroup}) at {address}",
                info.version, info.api_version, info.arch
            );
            check("engine", CheckVerdict::Pass, words)
        }
        Err(error) => check("engine", CheckVerdict::Fail, format!("{address}: {error}")).hint(
            "start the container engine, or name its socket with `engine` in the daemon's configuration",
        ),
    }
}

fn gvisor(info: &EngineInfo) -> Check {
    let has = |runtime: Runtime| info.runtimes.contains_key(runtime.as_str());
    match (has(Runtime::Runc), has(Runtime::Runsc)) {
        (_, true) => check("runtimes", CheckVerdict::Pass, "runc, and runsc (gVisor)"),
        (true, false) => {
            check("runtimes", CheckVerdict::Note, "runc only: there is no gVisor (runsc) in the engine")
                .hint("a policy that wants it uses its listed fallback or fails; `make gvisor` adds it")
        }
        (false, false) => {
            let known: Vec<&str> = info.runtimes.keys().map(String::as_str).collect();
            check("runtimes", CheckVerdict::Fail, format!("the engine has neither runc nor runsc: {known:?}"))
                .hint("configure one of them in the engine")
        }
    }
}

async fn image(api: &Api, info: &EngineInfo) -> Check {
    let name = &api.defaults.image;
    let found = tokio::time::timeout(ENGINE_WAIT, api.parts.engine.image(name)).await;
    match found {
        Ok(Ok(Some(image))) if image.arch == info.arch => {
            check("image", CheckVerdict::Pass, format!("{name} ({})", image.id))
        }
        Ok(Ok(Some(image))) => {
            let words = format!("{name} is for {}, the engine runs {}", image.arch, info.arch);
            check("image", CheckVerdict::Fail, words).hint("build it here: hotcell image build")
        }
        Ok(Ok(None)) => check("image", CheckVerdict::Fail, format!("{name} is not there"))
            .hint("build it: hotcell image build"),
        Ok(Err(error)) => check("image", CheckVerdict::Fail, format!("{name}: {error}")),
        Err(_) => check("image", CheckVerdict::Fail, format!("{name}: the engine does not answer")),
    }
}

fn agent(parts: &Parts) -> Check {
    let install = "install one: hotcell image build, or hotcell agent install VERSION";
    let (bundles, active) = match (parts.bundles.ls(), parts.bundles.active()) {
        (Ok(bundles), Ok(active)) => (bundles, active),
        (Err(error), _) | (_, Err(error)) => {
            return check("agent", CheckVerdict::Fail, error.to_string()).hint(install);
        }
    };
    let of_jobs = parts.settings.agent.clone().unwrap_or_else(|| active.as_str().to_owned());
    let bundle = bundles.iter().find(|bundle| bundle.version.as_str() == of_jobs);
    agent_of_jobs(&of_jobs, bundle.map(|bundle| &bundle.state))
}

/// The version that hotcell is made for is used without a test on this machine; any other one cannot be chosen so.
fn agent_of_jobs(version: &str, state: Option<&Qualification>) -> Check {
    let install = "install one: hotcell image build, or hotcell agent install VERSION";
    match state {
        Some(Qualification::Qualified { .. }) => {
            check("agent", CheckVerdict::Pass, format!("Claude Code {version}, self-test passed"))
        }
        Some(Qualification::Installed) => {
            let words = format!("Claude Code {version} is installed; it was not tested on this machine yet");
            check("agent", CheckVerdict::Note, words)
                .hint(&format!("try it in real cells: hotcell agent test {version}"))
        }
        Some(Qualification::Failed { why, .. }) => {
            let words = format!("Claude Code {version} failed its self-test: {why}");
            check("agent", CheckVerdict::Fail, words).hint(install)
        }
        None => check("agent", CheckVerdict::Fail, format!("Claude Code {version} is not installed"))
            .hint(install),
    }
}

fn workspaces() -> Check {
    match form_here() {
        (_, None) => {
            check("workspaces", CheckVerdict::Pass, "copies are overlays: they cost nothing to make")
        }
        (_, Some(why)) => check("workspaces", CheckVerdict::Note, why),
    }
}

fn space(parts: &Parts) -> Check {
    const MIB: u64 = 1 << 20;
    let (dir, reserve) = (&parts.settings.state_dir, parts.settings.disk_reserve_bytes);
    match host_free_bytes(dir) {
        Ok(free) => {
            let words = format!(
                "{} MiB free at {}, of which {} MiB are the host's reserve",
                free / MIB,
                dir.display(),
                reserve / MIB
            );
            let verdict = if free > reserve { CheckVerdict::Pass } else { CheckVerdict::Fail };
            let check = check("disk", verdict, words);
            if free > reserve { check } else { check.hint("make room there: jobs are ended as disk_full") }
        }
        Err(error) => check("disk", CheckVerdict::Fail, error.to_string()),
    }
}

/// What the daemon itself knows to be wrong.
fn problems(api: &Api) -> Option<Check> {
    let problems = api.problems.read().map(|problems| problems.clone()).unwrap_or_default();
    let words = problems.join("; ");
    (!words.is_empty())
        .then(|| check("files", CheckVerdict::Note, words).hint("put it right, then send the daemon SIGHUP"))
}

fn policies(problems: &[String]) -> Check {
    if problems.is_empty() {
        return check("policies", CheckVerdict::Pass, "all files can be used");
    }
    check("policies", CheckVerdict::Note, problems.join("; ")).hint("hotcell policy check FILE says more")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent_bundle::Report;

    #[test]
    fn a_broken_promise_is_graver_than_a_machine_that_lacks_something() {
        let fails = check("disk", CheckVerdict::Fail, "full");
        let broken =
            Check { promise: Some("no network".to_owned()), ..check("network", CheckVerdict::Fail, "eth0") };
        let note = check("clock", CheckVerdict::Note, "not kept");
        assert_eq!(status(std::slice::from_ref(&note)), "ok");
        assert_eq!(status(&[note, fails.clone()]), "degraded");
        assert_eq!(status(&[fails, broken]), "broken");
    }

    #[test]
    fn an_agent_that_was_not_tested_here_is_a_note_and_one_that_failed_or_is_missing_a_fault() {
        let report = Report { at_ms: 1, duration_ms: 2, checks: Vec::new() };
        let failed = Qualification::Failed { why: "no gate".to_owned(), at_ms: 1 };
        for (state, verdict) in [
            (Some(Qualification::Installed), CheckVerdict::Note),
            (Some(Qualification::Qualified { report }), CheckVerdict::Pass),
            (Some(failed), CheckVerdict::Fail),
            (None, CheckVerdict::Fail),
        ] {
            let check = agent_of_jobs("2.1.1", state.as_ref());
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert_eq!(check.hint.is_none(), check.verdict == CheckVerdict::Pass, "{check:?}");
            assert!(check.words.contains("2.1.1"), "{check:?}");
        }
    }
}
