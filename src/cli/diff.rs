//! `hotcell diff`: what a job changed, as git would show it. What stands in the change is the agent's: a terminal
//! gets nothing that it would act upon, and colours are ours.

use std::io::Write;
use std::process::{Command, Stdio};

use clap::Args;

use super::client::Client;
use super::fail::{CliError, ExitCode};
use super::render::{Text, diff};
use super::{Connection, Context, find_job};
use crate::change::decision::Form;
use crate::job::JobId;

/// Show what a job changed
#[derive(Debug, Args)]
#[command(after_help = "\
The patch is one that `git apply` takes. Entries that need a word of yours (--stat marks them) are in it too;
`hotcell apply` leaves them out until it gets --include-flagged.
On a terminal the output is coloured and goes through $PAGER (`less` where there is none; none with --no-pager).")]
pub(super) struct DiffArgs {
    /// The job's id, or the beginning of it
    #[arg(value_name = "JOB")]
    job: String,
    /// Files and how much of them changed, with what is flagged or refused
    #[arg(long, conflicts_with_all = ["name_only", "patch", "json"])]
    stat: bool,
    /// Paths only, one a line
    #[arg(long, conflicts_with_all = ["patch", "json"])]
    name_only: bool,
    /// The patch [default]
    #[arg(short, long, conflicts_with = "json")]
    patch: bool,
    /// The whole change set as JSON
    #[arg(long)]
    pub(super) json: bool,
    /// Only paths that match; can be given several times
    #[arg(long, value_name = "GLOB")]
    only: Vec<String>,
    /// Do not use a pager
    #[arg(long)]
    no_pager: bool,
    /// Let terminal escapes of the agent through
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn diff(args: &DiffArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    context.out.paint.raw = args.raw;
    let client = args.connection.client(&context.machine)?;
    let id = find_job(&client, &args.job).await?;
    if args.json {
        let changes = client.changes(&id).await?;
        context.out.json(&changes)?;
        return Ok(ExitCode::Succeeded);
    }
    let form = match (args.stat, args.name_only) {
        (true, _) => Form::Stat,
        (false, true) => Form::NameOnly,
        (false, false) => Form::Patch,
    };
    let (paged, only) = (!args.no_pager, args.only.clone());
    show(&client, &id, form, &only, paged, context).await?;
    Ok(ExitCode::Succeeded)
}

/// Shows a change set: to a terminal painted and paged, to a program as it is. With the figures stands what needs a
/// word of the person's, whoever reads them.
pub(super) async fn show(
    client: &Client,
    id: &JobId,
    form: Form,
    only: &[String],
    paged: bool,
    context: &mut Context,
) -> Result<(), CliError> {
    let bytes = client.diff(id, form, only).await?;
    if !context.out.is_terminal() && form != Form::Stat {
        return context.out.bytes(&bytes);
    }
    let text = String::from_utf8_lossy(&bytes);
    let mut shown = match form {
        Form::Patch => diff::patch(context.out.paint, &text),
        Form::Stat => diff::stat(context.out.paint, &text),
        Form::NameOnly => Text::new(context.out.paint).plain(&text),
    };
    if form != Form::NameOnly && only.is_empty() {
        shown = diff::marked(shown, &client.changes(id).await?.set);
    }
    if paged && form == Form::Patch && page(&shown, context) {
        return Ok(());
    }
    context.out.print(&shown)
}

/// Hands the text to a pager; false where there is none.
fn page(text: &Text, context: &Context) -> bool {
    let wanted = context.machine.var("HOTCELL_PAGER").or_else(|| context.machine.var("PAGER"));
    let wanted = wanted.unwrap_or("less").to_owned();
    if wanted.is_empty() || wanted == "cat" {
        return false;
    }
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &wanted]).stdin(Stdio::piped());
    // As git does: leave at once where all fits on a screen, show colours, leave the screen as it was.
    if context.machine.var("LESS").is_none() {
        command.env("LESS", "FRX");
    }
    let Ok(mut child) = command.spawn() else { return false };
    if let Some(mut stdin) = child.stdin.take() {
        // A pager that is left early reads no more.
        let _ = stdin.write_all(text.as_str().as_bytes());
    }
    child.wait().is_ok_and(|status| status.code() != Some(127))
}
