//! What a cell may reach beside its model: hosts, ports, methods, paths. Pure: the rules as they stand in a
//! policy file, and the one function that answers whether something may be dialled. Never resolves a name, so
//! that which addresses a name may have is decided elsewhere.
//!
//! ```toml
//! [[egress.host]]
//! name = "pypi.org"              # exactly this host; ".pypi.org" is it and every name below it
//! inspect = true                 # look into TLS, with a certificate authority that only this cell trusts
//! methods = ["GET"]
//! paths = ["/simple/**"]
//! ```

mod host;
mod path;

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use host::{Host, HostError};
pub use path::CanonicalPath;

use super::Plan;
use super::decide::{Denial, Permit, permit};
use super::narrow::Layer;

/// Most hosts of one policy.
const HOSTS_MAX: usize = 256;
/// Most ports, methods or paths of one host.
const HOST_ENTRIES_MAX: usize = 256;
/// Longest query of a rule, in bytes.
const QUERY_BYTES_MAX: usize = 1024;
/// What `everything` must say.
const EVERYTHING: &str = "yes, any host";
/// What a job may reach. Empty: nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Egress {
    /// The explicit word without which no host may be `*` or a whole top-level domain: `yes, any host`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub everything: Option<String>,
    /// Hosts; of several names that fit, the most exact one speaks.
    #[serde(default, rename = "host")]
    pub hosts: Vec<HostRule>,
}

/// One host, or all hosts below a name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HostRule {
    /// A name; with a dot in front also every name below it; an address is itself; `*` is every name.
    pub name: String,
    /// Ports. 443 speaks TLS; on each other port plain HTTP may be spoken, too.
    #[serde(default = "https")]
    pub ports: Vec<u16>,
    /// Look into TLS. Needed for methods, paths and credentials.
    #[serde(default)]
    pub inspect: bool,
    /// Methods, in upper case. Absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub methods: Option<Vec<String>>,
    /// Globs of paths: `*` within one part, `**` alone over many. Absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paths: Option<Vec<String>>,
    /// Queries, each exactly as it stands behind the `?`; "" is none. Absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queries: Option<Vec<String>>,
    /// A credential of the daemon's configuration, by name, that is added to each request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<String>,
    /// Keep whole answers to GET for all jobs under this policy. Only the policy's own word counts.
    #[serde(default, skip_serializing_if = "is_false")]
    pub cache: bool,
    /// Globs of paths whose content never changes: what is kept of them is not asked for again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub immutable: Vec<String>,
    /// The set that it came from. Written where sets are opened, never in a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    pub set: Option<String>,
    /// Most bytes that may leave the cells of one job through this rule.
    #[serde(default = "up_max")]
    pub bytes_up_max: u64,
    /// Most bytes that may come to them through it.
    #[serde(default = "down_max")]
    pub bytes_down_max: u64,
    /// Most connections at a time.
    #[serde(default = "connections_max")]
    pub connections_max: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(value: &bool) -> bool {
    !value
}

fn https() -> Vec<u16> {
    vec![443]
}

fn up_max() -> u64 {
    64 << 20
}

fn down_max() -> u64 {
    4 << 30
}

fn connections_max() -> u32 {
    32
}

/// A question about the way out.
#[derive(Debug, Clone, Copy)]
pub struct EgressAsk<'a> {
    /// Where to.
    pub host: &'a Host,
    /// On which port.
    pub port: u16,
    /// What for.
    pub act: Act<'a>,
}

/// What a cell wants of a host.
#[derive(Debug, Clone, Copy)]
pub enum Act<'a> {
    /// A connection that speaks TLS.
    Connect,
    /// One request that was looked into.
    Request {
        /// The method, as it stands in the request.
        method: &'a str,
        /// The path, without its query.
        path: &'a CanonicalPath,
        /// What stands behind its `?`.
        query: Option<&'a str>,
        /// Whether it came through TLS.
        secure: bool,
    },
}

/// How something may be reached: what all layers together say.
#[derive(Debug, Clone)]
pub struct Terms {
    /// The proof.
    pub permit: Permit,
    /// Look into TLS.
    pub inspect: bool,
    /// The credential to add to a request, by name; only where every layer names the same.
    pub credential: Option<String>,
    /// Keep the answer for other jobs under the policy, and answer from what is kept. The policy's own rule says it.
    pub cache: bool,
    /// What this path answers never changes. Only of a request, and only with `cache`.
    pub immutable: bool,
    /// The rule of the policy whose bytes and connections are counted together.
    pub account: String,
    /// Most bytes that may leave the job through that rule.
    pub bytes_up_max: u64,
    /// Most bytes that may come to it.
    pub bytes_down_max: u64,
    /// Most connections at a time.
    pub connections_max: u32,
}

impl Egress {
    /// Rules that reach nothing, whatever the names' addresses are, as (key, words).
    pub(super) fn warnings(&self) -> Vec<(String, String)> {
        let dead = self.hosts.iter().enumerate().filter(|(_, rule)| rule.is_private());
        dead.map(|(index, _)| {
            let words = "can never fit: private, loopback and link-local addresses are always refused";
            (format!("egress.host[{index}].name"), words.to_owned())
        })
        .collect()
    }

    /// Key and problem of the first thing that cannot be.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        if self.everything.as_deref().is_some_and(|word| word != EVERYTHING) {
            return Err(("egress.everything".into(), format!("can only be {EVERYTHING:?}")));
        }
        if self.hosts.len() > HOSTS_MAX {
            return Err((
                "egress.host".into(),
                format!("{} hosts; at most {HOSTS_MAX} are read", self.hosts.len()),
            ));
        }
        for (index, rule) in self.hosts.iter().enumerate() {
            let wrong = |(key, problem): (&str, String)| (format!("egress.host[{index}].{key}"), problem);
            rule.check(self.everything.is_some()).map_err(wrong)?;
            let name = rule.canonical_name();
            let same = |other: &&HostRule| {
                other.canonical_name() == name && other.ports.iter().any(|port| rule.ports.contains(port))
            };
            let twice = self.hosts[..index].iter().find(same);
            if twice.is_some_and(|other| !other.inspect || !rule.inspect) {
                let problem =
                    format!("{name} stands twice; rules of one host and port must all have inspect = true");
                return Err(wrong(("name", problem)));
            }
        }
        Ok(())
    }

    /// Whether there is a host at all.
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    /// Whether some host is looked into.
    pub fn inspects(&self) -> bool {
        self.hosts.iter().any(|rule| rule.inspect)
    }

    /// Names of the credentials that its rules add.
    pub fn credentials(&self) -> impl Iterator<Item = &str> {
        self.hosts.iter().filter_map(|rule| rule.credential.as_deref())
    }

    /// The rules of the most exact name that fits, in the file's order.
    fn speaking(&self, host: &Host, port: u16) -> Vec<&HostRule> {
        let fitting = self.hosts.iter().filter(|rule| rule.ports.contains(&port));
        let ranked: Vec<_> = fitting.filter_map(|rule| Some((rule.exactness(host)?, rule))).collect();
        let best = ranked.iter().map(|(rank, _)| *rank).max();
        ranked.into_iter().filter(|(rank, _)| Some(*rank) == best).map(|(_, rule)| rule).collect()
    }
}

impl HostRule {
    /// True for what everybody knows as an address of this host or its own networks. The gateway refuses more.
    fn is_private(&self) -> bool {
        let name = self.name.trim_start_matches('.');
        match Host::parse(name) {
            Ok(Host::Name(name)) => name == "localhost" || name.ends_with(".localhost"),
            Ok(Host::Address(IpAddr::V4(v4))) => v4.is_private() || v4.is_loopback() || v4.is_link_local(),
            Ok(Host::Address(IpAddr::V6(v6))) => {
                v6.is_unique_local() || v6.is_loopback() || v6.is_unicast_link_local()
            }
            Err(_) => false,
        }
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

    /// What can be kept for other jobs.
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
        for glob in &self.immutable {
            path::check_glob(glob).map_err(|why| ("immutable", format!("{glob:?} {why}")))?;
        }
        Ok(())
    }

    fn canonical_name(&self) -> String {
        let (dot, bare) = self.name.strip_prefix('.').map_or(("", self.name.as_str()), |bare| (".", bare));
        Host::parse(bare).map_or_else(|_| self.name.clone(), |host| format!("{dot}{host}"))
    }

    /// How exactly this rule's name fits: an equal name most, then the longest suffix, `*` least.
    fn exactness(&self, host: &Host) -> Option<usize> {
        if self.name == "*" {
            return host.name().map(|_| 0);
        }
        let name = self.canonical_name();
        match (name.strip_prefix('.'), host.name()) {
            (None, _) => (name == host.to_string()).then_some(usize::MAX),
            (Some(_), None) => None,
            (Some(bare), Some(host)) => (host == bare || host.ends_with(&name)).then_some(name.len()),
        }
    }

    fn allows(&self, method: &str, path: &CanonicalPath, query: Option<&str>) -> bool {
        let method = self.methods.as_ref().is_none_or(|list| list.iter().any(|m| m == method));
        let query = query.unwrap_or_default();
        method
            && self.paths.as_ref().is_none_or(|list| list.iter().any(|glob| path.fits(glob)))
            && self.queries.as_ref().is_none_or(|list| list.iter().any(|own| own == query))
    }

    /// Whether what is kept of such a request is never asked for again.
    fn holds_for_ever(&self, act: Act<'_>) -> bool {
        match act {
            Act::Connect => false,
            Act::Request { path, .. } => self.cache && self.immutable.iter().any(|glob| path.fits(glob)),
        }
    }
}

impl Plan {
    /// Whether the job reaches anything beside its model: every layer names a host.
    pub fn has_egress(&self) -> bool {
        !self.layers.is_empty() && self.layers.iter().all(|layer| !layer.egress.is_empty())
    }

    /// Whether some host is looked into, so that the cell needs a certificate authority of its own.
    pub fn inspects_egress(&self) -> bool {
        self.has_egress() && self.layers.iter().any(|layer| layer.egress.inspects())
    }
}

/// Answers whether something may be reached, and how. Every layer must allow it; limits are the lowest of all.
///
/// # Errors
/// [`Denial`] when a layer does not allow it.
pub fn decide_egress(layers: &[Layer], ask: &EgressAsk<'_>) -> Result<Terms, Denial> {
    let mut terms: Option<Terms> = None;
    for layer in layers {
        let (index, rule) = speaking_rule(layer, ask)?;
        let name = format!("egress.host[{index}] {}", rule.name);
        terms = Some(match terms {
            None => Terms {
                permit: permit(name),
                inspect: rule.inspect,
                credential: rule.credential.clone(),
                cache: rule.cache,
                immutable: rule.holds_for_ever(ask.act),
                account: rule.canonical_name(),
                bytes_up_max: rule.bytes_up_max,
                bytes_down_max: rule.bytes_down_max,
                connections_max: rule.connections_max,
            },
            Some(above) => Terms {
                permit: permit(name),
                inspect: above.inspect || rule.inspect,
                credential: above.credential.filter(|name| rule.credential.as_ref() == Some(name)),
                cache: above.cache,
                immutable: above.immutable,
                account: above.account,
                bytes_up_max: above.bytes_up_max.min(rule.bytes_up_max),
                bytes_down_max: above.bytes_down_max.min(rule.bytes_down_max),
                connections_max: above.connections_max.min(rule.connections_max),
            },
        });
    }
    terms.ok_or_else(|| Denial { rule: "layers".into(), reason: "the job has no policy".into() })
}

/// The rule of one layer that allows it, with its place in the file.
fn speaking_rule<'a>(layer: &'a Layer, ask: &EgressAsk<'_>) -> Result<(usize, &'a HostRule), Denial> {
    let EgressAsk { host, port, act } = *ask;
    let refuse = |rule: String, reason: String| {
        let reason = format!("{reason} (policy {}, rule {rule})", layer.name);
        Err(Denial { rule, reason })
    };
    let speaking = layer.egress.speaking(host, port);
    let place =
        |rule: &HostRule| layer.egress.hosts.iter().position(|other| std::ptr::eq(other, rule)).unwrap_or(0);
    let Some(first) = speaking.first().copied() else {
        return refuse("egress".into(), format!("{host}:{port} is not among the hosts that may be reached"));
    };
    let named = format!("egress.host[{}] {}", place(first), first.name);
    match act {
        Act::Connect => Ok((place(first), first)),
        Act::Request { secure: false, .. } if port == 443 => {
            refuse(named, format!("{host}:443 speaks TLS only"))
        }
        Act::Request { method, path, query, secure } => {
            let Some(rule) = speaking.into_iter().find(|rule| rule.allows(method, path, query)) else {
                return refuse(named, format!("{method} {} is not allowed at {host}", shown(path.as_str())));
            };
            if rule.credential.is_some() && !secure {
                return refuse(named, format!("what goes to {host} with a credential must go through TLS"));
            }
            Ok((place(rule), rule))
        }
    }
}

/// Answers people read hold at most this much of a path.
fn shown(path: &str) -> &str {
    path.get(..200).unwrap_or(path)
}

/// What becomes of a request for a URL, as the gateway would decide it: the connection first, and the request too
/// where it is looked into.
///
/// # Errors
/// What is wrong with the URL, in words.
pub fn decide_url(layers: &[Layer], method: &str, url: &str) -> Result<Result<Terms, Denial>, String> {
    let (host, port, path, secure) = parse_url(url)?;
    let query = url.split('#').next().and_then(|url| url.split_once('?')).map(|(_, query)| query);
    let ask = |act| decide_egress(layers, &EgressAsk { host: &host, port, act });
    if secure {
        match ask(Act::Connect) {
            Ok(terms) if terms.inspect => {}
            other => return Ok(other),
        }
    }
    Ok(ask(Act::Request { method, path: &path, query, secure }))
}

/// A URL taken apart for a question: host, port, path, and whether it is https.
///
/// # Errors
/// What is wrong with it, in words.
pub fn parse_url(url: &str) -> Result<(Host, u16, CanonicalPath, bool), String> {
    let (secure, rest) = match (url.strip_prefix("https://"), url.strip_prefix("http://")) {
        (Some(rest), _) => (true, rest),
        (_, Some(rest)) => (false, rest),
        (None, None) => return Err(format!("{url:?} begins with neither https:// nor http://")),
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(end);
    let path = rest.split(['?', '#']).next().unwrap_or_default();
    let path = CanonicalPath::parse(if path.is_empty() { "/" } else { path })?;
    let has_port = authority.rsplit(':').next().is_some_and(|t| !t.contains(']')) && authority.contains(':');
    let (host, port) = if has_port {
        Host::parse_with_port(authority)
    } else {
        Host::parse(authority).map(|host| (host, if secure { 443 } else { 80 }))
    }
    .map_err(|e| format!("the host of {url:?} {e}"))?;
    Ok((host, port, path, secure))
}

#[cfg(test)]
mod tests;
