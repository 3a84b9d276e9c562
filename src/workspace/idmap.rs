//! Id maps for a staged workspace: the submitter's ids appear as the cell's, every other id as a
//! private one that nobody has. Never maps two ids onto one, and never maps anything onto a host user.

use std::fmt::Write as _;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags};

/// Where the ids of cells come from. Above what user databases hand out, below the private range.
pub const CELL_IDS: Range<u32> = 0x6000_0000..0x7000_0000;

/// Host ids below this appear in the cell as `PRIVATE_BASE + id`; ids above it have no map (they appear
/// as 65534 and cannot be changed), except the submitter's own.
const HOST_IDS_END: u32 = 0x0fff_ffff;
const PRIVATE_BASE: u32 = 0x7000_0000;

/// Two lines per special id must fit in the one page that the kernel takes.
pub(super) const SPECIALS_MAX: usize = 48;

/// Ids that cannot be mapped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Outside of `CELL_IDS`.
    #[error("cell id {0} is outside of the private range of cells: take it from CELL_IDS")]
    CellId(u32),
    /// One id used for two things.
    #[error("id {0} is given twice: every id of a cell must be its own")]
    Twice(u32),
    /// More special ids than fit.
    #[error("{0} ids to map, at most 48 fit: pass fewer groups")]
    TooMany(usize),
}

/// A line of `/proc/<pid>/uid_map`: `inside` is the id on disk, `outside` the id that the cell sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MapLine {
    inside: u32,
    outside: u32,
    count: u32,
}

/// The text of a map in which each `(host id, cell id)` is special and all other host ids are private.
pub(super) fn map_text(specials: &[(u32, u32)]) -> Result<String, MapError> {
    let mut text = String::new();
    for line in map_lines(specials)? {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {} {}", line.inside, line.outside, line.count);
    }
    Ok(text)
}

fn map_lines(specials: &[(u32, u32)]) -> Result<Vec<MapLine>, MapError> {
    if specials.len() > SPECIALS_MAX {
        return Err(MapError::TooMany(specials.len()));
    }
    let mut sorted = specials.to_vec();
    sorted.sort_unstable();
    let mut cell_ids: Vec<u32> = specials.iter().map(|s| s.1).collect();
    cell_ids.sort_unstable();
    if let Some(bad) = cell_ids.iter().find(|id| !CELL_IDS.contains(id)) {
        return Err(MapError::CellId(*bad));
    }
    let same = |pair: &[u32]| pair[0] == pair[1];
    if let Some(pair) = cell_ids.windows(2).find(|w| same(w)) {
        return Err(MapError::Twice(pair[0]));
    }
    if let Some(pair) = sorted.windows(2).find(|w| w[0].0 == w[1].0) {
        return Err(MapError::Twice(pair[0].0));
    }
    let mut lines = Vec::with_capacity(2 * sorted.len() + 1);
    let mut next = 0; // first host id not yet in a line
    for (host, cell) in sorted {
        private_line(&mut lines, next, host.min(HOST_IDS_END));
        lines.push(MapLine { inside: host, outside: cell, count: 1 });
        next = host.saturating_add(1);
    }
    private_line(&mut lines, next, HOST_IDS_END);
    Ok(lines)
}

fn private_line(lines: &mut Vec<MapLine>, start: u32, end: u32) {
    if start < end {
        lines.push(MapLine { inside: start, outside: PRIVATE_BASE + start, count: end - start });
    }
}

/// A user namespace with these maps, for `MOUNT_ATTR_IDMAP`. Its only process is gone when this returns.
///
/// # Errors
/// The kernel's word, e.g. ENOSPC where user namespaces are switched off.
pub(super) fn user_namespace(uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    let holder = Holder::start()?;
    let proc_dir = format!("/proc/{}", holder.pid);
    std::fs::write(format!("{proc_dir}/uid_map"), uid_map)?;
    std::fs::write(format!("{proc_dir}/gid_map"), gid_map)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, format!("{proc_dir}/ns/user"), flags, Mode::empty())?)
}

const STACK_BYTES: usize = 16 * 1024;

/// A child that only waits to be killed: it holds the new namespace open while its maps are written.
struct Holder {
    pid: libc::pid_t,
    // The child runs on this: it must outlive the child, so it is freed after the wait in `drop`.
    _stack: Vec<u8>,
}

impl Holder {
    fn start() -> io::Result<Self> {
        let mut stack = vec![0_u8; STACK_BYTES];
        let top = stack.as_mut_ptr_range().end.map_addr(|a| a & !15);
        // SAFETY: the signal sets are live locals, set by sigfillset and pthread_sigmask before use.
        // `clone` starts `wait_for_kill` on its own stack, which stays allocated until the child is
        // reaped. The child shares our memory (no page tables to copy) but touches none of it: all
        // signals are blocked before it starts, so no handler of ours runs in it, and it makes system
        // calls only. Exit signal 0: nobody else's SIGCHLD handling sees it.
        let pid = unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            let parent = libc::getpid() as usize as *mut libc::c_void;
            let flags = libc::CLONE_NEWUSER | libc::CLONE_VM;
            let pid = libc::clone(wait_for_kill, top.cast(), flags, parent);
            let error = io::Error::last_os_error();
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
            if pid < 0 {
                return Err(error);
            }
            pid
        };
        Ok(Self { pid, _stack: stack })
    }
}

impl Drop for Holder {
    /// Ends and reaps the child. In `Drop` because it must happen on every path out of
    /// `user_namespace`, before the stack is freed; it waits only for a process that got SIGKILL.
    fn drop(&mut self) {
        // SAFETY: `pid` is our own unreaped child, so the number cannot mean another process.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            while libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL) < 0
                && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
            {}
        }
    }
}

extern "C" fn wait_for_kill(parent: *mut libc::c_void) -> libc::c_int {
    // SAFETY: plain system calls, no memory of ours is touched. If the parent is gone before the
    // death signal is set, the parent id has changed and the child ends by itself.
    unsafe {
        libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        if libc::syscall(libc::SYS_getppid) as usize != parent as usize {
            libc::syscall(libc::SYS_exit, 0);
        }
        loop {
            // All signals are blocked, so this returns never; SIGKILL ends the process.
            libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn overlap(a: (u32, u32), b: (u32, u32)) -> bool {
        u64::from(a.0) < u64::from(b.0) + u64::from(b.1) && u64::from(b.0) < u64::from(a.0) + u64::from(a.1)
    }

    fn specials() -> impl Strategy<Value = Vec<(u32, u32)>> {
        // Adjacent, boundary and far ids all happen.
        let host =
            prop_oneof![0_u32..8, 990_u32..1010, HOST_IDS_END - 3..HOST_IDS_END + 3, 0_u32..u32::MAX - 1];
        let cell = prop_oneof![
            CELL_IDS.start..CELL_IDS.start + 64,
            CELL_IDS.end - 64..CELL_IDS.end,
            CELL_IDS.start..CELL_IDS.end
        ];
        (prop::collection::btree_set(host, 1..SPECIALS_MAX), prop::collection::hash_set(cell, SPECIALS_MAX))
            .prop_map(|(hosts, cells)| hosts.into_iter().zip(cells).collect())
    }

    proptest! {
        #[test]
        fn maps_are_disjoint_total_and_keep_to_their_ranges(specials in specials()) {
            let lines = map_lines(&specials).expect("valid input");
            for (i, a) in lines.iter().enumerate() {
                prop_assert!(a.count > 0);
                for b in &lines[i + 1..] {
                    prop_assert!(!overlap((a.inside, a.count), (b.inside, b.count)), "{a:?} {b:?}");
                    prop_assert!(!overlap((a.outside, a.count), (b.outside, b.count)), "{a:?} {b:?}");
                }
                let is_special = specials.contains(&(a.inside, a.outside)) && a.count == 1;
                let is_private = a.outside >= PRIVATE_BASE && a.outside - PRIVATE_BASE == a.inside;
                prop_assert!(is_special || is_private, "{a:?}");
                prop_assert!(!is_private || !overlap((a.outside, a.count), (CELL_IDS.start, CELL_IDS.len() as u32)));
            }
            for special in &specials {
                let line = MapLine { inside: special.0, outside: special.1, count: 1 };
                prop_assert!(lines.contains(&line));
            }
            let covered: u64 = lines.iter().filter(|l| l.inside < HOST_IDS_END).map(|l| u64::from(l.count)).sum();
            prop_assert_eq!(covered, u64::from(HOST_IDS_END));
            prop_assert!(map_text(&specials).expect("valid input").len() < 4096);
            prop_assert!(lines.len() <= 340);
        }
    }

    #[test]
    fn the_usual_map_reads_as_expected() {
        let text = map_text(&[(1000, 0x6000_0001)]).expect("valid");
        assert_eq!(text, "0 1879048192 1000\n1000 1610612737 1\n1001 1879049193 268434454\n");
        let root = map_text(&[(0, 0x6000_0001)]).expect("valid");
        assert_eq!(root, "0 1610612737 1\n1 1879048193 268435454\n");
    }

    #[test]
    fn ids_of_people_and_doubled_ids_are_refused() {
        assert_eq!(map_lines(&[(1000, 1000)]), Err(MapError::CellId(1000)));
        assert_eq!(map_lines(&[(1000, 0)]), Err(MapError::CellId(0)));
        assert_eq!(map_lines(&[(1000, 0x7000_0000)]), Err(MapError::CellId(0x7000_0000)));
        assert_eq!(map_lines(&[(1, 0x6000_0000), (2, 0x6000_0000)]), Err(MapError::Twice(0x6000_0000)));
        assert_eq!(map_lines(&[(1, 0x6000_0000), (1, 0x6000_0001)]), Err(MapError::Twice(1)));
        let many: Vec<_> = (0..49).map(|i| (i, 0x6000_0000 + i)).collect();
        assert_eq!(map_lines(&many), Err(MapError::TooMany(49)));
    }
}
