//! What the tests have of this machine: the place of their directories, its mounts, its engine, what was built for them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Where tests have their directories: short, since a unix socket's path is, and not below /tmp, which may be a small
/// tmpfs. `make test` gives one of its own, and looks that nothing is left in it.
pub(crate) fn base_dir() -> PathBuf {
    std::env::var_os("HOTCELL_TEST_DIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

/// What is mounted below a directory, in the order in which it was mounted.
pub(crate) fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(|point| point.starts_with(dir)).collect()
}

/// The docker client on the tests' engine.
pub(crate) fn docker(args: &[&str]) -> String {
    docker_at(None, args)
}

/// The same on another engine.
pub(crate) fn docker_at(engine: Option<&str>, args: &[&str]) -> String {
    let address = hotcell::engine::find_address(engine).expect("an engine: run `make engine`");
    let output = Command::new("docker").args(["-H", &address]).args(args).output().expect("docker");
    assert!(output.status.success(), "docker {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The static init that `make init` built.
pub(crate) fn init_binary() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/release/hotcell-init");
    assert!(path.exists(), "{} is missing: run `make init`", path.display());
    path
}

/// Bundles and image records of the machine's own state directory, which `make image` fills.
pub(crate) fn share(state: &Path) {
    let from = std::env::var_os("HOTCELL_STATE_DIR")
        .map_or_else(|| PathBuf::from("/var/lib/hotcell"), PathBuf::from);
    std::fs::create_dir(state).unwrap();
    for name in ["agents", "images"] {
        let source = from.join(name);
        assert!(source.exists(), "{} is missing: run `make image`", source.display());
        std::os::unix::fs::symlink(source, state.join(name)).unwrap();
    }
}
