//! Which registry to ask, and by which way: settings of hotcell, npm and the environment as one value.
//!
//! Never keeps a user name or password of a registry address, and never shows one of a proxy.

use std::path::Path;

use hyper::Uri;

use super::NpmError;

/// The public registry.
pub const DEFAULT_REGISTRY: &str = "https://registry.npmjs.org/";

/// A registry address that was checked: https, or http to this machine.
#[derive(Clone, PartialEq, Eq)]
pub struct Registry {
    /// Without trailing slash.
    base: String,
    host: String,
    /// `host:port` of an HTTP proxy for CONNECT, with an optional `user:password`.
    proxy: Option<Proxy>,
}

#[derive(Clone, PartialEq, Eq)]
pub(super) struct Proxy {
    pub(super) uri: Uri,
    pub(super) userinfo: Option<String>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("host", &self.host).field("proxy", &self.proxy.is_some()).finish()
    }
}

impl Registry {
    /// The registry this machine is set up for: `HOTCELL_NPM_REGISTRY`, `npm_config_registry`, `registry=` of
    /// `~/.npmrc` and `/etc/npmrc`, else the public one; with the proxy of `HTTPS_PROXY`/`NO_PROXY`.
    pub fn from_environment() -> Result<Self, NpmError> {
        let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".npmrc"));
        let read = |path: &Path| std::fs::read_to_string(path).ok();
        let files =
            [("~/.npmrc", home.as_deref().and_then(read)), ("/etc/npmrc", read(Path::new("/etc/npmrc")))];
        Self::from_settings(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()), &files)
    }

    /// As [`Registry::from_environment`], from given variables and npmrc texts.
    pub fn from_settings(
        variable: &dyn Fn(&str) -> Option<String>,
        npmrc: &[(&str, Option<String>)],
    ) -> Result<Self, NpmError> {
        let named = |name: &str| variable(name).map(|value| (name.to_owned(), value));
        let from_file = || {
            npmrc.iter().find_map(|(name, text)| {
                let value = registry_of_npmrc(text.as_deref()?, variable)?;
                Some(((*name).to_owned(), value))
            })
        };
        let (origin, address) = named("HOTCELL_NPM_REGISTRY")
            .or_else(|| named("npm_config_registry"))
            .or_else(from_file)
            .unwrap_or_else(|| ("the default".to_owned(), DEFAULT_REGISTRY.to_owned()));
        let mut registry = Self::parse(&address).map_err(|why| NpmError::Registry { origin, why })?;
        registry.proxy = proxy_for(&registry.host, variable);
        Ok(registry)
    }

    /// Checks one address; no proxy.
    pub fn parse(address: &str) -> Result<Self, &'static str> {
        let base = address.trim().trim_end_matches('/').to_owned();
        let uri: Uri = base.parse().map_err(|_| "not an address")?;
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err("it holds a user name or password");
        }
        if uri.query().is_some() {
            return Err("it holds a query");
        }
        safe_scheme(&uri)?;
        let host = uri.host().ok_or("it names no host")?.to_owned();
        Ok(Self { base, host, proxy: None })
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.base)
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn proxy(&self) -> Option<&Proxy> {
        self.proxy.as_ref()
    }

    /// Whether the registry itself is a plain server on this machine; its tarballs may then be too.
    pub(super) fn is_plain(&self) -> bool {
        self.base.starts_with("http://")
    }
}

/// https anywhere, http to this machine only: a digest that came over a plain connection proves nothing.
pub(super) fn safe_scheme(uri: &Uri) -> Result<(), &'static str> {
    match (uri.scheme_str(), uri.host()) {
        (Some("https"), Some(_)) => Ok(()),
        (Some("http"), Some("127.0.0.1" | "[::1]" | "localhost")) => Ok(()),
        (Some("http"), Some(_)) => Err("it is plain http to another machine"),
        _ => Err("it is neither https nor http"),
    }
}

/// The last `registry=` line; `${NAME}` is replaced as npm does.
fn registry_of_npmrc(text: &str, variable: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    let value = text.lines().rev().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        (key.trim() == "registry").then(|| value.trim().trim_matches('"').to_owned())
    })?;
    match (value.find("${"), value.find('}')) {
        (Some(start), Some(end)) if start < end => {
            let name = value.get(start + 2..end)?;
            Some(format!("{}{}{}", value.get(..start)?, variable(name)?, value.get(end + 1..)?))
        }
        _ => Some(value),
    }
}

fn proxy_for(host: &str, variable: &dyn Fn(&str) -> Option<String>) -> Option<Proxy> {
    let any = |names: &[&str]| names.iter().find_map(|name| variable(name));
    let skip = any(&["NO_PROXY", "no_proxy"]).unwrap_or_default();
    if matches!(host, "localhost" | "127.0.0.1" | "[::1]") || skipped(host, &skip) {
        return None;
    }
    let address = any(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])?;
    let address = if address.contains("://") { address } else { format!("http://{address}") };
    let uri: Uri = address.parse().ok()?;
    if uri.scheme_str() != Some("http") {
        tracing::warn!("HTTPS_PROXY is not an http proxy; going direct");
        return None;
    }
    let authority = uri.authority()?.as_str();
    let (userinfo, place) = match authority.rsplit_once('@') {
        Some((user, place)) => (Some(user.to_owned()), place.to_owned()),
        None => (None, authority.to_owned()),
    };
    Some(Proxy { uri: format!("http://{place}").parse().ok()?, userinfo })
}

fn skipped(host: &str, no_proxy: &str) -> bool {
    no_proxy.split(',').map(|rule| rule.trim().trim_start_matches("*.").trim_start_matches('.')).any(|rule| {
        rule == "*" || (!rule.is_empty() && (host == rule || host.ends_with(&format!(".{rule}"))))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)], npmrc: &[(&str, Option<String>)]) -> Result<Registry, NpmError> {
        let lookup = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        Registry::from_settings(&lookup, npmrc)
    }

    #[test]
    fn settings_are_taken_in_their_order() {
        let home = ("~/.npmrc", Some("fund=false\nregistry = https://home.test/npm/\n".to_owned()));
        let etc = ("/etc/npmrc", Some("registry=https://${PLACE}/\n".to_owned()));
        let all = [("HOTCELL_NPM_REGISTRY", "https://own.test"), ("npm_config_registry", "https://npm.test")];
        let url = |result: Result<Registry, NpmError>| result.map(|registry| registry.url("x")).unwrap();
        assert_eq!(url(with(&all, std::slice::from_ref(&home))), "https://own.test/x");
        assert_eq!(url(with(&all[1..], std::slice::from_ref(&home))), "https://npm.test/x");
        assert_eq!(url(with(&[], &[home, etc.clone()])), "https://home.test/npm/x");
        assert_eq!(url(with(&[("PLACE", "etc.test")], &[etc])), "https://etc.test/x");
        assert_eq!(url(with(&[], &[])), format!("{DEFAULT_REGISTRY}x"));
    }

    #[test]
    fn an_unusable_address_names_its_origin_and_not_its_password() {
        for address in ["http://far.test/", "ftp://far.test", "https://me:secret@far.test/", "::"] {
            let error = with(&[("npm_config_registry", address)], &[]).unwrap_err().to_string();
            assert!(error.contains("npm_config_registry"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
        assert!(with(&[("npm_config_registry", "http://127.0.0.1:4873/")], &[]).is_ok());
    }

    #[test]
    fn the_proxy_is_used_unless_the_host_is_exempt() {
        let proxy = ("HTTPS_PROXY", "http://u:p@proxy.test:3128");
        let chosen = with(&[proxy], &[]).unwrap();
        assert_eq!(chosen.proxy().unwrap().uri.to_string(), "http://proxy.test:3128/");
        assert!(!format!("{chosen:?}").contains("proxy.test"));
        assert!(with(&[proxy, ("NO_PROXY", "a.test, .npmjs.org")], &[]).unwrap().proxy().is_none());
        assert!(with(&[proxy, ("NO_PROXY", "js.org")], &[]).unwrap().proxy().is_some());
    }
}
