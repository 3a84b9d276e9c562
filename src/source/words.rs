//! What git's words about a failed fetch mean for the person who submitted the job: which thing is missing. Words that
//! are passed on hold no password and nothing that a terminal acts upon.

use super::SourceError;

/// Longest words that are passed on, in characters.
const WORDS_CHARS_MAX: usize = 400;

/// The error for a command that failed.
pub(super) fn judge(
    url: &str,
    command: &'static str,
    code: i32,
    stderr: &[u8],
    file_bytes_max: Option<u64>,
) -> SourceError {
    let said = String::from_utf8_lossy(stderr);
    let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
    let (url, words) = (url.to_owned(), plain(&said));
    // A packer that the limit killed says nothing, and its caller nothing but this.
    let silent = has(&["invalid index-pack output"]) && !has(&["fsck error", "error: "]);
    if let Some(max) = file_bytes_max
        && (code == 128 + libc::SIGXFSZ || silent || has(&["File too large", "died of signal 25"]))
    {
        return SourceError::TooLarge { what: format!("{url} is larger"), max: format!("{max} bytes") };
    }
    if has(&["dubious ownership"]) {
        return SourceError::Owner { url };
    }
    if has(&["Host key verification failed", "REMOTE HOST IDENTIFICATION HAS CHANGED"]) {
        return SourceError::HostKey { url };
    }
    if has(&["No user exists for uid"]) {
        let missing = "ssh works only for users whom the machine's user file names";
        return SourceError::Credentials { url, missing: missing.to_owned() };
    }
    let asked = [
        "could not read Username",
        "could not read Password",
        "unable to get password",
        "unable to get username",
    ];
    if has(&asked) || has(&["terminal prompts disabled"]) {
        let missing = "your git has no credential for it; set a credential helper up (`git config --global \
                       credential.helper …`) and fetch once by hand, or use ssh with a key that needs no passphrase";
        return SourceError::Credentials { url, missing: missing.to_owned() };
    }
    if has(&[
        "Authentication failed",
        "The requested URL returned error: 401",
        "The requested URL returned error: 403",
    ]) {
        let missing = "what your credential helper gave is refused; renew it, and fetch once by hand";
        return SourceError::Credentials { url, missing: missing.to_owned() };
    }
    if has(&["Permission denied (", "Too many authentication failures"]) {
        let missing = "no ssh key of yours is accepted without asking; add one without a passphrase to ~/.ssh and to \
                       the server (an ssh-agent of your session is not seen here)";
        return SourceError::Credentials { url, missing: missing.to_owned() };
    }
    if has(&["Could not resolve host", "Name or service not known", "Temporary failure in name resolution"]) {
        return SourceError::NoHost { url, words };
    }
    if has(&["fsck error", "index-pack", "unable to parse", "corrupt"]) && command == "fetch" {
        return SourceError::Damaged { url, words };
    }
    if has(&[
        "does not appear to be a git repository",
        "not found",
        "No such file or directory",
        "does not exist",
    ]) {
        return SourceError::NotThere { url, words };
    }
    let away = ["Connection refused", "Failed to connect", "timed out", "No route to host", "unreachable"];
    if has(&away) || has(&["Could not connect", "Empty reply", "SSL", "hung up", "Operation too slow"]) {
        return SourceError::Unreachable { url, words };
    }
    if has(&["Permission denied", "unable to access"]) {
        return SourceError::NotThere { url, words };
    }
    SourceError::Git { command, url, words }
}

/// One line, bounded, without passwords and control characters.
fn plain(said: &str) -> String {
    let lines = said.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("hint:"));
    let line = lines.collect::<Vec<_>>().join("; ");
    let line: String = line.chars().filter(|c| !c.is_control()).take(WORDS_CHARS_MAX).collect();
    line.split("://")
        .enumerate()
        .map(|(n, part)| if n == 0 { part.to_owned() } else { nobody(part) })
        .collect()
}

/// An address behind its scheme, without who is named in it.
fn nobody(part: &str) -> String {
    let end = part.find(|c: char| matches!(c, '/' | '\'' | '"') || c.is_whitespace()).unwrap_or(part.len());
    let (authority, rest) = part.split_at(end);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    format!("://{host}{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(said: &str) -> SourceError {
        judge("u", "fetch", 128, said.as_bytes(), Some(5))
    }

    #[test]
    fn what_is_missing_is_named() {
        use SourceError as E;
        type Is = fn(&SourceError) -> bool;
        let cases: [(&str, Is); 12] = [
            ("fatal: could not read Username for 'https://x': terminal prompts disabled", |e| {
                matches!(e, E::Credentials { .. })
            }),
            ("remote: x\nfatal: Authentication failed for 'https://x/'", |e| {
                matches!(e, E::Credentials { .. })
            }),
            ("git@x: Permission denied (publickey).\nfatal: Could not read from remote", |e| {
                matches!(e, E::Credentials { .. })
            }),
            ("Host key verification failed.", |e| matches!(e, E::HostKey { .. })),
            ("fatal: unable to access 'https://x/': Could not resolve host: x", |e| {
                matches!(e, E::NoHost { .. })
            }),
            ("ssh: connect to host x port 22: Connection refused", |e| matches!(e, E::Unreachable { .. })),
            ("fatal: detected dubious ownership in repository at '/r'", |e| matches!(e, E::Owner { .. })),
            ("fatal: '/r' does not appear to be a git repository", |e| matches!(e, E::NotThere { .. })),
            ("fatal: fetch-pack: invalid index-pack output", |e| matches!(e, E::TooLarge { .. })),
            ("No user exists for uid 4242", |e| matches!(e, E::Credentials { .. })),
            ("fatal: write error: File too large", |e| matches!(e, E::TooLarge { .. })),
            ("error: object x: fsck error in packed object\nfatal: index-pack failed", |e| {
                matches!(e, E::Damaged { .. })
            }),
        ];
        for (said, is) in cases {
            let error = error(said);
            assert!(is(&error), "{said}: {error:?}");
            assert_eq!(error.key(), "url");
        }
    }

    #[test]
    fn words_hold_no_password_and_no_escapes() {
        let error = error("fatal: x 'https://ann:secret@host/app': \x1b[2Jnope").to_string();
        assert!(
            error.contains("https://host/app") && !error.contains("secret") && !error.contains('\x1b'),
            "{error}"
        );
    }
}
