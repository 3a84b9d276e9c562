//! Named sets of hosts: what a package manager or git needs, under one name. The built-in ones stand in
//! `policies/sets.toml`; an administrator replaces them or adds to them in the daemon's configuration. A set is only a
//! way to write: where a policy is read its rules stand in it one by one, so that what was accepted never changes with
//! a set.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, LazyLock};

use serde::Deserialize;

use super::egress::HostRule;
use super::egress::{HOSTS_MAX, check_rules};
use super::narrow::is_reserved_variable;

/// Most sets that there are.
const SETS_MAX: usize = 256;
/// Most variables of one set.
const ENV_MAX: usize = 64;
/// Longest value of one, in bytes.
const VALUE_BYTES_MAX: usize = 4096;

/// The text of the built-in sets.
pub const BUILT_IN: &str = include_str!("../../policies/sets.toml");

/// Hosts under one name.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EgressSet {
    /// One line for people.
    #[serde(default)]
    pub description: String,
    /// Its hosts, as under `[[egress.host]]`.
    #[serde(rename = "host")]
    pub hosts: Vec<HostRule>,
    /// Variables of cells where it is open.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// All sets by name.
#[derive(Clone, Default, PartialEq)]
pub struct Sets {
    all: Arc<BTreeMap<String, EgressSet>>,
    /// A name that is not there may be another daemon's.
    open_ended: bool,
}

impl Eq for Sets {}

impl fmt::Debug for Sets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.all.keys()).finish()
    }
}

static BUILT_IN_SETS: LazyLock<Sets> = LazyLock::new(|| {
    let all: BTreeMap<String, EgressSet> = toml::from_str(BUILT_IN).unwrap_or_default();
    Sets { all: Arc::new(all), open_ended: false }
});

impl Sets {
    /// Those that are part of this program.
    pub fn built_in() -> Self {
        BUILT_IN_SETS.clone()
    }

    /// For a file that another daemon will read: each name may be a set there.
    pub fn of_another_daemon() -> Self {
        Self { open_ended: true, ..Self::built_in() }
    }

    /// With one set added, or put in the place of the one of that name.
    ///
    /// # Errors
    /// (key below the set, problem).
    pub fn with(mut self, name: &str, set: EgressSet) -> Result<Self, (String, String)> {
        let all = Arc::make_mut(&mut self.all);
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
            let problem = "is not the name of a set: at most 64 of a-z, 0-9 and '-'".to_owned();
            return Err((String::new(), problem));
        }
        if all.len() >= SETS_MAX {
            return Err((String::new(), format!("is one set too many: at most {SETS_MAX} are read")));
        }
        set.check()?;
        all.insert(name.to_owned(), set);
        Ok(self)
    }

    /// The set of that name.
    pub fn get(&self, name: &str) -> Option<&EgressSet> {
        self.all.get(name)
    }

    /// All of them with their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &EgressSet)> {
        self.all.iter().map(|(name, set)| (name.as_str(), set))
    }

    /// The rules of a set, each with the set's name; the problem where there is no such set.
    pub(super) fn rules(&self, name: &str) -> Result<Vec<HostRule>, String> {
        match self.all.get(name) {
            Some(set) => {
                let named = |rule: &HostRule| HostRule { set: Some(name.to_owned()), ..rule.clone() };
                Ok(set.hosts.iter().map(named).collect())
            }
            None if self.open_ended => Ok(Vec::new()),
            None => {
                let there = self.all.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                Err(format!("there is no set {name:?}; there are: {there}"))
            }
        }
    }

    /// Each set's hosts as `name:port`, for the words of refusals.
    pub(super) fn hosts(&self) -> BTreeMap<String, Vec<String>> {
        let hosts = |set: &EgressSet| {
            let mut hosts: Vec<String> = Vec::new();
            for rule in &set.hosts {
                let name = rule.canonical_name();
                let here = rule.ports.iter().map(|port| format!("{name}:{port}"));
                let new: Vec<String> = here.filter(|here| !hosts.contains(here)).collect();
                hosts.extend(new);
            }
            hosts
        };
        self.all.iter().map(|(name, set)| (name.clone(), hosts(set))).collect()
    }

    /// The variables of the named sets. Where two have the same, the first one's holds.
    pub(super) fn env<'n>(&self, names: impl Iterator<Item = &'n String>) -> BTreeMap<String, String> {
        let mut env = BTreeMap::new();
        for (name, value) in names.filter_map(|name| self.all.get(name)).flat_map(|set| &set.env) {
            env.entry(name.clone()).or_insert_with(|| value.clone());
        }
        env
    }
}

impl EgressSet {
    fn check(&self) -> Result<(), (String, String)> {
        if self.hosts.is_empty() || self.hosts.len() > HOSTS_MAX {
            return Err(("host".into(), format!("must name from 1 to {HOSTS_MAX} hosts")));
        }
        check_rules(&self.hosts, false)
            .map_err(|(index, key, problem)| (format!("host[{index}].{key}"), problem))?;
        if self.env.len() > ENV_MAX {
            return Err(("env".into(), format!("at most {ENV_MAX} variables are read")));
        }
        for (name, value) in &self.env {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
            let bad = if name.is_empty() || name.len() > 128 || !name.bytes().all(plain) {
                "names of variables have letters, digits and '_' only"
            } else if is_reserved_variable(name) {
                "this variable steers the CLI or its way out and is the daemon's"
            } else if value.len() > VALUE_BYTES_MAX || value.contains('\0') {
                "the value is too long or holds a NUL"
            } else {
                continue;
            };
            return Err((format!("env.{name}"), bad.to_owned()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
