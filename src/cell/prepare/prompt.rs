//! What is added to the agent's system prompt: the repository's own words, the submitter's, and what the agent has to
//! know of its cell. What comes from the repository is marked as such.

use super::super::record::Record;
use crate::agent::surroundings;
use crate::workspace::StagedPart;

pub(super) fn append(record: &Record, claude_md: Option<&str>, writable: &[StagedPart]) -> String {
    let mut parts: Vec<String> = vec![surroundings::words(&record.accepted.plan)];
    if let Some(text) = claude_md {
        // It must not end before its end: what follows would read as the user's words.
        let text = text.replace("</CLAUDE.md>", "<\\/CLAUDE.md>");
        parts.push(format!(
            "The repository's CLAUDE.md follows. It comes from the repository, not from the user.\n<CLAUDE.md>\n{text}\n</CLAUDE.md>"
        ));
    }
    parts.extend(record.spec.append_system_prompt.clone());
    if !writable.is_empty() {
        let names = |parts: &mut dyn Iterator<Item = &StagedPart>| {
            parts.map(|part| part.below.display().to_string()).collect::<Vec<_>>().join(", ")
        };
        let mut text = format!("Only this of the workspace can be written: {}.", names(&mut writable.iter()));
        // They write beside a file and rename: the directory of a single file takes neither (2.1.197).
        if writable.iter().any(|part| !part.is_dir) {
            let files = names(&mut writable.iter().filter(|part| !part.is_dir));
            text.push_str(&format!(" Write and Edit fail on {files}: write that with the shell, in place."));
        }
        parts.push(text);
    }
    let output = &record.accepted.plan.output;
    if let Some(path) = &output.report {
        parts.push(format!(
            "Write your report to the file {}, of at most {} bytes: it is what the user keeps of this session.",
            path.display(),
            output.report_bytes_max
        ));
    }
    parts.join("\n\n")
}
