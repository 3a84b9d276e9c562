//! `hotcell notify`: who is told of what happens to jobs, what waits for them, and a word to try them.

use clap::{Args, Subcommand};

use super::fail::{CliError, ExitCode};
use super::render::{Style, Text, one_line, tables};
use super::{Connection, Context};
use crate::api::notices::NoticeView;

/// Who is told of what happens to jobs (for admins)
#[derive(Debug, Args)]
#[command(after_help = "\
[[notify]] in the daemon's configuration says who is told of what: a webhook, or a command that
is run as the user whose job it is. What could not be told is tried again for some two days.")]
pub(super) struct NotifyArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// List the notices that wait, with the reason of the last failure
    Ls(Common),
    /// Tell each target a word, now and once (exit code 1 where one cannot be told)
    Test(Common),
}

#[derive(Debug, Args)]
struct Common {
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

impl NotifyArgs {
    pub(super) fn json(&self) -> bool {
        match &self.what {
            What::Ls(common) | What::Test(common) => common.json,
        }
    }
}

pub(super) async fn notify(args: &NotifyArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    match &args.what {
        What::Ls(common) => ls(common, context).await,
        What::Test(common) => test(common, context).await,
    }
}

async fn ls(common: &Common, context: &mut Context) -> Result<ExitCode, CliError> {
    let view = common.connection.client(&context.machine)?.notices().await?;
    if common.json {
        context.out.json(&view)?;
        return Ok(ExitCode::Succeeded);
    }
    let paint = context.out.paint;
    let words = match view.targets.as_slice() {
        [] => "nobody is told: the configuration has no [[notify]]".to_owned(),
        targets => format!("{} waiting for {}", view.waiting.len(), one_line(&targets.join(", "), 400)),
    };
    context.out.print(&Text::new(paint).plain(&words).end())?;
    let row = |notice: &NoticeView| {
        let error = notice.error.as_deref().unwrap_or_default();
        let tries = notice.tries.to_string();
        let cells = [&notice.target, &notice.kind, &notice.job, &tries, &notice.next_at, error];
        cells.map(|cell| (Style::Plain, one_line(cell, 100))).to_vec()
    };
    if !view.waiting.is_empty() {
        let rows: Vec<_> = view.waiting.iter().map(row).collect();
        let head = ["TARGET", "WHAT", "JOB", "TRIES", "NEXT", "LAST FAILURE"];
        context.out.print(&tables::table(paint, &head, &rows))?;
    }
    Ok(ExitCode::Succeeded)
}

async fn test(common: &Common, context: &mut Context) -> Result<ExitCode, CliError> {
    let told = common.connection.client(&context.machine)?.test_notices().await?;
    let failed = told.iter().any(|one| one.error.is_some());
    if common.json {
        context.out.json(&told)?;
    } else if told.is_empty() {
        let words = "nobody is told: the configuration has no [[notify]]";
        context.out.print(&Text::new(context.out.paint).plain(words).end())?;
    }
    for one in told.iter().filter(|_| !common.json) {
        let (style, words) = match &one.error {
            None => (Style::Good, "told".to_owned()),
            Some(error) => (Style::Bad, one_line(error, 400)),
        };
        let text = Text::new(context.out.paint).plain(&format!("{}  ", one_line(&one.target, 64)));
        context.out.print(&text.add(style, &words).end())?;
    }
    Ok(if failed { ExitCode::Failed } else { ExitCode::Succeeded })
}
