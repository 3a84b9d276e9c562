//! `hotcell cost`: what was spent, on what, as a table, as CSV (RFC 4180) or as JSON. The figures are the
//! daemon's; nothing is added up here.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::cost as render;
use super::{Connection, Context};
use crate::api::cost::BY;
use crate::money::Calendar;

/// Show what was spent, on what
#[derive(Debug, Args)]
#[command(after_help = "\
A date means the whole day, in the daemon's time zone; a time is exact, and --until ends before it.
Jobs that were removed are in the sums. Who is no admin sees their own spending.")]
pub(super) struct CostArgs {
    /// From this date or time on, e.g. 2026-01-31 or 2026-01-31T08:00:00Z
    #[arg(long, value_name = "DATE", value_parser = moment)]
    since: Option<String>,
    /// Until this date or time
    #[arg(long, value_name = "DATE", value_parser = moment)]
    until: Option<String>,
    /// What to add up by
    #[arg(long, value_name = "WHAT", value_parser = BY, default_value = "model")]
    by: String,
    /// The label whose values are added up, with --by label [default: all labels, so that rows overlap]
    #[arg(long, value_name = "KEY")]
    label: Option<String>,
    /// Print CSV
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

/// Checked here so that the flag is named; which day it is the daemon knows, whose time zone counts.
fn moment(text: &str) -> Result<String, String> {
    let utc = Calendar::new(Some("UTC")).map_err(|error| error.to_string())?;
    utc.moment_ms(text, false).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

pub(super) async fn cost(args: &CostArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    if args.label.is_some() && args.by != "label" {
        return Err(CliError::usage("--label names the label of --by label"));
    }
    let client = args.connection.client(&context.machine)?;
    let query = [("since", &args.since), ("until", &args.until), ("label", &args.label)];
    let query = query.into_iter().filter_map(|(key, value)| Some((key, value.as_deref()?)));
    let report = client.cost(query.chain([("by", args.by.as_str())])).await?;
    if args.json {
        context.out.json(&report)?;
    } else if args.csv {
        context.out.print(&render::csv(context.out.paint, &report))?;
    } else {
        context.out.print(&render::table(context.out.paint, &report))?;
    }
    if report.truncated {
        context.out.notice("only the dearest rows are shown; the total counts all")?;
    }
    Ok(ExitCode::Succeeded)
}
