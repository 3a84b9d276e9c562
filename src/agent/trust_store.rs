//! A trust store for Java: certificate authorities as an unencrypted PKCS#12 file, which every JDK since 8 reads as a
//! store of trusted certificates. It holds what is public anyway; no key is ever written here.

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// The password that is told to Java. Nothing is protected by it: some JDKs show no entry of a store without one.
pub const PASSWORD: &str = "changeit";

/// Contents of a message as they are (1.2.840.113549.1.7.1).
const DATA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x01];
/// A bag with a certificate (1.2.840.113549.1.12.10.1.3).
const CERT_BAG: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x0c, 0x0a, 0x01, 0x03];
/// A certificate of X.509 (1.2.840.113549.1.9.22.1).
const X509: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x16, 0x01];
/// An entry's name (1.2.840.113549.1.9.20).
const FRIENDLY_NAME: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x14];
/// Java's mark of a certificate that is trusted (2.16.840.1.113894.746875.1.1).
const TRUSTED_KEY_USAGE: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x86, 0xf9, 0x66, 0xad, 0xca, 0x7b, 0x01, 0x01];
/// For every purpose (2.5.29.37.0).
const ANY_USAGE: &[u8] = &[0x55, 0x1d, 0x25, 0x00];

const INTEGER: u8 = 0x02;
const OCTETS: u8 = 0x04;
const OID: u8 = 0x06;
const BMP_STRING: u8 = 0x1e;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
/// What is explicit under the number 0.
const EXPLICIT: u8 = 0xa0;

/// The store of all certificates of a text in PEM; what is none is left out.
pub fn pkcs12(pem: &str) -> Vec<u8> {
    let certificates = CertificateDer::pem_slice_iter(pem.as_bytes()).flatten();
    let bags: Vec<Vec<u8>> = certificates.enumerate().map(|(index, der)| bag(index, &der)).collect();
    let safe = der(SEQUENCE, &bags.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let safes = der(SEQUENCE, &[&content(&safe)]);
    der(SEQUENCE, &[&der(INTEGER, &[&[3]]), &content(&safes)])
}

/// A message that holds `data` as it is.
fn content(data: &[u8]) -> Vec<u8> {
    der(SEQUENCE, &[&der(OID, &[DATA]), &der(EXPLICIT, &[&der(OCTETS, &[data])])])
}

fn bag(index: usize, certificate: &[u8]) -> Vec<u8> {
    let certificate = der(EXPLICIT, &[&der(OCTETS, &[certificate])]);
    let certificate = der(EXPLICIT, &[&der(SEQUENCE, &[&der(OID, &[X509]), &certificate])]);
    let name: Vec<u8> = format!("ca-{index}").encode_utf16().flat_map(u16::to_be_bytes).collect();
    let attribute = |key: &[u8], value: Vec<u8>| der(SEQUENCE, &[&der(OID, &[key]), &der(SET, &[&value])]);
    // In a set the shorter one stands first.
    let name = attribute(FRIENDLY_NAME, der(BMP_STRING, &[&name]));
    let trusted = attribute(TRUSTED_KEY_USAGE, der(OID, &[ANY_USAGE]));
    let mut attributes = [name, trusted];
    attributes.sort();
    der(SEQUENCE, &[&der(OID, &[CERT_BAG]), &certificate, &der(SET, &[&attributes[0], &attributes[1]])])
}

/// One value: tag, length, content.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let bytes: usize = parts.iter().map(|part| part.len()).sum();
    let mut all = vec![tag];
    if bytes < 0x80 {
        all.push(bytes as u8);
    } else {
        let big = bytes.to_be_bytes();
        let used = &big[bytes.leading_zeros() as usize / 8..];
        all.push(0x80 | used.len() as u8);
        all.extend(used);
    }
    parts.iter().for_each(|part| all.extend(*part));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_as_short_as_they_can_be() {
        assert_eq!(der(OCTETS, &[]), [4, 0]);
        assert_eq!(der(OCTETS, &[&[7; 127]])[..2], [4, 127]);
        assert_eq!(der(OCTETS, &[&[7; 128]])[..3], [4, 0x81, 128]);
        assert_eq!(der(OCTETS, &[&[7; 200], &[7; 100]])[..4], [4, 0x82, 1, 44]);
    }

    #[test]
    fn every_certificate_is_in_it_and_nothing_else_of_the_text() {
        let made =
            |name: &str| rcgen::generate_simple_self_signed(vec![name.to_owned()]).expect("a certificate");
        let (one, two) = (made("one.example"), made("two.example"));
        let pem = format!("# words\n{}{}{}", one.cert.pem(), two.signing_key.serialize_pem(), two.cert.pem());
        let store = pkcs12(&pem);
        let holds = |part: &[u8]| store.windows(part.len()).any(|window| window == part);
        assert!(holds(one.cert.der()) && holds(two.cert.der()));
        assert!(!holds(&two.signing_key.serialize_der()));
        assert_eq!(store[0], SEQUENCE);
        assert_eq!(pkcs12("no certificate").len(), pkcs12("").len());
    }
}
