//! Real repositories for tests, made with the git program in a clean environment, as a user of choice.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::job::Identity;

/// Somebody who is not the daemon, where the tests run as root; else who runs them.
pub(crate) fn somebody() -> Identity {
    if rustix::process::geteuid().is_root() {
        Identity { uid: 4242, gid: 4343, groups: vec![4444] }
    } else {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Identity { uid, gid, groups: Vec::new() }
    }
}

/// A directory with work trees in it, `who`'s own.
pub(crate) struct Place {
    dir: tempfile::TempDir,
    pub(crate) who: Identity,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let who = somebody();
        // Others must come through to what lies in it.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).expect("opened");
        std::os::unix::fs::chown(dir.path(), Some(who.uid), Some(who.gid)).expect("given away");
        Self { dir, who }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command as `who`, in `dir`, with nothing of the tests' environment.
    pub(crate) fn command(&self, program: &str, dir: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("HOME", self.dir.path())
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_AUTHOR_NAME", "A U Thor")
            .env("GIT_AUTHOR_EMAIL", "author@example.com")
            .env("GIT_COMMITTER_NAME", "A U Thor")
            .env("GIT_COMMITTER_EMAIL", "author@example.com")
            .env("GIT_TERMINAL_PROMPT", "0")
            .current_dir(dir);
        if rustix::process::geteuid().is_root() {
            command.uid(self.who.uid).gid(self.who.gid);
        }
        command
    }

    pub(crate) fn try_git(&self, dir: &Path, args: &[&str]) -> Output {
        self.command("git", dir)
            .args(["-c", "protocol.file.allow=always"])
            .args(args)
            .output()
            .expect("git runs")
    }

    /// Runs git as `who` in `dir`; its standard output, trimmed.
    pub(crate) fn git(&self, dir: &Path, args: &[&str]) -> String {
        let output = self.try_git(dir, args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "git {args:?} in {dir:?}: {errors}");
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    /// Runs a shell script as `who` in `dir`.
    pub(crate) fn sh(&self, dir: &Path, script: &str) -> String {
        let output = self.command("sh", dir).args(["-euc", script]).output().expect("sh runs");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {errors}");
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    /// A new repository with one commit of `a.txt` and `dir/b.txt`; its work tree and that commit.
    pub(crate) fn repository(&self, name: &str) -> (PathBuf, String) {
        self.repository_with(name, &[])
    }

    pub(crate) fn repository_with(&self, name: &str, init: &[&str]) -> (PathBuf, String) {
        let path = self.path(name);
        self.git(self.dir.path(), &[&["init", "-q", "-b", "main"][..], init, &[name]].concat());
        self.sh(&path, "mkdir dir; printf 'one\\ntwo\\nthree\\n' > a.txt; echo b > dir/b.txt");
        self.git(&path, &["add", "-A"]);
        self.git(&path, &["commit", "-q", "-m", "first"]);
        let commit = self.git(&path, &["rev-parse", "HEAD"]);
        (path, commit)
    }
}
