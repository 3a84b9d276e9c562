//! Parking: when a job is to wait instead of failing or starting, how its work is put away once its cell is
//! gone, and how a parked job is ended. It must never call a job parked while something of its cell is left that
//! the job's next cell could meet, and never forget work that it says is kept.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::record::{Record, RecordError};
use super::{Ended, Parts, StopWish, changes};
use crate::clock;
use crate::engine::{ContainerId, container_name};
use crate::event::{Body, Totals};
use crate::gateway::GatewayEvent;
use crate::job::park::HOST_FAULT_TRIES_MAX;
use crate::job::{Carry, FailReason, Input, JobId, Outcome, ParkReason, Parked, Pause, State, StopReason};
use crate::money::{Calendar, Caps, MicroUsd, Scope};
use crate::session::Trouble;
use crate::store::{CellRow, Payer, Store};
use crate::workspace::{self, Scratch, ScratchError};

/// A job is never parked for less, so that a moment that has just passed makes no hot loop.
const PAUSE_MS_MIN: u64 = 1000;
/// Two views of one pause differ by less, in milliseconds.
const SAME_PAUSE_MS: u64 = 2_000;
/// Tries to put a scratch space away, a second apart: a program that made a mount namespace of its own while the space was
/// mounted (the build of an image, a service that starts) has a copy of the mount for as long as it lives.
const KEEP_TRIES: u32 = 120;
/// Pause before a container that could not be removed is tried again.
const REMOVE_PAUSE: Duration = Duration::from_secs(1);

/// An answer that has to be waited for.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Option<Parked>> + Send + 'a>>;

/// Somebody who may keep a queued job from starting now: a budget of a day or month, a credential that is paused.
pub trait Admission: fmt::Debug + Send + Sync {
    /// None where the job may start; else until when it is to wait, and why.
    fn ask<'a>(&'a self, candidate: Candidate<'a>) -> Answer<'a>;
}

/// A job that could start.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Which one.
    pub job: &'a JobId,
    /// Whose it is.
    pub uid: u32,
    /// The user's own budget of the day, where access rules give one.
    pub user_day: Option<MicroUsd>,
    /// The credential it uses, by name, with what else the provider limits apart (the class of its model).
    pub credential: &'a str,
    /// Wall clock, milliseconds since 1970.
    pub now_ms: u64,
}

/// Credentials that the provider limits, as jobs found out that were parked for it: their jobs wait together.
#[derive(Debug, Default)]
pub struct Pauses {
    until_ms: Mutex<BTreeMap<String, u64>>,
}

impl Pauses {
    /// Nobody starts with this credential before `until_ms`.
    pub fn note(&self, credential: &str, until_ms: u64) {
        let mut pauses = self.until_ms.lock().unwrap_or_else(PoisonError::into_inner);
        let until = pauses.entry(credential.to_owned()).or_insert(0);
        *until = until_ms.max(*until);
    }

    /// Somebody wants to try again at once.
    pub fn lift(&self, credential: &str) {
        self.until_ms.lock().unwrap_or_else(PoisonError::into_inner).remove(credential);
    }
}

impl Admission for Pauses {
    fn ask<'a>(&'a self, candidate: Candidate<'a>) -> Answer<'a> {
        let mut pauses = self.until_ms.lock().unwrap_or_else(PoisonError::into_inner);
        pauses.retain(|_, until_ms| *until_ms > candidate.now_ms);
        let until_ms = pauses.get(candidate.credential).copied();
        let why = ParkReason::ProviderLimit;
        Box::pin(std::future::ready(until_ms.map(|until_ms| Parked { until_ms, why })))
    }
}

/// Budgets of days and months: a job that could not even begin a request waits for the reset.
#[derive(Debug)]
pub struct Budgets {
    /// What was spent.
    pub store: Store,
    /// How much there is.
    pub caps: Caps,
    /// When days and months end.
    pub calendar: Calendar,
}

impl Admission for Budgets {
    fn ask<'a>(&'a self, candidate: Candidate<'a>) -> Answer<'a> {
        Box::pin(async move {
            let budgets = self.caps.of_job(None, None, candidate.user_day);
            if budgets.is_empty() {
                return None;
            }
            let payer = Payer { uid: candidate.uid, job: None, batch: None };
            let calendar = self.calendar.clone();
            let standings = match self.store.budget_standing(payer, budgets, calendar, candidate.now_ms).await
            {
                Ok(standings) => standings,
                Err(error) => {
                    // The ledger holds each request to it all the same.
                    tracing::warn!(job = %candidate.job, %error, "cannot ask for the budgets before a start");
                    return None;
                }
            };
            // The latest reset: any other would be in vain.
            let spent = standings.iter().filter(|standing| standing.is_exhausted(MicroUsd(1)));
            let parked = spent.filter_map(|standing| out_of_budget(standing.scope, standing.resets_at_ms));
            parked.max_by_key(|parked| parked.until_ms)
        })
    }
}

/// What the gateway told during an attempt, as far as parking depends on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// The provider answered a request.
    pub progressed: bool,
    /// How long the provider last asked to wait, in seconds.
    pub retry_after_s: Option<u64>,
    /// The gateway said that nothing goes on before a certain time.
    pub parked: Option<Parked>,
}

impl Seen {
    /// Takes one piece of news.
    pub fn note(&mut self, event: &GatewayEvent) {
        match event {
            GatewayEvent::Charged { status: 200..=299, .. } => self.progressed = true,
            GatewayEvent::ProviderFault { retry_after_s, .. } => self.retry_after_s = *retry_after_s,
            GatewayEvent::BudgetExhausted { .. }
            | GatewayEvent::Requested { .. }
            | GatewayEvent::Charged { .. }
            | GatewayEvent::Refused { .. }
            | GatewayEvent::ProviderPaused { .. }
            | GatewayEvent::Egress(_) => {}
        }
        self.parked = self.parked.or(parking(event));
    }
}

/// The one place that says which news of the gateway parks a job: a budget that is empty again at a certain time
/// (day, month), and a credential that is paused for longer than requests can be held. A job's own budget stops it.
pub fn parking(event: &GatewayEvent) -> Option<Parked> {
    match event {
        GatewayEvent::BudgetExhausted { scope, resets_at_ms, .. } => out_of_budget(*scope, *resets_at_ms),
        GatewayEvent::ProviderPaused { until_ms } => {
            Some(Parked { until_ms: *until_ms, why: ParkReason::ProviderLimit })
        }
        GatewayEvent::Requested { .. }
        | GatewayEvent::Charged { .. }
        | GatewayEvent::Refused { .. }
        | GatewayEvent::ProviderFault { .. }
        | GatewayEvent::Egress(_) => None,
    }
}

/// A budget that is empty again at a certain time is waited for.
fn out_of_budget(scope: Scope, resets_at_ms: Option<u64>) -> Option<Parked> {
    let why = match scope {
        Scope::Job | Scope::Batch => return None,
        Scope::UserDay => ParkReason::UserDayBudget,
        Scope::Day => ParkReason::DayBudget,
        Scope::Month => ParkReason::MonthBudget,
    };
    resets_at_ms.map(|until_ms| Parked { until_ms, why })
}

/// The first words of an attempt that goes on after a pause.
pub fn continuation(pause: &Pause) -> String {
    format!(
        "The job was paused from {} to {}. Go on where you were.",
        clock::rfc3339(pause.from_ms),
        clock::rfc3339(pause.to_ms)
    )
}

/// What a job shares the provider's limits with: its credential, by name, and the class of its model.
pub fn credential(parts: &Parts, record: &Record) -> String {
    if record.spec.command.is_some() {
        // It asks nobody.
        return String::new();
    }
    let plan = &record.accepted.plan;
    parts.gateway.limited_with(&plan.provider, &plan.model)
}

/// Until when the jobs that share the provider's limits with this one wait with it, now that it is parked for such a
/// limit; none where the limit is its own affair (see [`crate::gateway::pace`]): then nobody waits but this job.
pub(super) fn shared_until_ms(parts: &Parts, record: &Record, parked: &Parked) -> Option<u64> {
    let plan = &record.accepted.plan;
    let left = parts.gateway.paused(&plan.provider, &plan.model);
    if parked.why != ParkReason::ProviderLimit || left.is_zero() {
        return None;
    }
    let left_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
    // Both were measured at other moments: what is meant to be one time stays one.
    let end_ms = clock::wall_ms().saturating_add(left_ms).saturating_add(SAME_PAUSE_MS);
    Some(parked.until_ms.min(end_ms))
}

/// Whether a job that has a slot must wait before it may have a cell.
pub(super) async fn turned_away(parts: &Parts, record: &Record) -> Option<Parked> {
    if record.spec.command.is_some() {
        return None;
    }
    let now_ms = clock::wall_ms();
    let credential = credential(parts, record);
    let candidate = Candidate {
        job: &record.job,
        uid: record.identity.uid,
        user_day: record.accepted.user_day_micro_usd,
        credential: &credential,
        now_ms,
    };
    for admission in &parts.admission {
        if let Some(parked) = admission.ask(candidate).await {
            return Some(Parked { until_ms: parked.until_ms.max(now_ms + PAUSE_MS_MIN), ..parked });
        }
    }
    None
}

/// Whether a job whose cell ended is parked instead of being done.
pub(super) fn instead_of_done(record: &Record, ended: &Ended, now_ms: u64) -> Option<Parked> {
    let reason = match ended.outcome() {
        // It was faster than what would have parked it.
        Outcome::Succeeded | Outcome::Stopped { .. } => return None,
        Outcome::Failed(failure) => Some(failure.reason),
        Outcome::Lost => None,
    };
    match (record.state(), reason, ended.trouble) {
        (State::Parking { parked }, _, _) => Some(*parked),
        // Measured at the wire, not believed: an agent cannot have itself parked.
        (State::Running, Some(FailReason::ProviderLimit), Some(Trouble::Provider(429 | 529))) => ended
            .seen
            .parked
            .or_else(|| record.carry.limit_parking(now_ms, ended.seen.retry_after_s, ended.seen.progressed)),
        (
            State::Running,
            Some(FailReason::GatewayRefused | FailReason::ProviderLimit | FailReason::ProviderError),
            _,
        ) => ended.seen.parked,
        // An agent that has its task goes on with its conversation and its work.
        (State::Running, reason, _) if is_host_fault(record, reason) => {
            record.carry.host_fault_parking(now_ms)
        }
        (
            State::Queued
            | State::Preparing
            | State::Running
            | State::Stopping { .. }
            | State::Parked { .. }
            | State::Collecting { .. }
            | State::Verifying
            | State::Done(_),
            _,
            _,
        ) => None,
    }
}

/// Whether this machine failed a job, and another try may help. `reason`: none where nobody saw its end. A command's
/// client is there for one try only.
fn is_host_fault(record: &Record, reason: Option<FailReason>) -> bool {
    record.spec.command.is_none() && reason.is_none_or(FailReason::is_transient)
}

/// A job that this machine failed before its agent had its task: it is tried anew, after a pause. False where it is
/// to be done. What was kept of an earlier attempt stays where it is.
pub(super) async fn try_again(
    parts: &Arc<Parts>,
    record: &mut Record,
    ended: &Ended,
    stop: &watch::Receiver<StopWish>,
) -> Result<bool, RecordError> {
    let Outcome::Failed(failure) = ended.outcome() else { return Ok(false) };
    let begun = !matches!(record.state(), State::Preparing);
    if begun || stop.borrow().is_some() || !is_host_fault(record, Some(failure.reason)) {
        return Ok(false);
    }
    let now_ms = clock::wall_ms();
    let Some(parked) = record.carry.host_fault_parking(now_ms) else { return Ok(false) };
    tell_of_try(record, &failure.message, &parked)?;
    super::destroy(parts, &record.job).await;
    let carry = Carry { host_faults: record.carry.host_faults + 1, ..record.carry.clone() };
    record.requeue(parts, carry).await?;
    record.step(parts, Input::Park(parked)).await?;
    Ok(true)
}

fn tell_of_try(record: &mut Record, what: &str, parked: &Parked) -> Result<(), RecordError> {
    let text = format!(
        "try {} of {HOST_FAULT_TRIES_MAX} was ended by this machine: {what}; the next one begins at {}",
        record.carry.host_faults + 1,
        clock::rfc3339(parked.until_ms)
    );
    record.push(&Body::Note { text })?;
    Ok(())
}

/// From the end of the cell's processes to `Parked`. False where a stop came in between: then the cell is gone and
/// the job is to be collected.
pub(super) async fn shelve(
    parts: &Arc<Parts>,
    record: &mut Record,
    ended: &Ended,
    parked: Parked,
    stop: &watch::Receiver<StopWish>,
) -> Result<bool, RecordError> {
    let fault = parked.why == ParkReason::HostFault;
    if !matches!(record.state(), State::Parking { .. }) {
        if fault {
            match ended.outcome() {
                Outcome::Failed(failure) => tell_of_try(record, &failure.message, &parked)?,
                Outcome::Lost => tell_of_try(record, "its cell was gone", &parked)?,
                Outcome::Succeeded | Outcome::Stopped { .. } => {}
            }
        }
        record.step(parts, Input::Park(parked)).await?;
    }
    match keep_work(parts, record).await {
        Ok(true) => {}
        // A task that was begun is gone on with, or left: never begun a second time.
        kept @ (Ok(false) | Err(_)) if fault => {
            let why =
                kept.err().map_or("its disk is none of its own here".to_owned(), |error| error.to_string());
            let text =
                format!("it is not tried again after all, since the agent's work cannot be kept: {why}");
            record.push(&Body::Note { text })?;
            return Ok(false);
        }
        Ok(false) => {
            let text = "what the agent left in its HOME and in /tmp is not kept, since its disk is none of its own here: it begins again with its prompt";
            record.push(&Body::Note { text: text.to_owned() })?;
        }
        Err(error) => {
            tracing::warn!(job = %record.job, %error, "the work of a parked job cannot be kept");
            forget_work(parts, &record.job).await;
            let text = format!("what the agent left in its HOME and in /tmp cannot be kept: {error}");
            record.push(&Body::Note { text })?;
        }
    }
    super::destroy(parts, &record.job).await;
    let now_ms = clock::wall_ms();
    let left_open = parts.store.release_open(&record.job, now_ms).await?;
    parts.metrics.reaped(crate::metrics::Orphan::Reservation, left_open);
    if let Some(until_ms) = shared_until_ms(parts, record, &parked) {
        parts.pauses.note(&credential(parts, record), until_ms);
    }
    let wish = stop.borrow().clone();
    if let Some((reason, detail)) = wish.filter(|(reason, _)| *reason != StopReason::Drain) {
        record.push(&Body::Stop { reason, detail })?;
        record.step(parts, Input::Stop(reason)).await?;
        return Ok(false);
    }
    let mut carry = carry_on(parts, record, ended).await?;
    carry.parked(parked.why, now_ms, ended.seen.progressed);
    record.shelve(parts, carry).await?;
    Ok(true)
}

/// What the job's next attempt takes over, now that this one's cell is gone.
pub(super) async fn carry_on(
    parts: &Arc<Parts>,
    record: &Record,
    ended: &Ended,
) -> Result<Carry, RecordError> {
    let created_boot_ms = parts.store.agent_cell_of(&record.job).await?.map(|cell| cell.created_boot_ms);
    let totals = super::totals(parts, record, ended).await?;
    let mut carry = Carry { repair: None, ..record.carry.clone() };
    carry.ran_ms += created_boot_ms.map_or(0, |ms| clock::boot_ms().saturating_sub(ms));
    (carry.turns, carry.tool_calls) = (totals.turns, totals.tool_calls);
    (carry.tool_denials, carry.cpu_us) = (totals.tool_denials, totals.cpu_us);
    (carry.peak_memory_bytes, carry.cli_micro_usd) = (totals.peak_memory_bytes, totals.cli_micro_usd);
    Ok(carry)
}

/// Puts the work away so that the agent can repair it. False where that cannot be, which is told.
///
/// # Errors
/// [`RecordError::Journal`].
pub(super) async fn keep_for_repair(parts: &Arc<Parts>, record: &mut Record) -> Result<bool, RecordError> {
    let why = match keep_work(parts, record).await {
        Ok(true) => return Ok(true),
        Ok(false) => "its disk is none of its own here".to_owned(),
        Err(error) => error.to_string(),
    };
    let text = format!("what does not pass cannot be repaired, since the agent's work cannot be kept: {why}");
    record.push(&Body::Note { text })?;
    Ok(false)
}

/// Puts the scratch space of the attempt's cell away, after its container is gone.
pub(super) async fn keep_work(parts: &Arc<Parts>, record: &Record) -> Result<bool, ScratchError> {
    let kept_dir = parts.settings.kept_dir();
    let made = tokio::fs::DirBuilder::new().recursive(true).mode(0o700).create(&kept_dir).await;
    made.map_err(|source| ScratchError::Io { doing: "make", path: kept_dir, source })?;
    let cells = match parts.store.live_cells().await {
        Ok(cells) => cells,
        Err(error) => {
            tracing::warn!(job = %record.job, %error, "cannot look for the cell of a job that is parked");
            return Ok(false);
        }
    };
    let mut kept = parts.settings.kept(&record.job).is_file();
    for row in cells.into_iter().filter(|row| row.job == record.job && row.attempt == record.attempt) {
        container_gone(parts, &row).await;
        let dir = parts.settings.cells_dir().join(row.cell.as_str());
        kept = keep(dir, parts.settings.kept(&record.job)).await?;
    }
    Ok(kept)
}

/// Returns when the container of a cell is gone. Never given up: while it may be alive it writes, holds the mounts, and
/// the job its slot.
pub(super) async fn container_gone(parts: &Parts, row: &CellRow) {
    let container = match &row.container {
        Some(id) => ContainerId::new(id.clone()),
        None => container_name(parts.store.instance(), &row.cell),
    };
    while let Err(error) = parts.engine.remove(&container).await {
        // What runs in it ends all the same.
        let _ = parts.engine.kill(&container).await;
        tracing::warn!(job = %row.job, %error, "the container of a cell is left; trying again");
        tokio::time::sleep(REMOVE_PAUSE).await;
    }
}

async fn keep(dir: PathBuf, kept: PathBuf) -> Result<bool, ScratchError> {
    for attempt in 1.. {
        let (from, to) = (dir.clone(), kept.clone());
        let put = tokio::task::spawn_blocking(move || Scratch::keep(&from, &to)).await;
        let io = |e| ScratchError::Io { doing: "keep", path: kept.clone(), source: std::io::Error::other(e) };
        match put.map_err(io)? {
            Err(ScratchError::StillHeld { .. }) if attempt < KEEP_TRIES => {
                tokio::time::sleep(REMOVE_PAUSE).await;
            }
            put => return put,
        }
    }
    Ok(false)
}

/// Removes what is kept of a job. A failure is logged; the sweeper goes on.
pub(super) async fn forget_work(parts: &Parts, job: &JobId) {
    let kept = parts.settings.kept(job);
    let removed = tokio::task::spawn_blocking(move || workspace::remove_kept(&kept)).await;
    match removed {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%job, %error, "kept work is left; the sweeper goes on"),
        Err(error) => tracing::error!(%job, %error, "kept work is left; the sweeper goes on"),
    }
}

/// Ends a job that has no cell: it is queued or parked. What it changed is taken out of what is kept of it, and that
/// is removed.
///
/// # Errors
/// [`RecordError`].
pub async fn end_waiting(
    parts: &Arc<Parts>,
    record: &mut Record,
    reason: StopReason,
    detail: String,
) -> Result<(), RecordError> {
    record.push(&Body::Stop { reason, detail })?;
    let changed = changes::collect_kept(parts, record).await?;
    let mut totals = super::totals(parts, record, &Ended::default()).await?;
    totals.changes = changed;
    let Totals { charged_micro_usd, cli_micro_usd, .. } = totals;
    let outcome = Outcome::Stopped { reason };
    record.done(parts, outcome.clone(), totals, None).await?;
    parts.attached.close(&record.job);
    // Not before: until then a daemon that dies leaves a parked job, which goes on with it.
    forget_work(parts, &record.job).await;
    parts.metrics.ended(&outcome, None, charged_micro_usd, cli_micro_usd);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn jobs_of_a_paused_credential_wait_together_until_its_time_has_come() {
        let pauses = Pauses::default();
        pauses.note("work", 5000);
        pauses.note("work", 4000);
        let job = JobId::new(1, 1);
        let ask = |credential, now_ms| Candidate { job: &job, uid: 1, user_day: None, credential, now_ms };
        let until = |parked: Option<Parked>| parked.map(|p| p.until_ms);
        assert_eq!(until(pauses.ask(ask("work", 4500)).await), Some(5000), "the longest counts");
        assert_eq!(until(pauses.ask(ask("other", 4500)).await), None);
        assert_eq!(until(pauses.ask(ask("work", 5000)).await), None);
        pauses.note("work", 9000);
        pauses.lift("work");
        assert_eq!(until(pauses.ask(ask("work", 6000)).await), None);
    }

    #[test]
    fn what_the_provider_asks_for_and_that_it_answered_is_remembered() {
        let mut seen = Seen::default();
        seen.note(&GatewayEvent::ProviderFault { status: Some(429), retry_after_s: Some(7) });
        assert_eq!(seen, Seen { retry_after_s: Some(7), ..Seen::default() });
        let (usage, charged) = Default::default();
        let (model, duration_ms, ttfb_ms) = (String::new(), 1, 1);
        seen.note(&GatewayEvent::Charged { model, usage, charged, status: 200, duration_ms, ttfb_ms });
        assert!(seen.progressed);
    }
}
