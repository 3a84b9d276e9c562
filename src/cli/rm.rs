//! `hotcell rm`: forgets jobs that are done, with their events. Their audit stays.

use clap::Args;
use serde_json::json;

use super::fail::{CliError, ExitCode};
use super::render::Text;
use super::{Connection, Context, for_each_job};

/// Delete jobs that are done, with their events
#[derive(Debug, Args)]
#[command(after_help = "What was decided in them stays: `hotcell audit` shows it.")]
pub(super) struct RmArgs {
    /// Ids of jobs, or their beginnings
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<String>,
    /// Print {"removed":ID} for each, one a line
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn rm(args: &RmArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    for_each_job(context, &client, &args.jobs, async |context, id| {
        client.remove(&id).await?;
        if args.json {
            return context.out.json(&json!({ "removed": id }));
        }
        context.out.print(&Text::new(context.out.paint).plain(&format!("{id}  removed")).end())
    })
    .await
}
