//! `hotcell export`: a change set as a file for other tools.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::fail::{CliError, ExitCode};
use super::{Connection, Context, find_job};
use crate::change::decision::ExportFormat;

/// Write what a job changed as a patch, a tar archive or a git bundle
#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// The job's id, or the beginning of it
    #[arg(value_name = "JOB")]
    job: String,
    /// What to write
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "patch")]
    format: Format,
    /// Write it to this file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// What `git apply` takes
    Patch,
    /// The files as they are now, and the names of those that are gone
    Tar,
    /// A commit on the job's base, for `git fetch`
    Bundle,
}

pub(super) async fn export(args: &ExportArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let format = match args.format {
        Format::Patch => ExportFormat::Patch,
        Format::Tar => ExportFormat::Tar,
        Format::Bundle => ExportFormat::Bundle,
    };
    if args.output.is_none() && context.out.is_terminal() {
        return Err(CliError::usage_hint(
            "this is for a file or a pipe, not for a terminal",
            "name a file with -o; `hotcell diff` shows the change",
        ));
    }
    let client = args.connection.client(&context.machine)?;
    let id = find_job(&client, &args.job).await?;
    let bytes = client.export(&id, format).await?;
    match &args.output {
        Some(file) => {
            let cannot = |e: std::io::Error| {
                CliError::usage_hint(
                    format!("cannot write {}: {e}", file.display()),
                    "name another file with -o",
                )
            };
            std::fs::write(file, &bytes).map_err(cannot)?;
        }
        None => context.out.bytes(&bytes)?,
    }
    Ok(ExitCode::Succeeded)
}
