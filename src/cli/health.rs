//! `hotcell health`: whether the daemon and its engine work.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::tables;
use super::{Connection, Context};

/// Say whether the daemon and its engine work (exit code 4 where not)
#[derive(Debug, Args)]
pub(super) struct HealthArgs {
    /// Print the answer as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn health(args: &HealthArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let health = args.connection.client(&context.machine)?.health().await?;
    if args.json {
        context.out.json(&health)?;
    } else {
        context.out.print(&tables::health(context.out.paint, &health))?;
    }
    Ok(if health.status == "ok" { ExitCode::Succeeded } else { ExitCode::Unavailable })
}
