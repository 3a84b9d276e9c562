//! `hotcell checkout`: the workspace as the job left it, in a directory of its own.

use std::path::PathBuf;

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::diff;
use super::{Connection, Context, find_job};
use crate::change::decision::CheckoutRequest;

/// Write the workspace as the job left it to a new directory
#[derive(Debug, Args)]
#[command(after_help = "\
The directory must not exist yet, or be empty. What is flagged is in it; what is refused is not.")]
pub(super) struct CheckoutArgs {
    /// The job's id, or the beginning of it
    #[arg(value_name = "JOB")]
    job: String,
    /// Where to
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Print what was done as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn checkout(args: &CheckoutArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    let id = find_job(&client, &args.job).await?;
    let absolute = std::path::absolute(&args.dir).map_err(|e| CliError::usage(e.to_string()))?;
    // What is there of the way must be named without links; the last part may be new.
    let dir = match (absolute.canonicalize(), absolute.parent(), absolute.file_name()) {
        (Ok(dir), _, _) => dir,
        (Err(_), Some(parent), Some(name)) => super::apply::real(parent)?.join(name),
        (Err(e), _, _) => return Err(CliError::usage(format!("{}: {e}", args.dir.display()))),
    };
    let answer = client.checkout(&id, &CheckoutRequest { dir }).await?;
    if args.json {
        context.out.json(&answer)?;
    } else {
        context.out.print(&diff::checked_out(context.out.paint, &answer))?;
    }
    Ok(ExitCode::Succeeded)
}
