//! Which paths of a workspace a cell never sees: the policy's `hide`, globs as in `.gitignore`. What no rule can mean
//! (a comment, an exception with `!`, a path that climbs) is an error: a rule must never hide less than it seems to.
//! Pure.

use ignore::gitignore::{Gitignore, GitignoreBuilder};

use super::TreePath;

/// Most rules of one policy.
pub const RULES_MAX: usize = 256;
/// Longest rule, in bytes.
pub const RULE_BYTES_MAX: usize = 256;
/// Most wildcards in one rule: what compiles to a large automaton is no name.
const STARS_MAX: usize = 8;

/// Why the rules cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HideError {
    /// Too many.
    #[error("{count} rules; at most {RULES_MAX} can hide something")]
    TooMany {
        /// How many there are.
        count: usize,
    },
    /// One cannot be meant.
    #[error("{rule:?}: {problem}")]
    Bad {
        /// Its place in the list, counted from 0.
        index: usize,
        /// The rule.
        rule: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Each is fine, together they are too large to be compiled.
    #[error("the rules cannot be compiled together ({0}): use fewer or shorter ones")]
    TooLarge(String),
}

/// The compiled rules. None hides nothing.
#[derive(Debug, Clone, Default)]
pub struct HideRules(Option<Compiled>);

#[derive(Debug, Clone)]
struct Compiled {
    rules: Gitignore,
    /// How names begin and end that can match, by their first byte; where that is not known, by their last one. Most
    /// names are told apart by that, without the automaton: a workspace has many.
    first: Vec<Vec<Ends>>,
    last: Vec<Vec<Ends>>,
    /// Those of rules of whose names nothing is known.
    any: Vec<Ends>,
}

impl HideRules {
    /// Compiles `rules`: a name without a slash counts at any depth, one with a slash at its beginning or in its
    /// middle from the root of the workspace, one with a slash at its end for directories only; `*`, `?`, `[a-z]`
    /// and `**` as in `.gitignore`; `{a,b}` is either.
    ///
    /// # Errors
    /// [`HideError`].
    pub fn new(rules: &[String]) -> Result<Self, HideError> {
        if rules.len() > RULES_MAX {
            return Err(HideError::TooMany { count: rules.len() });
        }
        if rules.is_empty() {
            return Ok(Self(None));
        }
        let (mut first, mut last, mut any) = (vec![Vec::new(); 256], vec![Vec::new(); 256], Vec::new());
        let mut builder = GitignoreBuilder::new("");
        builder.allow_unclosed_class(false);
        for (index, rule) in rules.iter().enumerate() {
            let bad = |problem: String| HideError::Bad { index, rule: rule.clone(), problem };
            problem(rule).map_or(Ok(()), |words| Err(bad(words.to_owned())))?;
            builder.add_line(None, rule).map_err(|error| bad(error.to_string()))?;
            let own = Ends::of(rule);
            let place = match (own.begins.first(), own.ends.last()) {
                (Some(byte), _) => &mut first[usize::from(*byte)],
                (None, Some(byte)) => &mut last[usize::from(*byte)],
                (None, None) => &mut any,
            };
            place.push(own);
        }
        let rules = builder.build().map_err(|error| HideError::TooLarge(error.to_string()))?;
        Ok(Self(Some(Compiled { rules, first, last, any })))
    }

    /// No rule at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Whether the cell must not see `path`, because of its own name or because it lies below a directory that is
    /// hidden. `is_dir` speaks of `path` itself.
    pub fn hides(&self, path: &TreePath, is_dir: bool) -> bool {
        self.0.as_ref().is_some_and(|rules| {
            let bytes = path.as_bytes();
            let above =
                bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &bytes[..at]);
            above.map(|dir| (dir, true)).chain([(bytes, is_dir)]).any(|(part, dir)| rules.matched(part, dir))
        })
    }

    /// The same of `path` alone, for a walk that does not enter what is hidden.
    pub fn hides_here(&self, path: &TreePath, is_dir: bool) -> bool {
        self.0.as_ref().is_some_and(|rules| rules.matched(path.as_bytes(), is_dir))
    }
}

impl Compiled {
    fn matched(&self, path: &[u8], is_dir: bool) -> bool {
        use std::os::unix::ffi::OsStrExt;
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
        self.may_match(name) && self.rules.matched(std::ffi::OsStr::from_bytes(path), is_dir).is_ignore()
    }

    /// False only where no rule matches a path with this name.
    fn may_match(&self, name: &[u8]) -> bool {
        let (Some(first), Some(last)) = (name.first(), name.last()) else { return true };
        let (first, last) = (&self.first[usize::from(*first)], &self.last[usize::from(*last)]);
        let can = |ends: &Ends| name.starts_with(&ends.begins) && name.ends_with(&ends.ends);
        first.iter().chain(last).chain(&self.any).any(can)
    }
}

/// How the name of everything that a rule matches begins and ends; empty where nothing is known.
#[derive(Debug, Clone)]
struct Ends {
    begins: Vec<u8>,
    ends: Vec<u8>,
}

impl Ends {
    fn of(rule: &str) -> Self {
        let body = rule.trim_end_matches('/');
        let special = |c: char| matches!(c, '*' | '?' | '[' | ']' | '{' | '}' | '\\');
        // A slash in a class or in an alternative divides no parts.
        let unclear = body.contains('/') && body.contains(['[', '{']);
        let name = body.rsplit('/').next().filter(|_| !unclear).unwrap_or("*");
        let begins = name.split(special).next().unwrap_or("");
        let ends = name.rsplit(special).next().unwrap_or("");
        Self { begins: begins.into(), ends: ends.into() }
    }
}

/// What is wrong with a rule that would parse.
fn problem(rule: &str) -> Option<&'static str> {
    let body = rule.trim_start_matches('/').trim_end_matches('/');
    if rule.len() > RULE_BYTES_MAX {
        return Some("is longer than 256 bytes");
    }
    if rule.trim() != rule || body.is_empty() || rule.contains(char::is_control) {
        return Some("must be a name or a path, without blanks around it");
    }
    if rule.starts_with('!') {
        return Some("is an exception: what is hidden cannot be shown again; name what to hide more exactly");
    }
    if rule.starts_with('#') {
        return Some("is a comment in .gitignore: write \\# for a name that begins with '#'");
    }
    if rule.starts_with("//") || body.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Some("matches nothing: no path below a workspace has an empty part, `.` or `..`");
    }
    if rule.matches('*').count() > STARS_MAX {
        return Some("has more than 8 stars");
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules(rules: &[&str]) -> Result<HideRules, HideError> {
        HideRules::new(&rules.iter().map(|r| (*r).to_owned()).collect::<Vec<_>>())
    }

    fn hides(rule: &str, path: &[u8], is_dir: bool) -> bool {
        rules(&[rule]).expect(rule).hides(&TreePath::new(path).expect("a path"), is_dir)
    }

    proptest! {
        #[test]
        fn no_rule_hides_less_by_being_looked_at_by_its_ends_first(
            rules in prop::collection::vec("[ab.*?{},/\\\\\\[\\]-]{1,7}", 1..4),
            path in "[ab.-]{1,4}(/[ab.-]{1,4}){0,2}",
            is_dir in any::<bool>(),
        ) {
            let Ok(compiled) = HideRules::new(&rules) else { return Ok(()) };
            let Ok(path) = TreePath::new(path) else { return Ok(()) };
            let whole = compiled.0.as_ref().expect("rules");
            let plain = whole.rules.matched(path.as_path(), is_dir).is_ignore();
            prop_assert_eq!(compiled.hides_here(&path, is_dir), plain, "{:?} {:?}", rules, path);
        }
    }

    #[test]
    fn rules_mean_what_they_mean_in_gitignore() {
        for (rule, path, is_dir, hidden) in [
            (".env*", ".env", false, true),
            (".env*", "a/b/.env.local", false, true),
            (".env*", "a/b/x.env", false, false),
            ("*.pem", "deep/down/key.pem", false, true),
            ("*.pem", "key.PEM", false, false),
            ("/top", "top", false, true),
            ("/top", "a/top", false, false),
            ("a/b", "a/b", false, true),
            ("a/b", "x/a/b", false, false),
            ("secrets/", "secrets", true, true),
            ("secrets/", "secrets", false, false),
            ("secrets/", "a/secrets/deep/file", false, true),
            ("**/x/y", "q/x/y", false, true),
            ("a/**/z", "a/z", false, true),
            ("a/**/z", "a/b/c/z", false, true),
            ("a/**", "a", true, false),
            ("a/**", "a/b", false, true),
            ("k?y", "key", false, true),
            ("k?y", "k/y", false, false),
            ("id_[dr]sa", "id_rsa", false, true),
            ("\\#x", "#x", false, true),
            ("a b", "a b", false, true),
            ("*", "anything", false, true),
            ("a*/b", "a/x/b", false, false),
        ] {
            assert_eq!(hides(rule, path.as_bytes(), is_dir), hidden, "{rule} {path}");
        }
    }

    #[test]
    fn what_lies_below_a_hidden_directory_is_hidden_and_its_own_name_alone_is_asked_in_a_walk() {
        let rules = rules(&[".aws"]).expect("rules");
        let path = |text: &str| TreePath::new(text).expect("a path");
        assert!(rules.hides(&path("home/.aws/credentials"), false));
        assert!(!rules.hides_here(&path("home/.aws/credentials"), false));
        assert!(rules.hides_here(&path("home/.aws"), true));
        assert!(!rules.hides(&path("home/.awsx/credentials"), false));
    }

    /// A tree of fifty thousand paths, and the word of git itself about each; the shipped policies' rules.
    #[test]
    fn in_a_large_tree_the_same_is_hidden_that_git_would_ignore_and_soon() {
        let names = [
            "src",
            "main.c",
            ".env",
            "lib",
            "docs",
            ".env.local",
            "test",
            "x",
            ".env.x.local",
            "a.pem",
            "y",
            "tool",
            ".aws",
            "credentials",
            "data",
            ".ssh",
            "id_rsa.pub",
            "keys",
            "app",
            "server.key",
            "x.key.txt",
            "core",
            "service-account-1.json",
            "util",
            "credentials.json",
            ".npmrc",
            "z",
            "state.tfstate",
            "env",
            "Makefile",
        ];
        let policy: toml::Value =
            toml::from_str(include_str!("../../policies/trusted.toml")).expect("parses");
        let shipped: Vec<String> = policy["workspace"]["hide"].clone().try_into().expect("a list");
        let compiled = HideRules::new(&shipped).expect("rules");
        let paths: Vec<String> = (0..50_000_usize)
            .map(|n| {
                let part = |by: usize| names[(n / by) % names.len()];
                format!("d{}/{}/{}/{}-{n}/{}", n % 97, part(1), part(30), n % 7, part(900))
            })
            .collect();
        let begun = std::time::Instant::now();
        let hidden: Vec<&String> = paths
            .iter()
            .filter(|path| compiled.hides(&TreePath::new(path.as_str()).expect("a path"), false))
            .collect();
        let took = begun.elapsed();
        let dir = tempfile::tempdir().expect("tempdir");
        let git = |args: &[&str]| {
            let mut command = std::process::Command::new("git");
            command.args(args).current_dir(dir.path()).env("GIT_CONFIG_GLOBAL", "/dev/null");
            command.env("GIT_CONFIG_NOSYSTEM", "1");
            command
        };
        assert!(git(&["init", "-q"]).status().expect("git").success());
        std::fs::write(dir.path().join(".git/info/exclude"), shipped.join("\n")).expect("written");
        std::fs::write(dir.path().join("all"), paths.join("\0")).expect("written");
        let all = std::fs::File::open(dir.path().join("all")).expect("opened");
        let output = git(&["check-ignore", "--no-index", "--stdin", "-z"]).stdin(all).output().expect("git");
        let ignored = String::from_utf8(output.stdout).expect("text");
        let ignored: Vec<&str> = ignored.split_terminator('\0').collect();
        assert!(
            hidden.iter().map(|path| path.as_str()).eq(ignored.iter().copied()),
            "{} {}",
            hidden.len(),
            ignored.len()
        );
        assert!((10_000..45_000).contains(&hidden.len()), "{}", hidden.len());
        // Unoptimised and on a busy machine; it is some 50 ms otherwise.
        assert!(took < std::time::Duration::from_secs(20), "{took:?}");
        eprintln!("{} of 50,000 paths hidden in {took:?}", hidden.len());
    }

    #[test]
    fn names_of_any_bytes_are_matched() {
        for path in [&b"\xff\xfe.pem"[..], b"a\nb.pem", "ü/ß.pem".as_bytes(), b"x/\xff/y.pem"] {
            assert!(hides("*.pem", path, false), "{path:?}");
        }
        assert!(hides(".env*", b"d/.env\xff", false));
    }

    #[test]
    fn a_rule_that_cannot_be_meant_is_named() {
        for bad in [
            "",
            " ",
            "/",
            "//",
            "!x",
            "#x",
            "../x",
            "a/../b",
            "./x",
            "a//b",
            "//a",
            " x",
            "x ",
            "a\nb",
            "[a",
            "**********",
        ] {
            match rules(&["ok", bad]) {
                Err(HideError::Bad { index: 1, rule, .. }) => assert_eq!(rule, bad),
                other => panic!("{bad:?}: {other:?}"),
            }
        }
        assert!(rules(&[&"x".repeat(RULE_BYTES_MAX + 1)]).is_err());
        let many: Vec<String> = (0..=RULES_MAX).map(|n| format!("n{n}")).collect();
        assert_eq!(HideRules::new(&many).err(), Some(HideError::TooMany { count: RULES_MAX + 1 }));
    }

    #[test]
    fn no_rule_hides_nothing() {
        let none = rules(&[]).expect("rules");
        assert!(none.is_empty() && !none.hides(&TreePath::new(".env").expect("a path"), false));
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_compiles_hides_below_what_it_hides(
            rule in "[a-c*?/.\\[\\]{}!#\\\\ \u{e9}-]{0,12}",
            path in "[a-c.]{1,3}(/[a-c.]{1,3}){0,2}",
        ) {
            if let (Ok(rules), Ok(path)) = (rules(&[&rule]), TreePath::new(path))
                && rules.hides(&path, true)
            {
                prop_assert!(rules.hides(&path.join(b"x").expect("a path"), false));
            }
        }
    }
}
