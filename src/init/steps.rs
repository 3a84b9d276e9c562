//! What became of the steps, and the one whose end the daemon is to be told. It must never forget how a step
//! ended: asked again for it, init answers and does not run it a second time.

use crate::carry::Carry;
use crate::wire::{ExitStatus, FromInit, STEPS_MAX};

/// See the module.
pub(crate) struct Steps {
    ended: [Option<ExitStatus>; STEPS_MAX],
    news: Option<News>,
    told: u64,
}

/// The end of a step, told on each connection until the daemon asks for something else.
pub(crate) struct News {
    /// Counts what is to be told: each is told once on a connection.
    pub(crate) number: u64,
    index: u32,
    status: ExitStatus,
    /// The end of what it printed, once that was read.
    printed: Option<u64>,
}

impl Steps {
    /// None has ended.
    pub(crate) fn new() -> Self {
        Self { ended: [None; STEPS_MAX], news: None, told: 0 }
    }

    /// A step ended.
    pub(crate) fn end(&mut self, index: u32, status: ExitStatus) {
        if let Some(slot) = self.ended.get_mut(index as usize) {
            *slot = Some(status);
        }
        self.tell(index, status);
    }

    /// Tells again how a step ended; false where it has not.
    pub(crate) fn again(&mut self, index: u32) -> bool {
        let status = self.ended.get(index as usize).copied().flatten();
        if let Some(status) = status {
            self.tell(index, status);
        }
        status.is_some()
    }

    fn tell(&mut self, index: u32, status: ExitStatus) {
        self.told += 1;
        self.news = Some(News { number: self.told, index, status, printed: None });
    }

    /// The daemon has asked for something else.
    pub(crate) fn forget(&mut self) {
        self.news = None;
    }

    /// Looks whether all that the step printed was read.
    pub(crate) fn settle(&mut self, carry: &Carry) {
        if let Some(news) = self.news.as_mut().filter(|news| news.printed.is_none()) {
            news.printed = carry.printed();
        }
    }

    /// What the daemon is to be told.
    pub(crate) fn news(&self) -> Option<&News> {
        self.news.as_ref()
    }
}

impl News {
    /// Whether it can be told where stderr was sent up to here.
    pub(crate) fn ready(&self, stderr_sent: u64) -> bool {
        self.printed.is_some_and(|printed| stderr_sent >= printed)
    }

    /// The frame.
    pub(crate) fn frame(&self) -> FromInit {
        FromInit::StepEnded { index: self.index, status: self.status }
    }
}
