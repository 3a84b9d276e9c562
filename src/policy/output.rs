//! What comes out of a job beside its events: a policy's `[output]`. Facts only: who reads the report out of the
//! cell is `workspace`, and what it finds there is the agent's, never to be trusted.

use std::path::{Component, Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::agent::options::HOME;

/// Longest report that a policy can ask for, in bytes.
pub const REPORT_BYTES_CEILING: u64 = 16 * 1024 * 1024;
/// Longest final answer that is kept of any job, in bytes.
pub const RESULT_BYTES_CEILING: u64 = 1024 * 1024;
/// Longest path of a report, in bytes.
const PATH_BYTES_MAX: usize = 512;
/// The other place beside HOME where a report can be.
const TMP: &str = "/tmp";

/// What comes out of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// A file that is kept when the job ends, by its absolute path in the cell, below /home/agent or /tmp. The
    /// agent is told of it.
    #[serde(default)]
    pub report: Option<PathBuf>,
    /// Longest report, in bytes; a longer one is cut.
    #[serde(default = "mebibyte")]
    pub report_bytes_max: u64,
    /// Longest final answer of the agent, in bytes; a longer one is cut.
    #[serde(default = "mebibyte")]
    pub result_bytes_max: u64,
}

impl Default for Output {
    fn default() -> Self {
        Self { report: None, report_bytes_max: mebibyte(), result_bytes_max: mebibyte() }
    }
}

/// The two writable places of a cell that are not its workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// HOME of the agent.
    Home,
    /// /tmp.
    Tmp,
}

fn mebibyte() -> u64 {
    1024 * 1024
}

impl Output {
    /// Where the report is to be: the place, and the path below it.
    pub fn report_place(&self) -> Option<(Place, &Path)> {
        let report = self.report.as_deref()?;
        let below = |dir, place| report.strip_prefix(dir).ok().map(|path| (place, path));
        below(HOME, Place::Home).or_else(|| below(TMP, Place::Tmp))
    }

    /// The final answer as it is kept: cut to its limit, with a mark that says so.
    pub fn bounded_result(&self, mut text: String) -> String {
        let limit = usize::try_from(self.result_bytes_max).unwrap_or(usize::MAX);
        if text.len() > limit {
            let whole = text.len();
            text.truncate(text.floor_char_boundary(limit));
            text.push_str(&format!("\n[cut by hotcell: {whole} bytes, {} are kept]", text.len()));
        }
        text
    }

    /// Key and problem of the first thing that cannot be.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        if let Some(report) = &self.report {
            let bad =
                |problem: &str| Err(("output.report".to_owned(), format!("{}: {problem}", report.display())));
            let Some(text) = report.to_str().filter(|text| text.len() <= PATH_BYTES_MAX) else {
                return bad("must be UTF-8 of at most 512 bytes");
            };
            if text.contains(char::is_control) || text.ends_with('/') {
                return bad("must name a file, without control characters");
            }
            // `components()` hides `.` and doubled slashes: the path must be spelled as it is.
            let mut parts = report.components();
            let plain = parts.next() == Some(Component::RootDir)
                && parts.all(|part| matches!(part, Component::Normal(_)))
                && !text.contains("//")
                && !text.split('/').any(|part| part == ".");
            let below = self.report_place().is_some_and(|(_, path)| !path.as_os_str().is_empty());
            if !plain || !below {
                return bad("must be an absolute path below /home/agent or /tmp, without `.` and `..`");
            }
        }
        for (key, value, most) in [
            ("output.report_bytes_max", self.report_bytes_max, REPORT_BYTES_CEILING),
            ("output.result_bytes_max", self.result_bytes_max, RESULT_BYTES_CEILING),
        ] {
            if value == 0 || value > most {
                return Err((key.to_owned(), format!("is {value}; it can be from 1 to {most}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(report: &str) -> Output {
        Output { report: Some(report.into()), ..Output::default() }
    }

    #[test]
    fn a_report_is_a_plain_path_in_one_of_the_cells_own_places() {
        for (good, place, below) in [
            ("/home/agent/report.md", Place::Home, "report.md"),
            ("/home/agent/out/a b.json", Place::Home, "out/a b.json"),
            ("/tmp/r", Place::Tmp, "r"),
        ] {
            assert_eq!(output(good).check(), Ok(()), "{good}");
            assert_eq!(output(good).report_place(), Some((place, Path::new(below))));
        }
        for bad in [
            "report.md",
            "",
            "/",
            "/tmp",
            "/tmp/",
            "/home/agent",
            "/home/agent/",
            "/home/agents/x",
            "/etc/passwd",
            "/workspace/report.md",
            "/home/agent/../x",
            "/home/agent/./x",
            "/tmp//x",
            "/tmp/x/",
            "/tmp/a\nb",
        ] {
            let (key, problem) = output(bad).check().expect_err(bad);
            assert!(key == "output.report" && problem.contains(bad), "{problem}");
        }
        assert!(output(&format!("/tmp/{}", "x".repeat(600))).check().is_err());
    }

    #[test]
    fn limits_have_limits() {
        for (report, result, key) in [
            (0, 1, "output.report_bytes_max"),
            (REPORT_BYTES_CEILING + 1, 1, "output.report_bytes_max"),
            (1, 0, "output.result_bytes_max"),
            (1, RESULT_BYTES_CEILING + 1, "output.result_bytes_max"),
        ] {
            let output = Output { report: None, report_bytes_max: report, result_bytes_max: result };
            assert_eq!(output.check().expect_err("out of range").0, key);
        }
        assert_eq!(Output::default().check(), Ok(()));
    }

    #[test]
    fn a_long_answer_is_cut_where_a_character_ends_and_says_so() {
        let output = Output { result_bytes_max: 5, ..Output::default() };
        assert_eq!(output.bounded_result("12345".to_owned()), "12345");
        let cut = output.bounded_result("äääää".to_owned());
        assert_eq!(cut, "ää\n[cut by hotcell: 10 bytes, 4 are kept]");
    }

    #[test]
    fn what_a_stored_plan_does_not_say_is_the_default() {
        let output: Output = serde_json::from_str("{}").expect("empty");
        assert_eq!(output, Output::default());
        assert!(serde_json::from_str::<Output>(r#"{"reports":"/tmp/x"}"#).is_err());
    }
}
