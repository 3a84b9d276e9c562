//! The toolchains that there are images for: their files below `images/`, and hashes over them.
//!
//! Pure. Never names a machine or a time: the same source gives the same hash everywhere.

use std::collections::BTreeMap;

use super::recipe::{self, Pinned};
use crate::agent_bundle::Arch;

/// Runs in a container of the base and installs the packages.
pub(super) const INSTALL_SH: &str = include_str!("../../images/toolchain/install.sh");
/// The same where the base came from a registry and the engine fetches the packages.
pub(super) const DOCKERFILE: &str = include_str!("../../images/toolchain/Dockerfile");

/// Corepack, which gives yarn and pnpm; an official image of Node has its own.
pub(super) const COREPACK: Pinned = Pinned {
    package: "corepack",
    version: "0.36.0",
    integrity: "sha512-SiiJsBhZqdBiPHTEl6OT3sASrRrKIcYTQMsVGXx6EE/gM8WFMwYjeIX8Tt8RiU4Iv2J6LbT8KpGfCOsBpRWB/w==",
};

/// One toolchain: what its image has beyond the base.
#[derive(Debug, PartialEq, Eq)]
pub struct Toolchain {
    /// The image is `hotcell/<name>`.
    pub name: &'static str,
    /// Words for people.
    pub title: &'static str,
    packages: &'static str,
    env: &'static str,
    /// What `install.sh` does last.
    pub(super) finish: &'static str,
}

/// All of them, by name.
pub static TOOLCHAINS: [Toolchain; 6] = [
    Toolchain {
        name: "cc",
        title: "C and C++ with CMake, Ninja, Meson and the autotools",
        packages: include_str!("../../images/cc/packages.txt"),
        env: "",
        finish: "",
    },
    Toolchain {
        name: "go",
        title: "Go",
        packages: include_str!("../../images/go/packages.txt"),
        env: include_str!("../../images/go/env.txt"),
        finish: include_str!("../../images/go/finish.sh"),
    },
    Toolchain {
        name: "java",
        title: "JDK 17, Maven and Gradle",
        packages: include_str!("../../images/java/packages.txt"),
        env: include_str!("../../images/java/env.txt"),
        finish: include_str!("../../images/java/finish.sh"),
    },
    Toolchain {
        name: "node",
        title: "Node with yarn, pnpm and a compiler for its native packages",
        packages: include_str!("../../images/node/packages.txt"),
        env: include_str!("../../images/node/env.txt"),
        finish: "",
    },
    Toolchain {
        name: "python",
        title: "Python with pip, venv and a C compiler",
        packages: include_str!("../../images/python/packages.txt"),
        env: include_str!("../../images/python/env.txt"),
        finish: "",
    },
    Toolchain {
        name: "rust",
        title: "Rust with Cargo, Clippy and rustfmt",
        packages: include_str!("../../images/rust/packages.txt"),
        env: "",
        finish: "",
    },
];

/// The toolchain of this name.
pub fn toolchain(name: &str) -> Option<&'static Toolchain> {
    TOOLCHAINS.iter().find(|toolchain| toolchain.name == name)
}

impl Toolchain {
    /// Debian packages; one that comes from the backports ends with `/backports`.
    pub(super) fn packages(&self) -> Vec<&'static str> {
        lines(self.packages).filter_map(|line| line.split_whitespace().next()).collect()
    }

    /// Packages whose versions say what the image offers.
    pub(super) fn headline(&self) -> Vec<&'static str> {
        let marked = lines(self.packages).filter_map(|line| line.strip_suffix('*'));
        marked.map(|line| line.trim().trim_end_matches("/backports")).collect()
    }

    /// `NAME=VALUE`.
    pub(super) fn env(&self) -> Vec<&'static str> {
        lines(self.env).collect()
    }

    /// Whether Node's headers and corepack come with it.
    pub(super) fn has_node_extras(&self) -> bool {
        self.name == "node"
    }

    /// Hash over everything that goes into the image for `arch`, its base too: 12 hex digits.
    pub fn hash(&self, arch: Arch) -> String {
        let extras = if self.has_node_extras() { COREPACK.integrity } else { "" };
        let (packages, env) = (lines(self.packages).collect::<Vec<_>>(), self.env().join("\n"));
        let packages = packages.join("\n");
        let base = recipe::base_hash(arch);
        recipe::hash(&[&base, self.name, &packages, &env, self.finish, INSTALL_SH, DOCKERFILE, extras])
    }

    /// The Dockerfile with the image's environment.
    pub(super) fn dockerfile(&self) -> String {
        let env = self.env().iter().map(|line| format!("ENV {line}\n")).collect::<String>();
        format!("{DOCKERFILE}{env}")
    }
}

/// Lines without comments and blanks.
fn lines(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()).filter(|line| !line.is_empty())
}

/// The versions of `headline` in the image: of packages that came (`.deb` files), and of those that the base has
/// (its `dpkg` status).
pub(super) fn versions(headline: &[&str], debs: &[String], status: &str) -> BTreeMap<String, String> {
    let came = debs.iter().filter_map(|file| {
        let mut parts = file.split('_');
        Some((parts.next()?, parts.next()?.replace("%3a", ":")))
    });
    let stanzas = status.split("\n\n").filter_map(|stanza| {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name));
        Some((field("Package: ")?, field("Version: ")?.to_owned()))
    });
    let all: BTreeMap<&str, String> = stanzas.chain(came).collect();
    let found = headline.iter().filter_map(|name| Some(((*name).to_owned(), upstream(all.get(name)?))));
    found.collect()
}

/// A Debian version without what Debian adds to it.
fn upstream(version: &str) -> String {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    let version = version.rsplit_once('-').map_or(version, |(rest, _)| rest);
    version.split(['+', '~']).next().unwrap_or(version).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_toolchain_has_a_recipe_of_plain_package_names() {
        let names: Vec<&str> = TOOLCHAINS.iter().map(|toolchain| toolchain.name).collect();
        assert_eq!(names, ["cc", "go", "java", "node", "python", "rust"]);
        for toolchain in &TOOLCHAINS {
            let packages = toolchain.packages();
            let plain = |name: &&str| {
                let name = name.trim_end_matches("/backports");
                name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c))
            };
            assert!(packages.len() >= 2 && packages.iter().all(plain), "{packages:?}");
            let headline = toolchain.headline();
            assert!(!headline.is_empty(), "{}", toolchain.name);
            let known = |name: &&str| packages.iter().any(|p| p.trim_end_matches("/backports") == *name);
            assert!(headline.iter().all(known), "{headline:?}");
            assert!(toolchain.env().iter().all(|line| line.contains('=')), "{}", toolchain.name);
        }
    }

    #[test]
    fn hashes_differ_by_toolchain_and_processor_and_stay_the_same_otherwise() {
        let hashes = |arch| TOOLCHAINS.iter().map(move |toolchain| toolchain.hash(arch));
        let all: std::collections::BTreeSet<String> = hashes(Arch::X64).chain(hashes(Arch::Arm64)).collect();
        assert_eq!(all.len(), 2 * TOOLCHAINS.len());
        assert!(hashes(Arch::X64).eq(hashes(Arch::X64)));
        assert!(all.iter().all(|hash| hash.len() == 12));
        assert!(!all.contains(&recipe::base_hash(Arch::X64)));
    }

    #[test]
    fn versions_come_from_the_packages_and_else_from_the_base() {
        let debs = ["g++_4%3a12.2.0-3_amd64.deb", "rustc-web_1.96.0+dfsg1-1~deb12u2_amd64.deb"];
        let debs = debs.map(str::to_owned);
        let status = "Package: python3\nStatus: install ok installed\nVersion: 3.11.2-1+b1\n\nPackage: g++\nVersion: 1\n";
        let found = versions(&["g++", "rustc-web", "python3", "none"], &debs, status);
        let expected = [("g++", "12.2.0"), ("rustc-web", "1.96.0"), ("python3", "3.11.2")];
        assert_eq!(found, expected.map(|(name, version)| (name.to_owned(), version.to_owned())).into());
    }

    #[test]
    fn the_environment_of_a_recipe_is_in_its_dockerfile() {
        let java = toolchain("java").unwrap();
        assert!(java.dockerfile().ends_with("\nENV JAVA_HOME=/usr/lib/jvm/default-java\n"));
        assert!(toolchain("cobol").is_none());
    }
}
