//! `hotcell serve`: builds the configuration and hands it to the daemon.

use std::marker::PhantomData;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

use super::Context;
use super::fail::{CliError, ExitCode};
use crate::config::{Config, Flags, SETTINGS, Setting};
use crate::selftest::Unhealthy;

/// Run the daemon
#[derive(Debug, Args)]
#[command(after_help = "\
Every setting has a key in the TOML file, a variable and a flag, e.g. limits.slots,
HOTCELL_LIMITS_SLOTS and --limits-slots. A flag wins over a variable, that over the file,
that over the default. The file is --config, else $HOTCELL_CONFIG, else
/etc/hotcell/config.toml as root and $XDG_CONFIG_HOME/hotcell/config.toml otherwise.

Signals: SIGTERM or SIGINT drains (nothing new starts, running jobs get limits.drain_s), a
second one stops running jobs. SIGQUIT detaches: cells go on and the next daemon adopts them.
SIGHUP reads policies, prices and credentials again. `hotcell drain` and `detach` do the same
over the socket.

`--help` shows all settings, `-h` the everyday ones.")]
pub(super) struct ServeArgs {
    /// If the store is damaged, keep it beside with all journals and change sets, and begin anew
    #[arg(long)]
    set_store_aside: bool,
    /// Do not start where `hotcell doctor --attack` finds a fault [default: under the policy of a job that names none]
    #[arg(long, value_name = "POLICY", num_args = 0..=1, require_equals = true)]
    require_doctor: Option<Option<String>>,
    #[command(flatten)]
    config: ConfigFlags,
}

/// Flags of settings, made from their table: of all, or of those that `S` says a command reads.
#[derive(Debug, Clone)]
pub(super) struct ConfigFlags<S: Concerns = AllSettings> {
    flags: Flags,
    concerns: PhantomData<S>,
}

/// Which settings a command reads.
pub(super) trait Concerns: Send + Sync + 'static {
    /// True for the key of one that it reads.
    fn has(key: &str) -> bool;
}

/// What the daemon reads.
#[derive(Debug, Clone)]
pub(super) struct AllSettings;

impl Concerns for AllSettings {
    fn has(_: &str) -> bool {
        true
    }
}

/// The flags' names: clap keeps references to them.
static NAMES: LazyLock<Vec<String>> = LazyLock::new(|| SETTINGS.iter().map(Setting::flag).collect());

impl<S: Concerns> ConfigFlags<S> {
    pub(super) fn flags(&self) -> Flags {
        self.flags.clone()
    }

    fn settings() -> impl Iterator<Item = (&'static Setting, &'static str)> {
        SETTINGS.iter().zip(NAMES.iter().map(String::as_str)).filter(|(setting, _)| S::has(setting.key))
    }
}

impl<S: Concerns> Args for ConfigFlags<S> {
    fn augment_args(command: Command) -> Command {
        let file = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("The configuration file [env: HOTCELL_CONFIG]");
        let command = command.next_help_heading("Settings").arg(file);
        Self::settings().fold(command, |command, (setting, name)| {
            let arg = Arg::new(setting.key)
                .long(name)
                .value_name(setting.value_name)
                .allow_hyphen_values(true)
                .hide_short_help(!setting.everyday)
                .help(setting.help)
                .long_help(format!("{} [env: {}]", setting.help, setting.variable()));
            command.arg(arg)
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<S: Concerns> FromArgMatches for ConfigFlags<S> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut all = Self { flags: Flags::default(), concerns: PhantomData };
        all.update_from_arg_matches(matches)?;
        Ok(all)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.flags.config = matches.get_one::<PathBuf>("config").cloned();
        for (setting, _) in Self::settings() {
            if let Some(value) = matches.get_one::<String>(setting.key) {
                self.flags.values.insert(setting.key, value.clone());
            }
        }
        Ok(())
    }
}

pub(super) fn serve(args: &ServeArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let mut config = Config::load(&args.config.flags(), &context.machine)?;
    config.set_store_aside = args.set_store_aside;
    config.require_doctor.clone_from(&args.require_doctor);
    crate::daemon::serve(config).map_err(|error| match error.downcast_ref::<Unhealthy>() {
        Some(Unhealthy::Lacks { .. }) => CliError::Away(error),
        Some(Unhealthy::Broken { .. }) | None => CliError::Local(error),
    })?;
    Ok(ExitCode::Succeeded)
}
