//! A model's id as one segment of a path. Pure. Only one spelling of each id is taken, so that what was judged is
//! what goes upstream.

/// The id in a segment: letters, digits and `-._@:` as they are, and `%3A` and `%2F`, which is how clients write the
/// colon and the slash of an ARN. Anything else is no id.
pub(super) fn decoded(segment: &str) -> Option<String> {
    const BYTES_MAX: usize = 512;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._@:".contains(&byte);
    // A slash can only come from `%2F`: the segment was cut at the plain ones.
    let id = segment.replace("%3A", ":").replace("%2F", "/");
    let part = |part: &str| !matches!(part, "" | "." | "..") && part.bytes().all(plain);
    (!segment.contains('/') && id.len() <= BYTES_MAX && id.split('/').all(part)).then_some(id)
}

/// The segment of an id: what is not a letter, a digit or one of `-._~@` is percent-encoded.
pub(super) fn encoded(id: &str) -> String {
    let mut out = String::with_capacity(id.len() + 8);
    for byte in id.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~@".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_spelling_of_an_id_is_taken() {
        for (segment, id) in [
            ("us.anthropic.claude-x-v1:0", "us.anthropic.claude-x-v1:0"),
            ("us.anthropic.claude-x-v1%3A0", "us.anthropic.claude-x-v1:0"),
            ("arn%3Aaws%3Abedrock%3Aa%3A1%3Ap%2Fq", "arn:aws:bedrock:a:1:p/q"),
            ("claude-x@20260101", "claude-x@20260101"),
        ] {
            assert_eq!(decoded(segment).as_deref(), Some(id));
            assert_eq!(decoded(&encoded(id)).as_deref(), Some(id));
        }
        let long = "a".repeat(513);
        for bad in [
            "",
            "..",
            ".",
            "a%3a0",
            "%2e%2e",
            "a%2F..%2Fb",
            "%2Fa",
            "a%2F",
            "a b",
            "a%00",
            "a%",
            "a/b",
            "\u{e9}",
            "a;b",
            &long,
        ] {
            assert_eq!(decoded(bad), None, "{bad}");
        }
    }
}
