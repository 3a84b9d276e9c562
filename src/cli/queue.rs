//! `hotcell queue`: what waits, and for what.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::queue;
use super::{Connection, Context};

/// Show what waits, in the order in which it would start
#[derive(Debug, Args)]
#[command(after_help = "\
The order holds as long as nothing is submitted and running jobs end in the order of their
ids. Others' jobs are shown to admins; everybody learns how many there are.")]
pub(super) struct QueueArgs {
    /// Print the answer as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn queue(args: &QueueArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let answer = args.connection.client(&context.machine)?.queue().await?;
    if args.json {
        context.out.json(&answer)?;
    } else {
        context.out.print(&queue::queue(context.out.paint, &answer))?;
    }
    Ok(ExitCode::Succeeded)
}
