//! What to do with each job and each cell after a restart: a pure table over what the rows say and what
//! the engine shows. Every combination has an answer, and each answer leads to `Done` or back to work.

use crate::job::{CellId, JobId, State};

/// An open job's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The job.
    pub job: JobId,
    /// Where it stood.
    pub state: State,
    /// The cell that its row names, where it has one that is not known to be gone.
    pub cell: Option<CellId>,
}

/// A container that the engine shows under this instance's label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundCell {
    /// The cell it says it is; none for a helper container.
    pub cell: Option<CellId>,
    /// The engine's id.
    pub container: String,
    /// True while its PID 1 runs.
    pub running: bool,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Put it in the queue again, after removing what there was of a cell.
    Requeue {
        /// The job.
        job: JobId,
    },
    /// Its cell lives: take it over where the stream was left.
    Adopt {
        /// The job.
        job: JobId,
        /// The cell.
        cell: CellId,
        /// The engine's id.
        container: String,
    },
    /// It waits for a moment; it has no cell.
    Park {
        /// The job.
        job: JobId,
        /// The moment, in milliseconds since 1970.
        until_ms: u64,
    },
    /// Its cell is gone or was being stopped or parked: clean up; the journal decides the outcome.
    Close {
        /// The job.
        job: JobId,
    },
    /// A container that no open job owns: remove it.
    Reap {
        /// The engine's id.
        container: String,
    },
}

/// Plans a restart.
pub fn plan(rows: &[Row], found: &[FoundCell]) -> Vec<Action> {
    let mut actions = Vec::new();
    let mut kept: Vec<&str> = Vec::new();
    for row in rows {
        let live = row.cell.as_ref().and_then(|cell| {
            found.iter().find(|f| f.running && f.cell.as_ref() == Some(cell)).map(|f| (cell, f))
        });
        let action = match (&row.state, live) {
            // Before `Running` the agent has not got its task: start again.
            (State::Queued | State::Preparing, _) => Action::Requeue { job: row.job.clone() },
            (State::Running, Some((cell, f))) => {
                kept.push(&f.container);
                Action::Adopt { job: row.job.clone(), cell: cell.clone(), container: f.container.clone() }
            }
            // A stop was decided or the cell is gone: what the journal holds decides the outcome. What was being
            // parked is parked: its work is put away once its cell is gone.
            (
                State::Running
                | State::Stopping { .. }
                | State::Parking { .. }
                | State::Collecting { .. }
                | State::Verifying,
                _,
            ) => Action::Close { job: row.job.clone() },
            (State::Parked { parked }, _) => Action::Park { job: row.job.clone(), until_ms: parked.until_ms },
            (State::Done(_), _) => continue,
        };
        actions.push(action);
    }
    let orphans = found.iter().filter(|f| !kept.contains(&f.container.as_str()));
    actions.extend(orphans.map(|f| Action::Reap { container: f.container.clone() }));
    actions
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Input, Outcome, ParkReason, Parked, StopReason};
    use proptest::prelude::*;

    const PARKED: Parked = Parked { until_ms: 9, why: ParkReason::ProviderLimit };

    fn any_state() -> impl Strategy<Value = State> {
        prop_oneof![
            Just(State::Queued),
            Just(State::Preparing),
            Just(State::Running),
            Just(State::Stopping { reason: StopReason::Budget }),
            Just(State::Parking { parked: PARKED }),
            Just(State::Parked { parked: PARKED }),
            Just(State::Collecting { stopped: None }),
            Just(State::Verifying),
            Just(State::Done(Outcome::Succeeded)),
        ]
    }

    /// What the doing layer takes a job through at once, by the answer for it.
    fn road(action: &Action, from: &State) -> Vec<Input> {
        let end = || Input::Finish(Outcome::Lost);
        match (action, from) {
            (Action::Requeue { .. }, State::Preparing) => vec![Input::Requeue],
            (Action::Close { .. }, State::Collecting { .. } | State::Verifying) => vec![end()],
            (Action::Close { .. }, State::Parking { .. }) => vec![Input::Shelved],
            (Action::Close { .. }, _) => vec![Input::CellEnded, end()],
            (
                Action::Requeue { .. } | Action::Adopt { .. } | Action::Park { .. } | Action::Reap { .. },
                _,
            ) => Vec::new(),
        }
    }

    /// One of the ways on to the end, without another restart.
    fn on(state: &State, dice: u8) -> Input {
        let choose = |inputs: &[Input]| inputs[usize::from(dice) % inputs.len()].clone();
        let (stop, park) = (Input::Stop(StopReason::Cancelled), Input::Park(PARKED));
        match state {
            State::Queued => choose(&[Input::Admit, stop]),
            State::Preparing => choose(&[Input::Booted, Input::CellEnded, stop]),
            State::Running => choose(&[Input::CellEnded, stop, park]),
            State::Stopping { .. } => Input::CellEnded,
            State::Parking { .. } => choose(&[Input::Shelved, Input::CellEnded, stop]),
            State::Parked { .. } => choose(&[Input::Unpark, stop]),
            State::Collecting { stopped: None } => {
                choose(&[Input::Finish(Outcome::Succeeded), Input::Verify])
            }
            State::Collecting { stopped: Some(_) } | State::Done(_) => Input::Finish(Outcome::Lost),
            State::Verifying => choose(&[Input::Finish(Outcome::Succeeded), Input::Repair, stop]),
        }
    }

    proptest! {
        #[test]
        fn each_answer_leads_to_done_by_moves_that_the_machine_has(
            state in any_state(), cell in proptest::option::of(0u64..3), found in proptest::option::of((0u64..3, any::<bool>())),
            dice in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let (job, cell) = (JobId::new(1, 0), cell.map(CellId::new));
            let row = Row { job: job.clone(), state: state.clone(), cell: cell.clone() };
            let found: Vec<FoundCell> = found.into_iter().map(|(cell, running)| FoundCell {
                cell: Some(CellId::new(cell)), container: "c".to_owned(), running,
            }).collect();
            let lives = found.iter().any(|f| f.running && cell.is_some() && f.cell == cell);
            let mut state = state;
            for action in plan(&[row], &found) {
                if let Action::Adopt { .. } = action {
                    prop_assert!(state == State::Running && lives, "taken over: a conversation whose cell lives");
                }
                if let Action::Reap { .. } = action {
                    continue;
                }
                for input in road(&action, &state) {
                    let next = state.next(&input);
                    prop_assert!(next.is_ok(), "{:?}: {:?}", action, next);
                    state = next.unwrap_or(state);
                }
            }
            let ends = dice.into_iter().chain([0; 12]);
            for input in ends {
                if state.is_done() {
                    break;
                }
                let next = state.next(&on(&state, input));
                prop_assert!(next.is_ok(), "{:?}", next);
                state = next.unwrap_or(state);
            }
            prop_assert!(state.is_done(), "it is left {}", state.name());
        }

        #[test]
        fn every_open_job_has_one_answer_and_every_container_is_kept_or_reaped(
            rows in proptest::collection::vec((any_state(), proptest::option::of(0u64..6)), 0..12),
            found in proptest::collection::vec((proptest::option::of(0u64..6), any::<bool>()), 0..12),
        ) {
            let rows: Vec<Row> = rows.into_iter().enumerate().map(|(n, (state, cell))| Row {
                job: JobId::new(n as u64, 0), state, cell: cell.map(CellId::new),
            }).collect();
            let found: Vec<FoundCell> = found.into_iter().enumerate().map(|(n, (cell, running))| FoundCell {
                cell: cell.map(CellId::new), container: n.to_string(), running,
            }).collect();
            let actions = plan(&rows, &found);
            for row in &rows {
                let about = actions.iter().filter(|a| match a {
                    Action::Requeue { job, .. } | Action::Adopt { job, .. } | Action::Close { job } => *job == row.job,
                    Action::Park { job, .. } => *job == row.job && matches!(row.state, State::Parked { .. }),
                    Action::Reap { .. } => false,
                }).count();
                prop_assert_eq!(about, usize::from(!row.state.is_done()));
            }
            for f in &found {
                let reaped = actions.contains(&Action::Reap { container: f.container.clone() });
                let adopted = actions.iter().any(|a| matches!(a, Action::Adopt { container, .. } if *container == f.container));
                prop_assert!(reaped != adopted, "kept or reaped, never both or neither");
            }
        }
    }
}
