//! How the daemon is to end, as its caller, its signals and its API say it. A word can only become more urgent; what
//! is done about it is the loop's. It must never touch a job.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// How the daemon is to end; a later one is more urgent and takes the place of an earlier one.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// No new jobs; running ones may end, and are stopped when the drain limit is over.
    Drain,
    /// Running jobs are stopped.
    Now,
    /// Cells go on without a daemon and the next one adopts them. Requests for the model that are under way may end,
    /// for a short time.
    Detach,
    /// The same without waiting for anything but a commit.
    Leave,
}

impl How {
    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Drain => "draining",
            Self::Now => "stopping",
            Self::Detach | Self::Leave => "detaching",
        }
    }

    /// What it becomes when it is asked for a second time.
    pub fn hurried(self) -> Self {
        match self {
            Self::Drain | Self::Now => Self::Now,
            Self::Detach | Self::Leave => Self::Leave,
        }
    }
}

/// The word itself; clones share it.
#[derive(Debug, Clone)]
pub struct Shutdown(Arc<watch::Sender<Option<How>>>);

impl Default for Shutdown {
    fn default() -> Self {
        Self(Arc::new(watch::channel(None).0))
    }
}

impl Shutdown {
    /// Asks the daemon to end; asking for what is under way, or for less, changes nothing.
    pub fn ask(&self, how: How) {
        self.0.send_if_modified(|now| {
            let more = now.is_none_or(|now| now < how);
            if more {
                *now = Some(how);
            }
            more
        });
    }

    /// SIGTERM or SIGINT: drain; once it is ending, hurry.
    pub fn terminate(&self) {
        self.ask(self.how().map_or(How::Drain, How::hurried));
    }

    /// SIGQUIT: detach, also out of a drain; once it is detaching, leave.
    pub fn quit(&self) {
        match self.how() {
            None | Some(How::Drain | How::Now) => self.ask(How::Detach),
            Some(How::Detach | How::Leave) => self.ask(How::Leave),
        }
    }

    /// How the daemon is ending, where it is.
    pub fn how(&self) -> Option<How> {
        *self.0.borrow()
    }

    /// Whether the daemon is ending.
    pub fn has_begun(&self) -> bool {
        self.how().is_some()
    }

    /// Waits for the first word. Cancel-safe.
    pub async fn begun(&self) -> How {
        self.wait(|_| true).await
    }

    /// Waits for a more urgent word than `how`. Cancel-safe.
    pub async fn beyond(&self, how: How) -> How {
        self.wait(|now| now > how).await
    }

    async fn wait(&self, enough: impl Fn(How) -> bool) -> How {
        let mut word = self.0.subscribe();
        match word.wait_for(|now| now.is_some_and(&enough)).await.map(|now| *now) {
            Ok(Some(how)) => how,
            // We hold the sender: it cannot close while we wait.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_signal_hurries_what_the_first_one_began_and_nothing_turns_back() {
        let after = |signals: &[char]| {
            let shutdown = Shutdown::default();
            for signal in signals {
                if *signal == 'T' { shutdown.terminate() } else { shutdown.quit() }
            }
            shutdown.how()
        };
        assert_eq!(after(&[]), None);
        assert_eq!(after(&['T']), Some(How::Drain));
        assert_eq!(after(&['T', 'T']), Some(How::Now));
        assert_eq!(after(&['T', 'T', 'T']), Some(How::Now));
        assert_eq!(after(&['Q']), Some(How::Detach));
        assert_eq!(after(&['T', 'Q']), Some(How::Detach), "an upgrade need not wait for a drain");
        assert_eq!(after(&['T', 'T', 'Q']), Some(How::Detach));
        assert_eq!(after(&['Q', 'T']), Some(How::Leave), "a detached job is never stopped");
        assert_eq!(after(&['Q', 'Q', 'T', 'Q']), Some(How::Leave));
    }

    #[tokio::test]
    async fn who_waits_for_more_hears_only_of_more() {
        let shutdown = Shutdown::default();
        shutdown.ask(How::Drain);
        assert_eq!(shutdown.begun().await, How::Drain);
        let more = shutdown.clone();
        let waiting = tokio::spawn(async move { more.beyond(How::Drain).await });
        shutdown.ask(How::Drain);
        shutdown.ask(How::Detach);
        shutdown.ask(How::Now);
        assert_eq!(waiting.await.ok(), Some(How::Detach));
        assert_eq!(shutdown.how(), Some(How::Detach));
    }
}
