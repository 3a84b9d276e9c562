//! `hotcell gc`: removes what is older or more than the daemon keeps, now and not within the hour.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::{Text, gc as render};
use super::{Connection, Context};

/// Remove what is older or more than the daemon keeps (for admins)
#[derive(Debug, Args)]
#[command(after_help = "\
The daemon does the same each hour. [retention] in its configuration says what is kept, and for
how long. Audits and costs of jobs stay. The exit code is 1 where something could not be removed.")]
pub(super) struct GcArgs {
    /// Remove nothing, only tell what would go
    #[arg(long)]
    dry_run: bool,
    /// Print the answer as JSON, one object a line for each thousand
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn gc(args: &GcArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    let mut code = ExitCode::Succeeded;
    loop {
        let view = client.gc(args.dry_run).await?;
        let left = view.removals.iter().filter(|gone| gone.left.is_some()).count();
        if left > 0 {
            code = ExitCode::Failed;
        }
        if args.json {
            context.out.json(&view)?;
        } else {
            context.out.print(&render::table(context.out.paint, &view))?;
            context.out.print(&Text::new(context.out.paint).plain(&render::summary(&view)).end())?;
        }
        // What cannot be removed would be told of for ever.
        if !view.more || view.dry_run || left == view.removals.len() {
            return Ok(code);
        }
    }
}
