//! What goes as a table. Pure.

use super::{Paint, Style, Text, escape, one_line, tables, words};
use crate::api::gc::{GcView, Gone};

/// `hotcell gc`: each thing with its reason.
pub(crate) fn table(paint: Paint, view: &GcView) -> Text {
    if view.removals.is_empty() {
        return Text::new(paint);
    }
    let row = |gone: &Gone| {
        let clean = |text: &str, chars_max| one_line(&escape::neutralise(text), chars_max);
        let mut note =
            if gone.undecided { "nobody decided on its changes".to_owned() } else { String::new() };
        if let Some(why) = &gone.left {
            note = format!("left: {}", clean(why, 200));
        }
        let uid = gone.uid.map_or_else(String::new, |uid| uid.to_string());
        let size = words::size(gone.bytes);
        let cells = [clean(&gone.kind, 20), clean(&gone.name, 80), uid, clean(&gone.reason, 20), size, note];
        cells.map(|cell| (Style::Plain, cell)).to_vec()
    };
    let rows: Vec<_> = view.removals.iter().map(row).collect();
    tables::table(paint, &["KIND", "NAME", "UID", "REASON", "SIZE", ""], &rows)
}

/// The last line.
pub(crate) fn summary(view: &GcView) -> String {
    let gone = view.removals.iter().filter(|gone| gone.left.is_none()).count() as u64;
    let more = if view.more && view.dry_run { "; there are more, which are not shown" } else { "" };
    let done = if view.dry_run { "would go" } else { "removed" };
    let jumped = if view.clock_jumped {
        "; the clock has jumped: until it has gone evenly for a day, nothing goes because it is old"
    } else {
        ""
    };
    format!("{} {done}, {}{more}{jumped}", words::plural(gone, "thing"), words::size(view.bytes))
}
