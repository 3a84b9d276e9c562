//! Notices: who is told of what happens to jobs, and how often it is tried. Pure: what happened is the store's outbox, the
//! sending is `notifier`'s. A notice must never hold what an agent or a prompt said.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::policy::matches;

/// Most targets of one daemon.
pub const TARGETS_MAX: usize = 32;
/// Most notices that wait; what happens then is told to nobody, and logged.
pub const WAITING_MAX: u32 = 100_000;
/// Tries of one notice: over some two days.
pub const TRIES_MAX: u32 = 20;

/// What somebody may be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A job is over.
    JobEnd,
    /// The last job of a batch is.
    BatchEnd,
    /// A job waits for a moment: a budget's new day, the provider's limit, the machine.
    Parked,
    /// Sent by `hotcell notify test`.
    Test,
}

impl Kind {
    /// Those that a target can ask for.
    pub const ALL: [Self; 3] = [Self::JobEnd, Self::BatchEnd, Self::Parked];

    /// One word, for programs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::JobEnd => "job_end",
            Self::BatchEnd => "batch_end",
            Self::Parked => "parked",
            Self::Test => "test",
        }
    }
}

impl std::str::FromStr for Kind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().chain([Self::Test]).find(|kind| kind.as_str() == text).ok_or(())
    }
}

/// Where notices go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To {
    /// An HTTP POST to this URL, signed with the key in this file.
    Webhook {
        /// `https://…`, or plain http to loopback.
        url: String,
        /// Where the key is; its bytes without white space at the end.
        secret_file: Option<PathBuf>,
    },
    /// A program, run as the user whose job it is, with the notice on its standard input.
    Command {
        /// Program (an absolute path) and arguments.
        argv: Vec<PathBuf>,
    },
}

/// Who is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub name: String,
    /// Of what.
    pub on: Vec<Kind>,
    /// Of jobs under these policies: names, or beginnings of names with a final `*`.
    pub policies: Vec<String>,
    /// Of jobs of these users; of all where there are none.
    pub uids: Vec<u32>,
    /// How.
    pub to: To,
}

impl Target {
    /// Whether it is told of this.
    pub fn wants(&self, kind: Kind, policy: &str, uid: u32) -> bool {
        kind == Kind::Test
            || (self.on.contains(&kind)
                && self.policies.iter().any(|pattern| matches(pattern, policy))
                && (self.uids.is_empty() || self.uids.contains(&uid)))
    }
}

/// How long to wait after so many tries, in milliseconds; none where it is given up. 5 s, 10 s, 20 s … 6 h.
pub fn pause_ms(tries: u32) -> Option<u64> {
    const FIRST_MS: u64 = 5_000;
    const MAX_MS: u64 = 6 * 3_600_000;
    (tries < TRIES_MAX).then(|| (FIRST_MS << tries.saturating_sub(1).min(20)).min(MAX_MS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_told_of_what_it_asked_for_and_of_nobody_elses_jobs() {
        let target = Target {
            name: "a".to_owned(),
            on: vec![Kind::JobEnd],
            policies: vec!["review*".to_owned(), "trusted".to_owned()],
            uids: vec![7],
            to: To::Command { argv: Vec::new() },
        };
        assert!(target.wants(Kind::JobEnd, "reviewer", 7) && target.wants(Kind::JobEnd, "trusted", 7));
        assert!(!target.wants(Kind::Parked, "trusted", 7));
        assert!(!target.wants(Kind::JobEnd, "trusted2", 7) && !target.wants(Kind::JobEnd, "trusted", 8));
        assert!(Target { uids: Vec::new(), ..target }.wants(Kind::JobEnd, "trusted", 8));
    }

    #[test]
    fn pauses_grow_and_end() {
        let all: Vec<u64> = (1..).map_while(pause_ms).collect();
        assert_eq!((all.len(), all[0], all[1]), (TRIES_MAX as usize - 1, 5_000, 10_000));
        assert!(all.is_sorted() && all.iter().sum::<u64>() > 2 * 86_400_000 - 43_200_000);
        assert_eq!(pause_ms(TRIES_MAX), None);
    }

    #[test]
    fn kinds_are_known_by_their_words() {
        for kind in Kind::ALL {
            assert_eq!(kind.as_str().parse(), Ok(kind));
        }
        assert_eq!("nonsense".parse::<Kind>(), Err(()));
    }
}
