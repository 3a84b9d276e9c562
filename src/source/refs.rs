//! What a repository has: its branches and tags as it tells them, and which of them a name means.

use std::collections::BTreeMap;

use super::git::{Config, Run, ssh};
use super::{SourceError, git};
use crate::job::source::is_commit_id;

/// Longest list of branches and tags, in bytes.
const LIST_BYTES_MAX: usize = 64 << 20;
/// Most names that are offered instead of one that is not there.
const NEAR_MAX: usize = 3;

/// Branches, tags and whatever else a repository shows, by full name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Heads {
    pub(super) ids: BTreeMap<String, String>,
    /// The branch that it has checked out, by full name.
    pub(super) default: Option<String>,
    /// What HEAD is at.
    head: Option<String>,
}

/// What is to be checked out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// As it was asked for, or what the repository has checked out.
    pub(super) name: String,
    /// Its full name; none for a commit's id.
    pub(super) full: Option<String>,
    /// The object.
    pub(super) id: String,
    /// Its branch, by its short name.
    pub(super) branch: Option<String>,
}

/// Asks the repository.
pub(super) async fn ask(run: &Run<'_>) -> Result<Heads, SourceError> {
    let git = run.git(Config::Users, "ls-remote").args(["ls-remote", "--symref", "--", run.url]);
    let text =
        git.env("GIT_SSH_COMMAND", git::ssh(run).await?).output_bytes_max(LIST_BYTES_MAX).text().await?;
    Ok(Heads::parse(&String::from_utf8_lossy(&text)))
}

/// The command by which ssh is reached, for those that fetch.
pub(super) async fn ssh_command(run: &Run<'_>) -> Result<std::ffi::OsString, SourceError> {
    ssh(run).await
}

impl Heads {
    fn parse(text: &str) -> Self {
        let mut heads = Self::default();
        for line in text.lines() {
            let Some((id, name)) = line.split_once('\t') else { continue };
            if let Some(target) = id.strip_prefix("ref: ") {
                if name == "HEAD" && target.starts_with("refs/heads/") {
                    heads.default = Some(target.to_owned());
                }
            } else if !is_commit_id(id) {
                continue;
            } else if name == "HEAD" {
                heads.head = Some(id.to_owned());
            } else if name.starts_with("refs/") && !name.ends_with("^{}") {
                heads.ids.insert(name.to_owned(), id.to_owned());
            }
        }
        heads
    }

    /// Whether object ids are SHA-256.
    pub(super) fn is_sha256(&self) -> bool {
        self.ids.values().next().is_some_and(|id| id.len() == 64)
    }

    /// Branches and tags, which a mirror has.
    pub(super) fn mirrored(&self) -> impl Iterator<Item = (&str, &str)> {
        let mirrored = |name: &str| name.starts_with("refs/heads/") || name.starts_with("refs/tags/");
        self.ids.iter().filter(move |(name, _)| mirrored(name)).map(|(name, id)| (name.as_str(), id.as_str()))
    }

    /// What `name` means; without one, what is checked out there.
    pub(super) fn resolve(&self, url: &str, name: Option<&str>) -> Result<Wanted, SourceError> {
        if self.ids.is_empty() {
            return Err(SourceError::Empty { url: url.to_owned() });
        }
        let at = |name: &str, full: String, id: &str| {
            let branch = full.strip_prefix("refs/heads/").map(str::to_owned);
            Wanted { name: name.to_owned(), full: Some(full), id: id.to_owned(), branch }
        };
        let Some(name) = name else { return self.checked_out(url, at) };
        if name.starts_with("refs/") {
            return match self.ids.get(name) {
                Some(id) => Ok(at(name, name.to_owned(), id)),
                None => Err(self.unknown(url, name)),
            };
        }
        let full = |kind: &str| format!("refs/{kind}/{name}");
        match (self.ids.get(&full("heads")), self.ids.get(&full("tags"))) {
            (Some(_), Some(_)) => Err(SourceError::Ambiguous { name: name.to_owned() }),
            (Some(id), None) => Ok(at(name, full("heads"), id)),
            (None, Some(id)) => Ok(at(name, full("tags"), id)),
            (None, None) if is_commit_id(name) => {
                Ok(Wanted { name: name.to_owned(), full: None, id: name.to_owned(), branch: None })
            }
            (None, None) => Err(self.unknown(url, name)),
        }
    }

    fn checked_out(
        &self,
        url: &str,
        at: impl Fn(&str, String, &str) -> Wanted,
    ) -> Result<Wanted, SourceError> {
        if let Some(full) = &self.default
            && let Some(id) = self.ids.get(full)
        {
            return Ok(at(full, full.clone(), id));
        }
        match &self.head {
            Some(id) => Ok(Wanted { name: "HEAD".into(), full: None, id: id.clone(), branch: None }),
            None => Err(self.unknown(url, "HEAD")),
        }
    }

    fn unknown(&self, url: &str, name: &str) -> SourceError {
        let short = |full: &str| {
            let cut = full.strip_prefix("refs/heads/").or_else(|| full.strip_prefix("refs/tags/"));
            cut.unwrap_or(full).to_owned()
        };
        let asked = short(name);
        let mut near: Vec<(usize, String)> =
            self.ids.keys().map(|full| short(full)).map(|other| (distance(&asked, &other), other)).collect();
        let most = asked.chars().count() / 2 + 1;
        near.retain(|(far, _)| *far <= most);
        near.sort();
        near.dedup();
        let near = near.into_iter().take(NEAR_MAX).map(|(_, name)| name).collect();
        SourceError::UnknownRef { url: url.to_owned(), name: name.to_owned(), near }
    }
}

/// Letters to change; a name that holds the other is near.
fn distance(a: &str, b: &str) -> usize {
    if a.len() >= 3 && b.contains(a) {
        return 1;
    }
    let b: Vec<char> = b.chars().take(256).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(256).enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let here = corner + usize::from(!x.eq_ignore_ascii_case(y));
            corner = row[j + 1];
            row[j + 1] = here.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn heads() -> Heads {
        Heads::parse(&format!(
            "ref: refs/heads/main\tHEAD\n{A}\tHEAD\n{A}\trefs/heads/main\n{B}\trefs/heads/both\n{B}\trefs/tags/both\n\
             {B}\trefs/tags/v1.0\n{A}\trefs/tags/v1.0^{{}}\n{B}\trefs/pull/1/head\nrubbish\n\trefs/x\nzz\trefs/heads/z\n"
        ))
    }

    #[test]
    fn names_mean_branches_tags_and_commits() {
        let of = |name| heads().resolve("u", name).map(|w| (w.full.unwrap_or_default(), w.id, w.branch));
        let main = ("refs/heads/main".to_owned(), A.to_owned(), Some("main".to_owned()));
        assert_eq!(of(None).unwrap(), main);
        assert_eq!(of(Some("main")).unwrap(), main);
        assert_eq!(of(Some("refs/heads/main")).unwrap(), main);
        assert_eq!(of(Some("v1.0")).unwrap(), ("refs/tags/v1.0".to_owned(), B.to_owned(), None));
        assert_eq!(of(Some("refs/pull/1/head")).unwrap().1, B);
        assert_eq!(of(Some(B)).unwrap(), (String::new(), B.to_owned(), None));
        assert!(matches!(of(Some("both")), Err(SourceError::Ambiguous { .. })));
        assert_eq!(heads().mirrored().count(), 4);
    }

    #[test]
    fn a_name_that_is_not_there_is_told_with_those_that_are_near() {
        for (name, near) in [("mian", "main"), ("Main", "main"), ("v1.O", "v1.0"), ("refs/heads/mai", "main")]
        {
            let error = heads().resolve("u", Some(name)).unwrap_err();
            assert!(error.to_string().contains(near) && error.key() == "ref", "{name}: {error}");
        }
        let error = heads().resolve("u", Some("something-else-altogether")).unwrap_err().to_string();
        assert!(error.ends_with("has no \"something-else-altogether\""), "{error}");
        assert!(matches!(Heads::parse("").resolve("u", None), Err(SourceError::Empty { .. })));
    }
}
