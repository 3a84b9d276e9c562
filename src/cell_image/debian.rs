//! The base from Debian packages, by `mmdebstrap` on this machine, through the machine's own package sources.
//!
//! Never lets a mirror, proxy, credential or certificate of this machine into the image (the settings are used from
//! outside or removed by `clean.sh`), never changes the machine's own apt state.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::context::TarWriter;
use super::{ImageError, OnProgress, Progress, apt, recipe, tree};
use crate::agent_bundle::Arch;
use crate::npm::{Npm, UnpackLimits, unpack};

const MMDEBSTRAP_DEADLINE: Duration = Duration::from_secs(20 * 60);
const NODE_BYTES_MAX: u64 = 256 << 20;
const UNPACK: UnpackLimits = UnpackLimits { bytes_max: 512 << 20, entries_max: 50_000 };
const LINES_KEPT: usize = 15;
const LINE_BYTES_MAX: usize = 500;

/// Writes the base's root file system to `<work>/base.tar`.
pub(super) async fn make_base(
    npm: &Npm,
    arch: Arch,
    work: &Path,
    on_progress: OnProgress<'_>,
) -> Result<PathBuf, ImageError> {
    let program = find_program("mmdebstrap").ok_or(ImageError::MmdebstrapMissing)?;
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
    let result = run(mmdebstrap(&program, arch, work, tree.path()), on_progress).await;
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
    let node = recipe::node(arch);
    let mut archives = Vec::new();
    for pinned in [&node, &recipe::NPM] {
        let resolved = npm.resolve(pinned.package, pinned.version).await?;
        if resolved.integrity != pinned.integrity {
            return Err(ImageError::PinnedDigest { package: pinned.package, version: pinned.version });
        }
        let on_bytes = |done, total| on_progress(Progress::Bytes { what: pinned.package, done, total });
        archives.push(npm.download(&resolved, NODE_BYTES_MAX, work, &on_bytes).await?);
    }
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

async fn run(mut command: Command, on_progress: OnProgress<'_>) -> Result<(), ImageError> {
    let io = |doing| ImageError::io(doing, Path::new("mmdebstrap"));
    let mut child = command.spawn().map_err(io("start"))?;
    let mut last = VecDeque::new();
    let read = read_lines(&mut child, &mut last, on_progress);
    let ended = tokio::time::timeout(MMDEBSTRAP_DEADLINE, read).await;
    let why = match ended {
        Ok(Ok(status)) if status.success() => return Ok(()),
        Ok(Ok(status)) => status.to_string(),
        Ok(Err(source)) => {
            stop(&mut child).await;
            return Err(io("follow")(source));
        }
        Err(_) => {
            stop(&mut child).await;
            format!("not done after {} minutes", MMDEBSTRAP_DEADLINE.as_secs() / 60)
        }
    };
    Err(ImageError::Mmdebstrap { why, last: Vec::from(last).join("\n") })
}

async fn stop(child: &mut Child) {
    if let Err(error) = child.kill().await {
        tracing::warn!(%error, "cannot kill mmdebstrap");
    }
}

async fn read_lines(
    child: &mut Child,
    last: &mut VecDeque<String>,
    on_progress: OnProgress<'_>,
) -> io::Result<std::process::ExitStatus> {
    if let Some(stderr) = child.stderr.take() {
        let mut reader = BufReader::new(stderr);
        let mut line = Vec::new();
        loop {
            // A progress bar has no line ends; a part of it is then shown as a line.
            line.clear();
            let mut limited = tokio::io::AsyncReadExt::take(&mut reader, LINE_BYTES_MAX as u64);
            if limited.read_until(b'\n', &mut line).await? == 0 {
                break;
            }
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end().rsplit('\r').next().unwrap_or_default();
            if text.is_empty() {
                continue;
            }
            on_progress(Progress::Line(text));
            if last.len() == LINES_KEPT {
                last.pop_front();
            }
            last.push_back(text.to_owned());
        }
    }
    child.wait().await
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}
