//! Where a key stands in a TOML text: the parser tells lines for what it cannot read, this tells them for what it
//! could read and a check refused.

use toml::de::{DeTable, DeValue};

/// The line, counted from 1, of a key such as `rule[2].path[0]`: that of the longest beginning that is there.
pub(super) fn line_of(text: &str, key: &str) -> Option<usize> {
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
    at.map(|at| text[..at.min(text.len())].matches('\n').count() + 1)
}

#[derive(Clone, Copy)]
enum Place<'t, 'i> {
    Table(&'t DeTable<'i>),
    Value(&'t DeValue<'i>),
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "a = 1\n[limits]\nx = 2\n\n[[rule]]\ntool = 'A'\n[[rule]]\npath = [\n '/a',\n '/b',\n]\n";

    #[test]
    fn keys_are_found_where_they_stand() {
        for (key, line) in [
            ("a", 1),
            ("limits.x", 3),
            ("rule[0].tool", 6),
            ("rule[1]", 7),
            ("rule[1].path[1]", 10),
            ("rule[1].reason", 7),
            ("limits.missing", 2),
        ] {
            assert_eq!(line_of(TEXT, key), Some(line), "{key}");
        }
        assert_eq!(line_of(TEXT, "nowhere"), None);
        assert_eq!(line_of("no toml [", "a"), None);
    }
}
