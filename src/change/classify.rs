//! Which changes a person should look at before they take effect: by path, kind and content. Pure. Names are compared
//! without case, since the tree may go to a machine that does not tell them apart; a rule must rather flag too much
//! than miss what runs by itself.

mod names;
mod secret;

use super::{Flag, Node, TreePath};

pub use names::{BarePart, GitPlace, bare_part, git_place};
pub use secret::{every_secret, secrets};

/// Bytes of a content that are looked at for secrets.
pub const HEAD_BYTES_MAX: usize = 1 << 20;
/// A NUL among so many first bytes makes a content binary (as git has it).
const TEXT_BYTES: usize = 8000;
/// Setuid, setgid, sticky.
const SPECIAL_BITS: u32 = 0o7000;
const EXECUTABLE_BITS: u32 = 0o111;

/// What is known of one change.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// Where.
    pub path: &'a TreePath,
    /// What was there.
    pub before: Option<&'a Node>,
    /// What is there.
    pub after: Option<&'a Node>,
    /// The beginning of the old content, where it is a file and known: a secret that stood there before is no news.
    pub before_head: &'a [u8],
    /// The beginning of the new content, where it is a file.
    pub head: &'a [u8],
    /// Files above this many bytes that are no text are large.
    pub large_bytes: u64,
}

/// All that there is to say about it, in the order of [`Flag::ALL`]. [`Flag::Hidden`] and [`Flag::CaseClash`] are not
/// among it: they depend on more than the change itself.
pub fn flags(facts: &Facts<'_>) -> Vec<Flag> {
    let mut flags = names::flags(facts.path.as_bytes());
    by_kind(facts, &mut flags);
    if let Some(Node::File { bytes, .. }) = facts.after {
        let binary = facts.head.iter().take(TEXT_BYTES).any(|byte| *byte == 0);
        if binary && *bytes > facts.large_bytes {
            flags.push(Flag::LargeBinary);
        }
        if secret::has_news(facts.before_head, facts.head) {
            flags.push(Flag::Secret);
        }
    }
    flags.sort_unstable();
    flags.dedup();
    flags
}

fn by_kind(facts: &Facts<'_>, flags: &mut Vec<Flag>) {
    let mode = |node: Option<&Node>| match node {
        Some(Node::File { mode, .. }) => *mode,
        Some(Node::Dir { .. } | Node::Symlink { .. } | Node::Special { .. }) | None => 0,
    };
    let (was, is) = (mode(facts.before), mode(facts.after));
    if is & SPECIAL_BITS != 0 {
        flags.push(Flag::Special);
    }
    if is & EXECUTABLE_BITS != 0 && was & EXECUTABLE_BITS == 0 {
        flags.push(Flag::Executable);
    }
    match (git_place(facts.path), facts.before, facts.after) {
        (GitPlace::Disguised | GitPlace::Runs, _, _) => flags.push(Flag::Git),
        // A directory that stays one is only entered.
        (GitPlace::Top, Some(Node::Dir { .. }), Some(Node::Dir { .. })) => {}
        (GitPlace::Top, _, _) | (GitPlace::Inside, _, Some(Node::Symlink { .. })) => flags.push(Flag::Git),
        (GitPlace::Inside | GitPlace::Outside, _, _) => {}
    }
    match facts.after {
        Some(Node::Special { .. }) => flags.push(Flag::Special),
        Some(Node::Symlink { target }) => match aim(facts.path, &target.0) {
            Aim::Outside => flags.push(Flag::SymlinkOutside),
            Aim::Git => flags.extend([Flag::SymlinkInside, Flag::Git]),
            Aim::Inside => flags.push(Flag::SymlinkInside),
        },
        Some(Node::File { .. } | Node::Dir { .. }) | None => {}
    }
}

enum Aim {
    Inside,
    Git,
    Outside,
}

/// Where a link leads, by its text alone. A `..` behind a name counts as a way out: the name may be a link itself,
/// and then the two do not cancel.
fn aim(link: &TreePath, target: &[u8]) -> Aim {
    let depth = link.parts().count() - 1;
    if target.is_empty() || target.first() == Some(&b'/') {
        return Aim::Outside;
    }
    let parts = || target.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b"."));
    let ups = parts().take_while(|part| *part == b"..").count();
    if ups > depth || parts().skip(ups).any(|part| part == b"..") {
        return Aim::Outside;
    }
    let above: Vec<&[u8]> = link.parts().take(depth - ups).chain(parts().skip(ups)).collect();
    match TreePath::new(above.join(&b'/')).map(|path| git_place(&path)) {
        Ok(GitPlace::Outside) => Aim::Inside,
        Ok(GitPlace::Top | GitPlace::Inside | GitPlace::Runs | GitPlace::Disguised) => Aim::Git,
        // The workspace itself, or longer than a path can be.
        Err(_) if above.is_empty() => Aim::Inside,
        Err(_) => Aim::Outside,
    }
}

#[cfg(test)]
mod tests;
