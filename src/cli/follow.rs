//! Follows one job's events and shows them, across lost connections and restarts of the daemon. Nothing is
//! shown twice and nothing is left out: after a break it asks again from the last number it has.

use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;

use super::client::Client;
use super::fail::CliError;
use super::render::stream::StreamView;
use super::render::{Out, STATUS_TICK};
use crate::job::JobId;

/// How long the daemon may be away before a follower gives up. The job goes on all the same.
const AWAY_MAX: Duration = Duration::from_secs(120);
/// First and longest pause between attempts to reconnect.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

const CANCELLING: &str =
    "hotcell: cancelling the job; press Ctrl-C again to leave without waiting for its end";

/// How a command hears Ctrl-C.
pub(super) enum Interrupts {
    /// The process's SIGINT.
    Signal(tokio::signal::unix::Signal),
    /// A test's hand.
    #[cfg(test)]
    Channel(tokio::sync::mpsc::Receiver<()>),
}

impl Interrupts {
    /// From now on Ctrl-C does not end the process but is heard here.
    pub(super) fn listen() -> Result<Self, CliError> {
        let kind = tokio::signal::unix::SignalKind::interrupt();
        tokio::signal::unix::signal(kind).map(Self::Signal).map_err(|e| CliError::Local(e.into()))
    }

    /// Waits for the next Ctrl-C.
    pub(super) async fn next(&mut self) {
        let heard = match self {
            Self::Signal(signal) => signal.recv().await,
            #[cfg(test)]
            Self::Channel(channel) => channel.recv().await,
        };
        if heard.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

/// What Ctrl-C means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnInterrupt {
    /// The first one cancels the job, the second one leaves.
    Cancel,
    /// It leaves; the job goes on.
    Leave,
}

/// How events are shown.
pub(super) enum Show {
    /// As they came, one JSON object a line.
    Json,
    /// For people.
    Readable(Box<StreamView>),
    /// Not at all: only the end counts.
    Nothing,
}

/// Why following ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// There are no more events: the job is done, or it was not to be followed.
    End,
    /// The user left.
    Left,
}

/// One job being followed.
pub(super) struct Follow<'a> {
    pub(super) client: &'a Client,
    pub(super) job: JobId,
    /// Number of the last event that was shown; events up to it are skipped.
    pub(super) last_seq: u64,
    /// Wait for more until the job is done.
    pub(super) follow: bool,
    pub(super) on_interrupt: OnInterrupt,
    /// The job is to be cancelled and the daemon does not know it yet.
    pub(super) cancel_wanted: bool,
    pub(super) show: Show,
}

#[derive(Deserialize)]
struct Head<'a> {
    seq: u64,
    #[serde(rename = "type", borrow)]
    kind: &'a str,
}

/// What a part of following led to.
enum Step {
    /// The stream ended; true when the job's last event was in it.
    StreamEnded(bool),
    /// Ctrl-C was heard before the stream was open.
    Again,
    Left,
}

impl Follow<'_> {
    /// Shows events until there are no more.
    ///
    /// # Errors
    /// The daemon refused, was away for too long, or output could not be written.
    pub(super) async fn run(
        &mut self,
        out: &mut Out,
        interrupts: &mut Interrupts,
    ) -> Result<Ended, CliError> {
        let (mut pause, mut away_since) = (PAUSE.0, None::<Instant>);
        loop {
            if self.cancel_wanted && self.cancel(out, interrupts).await? {
                return Ok(Ended::Left);
            }
            let before = self.last_seq;
            let lost = match self.stream(out, interrupts).await {
                Ok(Step::Left) => return Ok(Ended::Left),
                Ok(Step::Again) => continue,
                Ok(Step::StreamEnded(last)) if last || !self.follow => return Ok(Ended::End),
                Ok(Step::StreamEnded(_)) => match self.client.job(&self.job).await {
                    // A done job's stream that ended without its last event was cut, unless nothing is left.
                    Ok(job) if job.state.is_done() && self.last_seq >= job.last_seq => return Ok(Ended::End),
                    Ok(_) => CliError::ConnectionLost { what: "the stream of events was cut".into() },
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if !matches!(lost, CliError::ConnectionLost { .. } | CliError::NoDaemon { .. }) {
                return Err(lost);
            }
            if self.last_seq > before {
                (pause, away_since) = (PAUSE.0, None);
            }
            let since = *away_since.get_or_insert_with(|| {
                // Nobody minds when this cannot be told.
                let _ = out.notice(&format!("hotcell: {lost}; trying again, the job goes on"));
                Instant::now()
            });
            if since.elapsed() > AWAY_MAX {
                return Err(lost);
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(PAUSE.1),
                () = interrupts.next() => {
                    if self.interrupted(out, interrupts).await? {
                        return Ok(Ended::Left);
                    }
                }
            }
        }
    }

    /// One connection's worth of events.
    async fn stream(&mut self, out: &mut Out, interrupts: &mut Interrupts) -> Result<Step, CliError> {
        let events = {
            // Asking from the last number seen, and skipping it, is right whatever happened in between.
            let opening = pin!(self.client.events(&self.job, self.last_seq, self.follow));
            tokio::select! {
                events = opening => Some(events?),
                () = interrupts.next() => None,
            }
        };
        let Some(mut events) = events else {
            let left = self.interrupted(out, interrupts).await?;
            return Ok(if left { Step::Left } else { Step::Again });
        };
        let mut tick = tokio::time::interval(STATUS_TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut lines = Vec::new();
        let mut last = false;
        loop {
            lines.clear();
            let more = tokio::select! {
                more = events.next(&mut lines) => more?,
                _ = tick.tick(), if out.is_live() => { self.show_status(out); continue }
                () = interrupts.next() => {
                    if self.interrupted(out, interrupts).await? {
                        return Ok(Step::Left);
                    }
                    continue;
                }
            };
            for line in &lines {
                last |= self.one(line, out)?;
            }
            out.flush()?;
            if !more {
                return Ok(Step::StreamEnded(last));
            }
        }
    }

    fn show_status(&self, out: &mut Out) {
        // After the end nothing moves any more.
        if let Show::Readable(view) = &self.show
            && view.outcome().is_none()
        {
            out.status(&view.status(crate::clock::wall_ms()));
        }
    }

    /// Shows one event; true when it is the job's last one.
    fn one(&mut self, line: &Bytes, out: &mut Out) -> Result<bool, CliError> {
        let wrong = |e: serde_json::Error| CliError::Protocol { what: format!("an event: {e}") };
        let head: Head<'_> = serde_json::from_slice(line).map_err(wrong)?;
        let last = head.kind == "summary";
        if head.seq <= self.last_seq {
            return Ok(false);
        }
        self.last_seq = head.seq;
        match &mut self.show {
            Show::Json => out.json_line(line)?,
            Show::Nothing => {}
            Show::Readable(view) => {
                let event: Value = serde_json::from_slice(line).map_err(wrong)?;
                let text = view.event(&event);
                if last {
                    out.end_status();
                }
                if !text.as_str().is_empty() {
                    out.print(&text)?;
                }
            }
        }
        Ok(last)
    }

    /// What a Ctrl-C means now; true when it means to leave.
    async fn interrupted(&mut self, out: &mut Out, interrupts: &mut Interrupts) -> Result<bool, CliError> {
        match self.on_interrupt {
            OnInterrupt::Leave => Ok(true),
            OnInterrupt::Cancel => self.cancel(out, interrupts).await,
        }
    }

    /// Asks the daemon to cancel; true when the user did not want to wait even for that.
    async fn cancel(&mut self, out: &mut Out, interrupts: &mut Interrupts) -> Result<bool, CliError> {
        if self.on_interrupt == OnInterrupt::Cancel {
            out.notice(CANCELLING)?;
            self.on_interrupt = OnInterrupt::Leave;
        }
        let asked = tokio::select! {
            asked = self.client.cancel(&self.job) => asked,
            () = interrupts.next() => return Ok(true),
        };
        self.cancel_wanted = false;
        match asked {
            Ok(_) => {}
            // Asked again as soon as the daemon is back.
            Err(CliError::ConnectionLost { .. } | CliError::NoDaemon { .. }) => self.cancel_wanted = true,
            // The events say how it ends; one that ended in this moment needs no cancel.
            Err(CliError::Api(error)) if error.status == 409 => {}
            Err(error) => out.error(&error),
        }
        Ok(false)
    }
}
