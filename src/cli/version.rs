//! `hotcell version`: what this executable is. `hotcell health` has the daemon's version.

use clap::Args;
use serde_json::json;

use super::Context;
use super::fail::{CliError, ExitCode};
use super::render::Text;

/// Print the version of this executable
#[derive(Debug, Args)]
pub(super) struct VersionArgs {
    /// Print it as JSON
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn version(args: &VersionArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let (version, arch) = (env!("CARGO_PKG_VERSION"), std::env::consts::ARCH);
    if args.json {
        context.out.json(&json!({ "version": version, "arch": arch }))?;
    } else {
        let text = format!("hotcell {version} ({arch})");
        context.out.print(&Text::new(context.out.paint).plain(&text).end())?;
    }
    Ok(ExitCode::Succeeded)
}
