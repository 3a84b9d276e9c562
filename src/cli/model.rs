//! `hotcell model`: the scripted Messages API, for rehearsals without a model. Runs in this process.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Context;
use super::fail::{CliError, ExitCode};

/// Serve a scripted model, to rehearse jobs without cost
#[derive(Debug, Args)]
pub(super) struct ModelArgs {
    #[command(subcommand)]
    command: ModelCommand,
}

#[derive(Debug, Subcommand)]
enum ModelCommand {
    /// Answer the Messages API from a script until ended by Ctrl-C
    Serve(ModelServeArgs),
}

#[derive(Debug, Args)]
struct ModelServeArgs {
    /// The script, in TOML
    #[arg(long, value_name = "FILE")]
    script: PathBuf,
    /// TCP address; port 0 takes a free one, which is printed
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0", conflicts_with = "unix")]
    listen: SocketAddr,
    /// Unix socket instead
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// Write each request to this file, one JSON object a line
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

pub(super) fn model(args: &ModelArgs, _context: &mut Context) -> Result<ExitCode, CliError> {
    let ModelCommand::Serve(args) = &args.command;
    // LEAD: wire `crate::model` here with script, unix or listen, and record.
    let place = args.unix.as_ref().map_or_else(|| args.listen.to_string(), |path| path.display().to_string());
    let record = args.record.as_ref().map_or_else(|| "nowhere".to_owned(), |path| path.display().to_string());
    let script = args.script.display();
    Err(CliError::Local(anyhow::anyhow!(
        "serving {script} on {place} (recording to {record}) is not part of this build"
    )))
}
