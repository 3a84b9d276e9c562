//! What becomes of a job whose cell's processes are gone: its change set and report are taken, its cell is destroyed, its
//! own commands judge what it made, and it is done or its agent gets another try. It must never destroy a cell before
//! what it left is on the disk, or its loss is told.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::record::{Record, RecordError};
use super::verify::{self, Verdict};
use super::{Ended, Parts, StopWish, changes, destroy, park, report, work};
use crate::change::Quarantined;
use crate::clock;
use crate::event::{Body, Totals, Verified};
use crate::job::{Input, Outcome, Phase, State};
use crate::money::MicroUsd;
use crate::session::Session;

/// What is next for a job whose cell's processes are gone.
pub(super) enum Collected {
    /// Nothing.
    Done,
    /// Its agent gets another try.
    Repair,
}

/// From the end of the cell's processes to `Done`, or to another try.
pub(super) async fn collect(
    parts: &Arc<Parts>,
    record: &mut Record,
    ended: Ended,
    stop: &mut watch::Receiver<StopWish>,
) -> Result<Collected, RecordError> {
    let begun = Instant::now();
    let again = matches!(record.state(), State::Collecting { .. } | State::Verifying);
    if !again {
        record.step(parts, Input::CellEnded).await?;
    }
    // Before the cell's scratch space is gone.
    let report_bytes = report::collect(parts, record).await?;
    let changed = changes::collect(parts, record, again).await?;
    let mut outcome = ended.outcome();
    if let Outcome::Failed(failure) = &mut outcome
        && failure.reason.is_transient()
        && record.carry.host_faults > 0
    {
        failure.message.push_str(&format!(" (try {} of this job)", record.attempt));
    }
    let verify = record.spec.verify.clone().filter(|_| outcome == Outcome::Succeeded && !record.is_stopped());
    let mut repairs = verify.as_ref().map_or(0, |verify| verify.repair_attempts);
    repairs = repairs.saturating_sub(record.carry.repairs);
    if repairs > 0 && !park::keep_for_repair(parts, record).await? {
        repairs = 0;
    }
    destroy(parts, &record.job).await;
    let quarantined = quarantine(parts, record).await?;
    parts.metrics.phase(Phase::Collect, begun.elapsed().as_secs_f64());
    let mut verified = None;
    if let Some(verify) = verify {
        if matches!(record.state(), State::Collecting { .. }) {
            record.step(parts, Input::Verify).await?;
        }
        let verdict = verify::verify(parts, record, &verify, stop).await?;
        if repairs > 0
            && verdict.is_the_agents()
            && let Verdict::Failed { failure, output } = &verdict
        {
            let carry = park::carry_on(parts, record, &ended).await?;
            record.repair(parts, carry, verify::words(&verify, failure, output)).await?;
            return Ok(Collected::Repair);
        }
        let passed = matches!(verdict, Verdict::Passed);
        verified = Some(Verified { passed, repairs: record.carry.repairs });
        if let Verdict::Failed { failure, .. } = verdict {
            outcome = Outcome::Failed(failure);
        }
    }
    park::forget_work(parts, &record.job).await;
    let left_open = parts.store.release_open(&record.job, clock::wall_ms()).await?;
    if left_open > 0 {
        parts.metrics.reaped(crate::metrics::Orphan::Reservation, left_open);
    }
    let mut totals = totals(parts, record, &ended).await?;
    (totals.report_bytes, totals.changes, totals.quarantined) = (report_bytes, changed, quarantined);
    totals.verified = verified;
    if let State::Collecting { stopped: Some(reason) } = record.state() {
        outcome = Outcome::Stopped { reason: *reason };
    }
    let answer = ended.session.as_ref().and_then(Session::answer).map(str::to_owned);
    let answer = answer.map(|text| record.accepted.plan.output.bounded_result(text));
    record.done(parts, outcome, totals, answer).await?;
    Ok(Collected::Done)
}

/// What the agent left in a workspace that it worked on in place, and would be obeyed on the host, is set aside.
async fn quarantine(parts: &Arc<Parts>, record: &mut Record) -> Result<Vec<Quarantined>, RecordError> {
    let (settings, accepted) = (parts.settings.clone(), record.accepted.clone());
    let (identity, job) = (record.identity.clone(), record.job.clone());
    let looking =
        tokio::task::spawn_blocking(move || work::set_aside(&settings, &accepted, &identity, &job)).await;
    let aside = looking.unwrap_or_else(|error| work::Aside {
        notes: vec![format!("the workspace was not looked through: {error}")],
        ..work::Aside::default()
    });
    for text in aside.notes {
        record.push(&Body::Note { text })?;
    }
    Ok(aside.quarantined)
}

/// Totals so far, with what earlier attempts left.
pub(super) async fn totals(
    parts: &Arc<Parts>,
    record: &Record,
    ended: &Ended,
) -> Result<Totals, RecordError> {
    let spend = parts.store.spend(&record.job).await?;
    let (tool_calls, tool_denials) = ended.session.as_ref().map_or((0, 0), Session::tool_counts);
    let runtime = parts.store.agent_cell_of(&record.job).await?.and_then(|cell| cell.runtime);
    let (exit, before) = (record.exit.unwrap_or_default(), &record.carry);
    let own = ended.session.as_ref().map(Session::cli_cost);
    // Each CLI counts what it paid itself; a sum that lacks one of them says nothing.
    let cli_micro_usd = match (before.parked_ms, before.cli_micro_usd, own) {
        (None, _, own) => own.flatten(),
        (Some(_), before, None) => before,
        (Some(_), before, Some(own)) => before.zip(own).map(|(a, b)| MicroUsd(a.0.saturating_add(b.0))),
    };
    let ran = record.ran().await?;
    Ok(Totals {
        charged_micro_usd: spend.charged,
        cli_micro_usd,
        turns: before.turns + ended.session.as_ref().map_or(0, Session::turns),
        usage: spend.usage,
        requests: spend.requests,
        tool_calls: before.tool_calls + tool_calls,
        tool_denials: before.tool_denials + tool_denials,
        peak_memory_bytes: before.peak_memory_bytes.max(exit.peak_memory_bytes),
        cpu_us: before.cpu_us + exit.cpu_us,
        runtime,
        report_bytes: None,
        changes: None,
        quarantined: Vec::new(),
        verified: None,
        egress: ran.egress(),
        ran,
    })
}
