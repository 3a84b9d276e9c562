//! The end of a live cell: what PID 1 or the engine said of it becomes the conversation's end, and the ways to the
//! model and to the cell are closed, whether the record can still be written or not. It never decides a stop.

use super::*;

impl Live<'_> {
    pub(super) async fn exited(&mut self, report: &ExitReport) -> Result<AgentExit, RecordError> {
        let code = match report.status {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(signal) => 128 + signal,
        };
        self.last_words()?;
        self.ended_by_init(report.reason).await?;
        self.record.exit =
            Some(ExitFigures { peak_memory_bytes: report.peak_memory_bytes, cpu_us: report.cpu_us });
        // Killed by us after it had said its last word: the word counts.
        let code = if self.over && code > 128 && self.failure.is_none() { 0 } else { code };
        self.record.push(&Body::Exit {
            code,
            oom_kills: report.oom_kills,
            peak_memory_bytes: report.peak_memory_bytes,
            cpu_us: report.cpu_us,
        })?;
        self.record.commit()?;
        self.to_cell.bye();
        if code != 0 && self.watch.is_full() {
            let words = "the CLI failed while the job's disk space was used up".to_owned();
            self.fail(Phase::Run, FailReason::DiskFull, words);
        }
        Ok(agent_exit(code, report.oom_kills, self.tail()))
    }

    /// A last line without its line feed.
    fn last_words(&mut self) -> Result<(), RecordError> {
        let (end, part) = self.lines.rest();
        if part.is_empty() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&part).into_owned();
        self.record.push(&Body::Output { stream: Stream::Stdout, end, text })?;
        Ok(())
    }

    /// PID 1 holds limits of its own for the time without a daemon: what it did about them is a stop or a loss,
    /// not an error of the CLI.
    async fn ended_by_init(&mut self, reason: ExitReason) -> Result<(), RecordError> {
        let ending = matches!(self.record.state(), State::Stopping { .. } | State::Parking { .. });
        let decided = self.over || self.failure.is_some() || ending;
        match reason {
            ExitReason::WallLimit if !decided => {
                let detail =
                    "PID 1 of the cell ended it at its wall limit, while the daemon was away".to_owned();
                self.record.push(&Body::Stop { reason: StopReason::Deadline, detail })?;
                self.record.step(self.parts, Input::Stop(StopReason::Deadline)).await
            }
            ExitReason::DeadMan if !decided => {
                let words = "PID 1 of the cell ended it, since no daemon was there for too long";
                self.fail(Phase::Run, FailReason::CellLost, words.to_owned());
                Ok(())
            }
            ExitReason::WallLimit | ExitReason::DeadMan | ExitReason::Agent | ExitReason::Killed => Ok(()),
        }
    }

    /// The container ended and PID 1 said nothing of it.
    pub(super) fn unseen_exit(&mut self, exit: &Result<Exit, String>) -> AgentExit {
        let words = match exit {
            Ok(exit) => {
                let why = exit.error.clone().unwrap_or_default();
                format!(
                    "the cell ended without a last word, with code {}{why} {}",
                    exit.code, exit.stderr_tail
                )
            }
            Err(error) => format!("the cell is gone: {error}"),
        };
        let oom = exit.as_ref().is_ok_and(|e| e.oom_killed);
        let reason = if oom { FailReason::Oom } else { FailReason::CellLost };
        self.fail(Phase::Run, reason, words);
        agent_exit(exit.as_ref().map_or(137, |e| e.code as i32), u64::from(oom), self.tail())
    }

    pub(super) fn fail(&mut self, phase: Phase, reason: FailReason, words: String) {
        if self.failure.is_none() {
            self.failure = Some(Failure::new(phase, reason, words));
        }
    }

    pub(super) fn tail(&self) -> String {
        let bytes: Vec<u8> = self.stderr.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }

    /// Closes the way to the model and the link, whether the record can still be written or not; requests still
    /// under way are followed to their end.
    pub(super) async fn leave(self, exit: Result<AgentExit, RecordError>) -> Result<Ended, RecordError> {
        let Self { parts, record, session, link, lease, container, booted, failure, .. } = self;
        let (mut trouble, mut seen) = (self.trouble, self.seen);
        if let Some(booted) = booted {
            parts.metrics.phase(Phase::Run, booted.elapsed().as_secs_f64());
        }
        if exit.is_err()
            && let Err(error) = parts.engine.kill(&container).await
        {
            tracing::warn!(job = %record.job, %error, "cannot kill a cell whose record cannot be written; destroying it");
        }
        let last = lease.destroy().await;
        if let Err(error) = link.destroy().await {
            tracing::warn!(job = %record.job, %error, "the socket of a cell is left to the sweep");
        }
        let exit = exit?;
        for event in last {
            record.note_gateway(parts, &event, &mut trouble)?;
            seen.note(&event);
        }
        record.commit()?;
        let (session, exit, output) = (Some(session), Some(exit), None);
        Ok(Ended { session, exit, failure, trouble, seen, output })
    }
}
