//! The words of a refusal: what was asked, which line refused it, and which line would open it. Words only: nothing
//! is decided here.

use super::check::is_private;
use super::{Act, EgressAsk, Host, Unmet, shown};
use crate::policy::Plan;
use crate::policy::decide::Denial;
use crate::policy::narrow::Layer;

/// The refusal of the layer at `index`.
pub(super) fn denial(layers: &[Layer], index: usize, ask: &EgressAsk<'_>, unmet: Unmet<'_>) -> Denial {
    let (layer, EgressAsk { host, port, act }) = (&layers[index], *ask);
    let (rule, said, opens) = match unmet {
        Unmet::Unknown => {
            let said = format!("{host}:{port} is not among the hosts that may be reached");
            (layer.egress_key(), said, opening(layers, index, host, port))
        }
        Unmet::Closed(rule) => {
            let said = format!("{host} is closed to this step: what it needs is added by a credential");
            (layer.rule_name(rule), said, None)
        }
        Unmet::OnlyTls(rule) => (layer.rule_name(rule), format!("{host}:443 speaks TLS only"), None),
        Unmet::Plain(rule) => {
            let said = format!("what goes to {host} with a credential must go through TLS");
            (layer.rule_name(rule), said, None)
        }
        Unmet::Request(rule) => {
            let (method, path) = match act {
                Act::Connect => ("CONNECT", ""),
                Act::Request { method, path, .. } => (method, path.as_str()),
            };
            let query = matches!(act, Act::Request { query: Some(_), .. }) && rule.queries.is_some();
            let with = if query { " with this query" } else { "" };
            let said = format!("{method} {}{with} is not allowed at {host}", shown(path));
            let opens = match &rule.set {
                Some(set) => format!(
                    "{} opens no more than it names: a [[{}.host]] of its own would",
                    set,
                    layer.egress_key()
                ),
                None => "`methods`, `paths` and `queries` of that rule say what is".to_owned(),
            };
            (layer.rule_name(rule), said, Some(opens))
        }
    };
    let opens = opens.map(|words| format!(": {words}")).unwrap_or_default();
    let reason = format!("{said} ({}, rule {rule}){opens}", whose(layers, index));
    Denial { rule, reason }
}

impl Plan {
    /// Why nothing can be reached at all, and what would change that; none where something can.
    pub fn nothing_is_open(&self) -> Option<String> {
        let index = self.layers.iter().position(|layer| layer.egress.is_empty())?;
        let (key, place) = (self.layers[index].egress_key(), place(&self.layers, index));
        let words = format!(
            "nothing can be reached: [{key}] {place} opens no host; `sets = [\"…\"]` or [[{key}.host]] there would \
             (`hotcell policy sets` lists the sets)"
        );
        Some(words)
    }
}

/// Whose word a layer is.
fn whose(layers: &[Layer], index: usize) -> String {
    let layer = &layers[index];
    if layer.is_of_the_job() { "the job".to_owned() } else { format!("policy {}", layer.name) }
}

/// Where its lines stand.
fn place(layers: &[Layer], index: usize) -> String {
    let (layer, name) = (&layers[index], &layers[index].name);
    match index {
        _ if layer.is_of_the_job() => format!("of the job's own {}", layer.egress_key()),
        0 => format!("of the policy {name}"),
        _ => format!("of your own file {name}"),
    }
}

/// What would open a host that no rule of the layer names, where anything would.
fn opening(layers: &[Layer], index: usize, host: &Host, port: u16) -> Option<String> {
    if is_private(host) {
        return None;
    }
    let layer = &layers[index];
    let (key, place) = (layer.egress_key(), place(layers, index));
    let known = layers.first().and_then(|first| {
        first.known_sets.iter().find(|(_, hosts)| hosts.iter().any(|known| has(known, host, port)))
    });
    if layer.is_of_the_job() {
        let wanted = known.map_or_else(|| host.to_string(), |(set, _)| set.clone());
        return Some(format!("`{wanted}` among the names {place} would open it"));
    }
    if let Some((set, _)) = known {
        return Some(format!("`sets = [{set:?}]` under [{key}] {place} would open it"));
    }
    let other = layer.egress.hosts.iter().find(|rule| rule.canonical_name() == host.to_string());
    if let Some(rule) = other {
        return Some(format!("`ports = [{port}]` in {} would open it", layer.rule_name(rule)));
    }
    let ports = if port == 443 { String::new() } else { format!(", ports = [{port}]") };
    Some(format!("[[{key}.host]] name = \"{host}\"{ports} {place} would open it"))
}

/// Whether `known`, as `name:port`, is or covers the host.
fn has(known: &str, host: &Host, port: u16) -> bool {
    let Some((name, of_set)) = known.rsplit_once(':') else { return false };
    let below = |host: &str| name.starts_with('.') && (host.ends_with(name) || host == &name[1..]);
    of_set == port.to_string() && (name == host.to_string() || host.name().is_some_and(below))
}
