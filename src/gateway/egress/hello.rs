//! The beginning of a TLS connection, read without touching it: which name does the client ask for? Pure, and
//! fed with whatever a cell sends. It must never panic, never ask for more than a fixed number of bytes, and
//! never give a name that a server would read differently.

use crate::policy::Host;

/// Most bytes that are read for a ClientHello; real ones have 0.3 to 2 KiB.
pub const HELLO_BYTES_MAX: usize = 16 << 10;
/// Content type of a handshake record.
const HANDSHAKE: u8 = 22;
/// Longest record that TLS allows.
const RECORD_BYTES_MAX: usize = 16 << 10;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
/// `encrypted_client_hello`: the real name would be hidden from us.
const ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;

/// What the bytes so far say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peek {
    /// Not enough yet.
    More,
    /// A whole ClientHello, with the name it asks for.
    Hello(Option<Host>),
}

/// Why these bytes are no connection that may pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Not TLS.
    #[error("this is no TLS; through CONNECT only TLS passes")]
    NotTls,
    /// Broken, or more than one name.
    #[error("the ClientHello is malformed")]
    Malformed,
    /// Longer than [`HELLO_BYTES_MAX`].
    #[error("the ClientHello is too long")]
    Long,
    /// The name is hidden.
    #[error("the ClientHello is encrypted (ECH), so nobody can see which host it is for")]
    Encrypted,
}

/// Looks into the first bytes of a connection.
///
/// # Errors
/// [`HelloError`].
pub fn peek(bytes: &[u8]) -> Result<Peek, HelloError> {
    let mut hello = Vec::new();
    let mut rest = bytes;
    loop {
        let message = match whole_message(&hello)? {
            Some(message) => return parse(message).map(Peek::Hello),
            None if bytes.len() >= HELLO_BYTES_MAX => return Err(HelloError::Long),
            None => record(rest)?,
        };
        let Some((payload, after)) = message else { return Ok(Peek::More) };
        hello.extend_from_slice(payload);
        rest = after;
    }
}

/// A record's payload, and what comes after it.
type Record<'a> = (&'a [u8], &'a [u8]);

/// One record: its payload, and what comes after it. A record that is not whole gives none, but a wrong one is
/// an error at its first wrong byte.
fn record(bytes: &[u8]) -> Result<Option<Record<'_>>, HelloError> {
    let wrong = |at: usize, good: fn(u8) -> bool| bytes.get(at).is_some_and(|byte| !good(*byte));
    if wrong(0, |b| b == HANDSHAKE) || wrong(1, |b| b == 3) || wrong(2, |b| b <= 4) {
        return Err(HelloError::NotTls);
    }
    let [_, _, _, high, low, rest @ ..] = bytes else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    if length == 0 || length > RECORD_BYTES_MAX {
        return Err(HelloError::Malformed);
    }
    Ok(rest.split_at_checked(length))
}

/// The body of the handshake message, once it is whole.
fn whole_message(bytes: &[u8]) -> Result<Option<&[u8]>, HelloError> {
    if bytes.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
        return Err(HelloError::NotTls);
    }
    let [_, a, b, c, rest @ ..] = bytes else { return Ok(None) };
    let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
    if length > HELLO_BYTES_MAX {
        return Err(HelloError::Long);
    }
    if rest.len() > length {
        return Err(HelloError::Malformed);
    }
    Ok((rest.len() == length).then_some(rest))
}

/// A piece of bytes that is taken apart from the front.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], HelloError> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(HelloError::Malformed)?;
        self.0 = rest;
        Ok(head)
    }

    fn number(&mut self, bytes: usize) -> Result<usize, HelloError> {
        Ok(self.take(bytes)?.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    /// What stands behind its length.
    fn counted(&mut self, length_bytes: usize) -> Result<&'a [u8], HelloError> {
        let length = self.number(length_bytes)?;
        self.take(length)
    }
}

fn parse(message: &[u8]) -> Result<Option<Host>, HelloError> {
    let mut bytes = Bytes(message);
    bytes.take(2 + 32)?; // version, random
    bytes.counted(1)?; // session id
    bytes.counted(2)?; // cipher suites
    bytes.counted(1)?; // compressions
    if bytes.0.is_empty() {
        return Ok(None);
    }
    let mut extensions = Bytes(bytes.counted(2)?);
    if !bytes.0.is_empty() {
        return Err(HelloError::Malformed);
    }
    let mut name = None;
    while !extensions.0.is_empty() {
        let kind = extensions.number(2)? as u16;
        let body = extensions.counted(2)?;
        match kind {
            ENCRYPTED_CLIENT_HELLO => return Err(HelloError::Encrypted),
            SERVER_NAME if name.is_some() => return Err(HelloError::Malformed),
            SERVER_NAME => name = Some(server_name(body)?),
            _ => {}
        }
    }
    Ok(name)
}

/// Exactly one host name.
fn server_name(body: &[u8]) -> Result<Host, HelloError> {
    let mut bytes = Bytes(body);
    let mut list = Bytes(bytes.counted(2)?);
    let kind = list.number(1)?;
    let name = list.counted(2)?;
    if kind != 0 || !list.0.is_empty() || !bytes.0.is_empty() || name.ends_with(b".") {
        return Err(HelloError::Malformed);
    }
    let name = std::str::from_utf8(name).map_err(|_| HelloError::Malformed)?;
    Host::parse(name).map_err(|_| HelloError::Malformed)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    /// What rustls sends for a name.
    pub(in crate::gateway::egress) fn real(name: &str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let name = rustls::pki_types::ServerName::try_from(name.to_owned()).unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    /// A hello with these extensions.
    fn made(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let counted = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
        let all: Vec<u8> = extensions
            .iter()
            .flat_map(|(kind, body)| [kind.to_be_bytes().to_vec(), counted(body)].concat())
            .collect();
        let body = [&[3, 3][..], &[7; 32], &[0], &counted(&[0x13, 1]), &[1, 0], &counted(&all)].concat();
        let message = [&[1][..], &(body.len() as u32).to_be_bytes()[1..], &body].concat();
        [&[22, 3, 1][..], &counted(&message)].concat()
    }

    fn sni(name: &[u8]) -> (u16, Vec<u8>) {
        let one = [&[0][..], &(name.len() as u16).to_be_bytes(), name].concat();
        (0, [&(one.len() as u16).to_be_bytes()[..], &one].concat())
    }

    #[test]
    fn the_name_of_a_real_hello_is_found_however_it_is_cut() {
        let bytes = real("pypi.org");
        let name = Host::parse("pypi.org").unwrap();
        assert_eq!(peek(&bytes), Ok(Peek::Hello(Some(name.clone()))));
        for cut in 0..bytes.len() {
            assert_eq!(peek(&bytes[..cut]), Ok(Peek::More), "{cut}");
        }
        assert_eq!(peek(&real("9.9.9.9")), Ok(Peek::Hello(None)));
        // Several records, as short as one byte.
        let split: Vec<u8> = bytes[5..].iter().flat_map(|byte| [22, 3, 1, 0, 1, *byte]).collect();
        assert_eq!(peek(&split), Ok(Peek::Hello(Some(name))));
    }

    #[test]
    fn what_is_not_tls_is_seen_at_once() {
        for bytes in [&b"G"[..], b"SSH-2.0-x", b"\x16\x02", b"\x16\x03\x05", b"\x17\x03\x03", b"\0"] {
            assert_eq!(peek(bytes), Err(HelloError::NotTls), "{bytes:?}");
        }
        assert_eq!(peek(b"\x16\x03\x01\0\x01\x02"), Err(HelloError::NotTls), "another handshake message");
        assert_eq!(peek(b"\x16\x03\x01\0\0"), Err(HelloError::Malformed));
    }

    #[test]
    fn a_name_that_could_be_read_twice_is_refused() {
        let host = |name: &str| Ok(Peek::Hello(Some(Host::parse(name).unwrap())));
        assert_eq!(peek(&made(&[sni(b"A.example")])), host("a.example"));
        assert_eq!(peek(&made(&[(99, vec![1])])), Ok(Peek::Hello(None)));
        let mut two_names = sni(b"a.example").1;
        two_names.extend_from_slice(&sni(b"b.example").1[2..]);
        let length = (two_names.len() - 2) as u16;
        two_names[..2].copy_from_slice(&length.to_be_bytes());
        for bad in [
            vec![sni(b"a.example"), sni(b"b.example")],
            vec![(0, two_names)],
            vec![sni(b"a.example\0.evil.com")],
            vec![sni(b"a.example.")],
            vec![sni(b"127.0.0.1.5")],
            vec![sni(b"")],
            vec![(0, vec![])],
            vec![(0, vec![0, 5, 0, 0, 9, 1, 1])],
        ] {
            assert_eq!(peek(&made(&bad)), Err(HelloError::Malformed), "{bad:?}");
        }
        assert_eq!(peek(&made(&[sni(b"a.example"), (0xfe0d, vec![0])])), Err(HelloError::Encrypted));
    }

    #[test]
    fn a_hello_without_end_is_cut_off() {
        let mut endless = vec![22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xff];
        endless.resize(HELLO_BYTES_MAX, 0);
        assert_eq!(peek(&endless), Err(HelloError::Long));
        assert_eq!(peek(&[22, 3, 1, 0, 5, 1, 0xff, 0xff, 0xff, 0]), Err(HelloError::Long));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = peek(&bytes);
            let _ = peek(&[&[22, 3, 1, 0, 200, 1, 0, 0, 196][..], &bytes].concat());
        }

        #[test]
        fn a_changed_byte_never_gives_more_than_a_name(at in 0usize..600, value in any::<u8>()) {
            let mut bytes = real("pypi.org");
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = peek(&bytes);
        }
    }
}
