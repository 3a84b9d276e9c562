//! The daemon as a service: the test plays systemd, by the protocols that sd_notify(3), sd_listen_fds(3) and
//! systemd.unit(5) describe.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::fake_agent::{done, spec, until_event, world};
use crate::world::{PATIENCE, World};

/// What the daemon tells its manager.
struct Manager(UnixDatagram);

impl Manager {
    fn of(world: &mut World) -> Self {
        let path = world.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        world.daemon_env.push(("NOTIFY_SOCKET".to_owned(), path.to_str().unwrap().to_owned()));
        Self(socket)
    }

    /// What comes until `enough`, in order.
    fn until(&self, enough: impl Fn(&[String]) -> bool) -> Vec<String> {
        let until = Instant::now() + PATIENCE;
        let mut told = Vec::new();
        while !enough(&told) {
            assert!(Instant::now() < until, "{told:?}");
            told.extend(self.next());
        }
        told
    }

    fn next(&self) -> Option<String> {
        let mut buffer = [0; 4096];
        let count = self.0.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..count]).into_owned())
    }

    /// What comes in this time.
    fn during(&self, time: Duration) -> Vec<String> {
        let until = Instant::now() + time;
        std::iter::from_fn(|| (Instant::now() < until).then(|| self.next())).flatten().collect()
    }
}

fn has(told: &[String], line: &str) -> bool {
    told.iter().any(|message| message.lines().any(|l| l == line))
}

#[test]
fn systemd_hears_that_the_daemon_serves_lives_reads_its_files_again_and_ends() {
    let mut world = world("limits.slots = 1\n");
    world.terminate();
    let manager = Manager::of(&mut world);
    world.daemon_env.push(("WATCHDOG_USEC".to_owned(), "600000".to_owned()));
    world.start();
    let told = manager.until(|told| told.iter().filter(|m| m.contains("WATCHDOG=1")).count() >= 3);
    assert_eq!(told[0].lines().next(), Some("READY=1"), "{told:?}");
    let running = world.submit(&spec("print 1 1; sleep 600"));
    let waiting = world.submit(&spec("sleep 600"));
    until_event(&mut world, &running, "\"n\":0");
    manager.until(|told| has(told, "STATUS=serving: 1 running, 1 waiting, 0 parked, 0 over"));

    world.send(Signal::HUP);
    let told = manager.until(|told| has(told, "RELOADING=1"));
    let since = told.iter().flat_map(|m| m.lines()).find_map(|l| l.strip_prefix("MONOTONIC_USEC="));
    assert!(since.is_some_and(|usec| usec.parse::<u64>().is_ok_and(|usec| usec > 0)), "{told:?}");
    manager.until(|told| has(told, "READY=1"));

    // A process that stands still says nothing: nobody says it for it.
    world.send(Signal::STOP);
    manager.during(Duration::from_millis(300));
    assert_eq!(manager.during(Duration::from_millis(800)), [] as [String; 0]);
    world.send(Signal::CONT);
    manager.until(|told| told.iter().any(|m| m.contains("WATCHDOG=1")));

    world.send(Signal::QUIT);
    let told = manager.until(|told| has(told, "STOPPING=1"));
    assert!(has(&told, "STATUS=detaching"), "{told:?}");
    assert!(
        told.iter().any(|m| m.contains("EXTEND_TIMEOUT_USEC=")),
        "systemd waits as long as a drain takes: {told:?}"
    );
    world.ended();
    world.start();
    manager.until(|told| has(told, "READY=1"));
    for job in [waiting, running] {
        assert!(matches!(world.call("POST", &format!("/v1/jobs/{job}/cancel"), "").status, 200 | 202));
        done(&mut world, &job);
    }
    world.end();
}

#[test]
fn the_socket_that_systemd_holds_is_served_over_restarts_and_stays_its_own() {
    let mut world = world("");
    world.terminate();
    // Of systemd's making: its place, its mode.
    let path = world.socket();
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o660)).unwrap();
    let inode = |path: &std::path::Path| {
        let meta = std::fs::symlink_metadata(path).unwrap();
        (std::os::unix::fs::MetadataExt::ino(&meta), meta.permissions().mode() & 0o777)
    };
    let was = inode(&path);
    world.handed_over = Some(listener.into());
    world.start();
    let job = world.submit(&spec("print 2 2"));
    assert_eq!(done(&mut world, &job).1["outcome"], "succeeded");
    world.terminate();
    assert_eq!(inode(&path), was, "the socket is not the daemon's to remove or to make anew");
    // Who connects while nobody serves is answered by the next daemon.
    let mut show = world.hotcell();
    let mut waiting = show.args(["show", "--json", &job]).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(waiting.try_wait().unwrap(), None, "nobody is there to answer");
    world.start();
    let answer = waiting.wait_with_output().unwrap();
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stdout));
    world.terminate();
    world.handed_over = None;
    std::fs::remove_file(&path).unwrap();
    world.start();
    world.end();
}

#[test]
fn what_is_no_listening_socket_is_refused_by_name() {
    let mut world = World::without_daemon("[default]\ntext = \"never asked\"\n", "");
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    for (fd, words) in [(one.into(), "no unix stream socket that listens"), (file.into(), "is no socket")] {
        world.handed_over = Some(fd);
        let log = world.refuses_to_start();
        assert!(log.contains("LISTEN_FDS") && log.contains(words), "{log}");
    }
    world.handed_over = None;
    world.start();
    world.end();
}

#[test]
fn the_units_are_written_once_kept_where_changed_and_understood_by_systemd() {
    let dir = tempfile::Builder::new().prefix("hc-").tempdir_in("/var/tmp").unwrap();
    let world = World::without_daemon("[default]\ntext = \"never asked\"\n", "");
    let units = dir.path().to_str().unwrap();
    let install = |more: &[&str]| {
        let config = world.path("config.toml");
        let args = [
            &["install", "--systemd", "--json", "--units", units, "--config", config.to_str().unwrap()],
            more,
        ];
        let (code, stdout, _) = world.run(&args.concat());
        (code, serde_json::from_str::<serde_json::Value>(&stdout).unwrap())
    };
    let states = |answer: &serde_json::Value| {
        let units = answer["units"].as_array().unwrap();
        units.iter().map(|unit| unit["state"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let (code, planned) = install(&["--dry-run"]);
    assert_eq!((code, states(&planned)), (0, vec!["would_be_written".to_owned(); 2]));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let (code, written) = install(&[]);
    assert_eq!(
        (code, states(&written), &written["configuration"]),
        (0, vec!["written".to_owned(); 2], &serde_json::Value::Null)
    );
    assert_eq!(states(&install(&[]).1), ["unchanged", "unchanged"]);
    let service = dir.path().join("hotcell.service");
    let socket = std::fs::read_to_string(dir.path().join("hotcell.socket")).unwrap();
    assert!(
        socket.contains(&format!("ListenStream={}\n", world.socket().display()))
            && socket.contains("SocketMode=0666\n")
    );
    let checked =
        Command::new("systemd-analyze").arg("verify").arg(&service).output().expect("systemd-analyze");
    // Of units of this machine it may say more.
    let said = String::from_utf8_lossy(&checked.stderr);
    let ours: Vec<&str> =
        said.lines().filter(|line| line.contains(units) && !line.contains("world-writable")).collect();
    assert!(ours.is_empty(), "{said}");

    let changed = std::fs::read_to_string(&service).unwrap().replace("WatchdogSec=60", "WatchdogSec=5");
    std::fs::write(&service, &changed).unwrap();
    let (code, refused) = install(&[]);
    assert!(
        code == 2 && refused["error"]["message"].as_str().unwrap().contains("hotcell.service"),
        "{refused}"
    );
    assert_eq!(std::fs::read_to_string(&service).unwrap(), changed);
    assert_eq!(states(&install(&["--force"]).1), ["unchanged", "written"]);
}
