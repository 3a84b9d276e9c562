//! `[egress_set.NAME]`: sets of hosts that policies may name, beside or in place of the built-in ones: a private registry
//! under the name that everybody's policy has.

use std::collections::BTreeMap;

use toml::Spanned;

use super::raw::Layers;
use super::{ConfigError, Flags, Machine};
use crate::policy::{EgressSet, Sets};

/// The sets of a configuration alone, for commands that need nothing else of it.
///
/// # Errors
/// [`ConfigError`] where the file cannot be read or a set in it cannot be meant.
pub fn egress_sets(flags: &Flags, machine: &Machine) -> Result<Sets, ConfigError> {
    let (layers, raw) = Layers::read(flags, machine)?;
    read(&layers, raw.egress_set)
}

pub(super) fn read(
    layers: &Layers<'_>,
    raw: BTreeMap<String, Spanned<EgressSet>>,
) -> Result<Sets, ConfigError> {
    raw.into_iter().try_fold(Sets::built_in(), |sets, (name, set)| {
        let origin = layers.place(&set);
        sets.with(&name, set.into_inner()).map_err(|(below, problem)| {
            let key = if below.is_empty() { String::new() } else { format!(".{below}") };
            ConfigError::Entry { origin, key: format!("egress_set.{name}{key}"), problem }
        })
    })
}
