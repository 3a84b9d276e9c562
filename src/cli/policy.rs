//! `hotcell policy`: the policies that a daemon with this configuration has. Reads files only; a job's own
//! copy of its policy is in its row.

mod check;
mod explain;

use clap::{Args, Subcommand};
use serde_json::json;

use super::Context;
use super::fail::{CliError, ExitCode};
use super::render::{Text, tables};
use super::serve::{Concerns, ConfigFlags};
use crate::config::{Config, PolicyOrigin, PolicySource, policy_sources};

/// Show, check and explain policies
#[derive(Debug, Args)]
pub(super) struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// List them
    Ls {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags<PolicyDirs>,
    },
    /// Print one
    Show {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags<PolicyDirs>,
    },
    /// Check a policy file: errors name file, line and key
    Check(check::CheckArgs),
    /// Say which rule decides a question, and why; exit code 0 for yes, 1 for no
    Explain(explain::ExplainArgs),
}

/// Which settings say what policies there are.
#[derive(Debug, Clone)]
struct PolicyDirs;

impl Concerns for PolicyDirs {
    fn has(key: &str) -> bool {
        key == "policy_dirs"
    }
}

impl PolicyArgs {
    pub(super) fn json(&self) -> bool {
        match &self.command {
            PolicyCommand::Ls { json, .. } | PolicyCommand::Show { json, .. } => *json,
            PolicyCommand::Check(args) => args.json,
            PolicyCommand::Explain(args) => args.json,
        }
    }
}

pub(super) fn policy(args: &PolicyArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let (json, config) = match &args.command {
        PolicyCommand::Check(args) => return check::check(args, context),
        PolicyCommand::Explain(args) => return explain::explain(args, context),
        PolicyCommand::Ls { json, config } | PolicyCommand::Show { json, config, .. } => (*json, config),
    };
    let config = Config::load(&config.flags(), &context.machine)?;
    let all = policy_sources(&config.policy_dirs)?;
    let PolicyCommand::Show { name, .. } = &args.command else {
        if json {
            context.out.json(&all.iter().map(|(name, source)| as_json(name, source)).collect::<Vec<_>>())?;
        } else {
            context.out.print(&tables::policies(context.out.paint, all.iter()))?;
        }
        return Ok(ExitCode::Succeeded);
    };
    let source = all.get(name).ok_or_else(|| {
        let names = all.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        CliError::usage_hint(format!("there is no policy {name}"), format!("there are: {names}"))
    })?;
    if json {
        context.out.json(&as_json(name, source))?;
    } else {
        context.out.print(&Text::new(context.out.paint).plain(&source.text))?;
    }
    Ok(ExitCode::Succeeded)
}

fn as_json(name: &str, source: &PolicySource) -> serde_json::Value {
    let file = match &source.origin {
        PolicyOrigin::BuiltIn => None,
        PolicyOrigin::File(path) => Some(path),
    };
    json!({ "name": name, "hash": source.policy.hash, "file": file, "policy": source.policy })
}
