//! Finds the engine: an address that was named (flag or configuration, `HOTCELL_ENGINE`, `DOCKER_HOST`), else
//! the first of the usual sockets that answers. `.ci/engine` searches in the same order; change both.
//! A named address that does not answer is an error and never passed over: the person meant that one.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::EngineError;

/// Socket of the private engine that `make engine` starts where there is no other.
pub const PRIVATE_SOCKET: &str = "/run/hotcell/engine.sock";
/// An engine that accepts a connection must answer a ping within this time.
const PING_MS_MAX: u64 = 5_000;

/// The address of an engine that answers, as `unix:///path`: `explicit` (flag or configuration), then
/// `HOTCELL_ENGINE`, `DOCKER_HOST`, our private socket, Docker's, Podman's. Blocks for up to five seconds
/// per socket that accepts and stays silent.
///
/// # Errors
/// `UnsupportedAddress` for a named address that is no unix socket; `Unavailable` where none answers,
/// saying which were tried and what each said.
pub fn find_address(explicit: Option<&str>) -> Result<String, EngineError> {
    search(explicit, &|name| std::env::var(name).ok(), &|path| ping(path))
}

type Env<'a> = &'a dyn Fn(&str) -> Option<String>;
type Ping<'a> = &'a dyn Fn(&Path) -> Result<(), String>;

fn search(explicit: Option<&str>, env: Env<'_>, ping: Ping<'_>) -> Result<String, EngineError> {
    let set = |name: &str| env(name).filter(|value| !value.is_empty());
    let named = explicit
        .map(|address| (address.to_owned(), "named by --engine or the configuration"))
        .or_else(|| set("HOTCELL_ENGINE").map(|address| (address, "named by HOTCELL_ENGINE")))
        .or_else(|| set("DOCKER_HOST").map(|address| (address, "named by DOCKER_HOST")));
    if let Some((address, source)) = named {
        let path = socket_path(&address)?;
        return match ping(Path::new(path)) {
            Ok(()) => Ok(format!("unix://{path}")),
            Err(detail) => Err(EngineError::Unavailable { address, detail: format!("{source}: {detail}") }),
        };
    }
    let mut tried = Vec::new();
    for path in usual_sockets(set("XDG_RUNTIME_DIR").as_deref()) {
        match ping(Path::new(&path)) {
            Ok(()) => return Ok(format!("unix://{path}")),
            Err(detail) => tried.push(format!("{path}: {detail}")),
        }
    }
    Err(EngineError::Unavailable { address: "any usual socket".to_owned(), detail: tried.join("; ") })
}

/// The path in a `unix:///path` address; a bare absolute path is taken too.
pub(super) fn socket_path(address: &str) -> Result<&str, EngineError> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    if path.starts_with('/') {
        return Ok(path);
    }
    Err(EngineError::UnsupportedAddress { address: address.to_owned() })
}

fn usual_sockets(runtime_dir: Option<&str>) -> Vec<String> {
    let mut sockets = vec![PRIVATE_SOCKET.to_owned(), "/var/run/docker.sock".to_owned()];
    if let Some(dir) = runtime_dir {
        sockets.push(format!("{dir}/docker.sock"));
        sockets.push(format!("{dir}/podman/podman.sock"));
    }
    sockets.push("/run/podman/podman.sock".to_owned());
    sockets
}

/// One `GET /_ping` over the socket: the endpoint that all Docker-compatible engines have.
fn ping(path: &Path) -> Result<(), String> {
    let say = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::PermissionDenied => "permission denied (join the socket's group)".to_owned(),
        std::io::ErrorKind::NotFound => "no such socket".to_owned(),
        _ => e.to_string(),
    };
    let mut stream = UnixStream::connect(path).map_err(say)?;
    let limit = Some(Duration::from_millis(PING_MS_MAX));
    stream.set_read_timeout(limit).map_err(say)?;
    stream.set_write_timeout(limit).map_err(say)?;
    stream.write_all(b"GET /_ping HTTP/1.0\r\nHost: engine\r\n\r\n").map_err(say)?;
    let mut head = [0_u8; 12];
    stream.read_exact(&mut head).map_err(|e| format!("no answer to a ping: {e}"))?;
    match &head {
        [b'H', b'T', b'T', b'P', b'/', _, b'.', _, b' ', b'2', b'0', b'0'] => Ok(()),
        _ => Err(format!("answered {:?} to a ping", String::from_utf8_lossy(&head))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only<'a>(answering: &'a [&'a str]) -> impl Fn(&Path) -> Result<(), String> + 'a {
        |path| match answering.iter().any(|a| Path::new(a) == path) {
            true => Ok(()),
            false => Err("no such socket".to_owned()),
        }
    }

    #[test]
    fn a_named_engine_wins_in_the_documented_order() {
        let env = |name: &str| match name {
            "HOTCELL_ENGINE" => Some("unix:///b".to_owned()),
            "DOCKER_HOST" => Some("unix:///c".to_owned()),
            _ => None,
        };
        let all = only(&["/a", "/b", "/c", PRIVATE_SOCKET]);
        assert_eq!(search(Some("unix:///a"), &env, &all).as_deref(), Ok("unix:///a"));
        assert_eq!(search(Some("/a"), &env, &all).as_deref(), Ok("unix:///a"));
        assert_eq!(search(None, &env, &all).as_deref(), Ok("unix:///b"));
        let docker_host = |name: &str| (name == "DOCKER_HOST").then(|| "unix:///c".to_owned());
        assert_eq!(search(None, &docker_host, &all).as_deref(), Ok("unix:///c"));
    }

    #[test]
    fn a_named_engine_that_is_silent_is_not_passed_over() {
        let env = |name: &str| (name == "HOTCELL_ENGINE").then(|| "unix:///dead".to_owned());
        let error = search(None, &env, &only(&[PRIVATE_SOCKET])).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("/dead") && text.contains("HOTCELL_ENGINE") && text.contains("make engine"),
            "{text}"
        );
    }

    #[test]
    fn sockets_are_tried_private_first_podman_last() {
        let env = |name: &str| (name == "XDG_RUNTIME_DIR").then(|| "/run/user/7".to_owned());
        let found = |answering: &[&str]| search(None, &env, &only(answering)).unwrap();
        assert_eq!(found(&["/var/run/docker.sock", PRIVATE_SOCKET]), format!("unix://{PRIVATE_SOCKET}"));
        assert_eq!(
            found(&["/run/user/7/podman/podman.sock", "/var/run/docker.sock"]),
            "unix:///var/run/docker.sock"
        );
        assert_eq!(found(&["/run/podman/podman.sock"]), "unix:///run/podman/podman.sock");
    }

    #[test]
    fn an_engine_on_another_machine_is_refused_by_name() {
        let none = |_: &str| None;
        let error = search(Some("tcp://10.0.0.1:2375"), &none, &only(&[])).unwrap_err();
        assert!(matches!(error, EngineError::UnsupportedAddress { .. }));
    }

    #[test]
    fn without_any_engine_the_error_lists_what_was_tried() {
        let none = |_: &str| None;
        let text = search(None, &none, &only(&[])).unwrap_err().to_string();
        assert!(
            text.contains(PRIVATE_SOCKET) && text.contains("docker.sock") && text.contains("podman"),
            "{text}"
        );
    }
}
