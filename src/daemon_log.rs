//! What the daemon logs, kept in its state directory: JSON lines in `daemon.log`, and in `daemon.log.1` those before
//! them; never more than two files of [`FILE_BYTES_MAX`]. Whoever logs only puts a line into a bounded queue: a full
//! or hanging disk must never stop, delay or end the daemon. What does not get into the file is counted, and told in
//! it by one line as soon as that can be written.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use serde_json::json;

use crate::clock;

/// Largest file, in bytes; there are two at most.
pub const FILE_BYTES_MAX: u64 = 8 << 20;
/// Longest line, in bytes; a longer one counts as lost.
pub const LINE_BYTES_MAX: usize = 64 << 10;
/// The file that is written.
pub const FILE_NAME: &str = "daemon.log";
/// The file before it.
pub const FORMER_NAME: &str = "daemon.log.1";
/// Most lines that wait to be written.
const QUEUE_LINES_MAX: usize = 8192;
/// Most bytes that wait to be written.
const QUEUE_BYTES_MAX: usize = 4 << 20;
/// Longest wait, at the daemon's end, for what is queued.
const FLUSH_WAIT: Duration = Duration::from_secs(2);

/// Where the log of a daemon with this state directory is.
pub fn dir(state_dir: &Path) -> PathBuf {
    state_dir.join("log")
}

/// All that is kept, older lines first: at most two files' worth, in bytes as they are. A line that a dying daemon
/// could not end is followed by a line feed all the same.
///
/// # Errors
/// What the file system says; files that are not there are empty.
pub fn read(dir: &Path) -> io::Result<Vec<u8>> {
    let open = |name: &str| match File::open(dir.join(name)) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    let mut newer = open(FILE_NAME)?;
    let former = open(FORMER_NAME)?;
    let inode = |file: &Option<File>| file.as_ref().and_then(|file| file.metadata().ok()).map(|m| m.ino());
    if newer.is_some() && inode(&newer) == inode(&former) {
        // It was put away between the two looks.
        newer = open(FILE_NAME)?;
    }
    let mut all = Vec::new();
    for file in [former, newer].into_iter().flatten() {
        file.take(FILE_BYTES_MAX).read_to_end(&mut all)?;
        if all.last().is_some_and(|byte| *byte != b'\n') {
            all.push(b'\n');
        }
    }
    Ok(all)
}

/// The log of a running daemon: what `tracing` writes to.
#[derive(Debug)]
pub struct DaemonLog {
    queue: SyncSender<Message>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    queued_bytes: AtomicUsize,
    lost_lines: AtomicU64,
}

enum Message {
    Line(Vec<u8>),
    /// Answered once all before it is written or lost.
    Flush(SyncSender<()>),
}

impl DaemonLog {
    /// Opens the log in `dir`, which is made where it is not there, and goes on behind what an earlier daemon wrote.
    ///
    /// # Errors
    /// When it cannot be opened: a daemon goes on without it.
    pub fn open(dir: &Path) -> io::Result<Arc<Self>> {
        Self::bounded(dir, FILE_BYTES_MAX)
    }

    fn bounded(dir: &Path, file_bytes_max: u64) -> io::Result<Arc<Self>> {
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?,
        }
        let mut files = Files::new(dir, file_bytes_max);
        files.reopen()?;
        let (queue, lines) = sync_channel(QUEUE_LINES_MAX);
        let counts = Arc::new(Counts::default());
        let shared = counts.clone();
        // Lives as long as the process: what it waits for may be a disk that hangs, and nobody waits for that.
        std::thread::Builder::new()
            .name("daemon-log".to_owned())
            .spawn(move || drain(&lines, files, &shared))?;
        Ok(Arc::new(Self { queue, counts }))
    }

    /// Waits a moment until what was logged before is in the file.
    pub fn flush(&self) {
        let (done, wait) = sync_channel(1);
        if self.queue.try_send(Message::Flush(done)).is_ok() {
            // A disk that hangs keeps nobody from ending.
            let _ = wait.recv_timeout(FLUSH_WAIT);
        }
    }

    fn put(&self, line: &[u8]) {
        let counts = &self.counts;
        let fits = line.len() <= LINE_BYTES_MAX
            && counts.queued_bytes.fetch_add(line.len(), Ordering::Relaxed) + line.len() <= QUEUE_BYTES_MAX
            && self.queue.try_send(Message::Line(line.to_owned())).is_ok();
        if !fits {
            if line.len() <= LINE_BYTES_MAX {
                counts.queued_bytes.fetch_sub(line.len(), Ordering::Relaxed);
            }
            counts.lost_lines.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// `tracing` gives a whole line at a time.
impl Write for &DaemonLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn drain(lines: &Receiver<Message>, mut files: Files, counts: &Counts) {
    let mut failing = false;
    for message in lines {
        let line = match message {
            Message::Line(line) => line,
            Message::Flush(done) => {
                tell_lost(&mut files, counts);
                // Whoever asked may have gone.
                let _ = done.send(());
                continue;
            }
        };
        counts.queued_bytes.fetch_sub(line.len(), Ordering::Relaxed);
        let written = if tell_lost(&mut files, counts) { files.append(&line) } else { Err(still_failing()) };
        match written {
            Ok(()) => failing = false,
            Err(error) => {
                counts.lost_lines.fetch_add(1, Ordering::Relaxed);
                // Once: this very line goes to standard error, and to the file when it can be written again.
                if !std::mem::replace(&mut failing, true) {
                    tracing::error!(%error, dir = %files.dir.display(), "the log's file cannot be written: lines are lost until it can");
                }
            }
        }
    }
}

fn still_failing() -> io::Error {
    io::Error::other("the line that tells of lost ones could not be written")
}

/// False where there is something to tell and it cannot be written.
fn tell_lost(files: &mut Files, counts: &Counts) -> bool {
    let lost = counts.lost_lines.load(Ordering::Relaxed);
    if lost == 0 {
        return true;
    }
    let line = json!({
        "timestamp": clock::rfc3339(clock::wall_ms()), "level": "WARN", "target": "hotcell::daemon_log",
        "fields": { "message": "lines of this log were lost: they came too fast, were too long, or the disk took none", "lost": lost },
    });
    let told = files.append(format!("{line}\n").as_bytes()).is_ok();
    if told {
        counts.lost_lines.fetch_sub(lost, Ordering::Relaxed);
    }
    told
}

/// The two files.
struct Files {
    dir: PathBuf,
    bytes_max: u64,
    /// None after a failure: it is opened anew for the next line.
    open: Option<Open>,
}

struct Open {
    file: File,
    bytes: u64,
    /// Its last line has no end.
    torn: bool,
}

impl Files {
    fn new(dir: &Path, bytes_max: u64) -> Self {
        Self { dir: dir.to_owned(), bytes_max, open: None }
    }

    fn reopen(&mut self) -> io::Result<&mut Open> {
        let mut options = OpenOptions::new();
        let path = self.dir.join(FILE_NAME);
        let mut file = options.read(true).append(true).create(true).mode(0o600).open(path)?;
        let bytes = file.metadata()?.len();
        let mut last = [b'\n'];
        if bytes > 0 {
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
        }
        Ok(self.open.insert(Open { file, bytes, torn: last != [b'\n'] }))
    }

    /// Writes a line whole or not at all, as far as the disk lets us; the files stay below their limit whatever fails.
    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let done = self.try_append(line);
        if done.is_err() {
            self.open = None;
        }
        done
    }

    fn try_append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.open.is_none() {
            self.reopen()?;
        }
        let (bytes, torn) = self.open.as_ref().map_or((0, false), |open| (open.bytes, open.torn));
        let more = line.len() as u64 + u64::from(torn);
        if bytes > 0 && bytes + more > self.bytes_max {
            std::fs::rename(self.dir.join(FILE_NAME), self.dir.join(FORMER_NAME))?;
            self.open = None;
        }
        let open = match &mut self.open {
            Some(open) => open,
            None => self.reopen()?,
        };
        let text = if open.torn { [b"\n", line].concat() } else { line.to_owned() };
        if let Err(error) = open.file.write_all(&text) {
            // Half a line is worth nothing; where it cannot be taken back, the next one begins with a line feed.
            let _ = open.file.set_len(open.bytes);
            return Err(error);
        }
        open.bytes += text.len() as u64;
        open.torn = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(dir: &Path) -> Vec<serde_json::Value> {
        let all = read(dir).expect("readable");
        all.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }

    fn line(n: u64, length: usize) -> Vec<u8> {
        format!("{}\n", json!({ "n": n, "pad": "x".repeat(length) })).into_bytes()
    }

    fn sizes(dir: &Path) -> Vec<u64> {
        [FILE_NAME, FORMER_NAME]
            .iter()
            .map(|name| std::fs::metadata(dir.join(name)).map_or(0, |m| m.len()))
            .collect()
    }

    #[test]
    fn far_more_than_it_keeps_leaves_two_bounded_files_with_the_newest_lines() {
        let dir = tempfile::tempdir().expect("dir");
        let log = DaemonLog::open(&dir.path().join("log")).expect("log");
        let dir = dir.path().join("log");
        let (length, count) = (4000, 6000u64);
        for n in 0..count {
            (&mut &*log).write_all(&line(n, length)).expect("never an error");
            if n % 500 == 0 {
                log.flush();
            }
            assert!(sizes(&dir).iter().all(|bytes| *bytes <= FILE_BYTES_MAX), "{:?}", sizes(&dir));
        }
        log.flush();
        assert!(count * length as u64 > 2 * FILE_BYTES_MAX, "it was driven beyond what it keeps");
        let kept = lines(&dir);
        let numbers: Vec<u64> = kept.iter().filter_map(|line| line["n"].as_u64()).collect();
        assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]), "in order and without gaps");
        assert_eq!(numbers.last(), Some(&(count - 1)));
        assert_eq!(kept.len(), numbers.len(), "none was lost");
        assert!(numbers.len() as u64 * length as u64 > FILE_BYTES_MAX, "the former file is kept too");
        let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(
            (mode(&dir), mode(&dir.join(FILE_NAME)), mode(&dir.join(FORMER_NAME))),
            (0o700, 0o600, 0o600)
        );
    }

    #[test]
    fn what_a_killed_daemon_left_half_written_harms_no_other_line() {
        let dir = tempfile::tempdir().expect("dir");
        let whole = line(1, 10);
        for cut in 0..=whole.len() {
            let dir = dir.path().join(cut.to_string());
            std::fs::create_dir(&dir).expect("dir");
            std::fs::write(dir.join(FORMER_NAME), &whole[..cut]).expect("written");
            std::fs::write(dir.join(FILE_NAME), [&line(0, 5)[..], &whole[..cut]].concat()).expect("written");
            let log = DaemonLog::open(&dir).expect("log");
            (&mut &*log).write_all(&line(2, 3)).expect("written");
            log.flush();
            let numbers: Vec<u64> = lines(&dir).iter().filter_map(|line| line["n"].as_u64()).collect();
            let whole_ones = cut + 1 >= whole.len();
            assert_eq!(numbers, if whole_ones { vec![1, 0, 1, 2] } else { vec![0, 2] }, "{cut}");
        }
    }

    #[test]
    fn a_full_disk_loses_lines_tells_how_many_and_nobody_waits() {
        let dir = tempfile::tempdir().expect("dir");
        let at = dir.path().join(FILE_NAME);
        let log = DaemonLog::open(dir.path()).expect("log");
        (&mut &*log).write_all(&line(0, 1)).expect("written");
        log.flush();
        // What it has open goes on; a disk that is full from now on is the device that always is.
        let mut files = Files::new(dir.path(), 1000);
        std::fs::remove_file(&at).expect("removed");
        std::os::unix::fs::symlink("/dev/full", &at).expect("linked");
        for _ in 0..3 {
            let error = files.append(&line(9, 1)).expect_err("full");
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        }
        let counts = Counts::default();
        counts.lost_lines.store(3, Ordering::Relaxed);
        assert!(!tell_lost(&mut files, &counts));
        std::fs::remove_file(&at).expect("removed");
        assert!(tell_lost(&mut files, &counts) && files.append(&line(1, 1)).is_ok());
        let kept = lines(dir.path());
        assert_eq!((kept.len(), &kept[0]["fields"]["lost"], &kept[1]["n"]), (2, &json!(3), &json!(1)));
        assert_eq!(counts.lost_lines.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_daemon_whose_disk_is_full_from_the_beginning_logs_on_and_recovers() {
        let dir = tempfile::tempdir().expect("dir");
        let at = dir.path().join(FILE_NAME);
        std::os::unix::fs::symlink("/dev/full", &at).expect("linked");
        let log = DaemonLog::open(dir.path()).expect("log");
        for n in 0..20 {
            (&mut &*log).write_all(&line(n, 1)).expect("never an error");
        }
        log.flush();
        assert_eq!(log.counts.lost_lines.load(Ordering::Relaxed), 20);
        std::fs::remove_file(&at).expect("removed");
        (&mut &*log).write_all(&line(20, 1)).expect("written");
        log.flush();
        let kept = lines(dir.path());
        assert_eq!((kept.len(), &kept[0]["fields"]["lost"], &kept[1]["n"]), (2, &json!(20), &json!(20)));
        assert_eq!(log.counts.queued_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_queue_that_nobody_empties_is_bounded_and_keeps_nobody_waiting() {
        let (queue, _lines) = sync_channel(QUEUE_LINES_MAX);
        let log = DaemonLog { queue, counts: Arc::default() };
        for n in 0..100 {
            log.put(&line(n, LINE_BYTES_MAX - 100));
        }
        let queued = log.counts.queued_bytes.load(Ordering::Relaxed);
        let lost = log.counts.lost_lines.load(Ordering::Relaxed);
        assert!(queued <= QUEUE_BYTES_MAX && lost > 30 && lost < 100, "{queued} {lost}");
        log.put(&line(0, LINE_BYTES_MAX));
        assert_eq!(log.counts.lost_lines.load(Ordering::Relaxed), lost + 1, "too long");
        for _ in 0..2 * QUEUE_LINES_MAX {
            log.put(b"{}\n");
        }
        assert!(log.counts.lost_lines.load(Ordering::Relaxed) > lost + QUEUE_LINES_MAX as u64 / 2);
    }

    #[test]
    fn files_that_cannot_be_put_away_do_not_grow() {
        let dir = tempfile::tempdir().expect("dir");
        // A directory where the former file goes: it cannot be renamed over.
        std::fs::create_dir(dir.path().join(FORMER_NAME)).expect("dir");
        let mut files = Files::new(dir.path(), 200);
        for n in 0..50 {
            let _ = files.append(&line(n, 20));
        }
        assert!(sizes(dir.path())[0] <= 200);
        std::fs::remove_dir(dir.path().join(FORMER_NAME)).expect("removed");
        assert!(files.append(&line(50, 20)).is_ok());
        assert_eq!(lines(dir.path()).last().map(|line| line["n"].clone()), Some(json!(50)));
    }
}
