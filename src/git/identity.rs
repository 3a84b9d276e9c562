//! As whom commits are made for a person: what their own git says, asked as themselves, else what the machine knows
//! of them. Never with the daemon's rights or the daemon's configuration.

use std::path::PathBuf;
use std::time::Duration;

use crate::job::Identity;
use crate::run_as;

const BOUNDS: run_as::Bounds = run_as::Bounds { wall: Duration::from_secs(10), output_bytes_max: 4096 };
/// Longest name or address, in characters.
const PART_CHARS_MAX: usize = 200;

/// A name and an address, as git writes them into commits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GitIdentity {
    /// Never empty; without `<`, `>` and control characters.
    pub name: String,
    /// As the name.
    pub email: String,
}

impl GitIdentity {
    /// Takes away what a commit cannot hold; what is empty then, is `user` or `user@host`.
    pub fn new(name: &str, email: &str, user: &str, host: &str) -> Self {
        let clean = |text: &str| {
            let kept = text.chars().filter(|c| !c.is_control() && !matches!(c, '<' | '>'));
            let kept: String = kept.take(PART_CHARS_MAX).collect();
            let crud = |c: char| c.is_whitespace() || matches!(c, '.' | ',' | ':' | ';' | '"' | '\\' | '\'');
            kept.trim_matches(crud).to_owned()
        };
        let or = |text: String, other: String| if text.is_empty() { other } else { text };
        Self { name: or(clean(name), user.to_owned()), email: or(clean(email), format!("{user}@{host}")) }
    }

    /// `Name <address>`.
    pub fn line(&self) -> String {
        format!("{} <{}>", self.name, self.email)
    }
}

/// As whom `who` commits: `user.name` and `user.email` of their own configuration, else their name in the machine's
/// user file and `user@host`. Runs git as them, for at most 10 s each; without git there is the second way.
pub async fn submitter_identity(who: &Identity) -> GitIdentity {
    let passwd = tokio::fs::read_to_string("/etc/passwd").await.unwrap_or_default();
    let host = tokio::fs::read_to_string("/proc/sys/kernel/hostname").await.unwrap_or_default();
    let (user, gecos) = user_of(&passwd, who.uid);
    let (name, email) = (asked(who, "user.name").await, asked(who, "user.email").await);
    let host = GitIdentity::new(host.trim(), "", "localhost", "").name;
    GitIdentity::new(name.as_deref().unwrap_or(&gecos), email.as_deref().unwrap_or(""), &user, &host)
}

async fn asked(who: &Identity, key: &str) -> Option<String> {
    let argv = ["git", "config", "--global", "--includes", "--get", key].map(PathBuf::from);
    let output = run_as::run(&argv, who, b"", BOUNDS).await.ok()?;
    (output.code == 0).then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Login and full name.
fn user_of(passwd: &str, uid: u32) -> (String, String) {
    let found = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let same = fields.get(2)?.parse() == Ok(uid);
        same.then_some((*fields.first()?, *fields.get(4)?))
    });
    let Some((user, gecos)) = found else { return (format!("uid{uid}"), String::new()) };
    let full = gecos.split(',').next().unwrap_or_default();
    let mut capital = user.to_owned();
    if let Some(first) = capital.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    (user.to_owned(), full.replace('&', &capital))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::testing::somebody;

    #[test]
    fn what_a_commit_cannot_hold_is_taken_away() {
        let of = |name, email| GitIdentity::new(name, email, "me", "box").line();
        assert_eq!(of("Ann <b>\n", "a@b>\u{1b}"), "Ann b <a@b>");
        assert_eq!(of(" .\"", ""), "me <me@box>");
    }

    #[test]
    fn the_machines_user_file_is_the_second_way() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nann:x:7:7:& Lee,Room 1:/home/ann:/bin/sh\nbad\n";
        assert_eq!(user_of(passwd, 7), ("ann".to_owned(), "Ann Lee".to_owned()));
        assert_eq!(user_of(passwd, 8), ("uid8".to_owned(), String::new()));
    }

    #[tokio::test]
    async fn somebody_without_a_configuration_has_an_identity() {
        let who = Identity { uid: somebody().uid, ..somebody() };
        let found = submitter_identity(&who).await;
        assert!(!found.name.is_empty() && found.email.contains('@'), "{found:?}");
    }
}
