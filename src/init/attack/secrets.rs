//! Looks for what looks like a credential in all that code in the cell can read. It never knows a real one: it goes by
//! the beginnings that providers give their keys, and proves itself on one that it made up. It must never print what it
//! finds, only where.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use super::Told;

/// Beginnings of keys, and how many characters of a key follow at least.
const BEGINNINGS: [(&str, usize); 6] =
    [("sk-", 20), ("ghp_", 30), ("gho_", 30), ("github_pat_", 22), ("glpat-", 20), ("xoxb-", 20)];
/// Parts of the names of variables that hold secrets.
const NAMES: [&str; 6] = ["API_KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "PRIVATE_KEY"];
/// What the daemon gives a cell in the place of a credential begins so.
const PLACEHOLDER: &str = "hotcell-";
/// Directories that are searched: what an image's packages bring is not looked at.
const TOPS: [&str; 12] = [
    "/workspace",
    "/home",
    "/root",
    "/tmp",
    "/run",
    "/etc",
    "/.hotcell",
    "/mnt",
    "/media",
    "/srv",
    "/var/tmp",
    "/dev/shm",
];
/// Most files that are opened.
const FILES_MAX: usize = 20_000;
/// Most of a file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// Longest search.
const SEARCH_MAX: Duration = Duration::from_secs(10);
/// Deepest directory.
const DEPTH_MAX: u32 = 12;
/// Most places that are told.
const TOLD_MAX: usize = 5;
/// The made-up key stands in this file.
const CONTROL: &str = "/tmp/attack-control";

/// Whether a text holds what looks like a key.
fn has_key(text: &[u8]) -> bool {
    let of_key = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    BEGINNINGS.iter().any(|(start, more)| {
        text.windows(start.len()).enumerate().any(|(at, window)| {
            let first = at == 0 || !of_key(&text[at - 1]);
            first
                && window == start.as_bytes()
                && text[at + start.len()..].iter().take_while(|b| of_key(b)).count() >= *more
        })
    })
}

/// Searches variables, processes and files.
pub(super) fn search(told: &mut Told) {
    told.tell("secrets.variables", &list(&variables()));
    told.tell("secrets.processes", &list(&processes()));
    // Not in one piece anywhere in this program, which may be searched too.
    let _ = fs::write(CONTROL, ["sk-", "ant-", &"c0ntr0l-".repeat(4)].concat());
    let mut search = Search { begun: Instant::now(), looked: 0, found: Vec::new() };
    for top in TOPS {
        search.dir(Path::new(top), 0);
    }
    let control = search.found.iter().any(|path| path == CONTROL);
    search.found.retain(|path| path != CONTROL);
    let _ = fs::remove_file(CONTROL);
    told.tell("secrets.control", if control { "found" } else { "missed" });
    told.tell("secrets.files", &list(&search.found));
    told.tell("secrets.looked", &search.looked.to_string());
}

fn list(found: &[String]) -> String {
    if found.is_empty() { "none".to_owned() } else { found[..found.len().min(TOLD_MAX)].join(" ") }
}

/// Names of variables whose value looks like a secret and is not the cell's own placeholder.
fn variables() -> Vec<String> {
    let secret = |name: &str, value: &str| {
        let named = NAMES.iter().any(|part| name.contains(part));
        !value.is_empty() && !value.starts_with(PLACEHOLDER) && (named || has_key(value.as_bytes()))
    };
    std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .filter(|(name, value)| secret(name, value))
        .map(|(name, _)| name)
        .collect()
}

/// Processes whose variables or command line hold one.
fn processes() -> Vec<String> {
    let held = |entry: &fs::DirEntry| {
        let pid = entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok());
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        pid && ["environ", "cmdline"].map(read).iter().any(|text| has_key(text))
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter(held).map(|entry| entry.path().display().to_string()).collect()
}

struct Search {
    begun: Instant,
    looked: usize,
    found: Vec<String>,
}

impl Search {
    fn dir(&mut self, dir: &Path, depth: u32) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if self.looked >= FILES_MAX || self.begun.elapsed() > SEARCH_MAX {
                return;
            }
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() && depth < DEPTH_MAX {
                self.dir(&entry.path(), depth + 1);
            } else if kind.is_file() {
                self.file(&entry.path());
            }
        }
    }

    fn file(&mut self, path: &Path) {
        let mut text = Vec::new();
        let Ok(file) = File::open(path) else { return };
        self.looked += 1;
        if file.take(FILE_BYTES_MAX).read_to_end(&mut text).is_ok() && has_key(&text) {
            self.found.push(path.display().to_string());
        }
    }
}
