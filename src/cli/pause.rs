//! `hotcell pause` and `hotcell resume`: hold all starts of the daemon, or let them go.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::Text;
use super::{Connection, Context};

/// Start no more jobs until `resume` (for admins and the user the daemon runs as)
#[derive(Debug, Args)]
#[command(after_help = "\
Running jobs go on and new ones are accepted and wait. It holds over a restart of the daemon.")]
pub(super) struct PauseArgs {
    /// Print the answer as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

/// Start jobs again after `pause`
#[derive(Debug, Args)]
pub(super) struct ResumeArgs {
    /// Print the answer as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn pause(args: &PauseArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    hold(&args.connection, args.json, "pause", context).await
}

pub(super) async fn resume(args: &ResumeArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    hold(&args.connection, args.json, "resume", context).await
}

async fn hold(
    connection: &Connection,
    json: bool,
    what: &str,
    context: &mut Context,
) -> Result<ExitCode, CliError> {
    let answer = connection.client(&context.machine)?.hold(what).await?;
    if json {
        context.out.json(&answer)?;
    } else {
        let words = answer.paused.map_or_else(|| "jobs start".to_owned(), |paused| paused.words());
        context.out.print(&Text::new(context.out.paint).plain(&words).end())?;
    }
    Ok(ExitCode::Succeeded)
}
