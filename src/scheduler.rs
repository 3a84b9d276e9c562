//! Who goes next: a pure machine over the queue. It knows nothing of cells; it is told that a job came, ended,
//! was parked or withdrawn, and what time it is, and says which jobs to start, which parked ones to take back
//! into the queue, and when it wants to be woken.
//!
//! *Invariant*: at most `slots` jobs run, and of one credential at most as many as its limit says. Among users, the
//! one with the fewest running jobs goes first, and among those the one that was served longest ago; among one user's
//! jobs the higher priority, then the older. A user with a limit of their own starts none above it, whatever is free.
//! A slot is free when its job's end was reported, never when it was asked to end. A parked job holds no slot. While it
//! is paused, or the engine does not answer, nothing starts. Beside running jobs none starts that the host has no room
//! for, and none passes it: what is large would wait for ever. Where nothing runs one starts in any case.

pub mod recover;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::job::JobId;
use crate::policy::PlanLimits;

/// What the scheduler knows of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// Whose it is.
    pub uid: u32,
    /// Higher goes first.
    pub priority: i8,
    /// The credential it uses, by name, with what else the provider limits apart (the class of its model).
    pub credential: String,
    /// Its policy, where that limits how many run at once.
    pub policy: Option<PolicySlots>,
    /// What it takes at least.
    pub need: Need,
}

impl Ticket {
    /// Of a job under this policy with these limits.
    pub fn new(uid: u32, priority: i8, credential: String, policy: &str, limits: &PlanLimits) -> Self {
        let slots =
            |most| PolicySlots { name: policy.to_owned(), most: usize::try_from(most).unwrap_or(usize::MAX) };
        let need = Need::of(limits.memory_bytes, limits.disk_bytes);
        Self { uid, priority, credential, policy: limits.slots.map(slots), need }
    }

    /// Of a job of which nothing else is known.
    pub fn bare(uid: u32, priority: i8, credential: String) -> Self {
        Self { uid, priority, credential, policy: None, need: Need::default() }
    }
}

/// How many jobs of a policy run at once.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PolicySlots {
    /// Its name.
    pub name: String,
    /// At most so many, of all users.
    pub most: usize,
}

/// What a cell takes of its host, or what the host has for cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Need {
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Disk space, in bytes.
    pub disk_bytes: u64,
}

impl Need {
    /// What an agent takes as soon as it runs (the CLI some 250 MiB, its tools as much): a job's limit says how far
    /// it may go, which few do, so limits are not added up.
    const USUAL: Self = Self { memory_bytes: 512 << 20, disk_bytes: 128 << 20 };

    /// Of a job with these limits.
    pub fn of(memory_bytes_max: u64, disk_bytes_max: u64) -> Self {
        Self {
            memory_bytes: memory_bytes_max.min(Self::USUAL.memory_bytes),
            disk_bytes: disk_bytes_max.min(Self::USUAL.disk_bytes),
        }
    }

    /// What is left where `other` is taken.
    pub fn without(self, other: Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_sub(other.disk_bytes),
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A job is queued.
    Submitted {
        /// Its id; ids sort by submit time.
        job: JobId,
        /// The rest.
        ticket: Ticket,
    },
    /// A job that already has a cell (found after a restart) takes a slot, even one too many.
    Adopted {
        /// Its id.
        job: JobId,
        /// The rest.
        ticket: Ticket,
    },
    /// A queued or parked job was cancelled, or a parked one was taken back.
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
    /// A job waits for a moment; if it had a slot, its cell is proven gone.
    Parked {
        /// Its id.
        job: JobId,
        /// The rest.
        ticket: Ticket,
        /// The moment, in milliseconds since 1970.
        until_ms: u64,
        /// True when a provider's limit ended its cell: fewer jobs of its credential run at once from now on, and
        /// one more again for each that ends.
        limited: bool,
    },
    /// At most so many jobs of a credential run at once; none: only the slots count.
    Limited {
        /// By name.
        credential: String,
        /// How many; 0 starts none.
        max: Option<usize>,
    },
    /// What the host has for further jobs, from now on.
    Room(Need),
    /// What time it is.
    Now {
        /// Milliseconds since 1970. May jump back.
        ms: u64,
    },
    /// Start nothing until `Resume`.
    Pause,
    /// Start again what waits.
    Resume,
    /// Whether the engine answers: nothing starts while it does not.
    Engine {
        /// It does.
        up: bool,
    },
    /// Start nothing more.
    Drain,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Give this job a slot.
    Start(JobId),
    /// Take this parked job back into the queue (then it is `Submitted` again).
    Unpark(JobId),
    /// Say what time it is at this moment, in milliseconds since 1970, or earlier.
    WakeAt(u64),
}

/// Whether jobs start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Starts {
    Open,
    Paused,
    /// For good.
    Draining,
}

/// Why a job has no slot yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waits {
    /// The daemon is paused.
    Paused,
    /// The daemon is going down: the next one starts it.
    Draining,
    /// The engine does not answer.
    EngineAway,
    /// Its user runs as many jobs as they may.
    UserLimit,
    /// As many jobs use its credential as may at once.
    CredentialLimit,
    /// As many jobs of its policy run as may at once.
    PolicyLimit,
    /// The host has not enough memory for one more.
    Memory,
    /// Nor disk space.
    Disk,
    /// All slots are taken, or others of those that are free come first.
    Slots,
}

impl Waits {
    /// One word, for programs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Paused => "paused",
            Self::Draining => "draining",
            Self::EngineAway => "engine_away",
            Self::UserLimit => "user_limit",
            Self::CredentialLimit => "credential_limit",
            Self::PolicyLimit => "policy_limit",
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Slots => "slots",
        }
    }
}

/// A job that waits for a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Its id.
    pub job: JobId,
    /// The rest.
    pub ticket: Ticket,
    /// Why it waits.
    pub waits: Waits,
}

/// Lower priority value first: (-priority, id).
type Rank = (i16, JobId);

/// Jobs that start or wait together: credential and policy.
type Lane = (String, Option<PolicySlots>);

#[derive(Debug, Clone, Default)]
struct User {
    queued: BTreeMap<Lane, BTreeSet<Rank>>,
    running: usize,
    served: u64,
}

#[derive(Debug, Clone, Default)]
struct Credential {
    running: usize,
    /// Told from outside.
    max: Option<usize>,
    /// Learned from jobs that a provider's limit ended.
    eased: Option<usize>,
}

impl Credential {
    fn has_room(&self) -> bool {
        [self.max, self.eased].into_iter().flatten().all(|max| self.running < max)
    }
}

/// The queue and the slots.
#[derive(Debug, Clone)]
pub struct Scheduler {
    slots: usize,
    starts: Starts,
    /// The engine does not answer.
    away: bool,
    clock: u64,
    users: BTreeMap<u32, User>,
    limits: BTreeMap<u32, usize>,
    credentials: BTreeMap<String, Credential>,
    /// Running jobs of policies with a limit.
    policies: BTreeMap<String, usize>,
    /// What the host has for further jobs; as much as they want before it is told.
    room: Option<Need>,
    /// A job waits for room.
    short: bool,
    queued: BTreeMap<JobId, Ticket>,
    running: BTreeMap<JobId, Ticket>,
    parked: BTreeMap<JobId, u64>,
    waking: BTreeSet<(u64, JobId)>,
}

fn rank(job: &JobId, ticket: &Ticket) -> Rank {
    (-i16::from(ticket.priority), job.clone())
}

fn lane(ticket: &Ticket) -> Lane {
    (ticket.credential.clone(), ticket.policy.clone())
}

impl Scheduler {
    /// An empty queue with this many slots.
    pub fn new(slots: usize) -> Self {
        Self {
            slots,
            starts: Starts::Open,
            away: false,
            clock: 0,
            users: BTreeMap::new(),
            credentials: BTreeMap::new(),
            policies: BTreeMap::new(),
            room: None,
            short: false,
            queued: BTreeMap::new(),
            running: BTreeMap::new(),
            limits: BTreeMap::new(),
            parked: BTreeMap::new(),
            waking: BTreeSet::new(),
        }
    }

    /// Takes one input and says what to do. Inputs about unknown jobs change nothing.
    pub fn step(&mut self, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        match input {
            Input::Submitted { job, ticket } => {
                if self.running.contains_key(&job) || self.queued.contains_key(&job) {
                    return Vec::new();
                }
                self.forget(&job);
                let user = self.users.entry(ticket.uid).or_default();
                user.queued.entry(lane(&ticket)).or_default().insert(rank(&job, &ticket));
                self.queued.insert(job, ticket);
            }
            Input::Adopted { job, ticket } => {
                self.forget(&job);
                if !self.running.contains_key(&job) {
                    self.take_slot(job, ticket);
                }
            }
            Input::Withdrawn { job } => self.forget(&job),
            Input::Ended { job } => self.ended(&job),
            Input::Parked { job, ticket, until_ms, limited } => {
                self.park(&job, &ticket, until_ms, limited);
                actions.extend(self.waking.first().map(|(ms, _)| Action::WakeAt(*ms)));
            }
            Input::Limited { credential, max } => {
                self.credentials.entry(credential.clone()).or_default().max = max;
                self.prune_credential(&credential);
            }
            Input::Room(room) => self.room = Some(room),
            Input::Now { ms } => {
                while self.waking.first().is_some_and(|(until, _)| *until <= ms)
                    && let Some((_, job)) = self.waking.pop_first()
                {
                    self.parked.remove(&job);
                    actions.push(Action::Unpark(job));
                }
                actions.extend(self.waking.first().map(|(ms, _)| Action::WakeAt(*ms)));
            }
            Input::Limit { uid, slots } => {
                match slots {
                    Some(slots) => self.limits.insert(uid, slots),
                    None => self.limits.remove(&uid),
                };
            }
            Input::Pause => self.open_or(Starts::Paused),
            Input::Resume => self.open_or(Starts::Open),
            Input::Engine { up } => self.away = !up,
            Input::Drain => self.starts = Starts::Draining,
        }
        self.fill(&mut actions);
        actions
    }

    /// Jobs that have a slot.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Jobs that wait for a slot.
    pub fn queued(&self) -> usize {
        self.queued.len()
    }

    /// Jobs that wait for a moment.
    pub fn parked(&self) -> usize {
        self.parked.len()
    }

    /// What is known of a job that is queued or has a slot.
    pub fn ticket(&self, job: &JobId) -> Option<&Ticket> {
        self.running.get(job).or_else(|| self.queued.get(job))
    }

    /// Whether a job could start that the host has no room for: it wants to be told of more.
    pub fn waits_for_room(&self) -> bool {
        self.short
    }

    /// Slots in all.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// What waits for a slot, in the order in which it would start if running jobs ended in the order of their ids and
    /// nothing else happened; what no end lets start comes last. Takes the place of this queue: ask a clone.
    pub fn order(mut self) -> Vec<Waiting> {
        let waits: BTreeMap<JobId, Waits> =
            self.queued.iter().map(|(job, ticket)| (job.clone(), self.waits(ticket))).collect();
        let tickets = self.queued.clone();
        (self.starts, self.away, self.room) = (Starts::Open, false, None);
        let mut ends: VecDeque<JobId> = self.running.keys().cloned().collect();
        let mut order = Vec::with_capacity(tickets.len());
        let mut actions = Vec::new();
        loop {
            self.fill(&mut actions);
            for action in actions.drain(..) {
                if let Action::Start(job) = action {
                    ends.push_back(job.clone());
                    order.push(job);
                }
            }
            let Some(job) = ends.pop_front().filter(|_| !self.queued.is_empty()) else { break };
            self.ended(&job);
        }
        let mut left: Vec<Rank> = self.queued.iter().map(|(job, ticket)| rank(job, ticket)).collect();
        left.sort();
        order.extend(left.into_iter().map(|(_, job)| job));
        let told = |job: JobId| {
            let (ticket, waits) = (tickets.get(&job)?.clone(), *waits.get(&job)?);
            Some(Waiting { job, ticket, waits })
        };
        order.into_iter().filter_map(told).collect()
    }

    fn waits(&self, ticket: &Ticket) -> Waits {
        let running = self.users.get(&ticket.uid).map_or(0, |user| user.running);
        match self.starts {
            Starts::Paused => Waits::Paused,
            Starts::Draining => Waits::Draining,
            Starts::Open if self.away => Waits::EngineAway,
            Starts::Open if self.limits.get(&ticket.uid).is_some_and(|most| running >= *most) => {
                Waits::UserLimit
            }
            Starts::Open if self.credentials.get(&ticket.credential).is_some_and(|c| !c.has_room()) => {
                Waits::CredentialLimit
            }
            Starts::Open if !self.policy_has_room(ticket.policy.as_ref()) => Waits::PolicyLimit,
            Starts::Open if self.running.len() >= self.slots => Waits::Slots,
            Starts::Open => self.short_of(ticket.need).unwrap_or(Waits::Slots),
        }
    }

    fn policy_has_room(&self, policy: Option<&PolicySlots>) -> bool {
        policy.is_none_or(|policy| self.policies.get(&policy.name).is_none_or(|n| *n < policy.most))
    }

    /// What the host lacks for one more job.
    fn short_of(&self, need: Need) -> Option<Waits> {
        let room = self.room.filter(|_| !self.running.is_empty())?;
        if need.memory_bytes > room.memory_bytes {
            return Some(Waits::Memory);
        }
        (need.disk_bytes > room.disk_bytes).then_some(Waits::Disk)
    }

    /// A drain is for good.
    fn open_or(&mut self, starts: Starts) {
        self.starts = match self.starts {
            Starts::Draining => Starts::Draining,
            Starts::Open | Starts::Paused => starts,
        };
    }

    fn fill(&mut self, actions: &mut Vec<Action>) {
        self.short = false;
        while self.starts == Starts::Open && !self.away && self.running.len() < self.slots {
            let open = |name: &String| self.credentials.get(name).is_none_or(Credential::has_room);
            let open = |(name, policy): &Lane| open(name) && self.policy_has_room(policy.as_ref());
            // Each user's next job among the lanes that have room.
            let below = |uid: &u32, user: &User| self.limits.get(uid).is_none_or(|most| user.running < *most);
            let next = self.users.iter().filter(|(uid, user)| below(uid, user)).filter_map(|(uid, user)| {
                let ranks = user.queued.iter().filter(|(lane, _)| open(lane));
                let first = ranks.filter_map(|(_, ranks)| ranks.first()).min()?;
                Some(((user.running, user.served, *uid), first.1.clone()))
            });
            let Some((_, job)) = next.min() else { break };
            let Some(ticket) = self.queued.get(&job).cloned() else { break };
            self.short = self.short_of(ticket.need).is_some();
            if self.short {
                break;
            }
            self.room = self.room.map(|room| room.without(ticket.need));
            self.forget(&job);
            self.clock += 1;
            self.users.entry(ticket.uid).or_default().served = self.clock;
            self.take_slot(job.clone(), ticket);
            actions.push(Action::Start(job));
        }
    }

    fn take_slot(&mut self, job: JobId, ticket: Ticket) {
        self.users.entry(ticket.uid).or_default().running += 1;
        self.credentials.entry(ticket.credential.clone()).or_default().running += 1;
        if let Some(policy) = &ticket.policy {
            *self.policies.entry(policy.name.clone()).or_default() += 1;
        }
        self.running.insert(job, ticket);
    }

    fn leave_slot(&mut self, job: &JobId) -> Option<Ticket> {
        let ticket = self.running.remove(job)?;
        self.users.entry(ticket.uid).or_default().running -= 1;
        self.prune(ticket.uid);
        self.credentials.entry(ticket.credential.clone()).or_default().running -= 1;
        if let Some(policy) = &ticket.policy
            && let Some(running) = self.policies.get_mut(&policy.name)
        {
            *running -= 1;
            if *running == 0 {
                self.policies.remove(&policy.name);
            }
        }
        Some(ticket)
    }

    fn ended(&mut self, job: &JobId) {
        let Some(ticket) = self.leave_slot(job) else { return };
        // One that ended without the provider's limit: there is room for one more.
        if let Some(credential) = self.credentials.get_mut(&ticket.credential) {
            credential.eased = credential.eased.map(|max| max + 1).filter(|max| *max < self.slots);
        }
        self.prune_credential(&ticket.credential);
    }

    fn park(&mut self, job: &JobId, ticket: &Ticket, until_ms: u64, limited: bool) {
        self.forget(job);
        let running = self.credentials.get(&ticket.credential).map_or(0, |c| c.running);
        self.leave_slot(job);
        if limited {
            let credential = self.credentials.entry(ticket.credential.clone()).or_default();
            // Half of those that were too many, and never none: one must find out when it is over.
            let half = (running / 2).max(1);
            credential.eased = Some(credential.eased.map_or(half, |max| max.min(half)));
        }
        self.prune_credential(&ticket.credential);
        self.parked.insert(job.clone(), until_ms);
        self.waking.insert((until_ms, job.clone()));
    }

    /// Takes a job out of the queue, or from among the parked ones.
    fn forget(&mut self, job: &JobId) {
        if let Some(until_ms) = self.parked.remove(job) {
            self.waking.remove(&(until_ms, job.clone()));
        }
        let Some(ticket) = self.queued.remove(job) else { return };
        if let Some(user) = self.users.get_mut(&ticket.uid) {
            let lane = lane(&ticket);
            if let Some(ranks) = user.queued.get_mut(&lane) {
                ranks.remove(&rank(job, &ticket));
                if ranks.is_empty() {
                    user.queued.remove(&lane);
                }
            }
            self.prune(ticket.uid);
        }
    }

    /// A user with nothing queued and nothing running takes no memory.
    fn prune(&mut self, uid: u32) {
        if self.users.get(&uid).is_some_and(|user| user.queued.is_empty() && user.running == 0) {
            self.users.remove(&uid);
        }
    }

    /// Nor does a credential without a limit that nobody uses.
    fn prune_credential(&mut self, name: &str) {
        if self.credentials.get(name).is_some_and(|c| c.running == 0 && c.max.is_none() && c.eased.is_none())
        {
            self.credentials.remove(name);
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

    fn ticket(uid: u32, priority: i8, credential: &str) -> Ticket {
        Ticket::bare(uid, priority, credential.to_owned())
    }

    fn submit_of(job: JobId, credential: &str) -> Input {
        Input::Submitted { job, ticket: ticket(1, 0, credential) }
    }

    fn submit(n: u64, uid: u32, priority: i8) -> Input {
        Input::Submitted { job: job(n), ticket: ticket(uid, priority, "") }
    }

    fn park(n: u64, until_ms: u64, limited: bool) -> Input {
        Input::Parked { job: job(n), ticket: ticket(1, 0, ""), until_ms, limited }
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
    fn nothing_starts_while_the_engine_is_away_and_all_that_may_once_it_is_back() {
        let mut scheduler = Scheduler::new(2);
        assert!(scheduler.step(Input::Engine { up: false }).is_empty());
        for n in 1..=3 {
            assert!(scheduler.step(submit(n, 1, 0)).is_empty());
        }
        let told = scheduler.clone().order();
        assert_eq!(told.iter().map(|w| w.waits.as_str()).collect::<Vec<_>>(), ["engine_away"; 3]);
        assert!(scheduler.step(Input::Pause).is_empty());
        assert!(scheduler.step(Input::Engine { up: true }).is_empty(), "paused all the same");
        assert_eq!(scheduler.step(Input::Resume), [Action::Start(job(1)), Action::Start(job(2))]);
    }

    #[test]
    fn a_pause_starts_nothing_until_it_is_over_and_cannot_undo_a_drain() {
        let mut scheduler = Scheduler::new(2);
        scheduler.step(submit(1, 1, 0));
        assert!(scheduler.step(Input::Pause).is_empty());
        assert!(scheduler.step(submit(2, 1, 0)).is_empty());
        assert!(scheduler.step(Input::Ended { job: job(1) }).is_empty());
        scheduler.step(park(4, 5000, false));
        // Its time comes all the same: it waits with the others.
        assert_eq!(scheduler.step(Input::Now { ms: 6000 }), [Action::Unpark(job(4))]);
        assert!(scheduler.step(submit(4, 1, 0)).is_empty());
        scheduler.step(Input::Adopted { job: job(9), ticket: ticket(1, 0, "") });
        assert_eq!(scheduler.step(Input::Resume), [Action::Start(job(2))]);
        assert!(scheduler.step(Input::Resume).is_empty());
        scheduler.step(Input::Drain);
        assert!(scheduler.step(Input::Resume).is_empty());
        scheduler.step(Input::Pause);
        assert!(scheduler.step(Input::Ended { job: job(2) }).is_empty());
        assert_eq!(scheduler.clone().order()[0].waits, Waits::Draining);
    }

    #[test]
    fn what_waits_says_why_and_what_can_never_start_comes_last() {
        let mut scheduler = Scheduler::new(1);
        scheduler.step(Input::Limit { uid: 7, slots: Some(1) });
        scheduler.step(Input::Limited { credential: "full".into(), max: Some(0) });
        scheduler.step(submit(1, 7, 0));
        scheduler.step(Input::Submitted { job: job(2), ticket: ticket(1, 9, "full") });
        for (n, uid, priority) in [(3, 7, 5), (4, 1, 0), (5, 1, 1)] {
            scheduler.step(submit(n, uid, priority));
        }
        let told = |scheduler: &Scheduler| -> Vec<(JobId, Waits)> {
            scheduler.clone().order().into_iter().map(|w| (w.job, w.waits)).collect()
        };
        use Waits::{CredentialLimit, Paused, Slots, UserLimit};
        let order = [(job(5), Slots), (job(3), UserLimit), (job(4), Slots), (job(2), CredentialLimit)];
        assert_eq!(told(&scheduler), order);
        scheduler.step(Input::Pause);
        assert_eq!(told(&scheduler), order.map(|(job, _)| (job, Paused)));
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
        scheduler.step(Input::Adopted { job: job(20), ticket: ticket(9, 0, "a") });
        scheduler.step(Input::Ended { job: job(4) });
        assert!(scheduler.step(submit(21, 9, 0)).is_empty());
    }

    #[test]
    fn a_parked_job_gives_up_its_slot_and_is_taken_back_when_its_time_has_come() {
        let mut scheduler = Scheduler::new(1);
        scheduler.step(submit(1, 1, 0));
        scheduler.step(submit(2, 1, 0));
        let parked = scheduler.step(park(1, 5000, false));
        assert_eq!(parked, [Action::WakeAt(5000), Action::Start(job(2))]);
        scheduler.step(park(3, 9000, false));
        assert_eq!(scheduler.step(Input::Now { ms: 4999 }), [Action::WakeAt(5000)]);
        // A clock that jumps back and forth wakes nobody twice.
        assert_eq!(scheduler.step(Input::Now { ms: 100 }), [Action::WakeAt(5000)]);
        let woken = scheduler.step(Input::Now { ms: 6000 });
        assert_eq!(woken, [Action::Unpark(job(1)), Action::WakeAt(9000)]);
        assert_eq!(scheduler.step(Input::Now { ms: 6000 }), [Action::WakeAt(9000)]);
        assert!(scheduler.step(submit(1, 1, 0)).is_empty(), "it waits for a slot like any other");
        assert_eq!(scheduler.step(Input::Ended { job: job(2) }), [Action::Start(job(1))]);
        scheduler.step(Input::Withdrawn { job: job(3) });
        assert_eq!((scheduler.step(Input::Now { ms: 10_000 }), scheduler.parked()), (vec![], 0));
    }

    #[test]
    fn after_a_providers_limit_fewer_jobs_of_its_credential_run_and_then_more_again() {
        let mut scheduler = Scheduler::new(4);
        for n in 1..=8 {
            scheduler.step(submit(n, 1, 0));
        }
        let other = Input::Submitted { job: job(9), ticket: ticket(1, -5, "other") };
        scheduler.step(other);
        assert_eq!(scheduler.running(), 4);
        // Of four at once one is limited: two may go on, and the slot is another credential's.
        assert_eq!(scheduler.step(park(1, 5000, true)), [Action::WakeAt(5000), Action::Start(job(9))]);
        assert!(scheduler.step(Input::Ended { job: job(9) }).is_empty());
        // Each end makes room for one more: 3 of 2 run, then 2 of 3.
        assert_eq!(scheduler.step(Input::Ended { job: job(2) }), [Action::Start(job(5))]);
        let next = scheduler.step(Input::Ended { job: job(3) });
        assert_eq!(next, [Action::Start(job(6)), Action::Start(job(7))], "the limit is gone at four");
    }

    #[test]
    fn a_limit_from_outside_holds_for_its_credential_alone() {
        let mut scheduler = Scheduler::new(3);
        scheduler.step(Input::Limited { credential: "a".into(), max: Some(0) });
        let submit = |n, name: &str| Input::Submitted { job: job(n), ticket: ticket(1, 0, name) };
        assert!(scheduler.step(submit(1, "a")).is_empty());
        assert_eq!(scheduler.step(submit(2, "b")), [Action::Start(job(2))]);
        let free = scheduler.step(Input::Limited { credential: "a".into(), max: None });
        assert_eq!(free, [Action::Start(job(1))]);
    }

    #[test]
    fn a_policys_limit_holds_over_all_users_and_keeps_no_other_policy_waiting() {
        let mut scheduler = Scheduler::new(9);
        let submit = |n, uid, most: Option<usize>| {
            let policy = most.map(|most| PolicySlots { name: "scarce".to_owned(), most });
            Input::Submitted { job: job(n), ticket: Ticket { policy, ..ticket(uid, 0, "") } }
        };
        assert_eq!(scheduler.step(submit(1, 1, Some(2))), [Action::Start(job(1))]);
        assert_eq!(scheduler.step(submit(2, 2, Some(2))), [Action::Start(job(2))]);
        assert!(scheduler.step(submit(3, 3, Some(2))).is_empty());
        assert_eq!(scheduler.step(submit(4, 3, None)), [Action::Start(job(4))]);
        assert_eq!(scheduler.clone().order()[0].waits, Waits::PolicyLimit);
        // Another word of the policy in the meantime: each job goes by the one that it was accepted under.
        assert_eq!(scheduler.step(submit(5, 3, Some(3))), [Action::Start(job(5))]);
        assert!(scheduler.step(Input::Ended { job: job(1) }).is_empty());
        assert_eq!(scheduler.step(Input::Ended { job: job(2) }), [Action::Start(job(3))]);
    }

    #[test]
    fn a_job_waits_until_the_host_has_room_and_none_passes_it() {
        let mut scheduler = Scheduler::new(9);
        let submit = |n, memory_bytes, disk_bytes| {
            let need = Need { memory_bytes, disk_bytes };
            Input::Submitted { job: job(n), ticket: Ticket { need, ..ticket(1, 0, "") } }
        };
        let room = |memory_bytes, disk_bytes| Input::Room(Need { memory_bytes, disk_bytes });
        scheduler.step(room(10, 10));
        assert_eq!(scheduler.step(submit(1, 99, 1)), [Action::Start(job(1))], "alone it may try");
        scheduler.step(room(10, 10));
        assert_eq!(scheduler.step(submit(2, 6, 1)), [Action::Start(job(2))]);
        assert!(scheduler.step(submit(3, 6, 1)).is_empty() && scheduler.waits_for_room());
        assert!(scheduler.step(submit(4, 1, 1)).is_empty(), "a small one behind it would always pass");
        let waits: Vec<_> = scheduler.clone().order().into_iter().map(|w| (w.job, w.waits)).collect();
        assert_eq!(waits, [(job(3), Waits::Memory), (job(4), Waits::Slots)]);
        assert!(scheduler.step(room(100, 0)).is_empty());
        assert_eq!(scheduler.clone().order()[0].waits, Waits::Disk);
        assert_eq!(scheduler.step(room(7, 2)), [Action::Start(job(3)), Action::Start(job(4))]);
        assert!(!scheduler.waits_for_room());
    }

    proptest! {
        #[test]
        fn the_order_that_is_told_is_the_order_of_starts(
            slots in 1usize..4,
            limits in proptest::collection::vec(proptest::option::of(1usize..3), 4),
            script in proptest::collection::vec((0u32..4, -3i8..3), 0..40),
        ) {
            let mut scheduler = Scheduler::new(slots);
            for (uid, slots) in (0u32..).zip(&limits) {
                scheduler.step(Input::Limit { uid, slots: *slots });
            }
            let mut ends: VecDeque<JobId> = VecDeque::new();
            let note = |ends: &mut VecDeque<JobId>, actions: Vec<Action>| {
                for action in actions {
                    if let Action::Start(job) = action { ends.push_back(job); }
                }
            };
            for (n, (uid, priority)) in (0u64..).zip(script) {
                let started = scheduler.step(submit(n, uid, priority));
                note(&mut ends, started);
            }
            ends.make_contiguous().sort();
            let told: Vec<JobId> = scheduler.clone().order().into_iter().map(|w| w.job).collect();
            let mut order = Vec::new();
            while let Some(job) = ends.pop_front() {
                let started = scheduler.step(Input::Ended { job });
                order.extend(started.iter().filter_map(|a| match a { Action::Start(job) => Some(job.clone()), _ => None }));
                note(&mut ends, started);
            }
            prop_assert_eq!(told, order);
        }

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
                    let running = scheduler.running.values().filter(|t| t.uid == uid).count();
                    let waits = scheduler.queued.values().any(|t| t.uid == uid);
                    prop_assert!(limit.is_none_or(|limit| running <= limit));
                    let full = scheduler.running() == slots || limit.is_some_and(|limit| running == limit);
                    prop_assert!(full || !waits, "nothing keeps this user's job waiting");
                }
            }
        }

        #[test]
        fn slots_hold_and_every_job_starts_once_per_turn(
            slots in 1usize..5,
            script in proptest::collection::vec((0u64..30, 0u32..4, -3i8..3, 0u8..8, any::<bool>()), 0..200),
        ) {
            let mut scheduler = Scheduler::new(slots);
            let (mut live, mut over, mut parked) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
            let mut paused = false;
            for (step, (n, uid, priority, kind, limited)) in script.into_iter().enumerate() {
                let id = job(n);
                let credential = if n % 2 == 0 { "even" } else { "odd" };
                let ticket = ticket(uid, priority, credential);
                let input = match kind {
                    0 | 1 if !over.contains(&id) && !parked.contains(&id) => Input::Submitted { job: id, ticket },
                    2 if !live.contains(&id) => { parked.remove(&id); Input::Withdrawn { job: id } }
                    3 if live.remove(&id) => {
                        parked.insert(id.clone());
                        let ticket = scheduler.ticket(&id).cloned().unwrap_or(ticket);
                        Input::Parked { job: id, ticket, until_ms: step as u64 + 3, limited }
                    }
                    4 => Input::Now { ms: step as u64 },
                    6 => { paused = true; Input::Pause }
                    7 => { paused = false; Input::Resume }
                    _ => { if live.remove(&id) { over.insert(id.clone()); } Input::Ended { job: id } }
                };
                let mut todo = vec![input];
                while let Some(input) = todo.pop() {
                    for action in scheduler.step(input) {
                        match action {
                            Action::Start(job) => {
                                prop_assert!(!over.contains(&job) && !parked.contains(&job));
                                prop_assert!(live.insert(job), "started twice");
                                prop_assert!(!paused, "started while paused");
                            }
                            Action::Unpark(job) => {
                                prop_assert!(parked.remove(&job), "woken and not parked");
                                let submitted = submit_of(job, "even");
                                todo.push(submitted);
                            }
                            Action::WakeAt(_) => {}
                        }
                    }
                }
                prop_assert!(live.len() <= slots);
                prop_assert_eq!(live.len(), scheduler.running());
                prop_assert_eq!(parked.len(), scheduler.parked());
                let limited = scheduler.credentials.values().any(|c| c.eased.is_some());
                prop_assert!(
                    paused || scheduler.running() == slots || scheduler.queued() == 0 || limited,
                    "a free slot beside a waiting job"
                );
                prop_assert!(
                    paused || scheduler.running() > 0 || scheduler.queued() == 0,
                    "nobody runs and somebody waits"
                );
                prop_assert_eq!(scheduler.clone().order().len(), scheduler.queued());
            }
        }
    }
}
