//! Runs git as a user, in one of two ways: towards the repository that is fetched, with their own configuration and
//! keys; and in what was fetched, with no configuration but what stands here. It must never let git ask anybody, run a
//! hook, or use a transport that is not named here.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::job::Identity;
use crate::run_as::{self, Bounds, Output, RunError, Surroundings};

use super::{SourceError, words};

/// Longest answer of a command whose answer is a line or two.
const LINES_BYTES_MAX: usize = 64 << 10;

/// Over every other configuration.
const ALWAYS: [&str; 14] = [
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.untrackedCache=false",
    "core.protectHFS=true",
    "core.protectNTFS=true",
    "credential.interactive=never",
    "protocol.ext.allow=never",
    "transfer.fsckObjects=true",
    "fetch.unpackLimit=1",
    "fetch.writeCommitGraph=false",
    "submodule.recurse=false",
    "gc.auto=0",
    "maintenance.auto=false",
    "pack.threads=2",
];
/// Where the user's configuration does not count: nothing of theirs may run for what a repository's attributes say.
const ALONE: [&str; 5] = [
    "core.attributesFile=/dev/null",
    "core.excludesFile=/dev/null",
    "core.symlinks=true",
    "core.autocrlf=false",
    "advice.detachedHead=false",
];

/// Whose configuration counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Config {
    /// The user's: towards what is fetched.
    Users,
    /// Nobody's: in what was fetched.
    None,
}

/// What stays the same for all commands of one fetch.
pub(super) struct Run<'a> {
    pub(super) who: &'a Identity,
    pub(super) url: &'a str,
    pub(super) env: &'a [(String, OsString)],
    pub(super) until: Instant,
    pub(super) wall: Duration,
}

/// One command.
pub(super) struct Git<'a> {
    run: &'a Run<'a>,
    config: Config,
    /// The word that names it in errors.
    command: &'static str,
    args: Vec<OsString>,
    env: Vec<(String, OsString)>,
    stdin: Vec<u8>,
    file_bytes_max: Option<u64>,
    output_bytes_max: usize,
}

impl Run<'_> {
    pub(super) fn late(&self) -> SourceError {
        SourceError::Late { url: self.url.to_owned(), seconds: self.wall.as_secs() }
    }

    pub(super) fn git(&self, config: Config, command: &'static str) -> Git<'_> {
        let (args, env, stdin) = (Vec::new(), Vec::new(), Vec::new());
        let output_bytes_max = LINES_BYTES_MAX;
        Git { run: self, config, command, args, env, stdin, file_bytes_max: None, output_bytes_max }
    }
}

impl Git<'_> {
    pub(super) fn args<T: Into<OsString>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    pub(super) fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    pub(super) fn stdin(mut self, bytes: Vec<u8>) -> Self {
        self.stdin = bytes;
        self
    }

    pub(super) fn file_bytes_max(mut self, bytes: u64) -> Self {
        self.file_bytes_max = Some(bytes);
        self
    }

    pub(super) fn output_bytes_max(mut self, bytes: usize) -> Self {
        self.output_bytes_max = bytes;
        self
    }

    /// Runs it; whatever its code is.
    pub(super) async fn output(self) -> Result<Output, SourceError> {
        let left = self.run.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.run.late());
        }
        let mut argv = vec![PathBuf::from("git")];
        let settings =
            ALWAYS.iter().chain(if self.config == Config::None { ALONE.iter() } else { [].iter() });
        argv.extend(settings.flat_map(|setting| [PathBuf::from("-c"), PathBuf::from(setting)]));
        argv.extend(self.args.iter().map(PathBuf::from));
        // What is said here wins: nothing may make it ask or use another transport.
        let mut env = self.run.env.to_vec();
        env.extend(environment(self.config));
        env.extend(self.env);
        let surroundings = Surroundings { env, file_bytes_max: self.file_bytes_max };
        let bounds = Bounds { wall: left, output_bytes_max: self.output_bytes_max };
        match run_as::run_with(&argv, self.run.who, &surroundings, &self.stdin, bounds).await {
            Ok(output) => Ok(output),
            Err(RunError::Late { .. }) => Err(self.run.late()),
            Err(RunError::Start { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Err(SourceError::NoGit)
            }
            Err(RunError::TooMuch { bytes_max, .. }) => Err(SourceError::TooLarge {
                what: format!("`git {}` says more than can be read", self.command),
                max: format!("{bytes_max} bytes"),
            }),
            Err(error @ (RunError::NotRoot { .. } | RunError::Start { .. } | RunError::Left { .. })) => {
                Err(error.into())
            }
        }
    }

    /// Runs it; what it printed, or what went wrong.
    pub(super) async fn text(self) -> Result<Vec<u8>, SourceError> {
        let (url, command, file_bytes_max) = (self.run.url.to_owned(), self.command, self.file_bytes_max);
        let output = self.output().await?;
        if output.code == 0 {
            return Ok(output.stdout);
        }
        Err(words::judge(&url, command, output.code, &output.stderr, file_bytes_max))
    }
}

fn environment(config: Config) -> Vec<(String, OsString)> {
    let mut env = vec![
        ("LC_ALL", "C"),
        ("GIT_TERMINAL_PROMPT", "0"),
        ("GIT_ASKPASS", "/bin/false"),
        ("SSH_ASKPASS", "/bin/false"),
        ("SSH_ASKPASS_REQUIRE", "never"),
        ("GCM_INTERACTIVE", "never"),
        ("GIT_PAGER", "cat"),
        ("GIT_EDITOR", ":"),
        ("GIT_OPTIONAL_LOCKS", "0"),
        ("GIT_NO_LAZY_FETCH", "1"),
        ("GIT_NO_REPLACE_OBJECTS", "1"),
        ("GIT_LFS_SKIP_SMUDGE", "1"),
        ("GIT_ALLOW_PROTOCOL", if config == Config::Users { "file:http:https:ssh" } else { "file" }),
    ];
    if config == Config::None {
        env.extend([
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_ATTR_NOSYSTEM", "1"),
        ]);
    }
    env.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()
}

/// The user's own ssh command, told to ask nothing.
pub(super) async fn ssh(run: &Run<'_>) -> Result<OsString, SourceError> {
    let own = run.git(Config::Users, "config").args([
        "config",
        "--global",
        "--includes",
        "--get",
        "core.sshCommand",
    ]);
    let own = own.output().await?;
    let own = String::from_utf8_lossy(&own.stdout).trim().to_owned();
    let program = own.split_whitespace().next().unwrap_or("ssh");
    // Another program than ssh may know nothing of its options; it has no terminal to ask at either.
    let is_ssh = program.rsplit('/').next() == Some("ssh");
    Ok(match (own.is_empty(), is_ssh) {
        (true, _) => "ssh -o BatchMode=yes".into(),
        (false, true) => format!("{own} -o BatchMode=yes").into(),
        (false, false) => own.into(),
    })
}
