//! The base from Debian packages, by `mmdebstrap` on this machine, through the machine's own package sources.
//!
//! Never lets a mirror, proxy, credential or certificate of this machine into the image (the settings are used from
//! outside or removed by `clean.sh`), never changes the machine's own apt state.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::context::TarWriter;
use super::{ImageError, OnProgress, Progress, apt, program, recipe, toolchain, tree};
use crate::agent_bundle::Arch;
use crate::npm::{Downloaded, Npm, UnpackLimits, unpack};

const MMDEBSTRAP_DEADLINE: Duration = Duration::from_secs(20 * 60);
const NODE_BYTES_MAX: u64 = 256 << 20;
const UNPACK: UnpackLimits = UnpackLimits { bytes_max: 512 << 20, entries_max: 50_000 };

/// Writes the base's root file system to `<work>/base.tar`.
pub(super) async fn make_base(
    npm: &Npm,
    arch: Arch,
    work: &Path,
    on_progress: OnProgress<'_>,
) -> Result<PathBuf, ImageError> {
    let program = program::find("mmdebstrap").ok_or(ImageError::MmdebstrapMissing)?;
    if !rustix::process::geteuid().is_root() {
        return Err(ImageError::NotRoot);
    }
    let host: Arch = std::env::consts::ARCH.parse()?;
    if host != arch {
        return Err(ImageError::Architecture {
            what: "this machine, on which Debian packages are unpacked,".to_owned(),
            found: host.engine_name().to_owned(),
            engine: arch.engine_name().to_owned(),
        });
    }
    on_progress(Progress::Step("fetching Node and npm"));
    node_tree(npm, arch, work, on_progress).await?;
    on_progress(Progress::Step("unpacking Debian packages (mmdebstrap)"));
    let settings = apt::HostSettings::read().await;
    write_inputs(work, &settings).map_err(ImageError::io("write the inputs of mmdebstrap in", work))?;
    let tree =
        tree::Tree::create().map_err(ImageError::io("prepare a directory in", Path::new(tree::PLACE)))?;
    let command = mmdebstrap(&program, arch, work, tree.path());
    let result = program::run("mmdebstrap", command, MMDEBSTRAP_DEADLINE, on_progress).await;
    let path = tree.path().to_owned();
    let removed = tree.remove();
    result?;
    removed.map_err(ImageError::io("remove", &path))?;
    Ok(work.join("base.tar"))
}

/// `<work>/rootfs.tar`: what Debian does not have.
async fn node_tree(
    npm: &Npm,
    arch: Arch,
    work: &Path,
    on_progress: OnProgress<'_>,
) -> Result<(), ImageError> {
    let archives = download(npm, &[&recipe::node(arch), &recipe::NPM], work, on_progress).await?;
    let work = work.to_owned();
    let task = tokio::task::spawn_blocking(move || -> Result<(), ImageError> {
        let io = ImageError::io("write rootfs.tar in", &work);
        let (node, npm) = (work.join("node"), work.join("npm"));
        std::fs::create_dir(&node).and_then(|()| std::fs::create_dir(&npm)).map_err(io)?;
        unpack(archives[0].file.path(), &node, &|name| name == "bin/node", UNPACK)?;
        unpack(archives[1].file.path(), &npm, &|name| !skipped_of_npm(name), UNPACK)?;
        let write = || -> io::Result<()> {
            let mut tar = TarWriter::create(&work.join("rootfs.tar"))?;
            tar.file("usr/local/bin/node", &node.join("bin/node"), 0o755)?;
            tar.dir("usr/local/lib/node_modules")?;
            tar.tree("usr/local/lib/node_modules/npm", &npm)?;
            tar.link("usr/local/bin/npm", "../lib/node_modules/npm/bin/npm-cli.js")?;
            tar.link("usr/local/bin/npx", "../lib/node_modules/npm/bin/npx-cli.js")?;
            tar.finish()
        };
        write().map_err(ImageError::io("write rootfs.tar in", &work))
    });
    task.await.map_err(|error| ImageError::io("unpack Node in", Path::new("."))(io::Error::other(error)))?
}

/// Pinned packages of the npm registry, as archives in `work`.
async fn download(
    npm: &Npm,
    all: &[&recipe::Pinned],
    work: &Path,
    on_progress: OnProgress<'_>,
) -> Result<Vec<Downloaded>, ImageError> {
    let mut archives = Vec::new();
    for pinned in all {
        let resolved = npm.resolve(pinned.package, pinned.version).await?;
        if resolved.integrity != pinned.integrity {
            return Err(ImageError::PinnedDigest { package: pinned.package, version: pinned.version });
        }
        let on_bytes = |done, total| on_progress(Progress::Bytes { what: pinned.package, done, total });
        archives.push(npm.download(&resolved, NODE_BYTES_MAX, work, &on_bytes).await?);
    }
    Ok(archives)
}

/// `<work>/rootfs.tar`: what the image of Node has beyond Debian's packages: headers and corepack.
pub(super) async fn node_extras(
    npm: &Npm,
    arch: Arch,
    work: &Path,
    on_progress: OnProgress<'_>,
) -> Result<(), ImageError> {
    let scratch = work.join("extras");
    std::fs::create_dir(&scratch).map_err(ImageError::io("create", &scratch))?;
    let archives = download(npm, &[&recipe::node(arch), &toolchain::COREPACK], &scratch, on_progress).await?;
    let work = work.to_owned();
    let task = tokio::task::spawn_blocking(move || -> Result<(), ImageError> {
        let io = ImageError::io("write rootfs.tar in", &work);
        let (node, corepack) = (scratch.join("node"), scratch.join("corepack"));
        std::fs::create_dir(&node).and_then(|()| std::fs::create_dir(&corepack)).map_err(io.clone())?;
        unpack(archives[0].file.path(), &node, &|name| is_header(name, arch), UNPACK)?;
        unpack(archives[1].file.path(), &corepack, &|name| !name.starts_with("shims/"), UNPACK)?;
        let write = || -> io::Result<()> {
            let mut tar = TarWriter::create(&work.join("rootfs.tar"))?;
            tar.dir("usr/local/include")?;
            tar.tree("usr/local/include/node", &node.join("include/node"))?;
            tar.tree("usr/local/lib/node_modules/corepack", &corepack)?;
            tar.link("usr/local/bin/corepack", "../lib/node_modules/corepack/dist/corepack.js")?;
            tar.finish()?;
            drop(archives);
            std::fs::remove_dir_all(&scratch)
        };
        write().map_err(io)
    });
    task.await
        .map_err(|error| ImageError::io("unpack corepack in", Path::new("."))(io::Error::other(error)))?
}

/// Headers of Node; those of its OpenSSL for this processor only.
fn is_header(name: &str, arch: Arch) -> bool {
    let ours = match arch {
        Arch::X64 => "linux-x86_64/",
        Arch::Arm64 => "linux-aarch64/",
    };
    let archs = name.strip_prefix("include/node/openssl/archs/");
    name.starts_with("include/node/") && archs.is_none_or(|rest| rest.starts_with(ours))
}

fn skipped_of_npm(name: &str) -> bool {
    name.starts_with("docs/") || name.starts_with("man/")
}

fn write_inputs(work: &Path, settings: &apt::HostSettings) -> io::Result<()> {
    let put = |name: &str, content: &str, mode: u32| {
        std::fs::write(work.join(name), content)?;
        std::fs::set_permissions(work.join(name), std::os::unix::fs::PermissionsExt::from_mode(mode))
    };
    put("dpkg.cfg", recipe::DPKG_CFG, 0o644)?;
    put("public.sources", recipe::DEBIAN_SOURCES, 0o644)?;
    put("clean.sh", recipe::CLEAN_SH, 0o755)?;
    put("host.sources", &settings.sources, 0o600)?;
    // May hold a proxy's password.
    put("host.conf", &settings.conf, 0o600)
}

fn mmdebstrap(program: &Path, arch: Arch, work: &Path, tree: &Path) -> Command {
    // In mount and process namespaces of its own: on TERM mmdebstrap leaves its mounts and some children behind, and
    // signals its whole process group. So it is killed, and the kernel ends all of it: children, then mounts. The
    // same happens when hotcell itself is killed (pdeathsig).
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", "unshare"])
        .args(["--mount", "--propagation=private", "--pid", "--mount-proc", "--kill-child=KILL", "--"])
        .arg(program)
        .args(["--mode=root", "--variant=minbase", "--format=tar"])
        .arg(format!("--architectures={}", arch.engine_name()))
        .arg(format!("--include={}", recipe::packages().join(",")))
        .arg(path_option("--dpkgopt=", &work.join("dpkg.cfg")))
        .arg("--setup-hook=install -m 0600 \"$HOTCELL_APT_CONF\" \"$1/etc/apt/apt.conf.d/00hotcell-host\"")
        .arg("--customize-hook=tar --numeric-owner -C \"$1\" -xf \"$HOTCELL_ROOTFS\"")
        .arg(path_option("--customize-hook=", &work.join("clean.sh")))
        .arg(recipe::DEBIAN_SUITE)
        .arg(work.join("base.tar"))
        .arg(work.join("host.sources"))
        .env("HOTCELL_APT_CONF", work.join("host.conf"))
        .env("HOTCELL_SOURCES", work.join("public.sources"))
        .env("HOTCELL_ROOTFS", work.join("rootfs.tar"))
        .env("TMPDIR", tree)
        .env("LC_ALL", "C.UTF-8")
        .current_dir(tree)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    command
}

fn path_option(option: &str, path: &Path) -> std::ffi::OsString {
    let mut argument = std::ffi::OsString::from(option);
    argument.push(path);
    argument
}
