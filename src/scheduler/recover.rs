//! What to do with each job and each cell after a restart: a pure table over what the rows say and what
//! the engine shows. Every combination has an answer, and each answer leads to `Done` or back to work.

use crate::job::{CellId, JobId, State};

/// An open job's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The job.
    pub job: JobId,
    /// Whose it is.
    pub uid: u32,
    /// Its priority.
    pub priority: i8,
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
        /// Whose it is.
        uid: u32,
        /// Its priority.
        priority: i8,
    },
    /// Its cell lives: take it over where the stream was left.
    Adopt {
        /// The job.
        job: JobId,
        /// Whose it is.
        uid: u32,
        /// The cell.
        cell: CellId,
        /// The engine's id.
        container: String,
    },
    /// Its cell is gone or was being stopped: clean up; the journal decides the outcome.
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
            (State::Queued | State::Preparing, _) => {
                Action::Requeue { job: row.job.clone(), uid: row.uid, priority: row.priority }
            }
            (State::Running, Some((cell, f))) => {
                kept.push(&f.container);
                Action::Adopt {
                    job: row.job.clone(),
                    uid: row.uid,
                    cell: cell.clone(),
                    container: f.container.clone(),
                }
            }
            // A stop was decided or the cell is gone: what the journal holds decides the outcome.
            (State::Running | State::Stopping { .. } | State::Collecting { .. }, _) => {
                Action::Close { job: row.job.clone() }
            }
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
    use crate::job::{Outcome, StopReason};
    use proptest::prelude::*;

    fn any_state() -> impl Strategy<Value = State> {
        prop_oneof![
            Just(State::Queued),
            Just(State::Preparing),
            Just(State::Running),
            Just(State::Stopping { reason: StopReason::Budget }),
            Just(State::Collecting { stopped: None }),
            Just(State::Done(Outcome::Succeeded)),
        ]
    }

    proptest! {
        #[test]
        fn every_open_job_has_one_answer_and_every_container_is_kept_or_reaped(
            rows in proptest::collection::vec((any_state(), proptest::option::of(0u64..6)), 0..12),
            found in proptest::collection::vec((proptest::option::of(0u64..6), any::<bool>()), 0..12),
        ) {
            let rows: Vec<Row> = rows.into_iter().enumerate().map(|(n, (state, cell))| Row {
                job: JobId::new(n as u64, 0), uid: 1, priority: 0, state, cell: cell.map(CellId::new),
            }).collect();
            let found: Vec<FoundCell> = found.into_iter().enumerate().map(|(n, (cell, running))| FoundCell {
                cell: cell.map(CellId::new), container: n.to_string(), running,
            }).collect();
            let actions = plan(&rows, &found);
            for row in &rows {
                let about = actions.iter().filter(|a| match a {
                    Action::Requeue { job, .. } | Action::Adopt { job, .. } | Action::Close { job } => *job == row.job,
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
