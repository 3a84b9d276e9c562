//! Other ways to read a text: what stands in it once its escapes are resolved, or its line breaks are gone, with the
//! way back to the text itself. Pure. A secret is looked for in each of them.

use std::ops::Range;

/// How often escapes within escapes are resolved: a program's JSON in a tool's JSON in a frame of the CLI.
const DEPTH_MAX: usize = 3;

/// A reading of a text.
pub(super) struct View {
    /// What is read.
    pub(super) bytes: Vec<u8>,
    /// For each byte the place in the text that it was read from; none where they are the same.
    places: Option<Vec<Range<usize>>>,
}

impl View {
    /// The place in the text of a place in the view.
    pub(super) fn place(&self, of: &Range<usize>) -> Range<usize> {
        match &self.places {
            Some(places) if !of.is_empty() => places[of.start].start..places[of.end - 1].end,
            Some(_) | None => of.clone(),
        }
    }

    /// The view in which `step` has read each thing: what a place holds and how many bytes it takes. None where
    /// nothing is read in another way.
    fn read(
        &self,
        step: impl Fn(&[u8]) -> Option<(Vec<u8>, usize)>,
        begins: impl Fn(u8) -> bool,
    ) -> Option<Self> {
        if !self.bytes.iter().any(|byte| begins(*byte)) {
            return None;
        }
        let (mut bytes, mut places) =
            (Vec::with_capacity(self.bytes.len()), Vec::with_capacity(self.bytes.len()));
        let (mut at, mut other) = (0, false);
        while at < self.bytes.len() {
            let read = if begins(self.bytes[at]) { step(&self.bytes[at..]) } else { None };
            other |= read.is_some();
            let (what, length) = read.unwrap_or_else(|| (vec![self.bytes[at]], 1));
            places.extend(std::iter::repeat_n(self.place(&(at..at + length)), what.len()));
            bytes.extend_from_slice(&what);
            at += length;
        }
        other.then_some(Self { bytes, places: Some(places) })
    }

    /// Without white space.
    pub(super) fn squeezed(&self) -> Option<Self> {
        self.read(|_| Some((Vec::new(), 1)), |byte| byte.is_ascii_whitespace())
    }
}

/// A text as it is and with its escapes of JSON and of URLs resolved, in each order.
pub(super) fn views(text: &[u8]) -> Vec<View> {
    let mut all = vec![View { bytes: text.to_owned(), places: None }];
    let mut from = 0;
    for _ in 0..DEPTH_MAX {
        let until = all.len();
        for n in from..until {
            let unescaped = all[n].read(json_escape, |byte| byte == b'\\');
            let decoded = all[n].read(percent, |byte| byte == b'%');
            all.extend([unescaped, decoded].into_iter().flatten());
        }
        from = until;
    }
    all
}

fn percent(text: &[u8]) -> Option<(Vec<u8>, usize)> {
    Some((vec![hex(text.get(1..3)?)? as u8], 3))
}

fn json_escape(text: &[u8]) -> Option<(Vec<u8>, usize)> {
    let one = |byte| Some((vec![byte], 2));
    match text.get(1)? {
        b'n' => one(b'\n'),
        b'r' => one(b'\r'),
        b't' => one(b'\t'),
        b'b' => one(8),
        b'f' => one(12),
        plain @ (b'"' | b'\\' | b'/') => one(*plain),
        b'u' => {
            let c = char::from_u32(hex(text.get(2..6)?)?)?;
            Some((c.to_string().into_bytes(), 6))
        }
        _ => None,
    }
}

fn hex(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |sum, digit| Some(sum * 16 + char::from(*digit).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<String> {
        views(text.as_bytes())
            .into_iter()
            .map(|view| String::from_utf8_lossy(&view.bytes).into_owned())
            .collect()
    }

    #[test]
    fn escapes_within_escapes_are_read_and_the_way_back_is_known() {
        assert_eq!(texts("plain % text"), ["plain % text"]);
        assert!(texts(r"a\u002db\/c").contains(&"a-b/c".to_owned()));
        assert!(texts(r"a\\u002db").contains(&"a-b".to_owned()));
        assert!(texts("a%2Db%252d").contains(&"a-b-".to_owned()));
        assert!(texts(r"a%5Cu002db").contains(&"a-b".to_owned()));
        let text = r"xx sk\u002dab yy";
        let view = views(text.as_bytes())
            .into_iter()
            .find(|view| view.bytes.starts_with(b"xx sk-ab"))
            .expect("view");
        assert_eq!(&text[view.place(&(3..8))], r"sk\u002dab");
        let squeezed = views(b"s k\n-ab")[0].squeezed().expect("view");
        assert_eq!((&squeezed.bytes[..], squeezed.place(&(0..3))), (&b"sk-ab"[..], 0..5));
    }

    #[test]
    fn what_is_no_escape_stays() {
        assert_eq!(texts(r"C:\x and 100% and %zz and \u12"), [r"C:\x and 100% and %zz and \u12"]);
        assert_eq!(texts("\\"), ["\\"]);
    }
}
