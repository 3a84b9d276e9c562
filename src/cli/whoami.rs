//! `hotcell whoami`: who the daemon says we are, and what we may do there.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::whoami;
use super::{Connection, Context};

/// Show who the daemon says you are, and what you may do
#[derive(Debug, Args)]
#[command(after_help = "\
The daemon asks the kernel who is at the other end of its socket. What you may do stands in
the [[access]] entries of its configuration; without any, whoever can open the socket may do
everything. The exit code is 2 where you are not listed.")]
pub(super) struct WhoamiArgs {
    /// Print the answer as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn whoami(args: &WhoamiArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let me = args.connection.client(&context.machine)?.whoami().await?;
    if args.json {
        context.out.json(&me)?;
    } else {
        context.out.print(&whoami::whoami(context.out.paint, &me))?;
    }
    Ok(if me.listed { ExitCode::Succeeded } else { ExitCode::Usage })
}
