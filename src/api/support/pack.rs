//! The archive itself: entries that are redacted as they are put in, and a manifest of what is in it, what is not, and
//! how much was taken out. Pure but for what it is given. No entry goes in that still holds a credential of the daemon.

use std::collections::BTreeMap;
use std::io;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};

use super::redact::{Counts, Redactor};

/// What the form of an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// One JSON value, or one a line.
    Json,
    /// Any text.
    Text,
}

/// What is to go in.
#[derive(Debug)]
pub(super) struct Raw {
    /// Its name in the archive.
    pub(super) name: String,
    /// Its form.
    pub(super) form: Form,
    /// It, not yet redacted.
    pub(super) text: String,
    /// What of it was cut away, in words.
    pub(super) cut: Option<String>,
}

/// What `MANIFEST.json` says.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this form.
    pub format: u32,
    /// The job.
    pub job: String,
    /// When it was packed, RFC 3339.
    pub made_at: String,
    /// For whom: a user's id.
    pub made_for_uid: u32,
    /// Whether that user is an admin.
    pub admin: bool,
    /// Whether prompts and what the agent said are in it.
    pub with_prompt: bool,
    /// Whether what tools got and gave and files hold is in it.
    pub with_contents: bool,
    /// Each file but this one.
    pub entries: Vec<Entry>,
    /// What is not in it, and why.
    pub left_out: Vec<Missing>,
    /// Texts in the place of which their length stands, by the reason.
    pub texts_left_out: BTreeMap<String, u64>,
}

/// A file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    /// Its name, in the archive's one directory.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// How many secrets were taken out of it, by kind.
    pub redactions: Counts,
    /// What of it was cut away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<String>,
}

/// What is not there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Missing {
    /// What.
    pub what: String,
    /// Why.
    pub why: String,
}

/// The name of the manifest.
pub const MANIFEST: &str = "MANIFEST.json";

/// Packs `raw` as a compressed tar archive with one directory.
///
/// # Errors
/// Only where memory cannot be written to.
pub(super) fn pack(
    dir: &str,
    raw: Vec<Raw>,
    mut manifest: Manifest,
    redactor: &Redactor,
) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
    for entry in raw {
        let mut redactions = Counts::new();
        let text = match entry.form {
            Form::Json => redactor.json(&entry.text, &mut redactions),
            Form::Text => redactor.text(&entry.text, &mut redactions).into_owned(),
        };
        if redactor.still_in(&text) {
            let why = "a credential of the daemon could not be taken out of it".to_owned();
            manifest.left_out.push(Missing { what: entry.name, why });
            continue;
        }
        add(&mut archive, dir, &entry.name, text.as_bytes())?;
        let bytes = text.len() as u64;
        manifest.entries.push(Entry { name: entry.name, bytes, redactions, cut: entry.cut });
    }
    let manifest = serde_json::to_string_pretty(&manifest).map_err(io::Error::other)?;
    add(&mut archive, dir, MANIFEST, redactor.json(&manifest, &mut Counts::new()).as_bytes())?;
    archive.into_inner()?.finish()
}

fn add(
    archive: &mut tar::Builder<GzEncoder<Vec<u8>>>,
    dir: &str,
    name: &str,
    bytes: &[u8],
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o600);
    header.set_mtime(crate::clock::wall_ms() / 1000);
    archive.append_data(&mut header, format!("{dir}/{name}"), bytes)
}

/// Lines that come one by one and of which the first and the last are kept.
#[derive(Debug, Default)]
pub(super) struct Lines {
    head: String,
    tail: std::collections::VecDeque<String>,
    tail_bytes: usize,
    dropped: u64,
}

/// Bytes of the first lines that are kept.
const HEAD_BYTES_MAX: usize = 4 << 20;
/// Bytes of the last lines that are kept.
const TAIL_BYTES_MAX: usize = 12 << 20;

impl Lines {
    /// One more, without its line feed.
    pub(super) fn push(&mut self, line: String) {
        if self.tail.is_empty() && self.head.len() + line.len() < HEAD_BYTES_MAX {
            self.head.push_str(&line);
            self.head.push('\n');
            return;
        }
        self.tail_bytes += line.len() + 1;
        self.tail.push_back(line);
        while self.tail_bytes > TAIL_BYTES_MAX {
            let Some(line) = self.tail.pop_front() else { break };
            self.tail_bytes -= line.len() + 1;
            self.dropped += 1;
        }
    }

    /// As an entry.
    pub(super) fn entry(self, name: &str) -> Raw {
        let mut text = self.head;
        for line in self.tail {
            text.push_str(&line);
            text.push('\n');
        }
        let cut = (self.dropped > 0).then(|| format!("{} lines in its middle are left out", self.dropped));
        Raw { name: name.to_owned(), form: Form::Json, text, cut }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::gateway::secret::Secret;

    #[test]
    fn a_pack_has_what_its_manifest_names_and_no_credential() {
        let canary = "sk-canary-7f3a9c51d2e84b06";
        let redactor = Redactor::new(&[Secret::new(canary.to_owned())]);
        let raw = |name: &str, form, text: String| Raw { name: name.to_owned(), form, text, cut: None };
        let manifest = Manifest { job: "j1".into(), ..Manifest::default() };
        let entries = vec![
            raw("a.json", Form::Json, format!("{{\"key\":\"{canary}\"}}\n")),
            raw("b.txt", Form::Text, format!("key {canary}\n")),
        ];
        let bytes = pack("d", entries, manifest, &redactor).expect("packed");
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&bytes[..]));
        let mut files = BTreeMap::new();
        for entry in archive.entries().expect("entries") {
            let mut entry = entry.expect("entry");
            let mut text = String::new();
            entry.read_to_string(&mut text).expect("UTF-8");
            files.insert(entry.path().expect("path").display().to_string(), text);
        }
        assert_eq!(files.keys().collect::<Vec<_>>(), ["d/MANIFEST.json", "d/a.json", "d/b.txt"]);
        assert!(files.values().all(|text| !text.contains(canary)));
        let manifest: Manifest = serde_json::from_str(&files["d/MANIFEST.json"]).expect("manifest");
        assert_eq!(
            manifest.entries.iter().map(|entry| entry.redactions.values().sum::<u64>()).sum::<u64>(),
            2
        );
    }

    #[test]
    fn of_very_many_lines_the_first_and_the_last_are_kept() {
        let mut lines = Lines::default();
        for n in 0..400 {
            lines.push(format!("{n} {}", "x".repeat(100_000)));
        }
        let entry = lines.entry("events.ndjson");
        assert!(entry.text.len() <= HEAD_BYTES_MAX + TAIL_BYTES_MAX);
        assert!(
            entry.text.starts_with("0 x")
                && entry.text.contains("\n399 x")
                && !entry.text.contains("\n200 x")
        );
        assert!(entry.cut.is_some_and(|words| words.ends_with("lines in its middle are left out")));
    }
}
