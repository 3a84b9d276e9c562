//! Makes text from outside safe for a terminal. Whatever comes in, nothing comes out that a terminal would
//! act upon: no escape sequence, no control character but line feed and tab, no override of the writing
//! direction. Sequences that are complete disappear; a direction override is shown as its code.
//!
//! *Invariant*: safety is decided per character of the output, so no way of cutting the input into chunks can
//! defeat it. The state only serves to drop the rest of a sequence that began in an earlier chunk.

/// Longest sequence that is dropped, in characters. What a longer one holds is shown: an agent must not be
/// able to hide everything that follows behind a sequence it never ends.
const SEQUENCE_CHARS_MAX: u32 = 4096;

/// Where in a sequence the filter stands (after ECMA-48 and the DEC parser that terminals follow).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Text,
    /// After ESC.
    Escape,
    /// After ESC and an intermediate byte, e.g. `ESC ( B`.
    Intermediate,
    /// In a control sequence: `ESC [ … letter`.
    Control,
    /// In a command string: OSC, DCS, APC, PM, SOS; ends with ST, BEL, CAN or SUB.
    String,
}

/// A filter for one stream of text.
#[derive(Debug, Clone)]
pub(crate) struct Neutraliser {
    state: State,
    dropped_chars: u32,
}

impl Default for Neutraliser {
    fn default() -> Self {
        Self { state: State::Text, dropped_chars: 0 }
    }
}

impl Neutraliser {
    /// Appends what is safe of `input` to `out`.
    pub(crate) fn push(&mut self, input: &str, out: &mut String) {
        out.reserve(input.len());
        for c in input.chars() {
            self.step(c, out);
        }
    }

    fn step(&mut self, c: char, out: &mut String) {
        // Whatever the sequence, these end it or begin another one.
        let begins = match c {
            '\u{1b}' => Some(State::Escape),
            '\u{9b}' => Some(State::Control),
            '\u{90}' | '\u{98}' | '\u{9d}' | '\u{9e}' | '\u{9f}' => Some(State::String),
            // A line feed ends everything: the next line must always be seen.
            '\n' | '\u{18}' | '\u{1a}' | '\u{9c}' => Some(State::Text),
            _ => None,
        };
        if let Some(state) = begins {
            self.state = state;
            self.dropped_chars = 0;
            if c == '\n' {
                out.push(c);
            }
            return;
        }
        if self.state != State::Text {
            self.dropped_chars += 1;
            if self.dropped_chars > SEQUENCE_CHARS_MAX {
                self.state = State::Text;
            }
        }
        self.state = match (self.state, c) {
            (State::Text, c) => {
                show(c, out);
                State::Text
            }
            (State::Escape, '[') => State::Control,
            (State::Escape, 'P' | 'X' | ']' | '^' | '_') => State::String,
            (State::Escape | State::Intermediate, ' '..='/') => State::Intermediate,
            (State::Escape | State::Intermediate, '0'..='~') => State::Text,
            (State::Control, ' '..='?') => State::Control,
            (State::Control, '@'..='~') => State::Text,
            (State::String, '\u{7}') => State::Text,
            (State::String, _) => State::String,
            // C0 inside a sequence is executed by terminals without ending it; here it is dropped.
            (state, '\0'..='\u{1f}' | '\u{7f}') => state,
            // Not a sequence after all.
            (State::Escape | State::Intermediate | State::Control, c) => {
                show(c, out);
                State::Text
            }
        };
    }
}

fn show(c: char, out: &mut String) {
    match c {
        '\t' | '\n' => out.push(c),
        '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}' => {}
        c if is_direction(c) => out.push_str(&format!("<U+{:04X}>", c as u32)),
        c => out.push(c),
    }
}

/// Marks, embeddings, overrides and isolates of the writing direction.
fn is_direction(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// True for a character that may not reach a terminal as it is.
fn is_unsafe(c: char) -> bool {
    (c.is_control() && !matches!(c, '\n' | '\t')) || is_direction(c)
}

/// A whole text, made safe.
pub(crate) fn neutralise(text: &str) -> String {
    if text.bytes().all(|b| matches!(b, b' '..=b'~' | b'\n' | b'\t')) {
        return text.to_owned();
    }
    let mut out = String::new();
    Neutraliser::default().push(text, &mut out);
    out
}

/// The same JSON text with every character a terminal would act upon written as `\uXXXX`: the value that a
/// program reads does not change. `json` must be valid JSON, where such characters stand in strings only.
pub(crate) fn json_safe(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            // White space between tokens: control characters in strings are escaped already.
            '\0'..='\u{1f}' => out.push(' '),
            c if is_unsafe(c) => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sequences_disappear_and_their_text_stays() {
        for (input, wanted) in [
            ("plain\ttext\n", "plain\ttext\n"),
            ("\u{1b}[31mred\u{1b}[0m", "red"),
            ("\u{1b}[2J\u{1b}[1;1Htop", "top"),
            ("\u{1b}]0;title\u{7}after", "after"),
            ("\u{1b}]8;;http://evil\u{1b}\\link\u{1b}]8;;\u{1b}\\", "link"),
            ("\u{1b}]52;c;ZXZpbA==\u{7}x", "x"),
            ("\u{1b}P1$r0m\u{1b}\\x", "x"),
            ("\u{1b}_apc\u{9c}x\u{1b}^pm\u{1b}\\y\u{1b}Xsos\u{1b}\\z", "xyz"),
            ("\u{9b}31mred\u{9d}0;t\u{9c}x\u{90}q\u{9c}y", "redxy"),
            ("\u{1b}(Bx\u{1b}cy\u{1b}#8z", "xyz"),
            ("a\rb\u{8}c\u{7}d\u{7f}e\u{85}f\0g", "abcdefg"),
            ("line\r\n", "line\n"),
            ("a\u{202e}b\u{2066}c\u{200f}d", "a<U+202E>b<U+2066>c<U+200F>d"),
            ("\u{1b}", ""),
            ("\u{1b}[31", ""),
            ("\u{1b}\u{1b}[0mx", "x"),
            ("\u{1b}[3\u{8}1mx", "x"),
            ("\u{1b}[3äx", "äx"),
            ("größe 日本 🦀", "größe 日本 🦀"),
        ] {
            assert_eq!(neutralise(input), wanted, "{input:?}");
        }
    }

    #[test]
    fn a_sequence_that_never_ends_hides_neither_the_next_line_nor_everything() {
        assert_eq!(neutralise("\u{1b}]0;hidden\nseen"), "\nseen");
        let long = format!("\u{1b}]0;{}seen", "x".repeat(SEQUENCE_CHARS_MAX as usize));
        assert!(neutralise(&long).ends_with("seen"));
    }

    fn hostile() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            Just("\u{1b}".to_owned()),
            Just("\u{1b}[".to_owned()),
            Just("\u{1b}]8;;".to_owned()),
            Just("\u{9b}".to_owned()),
            Just("\u{7}".to_owned()),
            Just("\u{202e}".to_owned()),
            Just("\u{1b}\\".to_owned()),
            "[ -~\n\t]{0,5}",
            any::<char>().prop_map(String::from),
        ];
        proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn nothing_that_a_terminal_acts_upon_comes_out(text in hostile()) {
            prop_assert!(!neutralise(&text).chars().any(is_unsafe));
        }

        #[test]
        fn where_the_chunks_are_cut_does_not_matter(text in hostile(), cuts in proptest::collection::vec(0usize..200, 0..8)) {
            let chars: Vec<char> = text.chars().collect();
            let mut ends: Vec<usize> = cuts.iter().map(|c| (*c).min(chars.len())).collect();
            ends.push(chars.len());
            ends.sort_unstable();
            let (mut filter, mut out, mut from) = (Neutraliser::default(), String::new(), 0);
            for end in ends {
                filter.push(&chars[from..end].iter().collect::<String>(), &mut out);
                from = end;
            }
            let mut whole = String::new();
            Neutraliser::default().push(&text, &mut whole);
            prop_assert_eq!(out, whole);
        }

        #[test]
        fn plain_text_is_unchanged(text in "[ -~äöü日\n\t]{0,80}") {
            prop_assert_eq!(neutralise(&text), text);
        }

        #[test]
        fn safe_json_means_the_same(text in hostile()) {
            let json = serde_json::to_string(&text).expect("json");
            let safe = json_safe(&json);
            prop_assert!(!safe.chars().any(is_unsafe));
            prop_assert_eq!(serde_json::from_str::<String>(&safe).ok(), Some(text));
        }
    }
}
