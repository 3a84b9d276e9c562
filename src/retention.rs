//! Which jobs that are over go, by age, by count and by bytes: pure. It must never name a job that is not over or that
//! another one goes on with, nor more than the limits ask for; work that nobody has decided on goes last. Ages are
//! told only by a clock that has gone evenly for a day ([`crate::clock::Clocks`]): a wrong year removes nothing.

use std::time::Duration;

use crate::job::JobId;

const DAY: Duration = Duration::from_secs(86_400);

/// How long, and how much of it, things are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A job that is over goes after so long.
    pub age: Duration,
    /// The same where nobody has decided on what it changed.
    pub undecided_age: Duration,
    /// Most jobs that are over.
    pub jobs_max: u64,
    /// Most bytes of their events, reports and change sets.
    pub bytes_max: u64,
    /// A mirror of a repository unused for so long goes.
    pub mirror_age: Duration,
    /// Most bytes of one user's mirrors.
    pub mirrors_bytes_max: u64,
    /// An image built for a repository and unused for so long goes.
    pub image_age: Duration,
    /// A version of the agent that no job can get any more goes after so long.
    pub agent_age: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            age: 30 * DAY,
            undecided_age: 180 * DAY,
            jobs_max: 10_000,
            bytes_max: 20 << 30,
            mirror_age: 30 * DAY,
            mirrors_bytes_max: 32 << 30,
            image_age: 30 * DAY,
            agent_age: 90 * DAY,
        }
    }
}

/// What is there of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The job.
    pub job: JobId,
    /// When it ended, in milliseconds since 1970; none: it is not over.
    pub ended_ms: Option<u64>,
    /// Bytes of its events, its report and its change set.
    pub bytes: u64,
    /// It has a change set that nobody has applied or discarded.
    pub undecided: bool,
    /// A job that is not over goes on with its changes.
    pub needed: bool,
}

/// Why something goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It is too old.
    Age,
    /// There are too many.
    Count,
    /// They take too much.
    Bytes,
}

impl Reason {
    /// In an answer.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Age => "age",
            Self::Count => "count",
            Self::Bytes => "bytes",
        }
    }
}

/// A job that goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// The job.
    pub job: JobId,
    /// Why.
    pub reason: Reason,
    /// What is gained.
    pub bytes: u64,
    /// Nobody has decided on what it changed.
    pub undecided: bool,
}

/// What goes, in that order: what is too old, then the oldest of what is too many or too much, and what nobody has
/// decided on only when nothing else is left.
pub fn plan(now_ms: u64, rows: &[Row], limits: &Limits) -> Vec<Removal> {
    let over = || rows.iter().filter_map(|row| row.ended_ms.map(|ended_ms| (ended_ms, row)));
    let mut jobs = over().count() as u64;
    let mut bytes: u64 = over().fold(0, |sum, (_, row)| sum.saturating_add(row.bytes));
    let mut may: Vec<(u64, &Row)> = over().filter(|(_, row)| !row.needed).collect();
    may.sort_by_key(|(ended_ms, row)| (row.undecided, *ended_ms, row.job.clone()));
    let mut plan = Vec::new();
    for reason in [Reason::Age, Reason::Count, Reason::Bytes] {
        may.retain(|(ended_ms, row)| {
            let age_max = if row.undecided { limits.undecided_age } else { limits.age };
            let goes = match reason {
                Reason::Age => u128::from(now_ms.saturating_sub(*ended_ms)) > age_max.as_millis(),
                Reason::Count => jobs > limits.jobs_max,
                Reason::Bytes => bytes > limits.bytes_max && row.bytes > 0,
            };
            if goes {
                (jobs, bytes) = (jobs - 1, bytes.saturating_sub(row.bytes));
                let (job, undecided) = (row.job.clone(), row.undecided);
                plan.push(Removal { job, reason, bytes: row.bytes, undecided });
            }
            !goes
        });
    }
    plan
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_000_000;

    fn row(n: u64, ended_ms: Option<u64>, bytes: u64, undecided: bool, needed: bool) -> Row {
        Row { job: JobId::new(n, 0), ended_ms, bytes, undecided, needed }
    }

    fn limits(age_ms: u64, undecided_ms: u64, jobs_max: u64, bytes_max: u64) -> Limits {
        let (age, undecided_age) = (Duration::from_millis(age_ms), Duration::from_millis(undecided_ms));
        Limits { age, undecided_age, jobs_max, bytes_max, ..Limits::default() }
    }

    #[test]
    fn old_ones_go_then_the_oldest_and_undecided_work_last() {
        let rows = [
            row(1, Some(NOW - 500), 10, false, false),
            row(2, Some(NOW - 400), 10, true, false),
            row(3, Some(NOW - 300), 10, false, false),
            row(4, Some(NOW - 200), 10, false, false),
            row(5, None, 999, false, false),
        ];
        let named = |limits: &Limits| -> Vec<(u64, Reason)> {
            let number =
                |job: &JobId| rows.iter().position(|row| row.job == *job).map_or(0, |at| at as u64 + 1);
            plan(NOW, &rows, limits).iter().map(|gone| (number(&gone.job), gone.reason)).collect()
        };
        assert_eq!(named(&limits(450, 450, 9, 99)), [(1, Reason::Age)]);
        assert_eq!(named(&limits(350, 450, 9, 99)), [(1, Reason::Age)], "undecided work has its own age");
        assert_eq!(named(&limits(999, 999, 2, 99)), [(1, Reason::Count), (3, Reason::Count)]);
        assert_eq!(named(&limits(999, 999, 9, 30)), [(1, Reason::Bytes)]);
        let all = [(1, Reason::Count), (3, Reason::Count), (4, Reason::Count), (2, Reason::Count)];
        assert_eq!(named(&limits(999, 999, 0, 99)), all);
    }

    fn rows() -> impl Strategy<Value = Vec<Row>> {
        let one = (proptest::option::of(0..NOW), 0..50_u64, any::<bool>(), proptest::bool::weighted(0.1));
        proptest::collection::vec(one, 0..40).prop_map(|rows| {
            let numbered = rows.into_iter().enumerate();
            numbered
                .map(|(n, (ended, bytes, open, needed))| row(n as u64, ended, bytes, open, needed))
                .collect()
        })
    }

    proptest! {
        #[test]
        fn a_plan_keeps_its_promises(
            rows in rows(), age in 0..NOW, more in 0..NOW, jobs_max in 0..40_u64, bytes_max in 0..1000_u64,
        ) {
            let limits = limits(age, age + more, jobs_max, bytes_max);
            let plan = plan(NOW, &rows, &limits);
            let of = |job: &JobId| rows.iter().find(|row| row.job == *job).expect("a row");
            let gone: BTreeSet<&JobId> = plan.iter().map(|gone| &gone.job).collect();
            prop_assert_eq!(gone.len(), plan.len(), "each once");
            for job in &gone {
                prop_assert!(of(job).ended_ms.is_some() && !of(job).needed);
            }
            let left: Vec<&Row> =
                rows.iter().filter(|row| row.ended_ms.is_some() && !gone.contains(&row.job)).collect();
            let may: Vec<&&Row> = left.iter().filter(|row| !row.needed).collect();
            let (count, bytes) = (left.len() as u64, left.iter().map(|row| row.bytes).sum::<u64>());
            // As little as the limits allow, or nothing that may go is left.
            prop_assert!(count <= jobs_max || may.is_empty());
            prop_assert!(bytes <= bytes_max || may.iter().all(|row| row.bytes == 0));
            for row in &may {
                let age_max = if row.undecided { limits.undecided_age } else { limits.age };
                prop_assert!(u128::from(NOW - row.ended_ms.unwrap_or(0)) <= age_max.as_millis());
            }
            for (n, one) in plan.iter().enumerate() {
                let row = of(&one.job);
                let after: u64 = plan[n + 1..].iter().map(|gone| gone.bytes).sum();
                // Never more than the limits ask for: before each removal they were passed.
                match one.reason {
                    Reason::Age => {}
                    Reason::Count => prop_assert!(count + (plan.len() - n) as u64 > jobs_max),
                    Reason::Bytes => prop_assert!(bytes + after + one.bytes > bytes_max && one.bytes > 0),
                }
                if one.reason == Reason::Age {
                    continue;
                }
                let counts = |row: &Row| one.reason == Reason::Count || row.bytes > 0;
                for kept in may.iter().filter(|kept| counts(kept)) {
                    prop_assert!((row.undecided, row.ended_ms) <= (kept.undecided, kept.ended_ms));
                }
            }
        }
    }
}
