//! The kernel and the host from inside a cell, tried by an agent.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};

use serde_json::{Value, json};

use super::{run, world};

#[track_caller]
fn all(of: &Value, expected: &[&str]) {
    for (what, outcome) in of.as_object().unwrap() {
        assert!(outcome.as_str().is_some_and(|o| expected.contains(&o)), "{what}: {outcome}");
    }
}

#[test]
fn the_kernel_gives_no_more_and_the_hosts_sockets_are_out_of_reach() {
    // Those who would answer: an abstract socket of each kind, and a port on loopback.
    let name = format!("hotcell-zoo-{}", std::process::id());
    let stream = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let datagrams =
        UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(format!("{name}-d")).unwrap()).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    stream.set_nonblocking(true).unwrap();
    datagrams.set_nonblocking(true).unwrap();
    port.set_nonblocking(true).unwrap();
    let world = world();
    let number = port.local_addr().unwrap().port();
    let seen = run(&world, &format!("python3 kernel.py {name} {number}"), &json!({}));
    seen.succeeded();
    all(seen.get("foreign"), &["SIGSYS"]);
    for (what, outcome) in seen.get("spaces").as_object().unwrap() {
        let expected: &[&str] = match what.as_str() {
            _ if what.starts_with("clone3") => &["ENOSYS"],
            _ if what.starts_with("write") => &["EPERM", "EACCES", "EROFS"],
            _ => &["EPERM", "EACCES", "ENOSYS"],
        };
        assert!(expected.contains(&outcome.as_str().unwrap()), "{what}: {outcome}");
    }
    all(seen.get("setuid"), &["EPERM", "ENOSYS", "EACCES", "EINVAL"]);
    let cgroup = seen.get("cgroup");
    assert_eq!((&cgroup["own"], &cgroup["writable"]), (&json!(["/"]), &json!([])), "{cgroup}");
    for what in ["mkdir", "release_agent", "mount", "proc sys"] {
        let outcome = cgroup[what].as_str().unwrap();
        assert!(["EPERM", "EACCES", "EROFS", "ENOENT"].contains(&outcome), "{what}: {outcome}");
    }
    all(seen.get("host"), &["ECONNREFUSED", "EADDRNOTAVAIL", "ENETUNREACH", "ENOENT", "EACCES"]);
    for (path, content) in seen.get("knows").as_object().unwrap() {
        assert!(*content == json!("") || *content == json!(false), "{path} shows {content}");
    }
    let nobody = std::io::ErrorKind::WouldBlock;
    assert_eq!(stream.accept().unwrap_err().kind(), nobody);
    assert_eq!(datagrams.recv(&mut [0; 8]).unwrap_err().kind(), nobody);
    assert_eq!(port.accept().unwrap_err().kind(), nobody);
    world.end();
}
