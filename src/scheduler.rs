//! Who goes next: a pure machine over the queue. It knows nothing of cells; it is told that a job came,
//! ended or was withdrawn, and says which jobs to start.
//!
//! *Invariant*: at most `slots` jobs run. Among users, the one with the fewest running jobs goes first, and
//! among those the one that was served longest ago; among one user's jobs the higher priority, then the
//! older. A user with a limit of their own starts none above it, whatever is free. A slot is free when its
//! job's end was reported, never when it was asked to end.

pub mod recover;

use std::collections::{BTreeMap, BTreeSet};

use crate::job::JobId;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A job is queued.
    Submitted {
        /// Its id; ids sort by submit time.
        job: JobId,
        /// Whose it is.
        uid: u32,
        /// Higher goes first.
        priority: i8,
    },
    /// A job that already has a cell (found after a restart) takes a slot, even one too many.
    Adopted {
        /// Its id.
        job: JobId,
        /// Whose it is.
        uid: u32,
    },
    /// A queued job was cancelled.
    Withdrawn {
        /// Its id.
        job: JobId,
    },
    /// A running job's cell is proven gone.
    Ended {
        /// Its id.
        job: JobId,
    },
    /// From now on a user has at most so many running jobs; all slots where absent.
    Limit {
        /// Whose.
        uid: u32,
        /// The limit.
        slots: Option<usize>,
    },
    /// Start nothing more.
    Drain,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Give this job a slot.
    Start(JobId),
}

#[derive(Debug, Default)]
struct User {
    /// Lower priority value first: (-priority, id).
    queued: BTreeSet<(i16, JobId)>,
    running: usize,
    served: u64,
}

/// The queue and the slots.
#[derive(Debug)]
pub struct Scheduler {
    slots: usize,
    draining: bool,
    clock: u64,
    users: BTreeMap<u32, User>,
    queued: BTreeMap<JobId, (u32, i16)>,
    running: BTreeMap<JobId, u32>,
    limits: BTreeMap<u32, usize>,
}

impl Scheduler {
    /// An empty queue with this many slots.
    pub fn new(slots: usize) -> Self {
        Self {
            slots,
            draining: false,
            clock: 0,
            users: BTreeMap::new(),
            queued: BTreeMap::new(),
            running: BTreeMap::new(),
            limits: BTreeMap::new(),
        }
    }

    /// Takes one input and says what to start. Inputs about unknown jobs change nothing.
    pub fn step(&mut self, input: Input) -> Vec<Action> {
        match input {
            Input::Submitted { job, uid, priority } => {
                if self.running.contains_key(&job) || self.queued.contains_key(&job) {
                    return Vec::new();
                }
                let rank = -i16::from(priority);
                self.users.entry(uid).or_default().queued.insert((rank, job.clone()));
                self.queued.insert(job, (uid, rank));
            }
            Input::Adopted { job, uid } => {
                self.forget(&job);
                if self.running.insert(job, uid).is_none() {
                    self.users.entry(uid).or_default().running += 1;
                }
            }
            Input::Withdrawn { job } => self.forget(&job),
            Input::Ended { job } => {
                if let Some(uid) = self.running.remove(&job) {
                    self.users.entry(uid).or_default().running -= 1;
                    self.prune(uid);
                }
            }
            Input::Limit { uid, slots } => {
                match slots {
                    Some(slots) => self.limits.insert(uid, slots),
                    None => self.limits.remove(&uid),
                };
            }
            Input::Drain => self.draining = true,
        }
        self.fill()
    }

    /// Jobs that have a slot.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Jobs that wait.
    pub fn queued(&self) -> usize {
        self.queued.len()
    }

    fn fill(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        while !self.draining && self.running.len() < self.slots {
            let below = |uid, user: &User| self.limits.get(uid).is_none_or(|limit| user.running < *limit);
            let waiting =
                self.users.iter().filter(|(uid, user)| !user.queued.is_empty() && below(*uid, user));
            let Some(uid) =
                waiting.min_by_key(|(uid, user)| (user.running, user.served, **uid)).map(|(uid, _)| *uid)
            else {
                break;
            };
            self.clock += 1;
            let Some(user) = self.users.get_mut(&uid) else { break };
            let Some((_, job)) = user.queued.pop_first() else { break };
            user.running += 1;
            user.served = self.clock;
            self.queued.remove(&job);
            self.running.insert(job.clone(), uid);
            actions.push(Action::Start(job));
        }
        actions
    }

    fn forget(&mut self, job: &JobId) {
        if let Some((uid, rank)) = self.queued.remove(job)
            && let Some(user) = self.users.get_mut(&uid)
        {
            user.queued.remove(&(rank, job.clone()));
            self.prune(uid);
        }
    }

    /// A user with nothing queued and nothing running takes no memory.
    fn prune(&mut self, uid: u32) {
        if self.users.get(&uid).is_some_and(|user| user.queued.is_empty() && user.running == 0) {
            self.users.remove(&uid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn job(n: u64) -> JobId {
        JobId::new(n, 0)
    }

    fn submit(n: u64, uid: u32, priority: i8) -> Input {
        Input::Submitted { job: job(n), uid, priority }
    }

    #[test]
    fn one_user_cannot_hold_another_back() {
        let mut scheduler = Scheduler::new(1);
        assert_eq!(scheduler.step(submit(1, 7, 0)), [Action::Start(job(1))]);
        for n in 2..100 {
            assert!(scheduler.step(submit(n, 7, 0)).is_empty());
        }
        scheduler.step(submit(500, 8, 0));
        assert_eq!(scheduler.step(Input::Ended { job: job(1) }), [Action::Start(job(500))]);
        assert_eq!(scheduler.step(Input::Ended { job: job(500) }), [Action::Start(job(2))]);
    }

    #[test]
    fn priority_then_age_orders_one_users_jobs() {
        let mut scheduler = Scheduler::new(0);
        for (n, priority) in [(1, 0), (2, 5), (3, 5), (4, -1)] {
            scheduler.step(submit(n, 1, priority));
        }
        scheduler.slots = 9;
        let order = scheduler.step(Input::Ended { job: job(99) });
        assert_eq!(order, [2, 3, 1, 4].map(|n| Action::Start(job(n))));
    }

    #[test]
    fn a_withdrawn_job_never_starts_and_a_draining_daemon_starts_nothing() {
        let mut scheduler = Scheduler::new(1);
        scheduler.step(submit(1, 1, 0));
        scheduler.step(submit(2, 1, 0));
        scheduler.step(Input::Withdrawn { job: job(2) });
        assert!(scheduler.step(Input::Ended { job: job(1) }).is_empty());
        scheduler.step(Input::Drain);
        assert!(scheduler.step(submit(3, 1, 0)).is_empty());
        assert_eq!((scheduler.queued(), scheduler.running()), (1, 0));
    }

    #[test]
    fn a_users_limit_holds_beside_free_slots_and_keeps_nobody_else_waiting() {
        let mut scheduler = Scheduler::new(4);
        scheduler.step(Input::Limit { uid: 7, slots: Some(1) });
        assert_eq!(scheduler.step(submit(1, 7, 0)), [Action::Start(job(1))]);
        assert!(scheduler.step(submit(2, 7, 0)).is_empty());
        assert!(scheduler.step(submit(3, 7, 9)).is_empty());
        assert_eq!(scheduler.step(submit(4, 8, 0)), [Action::Start(job(4))]);
        assert_eq!(scheduler.step(Input::Ended { job: job(1) }), [Action::Start(job(3))]);
        let raised = scheduler.step(Input::Limit { uid: 7, slots: None });
        assert_eq!(raised, [Action::Start(job(2))], "a limit that goes lets the next one start");
        // Found after a restart, one too many: it runs, and the limit holds for what comes.
        scheduler.step(Input::Limit { uid: 9, slots: Some(1) });
        scheduler.step(Input::Adopted { job: job(20), uid: 9 });
        scheduler.step(Input::Ended { job: job(4) });
        assert!(scheduler.step(submit(21, 9, 0)).is_empty());
    }

    proptest! {
        #[test]
        fn limits_hold_and_only_they_keep_a_free_slot_from_a_waiting_job(
            slots in 1usize..5,
            limits in proptest::collection::vec(proptest::option::of(1usize..3), 4),
            script in proptest::collection::vec((0u64..30, 0u32..4, any::<bool>()), 0..200),
        ) {
            let mut scheduler = Scheduler::new(slots);
            for (uid, slots) in (0u32..).zip(&limits) {
                scheduler.step(Input::Limit { uid, slots: *slots });
            }
            for (n, uid, comes) in script {
                scheduler.step(if comes { submit(n, uid, 0) } else { Input::Ended { job: job(n) } });
                for (uid, limit) in (0u32..).zip(&limits) {
                    let running = scheduler.running.values().filter(|u| **u == uid).count();
                    let waits = scheduler.queued.values().any(|(u, _)| *u == uid);
                    prop_assert!(limit.is_none_or(|limit| running <= limit));
                    let full = scheduler.running() == slots || limit.is_some_and(|limit| running == limit);
                    prop_assert!(full || !waits, "nothing keeps this user's job waiting");
                }
            }
        }

        #[test]
        fn slots_hold_and_every_job_starts_once(slots in 1usize..5, script in proptest::collection::vec((0u64..30, 0u32..4, -3i8..3, 0u8..3), 0..200)) {
            let mut scheduler = Scheduler::new(slots);
            let mut live = BTreeSet::new();
            let mut started = BTreeSet::new();
            for (n, uid, priority, kind) in script {
                let input = match kind {
                    0 if !started.contains(&job(n)) => submit(n, uid, priority),
                    1 => Input::Withdrawn { job: job(n) },
                    _ => Input::Ended { job: job(n) },
                };
                if let Input::Ended { job } = &input {
                    live.remove(job);
                }
                for Action::Start(job) in scheduler.step(input) {
                    prop_assert!(started.insert(job.clone()), "started twice");
                    live.insert(job);
                }
                prop_assert!(live.len() <= slots);
                prop_assert_eq!(live.len(), scheduler.running());
                prop_assert!(scheduler.running() == slots || scheduler.queued() == 0, "a free slot beside a waiting job");
            }
        }
    }
}
