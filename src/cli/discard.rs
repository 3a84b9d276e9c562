//! `hotcell discard`: marks change sets as not wanted. What is stored of them goes with their jobs (`hotcell rm`).

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::Text;
use super::{Connection, Context, for_each_job};

/// Mark what jobs changed as not wanted: it can be looked at, no longer applied
#[derive(Debug, Args)]
pub(super) struct DiscardArgs {
    /// Ids of jobs, or their beginnings
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<String>,
    /// Print each job as JSON, one a line
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn discard(args: &DiscardArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    for_each_job(context, &client, &args.jobs, async |context, id| {
        let job = client.discard(&id).await?;
        if args.json {
            return context.out.json(&job);
        }
        context.out.print(&Text::new(context.out.paint).plain(&format!("{id}  discarded")).end())
    })
    .await
}
