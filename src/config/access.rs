//! `[[access]]` entries and the names of users and groups: from the file's text to ids and patterns. Reads the
//! machine's user and group files, once, when the daemon starts; a name that they do not hold is an error and
//! never nobody. What the entries mean is `crate::policy::access`'s.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Deserializer, de};
use toml::Spanned;

use super::ConfigError;
use super::raw::Opt;
use crate::money::MicroUsd;
use crate::policy::access::Rule;

/// Most entries of one file.
const ENTRIES_MAX: usize = 1000;
/// Largest user or group file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// One entry as it stands in the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAccess {
    users: Opt<Vec<Spanned<NameOrId>>>,
    groups: Opt<Vec<Spanned<NameOrId>>>,
    policies: Spanned<Vec<String>>,
    providers: Opt<Vec<String>>,
    images: Opt<Vec<String>>,
    slots: Opt<i64>,
    user_day_usd: Opt<f64>,
    default_policy: Opt<String>,
}

/// A user or a group: a name, or an id as a number or in digits.
#[derive(Debug)]
pub(super) struct NameOrId(pub(super) String);

impl<'de> Deserialize<'de> for NameOrId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl de::Visitor<'_> for Either {
            type Value = NameOrId;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name or an id")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<NameOrId, E> {
                Ok(NameOrId(text.to_owned()))
            }
            fn visit_i64<E: de::Error>(self, id: i64) -> Result<NameOrId, E> {
                Ok(NameOrId(id.to_string()))
            }
            fn visit_u64<E: de::Error>(self, id: u64) -> Result<NameOrId, E> {
                Ok(NameOrId(id.to_string()))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// Users and groups by name, as the machine's files have them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    users: BTreeMap<String, u32>,
    groups: BTreeMap<String, u32>,
}

impl Names {
    /// Those of this machine. A file that cannot be read holds no names: numbers still do.
    pub fn of_machine() -> Self {
        let read = |path: &str| {
            super::raw::read_at_most(Path::new(path), FILE_BYTES_MAX)
                .inspect_err(|error| tracing::warn!(%error, path, "names cannot be resolved"))
                .unwrap_or_default()
        };
        Self::parse(&read("/etc/passwd"), &read("/etc/group"))
    }

    /// From the text of passwd(5) and group(5): name and id are their first and third field.
    pub fn parse(passwd: &str, group: &str) -> Self {
        let table = |text: &str| {
            let entry = |line: &str| {
                let mut fields = line.split(':');
                let (name, id) = (fields.next()?, fields.nth(1)?);
                Some((name.to_owned(), id.parse().ok()?)).filter(|(name, _)| !name.is_empty())
            };
            let mut all = BTreeMap::new();
            // The first line of a name counts, as for the system.
            for (name, id) in text.lines().filter_map(entry) {
                all.entry(name).or_insert(id);
            }
            all
        };
        Self { users: table(passwd), groups: table(group) }
    }

    /// The id of a user, given by name or as digits.
    pub fn uid(&self, text: &str) -> Option<u32> {
        text.parse().ok().or_else(|| self.users.get(text).copied())
    }

    /// The id of a group, given by name or as digits.
    pub fn gid(&self, text: &str) -> Option<u32> {
        text.parse().ok().or_else(|| self.groups.get(text).copied())
    }

    /// The name of a user.
    pub fn user(&self, uid: u32) -> Option<&str> {
        self.users.iter().find(|(_, id)| **id == uid).map(|(name, _)| name.as_str())
    }

    /// The name of a group.
    pub fn group(&self, gid: u32) -> Option<&str> {
        self.groups.iter().find(|(_, id)| **id == gid).map(|(name, _)| name.as_str())
    }
}

/// Where an entry stands, for its errors.
struct Place<'a> {
    path: &'a Path,
    text: &'a str,
    /// From 1, as people count.
    number: usize,
}

impl Place<'_> {
    fn line(&self, at: usize) -> usize {
        self.text.get(..at).unwrap_or("").matches('\n').count() + 1
    }

    fn wrong(&self, at: usize, key: &str, problem: impl Into<String>) -> ConfigError {
        ConfigError::Entry {
            origin: format!("{}, line {}", self.path.display(), self.line(at)),
            key: format!("[[access]] {} {key}", self.number).trim_end().to_owned(),
            problem: problem.into(),
        }
    }

    fn ids(
        &self,
        key: &str,
        raw: &Opt<Vec<Spanned<NameOrId>>>,
        find: impl Fn(&str) -> Option<u32>,
    ) -> Result<Vec<u32>, ConfigError> {
        let mut ids = Vec::new();
        for entry in raw.iter().flat_map(|list| list.get_ref()) {
            let text = &entry.get_ref().0;
            let what = key.trim_end_matches('s');
            ids.push(find(text).ok_or_else(|| {
                self.wrong(
                    entry.span().start,
                    key,
                    format!("there is no {what} {text:?} on this machine; a number is an id"),
                )
            })?);
        }
        Ok(ids)
    }

    fn patterns(&self, key: &str, raw: &Spanned<Vec<String>>) -> Result<Vec<String>, ConfigError> {
        let (at, list) = (raw.span().start, raw.get_ref());
        if list.is_empty() {
            return Err(self.wrong(at, key, "is empty: no job could run"));
        }
        // Checked as a whole: the last byte of a name may be the only '*'.
        match list.iter().find(|p| p.trim().is_empty() || p.strip_suffix('*').unwrap_or(p).contains('*')) {
            Some(bad) => Err(self.wrong(at, key, format!("{bad:?}: a '*' may stand only at the end"))),
            None => Ok(list.clone()),
        }
    }

    fn optional(&self, key: &str, raw: &Opt<Vec<String>>) -> Result<Vec<String>, ConfigError> {
        raw.as_ref().map_or_else(|| Ok(vec!["*".to_owned()]), |list| self.patterns(key, list))
    }

    fn rule(&self, raw: &Spanned<RawAccess>, names: &Names) -> Result<Rule, ConfigError> {
        let (at, raw) = (raw.span().start, raw.get_ref());
        let uids = self.ids("users", &raw.users, |text| names.uid(text))?;
        let gids = self.ids("groups", &raw.groups, |text| names.gid(text))?;
        if uids.is_empty() && gids.is_empty() {
            return Err(self.wrong(at, "", "names neither users nor groups, so it is for nobody"));
        }
        let policies = self.patterns("policies", &raw.policies)?;
        let slots = match &raw.slots {
            None => None,
            Some(n) => Some(u32::try_from(*n.get_ref()).ok().filter(|n| (1..=4096).contains(n)).ok_or_else(
                || {
                    self.wrong(
                        n.span().start,
                        "slots",
                        format!("{} is not a whole number from 1 to 4096", n.get_ref()),
                    )
                },
            )?),
        };
        let day_usd = match &raw.user_day_usd {
            None => None,
            Some(usd) => Some(
                MicroUsd::from_usd(*usd.get_ref())
                    .map_err(|e| self.wrong(usd.span().start, "user_day_usd", e.to_string()))?,
            ),
        };
        if let Some(name) = &raw.default_policy
            && !policies.iter().any(|p| crate::policy::matches(p, name.get_ref()))
        {
            let problem = format!("{:?} is not among its policies ({})", name.get_ref(), policies.join(", "));
            return Err(self.wrong(name.span().start, "default_policy", problem));
        }
        Ok(Rule {
            name: format!("[[access]] {} ({}, line {})", self.number, self.path.display(), self.line(at)),
            uids,
            gids,
            policies,
            providers: self.optional("providers", &raw.providers)?,
            images: self.optional("images", &raw.images)?,
            slots,
            day_usd,
            default_policy: raw.default_policy.as_ref().map(|name| name.get_ref().clone()),
        })
    }
}

/// The entries of the file `path`, whose text is `text`.
pub(super) fn rules(
    path: &Path,
    text: &str,
    raw: &[Spanned<RawAccess>],
    names: &Names,
) -> Result<Vec<Rule>, ConfigError> {
    if let Some(beyond) = raw.get(ENTRIES_MAX) {
        let place = Place { path, text, number: ENTRIES_MAX + 1 };
        return Err(place.wrong(
            beyond.span().start,
            "",
            format!("there can be at most {ENTRIES_MAX} entries"),
        ));
    }
    let rule = |(index, raw)| Place { path, text, number: index + 1 }.rule(raw, names);
    raw.iter().enumerate().map(rule).collect()
}

/// The first policy that an entry names outright and that does not exist: a slip of the pen there would only
/// show as a refusal much later. Gives the entry's name and what is wrong.
pub fn unknown_name(rules: &[Rule], policies: &BTreeSet<&str>) -> Option<String> {
    let known = policies.iter().copied().collect::<Vec<_>>().join(", ");
    rules.iter().find_map(|rule| {
        let outright = rule.policies.iter().chain(&rule.default_policy).filter(|p| !p.ends_with('*'));
        let mut unknown = outright.filter(|p| !policies.contains(p.as_str()));
        unknown.next().map(|p| format!("{}: there is no policy {p:?} (there are: {known})", rule.name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct File {
        access: Vec<Spanned<RawAccess>>,
    }

    fn names() -> Names {
        Names::parse(
            "root:x:0:0::/:/bin/sh\nalice:x:1001:100::/:/bin/sh\nalice:x:7:7::/:/x\nbroken\n:x:5:5\n",
            "root:x:0:\ndev:x:50:alice\nodd:x:no:\n",
        )
    }

    fn read(text: &str) -> Result<Vec<Rule>, String> {
        let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
        rules(Path::new("config.toml"), text, &file.access, &names()).map_err(|e| e.to_string())
    }

    #[test]
    fn names_become_ids_and_a_number_is_an_id() {
        let text = "# two\n[[access]]\nusers = [\"alice\", \"1002\", 1003]\ngroups = [\"dev\"]\npolicies = [\"review*\"]\n\
                    slots = 2\nuser_day_usd = 5.0\n\n[[access]]\ngroups = [7]\npolicies = [\"*\"]\nproviders = [\"a\"]\n\
                    images = [\"x*\"]\ndefault_policy = \"review\"\n";
        let rules = read(text).expect("rules");
        assert_eq!(
            (rules[0].uids.as_slice(), rules[0].gids.as_slice()),
            ([1001, 1002, 1003].as_slice(), [50].as_slice())
        );
        assert_eq!((rules[0].slots, rules[0].day_usd), (Some(2), Some(MicroUsd(5_000_000))));
        assert_eq!((&rules[0].providers, &rules[0].images), (&vec!["*".to_owned()], &vec!["*".to_owned()]));
        assert_eq!(rules[0].name, "[[access]] 1 (config.toml, line 2)");
        assert_eq!(
            (rules[1].gids.as_slice(), rules[1].name.as_str()),
            ([7].as_slice(), "[[access]] 2 (config.toml, line 9)")
        );
        assert_eq!(rules[1].default_policy.as_deref(), Some("review"));
    }

    #[test]
    fn each_mistake_is_named_with_file_line_and_key() {
        for (text, line, wanted) in [
            ("users = [\"alice\", \"bob\"]\npolicies = [\"*\"]", 2, "users: there is no user \"bob\""),
            ("policies = [\"*\"]\ngroups = [\"staff\"]", 3, "groups: there is no group \"staff\""),
            ("users = [-1]\npolicies = [\"*\"]", 2, "users: there is no user \"-1\""),
            ("policies = [\"*\"]", 1, "names neither users nor groups"),
            ("users = [1]\npolicies = []", 3, "policies: is empty"),
            ("users = [1]\npolicies = [\"a*b\"]", 3, "policies: \"a*b\""),
            ("users = [1]\npolicies = [\"a\"]\nimages = [\"\"]", 4, "images: \"\""),
            ("users = [1]\npolicies = [\"a\"]\nslots = 0", 4, "slots: 0 is not"),
            ("users = [1]\npolicies = [\"a\"]\nuser_day_usd = -1.0", 4, "user_day_usd: not an amount"),
            (
                "users = [1]\npolicies = [\"a\"]\ndefault_policy = \"b\"",
                4,
                "default_policy: \"b\" is not among",
            ),
        ] {
            let error = read(&format!("[[access]]\n{text}\n")).expect_err(text);
            let place = format!("config.toml, line {line}: [[access]] 1");
            assert!(error.contains(&place) && error.contains(wanted), "{text}: {error}");
        }
        for (text, wanted) in [
            ("users = [1]", "missing field `policies`"),
            ("users = [1]\npolicies = [\"a\"]\nslot = 1", "unknown field `slot`"),
            ("users = [true]\npolicies = [\"a\"]", "a name or an id"),
        ] {
            let error = read(&format!("[[access]]\n{text}\n")).expect_err(text);
            assert!(error.contains(wanted) && error.contains("line"), "{error}");
        }
    }

    #[test]
    fn a_policy_that_is_named_outright_must_exist() {
        let rules = read("[[access]]\nusers = [1]\npolicies = [\"review\", \"x*\"]\n").expect("rules");
        assert_eq!(unknown_name(&rules, &BTreeSet::from(["review"])), None);
        let said = unknown_name(&rules, &BTreeSet::from(["default", "trusted"])).expect("unknown");
        assert_eq!(
            said,
            "[[access]] 1 (config.toml, line 1): there is no policy \"review\" (there are: default, trusted)"
        );
    }

    #[test]
    fn ids_have_names_for_people() {
        let names = names();
        assert_eq!((names.user(1001), names.user(7), names.user(9)), (Some("alice"), None, None));
        assert_eq!((names.group(50), names.gid("50"), names.uid("root")), (Some("dev"), Some(50), Some(0)));
    }
}
