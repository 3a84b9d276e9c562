//! Repositories as they are: Debian source packages, and with `make test-full` one with more than 50,000 files. An agent edits, deletes and
//! renames; the patch is one that plain git takes, and with it, with `apply`, with `checkout` and on a branch the
//! tree is, byte for byte and mode for mode, the one that the agent left.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::Instant;

use hotcell::change::{HideRules, TreePath};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::*;
use crate::world::tool_results;

const AGENT: &str = include_str!("real.py");
/// Names, owners, modes, sizes, and times that nobody can set.
const UNTOUCHED: &str = "find . -printf '%p %y %U:%G %m %s %T@ %C@ %l\\n' | LC_ALL=C sort";

/// The bare repository of a Debian source package, fetched where it is not there yet.
fn package(name: &str) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/sources");
    let output = Command::new(&script).arg(name).output().expect("bash");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {name}:\n{said}", script.display());
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// A clone of Ann's, with nothing but what is checked out in it.
fn clone(world: &World, bare: &Path, name: &str) -> PathBuf {
    let dir = world.workspace(name, ANN);
    // The packages may lie where Ann cannot look.
    let cloned = Command::new("git")
        .args(["-c", "safe.directory=*", "clone", "-q", "--no-checkout", "--no-hardlinks"])
        .args([bare, &dir])
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .status();
    assert!(cloned.unwrap().success());
    assert!(Command::new("chown").args(["-R", "4242:4242"]).arg(&dir).status().unwrap().success());
    sh(&dir, "umask 022; git config core.autocrlf false; git -c checkout.workers=2 checkout -q -f main");
    dir
}

/// What is at a path, in words; of a directory that it is one, and its mode.
type Tree = BTreeMap<Vec<u8>, String>;

/// Hashes of files that nobody can have changed since: by device, inode and the time of the last change.
type Known = HashMap<(u64, u64, i64, i64), String>;

/// Everything below `dir` but its `.git`.
fn tree(dir: &Path, known: &mut Known) -> Tree {
    let (mut found, mut todo) = (Tree::new(), vec![dir.to_owned()]);
    while let Some(below) = todo.pop() {
        for entry in std::fs::read_dir(&below).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap();
            if name == Path::new(".git") {
                continue;
            }
            let meta = path.symlink_metadata().unwrap();
            let mode = meta.permissions().mode() & 0o7777;
            let what = if meta.is_symlink() {
                format!("link {}", std::fs::read_link(&path).unwrap().as_os_str().as_bytes().escape_ascii())
            } else if meta.is_dir() {
                todo.push(path.clone());
                format!("dir {mode:o}")
            } else {
                let id = (meta.dev(), meta.ino(), meta.ctime(), meta.ctime_nsec());
                let hash = known.entry(id).or_insert_with(|| {
                    Sha256::digest(std::fs::read(&path).unwrap()).iter().map(|b| format!("{b:02x}")).collect()
                });
                format!("{mode:o} {hash}")
            };
            found.insert(name.as_os_str().as_bytes().to_owned(), what);
        }
    }
    found
}

/// The paths that are different.
fn differing<'a>(one: &'a Tree, other: &'a Tree) -> Vec<&'a Vec<u8>> {
    let names: BTreeSet<_> = one.keys().chain(other.keys()).collect();
    names.into_iter().filter(|name| one.get(*name) != other.get(*name)).collect()
}

#[track_caller]
fn same(what: &str, one: &Tree, other: &Tree) {
    let differ = differing(one, other);
    let told = differ.iter().take(20);
    let told =
        told.map(|name| format!("{}: {:?} / {:?}", name.escape_ascii(), one.get(*name), other.get(*name)));
    assert!(
        differ.is_empty(),
        "{what}: {} paths are not the same: {:#?}",
        differ.len(),
        told.collect::<Vec<_>>()
    );
}

/// The files among `tree` that a cell may see, as the agent counts and hashes them.
fn seen_by_agent(tree: &Tree, hide: &HideRules) -> (usize, String) {
    let (mut all, mut count) = (Sha256::new(), 0);
    for (name, what) in tree.iter().filter(|(_, what)| !what.starts_with("dir ")) {
        let path = TreePath::new(name.clone()).unwrap();
        if !hide.hides(&path, false) {
            count += 1;
            all.update([name.as_slice(), b"\0", what.as_bytes(), b"\n"].concat());
        }
    }
    (count, all.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// What the policy of these jobs hides.
fn hidden() -> HideRules {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/trusted.toml");
    let policy: toml::Value = toml::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let rules: Vec<String> = policy["workspace"]["hide"].clone().try_into().unwrap();
    HideRules::new(&rules).unwrap()
}

/// A script whose agents run `AGENT`.
fn edits() -> String {
    let command = format!("python3 - <<'AGENT'\n{AGENT}AGENT\n");
    let input = json!({ "command": command, "description": "the test's edits", "timeout": 600_000 });
    let input: toml::Value = serde_json::from_value(input).unwrap();
    format!(
        "usage = {{ input = 10, output = 20 }}\n[[reply]]\nwhen = {{ turn = 0, tools = true }}\n\
         blocks = [{{ tool = \"Bash\", input = {input} }}]\n[default]\ntext = \"done\"\n"
    )
}

/// Says how long each part took.
struct Watch(Instant);

impl Watch {
    fn lap(&mut self, package: &str, what: &str) {
        eprintln!("{package}: {what}: {} ms", self.0.elapsed().as_millis());
        self.0 = Instant::now();
    }
}

fn changed_by_an_agent(name: &str, files_min: usize) {
    let bare = package(name);
    let mut watch = Watch(Instant::now());
    let world = World::new(&edits());
    let (dir, fresh) = (clone(&world, &bare, "repo"), clone(&world, &bare, "fresh"));
    let files = world.workspace("files", ANN);
    watch.lap(name, "two clones");
    let (hide, mut known) = (hidden(), Known::new());
    let original = tree(&dir, &mut known);
    let count = original.values().filter(|what| !what.starts_with("dir ")).count();
    assert!(count >= files_min, "{name} has {count} files");
    let untouched = sh(&dir, UNTOUCHED);
    watch.lap(name, "looked at");

    let mut spec = spec("work", &dir);
    // A tracked file may have a name that is ignored; under a new name it would only be listed.
    spec["workspace"]["keep_ignored"] = json!(true);
    let id = submit(&world, &spec);
    let events = world.follow(&id);
    let view = world.show(&id);
    assert_eq!(view["outcome"], "succeeded", "{view:#}\n{}", world.log());
    watch.lap(name, &format!("the job ({})", view["totals"]["ran"]["phases_ms"]));
    let said = tool_results(&events);
    let left: Vec<&str> =
        said.split("AGENT-LEFT ").nth(1).unwrap_or_else(|| panic!("{said}")).split(' ').collect();

    // As it was left: in a directory of its own.
    let at = files.join("as-left");
    let out = ann_json(&world, &["checkout", &id, at.to_str().unwrap(), "--json"]);
    assert_eq!(out["left_out"], json!([]), "{out}");
    watch.lap(name, "checkout");
    let as_left = tree(&at, &mut known);
    let (count, hash) = seen_by_agent(&as_left, &hide);
    assert_eq!((count.to_string().as_str(), hash.as_str()), (left[0], left[1]), "what the agent left");
    watch.lap(name, "looked at what was checked out");

    // Shown: each path that is not as it was, and no other.
    let set = ann_json(&world, &["diff", &id, "--json"]);
    assert_eq!(set["summary"]["refused"], 0, "{:#}", set["summary"]);
    let entries = set["entries"].as_array().unwrap().len();
    assert_eq!(entries, differing(&original, &as_left).len(), "{:#}", set["summary"]);

    // With plain git.
    let patch = files.join("job.patch");
    ann(&world, &["export", &id, "-o", patch.to_str().unwrap()]);
    let shown = command(&world, ANN, &["diff", &id, "--patch"]).output().unwrap().stdout;
    assert!(shown == std::fs::read(&patch).unwrap(), "diff --patch and export are not the same");
    sh(&fresh, &format!("umask 022; git apply --index --whitespace=nowarn {}", patch.display()));
    watch.lap(name, "shown, exported, applied by git");
    same("git apply", &tree(&fresh, &mut known), &as_left);
    assert_eq!(sh(&fresh, "git ls-files --others; git diff --name-only"), "", "git knows all of it");
    let of_git = sh(&fresh, "git diff --cached --no-renames --name-only HEAD");
    let named = ann(&world, &["diff", &id, "--name-only"]);
    let (of_git, named): (BTreeSet<_>, BTreeSet<_>) = (of_git.lines().collect(), named.lines().collect());
    assert_eq!(of_git.difference(&named).collect::<Vec<_>>(), [&""; 0]);
    // Directories are named too.
    let is_dir =
        |tree: &Tree, name: &Vec<u8>| tree.get(name).is_none_or(|what: &String| what.starts_with("dir "));
    let dirs = differing(&original, &as_left)
        .into_iter()
        .filter(|name| is_dir(&original, name) && is_dir(&as_left, name));
    assert_eq!(named.len() - of_git.len(), dirs.count(), "{:?}", named.difference(&of_git));
    let figures = sh(&fresh, "git diff --cached -M -l0 --shortstat HEAD");
    let stat = ann(&world, &["diff", &id, "--stat"]);
    assert!(stat.lines().any(|line| line.trim() == figures.trim()), "{figures}: {stat}");
    watch.lap(name, "looked at what git applied");

    // On a branch.
    ann(&world, &["apply", &id, "--branch", "agent/work", "--include-flagged"]);
    assert_eq!(sh(&dir, "git rev-parse agent/work^{tree}"), sh(&fresh, "git write-tree"));
    assert_eq!(sh(&dir, "git log --format=%s main..agent/work | wc -l").trim(), "1");
    watch.lap(name, "a branch");

    // In place, where until now nothing was touched.
    let work_tree = |list: &str| -> Vec<String> {
        list.lines().filter(|line| !line.starts_with("./.git")).map(str::to_owned).collect()
    };
    assert!(work_tree(&sh(&dir, UNTOUCHED)) == work_tree(&untouched), "the original was touched");
    ann(&world, &["apply", &id, "--include-flagged"]);
    watch.lap(name, "applied");
    same("apply", &tree(&dir, &mut known), &as_left);
    let of_hidden = |tree: &Tree| -> Vec<(Vec<u8>, String)> {
        let files =
            tree.iter().filter(|(name, _)| hide.hides(&TreePath::new((*name).clone()).unwrap(), false));
        files.map(|(name, what)| (name.clone(), what.clone())).collect()
    };
    assert_eq!(of_hidden(&as_left), of_hidden(&original), "what the cell never saw is as it was");
    let again = ann_json(&world, &["apply", &id, "--include-flagged", "--check", "--json"]);
    assert_eq!(again["applied"], json!([]));
    assert_eq!(again["already"].as_array().unwrap().len(), entries);
    watch.lap(name, "looked at what was applied");
    world.end();
    watch.lap(name, "the end");
}

/// What is changed each time: names of packages, and how many files they have at least.
const PACKAGES: [(&str, usize); 3] = [("git", 4_000), ("mercurial", 2_000), ("perl", 6_000)];
/// Others, for which there is more time: names with blanks between.
const MORE: &str = "HOTCELL_TEST_PACKAGES";

#[test]
fn debian_source_packages_changed_by_an_agent_come_back_as_it_left_them() {
    for (name, files_min) in PACKAGES {
        changed_by_an_agent(name, files_min);
    }
    for name in std::env::var(MORE).unwrap_or_default().split_whitespace() {
        changed_by_an_agent(name, if name == "linux" { 50_000 } else { 1 });
    }
}
