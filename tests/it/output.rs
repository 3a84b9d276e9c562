//! What comes out of a job: the report that its policy keeps, and the parts of a workspace that can be written.

use serde_json::{Value, json};

use crate::world::{World, one_command, tool_results};

const UID: u32 = 4242;

/// A world with the policy `zoo`: `trusted` with one of its lines replaced and sections added.
fn world(script: &str, from: &str, to: &str) -> (World, tempfile::TempDir) {
    let policies = tempfile::tempdir().unwrap();
    let text = include_str!("../../policies/trusted.toml");
    assert!(text.contains(from));
    std::fs::write(policies.path().join("zoo.toml"), text.replace(from, to)).unwrap();
    (World::with(script, &format!("policy_dirs = [{:?}]", policies.path())), policies)
}

fn run_as_user(world: &World, spec: &Value) -> (Vec<Value>, Value) {
    let submitted = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(UID)).unwrap();
    assert_eq!(submitted.status, 201, "{}", submitted.body);
    let id = submitted.json()["id"].as_str().unwrap().to_owned();
    (world.follow(&id), world.show(&id))
}

#[test]
fn only_the_listed_paths_can_be_written_and_the_host_sees_it() {
    let command = "echo new >src/file; echo x >other; echo code $?; echo x >docs/y; mv src gone; \
                   touch .git/x; rm -f REPORT.md; echo the report >REPORT.md; cat docs/text";
    let input = json!({ "command": command, "description": "try" });
    let input: toml::Value = serde_json::from_value(input).unwrap();
    let script = format!(
        "usage = {{ input = 10, output = 20 }}\n\
         [[reply]]\nwhen = {{ turn = 0, tools = true }}\nblocks = [{{ tool = \"Bash\", input = {input} }}]\n\
         [[reply]]\nwhen = {{ turn = 1, tools = true }}\nblocks = [{{ tool = \"Write\", input = {{ file_path = \"/workspace/src/made\", content = \"by the tool\" }} }}]\n\
         [default]\ntext = \"done\"\n"
    );
    let (world, _policies) =
        world(&script, "[workspace]\n", "[workspace]\nwritable = [\"src\", \"REPORT.md\"]\n");
    let workspace = world.workspace("repo", UID);
    for name in ["src", "docs", ".git"] {
        std::fs::create_dir(workspace.join(name)).unwrap();
    }
    for (name, text) in [("REPORT.md", "old\n"), ("docs/text", "some text\n")] {
        std::fs::write(workspace.join(name), text).unwrap();
    }
    for name in ["src", "docs", ".git", "REPORT.md", "docs/text"] {
        std::os::unix::fs::chown(workspace.join(name), Some(UID), Some(UID)).unwrap();
    }
    let spec = json!({ "prompt": "x", "policy": "zoo", "workspace": { "path": workspace, "mode": "bind" } });
    let (events, job) = run_as_user(&world, &spec);
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{}", world.log());
    let text = tool_results(&events);
    assert!(text.matches("Read-only file system").count() >= 3 && text.contains("code 1"), "{text}");
    assert!(text.contains("some text"), "the rest can be read: {text}");
    assert_eq!(std::fs::read_to_string(workspace.join("src/file")).unwrap(), "new\n");
    assert_eq!(std::fs::read_to_string(workspace.join("REPORT.md")).unwrap(), "the report\n", "{text}");
    assert_eq!(std::fs::read_to_string(workspace.join("src/made")).unwrap(), "by the tool", "{text}");
    // A copy has the same walls, and nothing of it reaches the original.
    let before = std::fs::read_to_string(workspace.join("src/file")).unwrap();
    std::fs::write(workspace.join("src/file"), "as it was\n").unwrap();
    let copy = json!({ "prompt": "x", "policy": "zoo", "workspace": { "path": workspace, "mode": "copy" } });
    let (events, job) = run_as_user(&world, &copy);
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{}", world.log());
    let text = tool_results(&events);
    assert!(text.matches("Read-only file system").count() >= 3 && text.contains("code 1"), "{text}");
    assert_eq!(std::fs::read_to_string(workspace.join("src/file")).unwrap(), "as it was\n");
    std::fs::write(workspace.join("src/file"), before).unwrap();
    let told = world
        .recorder
        .requests()
        .iter()
        .any(|r| r.json().to_string().contains("can be written: src, REPORT.md."));
    assert!(told, "the agent was told what it can write");
    for path in ["other", "docs/y", "gone", ".git/x"] {
        assert!(!workspace.join(path).exists(), "{path} was written");
    }
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(workspace.join("src/file")).unwrap());
    assert_eq!(owner, UID);

    // A path that is not there is the policy's or the user's mistake, and is named.
    std::fs::remove_file(workspace.join("REPORT.md")).unwrap();
    let (_, job) = run_as_user(&world, &spec);
    assert_eq!((&job["outcome"], &job["reason"]), (&json!("failed"), &json!("workspace_setup")), "{job:#}");
    let message = job["message"].as_str().unwrap();
    assert!(message.contains("REPORT.md") && message.contains("does not exist"), "{message}");
    world.end();
}

#[test]
fn the_report_is_taken_out_of_the_cell_and_given_to_its_owner_alone() {
    let command = "case \"$(cat mark)\" in \
        good) printf '# fine \\033[2J\\n' >$HOME/report.md;; \
        link) ln -s /etc/passwd $HOME/report.md;; \
        huge) truncate -s 1G $HOME/report.md;; esac; ls -l $HOME/report.md";
    let (world, _policies) = world(
        &one_command(command),
        "[limits]\n",
        "[output]\nreport = \"/home/agent/report.md\"\nreport_bytes_max = 5000\n\n[limits]\n",
    );
    let ask = |job: &Value| {
        let path = format!("/v1/jobs/{}/report", job["id"].as_str().unwrap());
        world.curl("GET", &path, "", &["-o", "-"], Some(UID)).unwrap()
    };
    let run = |mark: &str| {
        let workspace = world.workspace(mark, UID);
        std::fs::write(workspace.join("mark"), mark).unwrap();
        let spec = json!({ "prompt": "x", "policy": "zoo", "workspace": { "path": workspace, "mode": "read-only" } });
        let (events, job) = run_as_user(&world, &spec);
        assert_eq!(job["outcome"], "succeeded", "{job:#}");
        let notes = events.iter().filter(|e| e["type"] == "note").filter_map(|e| e["text"].as_str());
        let notes: Vec<String> = notes.filter(|n| n.contains("report")).map(str::to_owned).collect();
        (job, notes.join("; "))
    };
    let (job, notes) = run("good");
    assert_eq!((&job["report_bytes"], notes.as_str()), (&json!(12), ""));
    let answer = ask(&job);
    assert_eq!((answer.status, answer.body.as_str()), (200, "# fine \u{1b}[2J\n"));
    let path = format!("/v1/jobs/{}/report", job["id"].as_str().unwrap());
    let other = world.curl("GET", &path, "", &[], Some(4343)).unwrap();
    assert_eq!((other.status, other.json()["error"]["code"].clone()), (404, json!("not_found")));
    assert!(!other.body.contains("fine"));
    let id = job["id"].as_str().unwrap();
    let (code, out, err) = world.run(&["report", id, "--socket", world.socket().to_str().unwrap()]);
    assert_eq!((code, out.as_str(), err.as_str()), (0, "# fine \u{1b}[2J\n", ""));
    let asked =
        world.recorder.requests().iter().any(|r| r.json().to_string().contains("/home/agent/report.md"));
    assert!(asked, "the agent was told of the report");

    for (mark, why) in [("link", "symbolic link"), ("none", "wrote none")] {
        let (job, notes) = run(mark);
        assert_eq!(job["report_bytes"], Value::Null, "{mark}");
        assert!(notes.contains(why), "{mark}: {notes}");
        let answer = ask(&job);
        assert_eq!(answer.status, 404, "{mark}");
        assert!(!answer.body.contains("root:"), "{mark}: {}", answer.body);
        let error = &answer.json()["error"];
        assert!(error["message"].as_str().unwrap().contains("has no report"), "{error}");
        assert!(error["hint"].as_str().unwrap().contains("hotcell logs"), "{error}");
    }
    let (job, notes) = run("huge");
    assert_eq!(job["report_bytes"], 5000);
    assert!(notes.contains("cut to 5000 bytes"), "{notes}");
    world.end();
}
