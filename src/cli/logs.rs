//! `hotcell logs`: a job's events, as `run` shows them, from any number on.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::follow::{Ended, Follow, Interrupts, OnInterrupt, Show};
use super::render::stream::StreamView;
use super::{Connection, Context, find_job};

/// Show what a job did, or does
#[derive(Debug, Args)]
#[command(after_help = "\
With -f the exit code is the job's own, as with `run`; Ctrl-C leaves and the job goes on.
A connection that is lost is made again, with nothing shown twice or left out.")]
pub(super) struct LogsArgs {
    /// The job's id, or the beginning of it
    #[arg(value_name = "JOB")]
    job: String,
    /// Wait for more until the job is done
    #[arg(short, long)]
    follow: bool,
    /// Begin with the event of this number
    #[arg(long, value_name = "SEQ", default_value_t = 1)]
    from: u64,
    /// Print events as JSON, one a line
    #[arg(long)]
    pub(super) json: bool,
    /// Let terminal escapes of the agent through
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn logs(args: &LogsArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    context.out.paint.raw = args.raw;
    let client = args.connection.client(&context.machine)?;
    let id = find_job(&client, &args.job).await?;
    let job = client.job(&id).await?;
    let live = args.follow && context.out.is_live();
    let view = || Box::new(StreamView::new(&job, context.out.paint, !live));
    let show = if args.json { Show::Json } else { Show::Readable(view()) };
    let mut follow = Follow {
        client: &client,
        job: id,
        last_seq: args.from.saturating_sub(1),
        follow: args.follow,
        on_interrupt: OnInterrupt::Leave,
        cancel_wanted: false,
        show,
    };
    let mut interrupts = Interrupts::listen()?;
    if follow.run(&mut context.out, &mut interrupts).await? == Ended::Left {
        return Ok(ExitCode::Cancelled);
    }
    if !args.follow {
        return Ok(ExitCode::Succeeded);
    }
    let job = client.job(&follow.job).await?;
    Ok(job.outcome().map_or(ExitCode::Succeeded, ExitCode::of))
}
