//! `[changes]`: which kinds of change a policy lets pass, flags for a person's word, or refuses. Pure. What can do
//! harm by being there at all (devices, setuid files, the inside of a `.git`) no policy can let pass.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::change::{Flag, Verdict};

/// The policy's word on changes. A kind that no list names keeps its default: a link that stays inside is plain; a
/// link that leads out, the inside of a `.git`, special files and hidden names are refused; the rest is flagged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Changes {
    /// Kinds that are applied like any other change.
    pub plain: Vec<Flag>,
    /// Kinds that are applied only when somebody says so.
    pub flagged: Vec<Flag>,
    /// Kinds that are never applied.
    pub refused: Vec<Flag>,
}

/// What is done with a kind that no list names.
fn default_of(flag: Flag) -> Verdict {
    match flag {
        Flag::SymlinkInside => Verdict::Plain,
        Flag::Executable
        | Flag::Submodule
        | Flag::Ci
        | Flag::AgentSettings
        | Flag::Editor
        | Flag::Shell
        | Flag::Package
        | Flag::Secret
        | Flag::LargeBinary
        | Flag::CaseClash => Verdict::Flagged,
        Flag::SymlinkOutside | Flag::Git | Flag::Special | Flag::Hidden => Verdict::Refused,
    }
}

/// Kinds that are refused whatever a policy says.
fn never_applied(flag: Flag) -> bool {
    matches!(flag, Flag::Special | Flag::Git)
}

impl Changes {
    /// What is done with one kind of change.
    pub fn of(&self, flag: Flag) -> Verdict {
        if never_applied(flag) || self.refused.contains(&flag) {
            return Verdict::Refused;
        }
        if self.flagged.contains(&flag) {
            return Verdict::Flagged;
        }
        if self.plain.contains(&flag) { Verdict::Plain } else { default_of(flag) }
    }

    /// What is done with a change that has all these kinds: the worst of them.
    pub fn verdict(&self, flags: &[Flag]) -> Verdict {
        flags.iter().map(|flag| self.of(*flag)).max().unwrap_or(Verdict::Plain)
    }

    /// Both must let it pass: what a user's own file does not name stays as it is here.
    pub fn stricter(&self, own: &Self) -> Self {
        let named = |flag: &Flag| [&own.plain, &own.flagged, &own.refused].iter().any(|l| l.contains(flag));
        let mut both = Self::default();
        for flag in Flag::ALL {
            let here = self.of(flag);
            let verdict = if named(&flag) { here.max(own.of(flag)) } else { here };
            let list = match verdict {
                Verdict::Plain => &mut both.plain,
                Verdict::Flagged => &mut both.flagged,
                Verdict::Refused => &mut both.refused,
            };
            list.push(flag);
        }
        both
    }

    /// Key and problem of the first kind that two lists name, or that cannot be let pass.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let lists = [("plain", &self.plain), ("flagged", &self.flagged), ("refused", &self.refused)];
        let mut seen: Vec<(Flag, &str)> = Vec::new();
        for (name, list) in lists {
            for (index, flag) in list.iter().enumerate() {
                let wrong = |problem: String| Err((format!("changes.{name}[{index}]"), problem));
                let word = word(*flag);
                if let Some((_, other)) = seen.iter().find(|(other, _)| other == flag) {
                    return wrong(format!("{word} stands in changes.{other} already: one list decides"));
                }
                if name != "refused" && never_applied(*flag) {
                    return wrong(format!("{word} is never applied: leave it out, or list it as refused"));
                }
                seen.push((*flag, name));
            }
        }
        Ok(())
    }
}

/// As it stands in a file.
fn word(flag: Flag) -> String {
    serde_json::to_value(flag).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn changes(text: &str) -> Changes {
        toml::from_str(text).expect("parses")
    }

    #[test]
    fn what_no_list_names_keeps_its_default() {
        let none = Changes::default();
        assert_eq!(none.verdict(&[]), Verdict::Plain);
        assert_eq!(none.verdict(&[Flag::SymlinkInside]), Verdict::Plain);
        assert_eq!(none.verdict(&[Flag::SymlinkInside, Flag::Ci]), Verdict::Flagged);
        assert_eq!(none.verdict(&[Flag::Package, Flag::SymlinkOutside, Flag::Ci]), Verdict::Refused);
        for refused in [Flag::Git, Flag::Special, Flag::Hidden, Flag::SymlinkOutside] {
            assert_eq!(none.of(refused), Verdict::Refused, "{refused:?}");
        }
    }

    #[test]
    fn a_policy_moves_kinds_but_never_those_that_do_harm_by_being_there() {
        let policy = changes(
            "plain = ['package', 'ci']\nflagged = ['hidden', 'symlink-inside']\nrefused = ['secret']",
        );
        assert_eq!(policy.check(), Ok(()));
        assert_eq!(policy.verdict(&[Flag::Package, Flag::Ci]), Verdict::Plain);
        assert_eq!(policy.verdict(&[Flag::Hidden]), Verdict::Flagged);
        assert_eq!(policy.verdict(&[Flag::Secret]), Verdict::Refused);
        let careless = changes("plain = ['special', 'git']");
        assert_eq!(
            (careless.of(Flag::Special), careless.of(Flag::Git)),
            (Verdict::Refused, Verdict::Refused)
        );
    }

    #[test]
    fn a_mistake_is_named_by_its_key() {
        for (text, key, words) in [
            ("plain = ['ci']\nrefused = ['secret', 'ci']", "changes.refused[1]", "changes.plain"),
            ("flagged = ['shell', 'shell']", "changes.flagged[1]", "shell"),
            ("plain = ['special']", "changes.plain[0]", "never applied"),
            ("flagged = ['ci', 'git']", "changes.flagged[1]", "never applied"),
        ] {
            let (at, problem) = changes(text).check().expect_err(text);
            assert!(at == key && problem.contains(words), "{at}: {problem}");
        }
        assert_eq!(changes("refused = ['special', 'git']").check(), Ok(()));
        assert!(toml::from_str::<Changes>("plain = ['everything']").is_err());
    }

    fn any_changes() -> impl Strategy<Value = Changes> {
        prop::collection::vec(0..4usize, Flag::ALL.len()).prop_map(|lists| {
            let of = |wanted: usize| {
                Flag::ALL.iter().zip(&lists).filter(|(_, l)| **l == wanted).map(|(f, _)| *f).collect()
            };
            Changes { plain: of(0), flagged: of(1), refused: of(2) }
        })
    }

    proptest! {
        #[test]
        fn a_users_own_file_only_makes_it_stricter(policy in any_changes(), own in any_changes()) {
            let both = policy.stricter(&own);
            for flag in Flag::ALL {
                prop_assert!(both.of(flag) >= policy.of(flag));
                let named = own.plain.contains(&flag) || own.flagged.contains(&flag) || own.refused.contains(&flag);
                let expected = if named { policy.of(flag).max(own.of(flag)) } else { policy.of(flag) };
                prop_assert_eq!(both.of(flag), expected);
            }
        }
    }
}
