//! Three versions of a text into one. Pure. Never gives a text with conflict marks: where both sides changed the same
//! lines there is no answer.

/// Longest text that is merged, in bytes.
pub(super) const MERGE_BYTES_MAX: u64 = 8 << 20;

/// Why there is no merged text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoMerge {
    #[error("it is no text: nothing but one version or the other can be taken")]
    Binary,
    #[error("both sides changed the same lines")]
    Overlap,
}

/// `ours` with what changed from `base` to `theirs`.
pub(super) fn merge(base: &[u8], ours: &[u8], theirs: &[u8]) -> Result<Vec<u8>, NoMerge> {
    if [base, ours, theirs].iter().any(|text| text.contains(&0)) {
        return Err(NoMerge::Binary);
    }
    diffy::merge_bytes(base, ours, theirs).map_err(|_| NoMerge::Overlap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_of_both_sides_come_together_unless_they_meet() {
        let base = b"one\ntwo\nthree\nfour\nfive\n";
        let ours = b"ONE\ntwo\nthree\nfour\nfive\n";
        let theirs = b"one\ntwo\nthree\nfour\nFIVE";
        assert_eq!(merge(base, ours, theirs), Ok(b"ONE\ntwo\nthree\nfour\nFIVE".to_vec()));
        assert_eq!(merge(base, ours, b"1\ntwo\nthree\nfour\nfive\n"), Err(NoMerge::Overlap));
        assert_eq!(merge(base, ours, ours), Ok(ours.to_vec()));
        assert_eq!(merge(b"a\0", b"b\0", b"a\0"), Err(NoMerge::Binary));
        assert_eq!(merge(b"\xff\nx\ny\n", b"\xfe\nx\ny\n", b"\xff\nx\nz\n"), Ok(b"\xfe\nx\nz\n".to_vec()));
    }
}
