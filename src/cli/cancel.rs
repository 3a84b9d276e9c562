//! `hotcell cancel`: asks for jobs to be stopped; does not wait for their ends.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::Text;
use super::{Connection, Context, for_each_job};

/// Cancel jobs
#[derive(Debug, Args)]
pub(super) struct CancelArgs {
    /// Ids of jobs, or their beginnings
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<String>,
    /// Print each job as JSON, one a line
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn cancel(args: &CancelArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    for_each_job(context, &client, &args.jobs, async |context, id| {
        let job = client.cancel(&id).await?;
        if args.json {
            return context.out.json(&job);
        }
        let state = match job.outcome() {
            Some(outcome) => format!("done ({})", outcome.label()),
            None => job.state.name().to_owned(),
        };
        context.out.print(&Text::new(context.out.paint).plain(&format!("{id}  {state}")).end())
    })
    .await
}
