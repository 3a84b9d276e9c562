//! `hotcell ls`: jobs, newest first.

use clap::Args;

use super::client::Filter;
use super::fail::{CliError, ExitCode};
use super::render::{Text, tables};
use super::{Connection, Context, args};
use crate::api::wire::JobList;
use crate::job::State;

/// List jobs, newest first
#[derive(Debug, Args)]
pub(super) struct LsArgs {
    /// Only jobs in this state
    #[arg(short, long, value_parser = State::NAMES)]
    state: Option<String>,
    /// Only jobs with this label; can be given several times
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = args::pair)]
    label: Vec<(String, String)>,
    /// Only jobs under this policy
    #[arg(short, long, value_name = "NAME")]
    policy: Option<String>,
    /// At most this many
    #[arg(short = 'n', long, value_name = "N", default_value_t = 50, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    /// Jobs of all users (for admins)
    #[arg(short, long)]
    all_users: bool,
    /// Print ids alone, one a line
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    /// Print {"jobs":[…]}
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn ls(args: &LsArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    let filter = Filter {
        state: args.state.clone(),
        labels: args.label.iter().map(|(key, value)| format!("{key}={value}")).collect(),
        policy: args.policy.clone(),
        all_users: args.all_users,
    };
    let (jobs, more) = client.list(&filter, args.limit as usize).await?;
    if args.json {
        context.out.json(&JobList { jobs, next_cursor: None })?;
        return Ok(ExitCode::Succeeded);
    }
    let paint = context.out.paint;
    let table = match args.quiet {
        true => jobs.iter().fold(Text::new(paint), |text, job| text.plain(job.id.as_str()).end()),
        false => tables::jobs(paint, &jobs, crate::clock::wall_ms(), args.all_users),
    };
    context.out.print(&table)?;
    if more {
        context.out.notice(&format!("there are more than {}; -n shows more", args.limit))?;
    }
    Ok(ExitCode::Succeeded)
}
