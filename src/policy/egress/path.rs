//! Paths of requests: the canonical form that is compared, forwarded and journaled, and the globs of a policy. It
//! must never give a path that a server could read as another one than the policy did.

/// Longest path, in bytes.
const PATH_BYTES_MAX: usize = 8 << 10;

/// A path with one reading: absolute, without empty and dot parts, escapes decoded where they are for plain
/// characters, and in upper case otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CanonicalPath(String);

impl CanonicalPath {
    /// Reads the path of a request, without its query.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(path: &str) -> Result<Self, &'static str> {
        if path.len() > PATH_BYTES_MAX {
            return Err("the path is too long");
        }
        if !path.starts_with('/') {
            return Err("the path does not begin with '/'");
        }
        let text = decode(path)?;
        // Some servers read an escaped slash as a slash: no reading may have parts that lead elsewhere.
        for reading in [text.clone(), open_slashes(&text)] {
            let last = reading.split('/').count() - 1;
            for (index, part) in reading.split('/').enumerate().skip(1) {
                if part.is_empty() && index != last {
                    return Err("the path has an empty part ('//')");
                }
                // What follows a ';', escaped or not, is a parameter to some servers, and no part of the name.
                // Some take a parameter for a part of its own: none may lead elsewhere either.
                let mut pieces = part.split(';').flat_map(|piece| piece.split("%3B"));
                if pieces.any(|piece| piece == "." || piece == "..") {
                    return Err("the path has a part that is '.' or '..'");
                }
            }
        }
        Ok(Self(text))
    }

    /// The path as it is forwarded.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a glob fits, in every reading of the path.
    pub fn fits(&self, glob: &str) -> bool {
        [self.0.clone(), open_slashes(&self.0)].iter().all(|reading| {
            let (pattern, parts): (Vec<&str>, Vec<&str>) =
                (glob.split('/').collect(), reading.split('/').collect());
            fits(&pattern, &parts)
        })
    }
}

fn open_slashes(text: &str) -> String {
    text.replace("%2F", "/")
}

fn decode(path: &str) -> Result<String, &'static str> {
    let bytes = path.as_bytes();
    let mut text = String::with_capacity(path.len());
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        at += 1;
        match byte {
            b'%' => {
                let pair = bytes.get(at..at + 2).and_then(|pair| std::str::from_utf8(pair).ok());
                let plain = |pair: &&str| pair.bytes().all(|b| b.is_ascii_hexdigit());
                let pair = pair.filter(plain).ok_or("the path has a '%' without two hex digits")?;
                let value = u8::from_str_radix(pair, 16).map_err(|_| "the path has a broken escape")?;
                at += 2;
                match value {
                    0..0x20 | 0x7f | b'\\' => return Err("the path has a control character or a backslash"),
                    b'%' if twice(&bytes[at..]) => return Err("the path is escaped twice"),
                    b'-' | b'.' | b'_' | b'~' => text.push(char::from(value)),
                    _ if value.is_ascii_alphanumeric() => text.push(char::from(value)),
                    _ => text.push_str(&format!("%{value:02X}")),
                }
            }
            0..=0x20 | 0x7f | b'\\' | b'#' | b'?' => return Err("the path has a character that no path has"),
            0x80.. => return Err("the path has a character outside ASCII"),
            _ => text.push(char::from(byte)),
        }
    }
    Ok(text)
}

/// Whether what follows an escaped '%' would be an escape of something that changes the path.
fn twice(rest: &[u8]) -> bool {
    let pair = rest.get(..2).unwrap_or_default().to_ascii_lowercase();
    matches!(&pair[..], b"2e" | b"2f" | b"5c" | b"00" | b"25")
}

/// `**` as a part stands for any number of parts, `*` for any text within one.
fn fits(pattern: &[&str], parts: &[&str]) -> bool {
    // reached[n]: what was read of the pattern so far fits the first n parts.
    let mut reached = vec![false; parts.len() + 1];
    reached[0] = true;
    for glob in pattern {
        let mut next = vec![false; parts.len() + 1];
        for n in 0..=parts.len() {
            next[n] = match *glob {
                "**" => reached[n] || (n > 0 && next[n - 1]),
                _ => n > 0 && reached[n - 1] && fits_part(glob, parts[n - 1]),
            };
        }
        reached = next;
    }
    reached[parts.len()]
}

fn fits_part(glob: &str, part: &str) -> bool {
    let mut pieces = glob.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = part.strip_prefix(first) else { return false };
    let mut pieces: Vec<&str> = pieces.collect();
    let Some(last) = pieces.pop() else { return rest.is_empty() };
    for piece in pieces {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// What is wrong with a glob of a policy.
pub(super) fn check_glob(glob: &str) -> Result<(), &'static str> {
    if glob.len() > PATH_BYTES_MAX {
        return Err("is longer than any path that passes");
    }
    if !glob.starts_with('/') {
        return Err("must begin with '/'");
    }
    let mixed = |part: &str| part != "**" && part.contains("**");
    if glob.split('/').any(mixed) {
        return Err("has '**' beside other text: it stands alone between slashes");
    }
    match CanonicalPath::parse(glob) {
        Ok(path) if path.as_str() == glob => Ok(()),
        Ok(_) => Err("has escapes that no request keeps; write the plain characters"),
        Err(why) => Err(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tricks_are_refused() {
        for path in [
            "",
            "a",
            "*",
            "//",
            "/a//b",
            "/a/../b",
            "/a/./b",
            "/..",
            "/a/..;/b",
            "/a/..%3b/b",
            "/a/.;x/b",
            "/;../",
            "/a;../b",
            "/a%3B./b",
            "/%2e%2e/b",
            "/.%2E/",
            "/a/%2e%2e%2fb",
            "/a%2f..%2fb",
            "/a%2F%2Fb",
            "/a%5c..",
            "/a\\b",
            "/a%00",
            "/a%0d%0ab",
            "/a b",
            "/a\tb",
            "/%252e%252e/",
            "/%25252f",
            "/%2",
            "/%zz",
            "/%+1",
            "/é",
            "/a#b",
            "/a?b",
            "/a\u{7f}",
        ] {
            assert!(CanonicalPath::parse(path).is_err(), "{path:?}");
        }
        assert!(CanonicalPath::parse(&"/a".repeat(5000)).is_err());
    }

    #[test]
    fn a_path_has_one_form() {
        for (path, canonical) in [
            ("/", "/"),
            ("/a/", "/a/"),
            ("/%61%2D%7e", "/a-~"),
            ("/@babel%2fcore", "/@babel%2Fcore"),
            ("/a;v=1/b", "/a;v=1/b"),
            ("/a%20b%c3%a9", "/a%20b%C3%A9"),
            ("/100%25", "/100%25"),
        ] {
            assert_eq!(CanonicalPath::parse(path).expect(path).as_str(), canonical);
        }
    }

    #[test]
    fn globs_fit_whole_parts() {
        let fits = |glob: &str, path: &str| CanonicalPath::parse(path).expect(path).fits(glob);
        assert!(fits("/simple/**", "/simple/a/b"));
        assert!(fits("/simple/**", "/simple/") && fits("/simple/**", "/simple"));
        assert!(fits("/**", "/") && fits("/**/x", "/x") && fits("/**/x", "/a/b/x"));
        assert!(fits("/a/*.whl", "/a/b.whl") && !fits("/a/*.whl", "/a/b/c.whl"));
        assert!(fits("/*/*", "/a/b") && !fits("/*/*", "/a"));
        assert!(!fits("/simple/**", "/simplex/a") && !fits("/simple", "/simple/"));
        // An escaped slash must fit as one, too.
        assert!(fits("/@babel/*", "/@babel/core") && !fits("/*", "/a%2fb") && fits("/**", "/a%2fb"));
        assert!(check_glob("/a/**/b*").is_ok());
        for bad in ["a", "", "/a**", "/a/../b", "/%61", "//"] {
            assert!(check_glob(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn the_canonical_path_is_its_own(path in "/[a-zA-Z0-9/.;%~@-]{0,30}") {
            if let Ok(once) = CanonicalPath::parse(&path) {
                prop_assert_eq!(CanonicalPath::parse(once.as_str()), Ok(once.clone()));
                let dots = once.as_str().split(['/', ';']).any(|part| part == "..");
                prop_assert!(!dots, "{:?}", once);
            }
        }

        #[test]
        fn no_path_below_leaves_its_directory(path in "(/|%2f|%2e|\\.|a|;|%25){0,12}") {
            if let Ok(path) = CanonicalPath::parse(&format!("/pub/{path}")) {
                prop_assert!(path.fits("/pub/**"));
                prop_assert!(!path.fits("/secret/**"));
            }
        }
    }
}
