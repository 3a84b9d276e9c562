//! `hotcell unpark`: lets parked jobs go on before their time; does not wait for their ends.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::Text;
use super::{Connection, Context, for_each_job};

/// Let parked jobs go on now
#[derive(Debug, Args)]
pub(super) struct UnparkArgs {
    /// Ids of jobs, or their beginnings
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<String>,
    /// Print each job as JSON, one a line
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn unpark(args: &UnparkArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    for_each_job(context, &client, &args.jobs, async |context, id| {
        let job = client.unpark(&id).await?;
        if args.json {
            return context.out.json(&job);
        }
        context.out.print(&Text::new(context.out.paint).plain(&format!("{id}  {}", job.state.name())).end())
    })
    .await
}
