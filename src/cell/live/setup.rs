//! The job's own commands before its agent, in its cell: the CLI is started when the last of them has ended well, and its
//! way out is its own from then on. It must never start the CLI while what `setup` may reach is still open to it.

use super::*;
use crate::cell::steps::Progress;

impl Live<'_> {
    /// Asks for the first command, where there is one.
    pub(super) fn begin_setup(&mut self) -> Result<(), RecordError> {
        match &mut self.setup {
            Some(setup) => setup.begin(self.record, &self.to_cell),
            None => Ok(()),
        }
    }

    /// A command has ended: the next one, the CLI, or the end.
    pub(super) async fn on_step(&mut self, index: u32, status: ExitStatus) -> Result<(), RecordError> {
        let Some(setup) = &mut self.setup else { return Ok(()) };
        match setup.ended(self.record, (index, status), &self.to_cell)? {
            Progress::Next => Ok(()),
            // Killed because a stop was decided.
            Progress::Failed(_) if matches!(self.record.state(), State::Stopping { .. }) => Ok(()),
            Progress::Failed(failure) => {
                self.setup_failed(failure);
                Ok(())
            }
            Progress::Done => {
                self.parts.metrics.phase(Phase::Setup, setup.elapsed().as_secs_f64());
                self.setup = None;
                match self.lease.settle_in().await {
                    Ok(last) => {
                        for event in &last {
                            self.record.note_gateway(self.parts, event, &mut self.trouble)?;
                        }
                        self.record.commit()?;
                    }
                    Err(error) => {
                        let words = format!("cannot open the way out again: {error}");
                        self.setup_failed(Failure::new(Phase::Setup, FailReason::Internal, words));
                        return Ok(());
                    }
                }
                (self.started, self.activity) = (Instant::now(), Instant::now());
                self.to_cell.start();
                Ok(())
            }
        }
    }

    pub(super) fn setup_failed(&mut self, failure: Failure) {
        self.failure.get_or_insert(failure);
        self.lease.revoke();
        self.to_cell.kill();
        self.ending = Ending::Killed { until: Instant::now() + KILL_GRACE };
    }
}
