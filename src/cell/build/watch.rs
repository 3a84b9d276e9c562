//! One build while the engine does it: its lines become notes of the job, and a stop, a limit or a full disk ends it. It
//! never waits for the engine longer than the build may take.

use std::collections::{BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::watch::Receiver;
use tokio::time::Instant;

use super::super::prepare::{PrepareError, Started, failed, wish};
use super::super::record::{Record, RecordError};
use super::super::steps::nothing_got;
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

/// What the engine is asked for.
pub(super) struct Asked {
    pub(super) build: SealedBuild,
    /// Names of arguments that stand in no line of the repository's.
    pub(super) ours: BTreeSet<String>,
    /// How long it may take.
    pub(super) wall: Duration,
}

/// What a build has said.
#[derive(Default)]
struct Told {
    ours: BTreeSet<String>,
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
    Asked { build, ours, wall }: Asked,
    mut way: Option<Way<'_>>,
    stop: &mut Receiver<StopWish>,
) -> Result<String, PrepareError> {
    let (progress, mut lines) = mpsc::channel(LINES_WAITING_MAX);
    let root = parts.engine.info().await.map_err(|e| engine_says(&e))?.root_dir;
    let mut told = Told { ours, ..Told::default() };
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
fn disk_is_full(parts: &Parts, root: &Path) -> Option<String> {
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
        let Some(said) = Said::of(line, &self.ours) else { return Ok(()) };
        let line: String = match said {
            Said::Step(line) | Said::Output(line) => line.chars().take(LINE_CHARS_MAX).collect(),
        };
        if let Said::Step(_) = said {
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
        let Some(reason) = nothing_got(event) else { return };
        if self.refused.len() < REFUSED_MAX && !self.refused.iter().any(|told| told == reason) {
            self.refused.push(reason.to_owned());
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

/// What a line of the builder's says.
#[derive(Debug, PartialEq, Eq)]
enum Said<'a> {
    /// A line of the Dockerfile begins.
    Step(&'a str),
    /// Somebody prints.
    Output(&'a str),
}

impl<'a> Said<'a> {
    /// None for the builder's own words, and for what it says of lines that are ours.
    fn of(line: &'a str, ours: &BTreeSet<String>) -> Option<Self> {
        let line = line.trim_end();
        let own =
            [" --->", "Removing intermediate container", "Successfully ", "[Warning] One or more build-args"];
        if line.is_empty() || own.iter().any(|start| line.starts_with(start)) {
            return None;
        }
        let counted = line.strip_prefix("Step ").and_then(|rest| rest.split_once(" : "));
        let Some((_, step)) = counted.filter(|(count, _)| count.contains('/')) else {
            return Some(Self::Output(line));
        };
        let added = ["LABEL hotcell.", "COPY .hotcell-build/"].iter().any(|start| step.starts_with(start));
        let argument = step.strip_prefix("ARG ").is_some_and(|name| ours.contains(name));
        (!added && !argument).then_some(Self::Step(step))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_the_builder_says_the_repositorys_lines_and_output_are_told() {
        let ours = BTreeSet::from(["SSL_CERT_FILE".to_owned()]);
        for (line, said) in [
            ("Step 3/9 : RUN make all", Some(Said::Step("RUN make all"))),
            ("Step 1/9 : LABEL hotcell.instance=\"h\" hotcell.build=\"j\"", None),
            ("Step 2/9 : ARG SSL_CERT_FILE", None),
            ("Step 2/9 : ARG WORD=x", Some(Said::Step("ARG WORD=x"))),
            (" ---> Running in 0123456789ab", None),
            ("Step by step", Some(Said::Output("Step by step"))),
            ("  indented  ", Some(Said::Output("  indented"))),
        ] {
            assert_eq!(Said::of(line, &ours), said, "{line}");
        }
    }
}
