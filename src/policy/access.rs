//! Who may use what of this daemon: the operator's `[[access]]` entries against who asks. One pure function
//! ([`Access::grant`]), so that submit, `whoami` and every other route answer the same. The identity is the
//! kernel's; names were resolved when the daemon started.
//!
//! *Invariant*: with any entry, who matches none of them and is no admin has no [`Grant`]; and a grant holds
//! nothing that no matching entry gives.

use serde::{Deserialize, Serialize};

use super::matches;
use crate::job::Identity;
use crate::money::MicroUsd;

/// One `[[access]]` entry, with ids in place of names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Which entry it is, for people: number, file and line.
    pub name: String,
    /// Host user ids it is for.
    pub uids: Vec<u32>,
    /// Host group ids it is for, primary or supplementary.
    pub gids: Vec<u32>,
    /// Policies, or beginnings of names with a final `*`.
    pub policies: Vec<String>,
    /// Providers, likewise.
    pub providers: Vec<String>,
    /// Images, likewise.
    pub images: Vec<String>,
    /// Jobs of one user that run at the same time; the daemon's slots where absent.
    pub slots: Option<u32>,
    /// What one user may spend per day, in micro-USD; no limit from here where absent.
    pub day_usd: Option<MicroUsd>,
    /// The policy of a job that names none; the daemon's default where absent.
    pub default_policy: Option<String>,
}

impl Rule {
    /// True when the entry is for this identity.
    fn is_for(&self, who: &Identity) -> bool {
        let in_group = |gid: &u32| *gid == who.gid || who.groups.contains(gid);
        self.uids.contains(&who.uid) || self.gids.iter().any(in_group)
    }
}

/// What one identity may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The entries that matched, for people. Empty: there are none, or an admin asks.
    pub entries: Vec<String>,
    /// Policies, or beginnings of names with a final `*`.
    pub policies: Vec<String>,
    /// Providers, likewise.
    pub providers: Vec<String>,
    /// Images, likewise.
    pub images: Vec<String>,
    /// Jobs that run at the same time; the daemon's slots where absent.
    pub slots: Option<u32>,
    /// What may be spent per day, in micro-USD; no limit from here where absent.
    pub day_usd: Option<MicroUsd>,
    /// The policy of a job that names none; the daemon's default where absent.
    pub default_policy: Option<String>,
}

/// A job asks for what its submitter may not use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {asked:?} is not among what you may use ({allowed}), by {entries}")]
pub struct AccessError {
    /// The key of the spec.
    pub key: &'static str,
    /// What was asked, or what it comes to where nothing was.
    pub asked: String,
    /// What is allowed.
    pub allowed: String,
    /// The entries that say so.
    pub entries: String,
}

impl Grant {
    /// Everything: a daemon without entries, or an admin.
    pub fn everything() -> Self {
        let every = || vec!["*".to_owned()];
        Self {
            entries: Vec::new(),
            policies: every(),
            providers: every(),
            images: every(),
            slots: None,
            day_usd: None,
            default_policy: None,
        }
    }

    /// True for a policy that may be named.
    pub fn has_policy(&self, name: &str) -> bool {
        self.policies.iter().any(|p| matches(p, name))
    }

    /// May a job run under this policy?
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn policy(&self, name: &str) -> Result<(), AccessError> {
        self.one_of("policy", name, &self.policies)
    }

    /// May a job be sent to this provider?
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn provider(&self, name: &str) -> Result<(), AccessError> {
        self.one_of("provider", name, &self.providers)
    }

    /// May a job run in this image?
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn image(&self, reference: &str) -> Result<(), AccessError> {
        self.one_of("image", reference, &self.images)
    }

    fn one_of(&self, key: &'static str, asked: &str, patterns: &[String]) -> Result<(), AccessError> {
        if patterns.iter().any(|p| matches(p, asked)) {
            return Ok(());
        }
        let (allowed, entries) = (patterns.join(", "), self.entries.join(" and "));
        Err(AccessError { key, asked: asked.to_owned(), allowed, entries })
    }

    /// Adds what a further entry gives.
    fn add(&mut self, rule: &Rule) {
        let join = |all: &mut Vec<String>, more: &[String]| {
            for pattern in more {
                if !all.contains(pattern) {
                    all.push(pattern.clone());
                }
            }
        };
        self.entries.push(rule.name.clone());
        join(&mut self.policies, &rule.policies);
        join(&mut self.providers, &rule.providers);
        join(&mut self.images, &rule.images);
        // Absent is "no limit from here", and the highest of several counts.
        self.slots = self.slots.zip(rule.slots).map(|(a, b)| a.max(b));
        self.day_usd = self.day_usd.zip(rule.day_usd).map(|(a, b)| a.max(b));
        if self.default_policy.is_none() {
            self.default_policy.clone_from(&rule.default_policy);
        }
    }

    fn of(rule: &Rule) -> Self {
        Self {
            entries: vec![rule.name.clone()],
            policies: rule.policies.clone(),
            providers: rule.providers.clone(),
            images: rule.images.clone(),
            slots: rule.slots,
            day_usd: rule.day_usd,
            default_policy: rule.default_policy.clone(),
        }
    }
}

/// What `who` may use by these entries: all that match add up (any of their patterns, the highest of their
/// limits, the first default policy). Without entries everybody may use everything.
pub fn grant(rules: &[Rule], who: &Identity) -> Option<Grant> {
    if rules.is_empty() {
        return Some(Grant::everything());
    }
    let mut grant: Option<Grant> = None;
    for rule in rules.iter().filter(|rule| rule.is_for(who)) {
        match &mut grant {
            None => grant = Some(Grant::of(rule)),
            Some(grant) => grant.add(rule),
        }
    }
    grant
}

/// The entries of a daemon, and whom they do not bind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// The entries, in the order of the file.
    pub rules: Vec<Rule>,
    /// Host user ids that see everybody's jobs and may use everything.
    pub admin_uids: Vec<u32>,
}

impl Access {
    /// True for who sees everybody's jobs.
    pub fn is_admin(&self, uid: u32) -> bool {
        self.admin_uids.contains(&uid)
    }

    /// What `who` may use; none: nothing at all.
    pub fn grant(&self, who: &Identity) -> Option<Grant> {
        if self.is_admin(who.uid) { Some(Grant::everything()) } else { grant(&self.rules, who) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn who(uid: u32, gid: u32, groups: &[u32]) -> Identity {
        Identity { uid, gid, groups: groups.to_vec() }
    }

    fn rule(name: &str, uids: &[u32], gids: &[u32], policies: &[&str]) -> Rule {
        Rule {
            name: name.into(),
            uids: uids.to_vec(),
            gids: gids.to_vec(),
            policies: policies.iter().map(|p| (*p).to_owned()).collect(),
            providers: vec!["anthropic".into()],
            images: vec!["hotcell/*".into()],
            slots: None,
            day_usd: None,
            default_policy: None,
        }
    }

    #[test]
    fn without_entries_everybody_may_and_with_one_only_who_is_listed() {
        assert_eq!(grant(&[], &who(7, 7, &[])), Some(Grant::everything()));
        let rules = [rule("entry 1", &[1], &[50], &["review*"])];
        assert_eq!(grant(&rules, &who(7, 7, &[8])), None);
        assert!(grant(&rules, &who(1, 7, &[])).is_some(), "by user");
        assert!(grant(&rules, &who(7, 50, &[])).is_some(), "by primary group");
        assert!(grant(&rules, &who(7, 7, &[9, 50])).is_some(), "by another group");
        let access = Access { rules: rules.to_vec(), admin_uids: vec![0] };
        assert_eq!(access.grant(&who(0, 0, &[])), Some(Grant::everything()));
        assert_eq!(access.grant(&who(7, 7, &[])), None);
        assert_eq!(grant(&[rule("e", &[], &[], &["*"])], &who(0, 0, &[])), None, "an empty list is nobody");
    }

    #[test]
    fn what_is_not_granted_is_named_with_the_entry() {
        let granted = grant(&[rule("[[access]] 1", &[1], &[], &["review*", "untrusted"])], &who(1, 1, &[]));
        let granted = granted.expect("listed");
        assert_eq!(granted.policy("review-small"), Ok(()));
        assert_eq!(
            granted.policy("trusted").expect_err("above").to_string(),
            "policy: \"trusted\" is not among what you may use (review*, untrusted), by [[access]] 1"
        );
        assert_eq!(granted.provider("bedrock").expect_err("above").key, "provider");
        assert_eq!(granted.image("debian").expect_err("above").key, "image");
        assert!(granted.image("hotcell/cell").is_ok());
    }

    #[test]
    fn entries_add_up_and_the_highest_limit_counts() {
        let mut first = rule("a", &[1], &[], &["review"]);
        (first.slots, first.day_usd) = (Some(2), Some(MicroUsd(5)));
        let mut second = rule("b", &[], &[9], &["trusted"]);
        (second.slots, second.day_usd) = (Some(1), None);
        second.default_policy = Some("trusted".into());
        let both = grant(&[first, second], &who(1, 9, &[])).expect("listed");
        assert_eq!((both.slots, both.day_usd), (Some(2), None));
        assert_eq!(both.policies, ["review", "trusted"]);
        assert_eq!(both.entries, ["a", "b"]);
        assert_eq!(both.default_policy.as_deref(), Some("trusted"));
    }

    fn name() -> impl Strategy<Value = String> {
        "[ab]{1,3}\\*?"
    }

    prop_compose! {
        fn any_rule()(
            uids in proptest::collection::vec(0u32..4, 0..3),
            gids in proptest::collection::vec(0u32..4, 0..3),
            policies in proptest::collection::vec(name(), 1..3),
            slots in proptest::option::of(1u32..5),
            day in proptest::option::of(0u64..5),
        ) -> Rule {
            let mut rule = rule("r", &uids, &gids, &[]);
            (rule.policies, rule.slots, rule.day_usd) = (policies, slots, day.map(MicroUsd));
            rule
        }
    }

    proptest! {
        #[test]
        fn a_grant_is_what_the_matching_entries_give_and_nothing_else(
            rules in proptest::collection::vec(any_rule(), 1..5),
            uid in 0u32..4, gid in 0u32..4, groups in proptest::collection::vec(0u32..4, 0..3),
            asked in "[ab]{1,4}",
        ) {
            let me = who(uid, gid, &groups);
            let mine: Vec<&Rule> = rules
                .iter()
                .filter(|r| r.uids.contains(&uid) || r.gids.iter().any(|g| *g == gid || groups.contains(g)))
                .collect();
            let granted = grant(&rules, &me);
            prop_assert_eq!(granted.is_some(), !mine.is_empty());
            let Some(granted) = granted else { return Ok(()) };
            let by_entry = mine.iter().any(|r| r.policies.iter().any(|p| matches(p, &asked)));
            prop_assert_eq!(granted.policy(&asked).is_ok(), by_entry);
            let most = |all: Vec<Option<u64>>| all.into_iter().collect::<Option<Vec<u64>>>().and_then(|l| l.into_iter().max());
            prop_assert_eq!(granted.slots.map(u64::from), most(mine.iter().map(|r| r.slots.map(u64::from)).collect()));
            prop_assert_eq!(granted.day_usd.map(|m| m.0), most(mine.iter().map(|r| r.day_usd.map(|m| m.0)).collect()));
        }
    }
}
