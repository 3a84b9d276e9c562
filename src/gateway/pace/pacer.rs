//! Waits for the turns that [`Pace`] gives, for each class of one credential, shared by all leases. A place in the
//! queue is given up when its request goes away, and a turn is given back.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{Class, Ending, Pace, PaceView, RUNNING_MAX};
use crate::job::JobId;

/// Classes remembered; of more, those are forgotten that nothing limits, then those that nobody uses.
const CLASSES_MAX: usize = 64;

/// The paces of one credential.
#[derive(Debug)]
pub(in crate::gateway) struct Pacer {
    lanes: Mutex<BTreeMap<Class, Lane>>,
    born: Instant,
}

/// One class.
#[derive(Debug, Default)]
struct Lane {
    pace: Pace,
    /// By ticket: who waits for it.
    waiters: HashMap<u64, Arc<Notify>>,
    /// Turns that were given and not taken yet: ticket → epoch.
    given: HashMap<u64, u64>,
}

impl Lane {
    fn give(&mut self, now_ms: u64) {
        while let Some(given) = self.pace.next(now_ms) {
            self.given.insert(given.ticket, given.epoch);
            if let Some(waiter) = self.waiters.get(&given.ticket) {
                waiter.notify_one();
            }
        }
    }

    /// All look again: how long they have to wait has changed.
    fn wake_all(&self) {
        self.waiters.values().for_each(|waiter| waiter.notify_one());
    }
}

impl Pacer {
    pub(in crate::gateway) fn new() -> Arc<Self> {
        Arc::new(Self { lanes: Mutex::default(), born: Instant::now() })
    }

    /// Ends the pauses of a class, by its name.
    pub(in crate::gateway) fn lift(&self, class: &str) {
        let now_ms = self.now_ms();
        let mut lanes = self.lanes();
        for (_, lane) in lanes.iter_mut().filter(|(known, _)| known.to_string() == class) {
            lane.pace.lift();
            lane.give(now_ms);
            lane.wake_all();
        }
    }

    /// What is left of the pause that all requests of a class keep to.
    pub(in crate::gateway) fn paused(&self, class: &Class) -> Duration {
        let now_ms = self.now_ms();
        Duration::from_millis(self.lanes().get(class).map_or(0, |lane| lane.pace.paused_ms(now_ms)))
    }

    pub(in crate::gateway) fn view(&self) -> PaceView {
        let (lanes, now_ms) = (self.lanes(), self.now_ms());
        let paces = || lanes.values().map(|lane| &lane.pace);
        PaceView {
            limit: paces().map(|pace| pace.limit).min().unwrap_or(RUNNING_MAX),
            running: paces().map(|pace| pace.running).sum(),
            waiting: paces().map(|pace| pace.waiting).sum(),
            paused: Duration::from_millis(paces().map(|pace| pace.paused_ms(now_ms)).max().unwrap_or(0)),
        }
    }

    /// Waits for a turn, until `give_up`; then what is left of the pause. `on_pause` hears of pauses that last
    /// longer. Cancel-safe: a place in the queue is given up.
    pub(in crate::gateway) async fn turn(
        self: &Arc<Self>,
        class: &Class,
        job: &JobId,
        give_up: Instant,
        mut on_pause: impl FnMut(Duration),
    ) -> Result<Turn, Duration> {
        let (place, waiter) = self.queue(class, job);
        loop {
            let (wake_ms, paused) = match self.look(&place) {
                Look::Turn(epoch) => return Ok(place.taken(epoch)),
                Look::Wait { wake_ms, paused } => (wake_ms, paused),
            };
            let now = Instant::now();
            if now >= give_up {
                return Err(paused);
            }
            if paused > give_up - now {
                on_pause(paused);
            }
            let wake = self.born.checked_add(Duration::from_millis(wake_ms)).unwrap_or(give_up);
            tokio::select! {
                () = waiter.notified() => {}
                () = tokio::time::sleep_until(give_up.min(wake).into()) => {}
            }
        }
    }

    fn queue(self: &Arc<Self>, class: &Class, job: &JobId) -> (Place, Arc<Notify>) {
        let (now_ms, waiter) = (self.now_ms(), Arc::new(Notify::new()));
        let mut lanes = self.lanes();
        if !lanes.contains_key(class) {
            forget(&mut lanes, now_ms);
        }
        let lane = lanes.entry(class.clone()).or_default();
        let ticket = lane.pace.queue(job);
        lane.waiters.insert(ticket, Arc::clone(&waiter));
        (Place { pacer: Arc::clone(self), class: class.clone(), job: job.clone(), ticket }, waiter)
    }

    fn look(&self, place: &Place) -> Look {
        let now_ms = self.now_ms();
        let mut lanes = self.lanes();
        let lane = lanes.entry(place.class.clone()).or_default();
        lane.give(now_ms);
        match lane.given.remove(&place.ticket) {
            Some(epoch) => Look::Turn(epoch),
            None => Look::Wait {
                wake_ms: lane.pace.wake_ms(&place.job, now_ms),
                paused: Duration::from_millis(lane.pace.paused_for_ms(&place.job, now_ms)),
            },
        }
    }

    fn lanes(&self) -> MutexGuard<'_, BTreeMap<Class, Lane>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

enum Look {
    Turn(u64),
    Wait { wake_ms: u64, paused: Duration },
}

/// Makes room for one more. A class with requests under way is kept.
fn forget(lanes: &mut BTreeMap<Class, Lane>, now_ms: u64) {
    if lanes.len() < CLASSES_MAX {
        return;
    }
    lanes.retain(|_, lane| !lane.pace.is_idle(now_ms) || lane.pace.epoch > 0);
    if lanes.len() >= CLASSES_MAX {
        lanes.retain(|_, lane| lane.pace.running > 0 || !lane.waiters.is_empty());
    }
}

/// A place in the queue; given up when dropped, with a turn that was given and not taken.
struct Place {
    pacer: Arc<Pacer>,
    class: Class,
    job: JobId,
    ticket: u64,
}

impl Place {
    fn taken(self, epoch: u64) -> Turn {
        let (pacer, class, job) = (Arc::clone(&self.pacer), self.class.clone(), self.job.clone());
        Turn { pacer, class, job, epoch, over: false }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let now_ms = self.pacer.now_ms();
        if let Some(lane) = self.pacer.lanes().get_mut(&self.class) {
            lane.waiters.remove(&self.ticket);
            match lane.given.remove(&self.ticket) {
                Some(epoch) => lane.pace.end(&self.job, epoch, Ending::Other, now_ms),
                None => lane.pace.leave(&self.job, self.ticket),
            }
            lane.give(now_ms);
        }
    }
}

/// The right to one request; its end must be told, else it says nothing.
#[derive(Debug)]
pub(in crate::gateway) struct Turn {
    pacer: Arc<Pacer>,
    class: Class,
    job: JobId,
    epoch: u64,
    over: bool,
}

impl Turn {
    /// The request is over; gives what is left of the pause for its job, if there is one now.
    pub(in crate::gateway) fn end(mut self, ending: Ending) -> Duration {
        self.finish(ending)
    }

    fn finish(&mut self, ending: Ending) -> Duration {
        self.over = true;
        let now_ms = self.pacer.now_ms();
        let mut lanes = self.pacer.lanes();
        let Some(lane) = lanes.get_mut(&self.class) else { return Duration::ZERO };
        lane.pace.end(&self.job, self.epoch, ending, now_ms);
        lane.give(now_ms);
        if matches!(ending, Ending::Limited { .. }) {
            lane.wake_all();
        }
        Duration::from_millis(lane.pace.paused_for_ms(&self.job, now_ms))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.over {
            self.finish(Ending::Other);
        }
    }
}
