//! Real projects build and test from package registries that this process serves on loopback (see
//! tests/packages/README.md): what is fetched, and what is not fetched twice.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

mod projects;
pub(crate) mod server;

use server::{Behaviour, Registries};

/// What `.ci/packages` made; it fetches where that was not done yet.
pub(crate) fn packages() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/packages");
    let output = Command::new(&script).output().expect("bash");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}:\n{said}", script.display());
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// Status, body and one header of a GET.
#[track_caller]
fn get(url: &str, more: &[&str]) -> (u16, Vec<u8>) {
    let output =
        Command::new("curl").args(["-sS", "-m", "20", "-w", "\n%{http_code}"]).args(more).arg(url).output();
    let mut body = output.expect("curl").stdout;
    let status = body.split_off(body.len() - 3);
    body.pop();
    (String::from_utf8(status).unwrap().parse().unwrap(), body)
}

#[test]
fn the_registries_of_the_tests_answer_as_public_ones_do() {
    let packages = packages();
    let registries = Registries::new(&packages.join("mirror"));
    let npm = registries.url("registry.npmjs.org");
    let (status, packument) = get(&format!("{npm}/@ljharb%2fnow"), &[]);
    assert_eq!(status, 200);
    let packument: serde_json::Value = serde_json::from_slice(&packument).unwrap();
    assert_eq!(packument["name"], "@ljharb/now");
    let simple = format!("{}/simple/flit-core/", registries.url("pypi.org"));
    let (_, page) = get(&simple, &[]);
    assert!(String::from_utf8(page).unwrap().contains("https://files.pythonhosted.org/packages/"));
    assert_eq!(get(&format!("{npm}/none-such"), &[]).0, 404);

    // What is known already is not sent again.
    let module = format!("{}/github.com/davecgh/go-spew/@v/v1.1.1.mod", registries.url("proxy.golang.org"));
    let (status, head) = get(&module, &["-I"]);
    let head = String::from_utf8(head).unwrap();
    assert_eq!(status, 200, "{head}");
    let tag = head.lines().find_map(|l| l.strip_prefix("etag: ")).unwrap().trim();
    assert_eq!(get(&module, &["-H", &format!("If-None-Match: {tag}")]), (304, Vec::new()));

    // A private one names itself, and wants to know who asks.
    registries.add_files("pypi.corp.example", &["pypi.org", "files.pythonhosted.org"]);
    registries.set("pypi.corp.example", "/", Behaviour::Wants("Bearer one".into()));
    let private = format!("{}/simple/flit-core/", registries.url("pypi.corp.example"));
    assert_eq!(get(&private, &[]).0, 401);
    let (status, page) = get(&private, &["-H", "Authorization: Bearer one"]);
    let page = String::from_utf8(page).unwrap();
    assert_eq!(status, 200);
    let link =
        page.split('"').find_map(|part| part.strip_prefix("https://pypi.corp.example/")).expect("a link");
    let link = format!("{}/{}", registries.url("pypi.corp.example"), link.split('#').next().unwrap());
    assert_eq!(get(&link, &["-H", "Authorization: Bearer one"]).0, 200);

    // Others' misbehaviour.
    registries.set("registry.npmjs.org", "/qs", Behaviour::Instead(b"poison".to_vec()));
    assert_eq!(get(&format!("{npm}/qs"), &[]), (200, b"poison".to_vec()));
    registries.set("registry.npmjs.org", "/qs", Behaviour::Hang);
    assert_eq!(get(&format!("{npm}/qs"), &["-m", "0.2"]).0, 0);
    registries.behave();
    registries.set("registry.npmjs.org", "/qs", Behaviour::Status(503));
    assert_eq!(get(&format!("{npm}/qs"), &[]).0, 503);
    registries.behave();
    registries.set("registry.npmjs.org", "/qs", Behaviour::Slow(Duration::from_millis(50)));
    let start = Instant::now();
    assert_eq!(get(&format!("{npm}/qs"), &[]).0, 200);
    assert!(start.elapsed() >= Duration::from_millis(50));

    // A git server.
    let dir = tempfile::tempdir().unwrap();
    let bare = dir.path().join("lib.git");
    let source = packages.parent().unwrap().join("debian-sources/libzip.git");
    let clone = |from: &str, to: &Path| {
        let output = Command::new("git")
            .args(["-c", "safe.directory=*", "clone", "-q", "--bare", "--depth", "1", from])
            .arg(to)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    clone(&format!("file://{}", source.display()), &bare);
    registries.add_git("git.corp.example", dir.path());
    clone(&format!("{}/lib.git", registries.url("git.corp.example")), &dir.path().join("cloned"));
    assert!(registries.mirrors().contains("\"git.corp.example\" = \"http://127.0.0.1:"));
    let seen = registries.take_seen();
    let of = |status: u16| seen.iter().filter(|seen| seen.status == status).count();
    assert_eq!((of(401), of(404), of(503), of(304)), (1, 1, 1, 1), "{seen:#?}");
    assert!(
        seen.iter().any(|s| s.method == "POST"
            && s.host == "git.corp.example"
            && s.path == "/lib.git/git-upload-pack")
    );
    assert!(
        seen.iter()
            .all(|s| (s.authorization.is_some()) == (s.host == "pypi.corp.example" && s.status == 200))
    );
    assert!(seen.iter().any(|s| s.bytes == b"poison".len()));
}
