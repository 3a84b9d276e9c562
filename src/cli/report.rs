//! `hotcell report`: the file that a job's policy keeps. To a terminal it goes as all that an agent says: with
//! nothing in it that a terminal would act upon.

use std::path::PathBuf;

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::Text;
use super::{Connection, Context, find_job};

/// Print the report that a job left
#[derive(Debug, Args)]
#[command(after_help = "\
Which file is a job's report says its policy ([output] report).
To a file or a pipe it goes as it is; a terminal gets it without terminal escapes.")]
pub(super) struct ReportArgs {
    /// The job's id, or the beginning of it
    #[arg(value_name = "JOB")]
    job: String,
    /// Write it to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Let terminal escapes of the agent through
    #[arg(long, conflicts_with = "output")]
    raw: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn report(args: &ReportArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    let id = find_job(&client, &args.job).await?;
    let bytes = client.report(&id).await?;
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
        None if context.out.is_terminal() && !args.raw => {
            let text = String::from_utf8_lossy(&bytes);
            let mut shown = Text::new(context.out.paint).plain(&text);
            if !text.ends_with('\n') {
                shown = shown.end();
            }
            context.out.print(&shown)?;
        }
        None => context.out.bytes(&bytes)?,
    }
    Ok(ExitCode::Succeeded)
}
