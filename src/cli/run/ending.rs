//! How `hotcell run` ends when its job left a change set: its figures, and on a terminal the question what is to
//! become of it. Nothing is applied that nobody asked for; without an answer everything is kept.

use std::io::{BufRead, IsTerminal, Write};

use crate::api::wire::JobView;
use crate::change::Summary;
use crate::change::decision::{ApplyRequest, Form};
use crate::cli::Context;
use crate::cli::client::Client;
use crate::cli::diff;
use crate::cli::fail::CliError;
use crate::cli::render::{Style, Text, diff as rendered};

/// Most answers that make no sense before everything is kept.
const QUESTIONS_MAX: u32 = 5;

/// What is to become of a change set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// Apply what needs no further word.
    Apply,
    /// Ask, where somebody can answer.
    Ask,
}

/// What a person answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Apply,
    Show,
    Keep,
    Discard,
}

/// Shows what the job changed and does what is wished.
pub(super) async fn end(
    client: &Client,
    job: &JobView,
    wish: Wish,
    json: bool,
    context: &mut Context,
) -> Result<(), CliError> {
    if !json && !job.totals.quarantined.is_empty() {
        context.out.print(&rendered::quarantined(context.out.paint, &job.totals.quarantined))?;
    }
    let Some(summary) = job.totals.changes.as_ref().filter(|s| s.entries > 0 || s.commits > 0) else {
        return Ok(());
    };
    if json {
        return match wish {
            Wish::Apply => apply(client, job, true, context).await,
            Wish::Ask => Ok(()),
        };
    }
    diff::show(client, &job.id, Form::Stat, &[], false, context).await?;
    match wish {
        Wish::Apply => apply(client, job, false, context).await,
        // Nobody's files are where a job worked that fetched its repository: it is kept until a clone is named.
        Wish::Ask if job.source.is_none() && context.out.is_terminal() && std::io::stdin().is_terminal() => {
            ask(client, job, summary, context).await
        }
        Wish::Ask => hints(job, context),
    }
}

async fn apply(client: &Client, job: &JobView, json: bool, context: &mut Context) -> Result<(), CliError> {
    let answer = client.apply(&job.id, &ApplyRequest::default()).await?;
    if json {
        return context.out.json(&serde_json::json!({ "applied": answer }));
    }
    context.out.print(&rendered::applied(context.out.paint, &answer))
}

async fn ask(
    client: &Client,
    job: &JobView,
    summary: &Summary,
    context: &mut Context,
) -> Result<(), CliError> {
    for _ in 0..QUESTIONS_MAX {
        let words = format!("{}. [a]pply, [s]how, [k]eep for later, [d]iscard? ", rendered::summary(summary));
        context.out.print(&Text::new(context.out.paint).add(Style::Bold, &words))?;
        match read_answer(&mut std::io::stdin().lock()) {
            Some(Answer::Apply) => return apply(client, job, false, context).await,
            Some(Answer::Show) => {
                diff::show(client, &job.id, Form::Patch, &[], true, context).await?;
            }
            Some(Answer::Discard) => {
                client.discard(&job.id).await?;
                return context.out.print(&Text::new(context.out.paint).plain("discarded").end());
            }
            Some(Answer::Keep) => break,
            None => {}
        }
    }
    hints(job, context)
}

/// None where the answer makes no sense; the end of the input keeps everything.
fn read_answer(input: &mut dyn BufRead) -> Option<Answer> {
    let _ = std::io::stdout().flush();
    let mut line = String::new();
    match input.read_line(&mut line) {
        Ok(0) | Err(_) => return Some(Answer::Keep),
        Ok(_) => {}
    }
    match line.trim().to_ascii_lowercase().as_str() {
        "a" | "apply" => Some(Answer::Apply),
        "s" | "show" => Some(Answer::Show),
        "d" | "discard" => Some(Answer::Discard),
        "k" | "keep" | "q" => Some(Answer::Keep),
        _ => None,
    }
}

fn hints(job: &JobView, context: &mut Context) -> Result<(), CliError> {
    let id = &job.id;
    let to = if job.source.is_some() { " --to DIR [--branch NAME]" } else { "" };
    let words = format!(
        "kept: `hotcell diff {id}` shows it, `hotcell apply {id}{to}` applies it, `hotcell discard {id}` says that nobody wants it"
    );
    context.out.print(&Text::new(context.out.paint).add(Style::Dim, &words).end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_word_applies_and_silence_keeps() {
        let answer = |text: &str| read_answer(&mut text.as_bytes());
        for (text, wanted) in [
            ("a\n", Some(Answer::Apply)),
            ("Apply\n", Some(Answer::Apply)),
            (" s \n", Some(Answer::Show)),
            ("d\n", Some(Answer::Discard)),
            ("k\n", Some(Answer::Keep)),
            ("", Some(Answer::Keep)),
            ("\n", None),
            ("yes\n", None),
        ] {
            assert_eq!(answer(text), wanted, "{text:?}");
        }
    }
}
