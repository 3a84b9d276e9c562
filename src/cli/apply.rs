//! `hotcell apply`: a job's change set into the person's own files, all of it or nothing.

use std::path::{Path, PathBuf};

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::diff;
use super::{Connection, Context, find_job};
use crate::change::decision::ApplyRequest;

/// Apply what a job changed to your files
#[derive(Debug, Args)]
#[command(after_help = "\
All or nothing: where a file is not what it was when the job began, its name is told and nothing is written.
What is flagged (`hotcell diff --stat` says why) is left out until --include-flagged; what is refused always is.
With --branch your files stay as they are: the change becomes a commit on a new branch of your repository.
Where the job worked on a repository that was fetched, --to names the clone of yours that it is for.")]
pub(super) struct ApplyArgs {
    /// The job's id, or the beginning of it
    #[arg(value_name = "JOB")]
    job: String,
    /// Only paths that match; can be given several times
    #[arg(long, value_name = "GLOB")]
    only: Vec<String>,
    /// Apply what needs a word of yours as well
    #[arg(long)]
    include_flagged: bool,
    /// Merge with what you changed meanwhile
    #[arg(long = "3way")]
    three_way: bool,
    /// Only say whether it can be applied
    #[arg(long)]
    check: bool,
    /// Make a branch of this name instead of changing files
    #[arg(long, value_name = "NAME", conflicts_with_all = ["three_way", "check"])]
    branch: Option<String>,
    /// Apply to this directory instead of the one that the job worked on
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
    /// Print what was done as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn apply(args: &ApplyArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    let id = find_job(&client, &args.job).await?;
    let request = ApplyRequest {
        to: args.to.as_deref().map(real).transpose()?,
        only: args.only.clone(),
        include_flagged: args.include_flagged,
        three_way: args.three_way,
        check: args.check,
        branch: args.branch.clone(),
    };
    let answer = client.apply(&id, &request).await?;
    if args.json {
        context.out.json(&answer)?;
    } else {
        context.out.print(&diff::applied(context.out.paint, &answer))?;
    }
    Ok(ExitCode::Succeeded)
}

/// The path without links, as the daemon wants it.
pub(super) fn real(path: &Path) -> Result<PathBuf, CliError> {
    path.canonicalize()
        .map_err(|e| CliError::usage_hint(format!("{}: {e}", path.display()), "name a directory that exists"))
}
