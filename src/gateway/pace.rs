//! How fast one credential is used. A provider limits the credential, not the job: when it says so, everything
//! that uses the credential waits together, then goes on with fewer requests at a time, and gets faster while it is
//! served. [`Pace`] decides and is pure; `Pacer` waits. A turn must always be given back, whatever becomes of
//! its request, and the first to come is the first to go.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Requests at a time while nothing limits them.
const RUNNING_MAX: u32 = 1_024;
/// A pause without a word from the provider, doubled at each further limit in a row.
const BACKOFF_MS: (u64, u64) = (1_000, 60_000);
/// Longest pause that is believed.
const PAUSE_MS_MAX: u64 = 24 * 3_600_000;
/// One more at a time after this long without a limit, even where nothing ends meanwhile.
const GROW_MS: u64 = 10_000;

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

/// What a request that waits is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Its turn. The number is given back at its end.
    Go(u64),
    /// Ask again when something has changed, or at this time.
    Wait {
        /// Milliseconds on the clock of the questions.
        until_ms: u64,
    },
}

/// The state of one credential: additive increase, multiplicative decrease, and a pause.
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
    waiting: BTreeSet<u64>,
    next: u64,
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
            waiting: BTreeSet::new(),
            next: 0,
        }
    }
}

impl Pace {
    /// A place in the queue.
    pub fn queue(&mut self) -> u64 {
        self.next += 1;
        self.waiting.insert(self.next);
        self.next
    }

    /// Gives a place up.
    pub fn leave(&mut self, ticket: u64) {
        self.waiting.remove(&ticket);
    }

    /// Whether it is this ticket's turn.
    pub fn ask(&mut self, ticket: u64, now_ms: u64) -> Verdict {
        if now_ms < self.paused_until_ms {
            return Verdict::Wait { until_ms: self.paused_until_ms };
        }
        let since = now_ms.saturating_sub(self.grown_ms.max(self.paused_until_ms));
        if self.limit < RUNNING_MAX && since >= GROW_MS {
            self.grow(now_ms);
        }
        if self.running >= self.limit || self.waiting.first().is_some_and(|first| *first != ticket) {
            let grown = self.grown_ms.max(self.paused_until_ms);
            return Verdict::Wait { until_ms: grown.saturating_add(GROW_MS).max(now_ms + 1) };
        }
        self.waiting.remove(&ticket);
        self.running += 1;
        Verdict::Go(self.epoch)
    }

    /// A turn's end.
    pub fn end(&mut self, epoch: u64, ending: Ending, now_ms: u64) {
        let together = self.running;
        self.running = self.running.saturating_sub(1);
        match ending {
            Ending::Other => {}
            Ending::Served => {
                // One that began before the limit says nothing about it.
                if epoch == self.epoch {
                    self.strikes = 0;
                    self.served = self.served.saturating_add(1);
                    if self.served >= self.limit {
                        self.grow(now_ms);
                    }
                }
            }
            Ending::Limited { retry_after_ms } => {
                let (first, most) = BACKOFF_MS;
                let backoff = first.saturating_mul(1 << self.strikes.min(16)).min(most);
                let pause = match retry_after_ms {
                    Some(asked) => asked.min(PAUSE_MS_MAX),
                    // The others of its time have said it already.
                    None if epoch != self.epoch => 0,
                    None => backoff,
                };
                self.paused_until_ms = self.paused_until_ms.max(now_ms.saturating_add(pause));
                if epoch == self.epoch {
                    self.epoch += 1;
                    self.strikes = self.strikes.saturating_add(1);
                    self.limit = (self.limit.min(together) / 2).max(1);
                    self.served = 0;
                    self.grown_ms = now_ms;
                }
            }
        }
    }

    /// What is left of the pause.
    pub fn paused_ms(&self, now_ms: u64) -> u64 {
        self.paused_until_ms.saturating_sub(now_ms)
    }

    /// Ends a pause before its time: somebody wants to try.
    pub fn lift(&mut self) {
        self.paused_until_ms = 0;
    }

    fn grow(&mut self, now_ms: u64) {
        self.limit = (self.limit + 1).min(RUNNING_MAX);
        self.served = 0;
        self.grown_ms = now_ms;
    }
}

/// How a credential is doing, for the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PaceView {
    /// Requests that may run at a time.
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

/// The pace of one credential, shared by all leases.
#[derive(Debug)]
pub(super) struct Pacer {
    pace: Mutex<Pace>,
    changed: Notify,
    born: Instant,
}

impl Pacer {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { pace: Mutex::default(), changed: Notify::new(), born: Instant::now() })
    }

    pub(super) fn lift(&self) {
        self.pace().lift();
        self.changed.notify_waiters();
    }

    pub(super) fn view(&self) -> PaceView {
        let pace = self.pace();
        PaceView {
            limit: pace.limit,
            running: pace.running,
            waiting: pace.waiting.len(),
            paused: Duration::from_millis(pace.paused_ms(self.now_ms())),
        }
    }

    /// Waits for a turn, until `give_up`; then what is left of the pause. `on_pause` hears of pauses that last
    /// longer. Cancel-safe: a place in the queue is given up.
    pub(super) async fn turn(
        self: &Arc<Self>,
        give_up: Instant,
        mut on_pause: impl FnMut(Duration),
    ) -> Result<Turn, Duration> {
        let place = Place { pacer: self, ticket: self.pace().queue() };
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Before the question, so that a change right after it is not missed.
            changed.as_mut().enable();
            let (verdict, paused) = {
                let (mut pace, now_ms) = (self.pace(), self.now_ms());
                (pace.ask(place.ticket, now_ms), Duration::from_millis(pace.paused_ms(now_ms)))
            };
            let until_ms = match verdict {
                Verdict::Go(epoch) => return Ok(Turn { pacer: Arc::clone(self), epoch, over: false }),
                Verdict::Wait { until_ms } => until_ms,
            };
            let now = Instant::now();
            if now >= give_up {
                return Err(paused);
            }
            if paused > give_up - now {
                on_pause(paused);
            }
            let wake = give_up.min(self.born + Duration::from_millis(until_ms));
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A place in the queue; given up when dropped.
struct Place<'a> {
    pacer: &'a Pacer,
    ticket: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.pacer.pace().leave(self.ticket);
        self.pacer.changed.notify_waiters();
    }
}

/// The right to one request; its end must be told, else it says nothing.
#[derive(Debug)]
pub(super) struct Turn {
    pacer: Arc<Pacer>,
    epoch: u64,
    over: bool,
}

impl Turn {
    /// The request is over; gives what is left of the pause, if there is one now.
    pub(super) fn end(mut self, ending: Ending) -> Duration {
        self.finish(ending)
    }

    fn finish(&mut self, ending: Ending) -> Duration {
        self.over = true;
        let now_ms = self.pacer.now_ms();
        let paused_ms = {
            let mut pace = self.pacer.pace();
            pace.end(self.epoch, ending, now_ms);
            pace.paused_ms(now_ms)
        };
        self.pacer.changed.notify_waiters();
        Duration::from_millis(paused_ms)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.over {
            self.finish(Ending::Other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITED: Ending = Ending::Limited { retry_after_ms: None };

    fn go(pace: &mut Pace, now_ms: u64) -> Option<u64> {
        let ticket = pace.queue();
        match pace.ask(ticket, now_ms) {
            Verdict::Go(epoch) => Some(epoch),
            Verdict::Wait { .. } => {
                pace.leave(ticket);
                None
            }
        }
    }

    #[test]
    fn a_limit_pauses_everyone_halves_once_and_growth_brings_it_back() {
        let mut pace = Pace::default();
        let turns: Vec<u64> = (0..8).map(|_| go(&mut pace, 0).unwrap()).collect();
        for turn in &turns {
            pace.end(*turn, Ending::Limited { retry_after_ms: Some(5_000) }, 10);
        }
        assert_eq!((pace.limit, pace.running, pace.strikes), (4, 0, 1), "eight at once are one limit");
        assert_eq!((go(&mut pace, 5_009), pace.paused_ms(10)), (None, 5_000));
        let turns: Vec<u64> = (0..9).filter_map(|_| go(&mut pace, 5_010)).collect();
        assert_eq!(turns.len(), 4, "fewer at a time");
        turns.iter().for_each(|turn| pace.end(*turn, Ending::Served, 5_020));
        assert_eq!((pace.limit, pace.strikes), (5, 0));
        assert!(go(&mut pace, 5_020 + GROW_MS).is_some());
        assert_eq!(pace.limit, 6, "time without a limit counts, too");
    }

    #[test]
    fn without_a_word_the_pause_doubles_to_a_minute() {
        let (mut pace, mut now) = (Pace::default(), 0);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let turn = go(&mut pace, now).unwrap();
            pace.end(turn, LIMITED, now);
            pauses.push(pace.paused_ms(now) / 1_000);
            now += pace.paused_ms(now);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        let turn = go(&mut pace, now).unwrap();
        pace.end(turn, Ending::Served, now);
        let turn = go(&mut pace, now).unwrap();
        pace.end(turn, Ending::Limited { retry_after_ms: Some(u64::MAX) }, now);
        assert_eq!(pace.paused_ms(now), PAUSE_MS_MAX, "no header stops a credential for ever");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Queue,
        Leave(usize),
        Ask(usize),
        End(usize, Ending),
        Pass(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let ending = prop_oneof![
            3 => Just(Ending::Served), 1 => Just(Ending::Other), 1 => Just(LIMITED),
            1 => any::<u64>().prop_map(|ms| Ending::Limited { retry_after_ms: Some(ms % 20_000) }),
        ];
        prop_oneof![
            4 => Just(Step::Queue),
            1 => any::<usize>().prop_map(Step::Leave),
            8 => any::<usize>().prop_map(Step::Ask),
            4 => (any::<usize>(), ending).prop_map(|(i, ending)| Step::End(i, ending)),
            2 => (0u64..30_000).prop_map(Step::Pass),
        ]
    }

    proptest! {
        #[test]
        fn any_course_keeps_the_limit_the_order_and_the_pause(steps in prop::collection::vec(step(), 0..300)) {
            let (mut pace, mut now) = (Pace::default(), 0u64);
            let (mut queue, mut running): (Vec<u64>, Vec<u64>) = (Vec::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Queue => queue.push(pace.queue()),
                    Step::Leave(i) if !queue.is_empty() => pace.leave(queue.remove(i % queue.len())),
                    Step::Ask(i) if !queue.is_empty() => {
                        let at = i % queue.len();
                        let paused = pace.paused_ms(now);
                        match pace.ask(queue[at], now) {
                            Verdict::Go(epoch) => {
                                prop_assert_eq!((paused, at), (0, 0), "first come, first served, and not in a pause");
                                queue.remove(at);
                                running.push(epoch);
                                prop_assert!(running.len() as u32 <= pace.limit);
                            }
                            Verdict::Wait { until_ms } => prop_assert!(until_ms > now),
                        }
                    }
                    Step::End(i, ending) if !running.is_empty() => {
                        let before = (pace.limit, pace.paused_ms(now));
                        let at = i % running.len();
                        pace.end(running.remove(at), ending, now);
                        match ending {
                            Ending::Limited { .. } => prop_assert!(pace.limit <= before.0),
                            Ending::Served | Ending::Other => prop_assert!(pace.limit >= before.0),
                        }
                        prop_assert!(pace.paused_ms(now) >= before.1, "no pause is shortened");
                    }
                    Step::Pass(ms) => now += ms,
                    Step::Leave(_) | Step::Ask(_) | Step::End(..) => {}
                }
                prop_assert!(pace.limit >= 1 && pace.limit <= RUNNING_MAX);
                prop_assert_eq!(pace.running as usize, running.len());
            }
            // Nothing is stuck: once all have ended and the pause is over, the first in line goes.
            for turn in running.drain(..) {
                pace.end(turn, Ending::Other, now);
            }
            now += pace.paused_ms(now);
            for ticket in queue {
                prop_assert!(matches!(pace.ask(ticket, now), Verdict::Go(_)) || pace.running >= pace.limit);
            }
        }
    }

    #[tokio::test]
    async fn those_who_wait_go_on_together_and_a_place_is_given_up_with_its_wait() {
        let pacer = Pacer::new();
        let far = Instant::now() + Duration::from_secs(600);
        let turn = pacer.turn(far, |_| ()).await.unwrap();
        assert!(turn.end(Ending::Limited { retry_after_ms: Some(200) }) > Duration::ZERO);
        let mut heard = 0;
        let short = pacer.turn(Instant::now() + Duration::from_millis(5), |_| heard += 1).await;
        assert!(short.is_err() && heard >= 1, "a longer pause is told at once");
        assert_eq!(pacer.view().waiting, 0);
        let first = pacer.turn(far, |_| ()).await.unwrap();
        let mut second = Box::pin(pacer.turn(far, |_| ()));
        assert!(tokio::time::timeout(Duration::from_millis(1), &mut second).await.is_err(), "one at a time");
        first.end(Ending::Served);
        drop(second.await.unwrap());
        let view = pacer.view();
        assert_eq!((view.running, view.waiting, view.limit), (0, 0, 2));
    }
}
