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
//!
//! [egress]
//! sets = ["npm"]                 # hosts under one name, see `super::sets`
//! ```

mod check;
mod hint;
mod host;
mod path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(super) use check::{HOSTS_MAX, check_rules};
pub use host::{Host, HostError};
pub use path::CanonicalPath;

use super::Plan;
use super::decide::{Denial, Permit, permit};
use super::narrow::Layer;
use super::sets::Sets;

/// What a job may reach. Empty: nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Egress {
    /// The explicit word without which no host may be `*` or a whole top-level domain: `yes, any host`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub everything: Option<String>,
    /// Named sets of hosts that are open, too: built-in ones and those of the daemon's configuration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sets: Vec<String>,
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
    /// A request for it over plain HTTP is taken for one over TLS: it is judged as such, and goes on as such. For
    /// tools to which TLS costs more than it gives, since a cell's plain HTTP does not leave this machine. Only the
    /// policy's own word counts.
    #[serde(default, skip_serializing_if = "is_false")]
    pub upgrade: bool,
    /// The set that it came from. Written where sets are opened, never in a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    pub set: Option<String>,
    /// What it allows is refused, since what it adds is not for this step. Set where a step is entered.
    #[serde(skip)]
    pub closed: bool,
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
    /// Opens the sets that it names: their rules stand behind its own. Done once, where its file is read.
    pub(super) fn open(&mut self, key: &str, sets: &Sets) -> Result<(), (String, String)> {
        for (index, name) in self.sets.iter().enumerate() {
            let rules = sets.rules(name).map_err(|problem| (format!("{key}.sets[{index}]"), problem))?;
            self.hosts.extend(rules);
        }
        Ok(())
    }

    /// Whether there is a host at all.
    pub fn is_empty(&self) -> bool {
        self.hosts.iter().all(HostRule::is_closed)
    }

    /// Whether some host is looked into.
    pub fn inspects(&self) -> bool {
        self.hosts.iter().any(|rule| rule.inspect)
    }

    /// Whether some host that `rule` is about may be open here too, on some port of its.
    pub fn meets(&self, rule: &HostRule) -> bool {
        let below = |wide: &HostRule, close: &HostRule| {
            let bare = Host::parse(close.name.trim_start_matches('.'));
            close.name != "*" && bare.is_ok_and(|host| wide.exactness(&host).is_some()) || wide.name == "*"
        };
        let open = self.hosts.iter().filter(|own| !own.is_closed());
        open.filter(|own| own.ports.iter().any(|port| rule.ports.contains(port)))
            .any(|own| below(own, rule) || below(rule, own))
    }

    /// Names of the credentials that its rules add.
    pub fn credentials(&self) -> impl Iterator<Item = &str> {
        self.hosts.iter().filter_map(|rule| rule.credential.as_deref())
    }

    /// The rules of the most exact name that fits, in the file's order.
    pub(super) fn speaking(&self, host: &Host, port: u16) -> Vec<&HostRule> {
        let fitting = self.hosts.iter().filter(|rule| rule.ports.contains(&port));
        let ranked: Vec<_> = fitting.filter_map(|rule| Some((rule.exactness(host)?, rule))).collect();
        let best = ranked.iter().map(|(rank, _)| *rank).max();
        ranked.into_iter().filter(|(rank, _)| Some(*rank) == best).map(|(_, rule)| rule).collect()
    }
}

impl HostRule {
    pub(super) fn canonical_name(&self) -> String {
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

    /// A rule that only keeps less exact ones from speaking for its host.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Closes it: what it adds is not for this step, and no less exact rule may speak in its stead.
    pub(super) fn close(&mut self) {
        (self.inspect, self.closed, self.credential) = (true, true, None);
        (self.cache, self.immutable, self.upgrade) = (false, Vec::new(), false);
    }

    /// Whether what is kept of such a request is never asked for again.
    fn holds_for_ever(&self, act: Act<'_>) -> bool {
        match act {
            Act::Connect => false,
            Act::Request { path, .. } => self.cache && self.immutable.iter().any(|glob| path.fits(glob)),
        }
    }
}

impl Layer {
    /// A rule by the key that it stands under and its name.
    fn rule_name(&self, rule: &HostRule) -> String {
        let key = self.egress_key();
        match &rule.set {
            Some(set) => format!("{key}.sets {set} {}", rule.name),
            None => {
                let own = self.egress.hosts.iter().position(|other| std::ptr::eq(other, rule)).unwrap_or(0);
                format!("{key}.host[{own}] {}", rule.name)
            }
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
/// [`Denial`] when a layer does not allow it; it says what would.
pub fn decide_egress(layers: &[Layer], ask: &EgressAsk<'_>) -> Result<Terms, Denial> {
    let mut terms: Option<Terms> = None;
    for (index, layer) in layers.iter().enumerate() {
        let rule = speaking_rule(layer, ask).map_err(|unmet| hint::denial(layers, index, ask, unmet))?;
        let name = layer.rule_name(rule);
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

/// Why a layer does not allow something.
enum Unmet<'a> {
    /// No rule speaks of the host and port.
    Unknown,
    /// What its rule adds is not for this step.
    Closed(&'a HostRule),
    /// Plain HTTP on the port of TLS.
    OnlyTls(&'a HostRule),
    /// No rule of the host has the method, the path or the query.
    Request(&'a HostRule),
    /// A credential would go over plain HTTP.
    Plain(&'a HostRule),
}

/// The rule of one layer that allows it.
fn speaking_rule<'a>(layer: &'a Layer, ask: &EgressAsk<'_>) -> Result<&'a HostRule, Unmet<'a>> {
    let EgressAsk { host, port, act } = *ask;
    let speaking = layer.egress.speaking(host, port);
    let open = speaking.iter().find(|rule| !rule.is_closed());
    let Some(first) = speaking.first().copied() else { return Err(Unmet::Unknown) };
    let Some(open) = open.copied() else { return Err(Unmet::Closed(first)) };
    match act {
        Act::Connect => Ok(open),
        Act::Request { secure: false, .. } if port == 443 => Err(Unmet::OnlyTls(open)),
        Act::Request { method, path, query, secure } => {
            let allows = |rule: &&HostRule| rule.allows(method, path, query);
            let rule = speaking.into_iter().find(allows).ok_or(Unmet::Request(open))?;
            match rule {
                // No other rule passes on what this one would have taken.
                rule if rule.is_closed() => Err(Unmet::Closed(rule)),
                rule if rule.credential.is_some() && !secure => Err(Unmet::Plain(rule)),
                rule => Ok(rule),
            }
        }
    }
}

/// Whether a request for a host over plain HTTP, on its usual port, is taken for one over TLS: the policy says so, and
/// then it is judged and sent as such.
pub fn is_upgraded(layers: &[Layer], host: &Host, port: u16) -> bool {
    let rules = layers.first().filter(|_| port == 80).map(|layer| layer.egress.speaking(host, 443));
    rules.unwrap_or_default().iter().any(|rule| rule.upgrade)
}

/// Answers people read hold at most this much of a path.
pub(super) fn shown(path: &str) -> &str {
    path.get(..200).unwrap_or(path)
}

/// What becomes of a request for a URL, as the gateway would decide it: the connection first, and the request too
/// where it is looked into.
///
/// # Errors
/// What is wrong with the URL, in words.
pub fn decide_url(layers: &[Layer], method: &str, url: &str) -> Result<Result<Terms, Denial>, String> {
    let (host, mut port, path, mut secure) = parse_url(url)?;
    if !secure && is_upgraded(layers, &host, port) {
        (port, secure) = (443, true);
    }
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
