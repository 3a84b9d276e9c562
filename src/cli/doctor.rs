//! `hotcell doctor`: whether this machine has all that jobs need, and what to do where it has not; with `--attack`,
//! whether a real cell keeps its promises.

use clap::Args;

use super::fail::{CliError, ExitCode};
use super::render::tables;
use super::{Connection, Context};
use crate::api::wire::AttackRequest;

/// Check all that jobs need here; --attack tries the walls of a real cell
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code 4 where the machine lacks something, 1 where a cell does not keep a promise: do not
run code there that you do not trust. The attack is an ordinary job of yours, without a model.")]
pub(super) struct DoctorArgs {
    /// Attack a real cell from inside: rights, kernel calls, files, network, secrets, forged results, floods
    #[arg(long)]
    pub(super) attack: bool,
    /// The policy whose walls are attacked [default: that of a job that names none]
    #[arg(short, long, value_name = "NAME")]
    pub(super) policy: Option<String>,
    /// Print the answer as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn doctor(args: &DoctorArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    let doctor = if args.attack || args.policy.is_some() {
        client.attack(&AttackRequest { policy: args.policy.clone() }).await?
    } else {
        client.doctor().await?
    };
    if args.json {
        context.out.json(&doctor)?;
    } else {
        context.out.print(&tables::doctor(context.out.paint, &doctor))?;
    }
    Ok(match doctor.status.as_str() {
        "ok" => ExitCode::Succeeded,
        "broken" => ExitCode::Failed,
        _ => ExitCode::Unavailable,
    })
}
