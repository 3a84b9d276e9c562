//! Files of a workspace that look, by their names, as if they held somebody's secrets. A quick look, to warn: it
//! decides nothing, and what it does not find may be there all the same. Pure but for the look itself.

use super::look::{Kind, Looked};
use crate::change::TreePath;
use crate::change::hide::HideRules;

/// Most of them that are named.
pub(super) const NAMED_MAX: usize = 20;

/// Names that mean the same wherever they stand.
const NAMES: [&str; 26] = [
    ".netrc",
    "_netrc",
    ".npmrc",
    ".yarnrc.yml",
    ".pypirc",
    ".git-credentials",
    ".htpasswd",
    ".pgpass",
    ".my.cnf",
    ".dockercfg",
    ".dockerconfigjson",
    ".s3cfg",
    ".boto",
    ".vault-token",
    "credentials.json",
    "service-account.json",
    "service_account.json",
    "client_secret.json",
    "secrets.json",
    "secrets.yml",
    "secrets.yaml",
    "terraform.tfstate",
    "terraform.tfvars",
    "kubeconfig",
    "master.key",
    "id_ed25519",
];
/// Endings of private keys and key stores.
const ENDINGS: [&str; 8] = [".pem", ".key", ".p12", ".pfx", ".jks", ".keystore", ".kdbx", ".ppk"];
/// Directories that hold them.
const DIRECTORIES: [&str; 5] = [".aws", ".ssh", ".gnupg", ".kube", ".azure"];
/// What is only called so.
const HARMLESS: [&str; 6] = [".example", ".sample", ".template", ".dist", ".pub", ".md"];

/// Whether a path's name says that a secret may stand there. Pure.
pub(super) fn looks_secret(path: &TreePath, kind: Kind) -> bool {
    let name = String::from_utf8_lossy(path.name()).to_ascii_lowercase();
    if kind == Kind::Dir {
        return DIRECTORIES.contains(&name.as_str());
    }
    if HARMLESS.iter().any(|end| name.ends_with(end)) {
        return false;
    }
    let env = name == ".env" || name.starts_with(".env.") || name == ".envrc";
    let key = name.starts_with("id_rsa") || name.starts_with("id_ecdsa") || name.starts_with("id_dsa");
    env || key || NAMES.contains(&name.as_str()) || ENDINGS.iter().any(|end| name.ends_with(end))
}

/// Warnings about what looks secret and is not hidden, one a path and at most `NAMED_MAX`, with a last one where
/// there are more or not everything was looked at. Pure.
pub fn warnings(looked: &Looked, rules: &HideRules) -> Vec<String> {
    let mut paths: Vec<&TreePath> = Vec::new();
    for found in &looked.found {
        let is_dir = found.kind == Kind::Dir;
        if looks_secret(&found.path, found.kind)
            && !rules.hides(&found.path, is_dir)
            && !paths.iter().any(|top| found.path.is_at_or_below(top))
        {
            paths.push(&found.path);
        }
    }
    let words = |path: &&TreePath| {
        format!("{:?} looks like a secret and is not hidden from the agent: add it to `hide`", path.as_path())
    };
    let mut warnings: Vec<String> = paths.iter().take(NAMED_MAX).map(words).collect();
    if paths.len() > NAMED_MAX {
        warnings.push(format!("{} more paths look like secrets", paths.len() - NAMED_MAX));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::super::look::Found;
    use super::*;

    #[test]
    fn usual_names_of_secrets_are_known_and_examples_are_not() {
        let file = |name: &str| looks_secret(&TreePath::new(name).expect("path"), Kind::File);
        for name in [
            ".env",
            "a/.env.local",
            ".npmrc",
            "x/id_rsa",
            "certs/server.pem",
            "ID_RSA",
            ".envrc",
            "credentials.json",
        ] {
            assert!(file(name), "{name}");
        }
        for name in
            [".env.example", "id_rsa.pub", "environment.ts", "README.md", "keys.rs", "src/env", ".env.sample"]
        {
            assert!(!file(name), "{name}");
        }
        assert!(looks_secret(&TreePath::new("home/.aws").expect("path"), Kind::Dir));
    }

    #[test]
    fn what_is_hidden_is_no_warning_and_the_list_is_bounded() {
        let found = |name: &str| Found { path: TreePath::new(name).expect("path"), kind: Kind::File };
        let looked =
            Looked { found: vec![found(".env"), found("a/.npmrc"), found("src/main.rs")], complete: true };
        let rules = HideRules::new(&[".env*".to_owned()]).expect("rules");
        let warnings = warnings(&looked, &rules);
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].starts_with("\"a/.npmrc\" looks like a secret"), "{warnings:?}");
        let many = Looked { found: (0..30).map(|n| found(&format!("{n}.pem"))).collect(), complete: true };
        let all = super::warnings(&many, &HideRules::default());
        assert_eq!(
            (all.len(), all.last().map(String::as_str)),
            (NAMED_MAX + 1, Some("10 more paths look like secrets"))
        );
    }
}
