//! `hotcell image`: the image of the cells. Runs in this process, against the engine.

use std::sync::Arc;

use clap::{Args, Subcommand};
use tokio::sync::mpsc;

use super::Context;
use super::fail::{CliError, ExitCode};
use super::serve::ConfigFlags;
use crate::cell_image::{BuildRequest, Built, EngineImages, ImageError, Images, Progress};
use crate::config::Config;
use crate::engine::docker::Docker;
use crate::engine::{Engine, find_address};
use crate::job::InstanceId;
use crate::npm::Npm;

/// Lines of progress that wait to be shown; more are dropped.
const LINES_MAX: usize = 256;

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
        /// Print what was built as JSON at the end
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
    let built = super::wait(build(&config, *force, context))?;
    context.out.end_status();
    if *json {
        context.out.json(&built)?;
        return Ok(ExitCode::Succeeded);
    }
    let how = if built.reused { "is there already" } else { "is built" };
    let megabytes = built.size_bytes.unwrap_or(0) / 1_000_000;
    let seconds = built.duration_ms as f64 / 1000.0;
    context.out.notice(&format!(
        "{} {how}: {}, {megabytes} MB, from {}, with the CLI {}, in {seconds:.1} s",
        built.tag, built.id, built.base, built.agent
    ))?;
    Ok(ExitCode::Succeeded)
}

async fn build(config: &Config, force: bool, context: &mut Context) -> Result<Built, CliError> {
    let address = find_address(config.engine.as_deref()).map_err(|e| CliError::Away(e.into()))?;
    let engine = Docker::connect(&address).await.map_err(|e| CliError::Away(e.into()))?;
    let engine: Arc<dyn Engine> = Arc::new(engine);
    crate::daemon::make_state_dir(&config.state_dir).map_err(CliError::Local)?;
    // Helpers that look into images live for milliseconds; they need a label, not an owner.
    let port = EngineImages::new(engine, InstanceId::new(0));
    let npm = Npm::from_environment().map_err(|e| CliError::Local(e.into()))?;
    let request = BuildRequest { agent: config.defaults.agent.clone(), force, ..BuildRequest::default() };
    let (lines, mut shown) = mpsc::channel::<Line>(LINES_MAX);
    let on_progress = move |progress: Progress<'_>| {
        // Progress never holds the build up.
        let _ = lines.try_send(Line::of(progress));
    };
    let images = Images::new(&port, &config.state_dir);
    let mut building = std::pin::pin!(images.build(&npm, &request, &on_progress));
    loop {
        tokio::select! {
            Some(line) = shown.recv() => line.show(context)?,
            built = &mut building => {
                return built.map_err(|error| match &error {
                    ImageError::Engine(fault) if fault.away => CliError::Away(error.into()),
                    ImageError::Npm(_) => CliError::Away(error.into()),
                    _ => CliError::Local(error.into()),
                });
            }
        }
    }
}

/// A piece of progress that can wait to be shown.
pub(super) enum Line {
    /// Worth a line of its own.
    Step(String),
    /// For the status line.
    Detail(String),
}

impl Line {
    fn of(progress: Progress<'_>) -> Self {
        match progress {
            Progress::Step(text) | Progress::Note(text) => Self::Step(text.to_owned()),
            Progress::Line(text) => Self::Detail(text.to_owned()),
            Progress::Bytes { what, done, total } => Self::Detail(bytes(what, done, total)),
        }
    }

    pub(super) fn show(self, context: &mut Context) -> Result<(), CliError> {
        match self {
            Self::Step(text) => context.out.notice(&text),
            Self::Detail(text) => {
                context.out.status(&text);
                Ok(())
            }
        }
    }
}

/// How far a download is.
pub(super) fn bytes(what: &str, done: u64, total: Option<u64>) -> String {
    let megabytes = |n: u64| n as f64 / 1e6;
    match total {
        Some(total) => format!("{what}: {:.0} of {:.0} MB", megabytes(done), megabytes(total)),
        None => format!("{what}: {:.0} MB", megabytes(done)),
    }
}
