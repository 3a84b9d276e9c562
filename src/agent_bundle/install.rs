//! Installing a bundle: download, check, unpack beside, one rename. Never runs what it installs.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::{Arch, Bundle, BundleError, Bundles, Platform, Qualification, Version, files};
use crate::npm::{Npm, OnBytes, Resolved, UnpackLimits, unpack};

/// The CLI's archive is 77 MB and its binary 245 MB; four times that is a mistake.
const ARCHIVE_BYTES_MAX: u64 = 320 << 20;
const UNPACK: UnpackLimits = UnpackLimits { bytes_max: 1 << 30, entries_max: 1000 };

impl Bundles {
    /// Installs `version` (an exact one, or a tag of the registry such as `latest`) for `platform`. An installed one
    /// is left as it is. `on_bytes` gets the download's progress. Dropping the future leaves nothing under a final
    /// name; temporary files are removed by it or by a later installation.
    pub async fn install(
        &self,
        npm: &Npm,
        version: &str,
        platform: Platform,
        on_bytes: OnBytes<'_>,
    ) -> Result<Bundle, BundleError> {
        if let Some(bundle) = version.parse().ok().and_then(|exact| self.sound(&exact, platform)) {
            return Ok(bundle);
        }
        let package = platform.package();
        let resolved = npm.resolve(package, version).await?;
        let exact: Version = resolved.version.parse()?;
        if let Some(bundle) = self.sound(&exact, platform) {
            return Ok(bundle);
        }
        self.prepare_dir()?;
        let downloaded = npm.download(&resolved, ARCHIVE_BYTES_MAX, &self.dir, on_bytes).await?;
        let this = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            this.put_in_place(downloaded.file.path(), &resolved, exact, platform)
        });
        match task.await {
            Ok(result) => result,
            Err(error) => Err(self.io("unpack into", io::Error::other(error))),
        }
    }

    /// The bundle, if its record can be read and its file has the recorded size and mode.
    fn sound(&self, version: &Version, platform: Platform) -> Option<Bundle> {
        let bundle = self.get(version, platform).ok()?;
        let file = fs::symlink_metadata(self.bundle_dir(version, platform).join("claude")).ok()?;
        let mode = file.permissions().mode() & 0o7777;
        (file.is_file() && file.len() == bundle.size_bytes && mode == 0o711).then_some(bundle)
    }

    fn prepare_dir(&self) -> Result<(), BundleError> {
        fs::create_dir_all(&self.dir).map_err(|source| self.io("create", source))?;
        let swept = files::sweep(&self.dir).map_err(|source| self.io("clean", source))?;
        if !swept.is_empty() {
            tracing::info!(count = swept.len(), "removed what a broken-off installation left");
        }
        Ok(())
    }

    fn put_in_place(
        &self,
        tarball: &Path,
        resolved: &Resolved,
        version: Version,
        platform: Platform,
    ) -> Result<Bundle, BundleError> {
        let bad = |why| BundleError::Content {
            package: resolved.package.clone(),
            version: resolved.version.clone(),
            why,
        };
        let temp = tempfile::Builder::new().prefix(files::TEMP_PREFIX).tempdir_in(&self.dir);
        let temp = temp.map_err(|source| self.io("create a directory in", source))?;
        let unpacked = unpack(tarball, temp.path(), &|name| name == "claude", UNPACK)?;
        if unpacked.files != 1 {
            return Err(bad("it has no file `claude`"));
        }
        let binary = temp.path().join("claude");
        let io = |doing| {
            let path = binary.clone();
            move |source| BundleError::Io { doing, path, source }
        };
        match elf_arch(&binary).map_err(io("read"))? {
            Some(arch) if arch == platform.arch => {}
            Some(_) => return Err(bad("its file `claude` is for another processor")),
            None => return Err(bad("its file `claude` is not a Linux program")),
        }
        let sha256 = seal(&binary).map_err(io("seal"))?;
        let bundle = Bundle {
            sha256,
            size_bytes: unpacked.bytes,
            package: resolved.package.clone(),
            integrity: resolved.integrity.clone(),
            installed_at_ms: crate::clock::wall_ms(),
            state: Qualification::Installed,
            version,
            platform,
        };
        files::write_json(&temp.path().join("bundle.json"), &bundle)?;
        self.rename_into_place(temp, bundle)
    }

    fn rename_into_place(&self, temp: tempfile::TempDir, bundle: Bundle) -> Result<Bundle, BundleError> {
        let target = self.bundle_dir(&bundle.version, bundle.platform);
        let io = |doing| {
            let path = target.clone();
            move |source| BundleError::Io { doing, path, source }
        };
        // The directory must let a cell's uid through to a bound file's path on engines that check it.
        fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o755)).map_err(io("open up"))?;
        if let Some(other) = self.sound(&bundle.version, bundle.platform) {
            return Ok(other); // a second installation was faster
        }
        if target.exists() {
            // Present but not sound: cells that have it bound keep the old file.
            let aside = tempfile::Builder::new().prefix(files::TEMP_PREFIX).tempdir_in(&self.dir);
            let aside = aside.map_err(|source| self.io("create a directory in", source))?;
            fs::rename(&target, aside.path().join("old")).map_err(io("set aside"))?;
        }
        fs::rename(temp.path(), &target).map_err(io("rename into place"))?;
        // The temporary name is gone; nothing to remove any more.
        let _renamed = temp.keep();
        files::sync_dir(&self.dir).map_err(io("sync"))?;
        Ok(bundle)
    }
}

/// Root's where we are root, mode 0711, on disk. Returns its SHA-256.
fn seal(binary: &Path) -> io::Result<String> {
    let mut file = File::open(binary)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0_u8; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        digest.update(&buffer[..read]);
    }
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(binary, Some(0), Some(0))?;
    }
    file.set_permissions(fs::Permissions::from_mode(0o711))?;
    file.sync_all()?;
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The processor of a 64-bit little-endian ELF program.
fn elf_arch(binary: &Path) -> io::Result<Option<Arch>> {
    let mut head = [0_u8; 20];
    match File::open(binary)?.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    if head[..6] != *b"\x7fELF\x02\x01" {
        return Ok(None);
    }
    Ok(match u16::from_le_bytes([head[18], head[19]]) {
        62 => Some(Arch::X64),
        183 => Some(Arch::Arm64),
        _ => None,
    })
}
