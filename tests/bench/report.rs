//! What was measured, as a table for people and as JSON for programs. It decides whether a bar is met and
//! must never round before it does.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// Samples of one thing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    pub(crate) fn n(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn median(&self) -> f64 {
        self.percentile(50)
    }

    /// By the nearest rank; the median of an even number is the mean of the middle two.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let n = self.0.len();
        if n == 0 {
            return f64::NAN;
        }
        if percent == 50 && n.is_multiple_of(2) {
            return f64::midpoint(self.0[n / 2 - 1], self.0[n / 2]);
        }
        self.0[(n * percent).div_ceil(100).clamp(1, n) - 1]
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut all: Vec<f64> = values.into_iter().collect();
        all.sort_by(f64::total_cmp);
        Self(all)
    }
}

/// What a measurement has to reach.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bar {
    RatioAtMost(f64),
    RatioAtLeast(f64),
    ValueAtMost(f64),
    ValueAtLeast(f64),
}

/// One line of the report.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    p90: Option<f64>,
    n: usize,
    baseline: Option<(&'static str, f64)>,
    bar: Option<Bar>,
}

impl Row {
    /// A single figure.
    pub(crate) fn one(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), value, unit, p90: None, n: 1, baseline: None, bar: None }
    }

    /// The median of samples.
    pub(crate) fn median(name: impl Into<String>, samples: &Samples, unit: &'static str) -> Self {
        let p90 = Some(samples.percentile(90));
        Self { p90, n: samples.n(), ..Self::one(name, samples.median(), unit) }
    }

    pub(crate) fn against(mut self, what: &'static str, baseline: &Samples) -> Self {
        self.baseline = Some((what, baseline.median()));
        self
    }

    pub(crate) fn bar(mut self, bar: Bar) -> Self {
        self.bar = Some(bar);
        self
    }

    fn ratio(&self) -> Option<f64> {
        self.baseline.map(|(_, baseline)| self.value / baseline)
    }

    /// Whether the bar is met; none where there is no bar.
    pub(crate) fn pass(&self) -> Option<bool> {
        self.bar.map(|bar| match bar {
            Bar::RatioAtMost(most) => self.ratio().is_some_and(|ratio| ratio <= most),
            Bar::RatioAtLeast(least) => self.ratio().is_some_and(|ratio| ratio >= least),
            Bar::ValueAtMost(most) => self.value <= most,
            Bar::ValueAtLeast(least) => self.value >= least,
        })
    }

    fn bar_text(&self) -> Option<String> {
        self.bar.map(|bar| match bar {
            Bar::RatioAtMost(most) => format!("ratio ≤ {most}"),
            Bar::RatioAtLeast(least) => format!("ratio ≥ {least}"),
            Bar::ValueAtMost(most) => format!("≤ {} {}", figure(most), self.unit),
            Bar::ValueAtLeast(least) => format!("≥ {} {}", figure(least), self.unit),
        })
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name, "value": self.value, "unit": self.unit, "p90": self.p90, "n": self.n,
            "against": self.baseline.map(|(what, _)| what), "baseline": self.baseline.map(|(_, value)| value),
            "ratio": self.ratio(), "bar": self.bar_text(), "pass": self.pass(),
        })
    }
}

/// All rows, as `target/bench.json` has them.
pub(crate) fn json(rows: &[Row]) -> Value {
    Value::Array(rows.iter().map(Row::json).collect())
}

/// A Markdown table, aligned so that it reads well as plain text too.
pub(crate) fn table(rows: &[Row]) -> String {
    let header = ["what", "median", "p90", "unit", "n", "against", "baseline", "ratio", "bar", ""];
    let mut cells: Vec<[String; 10]> = vec![header.map(str::to_owned)];
    for row in rows {
        let or_empty = |value: Option<f64>| value.map(figure).unwrap_or_default();
        let mark = match row.pass() {
            None => "",
            Some(true) => "PASS",
            Some(false) => "FAIL",
        };
        cells.push([
            row.name.clone(),
            figure(row.value),
            or_empty(row.p90),
            row.unit.to_owned(),
            row.n.to_string(),
            row.baseline.map_or_else(String::new, |(what, _)| what.to_owned()),
            or_empty(row.baseline.map(|(_, value)| value)),
            row.ratio().map(ratio_text).unwrap_or_default(),
            row.bar_text().unwrap_or_default(),
            mark.to_owned(),
        ]);
    }
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut out = String::new();
    for (index, row) in cells.iter().enumerate() {
        let numeric = |column: usize| matches!(column, 1 | 2 | 4 | 6 | 7);
        for (column, text) in row.iter().enumerate() {
            let width = widths[column];
            // Writing to a String cannot fail.
            let _ = match numeric(column) {
                true => write!(out, "| {text:>width$} "),
                false => write!(out, "| {text:<width$} "),
            };
        }
        out.push_str("|\n");
        if index == 0 {
            for (column, width) in widths.iter().enumerate() {
                let dashes = "-".repeat(*width + usize::from(!numeric(column)));
                let _ = write!(out, "|-{dashes}{}", if numeric(column) { ":" } else { "" });
            }
            out.push_str("|\n");
        }
    }
    out
}

fn ratio_text(ratio: f64) -> String {
    if ratio < 0.1 { format!("{ratio:.4}") } else { format!("{ratio:.2}") }
}

/// Three digits that matter, or all of a large whole number.
fn figure(value: f64) -> String {
    match value.abs() {
        v if !v.is_finite() => "–".to_owned(),
        v if v >= 1000.0 => {
            let digits = format!("{value:.0}");
            let groups: Vec<&str> =
                digits.as_bytes().rchunks(3).rev().map(|g| std::str::from_utf8(g).unwrap_or("")).collect();
            groups.join(" ")
        }
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
