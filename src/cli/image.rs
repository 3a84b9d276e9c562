//! `hotcell image`: the image of the cells. Runs in this process, against the engine.

use clap::{Args, Subcommand};

use super::Context;
use super::fail::{CliError, ExitCode};
use super::serve::ConfigFlags;
use crate::config::Config;

/// Build the image of the cells
#[derive(Debug, Args)]
pub(super) struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Build the default image through the engine, where it is not there yet
    Build {
        /// Build it again even where it is there
        #[arg(long)]
        force: bool,
        /// Print {"image","digest"} at the end
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags,
    },
}

impl ImageArgs {
    pub(super) fn json(&self) -> bool {
        let ImageCommand::Build { json, .. } = &self.command;
        *json
    }
}

pub(super) fn image(args: &ImageArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let ImageCommand::Build { force, json, config } = &args.command;
    let config = Config::load(&config.flags(), &context.machine)?;
    build(&config, *force, *json, context)
}

// LEAD: wire `crate::cell_image` here. Progress: `context.out.status(line)` on a terminal, `notice(line)`
// otherwise; errors: `CliError::Away` where the engine or the network is away (exit 4), else `Local` (exit 1).
fn build(config: &Config, _force: bool, _json: bool, _context: &mut Context) -> Result<ExitCode, CliError> {
    let image = &config.defaults.image;
    Err(CliError::Local(anyhow::anyhow!("building {image} is not part of this build")))
}
