//! The cell of a job's command: made like that of an agent, but for the model. It must never give a command a way to the
//! model.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::watch;

use super::prepare::{self, Launch, PrepareError, Started, WALL_SLACK_MS};
use super::record::Record;
use super::steps::{self, Steps};
use super::{Parts, StopWish};
use crate::event::Body;
use crate::job::spec::{CommandSpec, Runtime};

/// What whoever sits at a terminal has to know of this runtime.
pub(super) fn greeting(command: &CommandSpec, runtime: Runtime) -> Option<&'static str> {
    match (command.terminal, runtime) {
        (Some(_), Runtime::Runsc) => Some(
            "under gVisor Ctrl-C may not be heard; `exit`, or `hotcell cancel` from elsewhere, ends the command",
        ),
        (Some(_), Runtime::Runc) | (None, _) => None,
    }
}

/// Makes the cell of a job's command.
pub(super) async fn prepare_command(
    parts: &Arc<Parts>,
    record: &mut Record,
    command: &CommandSpec,
    stop: &mut watch::Receiver<StopWish>,
) -> Result<(Started, VecDeque<Steps>, Runtime), PrepareError> {
    let begun = prepare::begin(parts, record, true, stop).await?;
    let accepted = record.accepted.clone();
    let made = prepare::make_rooms(parts, record, &begun.names, begun.tenant.clone(), accepted, None).await?;
    let opening = record.opening(false, 0);
    record.begin_attempt(&begun.names.cell, &opening)?;
    for text in made.notes {
        record.push(&Body::Note { text })?;
    }
    record.commit()?;
    let first = record.spec.setup.as_ref().map(|_| steps::setup_plan(record));
    let setup = record.spec.setup.as_ref().zip(first.as_ref());
    let setup = setup.map(|(setup, plan)| Steps::setup(setup, begun.image.shell, plan));
    let plan = record.accepted.plan.clone();
    let launch = Launch {
        argv: command.argv(begun.image.shell),
        more: &[],
        steps: setup.as_ref().map(|setup| setup.argvs().to_vec()).unwrap_or_default(),
        terminal: command.terminal,
        wall_limit_ms: record.wall_left_ms() + WALL_SLACK_MS,
        model: false,
        shown: &plan,
    };
    let first = first.map(Arc::new);
    let started =
        prepare::finish(parts, record, &begun, (&made.dirs, &made.who), launch, first, stop).await?;
    Ok((started, setup.into_iter().collect(), begun.tenant.runtime))
}
