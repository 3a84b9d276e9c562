//! `[[notify]]` entries: who is told of what happens to jobs. Reads names of users from the machine's files, once.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::ConfigError;
use super::access::{NameOrId, Names};
use super::raw::Opt;
use crate::notice::{Kind, TARGETS_MAX, Target, To};

/// Longest name, in bytes.
const NAME_BYTES_MAX: usize = 64;

/// One entry as it stands in the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawNotify {
    name: Spanned<String>,
    on: Opt<Vec<Spanned<String>>>,
    policies: Opt<Vec<String>>,
    users: Opt<Vec<Spanned<NameOrId>>>,
    url: Opt<String>,
    secret_file: Opt<PathBuf>,
    command: Opt<Vec<PathBuf>>,
}

struct Place<'a> {
    path: &'a Path,
    text: &'a str,
    number: usize,
}

impl Place<'_> {
    fn wrong(&self, at: usize, key: &str, problem: impl Into<String>) -> ConfigError {
        let line = self.text.get(..at).unwrap_or("").matches('\n').count() + 1;
        ConfigError::Entry {
            origin: format!("{}, line {line}", self.path.display()),
            key: format!("[[notify]] {} {key}", self.number).trim_end().to_owned(),
            problem: problem.into(),
        }
    }

    fn target(&self, raw: &Spanned<RawNotify>, names: &Names) -> Result<Target, ConfigError> {
        let (at, raw) = (raw.span().start, raw.get_ref());
        let name = raw.name.get_ref().clone();
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
            let problem = format!("{name:?}: letters, digits, '-', '_' and '.', at most {NAME_BYTES_MAX}");
            return Err(self.wrong(raw.name.span().start, "name", problem));
        }
        let kind = |word: &Spanned<String>| {
            Kind::ALL.into_iter().find(|kind| kind.as_str() == word.get_ref()).ok_or_else(|| {
                let known: Vec<&str> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
                let problem = format!("there is no {:?} (there are: {})", word.get_ref(), known.join(", "));
                self.wrong(word.span().start, "on", problem)
            })
        };
        let on = match &raw.on {
            Some(on) => on.get_ref().iter().map(kind).collect::<Result<_, _>>()?,
            None => Kind::ALL.to_vec(),
        };
        let policies = match &raw.policies {
            None => vec!["*".to_owned()],
            Some(list) => match list.get_ref().iter().find(|p| !crate::policy::is_pattern(p)) {
                Some(bad) => {
                    return Err(self.wrong(
                        list.span().start,
                        "policies",
                        format!("{bad:?}: a '*' may stand only at the end"),
                    ));
                }
                None => list.get_ref().clone(),
            },
        };
        let uid = |user: &Spanned<NameOrId>| {
            names.uid(&user.get_ref().0).ok_or_else(|| {
                let problem =
                    format!("there is no user {:?} on this machine; a number is an id", user.get_ref().0);
                self.wrong(user.span().start, "users", problem)
            })
        };
        let uids = raw.users.iter().flat_map(|list| list.get_ref()).map(uid).collect::<Result<_, _>>()?;
        let to = match (&raw.url, &raw.command, &raw.secret_file) {
            (Some(url), None, secret) => {
                let secret_file = secret.as_ref().map(|path| path.get_ref().clone());
                if let Some(path) = secret_file.as_ref().filter(|path| !path.is_absolute()) {
                    return Err(self.wrong(
                        at,
                        "secret_file",
                        format!("{} is not an absolute path", path.display()),
                    ));
                }
                To::Webhook { url: url.get_ref().clone(), secret_file }
            }
            (None, Some(command), None) => match command.get_ref().first() {
                Some(program) if program.is_absolute() => To::Command { argv: command.get_ref().clone() },
                Some(_) | None => {
                    let problem = "must begin with the absolute path of a program";
                    return Err(self.wrong(command.span().start, "command", problem));
                }
            },
            (None, Some(_), Some(_)) => {
                return Err(self.wrong(at, "secret_file", "signs what goes to a url; there is a command"));
            }
            (Some(_), Some(_), _) => {
                return Err(self.wrong(at, "", "has a url and a command; one of them is told"));
            }
            (None, None, _) => return Err(self.wrong(at, "", "names neither a url nor a command")),
        };
        Ok(Target { name, on, policies, uids, to })
    }
}

/// The entries of the file `path`, whose text is `text`.
pub(super) fn targets(
    path: &Path,
    text: &str,
    raw: &[Spanned<RawNotify>],
    names: &Names,
) -> Result<Vec<Target>, ConfigError> {
    let place = |index| Place { path, text, number: index + 1 };
    if let Some(beyond) = raw.get(TARGETS_MAX) {
        let problem = format!("there can be at most {TARGETS_MAX} entries");
        return Err(place(TARGETS_MAX).wrong(beyond.span().start, "", problem));
    }
    let mut targets: Vec<Target> = Vec::new();
    for (index, entry) in raw.iter().enumerate() {
        let target = place(index).target(entry, names)?;
        if targets.iter().any(|other| other.name == target.name) {
            let problem = format!("there is another {:?}", target.name);
            return Err(place(index).wrong(entry.get_ref().name.span().start, "name", problem));
        }
        targets.push(target);
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct File {
        notify: Vec<Spanned<RawNotify>>,
    }

    fn read(text: &str) -> Result<Vec<Target>, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        let names = Names::parse("ann:x:7:7::/:\n", "");
        targets(Path::new("f"), text, &file.notify, &names).map_err(|error| error.to_string())
    }

    #[test]
    fn an_entry_says_who_is_told_of_what() {
        let all = read(
            "[[notify]]\nname = 'chat'\nurl = 'https://h/x'\nsecret_file = '/k'\non = ['job_end']\nusers = ['ann', 9]\n\
             [[notify]]\nname = 'bell'\ncommand = ['/bin/notify', '-x']\npolicies = ['re*']\n",
        )
        .unwrap();
        let webhook = To::Webhook { url: "https://h/x".to_owned(), secret_file: Some("/k".into()) };
        assert_eq!((&all[0].to, &all[0].on, &all[0].uids), (&webhook, &vec![Kind::JobEnd], &vec![7, 9]));
        assert_eq!((all[1].on.len(), all[1].policies[0].as_str()), (Kind::ALL.len(), "re*"));
    }

    #[test]
    fn what_cannot_be_meant_is_named_with_its_line() {
        for (text, words) in [
            ("[[notify]]\nname = 'a'\n", "names neither"),
            ("[[notify]]\nname = 'a'\nurl = 'https://h'\ncommand = ['/x']\n", "one of them"),
            ("[[notify]]\nname = 'a b'\nurl = 'https://h'\n", "line 2: [[notify]] 1 name"),
            ("[[notify]]\nname = 'a'\ncommand = ['x']\n", "absolute path"),
            ("[[notify]]\nname = 'a'\ncommand = ['/x']\nsecret_file = '/k'\n", "secret_file"),
            ("[[notify]]\nname = 'a'\nurl = 'https://h'\nsecret_file = 'k'\n", "not an absolute path"),
            (
                "[[notify]]\nname = 'a'\nurl = 'https://h'\non = ['tea']\n",
                "line 4: [[notify]] 1 on: there is no \"tea\"",
            ),
            ("[[notify]]\nname = 'a'\nurl = 'https://h'\nusers = ['bob']\n", "there is no user \"bob\""),
            ("[[notify]]\nname = 'a'\nurl = 'https://h'\npolicies = ['a*b']\n", "only at the end"),
            (
                "[[notify]]\nname = 'a'\nurl = 'https://h'\n[[notify]]\nname = 'a'\nurl = 'https://h'\n",
                "line 5",
            ),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
