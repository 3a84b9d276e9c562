//! Variables in the one place where they decide which image is built on: `FROM`. Pure. What it does not know it refuses,
//! so that nobody else expands it to something that was not told.

use std::collections::BTreeMap;

/// `$NAME`, `${NAME}`, `${NAME:-word}` and `${NAME:+word}`, with quotes taken away.
///
/// # Errors
/// Words for a form that is not known.
pub(super) fn expand(text: &str, variables: &BTreeMap<String, String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['$', '"', '\'', '\\', '`']) {
        out.push_str(&rest[..at]);
        let found = rest.as_bytes()[at];
        rest = &rest[at + 1..];
        match found {
            b'"' => {}
            b'$' => rest = variable(rest, variables, &mut out)?,
            _ => return Err(format!("{text:?} is quoted in a way that is not followed here")),
        }
    }
    out.push_str(rest);
    Ok(out)
}

fn variable<'a>(
    rest: &'a str,
    variables: &BTreeMap<String, String>,
    out: &mut String,
) -> Result<&'a str, String> {
    let length =
        |text: &str| text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    let value = |name: &str| variables.get(name).filter(|value| !value.is_empty());
    let Some(inner) = rest.strip_prefix('{') else {
        let end = length(rest);
        if end == 0 {
            return Err("a lone '$' is not followed here".to_owned());
        }
        out.push_str(value(&rest[..end]).map_or("", String::as_str));
        return Ok(&rest[end..]);
    };
    let end = inner.find('}').ok_or("a '${' is not closed")?;
    let (body, after) = (&inner[..end], &inner[end + 1..]);
    let (name, what) = body.split_at(length(body));
    if name.is_empty() || what.contains('$') {
        return Err(format!("${{{body}}} is not followed here"));
    }
    match (value(name), what.get(..2), what.get(2..)) {
        (found, None, _) if what.is_empty() => out.push_str(found.map_or("", String::as_str)),
        (Some(found), Some(":-"), _) => out.push_str(found),
        (None, Some(":-"), Some(word)) | (Some(_), Some(":+"), Some(word)) => out.push_str(word),
        (None, Some(":+"), _) => {}
        _ => return Err(format!("${{{body}}} is not followed here")),
    }
    Ok(after)
}
