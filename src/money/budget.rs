//! Budgets and the decision over several of them at once. *Invariant*: what is granted fits under every budget
//! beside what is charged and set aside there already. Pure; never waits and never reads a clock.

use serde::{Deserialize, Serialize};

use super::MicroUsd;
use crate::clock;

/// Whose money a budget bounds, from the innermost to the outermost.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// One job.
    Job,
    /// All jobs of one user's batch.
    Batch,
    /// All jobs of one user on one day.
    UserDay,
    /// All jobs of the daemon on one day.
    Day,
    /// All jobs of the daemon in one month.
    Month,
}

impl Scope {
    /// All of them, the innermost first.
    pub const ALL: [Self; 5] = [Self::Job, Self::Batch, Self::UserDay, Self::Day, Self::Month];

    /// The name in rows, events and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Job => "job",
            Self::Batch => "batch",
            Self::UserDay => "user_day",
            Self::Day => "day",
            Self::Month => "month",
        }
    }

    /// What people call it.
    pub fn words(self) -> &'static str {
        match self {
            Self::Job => "cost limit",
            Self::Batch => "batch budget",
            Self::UserDay => "user's budget of the day",
            Self::Day => "daemon's budget of the day",
            Self::Month => "daemon's budget of the month",
        }
    }

    /// True where time alone makes room again.
    pub fn resets(self) -> bool {
        match self {
            Self::Job | Self::Batch => false,
            Self::UserDay | Self::Day | Self::Month => true,
        }
    }
}

/// A limit on one scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Whose.
    pub scope: Scope,
    /// How much.
    pub limit: MicroUsd,
}

/// The budgets that a daemon sets for everybody; absent: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Caps {
    /// Each user's, per day.
    pub user_day: Option<MicroUsd>,
    /// The daemon's, per day.
    pub day: Option<MicroUsd>,
    /// The daemon's, per month.
    pub month: Option<MicroUsd>,
}

impl Caps {
    /// The budgets of one job, the innermost first. `user_day` is the user's own budget of the day, in place of
    /// everybody's.
    pub fn of_job(
        &self,
        job: Option<MicroUsd>,
        batch: Option<MicroUsd>,
        user_day: Option<MicroUsd>,
    ) -> Vec<Budget> {
        let all = [
            (Scope::Job, job),
            (Scope::Batch, batch),
            (Scope::UserDay, user_day.or(self.user_day)),
            (Scope::Day, self.day),
            (Scope::Month, self.month),
        ];
        all.into_iter().filter_map(|(scope, limit)| Some(Budget { scope, limit: limit? })).collect()
    }
}

/// How a budget stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Whose.
    pub scope: Scope,
    /// How much there is in all.
    pub limit: MicroUsd,
    /// Charged in this period.
    pub charged: MicroUsd,
    /// Set aside for requests that are under way.
    pub reserved: MicroUsd,
    /// When it is empty again, in milliseconds since 1970; none where time does not help.
    pub resets_at_ms: Option<u64>,
}

impl Standing {
    /// Whether nothing is left for a request of at least `floor`, whatever becomes of those under way.
    pub fn is_exhausted(&self, floor: MicroUsd) -> bool {
        self.charged.plus(floor) > self.limit
    }

    /// The sentence for whoever asked: which budget, how much of it, and until when.
    pub fn words(&self) -> String {
        let until = self
            .resets_at_ms
            .map(|ms| format!("; it is empty again at {}", clock::rfc3339(ms)))
            .unwrap_or_default();
        format!(
            "{} of {} USD reached ({} USD spent, the next request needs more than is left{until})",
            self.scope.words(),
            dollars(self.limit),
            dollars(self.charged)
        )
    }
}

/// Dollars with two decimals, or as many as there are.
fn dollars(amount: MicroUsd) -> String {
    let text = amount.to_string();
    let cut = text.trim_end_matches('0').len().max(text.len().saturating_sub(4));
    text[..cut].to_owned()
}

/// What may be set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// All that was wanted, or what is left.
    pub amount: MicroUsd,
    /// The budget that lowered it, where one did.
    pub lowered_by: Option<Standing>,
}

/// Why nothing can be set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoRoom {
    /// What is charged leaves less than the floor, whatever becomes of other reservations.
    Exhausted(Standing),
    /// There will be room when other reservations are settled for less.
    Busy(Standing),
}

/// How much of `want` to set aside under all `budgets`: all of it, or what is left (at least `floor`) where no
/// other reservation is open in the budget that is short. Waiting for others is better than a short grant,
/// since an answer that is cut short ends the job.
///
/// A budget that can never hold `floor`, not even empty, is told without a reset: waiting would not help.
///
/// # Errors
/// [`NoRoom`], with the innermost budget that is in the way.
pub fn grant(budgets: &[Standing], want: MicroUsd, floor: MicroUsd) -> Result<Granted, NoRoom> {
    let mut inner_first: Vec<&Standing> = budgets.iter().collect();
    inner_first.sort_by_key(|budget| budget.scope);
    if let Some(budget) = inner_first.iter().find(|budget| budget.is_exhausted(floor)) {
        let resets_at_ms = budget.resets_at_ms.filter(|_| floor <= budget.limit);
        return Err(NoRoom::Exhausted(Standing { resets_at_ms, ..**budget }));
    }
    let mut granted = Granted { amount: want, lowered_by: None };
    for budget in inner_first.iter().filter(|budget| budget.reserved == MicroUsd::ZERO) {
        let left = budget.limit.minus(budget.charged);
        if left < granted.amount {
            granted = Granted { amount: left, lowered_by: Some(**budget) };
        }
    }
    let full = |budget: &&&Standing| budget.charged.plus(budget.reserved).plus(granted.amount) > budget.limit;
    match inner_first.iter().find(full) {
        Some(budget) => Err(NoRoom::Busy(**budget)),
        None => Ok(granted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn standing(scope: Scope, limit: u64, charged: u64, reserved: u64) -> Standing {
        Standing {
            scope,
            limit: MicroUsd(limit),
            charged: MicroUsd(charged),
            reserved: MicroUsd(reserved),
            resets_at_ms: scope.resets().then_some(7),
        }
    }

    fn some() -> impl Strategy<Value = Vec<Standing>> {
        let one = (0usize..5, 0u64..1500, 0u64..1000, 0u64..1000);
        let list = proptest::collection::vec(one, 0..6);
        list.prop_map(|list| list.into_iter().map(|(s, l, c, r)| standing(Scope::ALL[s], l, c, r)).collect())
    }

    proptest! {
        #[test]
        fn a_grant_fits_under_every_budget(all in some(), want in 0u64..1000, part in 0u64..1000) {
            let floor = MicroUsd(part.min(want));
            match grant(&all, MicroUsd(want), floor) {
                Ok(granted) => {
                    prop_assert!(granted.amount >= floor && granted.amount.0 <= want);
                    prop_assert_eq!(granted.lowered_by.is_some(), granted.amount.0 < want);
                    for one in &all {
                        prop_assert!(one.charged.0 + one.reserved.0 + granted.amount.0 <= one.limit.0);
                    }
                }
                Err(NoRoom::Busy(which)) => {
                    prop_assert!(which.reserved > MicroUsd::ZERO && !which.is_exhausted(floor));
                    prop_assert!(all.iter().all(|one| !one.is_exhausted(floor)));
                }
                Err(NoRoom::Exhausted(which)) => {
                    prop_assert!(which.charged.0 + floor.0 > which.limit.0);
                    let inner = all.iter().filter(|one| one.scope < which.scope);
                    prop_assert!(inner.clone().all(|one| !one.is_exhausted(floor)), "the innermost is named");
                }
            }
        }
    }

    #[test]
    fn a_budget_that_could_never_hold_it_has_no_reset() {
        let day = standing(Scope::Day, 10, 5, 0);
        let no_room = |floor| grant(&[day], MicroUsd(20), MicroUsd(floor)).unwrap_err();
        assert_eq!(no_room(6), NoRoom::Exhausted(day));
        assert_eq!(no_room(11), NoRoom::Exhausted(Standing { resets_at_ms: None, ..day }));
    }

    #[test]
    fn others_in_an_outer_budget_do_not_keep_a_short_grant_from_being_given() {
        let (job, day) = (standing(Scope::Job, 30, 0, 0), standing(Scope::Day, 100, 20, 50));
        let granted = grant(&[day, job], MicroUsd(90), MicroUsd(10)).unwrap();
        assert_eq!((granted.amount, granted.lowered_by), (MicroUsd(30), Some(job)));
        let busy = grant(&[day, standing(Scope::Job, 60, 0, 0)], MicroUsd(90), MicroUsd(10));
        assert_eq!(busy, Err(NoRoom::Busy(day)));
    }

    #[test]
    fn the_words_name_the_budget_and_its_reset() {
        let words = standing(Scope::Day, 2_500_000, 2_400_001, 0).words();
        assert_eq!(
            words,
            "daemon's budget of the day of 2.50 USD reached (2.400001 USD spent, the next request needs more \
             than is left; it is empty again at 1970-01-01T00:00:00.007Z)"
        );
    }
}
