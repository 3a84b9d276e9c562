//! `hotcell agent`: versions of the agent, side by side. Runs in this process, on the state directory.

use clap::{Args, Subcommand};
use serde_json::json;
use tokio::sync::mpsc;

use super::Context;
use super::fail::{CliError, ExitCode};
use super::image::{Line, bytes};
use super::render::tables;
use super::serve::ConfigFlags;
use crate::agent_bundle::{Arch, Bundle, BundleError, Bundles, Libc, Platform, Version};
use crate::config::Config;
use crate::npm::Npm;
use crate::selftest;

/// Pieces of progress that wait to be shown; more are dropped.
const LINES_MAX: usize = 64;

/// Install and choose versions of the agent
#[derive(Debug, Args)]
pub(super) struct AgentArgs {
    #[command(subcommand)]
    command: AgentCommand,
}

#[derive(Debug, Subcommand)]
enum AgentCommand {
    /// Fetch a version and test in real cells that hotcell can drive it
    Install {
        /// The version, e.g. 2.1.197, or `latest`
        #[arg(value_name = "VERSION")]
        version: String,
        /// For images with this C library: gnu or musl
        #[arg(long, value_name = "LIBC", default_value = "gnu")]
        libc: String,
        /// For this processor: x64 or arm64; this machine's where absent
        #[arg(long, value_name = "ARCH")]
        arch: Option<String>,
        /// Print what was installed as JSON at the end
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags,
    },
    /// Test again that hotcell can drive an installed version
    Test {
        /// The version
        #[arg(value_name = "VERSION")]
        version: String,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags,
    },
    /// List the versions that are here
    Ls {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags,
    },
    /// Make a version the one that jobs get which name none
    Use {
        /// The version
        #[arg(value_name = "VERSION")]
        version: String,
        /// Print {"version"} at the end
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags,
    },
}

impl AgentArgs {
    pub(super) fn json(&self) -> bool {
        match &self.command {
            AgentCommand::Install { json, .. }
            | AgentCommand::Test { json, .. }
            | AgentCommand::Ls { json, .. }
            | AgentCommand::Use { json, .. } => *json,
        }
    }
}

pub(super) fn agent(args: &AgentArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    match &args.command {
        AgentCommand::Install { version, libc, arch, json, config } => {
            let config = Config::load(&config.flags(), &context.machine)?;
            let platform = platform(libc, arch.as_deref())?;
            let bundle = super::wait(install(&config, version, platform, context))?;
            context.out.end_status();
            test(&config, &bundle, *json, context)
        }
        AgentCommand::Test { version, json, config } => {
            let config = Config::load(&config.flags(), &context.machine)?;
            let version: Version = version.parse().map_err(failed)?;
            let platform = Platform { arch: host_arch()?, libc: Libc::Gnu };
            let bundle = Bundles::new(&config.state_dir).get(&version, platform).map_err(failed)?;
            test(&config, &bundle, *json, context)
        }
        AgentCommand::Ls { json, config } => {
            let config = Config::load(&config.flags(), &context.machine)?;
            let bundles = Bundles::new(&config.state_dir);
            let active = bundles.active().map_err(failed)?;
            let list = bundles.ls().map_err(failed)?;
            if *json {
                context.out.json(&list)?;
            } else {
                context.out.print(&tables::agents(context.out.paint, &list, &active))?;
            }
            Ok(ExitCode::Succeeded)
        }
        AgentCommand::Use { version, json, config } => {
            let config = Config::load(&config.flags(), &context.machine)?;
            let version: Version = version.parse().map_err(failed)?;
            Bundles::new(&config.state_dir).set_active(&version).map_err(failed)?;
            if *json {
                context.out.json(&json!({ "version": version }))?;
            } else {
                context.out.notice(&format!("new jobs get the CLI {version}"))?;
            }
            Ok(ExitCode::Succeeded)
        }
    }
}

fn failed(error: BundleError) -> CliError {
    match error {
        BundleError::Npm(_) => CliError::Away(error.into()),
        BundleError::Version { .. } | BundleError::Arch(_) => CliError::usage(error.to_string()),
        _ => CliError::Local(error.into()),
    }
}

fn host_arch() -> Result<Arch, CliError> {
    std::env::consts::ARCH.parse().map_err(failed)
}

fn platform(libc: &str, arch: Option<&str>) -> Result<Platform, CliError> {
    let libc = match libc {
        "gnu" => Libc::Gnu,
        "musl" => Libc::Musl,
        other => return Err(CliError::usage(format!("--libc: {other:?} is neither gnu nor musl"))),
    };
    let arch = match arch {
        Some(arch) => arch.parse().map_err(failed)?,
        None => host_arch()?,
    };
    Ok(Platform { arch, libc })
}

async fn install(
    config: &Config,
    version: &str,
    platform: Platform,
    context: &mut Context,
) -> Result<Bundle, CliError> {
    crate::daemon::make_state_dir(&config.state_dir).map_err(CliError::Local)?;
    let npm = Npm::from_environment().map_err(|e| CliError::Local(e.into()))?;
    let bundles = Bundles::new(&config.state_dir);
    let (lines, mut shown) = mpsc::channel::<Line>(LINES_MAX);
    let on_bytes = move |done, total| {
        let _ = lines.try_send(Line::Detail(bytes(platform.package(), done, total)));
    };
    let mut installing = std::pin::pin!(bundles.install(&npm, version, platform, &on_bytes));
    loop {
        tokio::select! {
            Some(line) = shown.recv() => line.show(context)?,
            done = &mut installing => return done.map_err(failed),
        }
    }
}

/// Runs the protocol self-test and records its result. A bundle for another platform cannot be run here:
/// it stays untested, and says so.
fn test(config: &Config, bundle: &Bundle, json: bool, context: &mut Context) -> Result<ExitCode, CliError> {
    let bundles = Bundles::new(&config.state_dir);
    let (version, platform) = (&bundle.version, bundle.platform);
    if platform != (Platform { arch: host_arch()?, libc: Libc::Gnu }) {
        context
            .out
            .notice(&format!("{version} for {platform} is installed; it cannot be tested on this machine"))?;
        if json {
            context.out.json(bundle)?;
        }
        return Ok(ExitCode::Succeeded);
    }
    context.out.notice(&format!("testing {version} in real cells against the scripted model"))?;
    let result = super::wait(async { Ok(selftest::run(config, version).await) })?;
    match result {
        Ok(report) => {
            let checks = report.checks.join(", ");
            bundles.record_qualification(version, platform, Ok(report)).map_err(failed)?;
            context.out.notice(&format!("{version} passed: {checks}"))?;
        }
        Err(selftest::SelfTestError::Setup(error)) => return Err(CliError::Away(error)),
        Err(selftest::SelfTestError::Check { name, why }) => {
            let words = format!("{name}: {why}");
            bundles.record_qualification(version, platform, Err(words.clone())).map_err(failed)?;
            return Err(CliError::Local(anyhow::anyhow!("the CLI {version} failed the self-test: {words}")));
        }
    }
    if json {
        context.out.json(&bundles.get(version, platform).map_err(failed)?)?;
    }
    Ok(ExitCode::Succeeded)
}
