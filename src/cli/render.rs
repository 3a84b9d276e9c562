//! The only place that prints. What comes over the socket or from a file reaches a terminal through
//! [`Text`], which makes it safe ([`escape`]); `--raw` lifts that for what the agent itself said.
//! A reader that went away (a closed pipe) ends the command without a word.

pub(crate) mod audit;
pub(crate) mod cache;
pub(crate) mod cost;
pub(crate) mod diff;
pub(crate) mod escape;
pub(crate) mod gc;
pub(crate) mod queue;
pub(crate) mod stream;
pub(crate) mod tables;
pub(crate) mod whoami;
pub(crate) mod words;

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::fail::CliError;
use crate::config::Machine;
use escape::{json_safe, neutralise};

/// Longest tool call, title or similar on one line, in characters.
pub(crate) const LINE_CHARS_MAX: usize = 120;

/// How text is painted.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Paint {
    /// With colours.
    pub(crate) color: bool,
    /// What the agent said goes out as it is.
    pub(crate) raw: bool,
}

/// What a piece of text is; decides its colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Plain,
    Bold,
    Dim,
    Good,
    Bad,
    Warn,
    /// The head of a hunk.
    Hunk,
}

/// Text that is safe to print.
#[derive(Debug, Clone)]
pub(crate) struct Text {
    safe: String,
    paint: Paint,
}

impl Text {
    pub(crate) fn new(paint: Paint) -> Self {
        Self { safe: String::new(), paint }
    }

    /// Adds text, made safe.
    pub(crate) fn add(mut self, style: Style, text: &str) -> Self {
        let code = match style {
            Style::Plain => "",
            Style::Bold => "1",
            Style::Dim => "2",
            Style::Good => "32",
            Style::Bad => "31",
            Style::Warn => "33",
            Style::Hunk => "36",
        };
        let painted = self.paint.color && !code.is_empty() && !text.is_empty();
        if painted {
            self.safe.push_str(&format!("\u{1b}[{code}m"));
        }
        self.safe.push_str(&neutralise(text));
        if painted {
            self.safe.push_str("\u{1b}[0m");
        }
        self
    }

    pub(crate) fn plain(self, text: &str) -> Self {
        self.add(Style::Plain, text)
    }

    /// Adds what an agent said: made safe unless `--raw`.
    pub(crate) fn agent(mut self, text: &str) -> Self {
        if self.paint.raw {
            self.safe.push_str(text);
            return self;
        }
        self.plain(text)
    }

    /// Adds what an agent said in our colour: made safe unless `--raw`.
    pub(crate) fn add_agent(self, style: Style, text: &str) -> Self {
        if self.paint.raw { self.agent(text) } else { self.add(style, text) }
    }

    /// Ends the line.
    pub(crate) fn end(mut self) -> Self {
        self.safe.push('\n');
        self
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.safe
    }
}

/// The first line of `text` with white space collapsed, cut to `chars_max`; how many lines follow is said.
pub(crate) fn one_line(text: &str, chars_max: usize) -> String {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let first = lines.next().unwrap_or("").split_whitespace().collect::<Vec<_>>().join(" ");
    let cut: String = first.chars().take(chars_max).collect();
    let dots = if cut.len() < first.len() { "…" } else { "" };
    match lines.count() {
        0 => format!("{cut}{dots}"),
        more => format!("{cut}{dots} (+{})", words::plural(more as u64, "line")),
    }
}

/// Standard output and standard error, and the status line between them.
pub(crate) struct Out {
    stdout: Box<dyn Write + Send>,
    stderr: Box<dyn Write + Send>,
    /// How standard output is painted.
    pub(crate) paint: Paint,
    error_paint: Paint,
    /// Errors go to standard output as JSON.
    json: bool,
    live: bool,
    /// Standard output is a terminal: a person reads it.
    pub(crate) terminal: bool,
    status: Option<ProgressBar>,
}

impl Out {
    /// The process's own streams.
    pub(crate) fn stdio(machine: &Machine) -> Self {
        let dumb = machine.var("NO_COLOR").is_some() || machine.var("TERM") == Some("dumb");
        let paint = |terminal: bool| Paint { color: terminal && !dumb, raw: false };
        let stderr_live = std::io::stderr().is_terminal();
        Self {
            stdout: Box::new(std::io::BufWriter::with_capacity(1 << 16, std::io::stdout())),
            stderr: Box::new(std::io::stderr()),
            paint: paint(std::io::stdout().is_terminal()),
            terminal: std::io::stdout().is_terminal(),
            error_paint: paint(stderr_live),
            json: false,
            live: stderr_live && machine.var("TERM") != Some("dumb"),
            status: None,
        }
    }

    #[cfg(test)]
    pub(crate) fn to(stdout: Box<dyn Write + Send>, stderr: Box<dyn Write + Send>) -> Self {
        let paint = Paint::default();
        let (json, live, terminal, status) = (false, false, false, None);
        Self { stdout, stderr, paint, error_paint: paint, json, live, terminal, status }
    }

    /// From now on errors are JSON too.
    pub(crate) fn json_errors(&mut self, json: bool) {
        self.json = json;
    }

    /// True where a status line can be shown.
    pub(crate) fn is_live(&self) -> bool {
        self.live && !self.json
    }

    /// True where a person reads standard output.
    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal && !self.json
    }

    /// Writes to standard output; it is on its way when this returns.
    pub(crate) fn print(&mut self, text: &Text) -> Result<(), CliError> {
        let (stdout, status) = (&mut self.stdout, &self.status);
        let mut write = || stdout.write_all(text.safe.as_bytes()).and_then(|()| stdout.flush());
        match status {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
        .map_err(CliError::Output)
    }

    /// One value as a line of JSON.
    pub(crate) fn json<T: Serialize>(&mut self, value: &T) -> Result<(), CliError> {
        let line = serde_json::to_string(value).map_err(|e| CliError::Output(e.into()))?;
        self.json_line(line.as_bytes())?;
        self.flush()
    }

    /// A line of JSON as it came; buffered until [`Out::flush`].
    pub(crate) fn json_line(&mut self, line: &[u8]) -> Result<(), CliError> {
        // Almost every line is plain ASCII: no copy.
        let plain = line.iter().all(|b| matches!(b, b' '..=b'~'));
        let result = if plain {
            self.stdout.write_all(line)
        } else {
            self.stdout.write_all(json_safe(&String::from_utf8_lossy(line)).as_bytes())
        };
        result.and_then(|()| self.stdout.write_all(b"\n")).map_err(CliError::Output)
    }

    /// Bytes that are made for a program (a completion script); as they are.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        self.stdout.write_all(bytes).map_err(CliError::Output)?;
        self.flush()
    }

    /// Sends what is buffered on its way.
    pub(crate) fn flush(&mut self) -> Result<(), CliError> {
        self.stdout.flush().map_err(CliError::Output)
    }

    /// A remark for the person at the terminal, on standard error.
    pub(crate) fn notice(&mut self, text: &str) -> Result<(), CliError> {
        let text = Text::new(self.error_paint).add(Style::Dim, text).end();
        self.write_error(&text)
    }

    fn write_error(&mut self, text: &Text) -> Result<(), CliError> {
        let (stderr, status) = (&mut self.stderr, &self.status);
        let mut write = || stderr.write_all(text.safe.as_bytes()).and_then(|()| stderr.flush());
        match status {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
        .map_err(CliError::Output)
    }

    /// Shows or changes the status line, where there is a terminal for it.
    pub(crate) fn status(&mut self, line: &str) {
        if !self.is_live() {
            return;
        }
        let bar = self.status.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            // The template is ours and constant; the default look is the answer where it would not parse.
            if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
                bar.set_style(style);
            }
            bar
        });
        bar.set_message(neutralise(line));
        bar.tick();
    }

    /// Takes the status line away.
    pub(crate) fn end_status(&mut self) {
        if let Some(bar) = self.status.take() {
            bar.finish_and_clear();
        }
    }

    /// Says what went wrong: three lines for people on standard error, or one line of JSON on standard output
    /// for programs. A closed pipe is not worth a word.
    pub(crate) fn error(&mut self, error: &CliError) {
        self.end_status();
        // There is no one left to tell when these fail.
        if error.is_broken_pipe() {
            return;
        }
        if self.json {
            let _ = self.json(&error.body());
            return;
        }
        let _ = self.flush();
        let mut text = Text::new(self.error_paint)
            .add(Style::Bad, "hotcell:")
            .plain(" ")
            .plain(&error.to_string())
            .end();
        if let Some(blame) = error.blame() {
            text = text.plain("  fault: ").plain(words::blame(blame)).end();
        }
        if let Some(hint) = error.hint() {
            text = text.plain("  hint: ").plain(&hint).end();
        }
        let _ = self.write_error(&text);
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        self.end_status();
    }
}

/// How often the status line moves.
pub(crate) const STATUS_TICK: Duration = Duration::from_millis(125);

/// Prints the help or version that was asked for, or the help that a bare command gets; false where
/// `error` is a mistake in the command line.
pub(crate) fn clap_says(error: &clap::Error) -> bool {
    use clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand as Bare;
    let says = !error.use_stderr() || error.kind() == Bare;
    if says {
        // A closed pipe is no reason to fail.
        let _ = error.print();
    }
    says
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_becomes_one_line() {
        assert_eq!(one_line("cargo   test\n", 20), "cargo test");
        assert_eq!(one_line("\n\ncat <<E\nx\nE\n", 20), "cat <<E (+2 lines)");
        assert_eq!(one_line("äöüäöü", 3), "äöü…");
    }

    #[test]
    fn colours_are_ours_alone() {
        let text = Text::new(Paint { color: true, raw: false }).add(Style::Bad, "a\u{1b}[32mb").end();
        assert_eq!(text.as_str(), "\u{1b}[31mab\u{1b}[0m\n");
        let raw = Text::new(Paint { color: false, raw: true }).agent("a\u{1b}[32mb").plain("\u{1b}[1mc");
        assert_eq!(raw.as_str(), "a\u{1b}[32mbc");
    }
}
