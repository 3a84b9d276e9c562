//! Places at which a test may kill the daemon: every transaction of the store, every write of a journal, every call
//! to the engine and every request to a provider, before and after it. In a release build there are none; elsewhere it
//! must never do anything but end the process, and only where the environment says at which place.

/// Names the place, counted from the start of the process over all places, at which the process gets SIGKILL.
pub const VARIABLE: &str = "HOTCELL_CRASH_AT";

/// One of these places. `name` is told on standard error where it is the last one.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn pass(_name: &'static str) {}

/// One of these places. `name` is told on standard error where it is the last one.
#[cfg(debug_assertions)]
pub fn pass(name: &'static str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    static AT: OnceLock<Option<u64>> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);
    let at = AT.get_or_init(|| std::env::var(VARIABLE).ok()?.parse().ok());
    if at.is_some_and(|at| PASSED.fetch_add(1, Ordering::Relaxed) + 1 == at) {
        // Written by hand: nothing may stand between it and the end, not even the log's lock.
        let line = format!("crash point: {name}\n");
        let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // The signal ends this thread at its return to user space at the latest.
        std::process::abort();
    }
}
