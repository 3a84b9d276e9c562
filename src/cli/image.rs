//! `hotcell image`: the images of the cells. Runs in this process, against the engine.

mod own;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use clap::{Args, Subcommand};
use tokio::sync::mpsc;

use super::Context;
use super::fail::{CliError, ExitCode};
use super::render::tables;
use super::serve::ConfigFlags;
use crate::agent_bundle::Bundles;
use crate::cell_image::{
    BuildRequest, Built, EngineImages, ImageError, Images, Progress, TOOLCHAINS, Toolchain, Workshop,
    toolchain,
};
use crate::config::Config;
use crate::engine::docker::Docker;
use crate::engine::{Engine, find_address};
use crate::job::InstanceId;
use crate::npm::Npm;

/// Lines of progress that wait to be shown; more are dropped.
const LINES_MAX: usize = 256;

/// Build the images of the cells, list and remove them
#[derive(Debug, Args)]
pub(super) struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Build images through the engine, where they are not there yet: the default one, or those named
    #[command(after_help = AFTER_HELP.as_str())]
    Build {
        /// cell (the default image) or a toolchain
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// Build the default image and all toolchains
        #[arg(long, conflicts_with = "names")]
        all: bool,
        /// Build again even where it is there (newer packages; for the default image a new base, too)
        #[arg(long)]
        force: bool,
        /// Print what was built as JSON, one line for each image
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags,
    },
    /// List what building a repository's own Dockerfile or devcontainer would run, without building it
    Plan {
        /// The repository
        #[arg(value_name = "DIR", default_value = ".")]
        dir: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Remove an image that was built from a repository's own Dockerfile
    Rm {
        /// Its name (hotcell/build:…)
        #[arg(value_name = "NAME")]
        name: String,
        #[command(flatten)]
        config: ConfigFlags,
    },
    /// List the images that can be built, which of them are there, and those of repositories' own Dockerfiles
    Ls {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags,
    },
}

/// The names, with what is in them.
static AFTER_HELP: LazyLock<String> = LazyLock::new(|| {
    let lines = TOOLCHAINS.iter().map(|toolchain| format!("  {:<7} {}\n", toolchain.name, toolchain.title));
    let cell = "  cell    the default image: Node, Python, git and the CLI\n".to_owned();
    let lines = [cell].into_iter().chain(lines).collect::<String>();
    format!("Names:\n{lines}\nA job names one as hotcell/<NAME>, or has it picked with `--image auto`.")
});

impl ImageArgs {
    pub(super) fn json(&self) -> bool {
        match &self.command {
            ImageCommand::Build { json, .. }
            | ImageCommand::Ls { json, .. }
            | ImageCommand::Plan { json, .. } => *json,
            ImageCommand::Rm { .. } => false,
        }
    }
}

pub(super) fn image(args: &ImageArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    match &args.command {
        ImageCommand::Build { names, all, force, json, config } => {
            let wanted = wanted(names, *all)?;
            let config = Config::load(&config.flags(), &context.machine)?;
            super::wait(build_all(&config, &wanted, (*force, *json), context))
        }
        ImageCommand::Plan { dir, json } => own::plan(dir, *json, context),
        ImageCommand::Rm { name, config } => {
            let config = Config::load(&config.flags(), &context.machine)?;
            super::wait(own::remove(name, &config, context))
        }
        ImageCommand::Ls { json, config } => {
            let config = Config::load(&config.flags(), &context.machine)?;
            super::wait(list(&config, *json, context))
        }
    }
}

/// One image to build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Cell,
    Toolchain(&'static Toolchain),
}

/// What the names mean: the default image where there is none, each one once, in the order given.
fn wanted(names: &[String], all: bool) -> Result<Vec<Wanted>, CliError> {
    if all {
        return Ok([Wanted::Cell].into_iter().chain(TOOLCHAINS.iter().map(Wanted::Toolchain)).collect());
    }
    let mut wanted = Vec::new();
    for name in names {
        let plain = name.strip_prefix("hotcell/").unwrap_or(name);
        let one = if plain == "cell" { Some(Wanted::Cell) } else { toolchain(plain).map(Wanted::Toolchain) };
        let one = one.ok_or_else(|| {
            let known: Vec<&str> = TOOLCHAINS.iter().map(|toolchain| toolchain.name).collect();
            let hint = format!("there are: cell, {}", known.join(", "));
            CliError::usage_hint(format!("there is no recipe for an image {name:?}"), hint)
        })?;
        if !wanted.contains(&one) {
            wanted.push(one);
        }
    }
    Ok(if wanted.is_empty() { vec![Wanted::Cell] } else { wanted })
}

async fn engine(config: &Config) -> Result<EngineImages, CliError> {
    let address = find_address(config.engine.as_deref()).map_err(|e| CliError::Away(e.into()))?;
    let engine = Docker::connect(&address).await.map_err(|e| CliError::Away(e.into()))?;
    let engine: Arc<dyn Engine> = Arc::new(engine);
    // Helpers that look into images live for milliseconds; they need a label, not an owner.
    Ok(EngineImages::new(engine, InstanceId::new(0)))
}

async fn build_all(
    config: &Config,
    wanted: &[Wanted],
    (force, json): (bool, bool),
    context: &mut Context,
) -> Result<ExitCode, CliError> {
    let port = engine(config).await?;
    crate::daemon::make_state_dir(&config.state_dir).map_err(CliError::Local)?;
    let npm = Npm::from_environment().map_err(|e| CliError::Local(e.into()))?;
    let request = BuildRequest { agent: config.defaults.agent.clone(), force, ..BuildRequest::default() };
    let images = Images::new(&port, &config.state_dir);
    let mut workshop = Workshop::new();
    for one in wanted {
        let (lines, mut shown) = mpsc::channel::<Line>(LINES_MAX);
        let on_progress = move |progress: Progress<'_>| {
            // Progress never holds the build up.
            let _ = lines.try_send(Line::of(progress));
        };
        let building = async {
            match one {
                Wanted::Cell => images.build(&npm, &request, &on_progress).await,
                Wanted::Toolchain(toolchain) => {
                    images.build_toolchain(toolchain, &npm, &request, &mut workshop, &on_progress).await
                }
            }
        };
        let mut building = std::pin::pin!(building);
        let built = loop {
            tokio::select! {
                Some(line) = shown.recv() => line.show(context)?,
                built = &mut building => break built.map_err(failed)?,
            }
        };
        context.out.end_status();
        tell(&built, json, context)?;
    }
    workshop.close().map_err(failed)?;
    Ok(ExitCode::Succeeded)
}

fn tell(built: &Built, json: bool, context: &mut Context) -> Result<(), CliError> {
    if json {
        return context.out.json(built);
    }
    let how = if built.reused { "is there already" } else { "is built" };
    let megabytes = built.size_bytes.unwrap_or(0) / 1_000_000;
    let seconds = built.duration_ms as f64 / 1000.0;
    let with = match &built.agent {
        Some(agent) => format!("the CLI {agent}"),
        None => versions(&built.versions),
    };
    context.out.notice(&format!(
        "{} {how}: {}, {megabytes} MB, from {}, with {with}, in {seconds:.1} s",
        built.tag, built.id, built.base
    ))
}

fn versions(all: &BTreeMap<String, String>) -> String {
    all.iter().map(|(name, version)| format!("{name} {version}")).collect::<Vec<_>>().join(", ")
}

async fn list(config: &Config, json: bool, context: &mut Context) -> Result<ExitCode, CliError> {
    let port = engine(config).await?;
    let images = Images::new(&port, &config.state_dir);
    let agent = match &config.defaults.agent {
        Some(agent) => agent.parse(),
        None => Bundles::new(&config.state_dir).active(),
    };
    let mut list = images.list(&agent.map_err(|e| CliError::Local(e.into()))?).await.map_err(failed)?;
    list.extend(own::listed(config).await?);
    if json {
        context.out.json(&list)?;
    } else {
        context.out.print(&tables::images(context.out.paint, &list))?;
    }
    Ok(ExitCode::Succeeded)
}

fn failed(error: ImageError) -> CliError {
    match &error {
        ImageError::Engine(fault) if fault.away => CliError::Away(error.into()),
        ImageError::Npm(_) => CliError::Away(error.into()),
        _ => CliError::Local(error.into()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_images_and_each_one_is_built_once() {
        let names =
            |names: &[&str]| wanted(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), false);
        assert_eq!(names(&[]).unwrap(), [Wanted::Cell]);
        let rust = Wanted::Toolchain(toolchain("rust").unwrap());
        assert_eq!(names(&["rust", "hotcell/rust", "cell"]).unwrap(), [rust, Wanted::Cell]);
        assert_eq!(wanted(&[], true).unwrap().len(), 1 + TOOLCHAINS.len());
        let error = names(&["rust", "cobol"]).unwrap_err();
        assert!(error.to_string().contains("\"cobol\""), "{error}");
        assert_eq!(error.hint().unwrap(), "there are: cell, cc, go, java, node, python, rust");
    }
}
