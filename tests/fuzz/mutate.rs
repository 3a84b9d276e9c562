//! A small mutator for the bounded run: seeds in, other inputs out, the same for the same number on every machine.
//! Not what finds the last bug (cargo-fuzz does, guided by coverage); what notices that an old one is back.

/// Pieces that parsers of these formats stumble over.
const WORDS: [&[u8]; 52] = [
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"\r\n\r\n",
    b"\n\n",
    b"\r",
    b"\n---\n",
    b"data: ",
    b"data:",
    b":",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b",",
    b"{}",
    b"[]",
    b"null",
    b"true",
    b"-1",
    b"0",
    b"18446744073709551615",
    b"18446744073709551616",
    b"1e309",
    b"1e-400",
    b"4294967296",
    b"\\ud800",
    b"\\u0000",
    b"\xed\xa0\x80",
    b"\xf0\x9f\x8e\x89",
    b"%2e%2e",
    b"%2F",
    b"../",
    b"//",
    b"*",
    b"**",
    b"*,{a,b}",
    b"[[rule]]\n",
    b"\"type\":",
    b"\"usage\":",
    b"\"input\":",
    b"\"model\":\"claude-opus-4-8\"",
    b"\"max_tokens\":1,",
    b"\"origin\":\"agent\"",
    b"message_start",
    b"example.org",
    b"[::1]:443",
    b"0x7f.1",
    b"xn--",
];

/// Longest input; the limits of the formats themselves have tests of their own.
pub(crate) const INPUT_BYTES_MAX: usize = 8 << 10;

/// Numbers by SplitMix64.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`; 0 where that is 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// One of the seeds, changed a few times.
pub(crate) fn input(seeds: &[Vec<u8>], numbers: &mut Numbers) -> Vec<u8> {
    let mut data = seeds[numbers.below(seeds.len())].clone();
    for _ in 0..=numbers.below(5) {
        change(&mut data, seeds, numbers);
    }
    data.truncate(INPUT_BYTES_MAX);
    data
}

fn change(data: &mut Vec<u8>, seeds: &[Vec<u8>], numbers: &mut Numbers) {
    let at = numbers.below(data.len() + 1);
    let end = at + numbers.below((data.len() - at).min(200) + 1);
    let word = WORDS[numbers.below(WORDS.len())];
    match numbers.below(11) {
        0 | 1 if at < data.len() => data[at] ^= 1 << numbers.below(8),
        2 if at < data.len() => data[at] = numbers.below(256) as u8,
        3 => data.truncate(at),
        4 => drop(data.drain(at..end)),
        5 => {
            let piece = data[at..end].to_vec();
            data.splice(at..at, piece);
        }
        6 => {
            let piece = data[at..end].repeat(1 + numbers.below(40));
            data.splice(at..end, piece.into_iter().take(INPUT_BYTES_MAX));
        }
        7 => {
            let other = &seeds[numbers.below(seeds.len())];
            let from = numbers.below(other.len() + 1);
            let to = from + numbers.below(other.len() - from + 1);
            data.splice(at..end, other[from..to].iter().copied());
        }
        // A length, or what stands in its place, grows huge.
        8 if at < data.len() => {
            let number = data[at..].iter().position(u8::is_ascii_digit).map(|skip| at + skip);
            match number {
                Some(number) => drop(data.splice(number..=number, b"99999999999999999999".iter().copied())),
                None => data[at] = 0xff,
            }
        }
        9 => drop(data.splice(at..end, word.repeat(1 + numbers.below(300)))),
        _ => drop(data.splice(at..at, word.iter().copied())),
    }
}
