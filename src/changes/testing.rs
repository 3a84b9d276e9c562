//! Change sets for tests: from two directories, the way an extraction would make them.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::shelf::{JobShelf, Shelf};
use crate::change::{Base, ChangeSet, Entry, Ignored, Node, Raw, Special, TreePath, VERSION, Verdict};
use crate::job::JobId;

const UNMOUNT_MAX: Duration = Duration::from_secs(60);
const UNMOUNT_POLL: Duration = Duration::from_millis(5);

/// A shelf, and the directory it lies in.
pub(crate) fn shelf() -> (tempfile::TempDir, JobShelf) {
    let dir = tempfile::tempdir().expect("tempdir");
    let shelf = Shelf::new(dir.path().join("changes")).of(&JobId::new(1, 1));
    shelf.create().expect("made");
    (dir, shelf)
}

/// A disk of its own, an ext4 image, whose power can be cut. Needs root.
pub(crate) struct Disk {
    dir: tempfile::TempDir,
    off: Off,
    /// `/dev/loop…`: the same all the time, as a disk is.
    device: String,
}

/// Cuts the power, whatever rights the calling thread has: some that apply have none.
#[derive(Clone)]
pub(crate) struct Off(SyncSender<SyncSender<()>>);

impl Off {
    /// From now on nothing is written to the disk any more. Can be said twice.
    pub(crate) fn now(&self) {
        let (done, was_done) = sync_channel(1);
        self.0.send(done).expect("asked");
        was_done.recv().expect("off");
    }
}

impl Disk {
    pub(crate) fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test mounts: run it as root");
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("open for all");
        let image = std::fs::File::create(dir.path().join("image")).expect("made");
        image.set_len(32 << 20).expect("sized");
        let device = run("losetup", &["-f", "--show", &dir.path().join("image").to_string_lossy()]);
        run("mkfs.ext4", &["-q", "-F", &device]);
        std::fs::create_dir(dir.path().join("disk")).expect("made");
        let (ask, asked) = sync_channel::<SyncSender<()>>(1);
        let disk = Self { dir, off: Off(ask), device };
        disk.mount();
        let top = disk.path();
        std::thread::spawn(move || {
            for done in asked {
                switch_off(&top);
                done.send(()).expect("told");
            }
        });
        disk
    }

    pub(crate) fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("disk")
    }

    pub(crate) fn off(&self) -> Off {
        self.off.clone()
    }

    /// What is there so far stays.
    pub(crate) fn flush(&self) {
        rustix::fs::syncfs(std::fs::File::open(self.path()).expect("open")).expect("flushed");
    }

    /// What the kernel was not told to put on the disk is lost. Nobody may have anything open there.
    pub(crate) fn cut_power(&self) {
        self.off.now();
        unmount(&self.path());
        // Another namespace of mounts may hold it for a moment; until then it would be mounted as it is, switched off.
        let held = Path::new("/sys/fs/ext4").join(Path::new(&self.device).file_name().expect("a name"));
        let give_up = Instant::now() + UNMOUNT_MAX;
        while held.exists() {
            assert!(Instant::now() < give_up, "{held:?} is still there");
            std::thread::sleep(UNMOUNT_POLL);
        }
        self.mount();
    }

    fn mount(&self) {
        run("mount", &[&self.device, &self.path().to_string_lossy()]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Of a test that failed something may be open there still.
        let _ = std::process::Command::new("umount").arg("--lazy").arg(self.path()).status();
        let _ = std::process::Command::new("losetup").args(["-d", &self.device]).status();
    }
}

/// Unmounts what was mounted here, as soon as nobody has anything open there.
pub(crate) fn unmount(at: &Path) {
    let give_up = Instant::now() + UNMOUNT_MAX;
    // A process that another test of this program starts has what was open here until it runs its own program.
    while let Err(error) = rustix::mount::unmount(at, UnmountFlags::empty()) {
        assert!(error == Errno::BUSY && Instant::now() < give_up, "unmount: {error}");
        std::thread::sleep(UNMOUNT_POLL);
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = std::process::Command::new(program).args(args).output().expect(program);
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn switch_off(top: &Path) {
    use std::os::fd::AsRawFd;
    // linux/fs.h: FS_IOC_SHUTDOWN, and its "drop what is not written, the journal too" argument.
    const FS_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587d;
    let drop_all = 2u32;
    let dir = std::fs::File::open(top).expect("open");
    // SAFETY: the descriptor is open and the argument is a live u32.
    let rc = unsafe { libc::ioctl(dir.as_raw_fd(), FS_IOC_SHUTDOWN as _, &raw const drop_all) };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
}

/// A file with this content.
pub(crate) fn file(shelf: &JobShelf, content: &[u8], mode: u32) -> Node {
    let (blob, bytes, _) = shelf.put_blob(&mut &content[..], u64::MAX, 0).expect("kept").expect("short");
    Node::File { mode, bytes, blob: Some(blob) }
}

/// An entry that is plain.
pub(crate) fn entry(path: impl AsRef<[u8]>, before: Option<Node>, after: Option<Node>) -> Entry {
    let path = TreePath::new(path.as_ref()).expect("a path");
    Entry { path, before, after, base_changed: false, flags: Vec::new(), verdict: Verdict::Plain }
}

/// A change set of these, against `commit`.
pub(crate) fn set(mut entries: Vec<Entry>, commit: Option<&str>) -> ChangeSet {
    entries.sort_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
    let base = Base { commit: commit.map(str::to_owned), ..Base::default() };
    let (git_state, ignored, commits, notes) = (Vec::new(), Ignored::default(), None, Vec::new());
    ChangeSet { version: VERSION, base, entries, git_state, ignored, commits, notes }
}

/// What is different between two directories; `.git` at their tops is left out.
pub(crate) fn between(shelf: &JobShelf, before: &Path, after: &Path) -> Vec<Entry> {
    let (before, after) = (tree(shelf, before), tree(shelf, after));
    let paths: std::collections::BTreeSet<&Vec<u8>> = before.keys().chain(after.keys()).collect();
    let get = |tree: &BTreeMap<Vec<u8>, Node>, path: &Vec<u8>| tree.get(path).cloned();
    let entries = paths.into_iter().map(|path| entry(path, get(&before, path), get(&after, path)));
    entries.filter(|entry| entry.before != entry.after).collect()
}

/// All that is in a directory.
pub(crate) fn tree(shelf: &JobShelf, top: &Path) -> BTreeMap<Vec<u8>, Node> {
    let mut all = BTreeMap::new();
    let mut todo = vec![top.to_owned()];
    while let Some(dir) = todo.pop() {
        for found in std::fs::read_dir(&dir).expect("listed") {
            let path = found.expect("entry").path();
            let name = path.strip_prefix(top).expect("below").as_os_str().as_bytes().to_vec();
            if name == b".git" {
                continue;
            }
            let meta = path.symlink_metadata().expect("looked at");
            let mode = meta.permissions().mode() & 0o7777;
            let node = if meta.is_dir() {
                todo.push(path);
                Node::Dir { mode }
            } else if meta.is_symlink() {
                Node::Symlink {
                    target: Raw(std::fs::read_link(&path).expect("link").as_os_str().as_bytes().into()),
                }
            } else if meta.is_file() {
                let mut content = Vec::new();
                std::fs::File::open(&path).and_then(|mut f| f.read_to_end(&mut content)).expect("read");
                file(shelf, &content, mode)
            } else {
                Node::Special { what: Special::Fifo }
            };
            all.insert(name, node);
        }
    }
    all
}
