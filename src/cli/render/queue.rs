//! `hotcell queue` for people. Pure.

use super::tables::table;
use super::{Paint, Style, Text, one_line};
use crate::api::queue::{QueueView, QueuedJob};

/// Slots, counts and the pause, then a line for each job that waits.
pub(crate) fn queue(paint: Paint, queue: &QueueView) -> Text {
    let counts = format!(
        "{} of {} slots taken, {} waiting, {} parked",
        queue.slots.used, queue.slots.total, queue.waiting, queue.parked
    );
    let mut text = Text::new(paint).plain(&counts).end();
    if let Some(paused) = &queue.paused {
        text = text.add(Style::Warn, &one_line(&paused.words(), 200)).end();
    }
    let of_others = (queue.waiting + queue.parked).saturating_sub(queue.jobs.len() as u64);
    if !queue.jobs.is_empty() {
        let rows: Vec<Vec<(Style, String)>> = queue.jobs.iter().map(row).collect();
        text.safe.push_str(table(paint, &["POS", "JOB", "UID", "PRIORITY", "WAITS FOR"], &rows).as_str());
    }
    if of_others > 0 {
        text = text.add(Style::Dim, &format!("{of_others} more that are not shown")).end();
    }
    text
}

fn row(job: &QueuedJob) -> Vec<(Style, String)> {
    let waits = match job.why.as_str() {
        "slots" => "a slot".to_owned(),
        "user_limit" => "its user's limit".to_owned(),
        "credential_limit" => "its credential's limit".to_owned(),
        "policy_limit" => "its policy's limit".to_owned(),
        "memory" => "memory of this machine".to_owned(),
        "disk" => "disk space of this machine".to_owned(),
        "paused" => "`hotcell resume`".to_owned(),
        "draining" => "the next daemon".to_owned(),
        "engine_away" => "the container engine, which does not answer".to_owned(),
        // Why it is parked, or what a newer daemon says.
        other => one_line(other, 40),
    };
    let until =
        job.until.as_ref().map_or_else(String::new, |until| format!(" until {}", one_line(until, 40)));
    let plain = |text: String| (Style::Plain, text);
    vec![
        plain(job.position.map_or("-".to_owned(), |position| position.to_string())),
        plain(job.id.to_string()),
        plain(job.uid.to_string()),
        plain(job.priority.to_string()),
        plain(waits + &until),
    ]
}
