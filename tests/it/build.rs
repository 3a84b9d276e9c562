//! `image = "build"`: a workspace's own Dockerfile or devcontainer built by the real engine, with the gateway as its only
//! way out, and used by the real CLI. What lies behind the gateway is in this process.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::egress::Internet;
use crate::world::{World, docker, one_command, tool_results};

const RULES: &str = "[[egress.host]]\nname = \"inspected.example\"\ninspect = true\nmethods = [\"GET\"]\n\
    [[egress.host]]\nname = \"plain.example\"\nports = [80]\n";

/// A world whose policy `reach` builds, and a workspace with these files.
struct Site {
    internet: Internet,
    world: World,
    workspace: PathBuf,
}

impl Site {
    fn new(script: &str, files: &[(&str, &str)]) -> Self {
        Self::with(script, files, "build = true")
    }

    fn with(script: &str, files: &[(&str, &str)], build: &str) -> Self {
        let internet = Internet::new();
        let mut world = internet.without_daemon(script, RULES, "", "");
        let policy = internet.dir.path().join("policies/reach.toml");
        let text = std::fs::read_to_string(&policy).unwrap();
        std::fs::write(&policy, text.replace("[images]\n", &format!("[images]\n{build}\n"))).unwrap();
        world.start();
        let workspace = world.workspace("repo", 0);
        write(&workspace, files);
        Self { internet, world, workspace }
    }

    fn spec(&self, more: Value) -> Value {
        let mut spec = json!({
            "prompt": "do it", "policy": "reach", "image": "build", "limits": { "disk_mib": 64 },
            "workspace": { "path": self.workspace, "mode": "copy" },
        });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    }

    /// Ends it. Nothing of the builds is left but images with names, which are taken away here.
    fn end(self) {
        let instance = format!("label=hotcell.instance={}", self.world.instance());
        let loose = docker(&["images", "-aq", "--filter", "dangling=true", "--filter", &instance]);
        assert_eq!(loose.trim(), "", "layers of builds are left");
        let named = docker(&["images", "--format", "{{.Repository}}:{{.Tag}}", "--filter", &instance]);
        for name in named.split_whitespace() {
            assert!(name.starts_with("hotcell/build:"), "{name}");
            docker(&["rmi", name]);
        }
        self.world.end();
    }
}

fn write(dir: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

fn notes(events: &[Value]) -> Vec<&str> {
    events.iter().filter(|e| e["type"] == "note").filter_map(|e| e["text"].as_str()).collect()
}

/// What a container of the image finds at a path, without the gateway and without a cell.
fn in_image(image: &str, path: &str) -> String {
    docker(&["run", "--rm", "--network", "none", "--entrypoint", "cat", image, path])
}

#[test]
fn a_dockerfile_is_listed_then_built_through_the_gateway_and_the_agent_runs_in_it() {
    let dockerfile = "# the project's own\nARG BASE=hotcell/cell\nFROM ${BASE} AS tools\n\
        RUN mkdir /opt/tools \\\n    && echo made > /opt/tools/made\n\
        FROM $BASE\nCOPY --from=tools /opt/tools /opt/tools\nCOPY . /src\n\
        RUN curl -sS https://inspected.example/hello > /fetched; curl -sS http://plain.example/hello >> /fetched\n\
        RUN node -e 'fetch(\"https://inspected.example/hello\").then(r => r.text()).then(t => console.log(\"node: \" + t))' > /node\n\
        RUN (id -u; cat /proc/net/dev | grep -c :; ls /run/hotcell /var/run/docker.sock; \\\n\
             curl -sS -m 5 --noproxy '*' http://169.254.169.254/; curl -sS -m 5 --noproxy '*' http://172.17.0.1/; \\\n\
             curl -sS -o /dev/null -w '%{http_code}' http://169.254.169.254/) > /probed 2>&1 || true\n\
        ENV COLOUR=blue\nLABEL hotcell.cell=c7hk0x3m9ra2v\n";
    let command = "cat /opt/tools/made /fetched /node /probed; echo colour=$COLOUR; ls /src; id -u; touch /x; \
        wc -c /.hotcell/ca.pem";
    let files = [
        ("Dockerfile", dockerfile),
        ("own.txt", "mine"),
        (".env", "SECRET=1"),
        ("ignored/x", "x"),
        (".dockerignore", "ignored\n*.log\n"),
        ("a.log", "l"),
    ];
    let site = Site::new(&one_command(command), &files);
    let (events, job) = site.world.job(&site.spec(json!({})));
    let told = notes(&events).join("\n");
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{told}\n{}", site.world.log());
    // All of it is listed before anything happens.
    let listed = events.iter().position(|e| e["type"] == "state" && e["state"] == "preparing").unwrap();
    let before = notes(&events[..listed]).join("\n");
    for line in [
        "Dockerfile (sha256 ",
        "Dockerfile:3: FROM hotcell/cell",
        "Dockerfile:4: the engine will run as root: mkdir /opt/tools     && echo made > /opt/tools/made",
        "Dockerfile:9: the engine will run as root: curl -sS https://inspected.example/hello",
    ] {
        assert!(before.contains(line), "{line} is missing:\n{before}");
    }
    assert!(told.contains("1 paths are hidden"), "{told}");
    let seen = tool_results(&events);
    for line in [
        "made",
        "hello from inspected.example",
        "node: hello from inspected.example",
        "hello from plain.example",
        "colour=blue",
        "own.txt",
    ] {
        assert!(seen.contains(line), "{line} is missing:\n{seen}");
    }
    // Of the network there was a loopback, and behind it the gateway, which said no; of the host nothing.
    let probed: Vec<&str> = seen.lines().skip_while(|line| *line != "0").collect();
    assert_eq!(probed[1], "1", "{seen}");
    assert_eq!(seen.matches("No such file or directory").count(), 2, "{seen}");
    assert!(seen.contains("403"), "{seen}");
    for absent in [".env", "ignored", "a.log", "SECRET"] {
        assert!(!seen.lines().any(|line| line == absent), "{absent} came along:\n{seen}");
    }
    assert!(seen.contains("Read-only file system"), "{seen}");
    let reached = events.iter().filter(|e| e["type"] == "egress" && e["host"] == "inspected.example");
    assert_eq!(reached.count(), 2);

    // The image is one of ours, with nothing of the gateway in it.
    let image = events.iter().find(|e| e["type"] == "cell").unwrap()["image"].as_str().unwrap().to_owned();
    assert_eq!(in_image(&image, "/.hotcell/ca.pem"), "");
    let labels = docker(&["inspect", "--format", "{{json .Config.Labels}} {{json .Config.Env}}", &image]);
    assert!(
        labels.contains("\"hotcell.owner\":\"0\"") && !labels.contains("hotcell.cell\":\"c7"),
        "{labels}"
    );
    assert!(!labels.contains("3128") && !labels.contains("SSL_CERT_FILE"), "{labels}");

    // The same again is not built again, and not fetched again.
    let asked = site.internet.seen().len();
    let (events, job) = site.world.job(&site.spec(json!({})));
    assert_eq!(job["outcome"], "succeeded", "{job:#}");
    assert!(notes(&events).iter().any(|note| note.contains("was built from the same before")));
    assert_eq!(site.internet.seen().len(), asked);

    // Something else is.
    write(&site.workspace, &[("own.txt", "changed")]);
    let (events, job) = site.world.job(&site.spec(json!({})));
    assert_eq!(job["outcome"], "succeeded", "{job:#}");
    assert!(notes(&events).iter().any(|note| note.contains("was built in ")));
    site.end();
}

#[test]
fn a_build_that_reaches_for_more_fails_with_the_host_and_the_line_that_would_open_it() {
    let dockerfile =
        "FROM hotcell/cell\nRUN echo begun && curl -sSf https://other.example/thing.tar\nRUN never\n";
    let site = Site::new(&one_command("true"), &[("Dockerfile", dockerfile)]);
    let (events, job) = site.world.job(&site.spec(json!({})));
    assert_eq!((&job["reason"], &job["phase"]), (&json!("image_build_failed"), &json!("prepare")), "{job:#}");
    assert_eq!(job["blame"], "job");
    let message = job["message"].as_str().unwrap();
    assert!(message.contains("RUN echo begun") && message.contains("begun"), "{message}");
    assert!(message.contains("\nhotcell: ") && message.contains("other.example"), "{message}");
    assert!(message.contains("egress"), "{message}");
    assert!(!notes(&events).join("\n").contains("build: RUN never"), "{events:#?}");
    assert!(site.internet.seen().is_empty(), "{:?}", site.internet.seen());
    site.end();
}

#[test]
fn what_is_not_built_is_refused_at_submit_by_name() {
    let site = Site::new(&one_command("true"), &[("Dockerfile", "FROM hotcell/cell\n")]);
    let refused = |files: &[(&str, &str)], more: Value| {
        write(&site.workspace, files);
        let answer = site.world.call("POST", "/v1/jobs", &site.spec(more).to_string());
        assert_eq!(answer.status / 100, 4, "{}", answer.body);
        answer.json()["error"]["message"].as_str().unwrap().to_owned()
    };
    let closed = refused(&[], json!({ "policy": "trusted" }));
    assert!(closed.contains("`build = true` under [images]") && closed.contains("trusted"), "{closed}");
    let narrowed = refused(&[], json!({ "narrow": "[images]\nallow = [\"*\"]\nbuild = false" }));
    assert!(narrowed.contains("your own file"), "{narrowed}");
    let below = refused(&[], json!({ "narrow": "[images]\nallow = [\"debian*\"]" }));
    assert!(below.starts_with("Dockerfile:1: ") && below.contains("hotcell/cell"), "{below}");
    for (text, words) in [
        ("FROM none.example/not-here:1\n", "a build pulls nothing"),
        (
            "FROM hotcell/cell\nADD https://inspected.example/x /x\n",
            "Dockerfile:2: ADD takes only plain paths",
        ),
        (
            "FROM hotcell/cell\nRUN --mount=type=cache,target=/c true\n",
            "RUN --mount=type=cache,target=/c needs BuildKit",
        ),
        (
            "FROM hotcell/cell\nCOPY --from=none.example/x /a /b\n",
            "Dockerfile:2: the image none.example/x is not on",
        ),
        ("RUN true\n", "before the first FROM"),
    ] {
        let message = refused(&[("Dockerfile", text)], json!({}));
        assert!(message.contains(words), "{message}");
    }
    std::fs::remove_file(site.workspace.join("Dockerfile")).unwrap();
    let none = refused(&[], json!({}));
    assert!(none.contains("there is nothing to build") && none.contains("devcontainer.json"), "{none}");
    site.end();
}

#[test]
fn commands_of_a_devcontainer_run_in_the_cell_and_never_on_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let canary = dir.path().join("canary");
    let devcontainer = format!(
        r#"{{
            // What the editor would do.
            "build": {{ "dockerfile": "Containerfile", "context": "..", "args": {{ "WORD": "given" }}, "target": "dev" }},
            "initializeCommand": "touch {0}",
            "onCreateCommand": ["sh", "-c", "echo created > created; touch {0} || true"],
            "postCreateCommand": {{ "one": "cat created; echo COLOUR=$COLOUR > colour" }},
            "containerEnv": {{ "COLOUR": "a \"b\" $c", "HOST": "${{localEnv:HOME}}" }},
            "runArgs": ["--privileged"], "mounts": ["source=/,target=/host,type=bind"],
        }}"#,
        canary.display()
    );
    let containerfile = "FROM hotcell/cell AS dev\nARG WORD=default\nRUN echo $WORD > /word\nCOPY top.txt /top.txt\n\
        FROM none.example/never-built\nRUN never\n";
    let files = [
        (".devcontainer/devcontainer.json", devcontainer.as_str()),
        (".devcontainer/Containerfile", containerfile),
        ("top.txt", "from the top"),
        ("Dockerfile", "FROM none.example/not-this-one\n"),
    ];
    let command =
        format!("cat /word /top.txt created colour; ls {}; test -e /host && echo mounted", canary.display());
    let site = Site::new(&one_command(&command), &files);
    let spec = site.spec(
        json!({ "setup": { "commands": ["cat colour > own"] }, "verify": { "commands": ["cat own /word"] } }),
    );
    let (events, job) = site.world.job(&spec);
    let told = notes(&events).join("\n");
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{told}\n{}", site.world.log());
    for line in [
        ".devcontainer/devcontainer.json names .devcontainer/Containerfile",
        "becomes a setup command in the cell: sh -c echo created",
        "initializeCommand never runs, since it would run on the host: touch",
        "containerEnv.HOST is left out",
        "mounts, runArgs",
    ] {
        assert!(told.contains(line), "{line} is missing:\n{told}");
    }
    let seen = tool_results(&events);
    for line in ["given", "from the top", "created", "COLOUR=a \"b\" $c"] {
        assert!(seen.contains(line), "{line} is missing:\n{seen}");
    }
    assert!(!canary.exists() && !seen.contains("mounted"), "{seen}");
    let setup: Vec<u64> = events
        .iter()
        .filter(|e| e["type"] == "step" && e["stage"] == "setup" && !e["ended"].is_null())
        .filter_map(|e| e["index"].as_u64())
        .collect();
    assert_eq!(setup, [0, 1, 2, 0, 1, 2], "before the agent, and before the judging");
    assert_eq!(told.matches("was built in").count(), 1, "the judging has the same image: {told}");
    site.end();
}

#[test]
fn an_image_is_its_users_alone_and_holds_what_they_may_read() {
    use std::os::unix::fs::PermissionsExt;
    const OTHER: u32 = 61_000;
    let files = [
        ("Dockerfile", "FROM hotcell/cell\nCOPY . /src\nRUN chmod -R a+rX /src\n"),
        ("mine", "only its owner reads this"),
    ];
    let site = Site::new(&one_command("ls /src; cat /src/mine"), &files);
    std::fs::set_permissions(site.workspace.join("mine"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let image = |events: &[Value]| {
        let cell = events.iter().find(|e| e["type"] == "cell").unwrap();
        cell["image"].as_str().unwrap().to_owned()
    };
    let (events, job) = site.world.job(&site.spec(json!({})));
    assert_eq!(job["outcome"], "succeeded", "{job:#}");
    assert!(tool_results(&events).contains("only its owner"), "{}", tool_results(&events));
    let first = image(&events);

    // What is named by one is another user's to read, and nothing of it becomes theirs.
    let spec = site.spec(json!({})).to_string();
    let answer = site.world.curl("POST", "/v1/jobs", &spec, &[], Some(OTHER)).unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    let events = site.world.follow(&id);
    let seen = tool_results(&events);
    assert!(seen.contains("Dockerfile") && !seen.contains("only its owner"), "{seen}");
    assert_ne!(image(&events), first);
    let spec = json!({ "prompt": "do it", "policy": "reach", "image": first }).to_string();
    let answer = site.world.curl("POST", "/v1/jobs", &spec, &[], Some(OTHER)).unwrap();
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    site.world.follow(&id);
    let job = site.world.show(&id);
    assert_eq!(job["reason"], "image_unavailable", "{job:#}");
    assert!(job["message"].as_str().unwrap().contains("for another user"), "{job:#}");

    // They are listed, and can be removed.
    let (_, listed, _) = site.world.run(&["image", "ls"]);
    let mine: Vec<&str> = listed.lines().filter(|line| line.contains("hotcell/build:")).collect();
    assert!(mine.len() == 2 && mine[0].contains("from Dockerfile"), "{listed}");
    let name = mine[0].split_whitespace().next().unwrap();
    let (code, _, said) = site.world.run(&["image", "rm", name]);
    assert_eq!(code, 0, "{said}");
    let (_, listed, _) = site.world.run(&["image", "ls"]);
    assert!(!listed.contains(name) && listed.contains("hotcell/build:"), "{listed}");
    let (code, _, said) = site.world.run(&["image", "rm", "hotcell/cell"]);
    assert!(code != 0 && said.contains("is no image that was built from"), "{said}");
    site.end();
}

#[test]
fn a_command_has_the_image_too_and_a_build_has_a_limit() {
    let mut site =
        Site::new(&one_command("true"), &[("Dockerfile", "FROM hotcell/cell\nRUN echo built > /word\n")]);
    let workspace = site.workspace.to_str().unwrap();
    let (code, out, said) = site.world.run(&["image", "plan", workspace]);
    assert_eq!(code, 0, "{said}");
    assert!(out.contains("Dockerfile:2: the engine will run as root: echo built > /word"), "{out}");
    let exec = ["exec", "--policy", "reach", "--image", "build", "-w", workspace, "--", "cat", "/word"];
    let (code, out, said) = site.world.run(&exec);
    assert_eq!((code, out.as_str()), (0, "built\n"), "{said}");
    assert!(said.contains("the engine will run as root: echo built"), "{said}");
    let (code, out, _) = site.world.run(&["policy", "explain", "--policy", "reach", "--image", "build"]);
    assert!(code == 0 && out.contains("images.build"), "{out}");
    let (code, out, _) = site.world.run(&["policy", "explain", "--policy", "refactor", "--image", "build"]);
    assert!(code == 1 && out.contains("`build = true` under [images]"), "{out}");
    write(&site.workspace, &[("Dockerfile", WAITS)]);
    let limits = json!({ "limits": { "wall_s": 3, "disk_mib": 64 } });
    let (_, job) = site.world.job(&site.spec(limits));
    assert_eq!(job["reason"], "image_build_failed", "{job:#}");
    let message = job["message"].as_str().unwrap();
    assert!(message.contains("was not done after 3 s"), "{message}");
    nothing_runs(&mut site);
    site.end();
}

/// Waits until the engine runs the last line of the Dockerfile, for the `times`th time.
fn until_running(site: &mut Site, id: &str, times: usize) {
    let id = id.to_owned();
    site.world.wait_for("the build runs", |world| {
        let events = world.call("GET", &format!("/v1/jobs/{id}/events"), "").body;
        events.matches("\"build: waiting\"").count() == times
    });
}

/// The engine's containers in which a line of a Dockerfile runs.
fn building(site: &Site) -> Vec<String> {
    let instance = format!("label=hotcell.instance={}", site.world.instance());
    let all = docker(&["ps", "-aq", "--no-trunc", "--filter", &instance, "--filter", "label=hotcell.build"]);
    all.split_whitespace().map(str::to_owned).collect()
}

fn nothing_runs(site: &mut Site) {
    let instance = format!("label=hotcell.instance={}", site.world.instance());
    site.world.wait_for("the engine has put everything away", |_| {
        docker(&["ps", "-aq", "--filter", &instance]).trim().is_empty()
            && docker(&["images", "-aq", "--filter", "dangling=true", "--filter", &instance])
                .trim()
                .is_empty()
    });
}

const WAITS: &str = "FROM hotcell/cell\nRUN echo one > /one\nRUN echo waiting; sleep 1000\n";

#[test]
fn a_build_that_is_cancelled_ends_and_leaves_nothing() {
    let mut site = Site::new(&one_command("true"), &[("Dockerfile", WAITS)]);
    let id = site.world.submit(&site.spec(json!({})));
    until_running(&mut site, &id, 1);
    assert_eq!(building(&site).len(), 1);
    let answer = site.world.call("POST", &format!("/v1/jobs/{id}/cancel"), "");
    assert_eq!(answer.status / 100, 2, "{}", answer.body);
    site.world.follow(&id);
    let job = site.world.show(&id);
    assert_eq!((&job["outcome"], &job["reason"]), (&json!("stopped"), &json!("cancelled")), "{job:#}");
    nothing_runs(&mut site);
    site.end();
}

#[test]
fn a_daemon_that_is_killed_in_a_build_leaves_nothing_behind() {
    let mut site = Site::new(&one_command("true"), &[("Dockerfile", WAITS)]);
    let id = site.world.submit(&site.spec(json!({})));
    until_running(&mut site, &id, 1);
    let first = building(&site);
    site.world.kill();
    site.world.start();
    // Nothing of the job had begun but the build, so it is prepared anew.
    until_running(&mut site, &id, 2);
    let first_is_gone = building(&site).iter().all(|container| !first.contains(container));
    assert!(first_is_gone && building(&site).len() == 1, "the engine ended what nobody followed");
    site.world.call("POST", &format!("/v1/jobs/{id}/cancel"), "");
    site.world.follow(&id);
    let job = site.world.show(&id);
    assert_eq!(job["outcome"], "stopped", "{job:#}");
    nothing_runs(&mut site);
    site.end();
}
