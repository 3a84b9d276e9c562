//! The operations of images by the `docker` command. For tests only; removes what it makes.

use std::path::Path;
use std::process::Stdio;

use hotcell::cell_image::{Build, EngineFault, EngineFuture, Extend, ImageEngine, ImageInfo, OnLine};
use tokio::process::Command;

pub(super) struct DockerCli;

impl DockerCli {
    /// Uses the engine that hotcell itself finds; fails the test where none answers.
    pub(super) async fn connect() -> Self {
        let answer = docker(&["version", "--format", "{{.Server.APIVersion}}"]).await;
        assert!(answer.is_ok(), "this test needs a Docker engine (run `make engine`): {answer:?}");
        Self
    }

    pub(super) async fn remove_images(&self, prefix: &str) {
        let filter = format!("reference={prefix}/*");
        let names =
            docker(&["images", "--format", "{{.Repository}}:{{.Tag}}", "--filter", &filter]).await.unwrap();
        let names: Vec<&str> = names.lines().collect();
        if !names.is_empty() {
            docker(&[&["rmi"][..], &names].concat()).await.unwrap();
        }
    }

    /// Runs a script as a cell does: no network, no capability, read-only root, a private uid.
    pub(super) async fn run_locked(&self, image: &str, script: &str) -> Result<String, String> {
        let home = "/home/agent:uid=1610612737,gid=1610612737,mode=700,exec";
        let arguments = [
            "run",
            "--rm",
            "--read-only",
            "--cap-drop",
            "ALL",
            "--network",
            "none",
            "--security-opt",
            "no-new-privileges",
            "--user",
            "1610612737:1610612737",
            "--tmpfs",
            home,
            "--tmpfs",
            "/tmp",
            "--env",
            "HOME=/home/agent",
            image,
            "/bin/bash",
            "-c",
            script,
        ];
        docker(&arguments).await.map_err(|fault| fault.to_string())
    }
}

async fn docker(arguments: &[&str]) -> Result<String, EngineFault> {
    let fault =
        |message: String| EngineFault { operation: format!("docker {}", arguments[0]), message, away: false };
    let address = hotcell::engine::find_address(None).map_err(|error| fault(error.to_string()))?;
    let mut command = Command::new("docker");
    command.args(["-H", &address]);
    command.args(arguments).env("DOCKER_BUILDKIT", "0").stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(|error| fault(error.to_string()))?;
    if !output.status.success() {
        return Err(fault(
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout),
        ));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl ImageEngine for DockerCli {
    fn arch(&self) -> EngineFuture<'_, String> {
        Box::pin(docker(&["version", "--format", "{{.Server.Arch}}"]))
    }

    fn image<'a>(&'a self, reference: &'a str) -> EngineFuture<'a, Option<ImageInfo>> {
        Box::pin(async move {
            let format = "{{.Id}}\n{{.Architecture}}\n{{.Size}}\n{{json .Config.Labels}}";
            let text = match docker(&["image", "inspect", "--format", format, reference]).await {
                Err(fault) if fault.message.contains("No such image") => return Ok(None),
                other => other?,
            };
            let lines: Vec<&str> = text.lines().collect();
            let labels: Option<_> = serde_json::from_str(lines[3]).unwrap();
            Ok(Some(ImageInfo {
                id: lines[0].to_owned(),
                arch: lines[1].to_owned(),
                size_bytes: lines[2].parse().ok(),
                labels: labels.unwrap_or_default(),
            }))
        })
    }

    fn pull<'a>(&'a self, reference: &'a str, _: OnLine<'a>) -> EngineFuture<'a, ()> {
        Box::pin(async move { docker(&["pull", reference]).await.map(drop) })
    }

    fn build<'a>(&'a self, build: &'a Build, on_line: OnLine<'a>) -> EngineFuture<'a, ()> {
        Box::pin(async move {
            let mut arguments = vec!["build".to_owned(), "--file".to_owned(), build.dockerfile.to_owned()];
            arguments.extend(["--tag".to_owned(), build.tag.clone()]);
            for (name, value) in &build.args {
                arguments.extend(["--build-arg".to_owned(), format!("{name}={value}")]);
            }
            for (name, value) in &build.labels {
                arguments.extend(["--label".to_owned(), format!("{name}={value}")]);
            }
            arguments.push("-".to_owned());
            let context = std::fs::File::open(&build.context).unwrap();
            let address = hotcell::engine::find_address(None).expect("an engine: run `make engine`");
            let mut command = Command::new("docker");
            command.args(["-H", &address]);
            command.args(&arguments).env("DOCKER_BUILDKIT", "0").stdin(context).kill_on_drop(true);
            let output = command.output().await.unwrap();
            String::from_utf8_lossy(&output.stdout).lines().for_each(on_line);
            let message = String::from_utf8_lossy(&output.stderr).into_owned();
            let fault = EngineFault { operation: "docker build".to_owned(), message, away: false };
            if output.status.success() { Ok(()) } else { Err(fault) }
        })
    }

    fn import<'a>(&'a self, tar: &'a Path, tag: &'a str, changes: &'a [String]) -> EngineFuture<'a, ()> {
        Box::pin(async move {
            let mut arguments = vec!["import"];
            for change in changes {
                arguments.extend(["--change", change]);
            }
            arguments.extend([tar.to_str().unwrap(), tag]);
            docker(&arguments).await.map(drop)
        })
    }

    fn extend<'a>(&'a self, extend: &'a Extend, _: OnLine<'a>) -> EngineFuture<'a, ()> {
        Box::pin(async move {
            let (name, bind) = (extend.container.as_str(), format!("{}:/mnt", extend.dir.display()));
            let mut run = vec!["run", "--name", name, "--network", "none", "--volume", &bind];
            run.push(&extend.image_id);
            run.extend(extend.command.iter().map(String::as_str));
            let mut done = docker(&run).await.map(drop);
            if let (Ok(()), Some(tag)) = (&done, &extend.keep_as) {
                let mut commit = vec!["commit"];
                for change in &extend.changes {
                    commit.extend(["--change", change]);
                }
                commit.extend([name, tag]);
                done = docker(&commit).await.map(drop);
            }
            docker(&["rm", "--force", name]).await?;
            done
        })
    }

    fn tag<'a>(&'a self, image_id: &'a str, tag: &'a str) -> EngineFuture<'a, ()> {
        Box::pin(async move { docker(&["tag", image_id, tag]).await.map(drop) })
    }

    fn probe_paths<'a>(&'a self, image_id: &'a str, paths: &'a [&'a str]) -> EngineFuture<'a, Vec<bool>> {
        Box::pin(async move {
            let container = docker(&["create", image_id, "/none"]).await?;
            let mut found = Vec::new();
            for path in paths {
                found.push(
                    docker(&["cp", "--follow-link", &format!("{container}:{path}"), "-"]).await.is_ok(),
                );
            }
            docker(&["rm", &container]).await?;
            Ok(found)
        })
    }
}
