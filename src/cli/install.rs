//! `hotcell install --systemd`: writes the units by which systemd runs the daemon. It must never change a unit that a
//! person changed, unless they say so, and never start or enable anything itself.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;

use super::Context;
use super::fail::{CliError, ExitCode};
use super::render::{Style, Text};
use super::serve::ConfigFlags;
use crate::config::Config;

/// Where units of the machine's administrator are.
const UNITS: &str = "/etc/systemd/system";
/// What the units are where the configuration says nothing else.
const SOCKET: &str = "/run/hotcell/hotcell.sock";

/// Have systemd run the daemon: write its units (as root)
#[derive(Debug, Args)]
#[command(after_help = "\
Writes hotcell.service and hotcell.socket, and tells what to do next; starts nothing. The service
runs this very program with the configuration given here. `systemctl stop` and `restart` detach:
cells go on, and the next start adopts them; `hotcell drain` before lets jobs end.")]
pub(super) struct InstallArgs {
    /// The units of systemd
    #[arg(long, required = true)]
    systemd: bool,
    /// Directory of the units
    #[arg(long, value_name = "DIR", default_value = UNITS)]
    units: PathBuf,
    /// Write nothing, only tell what would be written
    #[arg(long)]
    dry_run: bool,
    /// Replace units that were changed
    #[arg(long)]
    force: bool,
    /// Print the answer as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    config: ConfigFlags<File>,
}

/// Only the file: what else the daemon is to know belongs into it.
#[derive(Debug, Clone)]
pub(super) struct File;

impl super::serve::Concerns for File {
    fn has(_: &str) -> bool {
        false
    }
}

/// What the command did.
#[derive(Debug, Serialize)]
struct Installed {
    units: Vec<Unit>,
    /// What is wrong with the configuration, where it cannot be used yet.
    configuration: Option<String>,
    next: Vec<String>,
}

/// One unit.
#[derive(Debug, Serialize)]
struct Unit {
    path: PathBuf,
    state: Standing,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

/// What is in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Standing {
    Written,
    Unchanged,
    WouldBeWritten,
    WouldBeReplaced,
}

/// What the units are made from.
#[derive(Debug, Clone)]
struct Service {
    program: PathBuf,
    config: Option<PathBuf>,
    socket: PathBuf,
    mode: u32,
    group: Option<u32>,
}

pub(super) fn install(args: &InstallArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    debug_assert!(args.systemd, "clap requires it");
    let flags = args.config.flags();
    let program = std::env::current_exe().context("this program's path").map_err(CliError::Local)?;
    let (mut service, configuration) = match Config::load(&flags, &context.machine) {
        Ok(config) => {
            let (config_file, group) = (config.file.clone(), config.socket_group);
            let service = Service {
                program,
                config: config_file,
                socket: config.socket,
                mode: config.socket_mode,
                group,
            };
            (service, None)
        }
        Err(error) => {
            let config = flags.config.clone();
            (
                Service { program, config, socket: SOCKET.into(), mode: 0o600, group: None },
                Some(error.to_string()),
            )
        }
    };
    service.config = service.config.map(|path| std::path::absolute(&path).unwrap_or(path));
    for path in [Some(&service.program), service.config.as_ref(), Some(&service.socket)].into_iter().flatten()
    {
        plain(path)?;
    }
    let units = [("hotcell.socket", service.socket_unit()), ("hotcell.service", service.service_unit())];
    let units = place(args, units).map_err(|error| match error {
        Place::Changed(path) => CliError::usage_hint(
            format!(
                "{} is there and differs from what would be written; nothing was written",
                path.display()
            ),
            "`--dry-run --json` shows the new text, `--force` replaces it",
        ),
        Place::Io(error) => CliError::Local(error),
    })?;
    let next = [
        "systemctl daemon-reload",
        "systemctl enable --now hotcell.socket hotcell.service",
        "hotcell doctor",
    ];
    let installed = Installed { units, configuration, next: next.map(str::to_owned).to_vec() };
    if args.json {
        context.out.json(&installed)?;
        return Ok(ExitCode::Succeeded);
    }
    let mut text = Text::new(context.out.paint);
    for unit in &installed.units {
        let (style, words) = match unit.state {
            Standing::Written => (Style::Good, "written"),
            Standing::Unchanged => (Style::Plain, "as it is to be"),
            Standing::WouldBeWritten => (Style::Plain, "would be written"),
            Standing::WouldBeReplaced => (Style::Warn, "would be replaced (with --force)"),
        };
        text = text.plain(&format!("{}  ", unit.path.display())).add(style, words).end();
    }
    if let Some(problem) = &installed.configuration {
        text = text.add(Style::Warn, &format!("the configuration cannot be used yet: {problem}")).end();
    }
    for command in &installed.next {
        text = text.add(Style::Dim, "next: ").plain(command).end();
    }
    context.out.print(&text)?;
    Ok(ExitCode::Succeeded)
}

/// Why the units are not in their place.
enum Place {
    Changed(PathBuf),
    Io(anyhow::Error),
}

/// Looks at all, then writes all.
fn place(args: &InstallArgs, units: [(&str, String); 2]) -> Result<Vec<Unit>, Place> {
    let mut planned = Vec::new();
    for (name, text) in units {
        let path = args.units.join(name);
        let state = match std::fs::read(&path) {
            Ok(there) if there == text.as_bytes() => Standing::Unchanged,
            Ok(_) if args.dry_run => Standing::WouldBeReplaced,
            Ok(_) if !args.force => return Err(Place::Changed(path)),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Place::Io(
                    anyhow::Error::new(error).context(format!("cannot read {}", path.display())),
                ));
            }
            Ok(_) | Err(_) if args.dry_run => Standing::WouldBeWritten,
            Ok(_) | Err(_) => Standing::Written,
        };
        planned.push((path, state, text));
    }
    let write = |(path, state, text): (PathBuf, Standing, String)| {
        if state == Standing::Written {
            write_whole(&path, &text)?;
        }
        Ok(Unit { path, state, text: args.dry_run.then_some(text) })
    };
    planned.into_iter().map(write).collect::<anyhow::Result<_>>().map_err(Place::Io)
}

fn write_whole(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let failed = || format!("cannot write {}", path.display());
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::NamedTempFile::new_in(dir).with_context(failed)?;
    file.write_all(text.as_bytes()).with_context(failed)?;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644)).with_context(failed)?;
    file.as_file().sync_all().with_context(failed)?;
    file.persist(path).with_context(failed)?;
    Ok(())
}

/// A unit's own characters in a path would mean something else there.
fn plain(path: &Path) -> Result<(), CliError> {
    let text = path
        .to_str()
        .filter(|text| !text.contains(['%', '"', '\\', '$']) && !text.contains(char::is_whitespace));
    match text {
        Some(_) => Ok(()),
        None => Err(CliError::usage(format!(
            "{}: a path with spaces, %, $, quotes or backslashes cannot stand in a unit",
            path.display()
        ))),
    }
}

impl Service {
    fn service_unit(&self) -> String {
        let config =
            self.config.as_ref().map(|path| format!(" --config {}", path.display())).unwrap_or_default();
        format!(
            "\
# Written by `hotcell install --systemd`.
[Unit]
Description=hotcell: coding agents in disposable containers
After=docker.service network-online.target hotcell.socket
Wants=docker.service network-online.target
Requires=hotcell.socket

[Service]
Type=notify
NotifyAccess=main
ExecStart={program} serve{config}
# Policies, prices and credentials are read again.
ExecReload=/bin/kill -HUP $MAINPID
# Stop and restart detach: cells go on, and the next start adopts them. `hotcell drain` before lets jobs end.
KillSignal=SIGQUIT
# Cells are the engine's processes and not in this unit; what is left in it are hooks of a daemon that is gone.
KillMode=mixed
TimeoutStopSec=40
TimeoutStartSec=300
WatchdogSec=60
Restart=on-failure
RestartSec=1
LimitNOFILE=1048576
# A core would hold credentials.
LimitCORE=0
OOMScoreAdjust=-500
# The mounts that the daemon stages are the engine's to bind: both must see one mount namespace. So there is no
# PrivateTmp=, ProtectSystem=, ProtectHome=, PrivateDevices= or ReadWritePaths= here; each would make another one.

[Install]
WantedBy=multi-user.target
Also=hotcell.socket
",
            program = self.program.display(),
        )
    }

    fn socket_unit(&self) -> String {
        let group = self.group.map(|group| format!("SocketGroup={group}\n")).unwrap_or_default();
        format!(
            "\
# Written by `hotcell install --systemd`.
[Unit]
Description=hotcell's socket: who connects while the daemon is replaced waits

[Socket]
ListenStream={socket}
SocketMode={mode:04o}
{group}DirectoryMode=0755
RemoveOnStop=true

[Install]
WantedBy=sockets.target
",
            socket = self.socket.display(),
            mode = self.mode,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> Service {
        Service {
            program: "/usr/local/bin/hotcell".into(),
            config: Some("/etc/hotcell/config.toml".into()),
            socket: SOCKET.into(),
            mode: 0o660,
            group: Some(990),
        }
    }

    #[test]
    fn the_units_say_how_the_daemon_is_started_and_stopped() {
        insta::assert_snapshot!("service_unit", service().service_unit());
        insta::assert_snapshot!("socket_unit", service().socket_unit());
    }

    #[test]
    fn the_daemon_shares_the_engines_mount_namespace() {
        let unit = service().service_unit();
        let settings =
            unit.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('='));
        // Those of systemd.exec(5) that make a mount namespace.
        let apart = [
            "Private",
            "Protect",
            "ReadOnly",
            "ReadWrite",
            "Inaccessible",
            "Bind",
            "Root",
            "Temporary",
            "Mount",
        ];
        for (key, _) in settings {
            assert!(!apart.iter().any(|word| key.starts_with(word)), "{key}");
        }
    }

    #[test]
    fn a_path_that_a_unit_would_read_otherwise_is_refused() {
        for bad in ["/opt/my hotcell/bin", "/opt/%h", "/a$b", "/a\"b", "/a\\b"] {
            assert!(plain(Path::new(bad)).is_err(), "{bad}");
        }
        assert!(plain(Path::new("/usr/local/bin/hotcell")).is_ok());
    }
}
