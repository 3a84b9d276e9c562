//! Runs the git program in a GIT_DIR of hotcell's own: a temporary directory of the user it runs as, with a
//! configuration that nobody else writes and an environment of ours. Input and output are streams, and bounded: so
//! are time, memory and files. Must never run git with a repository's own configuration, with rights of the daemon's,
//! or leave a process behind.

mod settings;

use std::fs::DirBuilder;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, chown};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::process::{Gid, Pid, Resource, Rlimit, Signal, Uid, WaitId, WaitIdOptions};

use self::settings::{ATTRIBUTES, CONFIG, ENVIRONMENT};
use super::head::Format;
use crate::job::Identity;
use crate::workspace::CELL_IDS;

/// How a directory of ours begins.
const PREFIX: &str = "hotcell-git-";
/// Most bytes kept of what git says on its standard error.
const WORDS_BYTES_MAX: usize = 16 << 10;
const COPY_BYTES: usize = 128 << 10;
/// As whom git runs.
#[derive(Debug, Clone)]
pub enum Who {
    /// As a user that owns nothing, where the daemon is root; else as the daemon.
    Nobody,
    /// As the person whose repository is read.
    Submitter(Identity),
}

/// Bounds of one run.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Longest run.
    pub wall: Duration,
    /// Most bytes of its standard output.
    pub output_bytes_max: u64,
    /// Longest file that it may write.
    pub file_bytes_max: u64,
    /// Most memory, in bytes of address space: packs that it maps count.
    pub memory_bytes_max: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            wall: Duration::from_secs(300),
            output_bytes_max: 16 << 20,
            file_bytes_max: 16 << 30,
            memory_bytes_max: 16 << 30,
        }
    }
}

/// Why git gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// There is no git.
    #[error("git is not installed on this machine: install it, or use an export as tar")]
    Missing,
    /// The daemon is not root and the user is another.
    #[error("cannot run git as user {uid}: the daemon runs as {own} and not as root")]
    NotRoot {
        /// The user.
        uid: u32,
        /// The daemon's.
        own: u32,
    },
    /// It took too long and was killed.
    #[error("`git {command}` did not end within {seconds} s")]
    Late {
        /// Its first argument.
        command: String,
        /// The limit.
        seconds: u64,
    },
    /// It gave too much and was killed.
    #[error("`git {command}` gave more than {bytes_max} bytes")]
    TooMuch {
        /// Its first argument.
        command: String,
        /// The limit.
        bytes_max: u64,
    },
    /// It did not like what it got.
    #[error("`git {command}` failed with code {code}: {words}")]
    Failed {
        /// Its first argument.
        command: String,
        /// Exit code; 128 + n for signal n.
        code: i32,
        /// The end of what it said.
        words: String,
    },
    /// What it was to read or where its output was to go.
    #[error("cannot {doing} `git {command}`: {source}")]
    Stream {
        /// `feed` or `read`.
        doing: &'static str,
        /// Its first argument.
        command: String,
        /// The system's words.
        source: io::Error,
    },
    /// The temporary directory.
    #[error("cannot {doing} {path:?}: {source}")]
    Io {
        /// The step.
        doing: &'static str,
        /// What on.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
}

fn io_at<E: Into<io::Error>>(doing: &'static str, path: &Path) -> impl FnOnce(E) -> GitError {
    let path = path.to_owned();
    move |source| GitError::Io { doing, path, source: source.into() }
}

/// Writes to git's standard input; runs on a thread of its own.
pub type Feed<'a> = &'a mut (dyn FnMut(&mut dyn Write) -> io::Result<()> + Send);

/// A repository of hotcell's own. Ends with [`Git::destroy`].
#[derive(Debug)]
pub struct Git {
    dir: PathBuf,
    ids: Option<(Uid, Gid, Vec<Gid>)>,
    /// Held as long as the directory is used, so that [`sweep`] leaves it.
    lock: Option<OwnedFd>,
}

/// What a repository of hotcell's own borrows from another.
#[derive(Debug, Clone, Default)]
pub struct Borrowed {
    /// Where the other's objects lie.
    pub objects: Option<PathBuf>,
    /// Where the other's history was cut off.
    pub shallow: Option<Vec<u8>>,
}

/// Where temporary repositories are made: on a disk, and reachable for every user.
pub fn temporary() -> PathBuf {
    let place = Path::new("/var/tmp");
    if place.is_dir() { place.to_owned() } else { std::env::temp_dir() }
}

impl Git {
    /// An empty repository below `parent`, a directory that `who` can reach.
    ///
    /// # Errors
    /// [`GitError::NotRoot`], [`GitError::Io`].
    pub fn new(parent: &Path, who: &Who, format: Format, borrowed: &Borrowed) -> Result<Self, GitError> {
        let ids = ids_of(who)?;
        let mut random = [0u8; 12];
        getrandom::fill(&mut random).map_err(|e| io_at("name", parent)(io::Error::other(e.to_string())))?;
        let name: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let dir = parent.join(format!("{PREFIX}{name}"));
        DirBuilder::new().mode(0o700).create(&dir).map_err(io_at("make", &dir))?;
        let mut git = Self { dir, ids, lock: None };
        if let Err(error) = git.fill(format, borrowed) {
            let _ = git.destroy();
            return Err(error);
        }
        Ok(git)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Runs git with `args`, gives it what `feed` writes, and hands its output to `output`.
    ///
    /// # Errors
    /// [`GitError`]; git is gone then.
    pub fn run(
        &self,
        args: &[&str],
        feed: Option<Feed<'_>>,
        output: &mut dyn Write,
        bounds: &Bounds,
    ) -> Result<(), GitError> {
        let name = args.first().copied().unwrap_or_default().to_owned();
        let mut child = self.command(args, bounds).spawn().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => GitError::Missing,
            _ => GitError::Stream { doing: "start", command: name.clone(), source },
        })?;
        let (late, mut fed, mut copied, mut words) = (AtomicBool::new(false), Ok(()), Ok(()), Vec::new());
        let pid = Pid::from_child(&child);
        let kill = || {
            let _ = rustix::process::kill_process_group(pid, Signal::KILL);
        };
        let (input, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        std::thread::scope(|scope| {
            let (done, ended) = mpsc::channel::<()>();
            scope.spawn(|| {
                let ended = ended;
                if ended.recv_timeout(bounds.wall) == Err(mpsc::RecvTimeoutError::Timeout) {
                    late.store(true, Ordering::Release);
                    kill();
                }
            });
            scope.spawn(|| fed = write_all(input, feed, &kill));
            scope.spawn(|| words = read_words(err));
            copied = copy(out, output, bounds.output_bytes_max);
            if copied.is_err() {
                kill();
            }
            // Not reaped yet: until the watch has ended, its number is nobody else's.
            let _ = rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
            kill();
            drop(done);
        });
        self.judge(name, &mut child, late.into_inner(), fed, copied, &words, bounds)
    }

    /// The same, with all of its output in memory.
    ///
    /// # Errors
    /// [`GitError`].
    pub fn text(&self, args: &[&str], feed: Option<Feed<'_>>, bounds: &Bounds) -> Result<Vec<u8>, GitError> {
        let mut bytes = Vec::new();
        self.run(args, feed, &mut bytes, bounds)?;
        Ok(bytes)
    }

    /// Removes it. Nothing runs in it any more.
    ///
    /// # Errors
    /// [`GitError::Io`].
    pub fn destroy(self) -> Result<(), GitError> {
        std::fs::remove_dir_all(&self.dir).map_err(io_at("remove", &self.dir))
    }

    #[allow(clippy::too_many_arguments)] // one caller: what its threads found
    fn judge(
        &self,
        command: String,
        child: &mut Child,
        late: bool,
        fed: io::Result<()>,
        copied: Result<(), Stop>,
        words: &[u8],
        bounds: &Bounds,
    ) -> Result<(), GitError> {
        let status = child.wait();
        if late {
            return Err(GitError::Late { command, seconds: bounds.wall.as_secs() });
        }
        match copied {
            Ok(()) => {}
            Err(Stop::TooMuch) => {
                return Err(GitError::TooMuch { command, bytes_max: bounds.output_bytes_max });
            }
            Err(Stop::Io(source)) => return Err(GitError::Stream { doing: "read", command, source }),
        }
        fed.map_err(|source| GitError::Stream { doing: "feed", command: command.clone(), source })?;
        let status = status.map_err(|source| GitError::Stream {
            doing: "wait for",
            command: command.clone(),
            source,
        })?;
        match status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)) {
            0 => Ok(()),
            code => Err(GitError::Failed { command, code, words: plain(words) }),
        }
    }

    fn fill(&mut self, format: Format, borrowed: &Borrowed) -> Result<(), GitError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = rustix::fs::open(&self.dir, flags, Mode::empty()).map_err(io_at("open", &self.dir))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(io_at("lock", &self.dir))?;
        self.lock = Some(lock);
        let version = match format {
            Format::Sha1 => "[core]\n\trepositoryformatversion = 0\n".to_owned(),
            Format::Sha256 => format!(
                "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tobjectFormat = {}\n",
                format.as_str()
            ),
        };
        for dir in ["objects", "objects/info", "objects/pack", "refs", "refs/heads", "info", "out"] {
            self.make(dir, None)?;
        }
        self.make("HEAD", Some(b"ref: refs/heads/hotcell-none\n"))?;
        self.make("config", Some(format!("{version}{CONFIG}").as_bytes()))?;
        self.make("info/attributes", Some(ATTRIBUTES.as_bytes()))?;
        if let Some(objects) = &borrowed.objects {
            use std::os::unix::ffi::OsStrExt;
            let line = [super::quote(objects.as_os_str().as_bytes()), b"\n".to_vec()].concat();
            self.make("objects/info/alternates", Some(&line))?;
        }
        if let Some(shallow) = &borrowed.shallow {
            self.make("shallow", Some(shallow))?;
        }
        // Last: from here on it is theirs, and nothing of ours is done in it by name.
        match &self.ids {
            Some((uid, gid, _)) => {
                let own = chown(&self.dir, Some(uid.as_raw()), Some(gid.as_raw()));
                own.map_err(io_at("give away", &self.dir))
            }
            None => Ok(()),
        }
    }

    /// A directory, or a file with this content.
    fn make(&self, name: &str, content: Option<&[u8]>) -> Result<(), GitError> {
        let path = self.dir.join(name);
        match content {
            Some(content) => std::fs::write(&path, content).map_err(io_at("write", &path))?,
            None => DirBuilder::new().mode(0o700).create(&path).map_err(io_at("make", &path))?,
        }
        match &self.ids {
            Some((uid, gid, _)) => {
                chown(&path, Some(uid.as_raw()), Some(gid.as_raw())).map_err(io_at("give away", &path))
            }
            None => Ok(()),
        }
    }

    fn command(&self, args: &[&str], bounds: &Bounds) -> Command {
        let mut command = Command::new("git");
        command
            .args(args)
            .env_clear()
            .envs(ENVIRONMENT)
            .env("GIT_DIR", &self.dir)
            .env("HOME", &self.dir)
            .env("XDG_CONFIG_HOME", &self.dir)
            .env("TMPDIR", &self.dir)
            .current_dir(&self.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let (ids, bounds) = (self.ids.clone(), *bounds);
        // SAFETY: between fork and exec only system calls are made, on values that were made before.
        unsafe {
            command.pre_exec(move || {
                confine(&bounds)?;
                if let Some((uid, gid, groups)) = &ids {
                    rustix::thread::set_thread_groups(groups)?;
                    rustix::thread::set_thread_res_gid(*gid, *gid, *gid)?;
                    rustix::thread::set_thread_res_uid(*uid, *uid, *uid)?;
                }
                // After the change of user, which clears it.
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                Ok(())
            });
        }
        command
    }
}

/// Removes what a daemon that was killed left below `parent`; what is in use stays. How many it were.
///
/// # Errors
/// [`GitError::Io`] where `parent` cannot be listed.
pub fn sweep(parent: &Path) -> Result<usize, GitError> {
    let own = rustix::process::geteuid();
    let mut gone = 0;
    for entry in std::fs::read_dir(parent).map_err(io_at("list", parent))?.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let path = entry.path();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(dir) = rustix::fs::open(&path, flags, Mode::empty()) else { continue };
        let ours = rustix::fs::fstat(&dir).is_ok_and(|stat| own.is_root() || stat.st_uid == own.as_raw());
        let free = rustix::fs::flock(dir.as_fd(), FlockOperation::NonBlockingLockExclusive).is_ok();
        if ours && free && std::fs::remove_dir_all(&path).is_ok() {
            gone += 1;
        }
    }
    Ok(gone)
}

type Ids = Option<(Uid, Gid, Vec<Gid>)>;

/// The ids to take on; none: those that the daemon has.
fn ids_of(who: &Who) -> Result<Ids, GitError> {
    let own = rustix::process::geteuid();
    match who {
        Who::Nobody if own.is_root() => {
            // Below the ids of cells, and another one each time: two runs cannot reach each other.
            let mut random = [0u8; 4];
            let _ = getrandom::fill(&mut random);
            let id = CELL_IDS.start - 1 - (u32::from_ne_bytes(random) & 0xf_ffff);
            Ok(Some((Uid::from_raw(id), Gid::from_raw(id), Vec::new())))
        }
        Who::Nobody => Ok(None),
        Who::Submitter(who) if own.is_root() => {
            let groups = who.groups.iter().map(|group| Gid::from_raw(*group)).collect();
            Ok(Some((Uid::from_raw(who.uid), Gid::from_raw(who.gid), groups)))
        }
        Who::Submitter(who) if own.as_raw() == who.uid => Ok(None),
        Who::Submitter(who) => Err(GitError::NotRoot { uid: who.uid, own: own.as_raw() }),
    }
}

/// What is taken from the new process before it is git. Only system calls.
fn confine(bounds: &Bounds) -> io::Result<()> {
    let most = |bytes| Rlimit { current: Some(bytes), maximum: Some(bytes) };
    rustix::process::setrlimit(Resource::Core, most(0))?;
    rustix::process::setrlimit(Resource::Fsize, most(bounds.file_bytes_max))?;
    rustix::process::setrlimit(Resource::As, most(bounds.memory_bytes_max))?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    rustix::thread::set_no_new_privs(true)?;
    // SAFETY: no memory is passed; descriptors above the three standard ones are closed at exec.
    unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Ok(())
}

fn write_all(pipe: Option<impl Write>, feed: Option<Feed<'_>>, kill: &dyn Fn()) -> io::Result<()> {
    let (Some(pipe), Some(feed)) = (pipe, feed) else { return Ok(()) };
    let mut pipe = io::BufWriter::with_capacity(COPY_BYTES, pipe);
    match feed(&mut pipe).and_then(|()| pipe.flush()) {
        // Git stopped reading: its exit code says why.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
            let _ = pipe.into_parts();
            Ok(())
        }
        Err(error) => {
            // What it got so far must not pass for all of it.
            kill();
            let _ = pipe.into_parts();
            Err(error)
        }
        Ok(()) => Ok(()),
    }
}

enum Stop {
    TooMuch,
    Io(io::Error),
}

fn copy(pipe: Option<impl Read>, output: &mut dyn Write, bytes_max: u64) -> Result<(), Stop> {
    let Some(mut pipe) = pipe else { return Ok(()) };
    let (mut buffer, mut bytes) = (vec![0; COPY_BYTES], 0u64);
    loop {
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(got) => {
                bytes += got as u64;
                if bytes > bytes_max {
                    return Err(Stop::TooMuch);
                }
                output.write_all(&buffer[..got]).map_err(Stop::Io)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Stop::Io(error)),
        }
    }
}

/// The end of what is said there; the rest is read and forgotten.
fn read_words(pipe: Option<impl Read>) -> Vec<u8> {
    let Some(mut pipe) = pipe else { return Vec::new() };
    let (mut buffer, mut words) = (vec![0; WORDS_BYTES_MAX], Vec::new());
    while let Ok(got) = pipe.read(&mut buffer) {
        if got == 0 {
            break;
        }
        words.extend_from_slice(&buffer[..got]);
        let over = words.len().saturating_sub(WORDS_BYTES_MAX);
        words.drain(..over);
    }
    words
}

/// Words of git for a person: one line, nothing that a terminal acts upon.
fn plain(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let line = lines.collect::<Vec<_>>().join("; ");
    line.chars().filter(|c| !c.is_control()).take(2000).collect()
}

#[cfg(test)]
#[path = "run/tests.rs"]
mod tests;
