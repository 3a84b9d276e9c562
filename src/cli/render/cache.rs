//! The package cache as a table. Pure.

use super::{Paint, Style, Text, escape, one_line, tables, words};
use crate::api::cache::{CacheRemoved, CacheView};

/// `hotcell cache ls`: each entry where the daemon tells them, then sizes by policy and of all.
pub(crate) fn table(paint: Paint, view: &CacheView, now_ms: u64) -> Text {
    if view.policies.is_empty() && view.entries.is_empty() {
        return Text::new(paint).add(Style::Dim, "nothing is kept").end();
    }
    let plain = |cells: Vec<String>| cells.into_iter().map(|cell| (Style::Plain, cell)).collect::<Vec<_>>();
    let clean = |text: &str, chars_max| one_line(&escape::neutralise(text), chars_max);
    let mut text = Text::new(paint);
    if !view.entries.is_empty() {
        let rows: Vec<_> = view
            .entries
            .iter()
            .map(|entry| {
                let used_ms = tables::parse_ms(&entry.used_at).unwrap_or(now_ms);
                let with = entry.credential.as_deref().map_or_else(String::new, |name| clean(name, 40));
                let (policy, used) = (clean(&entry.policy, 40), words::age(now_ms.saturating_sub(used_ms)));
                plain(vec![policy, words::size(entry.bytes), used, with, clean(&entry.url, 200)])
            })
            .collect();
        let heads = ["POLICY", "SIZE", "USED", "CREDENTIAL", "URL"];
        text.safe.push_str(tables::table(paint, &heads, &rows).as_str());
        text = text.end();
    }
    let rows: Vec<_> = view
        .policies
        .iter()
        .map(|one| plain(vec![clean(&one.policy, 40), one.entries.to_string(), words::size(one.bytes)]))
        .collect();
    text.safe.push_str(tables::table(paint, &["POLICY", "FILES", "SIZE"], &rows).as_str());
    if let Some(whole) = &view.whole {
        let line = format!(
            "{} of {} used; {} answered from it, {} after asking, {} fetched",
            words::size(whole.bytes),
            words::size(whole.bytes_max),
            whole.hits,
            whole.revalidated,
            whole.misses
        );
        text = text.add(Style::Dim, &line).end();
    }
    text
}

/// What `hotcell cache rm` says.
pub(crate) fn removed(removed: &CacheRemoved) -> String {
    format!("{} removed, {}", words::plural(removed.removed, "file"), words::size(removed.bytes))
}
