//! A host in its one canonical form: what is decided, resolved, compared with the TLS name and dialled is this
//! value. It must never hold a spelling that two programs could read as two hosts: such a spelling is refused.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// Longest name, in bytes.
const NAME_BYTES_MAX: usize = 253;
/// Longest part of a name, in bytes.
const LABEL_BYTES_MAX: usize = 63;

/// A host: a name in lower case without a final dot, or an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Host {
    /// A DNS name.
    Name(String),
    /// An address, spelled in the usual way only.
    Address(IpAddr),
}

/// A text that is no host, or that could be read as two.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// No text.
    #[error("is empty")]
    Empty,
    /// Longer than DNS allows.
    #[error("is longer than a DNS name can be")]
    Long,
    /// A character that no name has.
    #[error("holds a character that no host name has; write names of other scripts in their xn-- form")]
    Character,
    /// An empty part, or one with `-` at its end.
    #[error("is not a DNS name: its parts have 1 to 63 characters and '-' only between others")]
    Label,
    /// `127.1`, `0x7f.1`, `2130706433`.
    #[error("is an unusual spelling of an address; write four decimal numbers without leading zeros")]
    Number,
    /// Brackets around something else than an IPv6 address.
    #[error("is not an IPv6 address")]
    Ipv6,
}

impl Host {
    /// Reads a host as it stands in a URL or in a request: an IPv6 address in brackets.
    ///
    /// # Errors
    /// [`HostError`] for everything that has not exactly one reading.
    pub fn parse(text: &str) -> Result<Self, HostError> {
        if text.is_empty() {
            return Err(HostError::Empty);
        }
        if let Some(inner) = text.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or(HostError::Ipv6)?;
            let address: Ipv6Addr = inner.parse().map_err(|_| HostError::Ipv6)?;
            return Ok(Self::Address(IpAddr::V6(address)));
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        if name.len() > NAME_BYTES_MAX {
            return Err(HostError::Long);
        }
        let known = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if !name.bytes().all(known) {
            return Err(HostError::Character);
        }
        let name = name.to_ascii_lowercase();
        for label in name.split('.') {
            let bad = label.is_empty() || label.len() > LABEL_BYTES_MAX;
            if bad || label.starts_with('-') || label.ends_with('-') {
                return Err(HostError::Label);
            }
        }
        // What ends in a number is an address for every resolver, in one of many spellings.
        let last = name.rsplit('.').next().unwrap_or_default();
        let hex = last.strip_prefix("0x").is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_hexdigit()));
        if hex || last.bytes().all(|b| b.is_ascii_digit()) {
            let strict = if text.ends_with('.') { None } else { name.parse::<Ipv4Addr>().ok() };
            return strict.map(|a| Self::Address(IpAddr::V4(a))).ok_or(HostError::Number);
        }
        Ok(Self::Name(name))
    }

    /// Host and port of an authority such as `example.com:443`. No user, no default port.
    ///
    /// # Errors
    /// [`HostError`]; a port that is missing, zero or oddly spelled is [`HostError::Character`].
    pub fn parse_with_port(text: &str) -> Result<(Self, u16), HostError> {
        let (host, port) = text.rsplit_once(':').ok_or(HostError::Character)?;
        Ok((Self::parse(host)?, parse_port(port).ok_or(HostError::Character)?))
    }

    /// The name, where it is one.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Name(name) => Some(name),
            Self::Address(_) => None,
        }
    }

    /// As it stands in a `Host` header, without the scheme's own port.
    pub fn authority(&self, port: u16, usual: u16) -> String {
        if port == usual { self.to_string() } else { format!("{self}:{port}") }
    }
}

/// A port in plain decimal digits.
pub(super) fn parse_port(text: &str) -> Option<u16> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    if plain { text.parse().ok() } else { None }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

impl TryFrom<String> for Host {
    type Error = HostError;

    fn try_from(text: String) -> Result<Self, HostError> {
        Self::parse(&text)
    }
}

impl From<Host> for String {
    fn from(host: Host) -> Self {
        host.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_spelling_that_could_be_two_hosts_is_refused() {
        for (text, error) in [
            ("", HostError::Empty),
            (".", HostError::Label),
            ("a..b", HostError::Label),
            ("a.b..", HostError::Label),
            (".a", HostError::Label),
            ("-a.b", HostError::Label),
            ("a\0.evil.com", HostError::Character),
            ("a.com\0", HostError::Character),
            ("a%2ecom", HostError::Character),
            ("a.com@evil.com", HostError::Character),
            ("a.com/evil", HostError::Character),
            ("a.com#", HostError::Character),
            ("a com", HostError::Character),
            ("bücher.de", HostError::Character),
            ("１２７.0.0.1", HostError::Character),
            ("example。com", HostError::Character),
            ("127.1", HostError::Number),
            ("127.0.0.1.", HostError::Number),
            ("0x7f.0.0.1", HostError::Number),
            ("0x7f000001", HostError::Number),
            ("a.0x7f", HostError::Number),
            ("127.0.0.0x1", HostError::Number),
            ("0177.0.0.1", HostError::Number),
            ("127.0.0.01", HostError::Number),
            ("2130706433", HostError::Number),
            ("1.2.3.4.5", HostError::Number),
            ("256.0.0.1", HostError::Number),
            ("evil.com.1", HostError::Number),
            ("::1", HostError::Character),
            ("[::1", HostError::Ipv6),
            ("[::1%lo]", HostError::Ipv6),
            ("[127.0.0.1]", HostError::Ipv6),
        ] {
            assert_eq!(Host::parse(text), Err(error), "{text:?}");
        }
        assert_eq!(Host::parse(&"a.".repeat(130)), Err(HostError::Long));
    }

    #[test]
    fn one_host_has_one_value() {
        for (text, canonical) in [
            ("PyPI.org", "pypi.org"),
            ("pypi.org.", "pypi.org"),
            ("xn--bcher-kva.DE", "xn--bcher-kva.de"),
            ("127.0.0.1", "127.0.0.1"),
            ("[0:0::1]", "[::1]"),
            ("[::FFFF:127.0.0.1]", "[::ffff:127.0.0.1]"),
            ("a.0xyz", "a.0xyz"),
        ] {
            assert_eq!(Host::parse(text).expect(text).to_string(), canonical);
        }
        assert_eq!(Host::parse_with_port("A.b:443"), Ok((Host::Name("a.b".into()), 443)));
        for bad in ["a.b", "a.b:", "a.b:0", "a.b:+1", "a.b:65536", "a.b:0443", "u@a.b:1", "a.b:443:443"] {
            assert!(Host::parse_with_port(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_written_and_read_as_the_same(text in ".{0,40}") {
            if let Ok(host) = Host::parse(&text) {
                prop_assert_eq!(Host::parse(&host.to_string()), Ok(host));
            }
        }

        #[test]
        fn every_address_is_read_only_in_its_usual_spelling(bits in any::<u32>()) {
            let address = Ipv4Addr::from(bits);
            prop_assert_eq!(Host::parse(&address.to_string()), Ok(Host::Address(address.into())));
            for odd in [bits.to_string(), format!("0x{bits:x}"), format!("{address}.")] {
                prop_assert!(Host::parse(&odd).is_err());
            }
        }

        #[test]
        fn case_and_a_final_dot_make_no_difference(name in "[a-z][a-z0-9]{0,8}(\\.[a-z][a-z0-9]{0,8}){1,3}") {
            let plain = Host::parse(&name).expect("a name");
            prop_assert_eq!(&Host::parse(&name.to_uppercase()).expect("upper case"), &plain);
            prop_assert_eq!(&Host::parse(&format!("{name}.")).expect("final dot"), &plain);
        }
    }
}
