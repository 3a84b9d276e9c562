//! `hotcell cache ls | rm`: what the daemon keeps of package hosts for later jobs.

use clap::{Args, Subcommand};

use super::fail::{CliError, ExitCode};
use super::render::{Text, cache as render};
use super::{Connection, Context};

/// Show or clear the cache of packages
#[derive(Debug, Args)]
pub(super) struct CacheArgs {
    #[command(subcommand)]
    command: CacheCommand,
}

#[derive(Debug, Subcommand)]
enum CacheCommand {
    Ls(LsArgs),
    Rm(RmArgs),
}

/// Show what is kept: for admins each file, for others sizes by policy
#[derive(Debug, Args)]
struct LsArgs {
    /// Only of this policy
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

/// Remove what is kept; jobs fetch it anew (for admins)
#[derive(Debug, Args)]
struct RmArgs {
    /// Only what was fetched from URLs that begin so, e.g. https://registry.npmjs.org/left-pad
    #[arg(value_name = "URL-PREFIX", required_unless_present_any = ["policy", "all"])]
    prefix: Option<String>,
    /// Only of this policy
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// All of it
    #[arg(long, conflicts_with_all = ["policy", "prefix"])]
    all: bool,
    /// Print what is gone as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

impl CacheArgs {
    /// Whether errors are to be JSON too.
    pub(super) fn json(&self) -> bool {
        match &self.command {
            CacheCommand::Ls(args) => args.json,
            CacheCommand::Rm(args) => args.json,
        }
    }
}

pub(super) async fn cache(args: &CacheArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    match &args.command {
        CacheCommand::Ls(args) => ls(args, context).await,
        CacheCommand::Rm(args) => rm(args, context).await,
    }
}

async fn ls(args: &LsArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    let query: Vec<(&str, &str)> = args.policy.iter().map(|name| ("policy", name.as_str())).collect();
    let view = client.cache(&query).await?;
    if args.json {
        context.out.json(&view)?;
    } else {
        context.out.print(&render::table(context.out.paint, &view, crate::clock::wall_ms()))?;
        if view.truncated {
            context.out.notice("only those that were used last are shown")?;
        }
    }
    Ok(ExitCode::Succeeded)
}

async fn rm(args: &RmArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    let named = [("policy", args.policy.as_deref()), ("prefix", args.prefix.as_deref())];
    let mut query: Vec<(&str, &str)> =
        named.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
    if args.all {
        query.push(("all", "1"));
    }
    let removed = client.remove_cache(&query).await?;
    if args.json {
        context.out.json(&removed)?;
    } else {
        context.out.print(&Text::new(context.out.paint).plain(&render::removed(&removed)).end())?;
    }
    Ok(ExitCode::Succeeded)
}
