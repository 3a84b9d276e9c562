//! One build while the engine does it: its lines become notes of the job, and a stop, a limit or a full disk ends it. It
//! never waits for the engine longer than the build may take.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::watch::Receiver;
use tokio::time::Instant;

use super::super::prepare::{PrepareError, Started, failed, wish};
use super::super::record::{Record, RecordError};
use super::super::{Parts, StopWish};
use super::{build_failed, engine_says, note};
use crate::engine::{EngineError, ImageInfo, SealedBuild};
use crate::gateway::{GatewayEvent, Lease};
use crate::job::FailReason;
use crate::link::{Link, LinkEvent};
use crate::workspace;

/// Lines that wait to be journaled; more are dropped.
const LINES_WAITING_MAX: usize = 4096;
/// Lines of one build that are journaled.
const LINES_TOLD_MAX: u32 = 2_000;
/// Characters of one.
const LINE_CHARS_MAX: usize = 500;
/// Lines that stand in the message of a failure, and the characters of all of them.
const TAIL_LINES: usize = 15;
const TAIL_CHARS_MAX: usize = 1_500;
/// Most hosts that were refused and are named there.
const REFUSED_MAX: usize = 3;
/// Time between two looks at the engine's disk.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The way out of a build.
pub(super) struct Way<'a> {
    lease: &'a mut Lease,
    link: &'a mut Link,
}

impl<'a> Way<'a> {
    pub(super) fn of(started: &'a mut Started) -> Self {
        Self { lease: &mut started.lease, link: &mut started.link }
    }
}

/// What a build has said.
#[derive(Default)]
struct Told {
    lines: u32,
    step: String,
    tail: VecDeque<String>,
    refused: Vec<String>,
}

enum Next {
    Line(String),
    Gateway(GatewayEvent),
    Link(LinkEvent),
    Look,
    Done(Result<ImageInfo, EngineError>),
}

/// Has the engine build it; the id of the image.
///
/// # Errors
/// [`PrepareError`].
pub(super) async fn follow(
    parts: &Arc<Parts>,
    record: &mut Record,
    build: SealedBuild,
    mut way: Option<Way<'_>>,
    wall: Duration,
    stop: &mut Receiver<StopWish>,
) -> Result<String, PrepareError> {
    let (progress, mut lines) = mpsc::channel(LINES_WAITING_MAX);
    let root = parts.engine.info().await.map_err(|e| engine_says(&e))?.root_dir;
    let mut told = Told::default();
    let deadline = Instant::now() + wall;
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Dropping it ends the build.
    let mut building = std::pin::pin!(parts.engine.build_sealed(build, &progress));
    loop {
        let (lease, link) = way.as_mut().map(|way| (&mut *way.lease, &mut *way.link)).unzip();
        let next = tokio::select! {
            biased;
            Some((reason, detail)) = wish(stop) => return Err(PrepareError::Stopped(reason, detail)),
            () = tokio::time::sleep_until(deadline) => {
                let words = format!("was not done after {} s", wall.as_secs());
                return Err(told.failure(FailReason::ImageBuildFailed, &words));
            }
            _ = look.tick() => Next::Look,
            event = gateway_event(lease) => Next::Gateway(event),
            Some(line) = lines.recv() => Next::Line(line),
            event = link_event(link) => Next::Link(event),
            done = &mut building => Next::Done(done),
        };
        match next {
            Next::Line(line) => told.hear(record, &line)?,
            Next::Gateway(event) => {
                told.reached(&event);
                record.note_gateway(parts, &event, &mut None)?;
                record.commit()?;
            }
            Next::Look => {
                if let Some(words) = disk_is_full(parts, &root) {
                    return Err(told.failure(FailReason::DiskFull, &words));
                }
            }
            Next::Link(LinkEvent::Exited(_) | LinkEvent::SpawnFailed { .. }) => {
                let words = "the cell that a build reaches the network through has ended";
                return Err(failed(FailReason::CellLost, words));
            }
            Next::Link(_) => {}
            Next::Done(done) => {
                while let Ok(line) = lines.try_recv() {
                    told.hear(record, &line)?;
                }
                // What was refused last may still be on its way.
                while let Some(event) = way.as_mut().and_then(|way| way.lease.waiting_event()) {
                    told.reached(&event);
                    record.note_gateway(parts, &event, &mut None)?;
                }
                record.commit()?;
                return match done {
                    Ok(info) => Ok(info.id),
                    Err(EngineError::ImageFailed { message, .. }) => {
                        Err(told.failure(FailReason::ImageBuildFailed, &format!("failed: {message}")))
                    }
                    Err(error) => Err(engine_says(&error)),
                };
            }
        }
    }
}

async fn gateway_event(lease: Option<&mut Lease>) -> GatewayEvent {
    match lease {
        Some(lease) => lease.next_event().await,
        None => std::future::pending().await,
    }
}

async fn link_event(link: Option<&mut Link>) -> LinkEvent {
    match link {
        Some(link) => link.next().await,
        None => std::future::pending().await,
    }
}

/// What a build writes lies with the engine, where no limit of the job's holds it.
fn disk_is_full(parts: &Parts, root: &PathBuf) -> Option<String> {
    let reserve = parts.settings.disk_reserve_bytes;
    let free = workspace::host_free_bytes(root).ok()?;
    (free < reserve).then(|| {
        format!(
            "was ended: the engine's disk has {} MiB left, less than the reserve of {} MiB",
            free >> 20,
            reserve >> 20
        )
    })
}

impl Told {
    fn hear(&mut self, record: &mut Record, line: &str) -> Result<(), RecordError> {
        let line: String = line.trim_end().chars().take(LINE_CHARS_MAX).collect();
        if is_noise(&line) {
            return Ok(());
        }
        if line.starts_with("Step ") {
            self.tail.clear();
            self.step.clone_from(&line);
        } else {
            if self.tail.len() == TAIL_LINES {
                self.tail.pop_front();
            }
            self.tail.push_back(line.clone());
        }
        self.lines += 1;
        match self.lines.cmp(&LINES_TOLD_MAX) {
            std::cmp::Ordering::Less => note(record, format!("build: {line}")),
            std::cmp::Ordering::Equal => note(record, "build: further lines are not told".to_owned()),
            std::cmp::Ordering::Greater => Ok(()),
        }
    }

    fn reached(&mut self, event: &GatewayEvent) {
        let GatewayEvent::Egress(reached) = event else { return };
        let Some(reason) = reached.reason.as_ref().filter(|_| !reached.allowed) else { return };
        if self.refused.len() < REFUSED_MAX && !self.refused.contains(reason) {
            self.refused.push(reason.clone());
        }
    }

    fn failure(&self, reason: FailReason, what: &str) -> PrepareError {
        let step = if self.step.is_empty() { "the build" } else { self.step.as_str() };
        let mut words = format!("the image could not be built: {step}: {what}");
        let tail = self.tail.iter().map(String::as_str).collect::<Vec<_>>().join("\n");
        if !tail.is_empty() {
            let skipped = tail.chars().count().saturating_sub(TAIL_CHARS_MAX);
            words.push_str("; its last words: ");
            words.extend(tail.chars().skip(skipped));
        }
        // Last, where it is seen: what a package manager makes of a refusal seldom says whose it is.
        for reason in &self.refused {
            words.push_str(&format!("\nhotcell: {reason}"));
        }
        match reason {
            FailReason::ImageBuildFailed => build_failed(words),
            reason => failed(reason, words),
        }
    }
}

/// The builder's own words, and what it says of lines that are ours.
fn is_noise(line: &str) -> bool {
    let text = line.trim();
    let ours = ["LABEL hotcell.", "COPY .hotcell-build/"];
    let step = text.strip_prefix("Step ").and_then(|rest| rest.split_once(" : ")).map(|(_, rest)| rest);
    text.is_empty()
        || text.starts_with("--->")
        || text.starts_with("Removing intermediate container")
        || text.starts_with("Successfully ")
        || text.starts_with("[Warning] One or more build-args")
        || step.is_some_and(|rest| ours.iter().any(|start| rest.starts_with(start)))
}
