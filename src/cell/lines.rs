//! Cuts the cell's stdout into lines. Knows offsets, so that a byte is acknowledged only when the line it
//! belongs to is whole; a line over the limit is dropped, and never kept in memory.

/// Longest line of the CLI, in bytes. Longer than any seen (a 2 MB paste echoed), shorter than the cell's
/// buffer, so that a line always fits into what may stay unacknowledged.
pub(super) const LINE_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Cuts a byte stream into lines and keeps the last, unfinished one.
#[derive(Debug)]
pub(crate) struct Lines {
    /// Offset after the last whole line.
    end: u64,
    part: Vec<u8>,
    skipping: bool,
}

/// What a feed has done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Whole {
    /// Offset after the last whole line: what may be acknowledged.
    pub end: u64,
    /// A line was over the limit and was dropped.
    pub too_long: bool,
}

impl Lines {
    pub(crate) fn new(end: u64) -> Self {
        Self { end, part: Vec::new(), skipping: false }
    }

    /// Takes the unfinished last line, with the offset after it.
    pub(crate) fn rest(&mut self) -> (u64, Vec<u8>) {
        let part = std::mem::take(&mut self.part);
        self.end += part.len() as u64;
        (self.end, part)
    }

    /// Takes the bytes that end at offset `end` of the stream.
    pub(crate) fn feed<E>(
        &mut self,
        end: u64,
        bytes: &[u8],
        mut line: impl FnMut(&[u8], u64) -> Result<(), E>,
    ) -> Result<Whole, E> {
        let start = end - bytes.len() as u64;
        let mut rest = bytes;
        let mut too_long = false;
        while let Some(at) = memchr::memchr(b'\n', rest) {
            let (head, tail) = (&rest[..at], &rest[at + 1..]);
            self.end = start + (bytes.len() - tail.len()) as u64;
            if std::mem::take(&mut self.skipping) {
                self.part.clear();
            } else if self.part.is_empty() {
                line(head, self.end)?;
            } else {
                self.part.extend_from_slice(head);
                let whole = std::mem::take(&mut self.part);
                line(&whole, self.end)?;
            }
            rest = tail;
        }
        if self.part.len() + rest.len() > LINE_BYTES_MAX {
            too_long = !self.skipping;
            self.skipping = true;
            self.part = Vec::new();
        } else if !self.skipping {
            self.part.extend_from_slice(rest);
        }
        let ack = if self.skipping { end } else { self.end };
        Ok(Whole { end: ack, too_long })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_cut_gives_the_same_lines(text in "[a-c\n]{0,60}", cuts in proptest::collection::vec(1usize..9, 0..40)) {
            let bytes = text.as_bytes();
            let mut lines = Lines::new(100);
            let mut seen = Vec::new();
            let mut at = 0;
            let mut cuts = cuts.into_iter();
            while at < bytes.len() {
                let next = (at + cuts.next().unwrap_or(bytes.len())).min(bytes.len());
                let whole = lines.feed(100 + next as u64, &bytes[at..next], |line, end| {
                    seen.push((String::from_utf8_lossy(line).into_owned(), end));
                    Ok::<(), ()>(())
                });
                let done = bytes[..next].iter().rposition(|b| *b == b'\n').map_or(0, |p| p + 1);
                prop_assert_eq!(whole, Ok(Whole { end: 100 + done as u64, too_long: false }));
                at = next;
            }
            let mut expected = Vec::new();
            let mut end = 100;
            for part in text.split_inclusive('\n').filter(|p| p.ends_with('\n')) {
                end += part.len() as u64;
                expected.push((part.trim_end_matches('\n').to_owned(), end));
            }
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn an_endless_line_is_dropped_and_acknowledged() {
        let mut lines = Lines::new(0);
        let chunk = vec![b'x'; LINE_BYTES_MAX];
        let mut none = |_: &[u8], _: u64| Ok::<(), ()>(());
        let length = chunk.len() as u64;
        assert_eq!(lines.feed(length, &chunk, &mut none), Ok(Whole { end: 0, too_long: false }));
        assert_eq!(lines.feed(length + 1, b"x", &mut none), Ok(Whole { end: length + 1, too_long: true }));
        assert_eq!(lines.feed(length + 2, b"x", &mut none), Ok(Whole { end: length + 2, too_long: false }));
        let mut seen = Vec::new();
        let after = lines.feed(length + 6, b"x\nab\n"[1..].as_ref(), |l, _| {
            seen.push(l.to_vec());
            Ok::<(), ()>(())
        });
        assert_eq!(after, Ok(Whole { end: length + 6, too_long: false }));
        assert_eq!(seen, [b"ab".to_vec()]);
    }
}
