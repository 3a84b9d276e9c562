//! Where a key stands in a TOML text, and which key stands somewhere: the parser tells places for what it cannot read,
//! this tells them for what it could read and a check refused.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

/// Line and column, counted from 1, of a key such as `rule[2].path[0]`: those of the longest beginning that is there.
pub(super) fn place_of(text: &str, key: &str) -> Option<(usize, usize)> {
    let table = DeTable::parse(text).ok()?;
    let mut at = None;
    let mut place = Place::Table(table.get_ref());
    for part in key.split('.') {
        let (name, indices) = part.split_once('[').map_or((part, ""), |(name, rest)| (name, rest));
        let next = match place {
            Place::Table(table) => table.iter().find(|(key, _)| key.get_ref() == name),
            Place::Value(DeValue::Table(table)) => table.iter().find(|(key, _)| key.get_ref() == name),
            Place::Value(_) => None,
        };
        let Some((key, value)) = next else { break };
        at = Some(key.span().start);
        place = Place::Value(value.get_ref());
        for index in indices.split('[').filter_map(|i| i.trim_end_matches(']').parse::<usize>().ok()) {
            let Place::Value(DeValue::Array(list)) = place else { break };
            let Some(item) = list.get(index) else { break };
            at = Some(item.span().start);
            place = Place::Value(item.get_ref());
        }
    }
    at.map(|at| line_and_column(text, at))
}

#[derive(Clone, Copy)]
enum Place<'t, 'i> {
    Table(&'t DeTable<'i>),
    Value(&'t DeValue<'i>),
}

/// The line, and the character in it, of a byte; both counted from 1.
pub(super) fn line_and_column(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at.min(text.len())).unwrap_or(text);
    let line = before.rsplit('\n').next().unwrap_or_default();
    (before.matches('\n').count() + 1, line.chars().count() + 1)
}

/// The innermost key that stands at `span`, or whose value holds all of it; empty for the whole file.
pub(super) fn key_at(text: &str, span: &Range<usize>) -> String {
    key_where(text, &|own| own.start <= span.start && span.end <= own.end)
}

/// The key whose value has just this span; empty for the whole file.
pub(super) fn key_of(text: &str, span: &Range<usize>) -> String {
    key_where(text, &|own| own == span)
}

/// The last key that is asked for by its span or by that of its value: the innermost one.
fn key_where(text: &str, wanted: &Wanted<'_>) -> String {
    let mut found = String::new();
    if let Ok(table) = DeTable::parse(text) {
        in_table(table.get_ref(), "", wanted, &mut found);
    }
    found
}

type Wanted<'a> = dyn Fn(&Range<usize>) -> bool + 'a;

/// How deep tables and lists are looked into.
const DEPTH_MAX: usize = 32;

fn in_table(table: &DeTable<'_>, path: &str, wanted: &Wanted<'_>, found: &mut String) {
    for (key, value) in table {
        let path =
            if path.is_empty() { key.get_ref().to_string() } else { format!("{path}.{}", key.get_ref()) };
        if wanted(&key.span()) {
            found.clone_from(&path);
        }
        in_value(value.get_ref(), &value.span(), path, wanted, found);
    }
}

fn in_value(value: &DeValue<'_>, own: &Range<usize>, path: String, wanted: &Wanted<'_>, found: &mut String) {
    if wanted(own) {
        found.clone_from(&path);
    }
    if path.split(['.', '[']).count() > DEPTH_MAX {
        return;
    }
    match value {
        DeValue::Table(table) => in_table(table, &path, wanted, found),
        DeValue::Array(list) => {
            for (index, item) in list.iter().enumerate() {
                in_value(item.get_ref(), &item.span(), format!("{path}[{index}]"), wanted, found);
            }
        }
        DeValue::String(_)
        | DeValue::Integer(_)
        | DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "a = 1\n[limits]\nx = 2\n\n[[rule]]\ntool = 'A'\n[[rule]]\npath = [\n '/a',\n '/b',\n]\n";

    #[test]
    fn keys_are_found_where_they_stand() {
        for (key, place) in [
            ("a", (1, 1)),
            ("limits.x", (3, 1)),
            ("rule[0].tool", (6, 1)),
            ("rule[1]", (7, 1)),
            ("rule[1].path[1]", (10, 2)),
            ("rule[1].reason", (7, 1)),
            ("limits.missing", (2, 2)),
        ] {
            assert_eq!(place_of(TEXT, key), Some(place), "{key}");
        }
        assert_eq!(place_of(TEXT, "nowhere"), None);
        assert_eq!(place_of("no toml [", "a"), None);
    }

    #[test]
    fn what_stands_somewhere_is_named_by_its_key() {
        for (part, key) in
            [("x =", "limits.x"), ("2\n", "limits.x"), ("'A'", "rule[0].tool"), ("'/b'", "rule[1].path[1]")]
        {
            let at = TEXT.find(part).expect(part);
            assert_eq!(key_at(TEXT, &(at..at + 1)), key, "{part}");
        }
        assert_eq!(key_at(TEXT, &(0..TEXT.len())), "");
        assert_eq!(key_at("no toml [", &(0..1)), "");
    }
}
