//! `hotcell doctor`: whether this machine has all that jobs need, and what to do where it has not.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::tables;
use super::{Connection, Context};

/// Check all that jobs need here, and say what to do (exit code 4 where something is missing)
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Print the answer as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn doctor(args: &DoctorArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let doctor = args.connection.client(&context.machine)?.doctor().await?;
    if args.json {
        context.out.json(&doctor)?;
    } else {
        context.out.print(&tables::doctor(context.out.paint, &doctor))?;
    }
    Ok(if doctor.status == "ok" { ExitCode::Succeeded } else { ExitCode::Unavailable })
}
