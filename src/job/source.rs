//! A workspace that is fetched: the address of a git repository and what of it is wanted. Parsing accepts only what
//! cannot be taken for an option, for another transport or for a secret; nothing here reaches for the network.

use std::path::{Component, Path};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest address, in bytes.
pub const URL_BYTES_MAX: usize = 2048;
/// Longest name of a branch or tag, in bytes.
pub const REF_BYTES_MAX: usize = 255;

/// A git repository to be fetched when the job is submitted, as its submitter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GitSource {
    /// `https://…`, `ssh://…`, `git@host:path`, `file:///…`, or the absolute path of a repository on the host. Never
    /// with a password: those come from the submitter's own credential helpers and keys.
    pub url: String,
    /// A branch, a tag, a full commit id, or a full name as `refs/…`; what the repository has checked out where absent.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// What was fetched for a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GitCheckout {
    /// The address, as it was given.
    pub url: String,
    /// What was asked for.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The commit, in full.
    pub commit: String,
    /// The branch that is checked out; none where the commit alone is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
}

impl GitSource {
    /// What is wrong with it, if something is: the key (`url` or `ref`) and words.
    ///
    /// # Errors
    /// The first fault.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        check_url(&self.url).map_err(|problem| ("url", problem))?;
        match &self.name {
            Some(name) => check_ref(name).map_err(|problem| ("ref", problem)),
            None => Ok(()),
        }
    }
}

/// Whether a text that names no directory is meant as the address of a repository.
pub fn looks_like_url(text: &str) -> bool {
    text.contains("::") || text.contains("://") || scp_like(text).is_some()
}

/// Whether it is a whole commit id.
pub fn is_commit_id(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'))
}

fn check_url(url: &str) -> Result<(), String> {
    if url.is_empty() || url.len() > URL_BYTES_MAX {
        return Err(format!("must have 1 to {URL_BYTES_MAX} bytes"));
    }
    if url.starts_with('-') || url.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err("must not begin with '-' or hold blanks and control characters".to_owned());
    }
    if url.starts_with('/') {
        return check_path(url);
    }
    if let Some((scheme, rest)) = url.split_once("://") {
        return match scheme {
            "https" | "ssh" => check_authority(scheme, rest).map(|_| ()),
            "http" => match check_authority(scheme, rest)? {
                "localhost" | "127.0.0.1" | "[::1]" => Ok(()),
                _ => Err("http:// proves nobody's identity: use https://, or ssh://".to_owned()),
            },
            "file" => check_path(rest),
            _ => Err(format!(
                "{scheme}:// is not fetched: use https://, ssh://, git@host:path or an absolute path"
            )),
        };
    }
    if url.contains("::") {
        return Err("names a program that would fetch it: only https, ssh and paths are fetched".to_owned());
    }
    match scp_like(url) {
        Some((host, path)) if !path.starts_with('-') => check_host(host.rsplit('@').next().unwrap_or(host)),
        _ => Err("is neither an address (https://…, ssh://…, git@host:path) nor an absolute path".to_owned()),
    }
}

/// `host:path` and `user@host:path`.
fn scp_like(text: &str) -> Option<(&str, &str)> {
    let (host, path) = text.split_once(':')?;
    let fits = !host.is_empty() && !path.is_empty() && !host.contains('/') && !path.starts_with("//");
    (fits && !path.starts_with(':')).then_some((host, path))
}

/// The host of `user@host:port/path`; a path must be there, a password not.
fn check_authority<'a>(scheme: &str, rest: &'a str) -> Result<&'a str, String> {
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (user, host_port) = authority.rsplit_once('@').map_or((None, authority), |(u, h)| (Some(u), h));
    if user.is_some_and(|user| user.contains(':')) || (scheme != "ssh" && user.is_some_and(looks_like_token))
    {
        let words = "holds a password: leave it out, git asks your own credential helper for it";
        return Err(words.to_owned());
    }
    if user.is_some_and(|user| user.is_empty() || user.starts_with('-')) {
        return Err("has no user before its '@'".to_owned());
    }
    if rest.contains(['?', '#']) {
        return Err("must not have a query or a fragment".to_owned());
    }
    let (host, port) = match host_port.strip_prefix('[').and_then(|h| h.split_once(']')) {
        Some((inner, port)) => (&host_port[..inner.len() + 2], port.strip_prefix(':')),
        None => host_port.split_once(':').map_or((host_port, None), |(host, port)| (host, Some(port))),
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return Err("has a port that is no number".to_owned());
    }
    check_host(host)?;
    if path.is_empty() || path.starts_with('-') {
        return Err("names no repository on its host".to_owned());
    }
    Ok(host)
}

/// What providers call a token is given as a user's name at times.
fn looks_like_token(user: &str) -> bool {
    user.len() >= 20 || ["ghp_", "gho_", "github_pat_", "glpat-"].iter().any(|begin| user.starts_with(begin))
}

/// A host never looks like an option: ssh gets it as an argument.
fn check_host(host: &str) -> Result<(), String> {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '[' | ']');
    if host.is_empty() || host.starts_with('-') || host.len() > 255 || !host.chars().all(plain) {
        return Err(format!("{host:?} is no name of a host"));
    }
    Ok(())
}

fn check_path(path: &str) -> Result<(), String> {
    let plain = |c: Component| matches!(c, Component::RootDir | Component::Normal(_));
    if path.starts_with('/') && path.len() > 1 && Path::new(path).components().all(plain) {
        return Ok(());
    }
    Err("must be an absolute path without '..'".to_owned())
}

/// The rules of `git check-ref-format`, for a name with one part or more.
fn check_ref(name: &str) -> Result<(), String> {
    let bad = |words: &str| Err(format!("{words}: a branch, a tag, refs/… or a full commit id is wanted"));
    if name.is_empty() || name.len() > REF_BYTES_MAX {
        return bad(&format!("must have 1 to {REF_BYTES_MAX} bytes"));
    }
    if name.starts_with(['-', '/']) || name.ends_with(['/', '.']) || name == "@" {
        return bad("begins or ends as no name of git's does");
    }
    if name.contains("..") || name.contains("//") || name.contains("@{") {
        return bad("must not hold '..', '//' or '@{'");
    }
    if name.chars().any(|c| c.is_control() || matches!(c, ' ' | '~' | '^' | ':' | '?' | '*' | '[' | '\\')) {
        return bad("must not hold blanks, control characters or any of ~^:?*[\\");
    }
    if name.split('/').any(|part| part.starts_with('.') || part.ends_with(".lock")) {
        return bad("has a part that begins with '.' or ends with '.lock'");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(url: &str, name: Option<&str>) -> GitSource {
        GitSource { url: url.to_owned(), name: name.map(str::to_owned) }
    }

    #[test]
    fn addresses_of_repositories_pass() {
        for url in [
            "https://example.org/team/app.git",
            "https://ann@example.org:8443/app",
            "ssh://git@example.org:2222/team/app.git",
            "ssh://git@[2001:db8::1]/app",
            "git@example.org:team/app.git",
            "host:app",
            "file:///srv/git/app.git",
            "/srv/git/app.git",
            "http://127.0.0.1:8080/app.git",
            "http://localhost/app.git",
        ] {
            assert_eq!(source(url, None).check(), Ok(()), "{url}");
        }
    }

    #[test]
    fn other_transports_options_and_passwords_are_refused_by_name() {
        for (url, words) in [
            ("ext::sh -c id", "blanks"),
            ("ext::id", "a program"),
            ("fd::3", "a program"),
            ("git://example.org/app", "git:// is not fetched"),
            ("ftp://example.org/app", "ftp:// is not fetched"),
            ("http://example.org/app", "use https://"),
            ("http://127.0.0.1.example.org/app", "use https://"),
            ("http://localhost@example.org/app", "use https://"),
            ("--upload-pack=id", "begin with '-'"),
            ("-oProxyCommand=id:x", "begin with '-'"),
            ("ssh://-oProxyCommand=id/x", "no name of a host"),
            ("ssh://git@-oProxyCommand=id/x", "no name of a host"),
            ("ssh://-x@host/app", "no user"),
            ("user@-oProxyCommand:x", "no name of a host"),
            ("host:-x", "neither"),
            ("https://ann:secret@example.org/app", "a password"),
            ("https://ghp_0123@example.org/app", "a password"),
            ("https://example.org", "no repository"),
            ("https:///app", "no name of a host"),
            ("https://example.org/app?x=1", "a query"),
            ("https://example.org:x/app", "a port"),
            ("file://host/app", "absolute path"),
            ("file:///srv/../etc", "absolute path"),
            ("/srv/../etc", "absolute path"),
            ("app", "neither"),
            ("./app", "neither"),
            ("https://example.org/a\nb", "control"),
            ("", "1 to"),
        ] {
            let (key, problem) = source(url, None).check().expect_err(url);
            assert!(key == "url" && problem.contains(words), "{url}: {problem}");
        }
    }

    #[test]
    fn names_follow_the_rules_of_git() {
        for name in
            ["main", "feature/x-1", "v1.0", "refs/heads/main", "refs/pull/1/head", &"a".repeat(40), "ä"]
        {
            assert_eq!(source("/r", Some(name)).check(), Ok(()), "{name}");
        }
        for name in [
            "",
            "-x",
            "--upload-pack=x",
            "/x",
            "x/",
            "x.",
            "a..b",
            "a//b",
            "a@{1}",
            "@",
            "a b",
            "a~1",
            "a^",
            "a:b",
            "a?",
            "a*",
            "a[",
            "a\\b",
            "a\nb",
            ".a",
            "a/.b",
            "a.lock",
            "a.lock/b",
            &"a".repeat(256),
        ] {
            assert!(source("/r", Some(name)).check().is_err_and(|(key, _)| key == "ref"), "{name:?}");
        }
    }

    #[test]
    fn a_path_is_not_taken_for_an_address() {
        assert!(looks_like_url("https://x/y") && looks_like_url("git@host:x") && looks_like_url("ext::sh"));
        for text in ["app", "./app", "/srv/app", "a/b:c", ":x", "x:"] {
            assert!(!looks_like_url(text), "{text}");
        }
    }
}
