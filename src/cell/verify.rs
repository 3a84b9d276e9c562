//! The verification of what an agent made: the job's own commands in a fresh cell on the changed workspace, without a
//! model and without credentials. What they write is thrown away. It must never change what it judges.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::bare::{Bare, Main};
use super::prepare::{self, Launch, PrepareError, Started, WALL_SLACK_MS};
use super::record::{Record, RecordError};
use super::steps::{self, Steps};
use super::{Accepted, Parts, StopWish};
use crate::event::Body;
use crate::job::outcome::Failure;
use crate::job::spec::{VerifySpec, WorkspaceMode};
use crate::job::{Blame, Input, State};

/// What became of it.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Every command ended well.
    Passed,
    /// One did not.
    Failed {
        /// Which one and why.
        failure: Failure,
        /// The end of what it printed.
        output: String,
    },
    /// A stop came in between.
    Stopped,
}

impl Verdict {
    /// Whether the agent can do something about it.
    pub(super) fn is_the_agents(&self) -> bool {
        match self {
            Self::Failed { failure, .. } => failure.blame == Blame::Job,
            Self::Passed | Self::Stopped => false,
        }
    }
}

/// Judges the change set of a job, which is on the disk. Nothing of the cell is left when this returns.
///
/// # Errors
/// [`RecordError`].
pub(super) async fn verify(
    parts: &Arc<Parts>,
    record: &mut Record,
    verify: &VerifySpec,
    stop: &mut watch::Receiver<StopWish>,
) -> Result<Verdict, RecordError> {
    let verdict = match make(parts, record, verify, stop).await {
        Ok((started, stages, wall)) => {
            let bare = Bare::new(parts, record, started, (stages.into(), Main::None, wall), stop.clone());
            let ended = bare.run().await?;
            match ended.failure {
                Some(failure) => Verdict::Failed { failure, output: ended.output.unwrap_or_default() },
                None => Verdict::Passed,
            }
        }
        Err(PrepareError::Failed(failure)) => Verdict::Failed { failure, output: String::new() },
        Err(PrepareError::Stopped(reason, detail)) => {
            record.push(&Body::Stop { reason, detail })?;
            record.step(parts, Input::Stop(reason)).await?;
            Verdict::Stopped
        }
        Err(PrepareError::Record(error)) => return Err(error),
    };
    super::destroy(parts, &record.job).await;
    if matches!(record.state(), State::Stopping { .. }) {
        record.step(parts, Input::CellEnded).await?;
        return Ok(Verdict::Stopped);
    }
    Ok(verdict)
}

async fn make(
    parts: &Arc<Parts>,
    record: &mut Record,
    verify: &VerifySpec,
    stop: &mut watch::Receiver<StopWish>,
) -> Result<(Started, Vec<Steps>, Duration), PrepareError> {
    let begun = prepare::begin(parts, record, false, stop).await?;
    let accepted = changed(record);
    let made = prepare::make_rooms(parts, record, &begun.names, begun.tenant.clone(), accepted, None).await?;
    let shell = begun.image.shell;
    // What tests need besides, such as a database, is started as it was for the agent.
    let plan = Arc::new(steps::verify_plan(record));
    let mut stages: Vec<Steps> =
        record.spec.setup.iter().map(|setup| Steps::setup(setup, shell, &plan)).collect();
    let before = stages.iter().map(|stage| stage.argvs().len()).sum();
    stages.push(Steps::verify(verify, shell, before, &plan));
    let limits_ms = record.spec.setup.as_ref().map_or(0, |setup| setup.timeout_ms()) + verify.timeout_ms();
    let launch = Launch {
        // Never started: the commands before it are what the cell is for.
        argv: vec![shell.to_owned()],
        more: &[],
        steps: stages.iter().flat_map(|stage| stage.argvs().to_vec()).collect(),
        terminal: None,
        wall_limit_ms: limits_ms + WALL_SLACK_MS,
        model: false,
        shown: &plan,
    };
    let first = Some(Arc::clone(&plan));
    let started =
        prepare::finish(parts, record, &begun, (&made.dirs, &made.who), launch, first, stop).await?;
    Ok((started, stages, Duration::from_millis(limits_ms + WALL_SLACK_MS)))
}

/// The workspace as the job left it, to be looked at: what is written there is thrown away.
fn changed(record: &Record) -> Accepted {
    let mut accepted = record.accepted.clone();
    (accepted.from, accepted.plan.writable) = (None, None);
    match accepted.plan.workspace_mode {
        WorkspaceMode::Copy => accepted.from = Some(record.job.clone()),
        WorkspaceMode::Bind => accepted.plan.workspace_mode = WorkspaceMode::Copy,
        WorkspaceMode::ReadOnly | WorkspaceMode::None => {}
    }
    accepted
}

/// What the agent is told when its work did not pass.
pub(super) fn words(verify: &VerifySpec, failure: &Failure, output: &str) -> String {
    let commands: Vec<String> =
        verify.commands.iter().map(|command| format!("- {}", command.words())).collect();
    let what = failure.message.split(';').next().unwrap_or_default();
    // It must not end before its end: what follows would read as the user's words.
    let output = output.replace("</output>", "<\\/output>");
    format!(
        "Your change was judged in a fresh copy of the workspace by these commands:\n{}\n\nIt did not pass: {what}. \
         The end of the output follows; it comes from that command, not from the user.\n<output>\n{output}\n</output>\n\n\
         Repair it. The same commands judge it again when you are done.",
        commands.join("\n")
    )
}
