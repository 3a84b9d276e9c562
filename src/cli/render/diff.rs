//! Change sets for people: a patch and its figures in the colours of git, and what a person has to decide about.
//! Pure. Every line is the agent's or made of the agent's names: all of it is made safe.

use super::{Paint, Style, Text, words};
use crate::change::decision::{ApplyAnswer, CheckoutAnswer, LeftOut};
use crate::change::{ChangeSet, Entry, Quarantined, Summary, Verdict};

/// Most entries that are named one by one.
const NAMED_MAX: usize = 40;

/// A patch.
pub(crate) fn patch(paint: Paint, patch: &str) -> Text {
    let mut text = Text::new(paint);
    let mut in_hunk = false;
    for line in patch.split_inclusive('\n') {
        let (line, ended) = line.strip_suffix('\n').map_or((line, false), |line| (line, true));
        let style = match line.as_bytes().first() {
            _ if line.starts_with("diff --git ") => {
                in_hunk = false;
                Style::Bold
            }
            _ if line.starts_with("@@ ") => {
                in_hunk = true;
                Style::Hunk
            }
            Some(b'+') if in_hunk => Style::Good,
            Some(b'-') if in_hunk => Style::Bad,
            Some(_) if !in_hunk => Style::Bold,
            Some(_) | None => Style::Plain,
        };
        text = text.add_agent(style, line);
        if ended {
            text = text.end();
        }
    }
    text
}

/// The figures per file: `path | 3 ++-`.
pub(crate) fn stat(paint: Paint, stat: &str) -> Text {
    let mut text = Text::new(paint);
    for line in stat.lines() {
        // The bars stand behind the last `|`; a name may hold one too.
        let (name, bars) = line.rsplit_once('|').map_or((line, ""), |(name, bars)| (name, bars));
        text = text.plain(name);
        if !bars.is_empty() {
            text = text.plain("|");
            for part in bars.split_inclusive(['+', '-']) {
                let style = match part.as_bytes().last() {
                    Some(b'+') => Style::Good,
                    Some(b'-') => Style::Bad,
                    Some(_) | None => Style::Plain,
                };
                text = text.add(style, part);
            }
        }
        text = text.end();
    }
    text
}

/// Adds what is not applied without a word, and what is never applied.
pub(crate) fn marked(mut text: Text, set: &ChangeSet) -> Text {
    for (verdict, style, head) in [
        (Verdict::Flagged, Style::Warn, "needs a word of yours (--include-flagged):"),
        (Verdict::Refused, Style::Bad, "never applied:"),
    ] {
        let entries: Vec<&Entry> = set.entries.iter().filter(|entry| entry.verdict == verdict).collect();
        if entries.is_empty() {
            continue;
        }
        text = text.add(style, head).end();
        for entry in entries.iter().take(NAMED_MAX) {
            let flags: Vec<String> = entry.flags.iter().map(|flag| flag.as_str().to_owned()).collect();
            text = text.plain(&format!("  {}", shown(&entry.path.to_string())));
            text = text.add(Style::Dim, &format!("  {}", flags.join(", "))).end();
        }
        text = more(text, entries.len());
    }
    if set.ignored.count > 0 {
        let what = words::plural(set.ignored.count, "change");
        let kept = if set.ignored.kept { "kept" } else { "not kept" };
        text = text.add(Style::Dim, &format!("{what} to what git ignores: {kept}")).end();
    }
    if let Some(commits) = &set.commits {
        text = text.plain(&format!("{} by the agent", words::plural(commits.count, "commit"))).end();
    }
    for note in &set.notes {
        text = text.add(Style::Dim, &format!("note: {note}")).end();
    }
    text
}

/// What an agent left in a person's own directory, and is set aside.
pub(crate) fn quarantined(paint: Paint, all: &[Quarantined]) -> Text {
    let mut text = Text::new(paint);
    text = text
        .add(Style::Warn, "appeared during the job, would be obeyed on this host, and is set aside:")
        .end();
    for one in all.iter().take(NAMED_MAX) {
        text = text.plain(&format!("  {}", shown(&one.path.to_string())));
        text = match (&one.moved_to, &one.why) {
            (Some(name), _) => text.add(Style::Dim, &format!("  is now {}", shown(&name.to_string()))).end(),
            (None, Some(why)) => text.add(Style::Bad, &format!("  is still there: {}", shown(why))).end(),
            (None, None) => text.add(Style::Bad, "  is still there").end(),
        };
    }
    more(text, all.len())
}

/// One line of figures.
pub(crate) fn summary(summary: &Summary) -> String {
    let counts = [
        (summary.added, "added"),
        (summary.modified, "modified"),
        (summary.deleted, "deleted"),
        (summary.flagged, "flagged"),
        (summary.refused, "refused"),
    ];
    let parts: Vec<String> =
        counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
    match (parts.is_empty(), summary.commits) {
        (true, 0) => "no changes".to_owned(),
        (true, commits) => words::plural(commits, "commit"),
        (false, 0) => parts.join(", "),
        (false, commits) => format!("{}, {}", parts.join(", "), words::plural(commits, "commit")),
    }
}

/// What an apply did, or would do.
pub(crate) fn applied(paint: Paint, answer: &ApplyAnswer) -> Text {
    let n = answer.applied.len() as u64;
    let verb = if answer.checked { "can be applied" } else { "applied" };
    let mut text = Text::new(paint);
    text = match (&answer.branch, n) {
        (Some(branch), _) => {
            text.add(Style::Good, &format!("branch {} is at {}", shown(&branch.name), branch.commit)).end()
        }
        (None, 0) if !answer.already.is_empty() => text.add(Style::Good, "already applied").end(),
        (None, 0) => text.add(Style::Warn, "nothing to apply").end(),
        (None, n) => text.add(Style::Good, &format!("{} {verb}", words::plural(n, "change"))).end(),
    };
    text = left_out(text, &answer.left_out);
    for note in answer.branch.iter().flat_map(|branch| &branch.notes).chain(&answer.notes) {
        text = text.add(Style::Dim, &format!("note: {note}")).end();
    }
    if !answer.merged.is_empty() {
        let n = words::plural(answer.merged.len() as u64, "file");
        text = text.plain(&format!("{n} merged with what was changed meanwhile")).end();
    }
    for dir in answer.kept_dirs.iter().take(NAMED_MAX) {
        let words =
            format!("{} stays: there is something in it that the job never saw", shown(&dir.to_string()));
        text = text.add(Style::Dim, &words).end();
    }
    more(text, answer.kept_dirs.len())
}

/// What a checkout wrote.
pub(crate) fn checked_out(paint: Paint, answer: &CheckoutAnswer) -> Text {
    let (copied, changed) = (words::plural(answer.copied, "path"), words::plural(answer.changed, "change"));
    let text = Text::new(paint).add(Style::Good, &format!("{copied} copied, {changed} of the job's written"));
    left_out(text.end(), &answer.left_out)
}

fn left_out(mut text: Text, left: &[LeftOut]) -> Text {
    if left.is_empty() {
        return text;
    }
    text = text.add(Style::Warn, "left out:").end();
    for LeftOut { path, why } in left.iter().take(NAMED_MAX) {
        text = text.plain(&format!("  {}", shown(&path.to_string())));
        text = text.add(Style::Dim, &format!("  {why}")).end();
    }
    more(text, left.len())
}

fn more(text: Text, all: usize) -> Text {
    if all <= NAMED_MAX { text } else { text.plain(&format!("  … and {} more", all - NAMED_MAX)).end() }
}

/// A name on one line, whatever is in it.
fn shown(name: &str) -> String {
    if name.contains(char::is_control) { format!("{name:?}") } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLOR: Paint = Paint { color: true, raw: false };

    #[test]
    fn what_is_set_aside_is_named_with_its_new_name_or_the_reason() {
        let path = |name: &str| crate::change::TreePath::new(name).expect("a path");
        let all = [
            Quarantined { path: path("a/.git"), moved_to: Some(path("a/.git.q")), why: None },
            Quarantined { path: path("b\u{1b}"), moved_to: None, why: Some("it is held".to_owned()) },
        ];
        let text = quarantined(Paint { color: false, raw: false }, &all);
        let lines: Vec<&str> = text.as_str().lines().skip(1).collect();
        assert_eq!(lines, ["  a/.git  is now a/.git.q", "  \"b\\u{1b}\"  is still there: it is held"]);
    }

    #[test]
    fn a_patch_has_the_colours_of_git_and_none_of_the_agents() {
        let text = patch(
            COLOR,
            "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-old\u{1b}[2J\n+new\n same\ndiff --git a/y b/y\n+++ b/y\n",
        );
        let lines: Vec<&str> = text.as_str().lines().collect();
        assert_eq!(lines[4], "\u{1b}[31m-old\u{1b}[0m");
        assert_eq!(lines[5], "\u{1b}[32m+new\u{1b}[0m");
        assert_eq!(lines[6], " same");
        // The names of a file are no added and removed lines.
        assert_eq!(lines[2], "\u{1b}[1m+++ b/x\u{1b}[0m");
        assert_eq!(lines[8], "\u{1b}[1m+++ b/y\u{1b}[0m");
    }

    #[test]
    fn without_colour_a_patch_is_what_it_was() {
        let plain = "diff --git a/x b/x\n@@ -1 +1 @@\n-a\n+b\n\\ No newline at end of file";
        assert_eq!(patch(Paint::default(), plain).as_str(), plain);
    }

    #[test]
    fn figures_are_one_line() {
        let full =
            Summary { entries: 4, added: 1, modified: 2, deleted: 1, flagged: 1, ..Summary::default() };
        assert_eq!(summary(&full), "1 added, 2 modified, 1 deleted, 1 flagged");
        assert_eq!(summary(&Summary::default()), "no changes");
        assert_eq!(summary(&Summary { commits: 2, ..Summary::default() }), "2 commits");
    }
}
