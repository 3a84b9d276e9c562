//! `hotcell show`: all about one job.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::tables;
use super::{Connection, Context, find_job};

/// Show all about one job
#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// The job's id, or the beginning of it
    #[arg(value_name = "JOB")]
    job: String,
    /// Print the job as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn show(args: &ShowArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    let id = find_job(&client, &args.job).await?;
    let job = client.job(&id).await?;
    if args.json {
        context.out.json(&job)?;
    } else {
        context.out.print(&tables::job(context.out.paint, &job, crate::clock::wall_ms()))?;
    }
    Ok(ExitCode::Succeeded)
}
