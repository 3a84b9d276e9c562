//! The agent's bundle from a registry, and the default cell image from nothing to a command run in it.
//!
//! The registry of the bundle tests is a small one on loopback. The image test uses a real engine (`HOTCELL_ENGINE`, else
//! the system's socket), the machine's package mirrors and the npm registry, under names of its own that it removes.

mod docker_cli;
mod registry;
mod toolchains;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use hotcell::agent_bundle::{Arch, BundleError, Bundles, Libc, Platform, Qualification};
use hotcell::cell_image::{
    BaseSource, Build, BuildRequest, EngineFault, EngineFuture, Extend, ImageEngine, ImageError, ImageInfo,
    Images, OnLine, Progress, Shell,
};
use hotcell::npm::{Npm, NpmError, Registry};

use docker_cli::DockerCli;
use registry::{FakeRegistry, elf, tarball};

const X64: Platform = Platform { arch: Arch::X64, libc: Libc::Gnu };

fn client(registry: &FakeRegistry) -> Npm {
    Npm::new(Registry::parse(&registry.address()).unwrap()).unwrap()
}

fn nothing_left(dir: &Path) -> bool {
    let hidden = |name: std::ffi::OsString| name.to_string_lossy().starts_with('.');
    !std::fs::read_dir(dir).unwrap().any(|entry| hidden(entry.unwrap().file_name()))
}

#[tokio::test]
async fn a_bundle_is_installed_once_and_may_be_run_but_not_read() {
    let mut registry = FakeRegistry::start().await;
    registry.publish(
        X64.package(),
        "2.9.0",
        tarball(&[("claude", &elf(62), 0o755), ("README.md", b"x", 0o644)]),
    );
    let state = tempfile::tempdir().unwrap();
    let bundles = Bundles::new(state.path());
    let npm = client(&registry);
    let seen = AtomicU64::new(0);
    let on_bytes = |done, _total| seen.store(done, Ordering::SeqCst);
    let bundle = bundles.install(&npm, "latest", X64, &on_bytes).await.unwrap();
    assert_eq!(bundle.version.as_str(), "2.9.0");
    assert_eq!(bundle.state, Qualification::Installed);
    assert!(seen.load(Ordering::SeqCst) > 0);
    let path = bundles.path_for(&bundle.version, X64).unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o711);
    assert!(path.ends_with("agents/2.9.0-x64-gnu/claude"));
    assert!(!path.with_file_name("README.md").exists());

    let asked = registry.requests();
    let again = bundles.install(&npm, "2.9.0", X64, &on_bytes).await.unwrap();
    assert_eq!(again, bundle);
    assert_eq!(registry.requests(), asked, "an installed version needs no network");
    assert!(nothing_left(&state.path().join("agents")));
    registry.stop().await;
}

#[tokio::test]
async fn a_bundle_whose_file_was_changed_is_installed_anew() {
    let mut registry = FakeRegistry::start().await;
    registry.publish(X64.package(), "2.9.0", tarball(&[("claude", &elf(62), 0o755)]));
    let state = tempfile::tempdir().unwrap();
    let bundles = Bundles::new(state.path());
    let npm = client(&registry);
    let bundle = bundles.install(&npm, "2.9.0", X64, &|_, _| {}).await.unwrap();
    let path = bundles.path_for(&bundle.version, X64).unwrap();
    std::fs::write(&path, b"short").unwrap();
    bundles.install(&npm, "2.9.0", X64, &|_, _| {}).await.unwrap();
    assert_eq!(path.metadata().unwrap().len(), bundle.size_bytes);
    assert!(nothing_left(&state.path().join("agents")));
    registry.stop().await;
}

#[tokio::test]
async fn what_is_not_the_agent_is_refused_and_leaves_nothing() {
    let mut registry = FakeRegistry::start().await;
    registry.publish(X64.package(), "1.0.0", tarball(&[("other", b"x", 0o755)]));
    registry.publish(X64.package(), "1.0.1", tarball(&[("claude", &elf(183), 0o755)]));
    registry.publish(X64.package(), "1.0.2", tarball(&[("claude", b"#!/bin/sh\n", 0o755)]));
    registry.publish(X64.package(), "1.0.3", tarball(&[("claude", &elf(62), 0o755)]));
    registry.corrupt(X64.package(), "1.0.3");
    let state = tempfile::tempdir().unwrap();
    let bundles = Bundles::new(state.path());
    let npm = client(&registry);
    for (version, why) in [
        ("1.0.0", "no file `claude`"),
        ("1.0.1", "another processor"),
        ("1.0.2", "not a Linux program"),
        ("1.0.3", "does not match its sha512"),
        ("1.0.4", "has no @anthropic-ai/claude-code-linux-x64@1.0.4"),
    ] {
        let error = bundles.install(&npm, version, X64, &|_, _| {}).await.unwrap_err().to_string();
        assert!(error.contains(why), "{version}: {error}");
    }
    assert_eq!(bundles.ls().unwrap(), []);
    assert_eq!(std::fs::read_dir(state.path().join("agents")).unwrap().count(), 0);
    registry.stop().await;
}

#[tokio::test]
async fn a_registry_that_lists_all_versions_only_is_understood() {
    let mut registry = FakeRegistry::start().await;
    registry.publish("npm", "10.0.0", tarball(&[("a", b"x", 0o644)]));
    registry.lists_only();
    let npm = client(&registry);
    assert_eq!(npm.resolve("npm", "latest").await.unwrap().version, "10.0.0");
    assert!(matches!(npm.resolve("npm", "11.0.0").await, Err(NpmError::NotFound { .. })));
    registry.stop().await;
}

#[tokio::test]
async fn downloads_are_bounded_and_plain_redirects_are_refused() {
    let mut registry = FakeRegistry::start().await;
    registry.publish("npm", "10.0.0", tarball(&[("a", b"some bytes", 0o644)]));
    registry.redirect("/moved", "http://registry.invalid/elsewhere");
    registry.redirect("/around", "/around");
    let npm = client(&registry);
    let dir = tempfile::tempdir().unwrap();
    let resolved = npm.resolve("npm", "10.0.0").await.unwrap();
    let error = npm.download(&resolved, 10, dir.path(), &|_, _| {}).await.unwrap_err();
    assert!(matches!(error, NpmError::TooLarge { bytes_max: 10, .. }), "{error}");
    for path in ["/moved", "/around"] {
        let mut moved = resolved.clone();
        moved.tarball = format!("{}{path}", registry.address());
        let error = npm.download(&moved, 1000, dir.path(), &|_, _| {}).await.unwrap_err();
        assert!(matches!(error, NpmError::Redirect { .. }), "{error}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    registry.stop().await;
    let error = npm.resolve("npm", "10.0.0").await.unwrap_err();
    assert!(matches!(&error, NpmError::Offline { host, .. } if host == "127.0.0.1"), "{error}");
}

/// An engine in memory: images by name, the paths in them, and what was done.
#[derive(Default)]
struct FakeEngine {
    images: Mutex<BTreeMap<String, ImageInfo>>,
    paths: Vec<&'static str>,
    probes: AtomicU64,
}

impl FakeEngine {
    fn with(self, name: &str, digit: char, labels: &[(&str, &str)]) -> Self {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let id = format!("sha256:{}", digit.to_string().repeat(64));
        let info = ImageInfo { id, arch: "amd64".to_owned(), size_bytes: None, labels };
        self.images.lock().unwrap().insert(name.to_owned(), info);
        self
    }
}

fn refused<'a, T>(operation: &str) -> EngineFuture<'a, T>
where
    T: Send + 'a,
{
    let fault =
        EngineFault { operation: operation.to_owned(), message: "not in this test".to_owned(), away: false };
    Box::pin(async move { Err(fault) })
}

impl ImageEngine for FakeEngine {
    fn arch(&self) -> EngineFuture<'_, String> {
        Box::pin(async { Ok("amd64".to_owned()) })
    }
    fn image<'a>(&'a self, reference: &'a str) -> EngineFuture<'a, Option<ImageInfo>> {
        let images = self.images.lock().unwrap();
        let found =
            images.get(reference).or_else(|| images.values().find(|info| info.id == reference)).cloned();
        Box::pin(async move { Ok(found) })
    }
    fn pull<'a>(&'a self, _: &'a str, _: OnLine<'a>) -> EngineFuture<'a, ()> {
        refused("pull")
    }
    fn build<'a>(&'a self, _: &'a Build, _: OnLine<'a>) -> EngineFuture<'a, ()> {
        refused("build")
    }
    fn import<'a>(&'a self, _: &'a Path, _: &'a str, _: &'a [String]) -> EngineFuture<'a, ()> {
        refused("import")
    }
    fn extend<'a>(&'a self, _: &'a Extend, _: OnLine<'a>) -> EngineFuture<'a, ()> {
        refused("extend")
    }
    fn tag<'a>(&'a self, _: &'a str, _: &'a str) -> EngineFuture<'a, ()> {
        refused("tag")
    }
    fn probe_paths<'a>(&'a self, _: &'a str, paths: &'a [&'a str]) -> EngineFuture<'a, Vec<bool>> {
        self.probes.fetch_add(1, Ordering::SeqCst);
        let found = paths.iter().map(|path| self.paths.contains(path)).collect();
        Box::pin(async move { Ok(found) })
    }
}

#[tokio::test]
async fn images_are_found_by_digest_and_judged_once() {
    let state = tempfile::tempdir().unwrap();
    let paths =
        vec!["/bin/sh", "/lib/ld-musl-x86_64.so.1", "/etc/alpine-release", "/lib/ld-linux-x86-64.so.2"];
    let engine = FakeEngine { paths, ..FakeEngine::default() }.with("python:3-alpine", 'a', &[]);
    let images = Images::new(&engine, state.path());
    let info = images.resolve_image("python:3-alpine").await.unwrap();
    let facts = images.suitability(&info).await.unwrap();
    assert_eq!((facts.shell, facts.libc, facts.git), (Shell::BinSh, Some(Libc::Musl), false));
    assert_eq!(images.suitability(&info).await.unwrap(), facts);
    assert_eq!(engine.probes.load(Ordering::SeqCst), 1);
    assert!(matches!(images.resolve_image("nope").await, Err(ImageError::NotPresent { .. })));
    assert!(matches!(images.resolve_image("hotcell/cell:latest").await, Err(ImageError::NotBuilt)));
}

#[tokio::test]
async fn an_image_without_a_shell_is_a_named_error() {
    let state = tempfile::tempdir().unwrap();
    let engine = FakeEngine::default().with("scratchy", 'b', &[]);
    let images = Images::new(&engine, state.path());
    let info = images.resolve_image("scratchy").await.unwrap();
    assert!(matches!(images.suitability(&info).await, Err(ImageError::NoShell { .. })));
}

#[tokio::test]
async fn another_image_under_the_default_name_is_not_taken_for_ours() {
    let state = tempfile::tempdir().unwrap();
    let engine = FakeEngine::default().with("hotcell/cell:latest", 'c', &[("hotcell.image", "base")]);
    let images = Images::new(&engine, state.path());
    assert!(matches!(images.resolve_image("hotcell/cell").await, Err(ImageError::NotBuilt)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_image_is_built_from_nothing_reused_and_works_in_a_locked_cell() {
    let engine = DockerCli::connect().await;
    let state = tempfile::tempdir_in(crate::world::base_dir()).unwrap();
    let prefix = format!("hotcell-test-{}", std::process::id());
    let images = Images::new(&engine, state.path()).with_prefix(&prefix);
    let npm = Npm::from_environment().unwrap();
    let log = Mutex::new(Vec::new());
    let on_progress = |progress: Progress<'_>| {
        if let Progress::Step(text) | Progress::Note(text) = progress {
            log.lock().unwrap().push(text.to_owned());
        }
    };
    let request = BuildRequest { base: BaseSource::Debian, ..BuildRequest::default() };
    let outcome = check_default_image(&engine, &images, &npm, &request, &on_progress).await;
    engine.remove_images(&prefix).await;
    let left: Vec<_> = std::fs::read_dir(state.path().join("images")).unwrap().flatten().collect();
    outcome.unwrap_or_else(|error| panic!("{error}\nsteps: {:?}", log.lock().unwrap()));
    assert!(left.iter().all(|entry| !entry.file_name().to_string_lossy().starts_with('.')), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_is_given_up_leaves_no_process_and_no_mount() {
    let engine = DockerCli::connect().await;
    let state = tempfile::tempdir_in(crate::world::base_dir()).unwrap();
    let prefix = format!("hotcell-test-given-up-{}", std::process::id());
    let images = Images::new(&engine, state.path()).with_prefix(&prefix);
    let npm = Npm::from_environment().unwrap();
    let tree = Mutex::new(None);
    let at_work = tokio::sync::Notify::new();
    let on_progress = |progress: Progress<'_>| {
        if let Progress::Line(line) = progress {
            if let Some((_, place)) = line.split_once("using ") {
                let place = place.split(' ').next().unwrap_or_default();
                *tree.lock().unwrap() = Path::new(place).parent().map(Path::to_owned);
            }
            if line.contains("installing essential packages") {
                at_work.notify_one();
            }
        }
    };
    let request = BuildRequest { base: BaseSource::Debian, ..BuildRequest::default() };
    tokio::select! {
        result = images.build(&npm, &request, &on_progress) => panic!("ended by itself: {result:?}"),
        () = at_work.notified() => {}
    }
    let tree = tree.into_inner().unwrap().expect("mmdebstrap named its directory");
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while in_use(&tree) {
        // The kernel is killing the namespace; nothing announces its end.
        assert!(std::time::Instant::now() < until, "still in use: {}", tree.display());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    std::fs::remove_dir_all(&tree).unwrap();
    assert!(nothing_left(&state.path().join("images")));
}

/// Whether a mount, or a process by its arguments, names the directory.
fn in_use(dir: &Path) -> bool {
    let name = dir.to_str().unwrap();
    let mounted = std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(name);
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    mounted
        || processes
            .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
            .any(|arguments| String::from_utf8_lossy(&arguments).contains(name))
}

async fn check_default_image(
    engine: &DockerCli,
    images: &Images<'_>,
    npm: &Npm,
    request: &BuildRequest,
    on_progress: &(dyn Fn(Progress<'_>) + Send + Sync),
) -> Result<(), String> {
    let text = |error: ImageError| error.to_string();
    let built = images.build(npm, request, on_progress).await.map_err(text)?;
    eprintln!("built: {built:?}");
    let again = images.build(npm, request, on_progress).await.map_err(text)?;
    if !again.reused || again.id != built.id {
        return Err(format!("built again: {again:?}"));
    }
    let info = images.resolve_image(&again.tag).await.map_err(text)?;
    let facts = images.suitability(&info).await.map_err(text)?;
    if (facts.shell, facts.libc, facts.git) != (Shell::BinBash, Some(Libc::Gnu), true) {
        return Err(format!("{facts:?}"));
    }
    let script = "set -eu; claude --version; node --version; npm --version; git --version; rg --version; \
         jq --version; python3 --version; git init -q \"$HOME/x\"; test -d /.hotcell -a -d /.hotcell-agent; \
         test -f /.hotcell-init; ! head -c1 /usr/local/bin/claude 2>/dev/null; stat -c %a /tmp; \
         ! find / -xdev -perm /6000 -type f -path '*claude*' 2>/dev/null | grep .; \
         cat /etc/apt/sources.list.d/*; ls -A /etc/apt/apt.conf.d; cat /etc/resolv.conf";
    let output = engine.run_locked(&built.id, script).await?;
    eprintln!("{output}");
    for expected in ["(Claude Code)", "v22.", "git version", "ripgrep", "jq-", "Python 3", "deb.debian.org"] {
        if !output.contains(expected) {
            return Err(format!("no {expected:?} in: {output}"));
        }
    }
    if output.contains("00hotcell-host") {
        return Err("the host's apt settings are in the image".to_owned());
    }
    Ok(())
}

#[test]
fn errors_say_what_to_do() {
    assert!(ImageError::MmdebstrapMissing.to_string().contains("apt-get install mmdebstrap"));
    let version = "2.1.1".parse().unwrap();
    let error = BundleError::NotInstalled { version, platform: X64 }.to_string();
    assert!(error.contains("hotcell agent install 2.1.1"), "{error}");
}
