//! A report of what was spent, as a table for people and as CSV for programs. Pure.

use super::{Paint, Style, Text, escape, one_line, tables, words};
use crate::api::cost::{CostReport, CostRow};

/// What stands for rows without a key.
const NONE: &str = "(none)";

/// `hotcell cost`: rows, their sums and their part of the whole.
pub(crate) fn table(paint: Paint, report: &CostReport) -> Text {
    if report.total.requests == 0 {
        return Text::new(paint).add(Style::Dim, "nothing was spent").end();
    }
    let head = report.label.as_deref().unwrap_or(&report.by).to_uppercase();
    let head = one_line(&escape::neutralise(&head), 40);
    let cells = |key: String, row: &CostRow| {
        let usage = &row.usage;
        let cached = usage.cache_write_5m.saturating_add(usage.cache_write_1h);
        vec![
            key,
            words::dollars(row.cost_usd),
            format!("{:.1}%", row.share * 100.0),
            row.requests.to_string(),
            words::count(usage.input),
            words::count(usage.output),
            words::count(usage.cache_read),
            words::count(cached),
        ]
    };
    let key = |row: &CostRow| {
        let shown = row.user.as_deref().or(row.key.as_deref());
        shown.map_or(NONE.to_owned(), |key| one_line(&escape::neutralise(key), 60))
    };
    let mut rows: Vec<Vec<String>> = report.rows.iter().map(|row| cells(key(row), row)).collect();
    rows.push(cells("total".to_owned(), &report.total));
    let mut heads = [&*head, "COST", "SHARE", "REQUESTS", "INPUT", "OUTPUT", "CACHE READ", "CACHE WRITE"]
        .map(str::to_owned);
    // Figures stand under each other: all columns but the first are filled up from the left.
    for (column, name) in heads.iter_mut().enumerate().skip(1) {
        let width = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(name.len());
        for cell in rows.iter_mut().map(|row| &mut row[column]).chain([name]) {
            *cell = format!("{cell:>width$}");
        }
    }
    let heads = heads.each_ref().map(String::as_str);
    let last = rows.len() - 1;
    let style = |at: usize| if at == last { Style::Bold } else { Style::Plain };
    let rows: Vec<Vec<(Style, String)>> = rows
        .into_iter()
        .enumerate()
        .map(|(at, row)| row.into_iter().map(|cell| (style(at), cell)).collect())
        .collect();
    tables::table(paint, &heads, &rows)
}

/// `hotcell cost --csv`: one line a row, no total; figures without rounding.
pub(crate) fn csv(paint: Paint, report: &CostReport) -> Text {
    let mut text = Text::new(Paint { color: false, ..paint });
    // Names are for people and may be given anew: the id stands beside them.
    let users = report.by == "user";
    let head = format!(
        "{}{},cost_usd,share,requests,input,output,cache_read,cache_write_5m,cache_write_1h,web_searches\r\n",
        field(report.label.as_deref().unwrap_or(&report.by)),
        if users { ",uid" } else { "" }
    );
    text.safe.push_str(&head);
    for row in &report.rows {
        let usage = &row.usage;
        text.safe.push_str(&format!(
            "{}{},{},{:.6},{},{},{},{},{},{},{}\r\n",
            field(row.user.as_deref().or(row.key.as_deref()).unwrap_or("")),
            row.uid.filter(|_| users).map(|uid| format!(",{uid}")).unwrap_or_default(),
            crate::money::MicroUsd(row.cost_micro_usd),
            row.share,
            row.requests,
            usage.input,
            usage.output,
            usage.cache_read,
            usage.cache_write_5m,
            usage.cache_write_1h,
            usage.web_searches
        ));
    }
    text
}

/// A field as RFC 4180 wants it; terminal escapes are made harmless as everywhere.
fn field(text: &str) -> String {
    let text = escape::neutralise(text);
    if text.contains([',', '"', '\r', '\n']) || text.starts_with(' ') || text.ends_with(' ') {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pricing::Usage;

    fn row(key: Option<&str>, cost_micro_usd: u64) -> CostRow {
        CostRow {
            key: key.map(str::to_owned),
            uid: None,
            user: None,
            cost_usd: cost_micro_usd as f64 / 1e6,
            cost_micro_usd,
            share: cost_micro_usd as f64 / 2_000_000.0,
            requests: 3,
            usage: Usage { input: 12_345, output: 7, cache_write_1h: 9, ..Usage::default() },
        }
    }

    fn report(rows: Vec<CostRow>) -> CostReport {
        let total = row(None, rows.iter().map(|row| row.cost_micro_usd).sum());
        CostReport {
            by: "label".into(),
            label: Some("team".into()),
            since: None,
            until: None,
            time_zone: "UTC".into(),
            rows,
            total,
            truncated: false,
        }
    }

    #[test]
    fn figures_stand_under_each_other_and_the_total_is_last() {
        let rows = vec![row(Some("red\u{1b}[31m"), 1_500_000), row(None, 500_000)];
        insta::assert_snapshot!("cost", table(Paint::default(), &report(rows)).as_str());
        let mut empty = report(Vec::new());
        empty.total.requests = 0;
        assert_eq!(table(Paint::default(), &empty).as_str(), "nothing was spent\n");
    }

    #[test]
    fn csv_quotes_what_needs_it_and_ends_its_lines_as_the_rfc_says() {
        let rows = vec![row(Some("a,\"b\""), 1_500_000), row(None, 2)];
        let text = csv(Paint::default(), &report(rows));
        assert_eq!(
            text.as_str(),
            "team,cost_usd,share,requests,input,output,cache_read,cache_write_5m,cache_write_1h,web_searches\r\n\
             \"a,\"\"b\"\"\",1.500000,0.750000,3,12345,7,0,0,9,0\r\n\
             ,0.000002,0.000001,3,12345,7,0,0,9,0\r\n"
        );
    }

    #[test]
    fn users_are_shown_by_name_and_told_by_id_too() {
        let mut rows = vec![row(Some("1001"), 1_500_000), row(Some("4242"), 2)];
        (rows[0].uid, rows[0].user, rows[1].uid) = (Some(1001), Some("ann".into()), Some(4242));
        let mut report = report(rows);
        (report.by, report.label) = ("user".into(), None);
        let text = table(Paint::default(), &report);
        let firsts: Vec<&str> =
            text.as_str().lines().filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(firsts, ["USER", "ann", "4242", "total"]);
        let text = csv(Paint::default(), &report);
        let lines: Vec<&str> = text.as_str().lines().collect();
        assert!(lines[0].starts_with("user,uid,cost_usd,"), "{lines:?}");
        assert!(lines[1].starts_with("ann,1001,1.5") && lines[2].starts_with("4242,4242,0.0"), "{lines:?}");
    }
}
