//! Parts of bodies that were read before, known again by their bytes: a conversation sends its tools and its system
//! prompt with every request. A part that needs the policy's word, or is to be changed, is never kept: it is read each
//! time. Nor is a part known by anything less than all its bytes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::shape::{ShapeBuilder, keyed};

/// Smaller parts are read as fast as they are compared; larger ones are not kept.
const BYTES: std::ops::RangeInclusive<usize> = 1 << 10..=256 << 10;
/// What one lease keeps: parts, and bytes of all of them.
const OWN_MAX: (usize, usize) = (6, 512 << 10);
/// Parts that all leases of a provider share.
const SHARED_MAX: usize = 1024;

/// A part, and what was found in it.
#[derive(Debug)]
pub struct Fragment {
    field: &'static str,
    raw: Box<str>,
    pub(super) long_cache: bool,
    pub(super) shape: ShapeBuilder,
}

impl Fragment {
    /// A field's whole value; `None` where it is not worth keeping, or does not end where its bytes end whatever
    /// follows, as a number does.
    pub(super) fn new(
        field: &'static str,
        raw: &str,
        long_cache: bool,
        shape: &ShapeBuilder,
    ) -> Option<Self> {
        let closed = raw.starts_with(['[', '{', '"']);
        (closed && BYTES.contains(&raw.len())).then(|| Self {
            field,
            raw: raw.into(),
            long_cache,
            shape: shape.clone(),
        })
    }

    /// Whether the field's value is this, and `text` begins with it.
    pub(super) fn begins(&self, field: &str, text: &[u8]) -> bool {
        self.field == field && text.starts_with(self.raw.as_bytes())
    }

    pub(super) fn bytes(&self) -> usize {
        self.raw.len()
    }
}

/// What one lease knows.
#[derive(Debug, Default)]
pub struct Recall(Mutex<Vec<Arc<Fragment>>>);

impl Recall {
    /// All of it, the latest first.
    pub fn known(&self) -> Vec<Arc<Fragment>> {
        locked(&self.0).clone()
    }

    /// Keeps parts; the oldest go.
    pub fn keep(&self, fresh: Vec<Fragment>, shared: &Interned) {
        for fragment in fresh {
            let fragment = shared.one(fragment);
            let mut own = locked(&self.0);
            // Another request of the same time may have brought it.
            own.retain(|kept| !Arc::ptr_eq(kept, &fragment));
            own.insert(0, fragment);
            let (parts_max, bytes_max) = OWN_MAX;
            own.truncate(parts_max);
            let mut bytes = 0;
            own.retain(|fragment| {
                bytes += fragment.bytes();
                bytes <= bytes_max
            });
        }
    }
}

/// Parts that several leases know, which are in memory once. None is found here but by its bytes: a lease cannot
/// learn what others know, but by having all of it.
#[derive(Debug, Default)]
pub struct Interned(Mutex<HashMap<u64, Weak<Fragment>>>);

impl Interned {
    fn one(&self, fragment: Fragment) -> Arc<Fragment> {
        let key = keyed(&fragment.raw);
        let mut all = locked(&self.0);
        if let Some(same) = all.get(&key).and_then(Weak::upgrade)
            && same.begins(fragment.field, fragment.raw.as_bytes())
            && same.bytes() == fragment.bytes()
        {
            return same;
        }
        let fragment = Arc::new(fragment);
        if all.len() >= SHARED_MAX {
            all.retain(|_, kept| kept.strong_count() > 0);
        }
        if all.len() < SHARED_MAX {
            all.insert(key, Arc::downgrade(&fragment));
        }
        fragment
    }
}

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
