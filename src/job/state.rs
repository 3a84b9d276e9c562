//! THE state machine of a job. One enum carries the state and its data, one function moves it.
//!
//! ```text
//!         Requeue
//!    ┌────────────┐
//!    ▼            │
//!  Queued ──► Preparing ──► Running ──► Collecting ──► Done(outcome)
//!   │ ▲ │         │            │           ▲ ▲            ▲
//!   │ │ │         └─────┬──────┤           │ │            │
//!   │ │ │               │      ▼           │ │            │
//!   │ │ │               │  Stopping(reason)┘ │            │
//!   │ │ │               ▼      ▲             │            │
//!   │ │ │            Parking ──┴─────────────┘            │
//!   │ │ │ Park          │ Shelved                         │
//!   │ │ └───────► Parked(until) ──────────────────────────┤
//!   │ └────────────────┘ Unpark                           │
//!   └─────────────────────────────────────────────────────┘
//!
//!   Collecting ── Verify ──► Verifying ── Repair ──► Preparing
//!                               │  └── Stop ──► Stopping(reason)
//!                               └── Finish ──► Done(outcome)
//! ```
//!
//! *Invariant*: every move goes through [`State::next`] and is stored by a compare-and-set before the act
//! it announces. Nothing leaves `Done`. The first stop reason wins, and a stop wins over parking. A job that
//! is `Parked` has no slot, no cell, no lease and no reservation; it goes back to the queue when its time comes.

use serde::{Deserialize, Serialize};

use super::{Outcome, Parked, StopReason};

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
    /// The job is to wait; its cell is being ended, and its work is put away.
    Parking {
        /// Until when and why.
        parked: Parked,
    },
    /// Waiting for a moment on the wall clock; nothing of a cell is left but its scratch space.
    Parked {
        /// Until when and why.
        parked: Parked,
    },
    /// The cell's processes are gone; results are read back and the cell is destroyed.
    Collecting {
        /// Set where a stop was decided before.
        stopped: Option<StopReason>,
    },
    /// The agent's cell is gone and its change set is kept; the job's own commands judge it in a fresh one.
    Verifying,
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
    /// It is to wait.
    Park(Parked),
    /// Its cell is proven gone and its work is put away.
    Shelved,
    /// Its time has come, or its owner wants it to go on.
    Unpark,
    /// All processes of the cell are proven gone.
    CellEnded,
    /// The agent has done its task and its change set is on the disk: it is to be judged.
    Verify,
    /// It did not pass, and the agent gets another try.
    Repair,
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
    pub const NAMES: [&'static str; 9] = [
        "queued",
        "preparing",
        "running",
        "stopping",
        "parking",
        "parked",
        "collecting",
        "verifying",
        "done",
    ];

    /// The name used in rows, metrics and JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Stopping { .. } => "stopping",
            Self::Parking { .. } => "parking",
            Self::Parked { .. } => "parked",
            Self::Collecting { .. } => "collecting",
            Self::Verifying => "verifying",
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
        use Input::{Admit, Booted, CellEnded, Finish, Park, Repair, Requeue, Shelved, Stop, Unpark, Verify};
        match (self, input) {
            (Self::Queued, Admit) => Ok(Self::Preparing),
            (Self::Queued, Park(parked)) => Ok(Self::Parked { parked: *parked }),
            // No cell: a stop ends it at once.
            (Self::Queued | Self::Parked { .. }, Stop(reason)) => {
                Ok(Self::Done(Outcome::Stopped { reason: *reason }))
            }
            (Self::Queued | Self::Parked { .. }, Finish(outcome)) => Ok(Self::Done(outcome.clone())),
            (Self::Queued, Requeue | Booted | Shelved | Unpark | CellEnded | Verify | Repair) => illegal(),

            (Self::Parked { .. }, Unpark) => Ok(Self::Queued),
            (
                Self::Parked { .. },
                Admit | Requeue | Booted | Park(_) | Shelved | CellEnded | Verify | Repair,
            ) => illegal(),

            (Self::Preparing, Requeue) => Ok(Self::Queued),
            (Self::Preparing, Booted) => Ok(Self::Running),
            (Self::Preparing | Self::Running, Stop(reason)) => Ok(Self::Stopping { reason: *reason }),
            (Self::Preparing | Self::Running, Park(parked)) => Ok(Self::Parking { parked: *parked }),
            (Self::Preparing | Self::Running, CellEnded) => Ok(Self::Collecting { stopped: None }),
            (Self::Preparing, Admit | Shelved | Unpark | Finish(_) | Verify | Repair) => illegal(),
            (Self::Running, Admit | Requeue | Booted | Shelved | Unpark | Finish(_) | Verify | Repair) => {
                illegal()
            }

            (Self::Parking { .. }, Stop(reason)) => Ok(Self::Stopping { reason: *reason }),
            (Self::Parking { parked }, Shelved) => Ok(Self::Parked { parked: *parked }),
            // Its task was over before it could be parked, or its work cannot be gone on with.
            (Self::Parking { .. }, CellEnded) => Ok(Self::Collecting { stopped: None }),
            (
                Self::Parking { .. },
                Admit | Requeue | Booted | Park(_) | Unpark | Finish(_) | Verify | Repair,
            ) => illegal(),

            (Self::Stopping { reason }, CellEnded) => Ok(Self::Collecting { stopped: Some(*reason) }),
            (Self::Stopping { reason }, Stop(_)) => Ok(Self::Stopping { reason: *reason }),
            (
                Self::Stopping { .. },
                Admit | Requeue | Booted | Park(_) | Shelved | Unpark | Finish(_) | Verify | Repair,
            ) => illegal(),

            (Self::Collecting { .. }, Finish(outcome)) => Ok(Self::Done(outcome.clone())),
            (Self::Collecting { stopped }, Stop(_)) => Ok(Self::Collecting { stopped: *stopped }),
            (Self::Collecting { stopped: None }, Verify) => Ok(Self::Verifying),
            (
                Self::Collecting { .. },
                Admit | Requeue | Booted | Park(_) | Shelved | Unpark | CellEnded | Verify | Repair,
            ) => illegal(),

            (Self::Verifying, Finish(outcome)) => Ok(Self::Done(outcome.clone())),
            (Self::Verifying, Repair) => Ok(Self::Preparing),
            (Self::Verifying, Stop(reason)) => Ok(Self::Stopping { reason: *reason }),
            (Self::Verifying, Admit | Requeue | Booted | Park(_) | Shelved | Unpark | CellEnded | Verify) => {
                illegal()
            }

            (
                Self::Done(_),
                Admit | Requeue | Booted | Stop(_) | Park(_) | Shelved | Unpark | CellEnded | Finish(_)
                | Verify | Repair,
            ) => illegal(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ParkReason;
    use super::*;
    use proptest::prelude::*;

    const PARKED: Parked = Parked { until_ms: 7, why: ParkReason::DayBudget };

    fn any_input() -> impl Strategy<Value = Input> {
        prop_oneof![
            Just(Input::Admit),
            Just(Input::Requeue),
            Just(Input::Booted),
            proptest::sample::select(StopReason::ALL.to_vec()).prop_map(Input::Stop),
            Just(Input::Park(PARKED)),
            Just(Input::Shelved),
            Just(Input::Unpark),
            Just(Input::CellEnded),
            Just(Input::Verify),
            Just(Input::Repair),
            Just(Input::Finish(Outcome::Succeeded)),
            Just(Input::Finish(Outcome::Lost)),
        ]
    }

    #[test]
    fn a_parked_job_says_until_when_and_why_in_its_json() {
        let json = serde_json::to_value(State::Parked { parked: PARKED }).expect("json");
        let parked = serde_json::json!({ "until_ms": 7, "why": "day_budget" });
        assert_eq!(json, serde_json::json!({ "state": "parked", "parked": parked }));
        assert_eq!(serde_json::from_value::<State>(json).ok(), Some(State::Parked { parked: PARKED }));
    }

    #[test]
    fn a_parked_job_goes_on_by_the_queue_and_a_stop_wins_over_parking() {
        let parked = State::Running.next(&Input::Park(PARKED)).and_then(|s| s.next(&Input::Shelved));
        assert_eq!(parked, Ok(State::Parked { parked: PARKED }));
        assert_eq!(State::Parked { parked: PARKED }.next(&Input::Unpark), Ok(State::Queued));
        assert!(State::Parked { parked: PARKED }.next(&Input::Admit).is_err(), "never past the queue");
        let reason = StopReason::Cancelled;
        let stopped = State::Parking { parked: PARKED }.next(&Input::Stop(reason));
        assert_eq!(stopped, Ok(State::Stopping { reason }));
        assert!(State::Stopping { reason }.next(&Input::Park(PARKED)).is_err());
    }

    #[test]
    fn what_is_verified_was_collected_and_can_be_repaired_stopped_or_done() {
        let verifying = State::Collecting { stopped: None }.next(&Input::Verify);
        assert_eq!(verifying, Ok(State::Verifying));
        let reason = StopReason::Budget;
        assert!(State::Collecting { stopped: Some(reason) }.next(&Input::Verify).is_err(), "a stop wins");
        assert!(State::Running.next(&Input::Verify).is_err());
        assert_eq!(State::Verifying.next(&Input::Repair), Ok(State::Preparing));
        assert_eq!(State::Verifying.next(&Input::Stop(reason)), Ok(State::Stopping { reason }));
        assert!(State::Verifying.next(&Input::Finish(Outcome::Succeeded)).is_ok_and(|state| state.is_done()));
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
