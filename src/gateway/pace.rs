//! How fast one kind of requests of a credential goes out. A provider limits a credential by model, and requests with
//! a long input apart ([`Class`]), not by job: when it says so, all jobs that use the class wait together, then go on
//! with fewer requests at a time, and get faster while they are served. [`Pace`] decides and is pure; `pacer` waits.
//!
//! A turn must always be given back, whatever becomes of its request. Turns go to the job with the fewest requests
//! under way, and among those to the one that had none for longest, so that a job with many parallel requests keeps
//! no other one waiting for more than one of them.
//!
//! Whose limit it is: one job's requests may be limited for what they are (too large for the account, not allowed to
//! it), again and again, while all others are served. Two rules keep that the job's own affair. A job that is limited
//! again, when since the last time others were served and none of them was limited, only pauses itself. And who was
//! served after each of the last `SPARED_FROM` pauses without being limited waits for no other's limit any more,
//! until it is limited itself.

pub(super) mod pacer;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use crate::job::JobId;

/// Requests at a time while nothing limits them.
const RUNNING_MAX: u32 = 1_024;
/// A pause without a word from the provider, doubled at each further limit in a row.
const BACKOFF_MS: (u64, u64) = (1_000, 60_000);
/// Longest pause that is believed.
const PAUSE_MS_MAX: u64 = 24 * 3_600_000;
/// One more at a time after this long without a limit, even where nothing ends meanwhile.
const GROW_MS: u64 = 10_000;
/// Pauses of others after which a job is served before it need not keep to them.
const SPARED_FROM: u32 = 2;
/// Requests of its own that must be served before a job's next limit is taken for everybody's again.
const CLEARED_BY: u64 = 8;
/// Jobs remembered that have nothing under way.
const JOBS_MAX: usize = 1_024;
/// Requests whose input has more tokens than this are limited apart.
const LONG_INPUT_TOKENS: u64 = 200_000;
/// How the CLI says that it wants the long context of a model.
const LONG_SUFFIX: &str = "[1m]";

/// Requests that a provider limits together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class {
    model: String,
    long: bool,
}

impl Class {
    /// The class of a request: its model, whatever the date of its version, and whether its input may be long.
    pub fn new(model: &str, input_tokens_max: u64) -> Self {
        Self { model: undated(model).to_owned(), long: input_tokens_max > LONG_INPUT_TOKENS }
    }

    /// The class of most requests of a job, by the model that it names.
    pub fn of_job(model: &str) -> Self {
        let short = model.strip_suffix(LONG_SUFFIX);
        Self { model: undated(short.unwrap_or(model)).to_owned(), long: short.is_some() }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.model)?;
        f.write_str(if self.long { LONG_SUFFIX } else { "" })
    }
}

/// A model's name without what names one of its versions.
fn undated(model: &str) -> &str {
    let date = |text: &str| text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_digit());
    match model.rsplit_once(['-', '@']) {
        Some((name, version)) if version == "latest" || date(version) => name,
        _ => model,
    }
}

/// How a request ended, as far as the limit is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It was served.
    Served,
    /// The provider is limited or overloaded.
    Limited {
        /// How long it asks to wait.
        retry_after_ms: Option<u64>,
    },
    /// It says nothing about limits.
    Other,
}

/// A turn that was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Given {
    /// Whose turn it is, as [`Pace::queue`] gave it.
    pub ticket: u64,
    /// Is told at its end.
    pub epoch: u64,
}

/// What is known of one job.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Member {
    waiting: BTreeSet<u64>,
    running: u32,
    /// Counts the turns of all: when it had its last one.
    turned: u64,
    /// Its own pause, which concerns nobody else.
    paused_until_ms: u64,
    /// Limits in a row that were its own.
    strikes: u32,
    served: u64,
    limited: u64,
    /// How things stood when it was last limited.
    last: Option<Past>,
    /// Pauses of others after which it was served.
    spared: u32,
    spared_epoch: u64,
}

/// Requests served and limited up to a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Past {
    own_served: u64,
    others_served: u64,
    others_limited: u64,
}

impl Member {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running == 0
    }

    /// The end of what it has to wait for.
    fn paused_until_ms(&self, everybodys_ms: u64) -> u64 {
        let shared = if self.spared >= SPARED_FROM { 0 } else { everybodys_ms };
        shared.max(self.paused_until_ms)
    }
}

/// The state of one class: additive increase, multiplicative decrease, and a pause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pace {
    limit: u32,
    running: u32,
    /// Counts decreases: of requests that ran together, the first that is limited speaks for all.
    epoch: u64,
    /// Limits in a row.
    strikes: u32,
    /// Requests served since the last growth.
    served: u32,
    grown_ms: u64,
    paused_until_ms: u64,
    members: BTreeMap<JobId, Member>,
    waiting: usize,
    tickets: u64,
    turns: u64,
    served_all: u64,
    limited_all: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            limit: RUNNING_MAX,
            running: 0,
            epoch: 0,
            strikes: 0,
            served: 0,
            grown_ms: 0,
            paused_until_ms: 0,
            members: BTreeMap::new(),
            waiting: 0,
            tickets: 0,
            turns: 0,
            served_all: 0,
            limited_all: 0,
        }
    }
}

impl Pace {
    /// A place in the queue.
    pub fn queue(&mut self, job: &JobId) -> u64 {
        self.tickets += 1;
        let ticket = self.tickets;
        if !self.members.contains_key(job) {
            self.forget_one();
            let member = Member { spared_epoch: self.epoch, ..Member::default() };
            self.members.insert(job.clone(), member);
        }
        if let Some(member) = self.members.get_mut(job) {
            self.waiting += usize::from(member.waiting.insert(ticket));
        }
        ticket
    }

    /// Gives a place up.
    pub fn leave(&mut self, job: &JobId, ticket: u64) {
        if let Some(member) = self.members.get_mut(job) {
            self.waiting -= usize::from(member.waiting.remove(&ticket));
        }
    }

    /// The next turn, if there is one now.
    pub fn next(&mut self, now_ms: u64) -> Option<Given> {
        if self.waiting == 0 {
            return None;
        }
        let since = now_ms.saturating_sub(self.grown_ms.max(self.paused_until_ms));
        if self.limit < RUNNING_MAX && since >= GROW_MS {
            self.grow(now_ms);
        }
        if self.running >= self.limit {
            return None;
        }
        let everybodys_ms = self.paused_until_ms;
        let able =
            |member: &Member| !member.waiting.is_empty() && now_ms >= member.paused_until_ms(everybodys_ms);
        let waiting = self.members.values_mut().filter(|member| able(member));
        let member = waiting.min_by_key(|member| (member.running, member.turned))?;
        let ticket = member.waiting.pop_first()?;
        self.turns += 1;
        (member.turned, member.running) = (self.turns, member.running + 1);
        self.waiting -= 1;
        self.running += 1;
        Some(Given { ticket, epoch: self.epoch })
    }

    /// A turn's end.
    pub fn end(&mut self, job: &JobId, epoch: u64, ending: Ending, now_ms: u64) {
        let together = self.running;
        self.running = self.running.saturating_sub(1);
        if let Some(member) = self.members.get_mut(job) {
            member.running = member.running.saturating_sub(1);
        }
        match ending {
            Ending::Other => {}
            Ending::Served => self.end_served(job, epoch, now_ms),
            Ending::Limited { retry_after_ms } => {
                self.end_limited(job, epoch, retry_after_ms, together, now_ms);
            }
        }
    }

    fn end_served(&mut self, job: &JobId, epoch: u64, now_ms: u64) {
        self.served_all += 1;
        if let Some(member) = self.members.get_mut(job) {
            (member.served, member.strikes) = (member.served + 1, 0);
            if epoch > member.spared_epoch {
                (member.spared, member.spared_epoch) = (member.spared.saturating_add(1), epoch);
            }
        }
        // One that began before the limit says nothing about it.
        if epoch == self.epoch {
            self.strikes = 0;
            self.served = self.served.saturating_add(1);
            if self.served >= self.limit {
                self.grow(now_ms);
            }
        }
    }

    fn end_limited(
        &mut self,
        job: &JobId,
        epoch: u64,
        retry_after_ms: Option<u64>,
        together: u32,
        now_ms: u64,
    ) {
        let asked = retry_after_ms.map(|ms| ms.min(PAUSE_MS_MAX));
        if self.is_its_own(job) {
            if let Some(member) = self.members.get_mut(job) {
                let until_ms = now_ms.saturating_add(asked.unwrap_or_else(|| backoff(member.strikes)));
                member.strikes = member.strikes.saturating_add(1);
                member.paused_until_ms = member.paused_until_ms.max(until_ms);
            }
            return;
        }
        let pause = match asked {
            Some(asked) => asked,
            // The others of its time have said it already.
            None if epoch != self.epoch => 0,
            None => backoff(self.strikes),
        };
        self.paused_until_ms = self.paused_until_ms.max(now_ms.saturating_add(pause));
        if epoch == self.epoch {
            self.epoch += 1;
            self.strikes = self.strikes.saturating_add(1);
            self.limit = (self.limit.min(together) / 2).max(1);
            self.served = 0;
            self.grown_ms = now_ms;
        }
        if let Some(member) = self.members.get_mut(job) {
            (member.spared, member.spared_epoch) = (0, self.epoch);
        }
    }

    /// Counts a limit of a job; says whether it is nobody else's: it is not the first, since the last one others
    /// were served and none of them was limited, and it was hardly served itself.
    fn is_its_own(&mut self, job: &JobId) -> bool {
        let Some(member) = self.members.get_mut(job) else { return false };
        let now = Past {
            own_served: member.served,
            others_served: self.served_all - member.served,
            others_limited: self.limited_all - member.limited,
        };
        let own = member.last.is_some_and(|last| {
            now.others_served > last.others_served
                && now.others_limited == last.others_limited
                && now.own_served < last.own_served + CLEARED_BY
        });
        // Where others are served it counts from the first of the row, so that its own requests add up.
        let own_served = member.last.filter(|_| own).map_or(now.own_served, |last| last.own_served);
        member.last = Some(Past { own_served, ..now });
        member.limited += 1;
        self.limited_all += 1;
        own
    }

    /// What is left of the pause of all.
    pub fn paused_ms(&self, now_ms: u64) -> u64 {
        self.paused_until_ms.saturating_sub(now_ms)
    }

    /// What a job has to wait for, for the provider's limit.
    pub fn paused_for_ms(&self, job: &JobId, now_ms: u64) -> u64 {
        let until =
            self.members.get(job).map_or(self.paused_until_ms, |m| m.paused_until_ms(self.paused_until_ms));
        until.saturating_sub(now_ms)
    }

    /// When a job that waits should ask again, if nothing ends before.
    pub fn wake_ms(&self, job: &JobId, now_ms: u64) -> u64 {
        match self.paused_for_ms(job, now_ms) {
            0 => self.grown_ms.max(self.paused_until_ms).saturating_add(GROW_MS).max(now_ms + 1),
            left_ms => now_ms.saturating_add(left_ms),
        }
    }

    /// Ends all pauses before their time: somebody wants to try.
    pub fn lift(&mut self) {
        self.paused_until_ms = 0;
        self.members.values_mut().for_each(|member| member.paused_until_ms = 0);
    }

    /// Whether nothing is lost when it is forgotten.
    fn is_idle(&self, now_ms: u64) -> bool {
        self.running == 0 && self.waiting == 0 && self.paused_ms(now_ms) == 0
    }

    fn forget_one(&mut self) {
        if self.members.len() < JOBS_MAX {
            return;
        }
        let idle = self.members.iter().filter(|(_, member)| member.is_idle());
        let oldest = idle.min_by_key(|(_, member)| member.turned).map(|(job, _)| job.clone());
        if let Some(member) = oldest.and_then(|job| self.members.remove(&job)) {
            // What the others did is counted by what it did not.
            self.served_all -= member.served;
            self.limited_all -= member.limited;
            for other in self.members.values_mut() {
                if let Some(last) = &mut other.last {
                    last.others_served = last.others_served.saturating_sub(member.served);
                    last.others_limited = last.others_limited.saturating_sub(member.limited);
                }
            }
        }
    }

    fn grow(&mut self, now_ms: u64) {
        self.limit = (self.limit + 1).min(RUNNING_MAX);
        self.served = 0;
        self.grown_ms = now_ms;
    }
}

fn backoff(strikes: u32) -> u64 {
    let (first, most) = BACKOFF_MS;
    first.saturating_mul(1 << strikes.min(16)).min(most)
}

/// How a credential is doing, for the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PaceView {
    /// Requests that may run at a time, of the class with the fewest.
    pub limit: u32,
    /// Requests that run.
    pub running: u32,
    /// Requests that wait for their turn.
    pub waiting: usize,
    /// What is left of a pause.
    pub paused: Duration,
}

impl PaceView {
    /// Both together: sums, and the longer pause.
    pub fn with(self, other: Self) -> Self {
        Self {
            limit: self.limit.saturating_add(other.limit),
            running: self.running.saturating_add(other.running),
            waiting: self.waiting.saturating_add(other.waiting),
            paused: self.paused.max(other.paused),
        }
    }
}

#[cfg(test)]
mod tests;
