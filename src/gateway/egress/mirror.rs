//! What stands in for a host: another address that the administrator named in `[network.mirrors]`. The policy judges
//! the host that a cell asked for; only where the request then goes is another. It must never be taken from anything
//! but the configuration: its address is not checked.

use std::net::IpAddr;

use crate::policy::Host;
use crate::policy::egress::CanonicalPath;

/// A mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Whether it speaks TLS.
    pub secure: bool,
    /// Its host.
    pub host: Host,
    /// Its port.
    pub port: u16,
    /// What stands before each path, without a slash at its end.
    pub base: String,
}

impl Mirror {
    /// Reads the URL of a mirror, such as `https://mirror.example/npm`.
    ///
    /// # Errors
    /// What is wrong with it, in words that do not repeat it: somebody may have put a password there.
    pub fn parse(url: &str) -> Result<Self, String> {
        let (secure, rest) = match (url.strip_prefix("https://"), url.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            (None, None) => return Err("is no URL that begins with http:// or https://".into()),
        };
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        if authority.contains('@') {
            return Err("holds a user name: name a credential in the rule of the policy instead".into());
        }
        if url.contains(['?', '#']) {
            return Err("holds a query: only a path can stand before the paths of requests".into());
        }
        let has_port = authority.rsplit(']').next().is_some_and(|rest| rest.contains(':'));
        let parsed = if has_port {
            Host::parse_with_port(authority)
        } else {
            Host::parse(authority).map(|host| (host, if secure { 443 } else { 80 }))
        };
        let (host, port) = parsed.map_err(|error| format!("its host {error}"))?;
        let base = path.trim_end_matches('/');
        let base = match base {
            "" => String::new(),
            base => CanonicalPath::parse(base).map_err(str::to_owned)?.as_str().to_owned(),
        };
        Ok(Self { secure, host, port, base })
    }

    /// Whether what is sent to it in plain text stays on this machine.
    pub(super) fn is_local(&self) -> bool {
        match &self.host {
            Host::Address(IpAddr::V4(v4)) => v4.is_loopback(),
            Host::Address(IpAddr::V6(v6)) => v6.is_loopback(),
            Host::Name(name) => name == "localhost",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_is_a_url_without_anything_odd() {
        let mirror = Mirror::parse("http://127.0.0.1:8081/npm/").unwrap();
        assert_eq!((mirror.secure, mirror.port, mirror.base.as_str()), (false, 8081, "/npm"));
        assert!(mirror.is_local());
        let mirror = Mirror::parse("https://Mirror.example").unwrap();
        assert_eq!((mirror.host.to_string(), mirror.port), ("mirror.example".into(), 443));
        assert!(mirror.secure && mirror.base.is_empty() && !mirror.is_local());
        assert_eq!(Mirror::parse("http://[::1]").unwrap().port, 80);
        for bad in [
            "mirror.example",
            "ftp://a.example",
            "https://",
            "https://me:hunter2@a.example/",
            "https://a.example/x?y",
            "https://a.example/#x",
            "https://a.example/../x",
            "http://a.example:0/",
            "http://0x7f.1/",
        ] {
            let error = Mirror::parse(bad).expect_err(bad);
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
