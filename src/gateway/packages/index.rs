//! What the package cache holds, in memory: entries, the bodies they share, who put them there, and which was used
//! last. Pure. Its sums are those of what stands in it, whatever comes and goes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::key::Hash;

/// Most entries; the least recently used goes for a new one. Each takes some 300 bytes of memory.
pub(super) const ENTRIES_MAX: usize = 200_000;
/// What a file takes of a disk at least, and is rounded up to, in bytes.
const BLOCK_BYTES: u64 = 4096;

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) policy: Arc<str>,
    pub(super) body: Hash,
    /// Length of the body.
    pub(super) body_bytes: u64,
    /// The job that it came with, and what it takes of what that job may fill.
    pub(super) job: Arc<str>,
    pub(super) charged: u64,
    /// When it was used last, in milliseconds since 1970.
    pub(super) used_ms: u64,
}

/// A body and how many entries have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Body {
    bytes: u64,
    entries: u64,
    /// Whether this daemon has compared it with its hash.
    checked: bool,
}

/// Entries and their bodies' bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    /// Entries.
    pub entries: u64,
    /// Bytes of their bodies; one that several entries share counts for each.
    pub bytes: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Index {
    entries: HashMap<Hash, (Slot, u64)>,
    /// By last use, then by a number of its own.
    order: BTreeMap<(u64, u64), Hash>,
    next: u64,
    bodies: HashMap<Hash, Body>,
    jobs: HashMap<Arc<str>, u64>,
    policies: BTreeMap<Arc<str>, Sum>,
    /// On the disk, in whole blocks.
    bytes: u64,
    /// Promised to bodies that are on their way.
    promised: u64,
    promised_to: HashMap<Arc<str>, u64>,
}

/// Whether bytes can be promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// They are promised.
    Given,
    /// Not before something else goes.
    Full,
    /// Not at all: they are too many for one job.
    TooMuch,
}

/// What a file of so many bytes takes of the disk.
pub(super) fn on_disk(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES).max(1).saturating_mul(BLOCK_BYTES)
}

impl Index {
    /// What a new entry with this body would take.
    pub(super) fn charge(&self, body: Hash, body_bytes: u64) -> u64 {
        let own = if self.bodies.contains_key(&body) { 0 } else { on_disk(body_bytes) };
        own + BLOCK_BYTES
    }

    /// Puts an entry in, in place of the one of the same name; the body that no entry has any more, if there is one.
    pub(super) fn put(&mut self, name: Hash, slot: Slot) -> Option<Hash> {
        // The new one first: a body that both have stays.
        let body = Body { bytes: slot.body_bytes, entries: 0, checked: false };
        let body = self.bodies.entry(slot.body).or_insert(body);
        if body.entries == 0 {
            self.bytes += on_disk(slot.body_bytes);
        }
        body.entries += 1;
        let gone = self.remove(name);
        self.bytes += BLOCK_BYTES;
        *self.jobs.entry(Arc::clone(&slot.job)).or_default() += slot.charged;
        let sum = self.policies.entry(Arc::clone(&slot.policy)).or_default();
        (sum.entries, sum.bytes) = (sum.entries + 1, sum.bytes + slot.body_bytes);
        self.next += 1;
        self.order.insert((slot.used_ms, self.next), name);
        self.entries.insert(name, (slot, self.next));
        gone
    }

    /// Takes an entry out; its body where no other entry has it.
    pub(super) fn remove(&mut self, name: Hash) -> Option<Hash> {
        let (slot, number) = self.entries.remove(&name)?;
        self.order.remove(&(slot.used_ms, number));
        self.bytes -= BLOCK_BYTES;
        if let Some(charged) = self.jobs.get_mut(&slot.job) {
            *charged = charged.saturating_sub(slot.charged);
            if *charged == 0 {
                self.jobs.remove(&slot.job);
            }
        }
        if let Some(sum) = self.policies.get_mut(&slot.policy) {
            (sum.entries, sum.bytes) = (sum.entries - 1, sum.bytes - slot.body_bytes);
            if sum.entries == 0 {
                self.policies.remove(&slot.policy);
            }
        }
        let body = self.bodies.get_mut(&slot.body)?;
        body.entries -= 1;
        if body.entries > 0 {
            return None;
        }
        self.bytes -= on_disk(body.bytes);
        self.bodies.remove(&slot.body);
        Some(slot.body)
    }

    pub(super) fn get(&self, name: Hash) -> Option<&Slot> {
        self.entries.get(&name).map(|(slot, _)| slot)
    }

    pub(super) fn touch(&mut self, name: Hash, now_ms: u64) {
        if let Some((slot, number)) = self.entries.get_mut(&name) {
            self.order.remove(&(slot.used_ms, *number));
            slot.used_ms = slot.used_ms.max(now_ms);
            self.order.insert((slot.used_ms, *number), name);
        }
    }

    /// The entry that was used least recently.
    pub(super) fn oldest(&self) -> Option<Hash> {
        self.order.first_key_value().map(|(_, name)| *name)
    }

    pub(super) fn names(&self) -> Vec<Hash> {
        self.order.values().rev().copied().collect()
    }

    /// Length of a body, and whether this daemon has compared it with its hash.
    pub(super) fn body(&self, body: Hash) -> Option<(u64, bool)> {
        self.bodies.get(&body).map(|body| (body.bytes, body.checked))
    }

    pub(super) fn checked(&mut self, body: Hash) {
        if let Some(body) = self.bodies.get_mut(&body) {
            body.checked = true;
        }
    }

    /// Promises `more` bytes to a job that is filling the cache.
    pub(super) fn promise(&mut self, job: &Arc<str>, more: u64, bytes_max: u64) -> Room {
        let used = self.jobs.get(job).copied().unwrap_or(0);
        let promised = self.promised_to.get(job).copied().unwrap_or(0);
        if used.saturating_add(promised).saturating_add(more) > bytes_max / 2 {
            return Room::TooMuch;
        }
        if self.bytes.saturating_add(self.promised).saturating_add(more) > bytes_max
            || self.entries.len() >= ENTRIES_MAX
        {
            return Room::Full;
        }
        self.promised += more;
        *self.promised_to.entry(Arc::clone(job)).or_default() += more;
        Room::Given
    }

    /// Takes a promise back.
    pub(super) fn release(&mut self, job: &Arc<str>, bytes: u64) {
        self.promised = self.promised.saturating_sub(bytes);
        if let Some(promised) = self.promised_to.get_mut(job) {
            *promised = promised.saturating_sub(bytes);
            if *promised == 0 {
                self.promised_to.remove(job);
            }
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn policies(&self) -> impl Iterator<Item = (&Arc<str>, Sum)> {
        self.policies.iter().map(|(name, sum)| (name, *sum))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot(policy: u8, body: u8, job: u8, used_ms: u64, charged: u64) -> Slot {
        Slot {
            policy: format!("p{policy}").into(),
            body: Hash([body; 32]),
            body_bytes: u64::from(body) * 1000,
            job: format!("j{job}").into(),
            charged,
            used_ms,
        }
    }

    #[test]
    fn the_least_recently_used_is_the_oldest() {
        let mut index = Index::default();
        for n in 1..4 {
            index.put(Hash([n; 32]), slot(0, n, 0, u64::from(n), 0));
        }
        assert_eq!(index.oldest(), Some(Hash([1; 32])));
        index.touch(Hash([1; 32]), 9);
        assert_eq!(index.oldest(), Some(Hash([2; 32])));
        assert_eq!(index.names(), [1, 3, 2].map(|n| Hash([n; 32])));
    }

    #[test]
    fn one_job_fills_half_and_what_is_on_its_way_counts() {
        let (mut index, a, b) = (Index::default(), Arc::from("a"), Arc::from("b"));
        assert_eq!(index.promise(&a, 51, 100), Room::TooMuch);
        assert_eq!(index.promise(&a, 30, 100), Room::Given);
        assert_eq!(index.promise(&a, 30, 100), Room::TooMuch);
        assert_eq!(index.promise(&b, 50, 100), Room::Given);
        assert_eq!(index.promise(&a, 20, 100), Room::Given);
        assert_eq!(index.promise(&Arc::from("c"), 1, 100), Room::Full);
        index.release(&a, 50);
        assert_eq!(index.promise(&a, 50, 100), Room::Given);
    }

    proptest! {
        #[test]
        fn sums_are_those_of_what_is_there(
            steps in prop::collection::vec((0u8..8, 0u8..3, 0u8..5, 0u8..3, any::<bool>()), 0..60)
        ) {
            let mut index = Index::default();
            let mut bodies = std::collections::HashSet::new();
            for (n, (name, policy, body, job, put)) in steps.into_iter().enumerate() {
                let name = Hash([name; 32]);
                let gone = if put {
                    let charged = index.charge(Hash([body; 32]), u64::from(body) * 1000);
                    bodies.insert(Hash([body; 32]));
                    index.put(name, slot(policy, body, job, n as u64, charged))
                } else {
                    index.remove(name)
                };
                if let Some(gone) = gone {
                    prop_assert!(bodies.remove(&gone));
                }
                let slots: Vec<Slot> = index.names().into_iter().filter_map(|n| index.get(n).cloned()).collect();
                let held: std::collections::HashSet<Hash> = slots.iter().map(|s| s.body).collect();
                prop_assert_eq!(&held, &bodies, "a body is told as gone exactly when no entry has it");
                let disk: u64 = held.iter().map(|b| on_disk(u64::from(b.0[0]) * 1000)).sum();
                prop_assert_eq!(index.bytes(), disk + slots.len() as u64 * BLOCK_BYTES);
                let sums: u64 = index.policies().map(|(_, sum)| sum.bytes).sum();
                prop_assert_eq!(sums, slots.iter().map(|s| s.body_bytes).sum::<u64>());
                let charged: u64 = index.jobs.values().sum();
                prop_assert_eq!(charged, slots.iter().map(|s| s.charged).sum::<u64>());
                prop_assert_eq!((index.len(), index.order.len()), (slots.len(), slots.len()));
            }
        }
    }
}
