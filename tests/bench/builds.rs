//! Real projects built and tested in cells, beside the same commands without a cell. `hotcell exec` under `refactor` on
//! one side; on the other the same image's files as a plain directory on the same disk (`docker export`), entered with
//! chroot as a user of its own: the same programs and libraries, with no container, no limits, no overlay and no proxy
//! between, and the same registries on loopback as a mirror by each tool's own settings. What is compared with the bar are
//! the build's and the tests' commands, by a clock beside them; the whole `hotcell exec`, with its cell, its copy of the
//! workspace and its change set, is told too.
//!
//! A cold package cache: nothing is kept by hotcell, and nothing by the tools on the host. A warm one: hotcell kept what
//! an earlier run fetched (a cell's own HOME is always empty), and on the host the tools did, in their HOME. What compilers
//! keep is thrown away before each run.
//!
//! `BENCH_BUILDS` (names of tests/packages/projects.toml, all where absent), `BENCH_BUILDS_N` (runs with a warm cache),
//! `BENCH_BUILDS_GVISOR_N` (of these under gVisor, beside those under runc; none where the engine has it not),
//! `BENCH_EXEC_N` (runs of `true`).

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::registries::Registries;
use crate::report::{Bar, Row, Samples};
use crate::setup::{self, Baselines, UID, docker, output, own_dir, setting};
use crate::world::World;

/// The bar of the project, for a warm package cache.
const TO_HOST_MAX: f64 = 1.10;
/// What compilers keep, below HOME: no package cache.
const BUILD_CACHES: [&str; 1] = [".cache/go-build"];
/// The policy `refactor` under gVisor.
const GVISOR: &str = "gvisor";
/// Printed after a run's commands with their time.
const TOOK: &str = "commands-took-ns:";

/// A project of tests/packages/projects.toml.
struct Project {
    name: String,
    image: String,
    commands: String,
    tests_say: String,
    from: PathBuf,
}

/// The image's files on the host, with the project, HOME and the tools' settings in them.
struct Root {
    dir: PathBuf,
    env: BTreeMap<String, String>,
    /// Files below HOME.
    settings: [(&'static str, String); 2],
    debian: String,
}

/// Milliseconds of one run: of its commands, and of the whole.
struct Run {
    commands_ms: f64,
    whole_ms: f64,
}

#[derive(Default)]
struct Way {
    commands: Samples,
    whole: Samples,
}

impl Way {
    fn take(&mut self, run: &Run) {
        self.commands.push(run.commands_ms);
        self.whole.push(run.whole_ms);
    }
}

/// All projects in turn, then `true`.
pub(crate) fn measure() -> Result<Vec<Row>> {
    let packages = packages()?;
    let hosts = tempfile::tempdir()?;
    let registries = registries(&packages.join("mirror"), hosts.path())?;
    // The same ceiling, with the other runtime required.
    let policy_dir = tempfile::tempdir()?;
    let gvisor = format!("runtime = \"runsc\"\n{}", include_str!("../../policies/refactor.toml"));
    std::fs::write(policy_dir.path().join(format!("{GVISOR}.toml")), gvisor)?;
    let (policies, mirrors) = (policy_dir.path(), registries.mirrors());
    let config = format!("policy_dirs = [{policies:?}]\n{mirrors}[cache]\nfree_bytes_min = 0\n");
    let world = World::with("[default]\ntext = \"nobody asks\"\n", &config);
    let mut rows = Vec::new();
    for project in projects(&packages)? {
        rows.extend(project_rows(&world, &registries, &project)?);
    }
    rows.extend(exec_rows(&world)?);
    world.end();
    Ok(rows)
}

fn packages() -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/packages");
    Ok(output(Command::new(script).stdin(Stdio::null()))?.into())
}

/// Serves the mirror, and beside it two hosts for tools that are pointed at it by settings: an index of Python's packages
/// and one of crates whose links lead to loopback, as those of a mirror would.
fn registries(mirror: &Path, dir: &Path) -> Result<Registries> {
    for host in std::fs::read_dir(mirror)? {
        let host = host?;
        symlink(host.path(), dir.join(host.file_name()))?;
    }
    let registries = Registries::new(dir);
    let simple = dir.join("pypi.bench/simple");
    for package in std::fs::read_dir(mirror.join("pypi.org/simple"))? {
        let package = package?;
        let page = std::fs::read_to_string(package.path().join(".index.html"))?;
        let files = registries.url("files.pythonhosted.org");
        std::fs::create_dir_all(simple.join(package.file_name()))?;
        let page = page.replace("https://files.pythonhosted.org", &files);
        std::fs::write(simple.join(package.file_name()).join(".index.html"), page)?;
    }
    let crates = dir.join("crates.bench");
    std::fs::create_dir(&crates)?;
    for entry in std::fs::read_dir(mirror.join("index.crates.io"))? {
        let entry = entry?;
        if entry.file_name() != "config.json" {
            symlink(entry.path(), crates.join(entry.file_name()))?;
        }
    }
    let download = format!("{}/crates/{{crate}}/{{version}}/download", registries.url("static.crates.io"));
    std::fs::write(crates.join("config.json"), serde_json::json!({ "dl": download }).to_string())?;
    for host in ["pypi.bench", "crates.bench"] {
        registries.add_files(host, &[host]);
    }
    Ok(registries)
}

fn projects(packages: &Path) -> Result<Vec<Project>> {
    let all: toml::Table = toml::from_str(include_str!("../packages/projects.toml"))?;
    let wanted = std::env::var("BENCH_BUILDS").unwrap_or_default();
    let wanted: Vec<&str> = wanted.split_whitespace().collect();
    if let Some(wrong) = wanted.iter().find(|name| !all.contains_key(**name)) {
        bail!("BENCH_BUILDS: there is no project {wrong:?}");
    }
    let named = all.iter().filter(|(name, _)| wanted.is_empty() || wanted.contains(&name.as_str()));
    let project = |(name, project): (&String, &toml::Value)| {
        let text =
            |key: &str| project[key].as_str().map(str::to_owned).with_context(|| format!("{name}.{key}"));
        let from = packages.join("projects").join(name);
        let commands = format!("{} && ({})", text("build")?, text("test")?);
        Ok(Project {
            name: name.clone(),
            image: text("image")?,
            commands,
            tests_say: text("tests_say")?,
            from,
        })
    };
    named.map(project).collect()
}

fn project_rows(world: &World, registries: &Registries, project: &Project) -> Result<Vec<Row>> {
    let n = setting("BENCH_BUILDS_N", 3);
    let runtimes = output(docker().args(["info", "--format", "{{json .Runtimes}}"]))?;
    let gvisor_n = if runtimes.contains("\"runsc\"") { setting("BENCH_BUILDS_GVISOR_N", 1) } else { 0 };
    // On the disk of the cells.
    let root = Root::new(world.path("no-cell"), project, registries)?;
    let workspace = world.path(&project.name);
    copy(&project.from, &workspace)?;
    let [mut cell_cold, mut cell, mut host_cold, mut host, mut gvisor] =
        std::array::from_fn(|_| Way::default());
    let emptied = world.run(&["cache", "rm", "--all"]);
    ensure!(emptied.0 == 0, "the package cache is not emptied: {}", emptied.2);
    cell_cold.take(&in_cell(world, project, &workspace, "refactor")?);
    host_cold.take(&root.run(project, true)?);
    for _ in 0..n {
        cell.take(&in_cell(world, project, &workspace, "refactor")?);
        host.take(&root.run(project, false)?);
    }
    for _ in 0..gvisor_n {
        gvisor.take(&in_cell(world, project, &workspace, GVISOR)?);
    }
    std::fs::remove_dir_all(&workspace)?;
    std::fs::remove_dir_all(&root.dir)?;
    let name = |what: &str| format!("{}: build and test, {what}", project.name);
    let mut rows = vec![
        Row::median(name("warm packages"), &cell.commands, "ms")
            .against("no cell", &host.commands)
            .bar(Bar::RatioAtMost(TO_HOST_MAX)),
        Row::median(name("cold packages"), &cell_cold.commands, "ms").against("no cell", &host_cold.commands),
        Row::median(name("warm, all of `hotcell exec`"), &cell.whole, "ms").against("no cell", &host.whole),
    ];
    if gvisor_n > 0 {
        rows.push(
            Row::median(name("warm, under gVisor"), &gvisor.commands, "ms").against("runc", &cell.commands),
        );
    }
    Ok(rows)
}

/// The commands between two looks at the clock; the project's own code is the last one's.
fn timed(commands: &str) -> String {
    format!("a=$(date +%s%N); ({commands}); code=$?; b=$(date +%s%N); echo {TOOK} $((b-a)); exit $code")
}

fn in_cell(world: &World, project: &Project, workspace: &Path, policy: &str) -> Result<Run> {
    let mut command = world.hotcell();
    command.args(["exec", "-p", policy, "--image", &project.image, "-w"]).arg(workspace);
    command.args(["--", "sh", "-c", &timed(&project.commands)]).stdin(Stdio::null());
    run(&mut command, project)
}

fn run(command: &mut Command, project: &Project) -> Result<Run> {
    // Each from a disk that has nothing to write.
    rustix::fs::sync();
    let begun = Instant::now();
    let output = command.output()?;
    let whole_ms = begun.elapsed().as_secs_f64() * 1000.0;
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = text.lines().collect();
    let last = lines[lines.len().saturating_sub(40)..].join("\n");
    let tail = || format!("{last}\n{}", String::from_utf8_lossy(&output.stderr));
    if !output.status.success() || !text.contains(&project.tests_say) {
        bail!("{} does not build ({}): {}", project.name, output.status, tail());
    }
    let (_, took) = text.rsplit_once(TOOK).with_context(tail)?;
    let nanos: f64 = took.trim().parse()?;
    Ok(Run { commands_ms: nanos / 1e6, whole_ms })
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    output(Command::new("cp").args(["-r", "--no-preserve=ownership"]).arg(from).arg(to))?;
    Ok(())
}

impl Root {
    fn new(dir: PathBuf, project: &Project, registries: &Registries) -> Result<Self> {
        unpack(&project.image, &dir)?;
        let inspect = ["image", "inspect", "--format", "{{json .Config.Env}}", &project.image];
        let of_image = serde_json::from_str::<Option<Vec<String>>>(&output(docker().args(inspect))?)?;
        let pair =
            |pair: String| pair.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        // What the engine gives where the image says nothing, and then what a cell says as well.
        let usual =
            [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("LANG", "C.UTF-8")];
        let mut env: BTreeMap<String, String> = usual.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        env.extend(of_image.unwrap_or_default().into_iter().filter_map(pair));
        let url = |host: &str| registries.url(host);
        let more = [
            ("HOME", "/home/agent".to_owned()),
            // Java asks who the user is, and nobody knows.
            ("JAVA_TOOL_OPTIONS", "-Duser.home=/home/agent".to_owned()),
            ("npm_config_audit", "false".to_owned()),
            ("npm_config_fund", "false".to_owned()),
            ("npm_config_update_notifier", "false".to_owned()),
            ("npm_config_registry", format!("{}/", url("registry.npmjs.org"))),
            ("PIP_INDEX_URL", format!("{}/simple/", url("pypi.bench"))),
            ("GOPROXY", url("proxy.golang.org")),
        ];
        env.extend(more.map(|(name, value)| (name.to_owned(), value)));
        let cargo = format!(
            "[source.crates-io]\nreplace-with = \"bench\"\n[source.bench]\nregistry = \"sparse+{}/\"\n",
            url("crates.bench")
        );
        let maven = format!(
            "<settings><mirrors><mirror><id>bench</id><mirrorOf>central</mirrorOf><url>{}/maven2</url></mirror>\
             </mirrors></settings>",
            url("repo.maven.apache.org")
        );
        let settings = [(".cargo/config.toml", cargo), (".m2/settings.xml", maven)];
        Ok(Self { dir, env, settings, debian: url("deb.debian.org") })
    }

    /// A copy of the project, built and tested; with an empty HOME where that is wanted.
    fn run(&self, project: &Project, cold: bool) -> Result<Run> {
        let at = |path: &str| self.dir.join(path);
        let (home, workspace) = (at("home/agent"), at("workspace"));
        for dir in [&workspace, &at("tmp")] {
            gone(dir)?;
        }
        if cold {
            gone(&home)?;
        }
        for cache in BUILD_CACHES {
            gone(&home.join(cache))?;
        }
        copy(&project.from, &workspace)?;
        own_dir(&at("tmp"))?;
        own_dir(&home)?;
        for (name, text) in &self.settings {
            let file = home.join(name);
            std::fs::create_dir_all(file.parent().context("no directory")?)?;
            std::fs::write(file, text)?;
        }
        // Where a project names a host of packages itself.
        let fetch = workspace.join("fetch-zlib");
        if fetch.exists() {
            let text = std::fs::read_to_string(&fetch)?;
            std::fs::write(&fetch, text.replace("http://deb.debian.org", &self.debian))?;
        }
        output(Command::new("chown").args(["-R", &format!("{UID}:{UID}")]).args([&home, &workspace]))?;
        // The mounts are gone with the process.
        let enter = "mount -t proc proc \"$1/proc\" && mount --rbind /dev \"$1/dev\" && \
                     exec chroot --userspec=\"$2\" \"$1\" env -C /workspace sh -c \"$3\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", enter, "sh"]).arg(&self.dir);
        command.arg(format!("{UID}:{UID}")).arg(timed(&project.commands)).stdin(Stdio::null()).env_clear();
        command.envs(&self.env);
        run(&mut command, project)
    }
}

/// The files of an image as a directory.
fn unpack(image: &str, dir: &Path) -> Result<()> {
    let baselines = Baselines::new();
    std::fs::create_dir(dir)?;
    let id = output(docker().args(["create", "--label", &baselines.label, image, "true"]))?;
    let mut export =
        docker().args(["export", &id]).stdout(Stdio::piped()).spawn().context("docker export")?;
    let files = export.stdout.take().context("no stdout")?;
    let unpacked = Command::new("tar").args(["-x", "-C"]).arg(dir).stdin(files).status()?;
    ensure!(unpacked.success() && export.wait()?.success(), "{image} is not unpacked");
    Ok(())
}

/// Removes a directory, read-only ones within too.
fn gone(dir: &Path) -> Result<()> {
    match dir.symlink_metadata() {
        Ok(_) => Ok(std::fs::remove_dir_all(dir)?),
        Err(_) => Ok(()),
    }
}

/// `true` in a cell, and in a container of the same image.
fn exec_rows(world: &World) -> Result<Vec<Row>> {
    let n = setting("BENCH_EXEC_N", 12);
    let (image, baselines) = (setup::image_id(world)?, Baselines::new());
    let (mut cell, mut run) = (Samples::default(), Samples::default());
    for round in 0..=n {
        let mut ours = world.hotcell();
        ours.args(["exec", "-p", "refactor", "--", "true"]).stdin(Stdio::null());
        let mut theirs = docker();
        theirs.args(["run", "--rm", "--label", &baselines.label, &image, "true"]);
        for (command, samples) in [(&mut ours, &mut cell), (&mut theirs, &mut run)] {
            let begun = Instant::now();
            output(command)?;
            if round > 0 {
                samples.push(begun.elapsed().as_secs_f64() * 1000.0);
            }
        }
    }
    Ok(vec![Row::median("hotcell exec true", &cell, "ms").against("docker run --rm", &run)])
}
