//! Where a text may become longer before it is cut into tokens than its bytes in the request. A tokenizer that falls
//! back to bytes makes at most one token of each byte that it is given; but it may be given other bytes: letters taken
//! apart (Unicode's normal forms), JSON written anew (with spaces, escapes, and numbers in full), parameters with names
//! around them. What is added here must never be less than that. Pure; nothing is decoded or copied.

use std::sync::LazyLock;

use memchr::memmem;

/// Letters and signs that are longer once they are taken apart (NFKD, of which NFKC and NFC are never longer):
/// from, to, and by how many bytes at the most. Hangul, which every form puts together again, is not among them.
const LONGER_APART: &[(u32, u32, u64)] = &[
    (0xA8, 0x17E, 3),
    (0x1A0, 0x1B0, 1),
    (0x1C4, 0x233, 3),
    (0x2D8, 0x2DD, 1),
    (0x344, 0x344, 2),
    (0x37A, 0x390, 4),
    (0x3AA, 0x3B0, 4),
    (0x3CA, 0x3D4, 2),
    (0x400, 0x419, 2),
    (0x439, 0x439, 2),
    (0x450, 0x45E, 2),
    (0x476, 0x477, 2),
    (0x4C1, 0x4F9, 2),
    (0x587, 0x587, 2),
    (0x622, 0x626, 2),
    (0x675, 0x678, 2),
    (0x6C0, 0x6D3, 2),
    (0x929, 0xC48, 3),
    (0xCC0, 0xE33, 6),
    (0xEB3, 0xEDD, 3),
    (0xF43, 0xFB9, 6),
    (0x1026, 0x1026, 3),
    (0x1B06, 0x1B43, 3),
    (0x1E08, 0x1FFC, 5),
    (0x2033, 0x2037, 6),
    (0x2057, 0x2057, 9),
    (0x2150, 0x22ED, 6),
    (0x247D, 0x2487, 1),
    (0x2A0C, 0x2ADC, 9),
    (0x304C, 0x30FF, 3),
    (0x3200, 0x33FE, 15),
    (0xFA6C, 0xFAD7, 1),
    (0xFB13, 0xFDF9, 5),
    (0xFDFA, 0xFDFA, 30),
    (0xFDFB, 0xFDFC, 12),
    (0xFE71, 0xFEFC, 3),
    (0x105C9, 0x1D1C0, 8),
    (0x1F12A, 0x1F248, 5),
];
/// Bytes of one unit of UTF-16 as an escape.
const ESCAPE_BYTES: u64 = 6;
/// Most bytes that a number with an exponent has more once it is written in full: `1e20`, or `1e15` as a fraction.
const NUMBER_BYTES: u64 = 24;
/// So many bytes are counted in one byte.
const COUNTED_BYTES: usize = 255;
/// Tokens around one parameter of a tool's call, as the model is shown it.
const PARAMETER_TOKENS: u64 = 24;

/// By how many bytes a letter may be longer, taken apart.
fn apart(letter: char) -> u64 {
    let code = u32::from(letter);
    let at = LONGER_APART.partition_point(|(_, to, _)| *to < code);
    LONGER_APART.get(at).filter(|(from, ..)| *from <= code).map_or(0, |(.., longer)| *longer)
}

/// What an escape of four hexadecimal digits may be longer once it is read and taken apart.
fn escaped(digits: &[u8]) -> u64 {
    let code = std::str::from_utf8(digits).ok().and_then(|digits| u32::from_str_radix(digits, 16).ok());
    let letter = code.and_then(char::from_u32);
    letter.map_or(0, |letter| (letter.len_utf8() as u64 + apart(letter)).saturating_sub(ESCAPE_BYTES))
}

/// The letters of a text that are not ASCII. Most of a text is, and is passed over many bytes at a time.
fn letters(text: &str) -> impl Iterator<Item = char> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let at = plain_bytes(rest.as_bytes());
        let mut letters = rest.get(at..)?.chars();
        let letter = letters.next();
        rest = letters.as_str();
        letter
    })
}

/// How many bytes of ASCII a text begins with.
fn plain_bytes(bytes: &[u8]) -> usize {
    /// So many are looked at together.
    const STEP: usize = 64;
    let (steps, _) = bytes.as_chunks::<STEP>();
    let whole = steps.iter().take_while(|step| step.is_ascii()).count();
    let from = whole * STEP;
    let rest = bytes.get(from..).unwrap_or_default();
    from + rest.iter().position(|byte| *byte >= 0x80).unwrap_or(rest.len())
}

/// What the escapes of a text may be longer; no escape of one unit is but by being taken apart.
fn of_escapes(raw: &str) -> u64 {
    static UNIT: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(r"\u"));
    let bytes = raw.as_bytes();
    let longer = |at: usize| {
        let before = bytes.get(..at).unwrap_or_default();
        let backslashes = before.iter().rev().take_while(|byte| **byte == b'\\').count();
        // An escaped backslash begins no escape.
        let digits = bytes.get(at + 2..at + 6).filter(|_| backslashes % 2 == 0);
        digits.map_or(0, escaped)
    };
    UNIT.find_iter(bytes).map(longer).sum()
}

/// What a text may be longer than its bytes, as it stands in JSON or decoded.
pub(super) fn of_text(raw: &str) -> u64 {
    letters(raw).map(apart).sum::<u64>() + of_escapes(raw)
}

/// What a JSON value may be longer than its bytes: as its texts may be, and when it is written anew. Signs in its texts
/// are taken for structure, too: to know which are none takes ten times as long, and adds one or two of a hundred bytes.
pub(super) fn of_json(raw: &str) -> u64 {
    let mut more = of_escapes(raw);
    for letter in letters(raw) {
        more += ESCAPE_BYTES * letter.len_utf16() as u64 - letter.len_utf8() as u64 + apart(letter);
    }
    let bytes = raw.as_bytes();
    let behind = bytes.get(1..).unwrap_or_default();
    more += bytes.chunks(COUNTED_BYTES).map(separators).sum::<u64>();
    let pairs = bytes.chunks(COUNTED_BYTES).zip(behind.chunks(COUNTED_BYTES));
    more + pairs.map(|(before, bytes)| exponents(before, bytes) * NUMBER_BYTES).sum::<u64>()
}

/// Commas and colons in at most [`COUNTED_BYTES`]. Here and below without a branch and counted in a byte, so that many
/// are looked at together.
fn separators(bytes: &[u8]) -> u64 {
    let mut count = 0_u8;
    for byte in bytes {
        count = count.wrapping_add(u8::from(*byte == b',') | u8::from(*byte == b':'));
    }
    count.into()
}

/// Exponents of numbers in at most [`COUNTED_BYTES`]; `before` is what stands before each.
fn exponents(before: &[u8], bytes: &[u8]) -> u64 {
    let mut count = 0_u8;
    for (before, byte) in before.iter().zip(bytes) {
        count = count.wrapping_add(u8::from(before.wrapping_sub(b'0') < 10) & u8::from(*byte | 0x20 == b'e'));
    }
    count.into()
}

/// The same of the input of a tool's call with so many parameters.
pub(super) fn of_call(raw: &str, parameters: u64) -> u64 {
    of_json(raw).saturating_add(parameters.saturating_mul(PARAMETER_TOKENS))
}

#[cfg(test)]
mod tests {
    use icu_normalizer::DecomposingNormalizerBorrowed;

    use super::*;

    #[test]
    fn no_letter_taken_apart_is_longer_than_is_allowed_for() {
        let forms = DecomposingNormalizerBorrowed::new_nfkd();
        for letter in (0..=u32::from(char::MAX)).filter_map(char::from_u32) {
            if ('\u{AC00}'..='\u{D7A3}').contains(&letter) {
                continue;
            }
            let long =
                forms.normalize_iter(std::iter::once(letter)).map(char::len_utf8).sum::<usize>() as u64;
            let own = letter.len_utf8() as u64;
            assert!(long <= own + apart(letter), "{:x}: {long}", u32::from(letter));
            if letter.is_ascii() || ('\u{3400}'..='\u{9FFF}').contains(&letter) {
                assert_eq!(apart(letter), 0);
            }
            if own <= 3 {
                let escape = format!("{:04x}", u32::from(letter));
                assert!(long <= ESCAPE_BYTES + escaped(escape.as_bytes()), "{escape}");
            } else {
                assert!(long <= 2 * ESCAPE_BYTES, "{:x}: {long}", u32::from(letter));
            }
        }
        assert!(LONGER_APART.windows(2).all(|pair| pair[0].1 < pair[1].0), "in order");
    }

    #[test]
    fn json_written_anew_is_no_longer_than_is_allowed_for() {
        for (raw, anew) in [
            (r#"{"a":1e15}"#, r#"{"a": 1000000000000000.0}"#),
            (r#"{"a":[1E20,2e-5]}"#, r#"{"a": [100000000000000000000, 2e-05]}"#),
            (r#"{"é":"漢😀"}"#, r#"{"\u00e9": "\u6f22\ud83d\ude00"}"#),
            (r#"{"a":{"b":[1,2,3]},"c":"d"}"#, r#"{"a": {"b": [1, 2, 3]}, "c": "d"}"#),
        ] {
            assert!(raw.len() as u64 + of_json(raw) >= anew.len() as u64, "{raw}");
        }
        // What stands in a text counts too, never less.
        assert_eq!(of_json(r#""a, b: 1e9 \" 2e8, \\""#), 3 + 2 * NUMBER_BYTES);
        assert_eq!(of_json(r#""never ended \"#), 0);
    }

    #[test]
    fn nothing_is_missed_where_one_step_ends_and_the_next_begins() {
        for before in 0..2 * COUNTED_BYTES {
            let space = " ".repeat(before);
            assert_eq!(of_json(&format!("{space}1E9")), NUMBER_BYTES, "{before}");
            assert_eq!(of_json(&format!("{space}e,")), 1, "{before}");
            assert_eq!(of_json(&format!("{space}:é")), 8, "{before}");
            assert_eq!(of_text(&format!("{space}é{space}\u{fdfa}{space}\\ufdfa")), 3 + 30 + 27, "{before}");
        }
        let full = ",".repeat(10 * COUNTED_BYTES);
        assert_eq!(of_json(&full), full.len() as u64);
    }

    #[test]
    fn an_escape_counts_as_what_it_stands_for() {
        assert_eq!(of_text(r"a\ufdfab\n"), 27);
        assert_eq!(of_text(r"a\\ufdfab"), 0, "an escaped backslash");
        assert_eq!(of_text(r"\u00e9\ud83d\ude00\u12"), 0);
        assert_eq!(of_text("\u{FDFA}e"), 30);
    }
}
