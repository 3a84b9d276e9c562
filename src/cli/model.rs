//! `hotcell model`: the scripted Messages API, for rehearsals without a model. Runs in this process.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::Context;
use super::fail::{CliError, ExitCode};
use crate::model::{self, Listener, Recorder, Script};

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

pub(super) fn model(args: &ModelArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let ModelCommand::Serve(args) = &args.command;
    super::wait(serve(args, context))
}

async fn serve(args: &ModelServeArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let name = args.script.display().to_string();
    let text = std::fs::read_to_string(&args.script)
        .map_err(|error| CliError::usage(format!("--script: cannot read {name}: {error}")))?;
    let script = Script::parse(&text, &name).map_err(|error| CliError::usage(error.to_string()))?;
    let recorder = match &args.record {
        None => Recorder::off(),
        Some(path) => Recorder::file(path).map_err(|error| {
            CliError::usage(format!("--record: cannot write {}: {error}", path.display()))
        })?,
    };
    let cannot = |place: String| {
        move |error: std::io::Error| CliError::usage(format!("cannot listen on {place}: {error}"))
    };
    let (listener, place): (Listener, String) = match &args.unix {
        Some(path) => {
            let place = path.display().to_string();
            (UnixListener::bind(path).map_err(cannot(place.clone()))?.into(), format!("unix:{place}"))
        }
        None => {
            let listener = TcpListener::bind(args.listen).await.map_err(cannot(args.listen.to_string()))?;
            let place = listener.local_addr().map_err(cannot(args.listen.to_string()))?;
            (listener.into(), format!("http://{place}"))
        }
    };
    // The first line tells a script where to go.
    context.out.json(&serde_json::json!({ "base_url": place }))?;
    context.out.flush()?;
    let stop = CancellationToken::new();
    let serving = model::serve(listener, Arc::new(script), Arc::new(recorder), stop.clone());
    let mut serving = std::pin::pin!(serving);
    let mut term = signal(SignalKind::terminate()).map_err(|e| CliError::Local(e.into()))?;
    let report = tokio::select! {
        report = &mut serving => report,
        _ = tokio::signal::ctrl_c() => { stop.cancel(); serving.await }
        _ = term.recv() => { stop.cancel(); serving.await }
    };
    if let Some(path) = &args.unix {
        let _ = std::fs::remove_file(path);
    }
    context.out.json(&report)?;
    Ok(ExitCode::Succeeded)
}
