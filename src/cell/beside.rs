//! Two halves of one piece of work that blocks, at the same time. Neither is ever left running: both have ended when
//! the caller goes on, whatever became of them.

use std::io;

/// Does `other` on a thread called `name` while the caller's own does `own`. Blocks until both have ended; a panic of
/// either goes on in the caller.
///
/// # Errors
/// The kernel's word where there is no thread to be had; nothing was done then.
pub(super) fn beside<A: Send, B>(
    name: &str,
    other: impl FnOnce() -> A + Send,
    own: impl FnOnce() -> B,
) -> io::Result<(A, B)> {
    std::thread::scope(|scope| {
        let other = std::thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, other)?;
        let own = own();
        match other.join() {
            Ok(other) => Ok((other, own)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn both_are_done_at_the_same_time() {
        let ((to_own, from_other), (to_other, from_own)) = (mpsc::channel(), mpsc::channel());
        // Each waits for the other one.
        let other = move || to_own.send(1).map(|()| from_own.recv());
        let own = move || to_other.send(2).map(|()| from_other.recv());
        let (other, own) = beside("test", other, own).expect("a thread");
        assert_eq!((other, own), (Ok(Ok(2)), Ok(Ok(1))));
    }

    #[test]
    fn a_panic_of_one_waits_for_the_other() {
        let ended = AtomicBool::new(false);
        let slow = || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            ended.store(true, Ordering::Release);
        };
        let both = std::panic::AssertUnwindSafe(|| beside("test", slow, || panic!("own")).map(|((), ())| ()));
        assert!(std::panic::catch_unwind(both).is_err());
        assert!(ended.load(Ordering::Acquire));
        let both =
            std::panic::AssertUnwindSafe(|| beside("test", || panic!("other"), || ()).map(|((), ())| ()));
        assert!(std::panic::catch_unwind(both).is_err());
    }
}
