//! git itself, cloning from a server that wants a token which git does not have.

use std::path::Path;
use std::process::{Output, Stdio};

use super::*;

/// `x-access-token` with the token, as git servers want it.
pub(super) const BASIC: &str = "Basic eC1hY2Nlc3MtdG9rZW46Y2FuYXJ5LXRva2VuLTkxYzE=";

/// A file of the repository, for whoever has the token.
pub(super) fn file(world: &World, name: &str, authorization: &str) -> Response<Full<Bytes>> {
    let build = Response::builder();
    let repository = world.repository.lock().unwrap().clone();
    let Some(repository) = repository.filter(|_| authorization == BASIC) else {
        return build.status(401).header("www-authenticate", "Basic realm=x").body(Full::default()).unwrap();
    };
    match std::fs::read(repository.join(name)) {
        Ok(bytes) => build.body(Full::from(bytes)).unwrap(),
        Err(_) => build.status(404).body(Full::default()).unwrap(),
    }
}

async fn git(dir: &Path, args: &[&str], variables: &[(&str, String)]) -> Output {
    let mut command = tokio::process::Command::new("git");
    command.current_dir(dir).args(args).stdin(Stdio::null()).env_clear();
    command.envs(std::env::var_os("PATH").map(|path| ("PATH", path))).env("HOME", dir);
    command.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_TERMINAL_PROMPT", "0");
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    command.output().await.expect("git")
}

async fn repository(dir: &Path) -> std::path::PathBuf {
    let work = dir.join("work");
    std::fs::create_dir(&work).unwrap();
    std::fs::write(work.join("README"), "private\n").unwrap();
    for args in [
        &["init", "-q", "-b", "main"][..],
        &["add", "README"],
        &["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one"],
        &["clone", "-q", "--bare", ".", "../repo.git"],
        &["-C", "../repo.git", "update-server-info"],
    ] {
        let output = git(&work, args, &[]).await;
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    dir.join("repo.git")
}

#[tokio::test]
async fn it_clones_with_a_token_that_it_never_sees() {
    let rules = rule(
        "git.example",
        "inspect = true\nmethods = [\"GET\"]\npaths = [\"/repo.git/**\"]\ncredential = \"git\"",
    );
    let mut cell = Cell::new(&rules).await;
    cell.https(443, &["git.example"]).await;
    cell.name("git.example", &[&[PUBLIC]]);
    let home = tempfile::tempdir().unwrap();
    *cell.world.repository.lock().unwrap() = Some(repository(home.path()).await);
    std::fs::write(home.path().join("ca.pem"), cell.ca.certificate_pem()).unwrap();
    // What init does in a cell: TCP on loopback to the socket.
    let bridge = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = format!("http://{}", bridge.local_addr().unwrap());
    let socket = cell.dir.path().join(SOCKET);
    cell.tasks.spawn(async move {
        while let Ok((mut stream, _)) = bridge.accept().await {
            let socket = socket.clone();
            tokio::spawn(async move {
                let mut door = UnixStream::connect(socket).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut door).await;
            });
        }
    });
    let ca = home.path().join("ca.pem").to_string_lossy().into_owned();
    let variables = [("https_proxy", proxy), ("GIT_SSL_CAINFO", ca), ("GIT_CURL_VERBOSE", "1".to_owned())];
    let output = git(home.path(), &["clone", "https://git.example/repo.git", "clone"], &variables).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(std::fs::read_to_string(home.path().join("clone/README")).unwrap(), "private\n");
    assert!(!said.contains("eC1hY2Nlc3M") && !said.contains(TOKEN), "{said}");
    assert!(cell.seen().iter().all(|seen| seen.authorization == [BASIC]), "{:?}", cell.seen());
    let output = git(home.path(), &["clone", "https://git.example/other.git", "other"], &variables).await;
    assert!(!output.status.success(), "another repository is not within the paths");
    assert!(cell.seen().iter().all(|seen| !seen.head.contains("other.git")), "{:?}", cell.seen());
    let event = cell.event().await;
    assert_eq!((event.credential.as_deref(), event.allowed), (Some("git"), true), "{event:?}");
    cell.end().await;
}
