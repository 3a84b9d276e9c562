//! The TOML file as it stands, and the layers above it. Keeps for every value where it came from, so that an
//! error can say so; checks nothing but what the caller's parser checks.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::access::{Names, RawAccess};
use super::providers::{RawCredential, RawProviders};
use super::settings::Setting;
use super::{ApiKeySource, ConfigError, Flags, Machine};
use crate::policy::EgressSet;
use crate::policy::access::Rule;

/// Largest configuration or policy file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

pub(super) type Opt<T> = Option<Spanned<T>>;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawConfig {
    pub(super) state_dir: Opt<String>,
    pub(super) socket: Opt<String>,
    pub(super) socket_mode: Opt<String>,
    pub(super) socket_group: Opt<String>,
    pub(super) engine: Opt<String>,
    pub(super) metrics: Opt<String>,
    pub(super) policy_dirs: Opt<Vec<String>>,
    pub(super) prices_file: Opt<String>,
    pub(super) egress_set: BTreeMap<String, Spanned<EgressSet>>,
    pub(super) provider: RawProviders,
    pub(super) credential: Vec<Spanned<RawCredential>>,
    pub(super) defaults: RawDefaults,
    pub(super) limits: RawLimits,
    pub(super) budgets: super::budgets::RawBudgets,
    pub(super) network: super::network::RawNetwork,
    pub(super) cache: super::cache::RawCache,
    pub(super) retention: super::retention::RawRetention,
    pub(super) admin_uids: Opt<Vec<u32>>,
    pub(super) access: Vec<Spanned<RawAccess>>,
    pub(super) init_binary: Opt<String>,
    pub(super) log: Opt<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawAnthropic {
    pub(super) base_url: Opt<String>,
    pub(super) api_key_env: Opt<String>,
    pub(super) api_key_file: Opt<String>,
    pub(super) api_key_command: Opt<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawDefaults {
    pub(super) policy: Opt<String>,
    pub(super) model: Opt<String>,
    pub(super) image: Opt<String>,
    pub(super) agent: Opt<String>,
    pub(super) provider: Opt<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawLimits {
    pub(super) slots: Opt<u64>,
    pub(super) queued_jobs_max: Opt<u64>,
    pub(super) journal_bytes_max: Opt<u64>,
    pub(super) cancel_grace_s: Opt<u64>,
    pub(super) drain_s: Opt<u64>,
    pub(super) disk_reserve_mib: Opt<u64>,
    pub(super) memory_reserve_mib: Opt<u64>,
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    Flag,
    Variable,
    Line(usize),
}

/// Flags over variables over the file.
pub(super) struct Layers<'a> {
    flags: &'a Flags,
    pub(super) machine: &'a Machine,
    /// The file that was looked for, for error texts.
    path: PathBuf,
    /// The same, where there was one.
    pub(super) found: Option<PathBuf>,
    text: String,
}

impl<'a> Layers<'a> {
    pub(super) fn without_file(flags: &'a Flags, machine: &'a Machine) -> Self {
        let named = flags.config.clone().or_else(|| machine.var("HOTCELL_CONFIG").map(PathBuf::from));
        let path = named.or_else(|| machine.config_dir().map(|dir| dir.join("config.toml")));
        let path = path.unwrap_or_else(|| "config.toml".into());
        Self { flags, machine, path, found: None, text: String::new() }
    }

    /// Reads the file. One that was named must exist; the one in the usual place need not.
    pub(super) fn read(flags: &'a Flags, machine: &'a Machine) -> Result<(Self, RawConfig), ConfigError> {
        let mut layers = Self::without_file(flags, machine);
        let named = flags.config.is_some() || machine.var("HOTCELL_CONFIG").is_some();
        match read_bounded(&layers.path) {
            Ok(text) => {
                layers.text = text;
                layers.found = Some(layers.path.clone());
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !named => {}
            Err(source) => return Err(ConfigError::Read { path: layers.path, source }),
        }
        match toml::from_str(&layers.text) {
            Ok(raw) => Ok((layers, raw)),
            Err(e) => Err(ConfigError::Syntax { path: layers.path, detail: e.to_string() }),
        }
    }

    pub(super) fn is_given(&self, key: &'static str) -> bool {
        self.above(key).is_some()
    }

    /// The value of a flag or a variable.
    fn above(&self, key: &'static str) -> Option<(&str, Origin)> {
        if let Some(value) = self.flags.values.get(key) {
            return Some((value, Origin::Flag));
        }
        let variable = Setting::of(key).map(Setting::variable)?;
        self.machine.var(&variable).map(|value| (value, Origin::Variable))
    }

    fn line<T>(&self, value: &Spanned<T>) -> Origin {
        let before = self.text.get(..value.span().start).unwrap_or("");
        Origin::Line(before.matches('\n').count() + 1)
    }

    /// File and line of a value, for an error.
    pub(super) fn place<T>(&self, value: &Spanned<T>) -> String {
        match self.line(value) {
            Origin::Line(line) => format!("{}, line {line}", self.path.display()),
            Origin::Flag | Origin::Variable => self.path.display().to_string(),
        }
    }

    fn wrong(&self, key: &'static str, problem: String, origin: &Origin) -> ConfigError {
        let (variable, flag) = Setting::of(key).map_or_else(Default::default, |s| (s.variable(), s.flag()));
        let origin = match origin {
            Origin::Flag => format!("--{flag}"),
            Origin::Variable => variable.clone(),
            Origin::Line(line) => format!("{}, line {line}", self.path.display()),
        };
        let places = format!("{key} in {}, {variable} or --{flag}", self.path.display());
        ConfigError::Value { key, problem, origin, places }
    }

    /// The error for a setting that has no value and no default on this machine.
    pub(super) fn missing(&self, key: &'static str, problem: &str) -> ConfigError {
        match self.wrong(key, problem.to_owned(), &Origin::Flag) {
            ConfigError::Value { key, problem, places, .. } => {
                ConfigError::Value { key, problem, origin: "the default".into(), places }
            }
            other => other,
        }
    }

    /// A text, parsed.
    pub(super) fn checked<T>(
        &self,
        key: &'static str,
        raw: &Opt<String>,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        let given = self.above(key).or_else(|| raw.as_ref().map(|v| (v.get_ref().as_str(), self.line(v))));
        let Some((text, origin)) = given else { return Ok(None) };
        let value = if text.is_empty() { Err("is empty".to_owned()) } else { parse(text) };
        value.map(Some).map_err(|problem| self.wrong(key, problem, &origin))
    }

    /// A name that reaches command lines: printable, bounded, never a flag.
    pub(super) fn name(&self, key: &'static str, raw: &Opt<String>) -> Result<Option<String>, ConfigError> {
        self.checked(key, raw, |text| {
            if text.len() > 512 || text.starts_with('-') || text.chars().any(char::is_control) {
                return Err("must have at most 512 bytes, no control characters and no '-' in front".into());
            }
            Ok(text.to_owned())
        })
    }

    /// A whole number within `range`.
    pub(super) fn number(
        &self,
        key: &'static str,
        raw: &Opt<u64>,
        range: RangeInclusive<u64>,
        default: u64,
    ) -> Result<u64, ConfigError> {
        let wanted = format!("is not a whole number from {} to {}", range.start(), range.end());
        let (text, value, origin) = match (self.above(key), raw) {
            (Some((text, origin)), _) => (text.to_owned(), text.parse().ok(), origin),
            (None, Some(v)) => (v.get_ref().to_string(), Some(*v.get_ref()), self.line(v)),
            (None, None) => return Ok(default),
        };
        value
            .filter(|n| range.contains(n))
            .ok_or_else(|| self.wrong(key, format!("{text:?} {wanted}"), &origin))
    }

    /// A list; flags and variables separate its entries by `separator`.
    pub(super) fn list<R: ToString, T>(
        &self,
        key: &'static str,
        raw: &Opt<Vec<R>>,
        separator: char,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<Vec<T>>, ConfigError> {
        let (entries, origin): (Vec<String>, Origin) = match (self.above(key), raw) {
            (Some((text, origin)), _) => (text.split(separator).map(str::to_owned).collect(), origin),
            (None, Some(v)) => (v.get_ref().iter().map(R::to_string).collect(), self.line(v)),
            (None, None) => return Ok(None),
        };
        let parsed: Result<Vec<T>, String> = entries.iter().map(|entry| parse(entry)).collect();
        parsed.map(Some).map_err(|problem| self.wrong(key, problem, &origin))
    }

    /// The entries that say who may use what.
    pub(super) fn access(&self, raw: &[Spanned<RawAccess>]) -> Result<Vec<Rule>, ConfigError> {
        // Most files have none, and then nobody's names matter.
        let names = if raw.is_empty() { Names::default() } else { Names::of_machine() };
        super::access::rules(&self.path, &self.text, raw, &names)
    }

    /// Where the API key is: the highest layer that names a place decides, and it must name exactly one.
    pub(super) fn api_key(&self, raw: &RawAnthropic) -> Result<ApiKeySource, ConfigError> {
        const ENV: &str = "provider.anthropic.api_key_env";
        const FILE: &str = "provider.anthropic.api_key_file";
        const COMMAND: &str = "provider.anthropic.api_key_command";
        let below = |v: &Opt<String>| v.as_ref().map(|v| (v.get_ref().clone(), self.line(v)));
        let above = |key| self.above(key).map(|(text, origin)| (text.to_owned(), origin));
        let all = [(ENV, &raw.api_key_env), (FILE, &raw.api_key_file), (COMMAND, &raw.api_key_command)];
        let given: Vec<_> = all
            .into_iter()
            .filter_map(|(key, value)| above(key).or_else(|| below(value)).map(|(t, o)| (key, t, o)))
            .collect();
        let rank = |origin: &Origin| match origin {
            Origin::Flag => 0,
            Origin::Variable => 1,
            Origin::Line(_) => 2,
        };
        let Some(top) = given.iter().map(|(_, _, origin)| rank(origin)).min() else {
            return Ok(ApiKeySource::Env("ANTHROPIC_API_KEY".into()));
        };
        let mut chosen = given.into_iter().filter(|(_, _, origin)| rank(origin) == top);
        let Some((key, text, origin)) = chosen.next() else {
            return Ok(ApiKeySource::Env("ANTHROPIC_API_KEY".into()));
        };
        if let Some((other, _, _)) = chosen.next() {
            let problem = format!("{other} is given too; exactly one of them can be");
            return Err(self.wrong(key, problem, &origin));
        }
        match key {
            ENV if text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') && !text.is_empty() => {
                Ok(ApiKeySource::Env(text))
            }
            // The text may be the key itself, put into the wrong place: it is not repeated.
            ENV => Err(self.wrong(key, "is not the name of a variable".into(), &origin)),
            FILE => super::absolute(&text)
                .map(ApiKeySource::File)
                .map_err(|problem| self.wrong(key, problem, &origin)),
            _ if text.trim().is_empty() => Err(self.wrong(key, "is empty".into(), &origin)),
            _ => Ok(ApiKeySource::Command(text)),
        }
    }
}

pub(super) fn read_bounded(path: &Path) -> std::io::Result<String> {
    read_at_most(path, FILE_BYTES_MAX)
}

pub(super) fn read_at_most(path: &Path, bytes_max: u64) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    let file = std::fs::File::open(path)?;
    file.take(bytes_max + 1).read_to_string(&mut text)?;
    if text.len() as u64 > bytes_max {
        let words = format!("it has more than {bytes_max} bytes");
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, words));
    }
    Ok(text)
}
