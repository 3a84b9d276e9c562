//! `hotcell retry`: the tasks of jobs that are over once more, as new jobs; does not wait for their ends.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::Text;
use super::{Connection, Context, for_each_job};

/// Submit the tasks of jobs that are over once more
#[derive(Debug, Args)]
pub(super) struct RetryArgs {
    /// Ids of jobs, or their beginnings
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<String>,
    /// Print each new job as JSON, one a line
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn retry(args: &RetryArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    for_each_job(context, &client, &args.jobs, async |context, id| {
        let job = client.retry(&id).await?;
        if args.json {
            return context.out.json(&job);
        }
        let line = format!("{}  {}, as {id} was", job.id, job.state.name());
        context.out.print(&Text::new(context.out.paint).plain(&line).end())
    })
    .await
}
