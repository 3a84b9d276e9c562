//! `[network]`: how the daemon reaches the internet where a corporate proxy stands before it. With a proxy, names are
//! still decided here, but their addresses are looked up and checked by the proxy. `[network.mirrors]`: what stands in
//! for hosts; addresses named there are not checked.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use super::raw::{Layers, Opt};
use super::{ConfigError, absolute};
use crate::gateway::egress::Mirror;
use crate::policy::Host;

/// Most mirrors.
const MIRRORS_MAX: usize = 256;

/// The way to the internet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    /// Host and port of the proxy, through which the model and all hosts of egress are reached by CONNECT.
    pub proxy: Option<(String, u16)>,
    /// Hosts that are reached without it: names, `.suffix`es and addresses. Loopback always is.
    pub no_proxy: Vec<String>,
    /// Further certificate authorities, in PEM: for the model, for egress and in the cells.
    pub ca_file: Option<PathBuf>,
    /// What stands in for hosts of egress, by their names.
    pub mirrors: BTreeMap<String, Mirror>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawNetwork {
    proxy: Opt<String>,
    no_proxy: Opt<Vec<String>>,
    ca_file: Opt<String>,
    mirrors: BTreeMap<String, Spanned<String>>,
}

impl Network {
    pub(super) fn read(layers: &Layers<'_>, raw: &RawNetwork) -> Result<Self, ConfigError> {
        Ok(Self {
            proxy: layers.checked("network.proxy", &raw.proxy, parse_proxy)?,
            no_proxy: layers
                .list("network.no_proxy", &raw.no_proxy, ',', parse_exception)?
                .unwrap_or_default(),
            ca_file: layers.checked("network.ca_file", &raw.ca_file, absolute)?,
            mirrors: mirrors(layers, &raw.mirrors)?,
        })
    }
}

fn mirrors(
    layers: &Layers<'_>,
    raw: &BTreeMap<String, Spanned<String>>,
) -> Result<BTreeMap<String, Mirror>, ConfigError> {
    let mut mirrors = BTreeMap::new();
    for (name, url) in raw {
        let wrong = |problem: String| ConfigError::Entry {
            origin: layers.place(url),
            key: format!("network.mirrors.{name:?}"),
            problem,
        };
        let host = Host::parse(name)
            .map_err(|error| wrong(format!("is no host that a mirror can stand in for: it {error}")))?;
        let mirror = Mirror::parse(url.get_ref()).map_err(|problem| wrong(format!("the URL {problem}")))?;
        if mirrors.len() == MIRRORS_MAX {
            return Err(wrong(format!("is one too many: at most {MIRRORS_MAX} mirrors are read")));
        }
        if mirrors.insert(host.to_string(), mirror).is_some() {
            return Err(wrong("stands twice, in two spellings".into()));
        }
    }
    Ok(mirrors)
}

fn parse_proxy(text: &str) -> Result<(String, u16), String> {
    // A URL with a password in it must not be repeated.
    if text.contains('@') {
        return Err("the URL holds a user name; a proxy that asks for one is not supported".into());
    }
    let wrong = || format!("{text:?} is not the address of a proxy, such as http://proxy.example.com:3128");
    let rest = text.strip_prefix("http://").ok_or_else(wrong)?;
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
    let port: u16 = port.parse().ok().filter(|port| *port > 0).ok_or_else(wrong)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.[]:".contains(c);
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.is_empty() || !host.chars().all(plain) || (host.contains(':') && !bracketed) {
        return Err(wrong());
    }
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok((host.to_owned(), port))
}

fn parse_exception(text: &str) -> Result<String, String> {
    let text = text.trim().to_ascii_lowercase();
    // `*.example.com` is how others write it.
    let text = text.strip_prefix("*.").map(|bare| format!(".{bare}")).unwrap_or(text);
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    if text != "*" && (text.is_empty() || !text.chars().all(plain)) {
        return Err(format!("{text:?} is neither a host nor a .suffix"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_has_a_host_and_a_port() {
        assert_eq!(parse_proxy("http://proxy.example:3128"), Ok(("proxy.example".into(), 3128)));
        assert_eq!(parse_proxy("http://[::1]:80/"), Ok(("::1".into(), 80)));
        for bad in [
            "proxy:3128",
            "https://proxy:1",
            "http://proxy",
            "http://proxy:0",
            "http://:1",
            "http://a b:1",
            "http://a:b:1",
        ] {
            assert!(parse_proxy(bad).is_err(), "{bad}");
        }
        let error = parse_proxy("http://me:secret@proxy:3128").expect_err("a password");
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn exceptions_are_hosts_and_suffixes() {
        assert_eq!(parse_exception(" *.Corp.example"), Ok(".corp.example".into()));
        assert_eq!(parse_exception("10.1.2.3"), Ok("10.1.2.3".into()));
        assert!(parse_exception("http://x").is_err() && parse_exception("").is_err());
    }
}
