//! `hotcell wait`: waits until jobs are done, across restarts of the daemon, and says how each ended. It never changes
//! anything: whoever leaves leaves the jobs as they are.

use clap::Args;

use super::client::Client;
use super::fail::{CliError, ExitCode};
use super::follow::{Ended, Follow, Interrupts, OnInterrupt, Show};
use super::render::Text;
use super::{Connection, Context, find_job};
use crate::api::wire::JobView;

/// Wait until jobs are done
#[derive(Debug, Args)]
#[command(after_help = "\
Tells of each job in the order given. The exit code is that of all of them where it is the same, else 1.
    hotcell wait $(hotcell ls -q --state running)")]
pub(super) struct WaitArgs {
    /// Ids of jobs, or their beginnings
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<String>,
    /// Print each job as JSON, one a line
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn wait_for(args: &WaitArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    let (mut interrupts, mut codes) = (Interrupts::listen()?, Vec::new());
    for (n, name) in args.jobs.iter().enumerate() {
        match done(&client, (name, n == 0), context, &mut interrupts).await {
            Ok(None) => return Ok(ExitCode::Cancelled),
            Ok(Some(job)) => {
                codes.push(job.outcome().map_or(ExitCode::Failed, ExitCode::of));
                tell(&job, args.json, context)?;
                context.out.flush()?;
            }
            Err(error) if error.is_broken_pipe() => return Err(error),
            Err(error) => {
                context.out.error(&error);
                codes.push(error.exit_code());
            }
        }
    }
    Ok(ExitCode::of_all(&codes))
}

/// The job at its end; none where the user left before. Only for the first one the daemon must be there at once.
async fn done(
    client: &Client,
    (name, first): (&str, bool),
    context: &mut Context,
    interrupts: &mut Interrupts,
) -> Result<Option<JobView>, CliError> {
    let id = find_job(client, name).await?;
    let last_seq = match client.job(&id).await {
        Ok(job) if job.state.is_done() => return Ok(Some(job)),
        Ok(job) => job.last_seq,
        Err(error) if is_away(&error) && !first => 0,
        Err(error) => return Err(error),
    };
    let (on_interrupt, show) = (OnInterrupt::Leave, Show::Nothing);
    let mut follow =
        Follow { client, job: id.clone(), last_seq, follow: true, on_interrupt, cancel_wanted: false, show };
    loop {
        if follow.run(&mut context.out, interrupts).await? == Ended::Left {
            return Ok(None);
        }
        match client.job(&id).await {
            // It went away just now: following waits for it.
            Err(error) if is_away(&error) => {}
            job => return job.map(Some),
        }
    }
}

fn is_away(error: &CliError) -> bool {
    matches!(error, CliError::NoDaemon { .. } | CliError::ConnectionLost { .. })
}

fn tell(job: &JobView, json: bool, context: &mut Context) -> Result<(), CliError> {
    if json {
        return context.out.json(job);
    }
    let outcome = job.outcome().map_or("unknown", |outcome| outcome.label());
    context.out.print(&Text::new(context.out.paint).plain(&format!("{}  {outcome}", job.id)).end())
}
