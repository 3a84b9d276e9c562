//! What tools find around them in a real cell: places that they can write, an image's own words, Java's and git's way
//! out; and Gradle, which needs all of it. Nothing but this process is ever dialled.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::packages::packages;
use crate::packages::server::Registries;
use crate::world::{World, docker, events};

const NO_MODEL: &str = "[default]\ntext = \"nobody should ask\"\n";
/// Who submits: nobody that an image knows.
const STRANGER: u32 = 4242;

/// Runs a shell command as a job of a stranger's, which must succeed: what it printed.
#[track_caller]
fn run(world: &World, policy: &str, image: &str, line: &str) -> String {
    submit(world, &json!({ "policy": policy, "image": image, "command": { "argv": ["sh", "-c", line] } }))
}

#[track_caller]
fn submit(world: &World, spec: &Value) -> String {
    let submitted = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(STRANGER)).unwrap();
    assert_eq!(submitted.status, 201, "{}", submitted.body);
    let id = submitted.json()["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/jobs/{id}/events?follow=1");
    let told = events(&world.curl("GET", &path, "", &[], Some(STRANGER)).unwrap().body);
    let lines = told.iter().filter(|e| e["type"] == "output").filter_map(|e| e["text"].as_str());
    let said: String = lines.map(|line| format!("{}\n", line.trim_end_matches('\n'))).collect();
    let job = world.show(&id);
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{said}");
    said
}

/// The value of `NAME value` in what a command printed.
#[track_caller]
fn value<'a>(said: &'a str, name: &str) -> &'a str {
    let found = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("{name} is not in:\n{said}"))
}

/// Prints each variable with the file system that it points into, after a file was made, run and linked there.
const PLACES: &str = r#"
echo "uid $(id -u)"
for at in / /usr /etc /opt; do ! touch "$at/probe" 2>/dev/null || { echo "$at can be written"; exit 1; }; done
MAVEN_REPOSITORY=$HOME/.m2/repository
for name in HOME XDG_CACHE_HOME CARGO_HOME CARGO_INSTALL_ROOT GOPATH GOMODCACHE GOCACHE GOBIN PIP_CACHE_DIR UV_CACHE_DIR \
    POETRY_CACHE_DIR npm_config_cache npm_config_prefix PNPM_HOME pnpm_config_store_dir COREPACK_HOME GRADLE_USER_HOME \
    DENO_DIR MAVEN_REPOSITORY; do
    at=$(printenv "$name" || echo "$MAVEN_REPOSITORY")
    mkdir -p "$at" && printf '#!/bin/sh\necho ran\n' >"$at/probe" && chmod 755 "$at/probe" && ln "$at/probe" "$at/link" || exit 1
    echo "$name $at $(stat -f -c %T "$at") $("$at/link")"
    rm "$at/probe" "$at/link"
done
"#;

#[test]
fn every_cache_lies_on_the_disk_and_a_strangers_tools_agree() {
    let world = World::new(NO_MODEL);
    // The cell's user is one that the daemon made up; what it writes in place is the submitter's outside.
    let workspace = world.workspace("repo", STRANGER);
    let line = format!("{PLACES}\necho made >/workspace/made");
    let in_place = submit(
        &world,
        &json!({
            "policy": "refactor", "workspace": { "path": workspace, "mode": "bind" },
            "command": { "argv": ["sh", "-c", line] },
        }),
    );
    let made = std::fs::metadata(workspace.join("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (STRANGER, STRANGER));
    let alone = run(&world, "refactor", "hotcell/cell", PLACES);
    for said in [in_place, alone] {
        assert!(value(&said, "uid").parse::<u32>().unwrap() > 65_535, "{said}");
        let places: Vec<&str> = said.lines().filter(|line| !line.starts_with("uid ")).collect();
        assert_eq!(places.len(), 19, "{said}");
        for line in places {
            let words: Vec<&str> = line.split(' ').collect();
            // The scratch disk's ext4 as `stat` calls it: neither memory nor the image.
            let &[_, at, kind, ran] = words.as_slice() else { panic!("{line}") };
            assert!(at.starts_with("/home/agent"), "{line}");
            assert_eq!((kind, ran), ("ext2/ext3", "ran"), "{line}");
        }
    }

    let line = "cd $(mktemp -d) && cargo -q init --name hello --vcs none && cargo -q install --offline --path . && hello && \
        command -v hello && echo \"home $(find $CARGO_HOME -mindepth 1 -maxdepth 1 | wc -l)\" && test ! -e ~/target";
    let said = run(&world, "refactor", "hotcell/rust", line);
    assert!(said.contains("Hello, world!\n/home/agent/.local/bin/hello\n"), "{said}");

    let line = "for name in GOPATH GOMODCACHE GOCACHE GOBIN; do echo \"$name $(go env $name)\"; done; cd $(mktemp -d) && \
        go mod init example.com/hello && printf 'package main\\nfunc main() { println(\"hello\") }\\n' >main.go && \
        go install . && hello && echo \"cached $(find $GOCACHE -type f | wc -l)\"";
    let said = run(&world, "refactor", "hotcell/go", line);
    for (name, at) in [
        ("GOPATH", "go"),
        ("GOMODCACHE", "go/pkg/mod"),
        ("GOCACHE", ".cache/go-build"),
        ("GOBIN", ".local/bin"),
    ] {
        assert_eq!(value(&said, name), format!("/home/agent/{at}"), "{said}");
    }
    assert!(said.contains("hello\n") && value(&said, "cached").parse::<u32>().unwrap() > 0, "{said}");

    let line = "echo \"cache $(pip cache dir)\"; echo \"user $(python3 -m site --user-base)\"; mkdir -p /tmp/p && cd /tmp/p && \
        printf 'from setuptools import setup\\nsetup(name=\"p\", version=\"1\", py_modules=[\"pmod\"])\\n' >setup.py && \
        echo 'print(\"hello\")' >pmod.py && pip install -q --no-index --no-build-isolation . && cd / && python3 -m pmod";
    let said = run(&world, "refactor", "hotcell/python", line);
    assert_eq!(value(&said, "cache"), "/home/agent/.cache/pip", "{said}");
    assert!(value(&said, "user").starts_with("/home/agent/") && said.contains("hello\n"), "{said}");

    let line = "for name in cache prefix; do echo \"$name $(npm config get $name)\"; done; mkdir -p /tmp/p && cd /tmp/p && \
        printf '#!/usr/bin/env node\\nconsole.log(\"hello\")\\n' >cli.js && \
        echo '{\"name\":\"p\",\"version\":\"1.0.0\",\"bin\":{\"p-cli\":\"cli.js\"}}' >package.json && \
        npm install --silent --global $(npm pack --silent) && p-cli";
    let said = run(&world, "refactor", "hotcell/node", line);
    assert_eq!(
        (value(&said, "cache"), value(&said, "prefix")),
        ("/home/agent/.npm", "/home/agent/.local"),
        "{said}"
    );
    assert!(said.contains("hello\n"), "{said}");
    world.end();
}

#[test]
fn java_trusts_the_cells_authority_and_its_tools_run_for_a_stranger() {
    let world = World::new(NO_MODEL);
    let line = "store=$(echo $JAVA_TOOL_OPTIONS | tr ' ' '\\n' | sed -n 's/^-Djavax.net.ssl.trustStore=//p'); \
        echo \"store $store\"; echo \"authority $(openssl x509 -noout -fingerprint -sha256 -in /.hotcell/ca-more.pem)\"; \
        keytool -list -keystore \"$store\" -storepass changeit 2>&1; mvn -v 2>&1; gradle --version 2>&1; \
        printf 'public class Home { public static void main(String[] a) { System.out.println(\"home \" + \
        System.getProperty(\"user.home\")); } }' >/tmp/Home.java && java /tmp/Home.java";
    let said = run(&world, "refactor", "hotcell/java", line);
    assert_eq!(value(&said, "store"), "/.hotcell/ca.p12", "{said}");
    let print = value(&said, "authority").split('=').nth(1).unwrap();
    let listed = said.lines().filter(|line| line.contains("(SHA-256)"));
    assert_eq!(listed.filter(|line| line.contains(print)).count(), 1, "{print}:\n{said}");
    assert!(said.contains("trustedCertEntry"), "{said}");
    // The public ones are there too.
    assert!(said.matches("trustedCertEntry").count() > 100, "{said}");
    assert!(said.contains("Apache Maven 3.") && said.contains("Gradle 4.4.1"), "{said}");
    assert_eq!(value(&said, "home"), "/home/agent", "{said}");
    world.end();
}

#[test]
fn ssh_addresses_of_an_open_git_host_become_https_and_others_stay() {
    let policies = tempfile::tempdir().unwrap();
    let refactor = include_str!("../../policies/refactor.toml");
    let opened = refactor.replace("\"debian\"]", "\"debian\", \"github-read\"]");
    assert_ne!(opened, refactor);
    std::fs::write(policies.path().join("git.toml"), opened).unwrap();
    let world = World::with(NO_MODEL, &format!("policy_dirs = [{:?}]", policies.path()));
    let line = "for url in git@github.com:a/b.git ssh://git@github.com/a/b.git git://github.com/a/b.git \
        git@git.example.com:a/b.git; do git ls-remote --get-url $url; done";
    let said = run(&world, "git", "hotcell/cell", line);
    let https = "https://github.com/a/b.git\n";
    assert_eq!(said, format!("{https}{https}{https}git@git.example.com:a/b.git\n"));
    // Where the host is closed, git says itself what it cannot reach.
    let said = run(&world, "refactor", "hotcell/cell", line);
    assert!(said.starts_with("git@github.com:a/b.git\nssh://git@github.com/a/b.git\n"), "{said}");
    world.end();
}

/// An image of somebody's own; it goes with this value.
struct OwnImage(String);

impl OwnImage {
    /// A Debian root without a layer, a mount point or a user of ours, that says of itself what official images say.
    fn bare() -> Self {
        let address = hotcell::engine::find_address(None).expect("an engine");
        let engine = || {
            let mut command = Command::new("docker");
            command.args(["-H", &address]);
            command
        };
        let tag = format!("hotcell-test-own:{}", std::process::id());
        let base = docker(&["images", "-q", "hotcell/base"]);
        let base = base.lines().next().expect("the base's image");
        let container = docker(&["create", base, "true"]);
        let container = container.trim();
        let mut export = engine().args(["export", container]).stdout(Stdio::piped()).spawn().unwrap();
        let mut less = Command::new("tar")
            .args(["--delete", "-f", "-", "usr/local", "usr/share", "var", "root", "home"])
            .stdin(export.stdout.take().unwrap())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let says = [
            "ENV PATH=/usr/local/cargo/bin:/usr/local/go/bin:/usr/local/bin:/usr/bin:/bin",
            "ENV RUSTUP_HOME=/usr/local/rustup CARGO_HOME=/usr/local/cargo RUST_VERSION=1.90.0",
            "ENV GOROOT=/usr/local/go GOPATH=/go GOTOOLCHAIN=local",
            "ENV JAVA_HOME=/opt/java/openjdk MAVEN_HOME=/usr/share/maven MAVEN_CONFIG=/root/.m2",
            "ENV PIP_CACHE_DIR=/root/.cache/pip HOME=/root USER=app HTTPS_PROXY=http://192.0.2.1:1",
            "ENTRYPOINT [\"/usr/local/bin/docker-entrypoint.sh\"]",
            "CMD [\"jshell\"]",
            "USER 1000",
            "WORKDIR /usr/src/app",
        ];
        let mut import = engine();
        import.arg("import").args(says.iter().flat_map(|line| ["--change", line])).args(["-", &tag]);
        let imported = import.stdin(less.stdout.take().unwrap()).stdout(Stdio::null()).status().unwrap();
        let image = Self(tag);
        let whole =
            [export.wait().unwrap(), less.wait().unwrap(), imported].iter().all(|ended| ended.success());
        docker(&["rm", container]);
        assert!(whole, "no image");
        image
    }
}

impl Drop for OwnImage {
    fn drop(&mut self) {
        docker(&["rmi", &self.0]);
    }
}

#[test]
fn a_bare_image_of_the_users_own_says_what_it_is_and_caches_lie_on_the_disk_all_the_same() {
    let image = OwnImage::bare();
    let world = World::new(NO_MODEL);
    let line = format!("{PLACES}\nenv | sort | sed 's/=/ /'; echo \"cwd $(pwd)\"");
    let said = run(&world, "refactor", &image.0, &line);
    for (name, expected) in [
        ("RUSTUP_HOME", "/usr/local/rustup"),
        ("RUST_VERSION", "1.90.0"),
        ("GOROOT", "/usr/local/go"),
        ("GOTOOLCHAIN", "local"),
        ("JAVA_HOME", "/opt/java/openjdk"),
        ("MAVEN_HOME", "/usr/share/maven"),
        ("cwd", "/workspace"),
        ("HTTPS_PROXY", "http://127.0.0.1:3128"),
    ] {
        assert_eq!(value(&said, name), expected, "{said}");
    }
    for (name, at) in [("CARGO_HOME", ".cargo"), ("GOPATH", "go"), ("PIP_CACHE_DIR", ".cache/pip")] {
        assert_eq!(value(&said, name), format!("/home/agent/{at} ext2/ext3 ran"), "{said}");
    }
    let path = value(&said, "PATH");
    assert!(
        path.starts_with("/usr/local/cargo/bin:/usr/local/go/bin:")
            && path.ends_with(":/home/agent/.local/bin")
    );
    for gone in ["MAVEN_CONFIG", "192.0.2.1", "/root"] {
        assert!(!said.contains(gone), "{gone}:\n{said}");
    }
    world.end();
}

#[test]
fn a_gradle_project_builds_and_tests_and_the_next_job_fetches_nothing() {
    let registries = Registries::new(&packages().join("mirror"));
    let world = World::with(NO_MODEL, &format!("{}[cache]\nfree_bytes_min = 0\n", registries.mirrors()));
    let workspace = world.path("repo");
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/packages/gradle");
    let copied =
        Command::new("cp").args(["-r", "--no-preserve=ownership"]).args([&from, &workspace]).status();
    assert!(copied.unwrap().success());
    let place = workspace.to_str().unwrap();
    let line = "gradle build 2>&1 && find $GRADLE_USER_HOME/caches -name 'junit-*.jar' && ls build/libs build/test-results/test";
    for fetched_already in [false, true] {
        let (code, said, err) =
            world.run(&["exec", "-p", "refactor", "--image", "auto", "-w", place, "--", "sh", "-c", line]);
        assert_eq!(code, 0, "{said}{err}");
        assert!(said.contains("BUILD SUCCESSFUL"), "{said}");
        for test in ["countsEachWord", "spacesCountNothing"] {
            assert!(said.contains(&format!("counts.WordsTest > {test} PASSED")), "{said}");
        }
        assert!(said.contains("/home/agent/.gradle/caches/") && said.contains("\ncounts.jar\n"), "{said}");
        let seen = registries.take_seen();
        let bodies: Vec<&str> =
            seen.iter().filter(|s| s.method == "GET" && s.status == 200).map(|s| s.path.as_str()).collect();
        assert_eq!(bodies.is_empty(), fetched_already, "{seen:#?}");
        let told = format!("gradle: {} requests, {} bodies over the network\n", seen.len(), bodies.len());
        std::io::stderr().write_all(told.as_bytes()).unwrap();
    }
    world.end();
}
