//! `hotcell agent`: versions of the agent, side by side. Runs in this process, on the state directory.

use clap::{Args, Subcommand};

use super::Context;
use super::fail::{CliError, ExitCode};
use super::serve::ConfigFlags;
use crate::config::Config;

/// Install and choose versions of the agent
#[derive(Debug, Args)]
pub(super) struct AgentArgs {
    #[command(subcommand)]
    command: AgentCommand,
}

#[derive(Debug, Subcommand)]
enum AgentCommand {
    /// Fetch a version and test that hotcell can drive it
    Install {
        /// The version, e.g. 2.1.197
        #[arg(value_name = "VERSION")]
        version: String,
        /// Print {"version","path"} at the end
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags,
    },
    /// List the versions that are here
    Ls {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags,
    },
    /// Make a version the one that jobs get which name none
    Use {
        /// The version
        #[arg(value_name = "VERSION")]
        version: String,
        /// Print {"version"} at the end
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags,
    },
}

impl AgentArgs {
    pub(super) fn json(&self) -> bool {
        match &self.command {
            AgentCommand::Install { json, .. }
            | AgentCommand::Ls { json, .. }
            | AgentCommand::Use { json, .. } => *json,
        }
    }
}

pub(super) fn agent(args: &AgentArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let (AgentCommand::Install { config, .. }
    | AgentCommand::Ls { config, .. }
    | AgentCommand::Use { config, .. }) = &args.command;
    let config = Config::load(&config.flags(), &context.machine)?;
    let dir = config.state_dir.display();
    // LEAD: wire `crate::agent_bundle` here.
    let what = match &args.command {
        AgentCommand::Install { version, .. } => format!("installing {version} into {dir}"),
        AgentCommand::Ls { .. } => format!("listing the versions in {dir}"),
        AgentCommand::Use { version, .. } => format!("choosing {version} in {dir}"),
    };
    Err(CliError::Local(anyhow::anyhow!("{what} is not part of this build")))
}
