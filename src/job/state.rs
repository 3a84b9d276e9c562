//! THE state machine of a job. One enum carries the state and its data, one function moves it.
//!
//! ```text
//!         Requeue
//!    ┌────────────┐
//!    ▼            │
//!  Queued ──► Preparing ──► Running ──► Collecting ──► Done(outcome)
//!    │            │            │            ▲             ▲
//!    │            └────┬───────┘            │             │
//!    │                 ▼                    │             │
//!    │         Stopping(reason) ────────────┘             │
//!    └────────────────────────────────────────────────────┘
//! ```
//!
//! *Invariant*: every move goes through [`State::next`] and is stored by a compare-and-set before the act
//! it announces. Nothing leaves `Done`. The first stop reason wins. `Parked` (provider limits) is not here
//! yet: a job never waits in this version for anything but a slot.

use serde::{Deserialize, Serialize};

use super::{Outcome, StopReason};

/// Where a job stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum State {
    /// Waiting for a slot.
    Queued,
    /// Workspace, lease and container are being made.
    Preparing,
    /// The conversation is on.
    Running,
    /// A stop was decided; the cell is being ended.
    Stopping {
        /// The first reason given.
        reason: StopReason,
    },
    /// The cell's processes are gone; results are read back and the cell is destroyed.
    Collecting {
        /// Set where a stop was decided before.
        stopped: Option<StopReason>,
    },
    /// Over; nothing of the cell is left.
    Done(Outcome),
}

/// What can happen to a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The scheduler gave it a slot.
    Admit,
    /// The daemon died before the agent had its task; whatever there was of a cell is gone.
    Requeue,
    /// The agent answered `initialize`; its task is about to be sent.
    Booted,
    /// A stop was asked for or a limit was reached.
    Stop(StopReason),
    /// All processes of the cell are proven gone.
    CellEnded,
    /// Results are read back and nothing of the cell is left, or it never had a cell.
    Finish(Outcome),
}

/// A move that the machine does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no move from {from} by {input:?}")]
pub struct IllegalMove {
    /// The state it was in.
    pub from: &'static str,
    /// What was tried.
    pub input: Input,
}

impl State {
    /// The names, in order; metrics are seeded from it.
    pub const NAMES: [&'static str; 6] = ["queued", "preparing", "running", "stopping", "collecting", "done"];

    /// The name used in rows, metrics and JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Stopping { .. } => "stopping",
            Self::Collecting { .. } => "collecting",
            Self::Done(_) => "done",
        }
    }

    /// True when nothing can happen any more.
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done(_))
    }

    /// The outcome of a job that is over.
    pub fn outcome(&self) -> Option<&Outcome> {
        if let Self::Done(outcome) = self { Some(outcome) } else { None }
    }

    /// The state after `input`.
    ///
    /// # Errors
    /// [`IllegalMove`] where the diagram has no such arrow.
    pub fn next(&self, input: &Input) -> Result<Self, IllegalMove> {
        let illegal = || Err(IllegalMove { from: self.name(), input: input.clone() });
        match (self, input) {
            (Self::Queued, Input::Admit) => Ok(Self::Preparing),
            // A queued job has no cell: a stop ends it at once.
            (Self::Queued, Input::Stop(reason)) => Ok(Self::Done(Outcome::Stopped { reason: *reason })),
            (Self::Queued, Input::Finish(outcome)) => Ok(Self::Done(outcome.clone())),
            (Self::Queued, Input::Requeue | Input::Booted | Input::CellEnded) => illegal(),

            (Self::Preparing, Input::Requeue) => Ok(Self::Queued),
            (Self::Preparing, Input::Booted) => Ok(Self::Running),
            (Self::Preparing | Self::Running, Input::Stop(reason)) => Ok(Self::Stopping { reason: *reason }),
            (Self::Preparing | Self::Running, Input::CellEnded) => Ok(Self::Collecting { stopped: None }),
            (Self::Preparing, Input::Admit | Input::Finish(_)) => illegal(),
            (Self::Running, Input::Admit | Input::Requeue | Input::Booted | Input::Finish(_)) => illegal(),

            (Self::Stopping { reason }, Input::CellEnded) => Ok(Self::Collecting { stopped: Some(*reason) }),
            (Self::Stopping { reason }, Input::Stop(_)) => Ok(Self::Stopping { reason: *reason }),
            (Self::Stopping { .. }, Input::Admit | Input::Requeue | Input::Booted | Input::Finish(_)) => {
                illegal()
            }

            (Self::Collecting { .. }, Input::Finish(outcome)) => Ok(Self::Done(outcome.clone())),
            (Self::Collecting { stopped }, Input::Stop(_)) => Ok(Self::Collecting { stopped: *stopped }),
            (Self::Collecting { .. }, Input::Admit | Input::Requeue | Input::Booted | Input::CellEnded) => {
                illegal()
            }

            (
                Self::Done(_),
                Input::Admit
                | Input::Requeue
                | Input::Booted
                | Input::Stop(_)
                | Input::CellEnded
                | Input::Finish(_),
            ) => illegal(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_input() -> impl Strategy<Value = Input> {
        prop_oneof![
            Just(Input::Admit),
            Just(Input::Requeue),
            Just(Input::Booted),
            proptest::sample::select(StopReason::ALL.to_vec()).prop_map(Input::Stop),
            Just(Input::CellEnded),
            Just(Input::Finish(Outcome::Succeeded)),
            Just(Input::Finish(Outcome::Lost)),
        ]
    }

    proptest! {
        #[test]
        fn from_any_reachable_state_a_job_can_end_and_then_stays(inputs in proptest::collection::vec(any_input(), 0..20)) {
            let mut state = State::Queued;
            for input in &inputs {
                if let Ok(next) = state.next(input) {
                    prop_assert!(!state.is_done());
                    state = next;
                }
            }
            for input in [Input::CellEnded, Input::Finish(Outcome::Lost)] {
                if let Ok(next) = state.next(&input) {
                    state = next;
                }
            }
            prop_assert!(state.is_done());
        }

        #[test]
        fn the_first_stop_reason_wins(a in proptest::sample::select(StopReason::ALL.to_vec()), b in proptest::sample::select(StopReason::ALL.to_vec())) {
            let stopped = State::Running.next(&Input::Stop(a)).and_then(|s| s.next(&Input::Stop(b))).and_then(|s| s.next(&Input::CellEnded));
            prop_assert_eq!(stopped, Ok(State::Collecting { stopped: Some(a) }));
        }
    }
}
