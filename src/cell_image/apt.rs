//! How this machine fetches Debian packages: its mirrors, proxy and certificates, for use by mmdebstrap.
//!
//! Reads `/etc/apt` and `apt-config dump`; never writes there. What it returns must not end in an image.

use std::path::Path;
use std::time::Duration;

use tokio::process::Command;

use super::recipe::{DEBIAN_SOURCES, DEBIAN_SUITE};

const ARCHIVE_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const FILES_MAX: usize = 200;
const FILE_BYTES_MAX: u64 = 256 << 10;

/// Settings of this machine for one run of mmdebstrap.
pub(super) struct HostSettings {
    /// deb822 text of the Debian archives to use.
    pub(super) sources: String,
    /// apt configuration: proxy, certificates, credentials' place.
    pub(super) conf: String,
}

impl HostSettings {
    pub(super) async fn read() -> Self {
        let files = read_sources(Path::new("/etc/apt"));
        let dump = Command::new("apt-config").arg("dump").kill_on_drop(true).output();
        let dump = match tokio::time::timeout(Duration::from_secs(10), dump).await {
            Ok(Ok(output)) => String::from_utf8_lossy(&output.stdout).into_owned(),
            _ => String::new(), // not a Debian machine: nothing to carry over
        };
        Self { sources: debian_sources(&files), conf: carried_over(&dump) }
    }
}

fn read_sources(dir: &Path) -> Vec<String> {
    let mut paths = vec![dir.join("sources.list")];
    if let Ok(entries) = std::fs::read_dir(dir.join("sources.list.d")) {
        let known = |path: &Path| path.extension().is_some_and(|end| end == "list" || end == "sources");
        paths.extend(entries.take(FILES_MAX).flatten().map(|entry| entry.path()).filter(|path| known(path)));
    }
    paths.sort();
    let small = |path: &&std::path::PathBuf| path.metadata().is_ok_and(|meta| meta.len() <= FILE_BYTES_MAX);
    paths.iter().filter(small).filter_map(|path| std::fs::read_to_string(path).ok()).collect()
}

/// Settings that decide how packages are fetched, out of `apt-config dump`.
fn carried_over(dump: &str) -> String {
    const PREFIXES: [&str; 3] = ["Acquire::http::", "Acquire::https::", "Acquire::ftp::"];
    const EXACT: [&str; 6] = [
        "Acquire::Retries",
        "Acquire::ForceIPv4",
        "Acquire::ForceIPv6",
        "Acquire::Check-Valid-Until",
        "Acquire::Check-Date",
        "Acquire::Max-FutureTime",
    ];
    let mut conf = String::from("Acquire::Languages \"none\";\n");
    // Credentials are read where they are, not copied.
    conf.push_str(
        "Dir::Etc::netrc \"/etc/apt/auth.conf\";\nDir::Etc::netrcparts \"/etc/apt/auth.conf.d\";\n",
    );
    for line in dump.lines() {
        let name = line.split(' ').next().unwrap_or_default();
        if PREFIXES.iter().any(|prefix| name.starts_with(prefix)) || EXACT.contains(&name) {
            conf.push_str(line);
            conf.push('\n');
        }
    }
    conf
}

/// One archive of the machine's sources.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Archive {
    uri: String,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<String>,
    trusted: bool,
}

/// The machine's own mirrors of Debian, for our release; the public ones where it has none. Archives of others
/// (Docker, Node, …) are left out: the base holds Debian only.
fn debian_sources(files: &[String]) -> String {
    let archives = files.iter().flat_map(|text| if is_deb822(text) { deb822(text) } else { one_line(text) });
    let mut stanzas: Vec<String> = Vec::new();
    let mut has_release = false;
    for archive in archives {
        let Some(suites) = our_suites(&archive) else { continue };
        has_release |= suites.iter().any(|suite| suite == DEBIAN_SUITE);
        let trust = match (&archive.signed_by, archive.trusted) {
            (Some(key), _) => format!("Signed-By: {key}\n"),
            (None, true) => "Trusted: yes\n".to_owned(),
            (None, false) if Path::new(ARCHIVE_KEYRING).exists() => format!("Signed-By: {ARCHIVE_KEYRING}\n"),
            (None, false) => String::new(),
        };
        let stanza = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\n{trust}",
            archive.uri,
            suites.join(" ")
        );
        if !stanzas.contains(&stanza) {
            stanzas.push(stanza);
        }
    }
    if !has_release {
        stanzas.push(DEBIAN_SOURCES.to_owned());
    }
    stanzas.join("\n")
}

/// The same archives, and the backports of our release beside it.
pub(super) fn with_backports(sources: &str) -> String {
    let mut all = sources.to_owned();
    for stanza in sources.split("\n\n") {
        let suites = stanza.lines().find(|line| line.starts_with("Suites:"));
        let Some(suites) = suites.filter(|line| line.split(' ').any(|suite| suite == DEBIAN_SUITE)) else {
            continue;
        };
        let backports = stanza.trim_end().replace(suites, &format!("Suites: {DEBIAN_SUITE}-backports"));
        all = format!("{}\n\n{backports}\n", all.trim_end());
    }
    all
}

/// Which suites of our release the archive has, if it is a mirror of Debian.
fn our_suites(archive: &Archive) -> Option<Vec<String>> {
    let foreign_key = archive.signed_by.as_ref().is_some_and(|key| !key.contains("debian-archive"));
    if foreign_key || !archive.components.iter().any(|component| component == "main") {
        return None;
    }
    let suites =
        [DEBIAN_SUITE.to_owned(), format!("{DEBIAN_SUITE}-updates"), format!("{DEBIAN_SUITE}-security")];
    if archive.suites.iter().any(|suite| *suite == suites[0] || *suite == suites[1] || *suite == suites[2]) {
        return Some(archive.suites.iter().filter(|suite| suites.contains(suite)).cloned().collect());
    }
    // A machine of another Debian release: the same mirror has ours too.
    match archive.uri.trim_end_matches('/').rsplit('/').next() {
        Some("debian") => Some(vec![suites[0].clone(), suites[1].clone()]),
        Some("debian-security") => Some(vec![suites[2].clone()]),
        _ => None,
    }
}

fn is_deb822(text: &str) -> bool {
    text.lines().any(|line| line.starts_with("Types:"))
}

fn deb822(text: &str) -> Vec<Archive> {
    let text: String =
        text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect();
    let mut archives = Vec::new();
    for stanza in text.split("\n\n") {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza.lines() {
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.push('\n');
                    value.push_str(line);
                }
            } else if let Some((name, value)) = line.split_once(':') {
                fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
        let get =
            |name: &str| fields.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        let words = |name: &str| -> Vec<String> {
            get(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        };
        if get("enabled").is_some_and(|value| value == "no")
            || !words("types").iter().any(|kind| kind == "deb")
        {
            continue;
        }
        for uri in words("uris") {
            archives.push(Archive {
                uri,
                suites: words("suites"),
                components: words("components"),
                signed_by: get("signed-by").map(str::to_owned),
                trusted: get("trusted") == Some("yes"),
            });
        }
    }
    archives
}

fn one_line(text: &str) -> Vec<Archive> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter_map(one_line_archive).collect()
}

fn one_line_archive(line: &str) -> Option<Archive> {
    let rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t', '[']) {
        return None; // deb-src
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace().map(str::to_owned);
    let option = |name: &str| {
        options
            .split_whitespace()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .map(str::to_owned)
    };
    Some(Archive {
        uri: words.next()?,
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by: option("signed-by"),
        trusted: option("trusted").as_deref() == Some("yes"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_own_mirror_is_used_and_other_archives_are_not() {
        let files = [
            "# a comment\nTypes: deb deb-src\nURIs: http://mirror.test/debian\nSuites: bookworm bookworm-updates \
             bookworm-backports\nComponents: main contrib\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
             Types: deb\nURIs: http://mirror.test/off\nSuites: bookworm\nComponents: main\nEnabled: no\n"
                .to_owned(),
            "deb [arch=amd64 signed-by=/etc/apt/keyrings/docker.asc] https://docker.test/linux/debian bookworm main\n\
             deb [trusted=yes] http://mirror.test/debian-security bookworm-security main # end\n\
             deb-src http://mirror.test/debian bookworm main\n\
             deb https://node.test/node_20.x nodistro main\n"
                .to_owned(),
        ];
        let sources = debian_sources(&files);
        assert_eq!(
            sources,
            "Types: deb\nURIs: http://mirror.test/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\
             Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
             Types: deb\nURIs: http://mirror.test/debian-security\nSuites: bookworm-security\nComponents: main\n\
             Trusted: yes\n"
        );
    }

    #[test]
    fn a_machine_of_another_release_uses_its_mirror_for_ours() {
        let files = ["deb [trusted=yes] http://mirror.test/debian/ trixie main\n".to_owned()];
        assert!(
            debian_sources(&files)
                .contains("http://mirror.test/debian/\nSuites: bookworm bookworm-updates\n")
        );
    }

    #[test]
    fn without_a_mirror_the_public_one_is_used() {
        let files = ["deb http://ubuntu.test/ubuntu noble main\n".to_owned()];
        assert_eq!(debian_sources(&files), DEBIAN_SOURCES);
        assert_eq!(debian_sources(&[]), DEBIAN_SOURCES);
    }

    #[test]
    fn the_backports_come_from_the_mirror_of_the_release() {
        let all = with_backports(DEBIAN_SOURCES);
        assert!(all.starts_with(DEBIAN_SOURCES.trim_end()));
        assert_eq!(all.matches("Types: deb").count(), 3);
        let last = all.split("\n\n").last().unwrap();
        assert!(
            last.contains("/debian\nSuites: bookworm-backports\nComponents: main\nSigned-By: "),
            "{last}"
        );
    }

    #[test]
    fn proxy_and_certificates_are_carried_over_and_nothing_else() {
        let dump = "APT::Architecture \"amd64\";\nAcquire::http::Proxy \"http://proxy.test:3128\";\n\
                    Acquire::https::CaInfo \"/etc/ca.pem\";\nAcquire::Check-Date \"false\";\n\
                    Acquire::IndexTargets \"\";\nDPkg::Post-Invoke:: \"evil\";\n";
        let conf = carried_over(dump);
        assert!(conf.contains("Acquire::http::Proxy \"http://proxy.test:3128\";"));
        assert!(conf.contains("Acquire::https::CaInfo") && conf.contains("Acquire::Check-Date"));
        assert!(!conf.contains("evil") && !conf.contains("IndexTargets") && !conf.contains("Architecture"));
    }
}
