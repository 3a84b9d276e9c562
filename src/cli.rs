//! The command line: one file per command, one table of exit codes ([`ExitCode`]), one place that prints
//! (`render.rs`). Commands talk to a daemon through `client.rs` only; `serve`, `image`, `agent`, `model` and
//! `policy` run in this process. A client holds nothing that a job needs: when it dies, the job goes on.

mod agent;
mod apply;
mod args;
mod audit;
mod cache;
mod cancel;
mod checkout;
mod client;
mod completions;
mod cost;
mod diff;
mod discard;
mod doctor;
mod drain;
mod exec;
mod export;
mod fail;
mod follow;
mod gc;
mod health;
mod image;
mod install;
mod logs;
mod ls;
mod model;
mod pause;
mod policy;
mod queue;
mod render;
mod report;
mod retry;
mod rm;
mod run;
mod schema;
mod serve;
mod show;
mod support;
mod unpark;
mod version;
mod wait_for;
mod whoami;

use std::ffi::OsString;
use std::future::Future;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{Flags, Machine, client_socket};
use crate::job::JobId;
use client::{Client, Filter};
pub use fail::ExitCode;
use fail::{CliError, EXIT_CODES_HELP};
use render::Out;

/// Runs coding agents in disposable, locked-down containers.
#[derive(Debug, Parser)]
#[command(name = "hotcell", version, after_help = EXIT_CODES_HELP, max_term_width = 110)]
#[command(propagate_version = false, disable_help_subcommand = true, subcommand_required = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Exec(Box<exec::ExecArgs>),
    Shell(Box<exec::ShellArgs>),
    Ls(ls::LsArgs),
    Show(show::ShowArgs),
    Logs(logs::LogsArgs),
    Audit(audit::AuditArgs),
    Report(report::ReportArgs),
    Support(support::SupportArgs),
    Diff(diff::DiffArgs),
    Apply(apply::ApplyArgs),
    Checkout(checkout::CheckoutArgs),
    Export(export::ExportArgs),
    Discard(discard::DiscardArgs),
    Wait(wait_for::WaitArgs),
    Cancel(cancel::CancelArgs),
    Unpark(unpark::UnparkArgs),
    Retry(retry::RetryArgs),
    Queue(queue::QueueArgs),
    Rm(rm::RmArgs),
    Cost(cost::CostArgs),
    Cache(cache::CacheArgs),
    Gc(gc::GcArgs),
    Serve(serve::ServeArgs),
    Pause(pause::PauseArgs),
    Resume(pause::ResumeArgs),
    Drain(drain::DrainArgs),
    Detach(drain::DetachArgs),
    Image(image::ImageArgs),
    Agent(agent::AgentArgs),
    Install(install::InstallArgs),
    Model(model::ModelArgs),
    Policy(policy::PolicyArgs),
    Whoami(whoami::WhoamiArgs),
    Health(health::HealthArgs),
    Doctor(doctor::DoctorArgs),
    Schema(schema::SchemaArgs),
    Completions(completions::CompletionsArgs),
    Version(version::VersionArgs),
}

/// Which daemon to talk to.
#[derive(Debug, Clone, Default, Args)]
struct Connection {
    /// The daemon's socket [env: HOTCELL_SOCKET; default: as configured, else the usual places]
    #[arg(long, value_name = "PATH", help_heading = "Daemon")]
    socket: Option<PathBuf>,
    /// The configuration that names the socket [env: HOTCELL_CONFIG]
    #[arg(long, value_name = "FILE", help_heading = "Daemon")]
    config: Option<PathBuf>,
}

impl Connection {
    fn client(&self, machine: &Machine) -> Result<Client, CliError> {
        let socket = self.socket.as_ref().map(|path| ("socket", path.to_string_lossy().into_owned()));
        let flags = Flags { config: self.config.clone(), values: socket.into_iter().collect() };
        Ok(Client::new(client_socket(&flags, machine)?))
    }
}

/// What a command works with.
struct Context {
    out: Out,
    machine: Machine,
}

/// Runs one command line and answers the process's exit code.
pub fn main(args: impl Iterator<Item = OsString>) -> std::process::ExitCode {
    let args: Vec<OsString> = args.collect();
    let machine = Machine::current();
    let out = Out::stdio(&machine);
    let mut context = Context { out, machine };
    run_args(&args, &mut context).into()
}

fn run_args(args: &[OsString], context: &mut Context) -> ExitCode {
    match Cli::try_parse_from(args) {
        Ok(cli) => execute(cli.command, context),
        Err(error) if render::clap_says(&error) => {
            if error.use_stderr() {
                ExitCode::Usage
            } else {
                ExitCode::Succeeded
            }
        }
        Err(error) => {
            context.out.json_errors(args.iter().any(|arg| arg == "--json"));
            context.out.error(&misuse(&error));
            ExitCode::Usage
        }
    }
}

/// What clap found wrong, in the shape of all errors.
fn misuse(error: &clap::Error) -> CliError {
    let text = error.to_string();
    let mut parts = text.trim().split("\n\n").filter(|part| !part.starts_with("For more information"));
    let what = parts.next().unwrap_or("").trim_start_matches("error: ").trim();
    let what = what.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let hints: Vec<&str> = parts.map(str::trim).chain(["--help says more"]).collect();
    CliError::usage_hint(what, hints.join("; "))
}

fn execute(command: Command, context: &mut Context) -> ExitCode {
    context.out.json_errors(command.json());
    let result = dispatch(command, context);
    context.out.end_status();
    // Output that cannot be written is an error of the command too.
    match result.and_then(|code| context.out.flush().map(|()| code)) {
        Ok(code) => code,
        Err(error) => {
            context.out.error(&error);
            error.exit_code()
        }
    }
}

fn dispatch(command: Command, context: &mut Context) -> Result<ExitCode, CliError> {
    match command {
        Command::Run(args) => run::run(*args, context),
        Command::Exec(args) => exec::exec(*args, context),
        Command::Shell(args) => exec::shell(*args, context),
        Command::Ls(args) => wait(ls::ls(&args, context)),
        Command::Show(args) => wait(show::show(&args, context)),
        Command::Logs(args) => wait(logs::logs(&args, context)),
        Command::Audit(args) => wait(audit::audit(&args, context)),
        Command::Report(args) => wait(report::report(&args, context)),
        Command::Support(args) => wait(support::support(&args, context)),
        Command::Diff(args) => wait(diff::diff(&args, context)),
        Command::Apply(args) => wait(apply::apply(&args, context)),
        Command::Checkout(args) => wait(checkout::checkout(&args, context)),
        Command::Export(args) => wait(export::export(&args, context)),
        Command::Discard(args) => wait(discard::discard(&args, context)),
        Command::Wait(args) => wait(wait_for::wait_for(&args, context)),
        Command::Cancel(args) => wait(cancel::cancel(&args, context)),
        Command::Unpark(args) => wait(unpark::unpark(&args, context)),
        Command::Retry(args) => wait(retry::retry(&args, context)),
        Command::Queue(args) => wait(queue::queue(&args, context)),
        Command::Rm(args) => wait(rm::rm(&args, context)),
        Command::Cost(args) => wait(cost::cost(&args, context)),
        Command::Cache(args) => wait(cache::cache(&args, context)),
        Command::Gc(args) => wait(gc::gc(&args, context)),
        Command::Serve(args) => serve::serve(&args, context),
        Command::Pause(args) => wait(pause::pause(&args, context)),
        Command::Resume(args) => wait(pause::resume(&args, context)),
        Command::Drain(args) => wait(drain::drain(&args, context)),
        Command::Detach(args) => wait(drain::detach(&args, context)),
        Command::Image(args) => image::image(&args, context),
        Command::Agent(args) => agent::agent(&args, context),
        Command::Install(args) => install::install(&args, context),
        Command::Model(args) => model::model(&args, context),
        Command::Policy(args) => policy::policy(&args, context),
        Command::Whoami(args) => wait(whoami::whoami(&args, context)),
        Command::Health(args) => wait(health::health(&args, context)),
        Command::Doctor(args) => wait(doctor::doctor(&args, context)),
        Command::Schema(_) => schema::schema(context),
        Command::Completions(args) => completions::completions(&args, context),
        Command::Version(args) => version::version(&args, context),
    }
}

impl Command {
    fn json(&self) -> bool {
        match self {
            Self::Run(args) => args.json,
            Self::Ls(args) => args.json,
            Self::Show(args) => args.json,
            Self::Logs(args) => args.json,
            Self::Audit(args) => args.json,
            Self::Support(args) => args.json,
            Self::Diff(args) => args.json,
            Self::Apply(args) => args.json,
            Self::Checkout(args) => args.json,
            Self::Discard(args) => args.json,
            Self::Wait(args) => args.json,
            Self::Cancel(args) => args.json,
            Self::Unpark(args) => args.json,
            Self::Retry(args) => args.json,
            Self::Rm(args) => args.json,
            Self::Cost(args) => args.json,
            Self::Cache(args) => args.json(),
            Self::Gc(args) => args.json,
            Self::Queue(args) => args.json,
            Self::Pause(args) => args.json,
            Self::Resume(args) => args.json,
            Self::Drain(args) => args.json,
            Self::Detach(args) => args.json,
            Self::Image(args) => args.json(),
            Self::Agent(args) => args.json(),
            Self::Install(args) => args.json,
            Self::Policy(args) => args.json(),
            Self::Whoami(args) => args.json,
            Self::Health(args) => args.json,
            Self::Doctor(args) => args.json,
            Self::Version(args) => args.json,
            Self::Exec(_)
            | Self::Shell(_)
            | Self::Report(_)
            | Self::Export(_)
            | Self::Serve(_)
            | Self::Model(_)
            | Self::Schema(_)
            | Self::Completions(_) => false,
        }
    }
}

/// Runs a client command: one thread is enough for one connection.
fn wait<T>(future: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| CliError::Local(e.into()))?.block_on(future)
}

/// Most jobs that are searched for one whose id is abbreviated.
const PREFIX_SEARCH_MAX: usize = 1000;

/// The job that `text` names: an id, or the beginning of exactly one id among the newest jobs.
async fn find_job(client: &Client, text: &str) -> Result<JobId, CliError> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    let digits = text.strip_prefix('j').unwrap_or("");
    if digits.is_empty() || digits.len() > 15 || !digits.bytes().all(|b| b.is_ascii_alphanumeric()) {
        let hint = "an id is 'j' and 15 letters and digits, or its beginning; `hotcell ls` shows them";
        return Err(CliError::usage_hint(format!("{text:?} is not the id of a job"), hint));
    }
    let (jobs, _) = client.list(&Filter::default(), PREFIX_SEARCH_MAX).await?;
    let found: Vec<JobId> =
        jobs.into_iter().map(|job| job.id).filter(|id| id.as_str().starts_with(text)).collect();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(CliError::usage_hint(
            format!("no job's id begins with {text}"),
            format!("the newest {PREFIX_SEARCH_MAX} jobs were searched; give the whole id of an older one"),
        )),
        many => {
            let shown: Vec<&str> = many.iter().take(5).map(JobId::as_str).collect();
            let what = format!("{text} begins the ids of {} jobs: {} …", many.len(), shown.join(", "));
            Err(CliError::usage_hint(what, "give more of it"))
        }
    }
}

/// Does `one` for each named job; errors are told one by one and do not keep the others from being done.
async fn for_each_job(
    context: &mut Context,
    client: &Client,
    names: &[String],
    mut one: impl AsyncFnMut(&mut Context, JobId) -> Result<(), CliError>,
) -> Result<ExitCode, CliError> {
    let mut codes = Vec::new();
    for name in names {
        let done = match find_job(client, name).await {
            Ok(id) => one(context, id).await,
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => codes.push(ExitCode::Succeeded),
            Err(error) if error.is_broken_pipe() => return Err(error),
            Err(error) => {
                context.out.error(&error);
                codes.push(error.exit_code());
            }
        }
    }
    Ok(ExitCode::of_all(&codes))
}

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
