//! What of a table of hosts can be meant at all, and what in it can have no effect. Never decides anything.

use std::net::IpAddr;

use super::{Egress, Host, HostRule, path, shown};

/// Most hosts of one table, and of one set.
pub(in crate::policy) const HOSTS_MAX: usize = 256;
/// Most sets of one table.
const SETS_MAX: usize = 64;
/// Most ports, methods or paths of one host.
pub(super) const HOST_ENTRIES_MAX: usize = 256;
/// Longest query of a rule, in bytes.
const QUERY_BYTES_MAX: usize = 1024;
/// What `everything` must say.
const EVERYTHING: &str = "yes, any host";

impl Egress {
    /// Rules of the file's own that reach nothing, whatever the names' addresses are, as (key, words).
    pub(in crate::policy) fn warnings(&self, key: &str) -> Vec<(String, String)> {
        let own = self.hosts.iter().enumerate().filter(|(_, rule)| rule.set.is_none());
        own.filter(|(_, rule)| rule.is_private())
            .map(|(index, _)| {
                let words = "can never fit: private, loopback and link-local addresses are always refused";
                (format!("{key}.host[{index}].name"), words.to_owned())
            })
            .collect()
    }

    /// Key and problem of the first thing that cannot be. `key` is where it stands: `egress`, `setup.egress`.
    pub(in crate::policy) fn check(&self, key: &str) -> Result<(), (String, String)> {
        if self.everything.as_deref().is_some_and(|word| word != EVERYTHING) {
            return Err((format!("{key}.everything"), format!("can only be {EVERYTHING:?}")));
        }
        for (name, count, max) in [("host", self.hosts.len(), HOSTS_MAX), ("sets", self.sets.len(), SETS_MAX)]
        {
            if count > max {
                return Err((format!("{key}.{name}"), format!("{count} entries; at most {max} are read")));
            }
        }
        if let Some(index) = (1..self.sets.len()).find(|at| self.sets[..*at].contains(&self.sets[*at])) {
            return Err((format!("{key}.sets[{index}]"), format!("{:?} stands twice", self.sets[index])));
        }
        check_rules(&self.hosts, self.everything.is_some())
            .map_err(|(index, of_rule, problem)| (format!("{key}.host[{index}].{of_rule}"), problem))
    }
}

/// Rules as they stand in a file: index, key and problem of the first thing that cannot be.
pub(in crate::policy) fn check_rules(
    rules: &[HostRule],
    everything: bool,
) -> Result<(), (usize, &'static str, String)> {
    for (index, rule) in rules.iter().enumerate() {
        rule.check(everything).map_err(|(key, problem)| (index, key, problem))?;
        let name = rule.canonical_name();
        let same = |other: &&HostRule| {
            other.canonical_name() == name && other.ports.iter().any(|port| rule.ports.contains(port))
        };
        let twice = rules[..index].iter().find(same);
        if twice.is_some_and(|other| !other.inspect || !rule.inspect) {
            let problem =
                format!("{name} stands twice; rules of one host and port must all have inspect = true");
            return Err((index, "name", problem));
        }
    }
    Ok(())
}

impl HostRule {
    /// True for what everybody knows as an address of this host or its own networks. The gateway refuses more.
    fn is_private(&self) -> bool {
        Host::parse(self.name.trim_start_matches('.')).is_ok_and(|host| is_private(&host))
    }

    fn check(&self, everything: bool) -> Result<(), (&'static str, String)> {
        let explicit = |what: &str| {
            let problem = format!("{what}; if that is meant, [egress] must say everything = {EVERYTHING:?}");
            Err(("name", problem))
        };
        match self.name.as_str() {
            "*" if everything => {}
            "*" => return explicit("opens every host on the internet"),
            name if name.starts_with('*') => {
                let below = name.trim_start_matches('*');
                return Err(("name", format!("{name:?}: write {below:?} for a name and all names below it")));
            }
            name => {
                let (bare, suffix) = name.strip_prefix('.').map_or((name, false), |bare| (bare, true));
                let host = Host::parse(bare).map_err(|e| ("name", format!("{name:?} {e}")))?;
                match host {
                    Host::Address(_) if suffix => {
                        return Err(("name", format!("{name:?}: an address has no names below it")));
                    }
                    Host::Name(bare) if suffix && !bare.contains('.') && !everything => {
                        return explicit(&format!("{name:?} opens a whole top-level domain"));
                    }
                    Host::Address(_) | Host::Name(_) => {}
                }
            }
        }
        if self.set.is_some() {
            return Err(("set", "is not written in a file: `sets` under [egress] opens a set".into()));
        }
        if self.ports.is_empty() || self.ports.contains(&0) {
            return Err(("ports", "must name at least one port from 1 to 65535".into()));
        }
        for (key, entries) in [
            ("ports", self.ports.len()),
            ("methods", self.methods.as_ref().map_or(0, Vec::len)),
            ("paths", self.paths.as_ref().map_or(0, Vec::len)),
            ("queries", self.queries.as_ref().map_or(0, Vec::len)),
            ("immutable", self.immutable.len()),
        ] {
            if entries > HOST_ENTRIES_MAX {
                return Err((key, format!("has {entries} entries; at most {HOST_ENTRIES_MAX} are read")));
            }
        }
        self.check_inspected()?;
        self.check_cache()?;
        for (key, least, value) in [
            ("bytes_up_max", 1024, self.bytes_up_max),
            ("bytes_down_max", 1024, self.bytes_down_max),
            ("connections_max", 1, u64::from(self.connections_max)),
        ] {
            if value < least {
                return Err((key, format!("is {value}; the least that is of use is {least}")));
            }
        }
        Ok(())
    }

    /// What can only be seen where the request is looked into.
    fn check_inspected(&self) -> Result<(), (&'static str, String)> {
        let given = [
            ("methods", self.methods.is_some()),
            ("paths", self.paths.is_some()),
            ("queries", self.queries.is_some()),
            ("credential", self.credential.is_some()),
        ];
        if let Some((key, _)) = given.into_iter().find(|(_, given)| *given && !self.inspect) {
            return Err((key, "needs inspect = true: nobody can see it from outside of TLS".into()));
        }
        let token = |text: &str| {
            !text.is_empty()
                && text.len() <= 64
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
        };
        for method in self.methods.iter().flatten() {
            if !token(method) || *method != method.to_ascii_uppercase() {
                return Err(("methods", format!("{method:?} is no method in upper case")));
            }
            if ["CONNECT", "TRACE"].contains(&method.as_str()) {
                return Err(("methods", format!("{method} is never passed on")));
            }
        }
        for (key, list) in [("methods", &self.methods), ("paths", &self.paths), ("queries", &self.queries)] {
            if list.as_ref().is_some_and(Vec::is_empty) {
                return Err((key, "is empty: nothing would pass; leave it out for all".into()));
            }
        }
        for glob in self.paths.iter().flatten() {
            path::check_glob(glob).map_err(|why| ("paths", format!("{glob:?} {why}")))?;
        }
        let plain =
            |query: &&String| query.len() > QUERY_BYTES_MAX || !query.bytes().all(|b| b.is_ascii_graphic());
        if let Some(query) = self.queries.iter().flatten().find(plain) {
            let query = shown(query);
            return Err((
                "queries",
                format!("{query:?} is no query that passes: at most {QUERY_BYTES_MAX} plain characters"),
            ));
        }
        if self.credential.as_deref().is_some_and(|name| !token(name)) {
            return Err((
                "credential",
                "is not the name of a credential: letters, digits, '-' and '_'".into(),
            ));
        }
        if self.credential.is_some()
            && (self.name == "*" || self.name.matches('.').count() < 2 && self.name.starts_with('.'))
        {
            return Err(("credential", "cannot go to every host of a whole domain: name the host".into()));
        }
        Ok(())
    }

    /// What can be kept for other jobs, and what is sent on over TLS.
    fn check_cache(&self) -> Result<(), (&'static str, String)> {
        if !self.cache && !self.immutable.is_empty() {
            return Err(("immutable", "needs cache = true: nothing is kept without it".into()));
        }
        if self.cache && !self.inspect && self.ports.contains(&443) {
            return Err((
                "cache",
                "needs inspect = true: nobody can see an answer from outside of TLS".into(),
            ));
        }
        if self.upgrade && !(self.inspect && self.ports.contains(&443)) {
            return Err((
                "upgrade",
                "needs inspect = true and port 443: it is about requests over TLS".into(),
            ));
        }
        for glob in &self.immutable {
            path::check_glob(glob).map_err(|why| ("immutable", format!("{glob:?} {why}")))?;
        }
        Ok(())
    }
}

/// True for what everybody knows as an address of this host or its own networks.
pub(super) fn is_private(host: &Host) -> bool {
    match host {
        Host::Name(name) => name == "localhost" || name.ends_with(".localhost"),
        Host::Address(IpAddr::V4(v4)) => v4.is_private() || v4.is_loopback() || v4.is_link_local(),
        Host::Address(IpAddr::V6(v6)) => {
            v6.is_unique_local() || v6.is_loopback() || v6.is_unicast_link_local()
        }
    }
}
