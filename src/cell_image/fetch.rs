//! Debian packages for an image, fetched on this machine: what an image lacks, by apt itself, in a root of its own
//! whose installed packages are those of the image.
//!
//! Never reads or changes the machine's own apt state (its mirrors, proxy and certificates are carried over), never
//! runs anything of a package.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::{ImageError, OnProgress, apt, program};
use crate::agent_bundle::Arch;

const UPDATE_TIME_MAX: Duration = Duration::from_secs(5 * 60);
const DOWNLOAD_TIME_MAX: Duration = Duration::from_secs(20 * 60);
const PACKAGES_MAX: usize = 2_000;

/// An apt root.
pub(super) struct Archive {
    dir: PathBuf,
    apt_get: PathBuf,
}

impl Archive {
    /// Makes one in `dir`, which must exist and be empty, over the packages in `status`, and reads the lists.
    pub(super) async fn create(
        dir: &Path,
        status: &str,
        arch: Arch,
        on_progress: OnProgress<'_>,
    ) -> Result<Self, ImageError> {
        let apt_get = program::find("apt-get").ok_or(ImageError::AptMissing)?;
        let settings = apt::HostSettings::read().await;
        let archive = Self { dir: dir.to_owned(), apt_get };
        archive.write(&settings, status, arch).map_err(ImageError::io("prepare an apt root in", dir))?;
        let update = archive.command(&["update"]);
        program::run("apt-get", update, UPDATE_TIME_MAX, on_progress).await?;
        Ok(archive)
    }

    fn write(&self, settings: &apt::HostSettings, status: &str, arch: Arch) -> io::Result<()> {
        for below in ["lists/partial", "archives/partial", "none/partial", "etc/preferences.d", "etc/parts"] {
            std::fs::create_dir_all(self.dir.join(below))?;
        }
        std::fs::write(self.dir.join("status"), status)?;
        std::fs::write(self.dir.join("all.sources"), apt::with_backports(&settings.sources))?;
        let dir = self.dir.display();
        let arch = arch.engine_name();
        let own = format!(
            "Dir::Etc::main \"/dev/null\";\nDir::Etc::parts \"{dir}/etc/parts\";\n\
             Dir::Etc::sourcelist \"{dir}/all.sources\";\nDir::Etc::sourceparts \"{dir}/etc/parts\";\n\
             Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"{dir}/etc/preferences.d\";\n\
             Dir::State \"{dir}\";\nDir::State::lists \"{dir}/lists\";\nDir::State::status \"{dir}/status\";\n\
             Dir::State::extended_states \"{dir}/extended_states\";\n\
             Dir::Cache \"{dir}\";\nDir::Cache::archives \"{dir}/archives\";\nDir::Log \"{dir}\";\n\
             APT::Architecture \"{arch}\";\nAPT::Architectures {{ \"{arch}\"; }};\nAPT::Sandbox::User \"root\";\n\
             APT::Install-Recommends \"false\";\n"
        );
        // What the machine says of its mirrors may hold a proxy's password: the directory above is ours alone.
        std::fs::write(self.dir.join("apt.conf"), own + &settings.conf)
    }

    /// Fetches what an image with our status lacks of `packages` (`name` or `name/suite`). Answers the files.
    pub(super) async fn fetch(
        &self,
        packages: &[String],
        on_progress: OnProgress<'_>,
    ) -> Result<Vec<PathBuf>, ImageError> {
        let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
        // Against an empty cache: it leaves out what is there.
        let cache = format!("Dir::Cache::archives={}/none", self.dir.display());
        let ask = ["-o", &cache, "--yes", "--print-uris", "install"];
        let listed = self.command(&[&ask[..], &packages].concat()).stdout(Stdio::piped()).output();
        let listed = tokio::time::timeout(UPDATE_TIME_MAX, listed).await;
        let io = ImageError::io("run", &self.apt_get);
        let listed = listed.map_err(|_| io(io::ErrorKind::TimedOut.into()))?.map_err(&io)?;
        if !listed.status.success() {
            let last = String::from_utf8_lossy(&listed.stderr).trim().to_owned();
            return Err(ImageError::Program { program: "apt-get", why: listed.status.to_string(), last });
        }
        let files = files(&String::from_utf8_lossy(&listed.stdout));
        let get = ["--yes", "--download-only", "install"];
        let download = self.command(&[&get[..], &packages].concat());
        program::run("apt-get", download, DOWNLOAD_TIME_MAX, on_progress).await?;
        Ok(files.into_iter().map(|file| self.dir.join("archives").join(file)).collect())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&self.apt_get)
            .args(arguments)
            .env("APT_CONFIG", self.dir.join("apt.conf"))
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C.UTF-8")
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        command
    }
}

/// File names out of `apt-get --print-uris`: `'URI' FILE SIZE HASH`.
fn files(printed: &str) -> Vec<String> {
    let lines = printed.lines().filter(|line| line.starts_with('\''));
    let names = lines.filter_map(|line| line.split("' ").nth(1)?.split(' ').next());
    let plain = |name: &&str| name.ends_with(".deb") && !name.contains('/');
    names.filter(plain).take(PACKAGES_MAX).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_a_list_are_plain_names() {
        let printed = "Reading package lists...\n\
             'http://mirror.test/g%2b%2b_12.deb' g++_4%3a12.2.0-3_amd64.deb 1356 MD5Sum:ee\n\
             'http://mirror.test/x' ../x.deb 1 MD5Sum:ee\n'http://mirror.test/y' y.txt 1 MD5Sum:ee\n";
        assert_eq!(files(printed), ["g++_4%3a12.2.0-3_amd64.deb"]);
    }
}
