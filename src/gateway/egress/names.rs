//! Names → addresses, as this machine knows them: its hosts file first, then its resolver. Whatever comes of it is
//! checked like any other address. It must never complete a name with the machine's search domains.

use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::route::{Later, Resolve};

/// Largest hosts file that is read to its end, in bytes; long ones are lists of what somebody blocks.
const HOSTS_BYTES_MAX: u64 = 16 << 20;

/// The machine's own resolver.
#[derive(Debug, Clone)]
pub struct SystemResolver {
    hosts: PathBuf,
}

impl Default for SystemResolver {
    fn default() -> Self {
        Self { hosts: "/etc/hosts".into() }
    }
}

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, name: &'a str) -> Later<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async move {
            let (hosts, wanted) = (self.hosts.clone(), name.to_owned());
            let written = tokio::task::spawn_blocking(move || in_file(&hosts, &wanted)).await??;
            if !written.is_empty() {
                return Ok(written);
            }
            // With its final dot, or the machine's search domains would make another name of it; with that dot
            // the C library finds nothing in the hosts file.
            let found = tokio::net::lookup_host((format!("{name}."), 0)).await?;
            Ok(found.map(|address| address.ip()).collect())
        })
    }
}

fn in_file(path: &Path, name: &str) -> io::Result<Vec<IpAddr>> {
    let mut text = Vec::new();
    match std::fs::File::open(path) {
        Ok(file) => file.take(HOSTS_BYTES_MAX).read_to_end(&mut text)?,
        // A machine without one.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    Ok(in_hosts(&String::from_utf8_lossy(&text), name))
}

/// All addresses that a hosts file has for a name.
fn in_hosts(text: &str, name: &str) -> Vec<IpAddr> {
    let address_of = |line: &str| {
        let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
        let address = words.next()?;
        words
            .any(|word| word.trim_end_matches('.').eq_ignore_ascii_case(name))
            .then(|| address.parse().ok())?
    };
    text.lines().filter_map(address_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTS: &str = "127.0.0.1\tlocalhost\n# 9.9.9.9 commented.example\n\
        93.184.215.14 registry.example Registry-Alias.example. # 8.8.8.8 trailing.example\r\n\
        2606:4700::1111 registry.example\nnonsense broken.example\n0.0.0.0 blocked.example\n";

    #[test]
    fn a_hosts_file_is_read_as_the_machine_reads_it() {
        let found = |name| in_hosts(HOSTS, name).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(found("registry.example"), ["93.184.215.14", "2606:4700::1111"]);
        assert_eq!(found("registry-alias.example"), ["93.184.215.14"]);
        assert_eq!(found("blocked.example"), ["0.0.0.0"]);
        for none in
            ["commented.example", "trailing.example", "broken.example", "example", "93.184.215.14", ""]
        {
            assert!(found(none).is_empty(), "{none}");
        }
    }

    #[tokio::test]
    async fn a_name_of_the_hosts_file_is_found_there() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = dir.path().join("hosts");
        std::fs::write(&hosts, HOSTS).unwrap();
        let resolver = SystemResolver { hosts };
        let found = resolver.resolve("registry.example").await.unwrap();
        assert_eq!(found.len(), 2);
        assert!(in_file(&dir.path().join("none"), "registry.example").unwrap().is_empty());
    }
}
