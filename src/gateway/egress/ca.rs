//! A certificate authority that one cell trusts and nobody else: with it TLS of inspected hosts is taken apart.
//! Its key must never leave this process but into the cell's private directory on the host, which no cell sees
//! and which goes with the cell; a host gets a certificate only after the policy allowed it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::policy::Host;

/// Certificates kept; beyond that they are made anew.
const LEAVES_MAX: usize = 256;
const DAY: Duration = Duration::from_secs(86_400);
const AUTHORITY_DAYS: u32 = 365;
const LEAF_DAYS: u32 = 90;

/// The authority cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The key or a certificate cannot be made, or the kept key is none.
    #[error("cannot make the cell's certificate authority: {0}")]
    Certificate(#[from] rcgen::Error),
    /// TLS does not take the certificate.
    #[error("cannot use a certificate of the cell's authority: {0}")]
    Tls(#[from] rustls::Error),
}

/// See the module.
pub struct CellCa {
    issuer: Issuer<'static, KeyPair>,
    key_pem: String,
    certificate_pem: String,
    /// One key for all hosts: it never leaves this process.
    leaf_key: KeyPair,
    leaves: Mutex<HashMap<Host, Arc<ServerConfig>>>,
}

impl std::fmt::Debug for CellCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CellCa").finish_non_exhaustive()
    }
}

impl CellCa {
    /// A new authority.
    ///
    /// # Errors
    /// [`CaError`].
    pub fn generate() -> Result<Self, CaError> {
        Self::from_key(KeyPair::generate()?)
    }

    /// The authority of a key that [`Self::key_pem`] gave: certificates of both are trusted by the same cell.
    ///
    /// # Errors
    /// [`CaError`] when it is no such key.
    pub fn from_key_pem(key: &str) -> Result<Self, CaError> {
        Self::from_key(KeyPair::from_pem(key)?)
    }

    fn from_key(key: KeyPair) -> Result<Self, CaError> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, "hotcell, for this cell only");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        lasts(&mut params, AUTHORITY_DAYS);
        let key_pem = key.serialize_pem();
        let certificate_pem = params.self_signed(&key)?.pem();
        let (leaf_key, leaves) = (KeyPair::generate()?, Mutex::default());
        Ok(Self { issuer: Issuer::new(params, key), key_pem, certificate_pem, leaf_key, leaves })
    }

    /// The key, to be kept where only the daemon reads it.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// The certificate, for the cell.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// What a server of this name shows.
    pub(super) fn server(&self, host: &Host) -> Result<Arc<ServerConfig>, CaError> {
        let known = self.leaves.lock().unwrap_or_else(PoisonError::into_inner).get(host).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let mut params = CertificateParams::new(Vec::new())?;
        let (name, alternative) = match host {
            Host::Name(name) => (name.clone(), SanType::DnsName(name.as_str().try_into()?)),
            Host::Address(address) => (address.to_string(), SanType::IpAddress(IpAddr::clone(address))),
        };
        // A common name has 64 bytes at most, and nobody reads it.
        params.distinguished_name.push(DnType::CommonName, name.get(..64).unwrap_or(&name));
        params.subject_alt_names = vec![alternative];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        lasts(&mut params, LEAF_DAYS);
        let certificate = params.signed_by(&self.leaf_key, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.leaf_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let config = Arc::new(config);
        let mut leaves = self.leaves.lock().unwrap_or_else(PoisonError::into_inner);
        if leaves.len() >= LEAVES_MAX {
            leaves.clear();
        }
        leaves.insert(host.clone(), Arc::clone(&config));
        Ok(config)
    }
}

fn lasts(params: &mut CertificateParams, days: u32) {
    // A cell's clock may be a little behind ours.
    let now = SystemTime::now();
    params.not_before = (now - DAY).into();
    params.not_after = (now + DAY * days).into();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_was_kept_makes_the_same_authority_and_is_never_printed() {
        let first = CellCa::generate().unwrap();
        let second = CellCa::from_key_pem(first.key_pem()).unwrap();
        assert_eq!(first.key_pem(), second.key_pem());
        assert!(!format!("{first:?}").contains("KEY"));
        assert!(CellCa::from_key_pem("nonsense").is_err());
    }

    #[test]
    fn hosts_beyond_the_bound_are_served_and_not_kept() {
        let ca = CellCa::generate().unwrap();
        for n in 0..LEAVES_MAX + 10 {
            ca.server(&Host::Name(format!("h{n}.example"))).unwrap();
        }
        assert!(ca.leaves.lock().unwrap().len() <= LEAVES_MAX);
        let (long, v6) = (Host::parse(&format!("{}.example", "a".repeat(63))), Host::parse("[2620:fe::fe]"));
        assert!(ca.server(&long.unwrap()).is_ok() && ca.server(&v6.unwrap()).is_ok());
    }
}
