//! From flags to a job spec.

use clap::Parser;

use super::*;
use crate::cli::{Cli, Command, fake};

fn spec_of(args: &[&str]) -> Result<Value, String> {
    let args = ["hotcell", "run"].iter().chain(args);
    let cli = Cli::try_parse_from(args).map_err(|e| e.to_string())?;
    let Command::Run(args) = cli.command else { return Err("not run".into()) };
    let (mut context, ..) = fake::context();
    context.machine.vars.insert("TZ".into(), "UTC".into());
    let bytes = job_spec(&args, &context).map_err(|e| e.to_string())?;
    serde_json::from_slice(&bytes).map_err(|e| e.to_string())
}

#[test]
fn a_prompt_is_enough() {
    assert_eq!(spec_of(&["do it"]), Ok(json!({"prompt": "do it"})));
    assert!(spec_of(&[]).expect_err("no prompt").contains("PROMPT"));
    assert!(spec_of(&[" "]).expect_err("empty").contains("prompt: is empty"));
}

#[test]
fn an_address_is_fetched_and_a_directory_is_worked_on_unless_a_ref_is_named() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().canonicalize().expect("path");
    let path = path.to_str().expect("UTF-8");
    let workspace = |args: &[&str]| spec_of(&[args, &["go"]].concat()).map(|spec| spec["workspace"].clone());
    let url = "git@example.org:team/app.git";
    assert_eq!(workspace(&["-w", url]), Ok(json!({"git": {"url": url}})));
    let both = json!({"git": {"url": url, "ref": "v1"}, "mode": "read-only"});
    assert_eq!(workspace(&["-w", url, "--ref", "v1", "--mode", "read-only"]), Ok(both));
    assert_eq!(workspace(&["-w", path]), Ok(json!({"path": path})));
    assert_eq!(workspace(&["-w", path, "--ref", "v1"]), Ok(json!({"git": {"url": path, "ref": "v1"}})));
    for (args, words) in [
        (&["-w", "no-such-directory"][..], "no-such-directory cannot be used"),
        (&["-w", "ext::sh -c id"][..], "workspace.git.url"),
        (&["-w", "https://u:p@example.org/app"][..], "holds a password"),
        (&["-w", url, "--ref", "a..b"][..], "workspace.git.ref"),
        (&["-w", url, "--apply"][..], "--apply is for a directory of yours"),
        (&["-w", url, "--mode", "bind"][..], "workspace.mode: bind is for a directory"),
        (&["--ref", "v1"][..], "--workspace"),
    ] {
        let error = workspace(args).expect_err("refused");
        assert!(error.contains(words), "{args:?}: {error}");
    }
}

#[test]
fn every_flag_has_its_key() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().canonicalize().expect("path");
    let link = path.join("link");
    std::os::unix::fs::symlink(&path, &link).expect("link");
    let spec = spec_of(&[
        "-w",
        link.to_str().expect("UTF-8"),
        "--mode",
        "read-only",
        "-p",
        "trusted",
        "-m",
        "m1",
        "--fallback-model",
        "m2",
        "--effort",
        "high",
        "--image",
        "img",
        "--agent",
        "2.1.197",
        "--permission-mode",
        "plan",
        "--tools",
        "Read,Bash",
        "--allowed-tools",
        "Bash(git log, git diff)",
        "--disallowed-tools",
        "Write",
        "--system-prompt",
        "s",
        "--append-system-prompt",
        "a",
        "-e",
        "CI=1",
        "-e",
        "TZ",
        "--max-turns",
        "5",
        "--cost",
        "0.50",
        "--time",
        "30m",
        "--silence",
        "90",
        "--cpus",
        "1.5",
        "--memory",
        "4g",
        "--pids",
        "64",
        "--disk",
        "512m",
        "-l",
        "team=web",
        "--priority",
        "-3",
        "go",
    ]);
    let wanted = json!({
        "prompt": "go", "workspace": {"path": path, "mode": "read-only"}, "policy": "trusted", "model": "m1",
        "fallback_model": "m2", "effort": "high", "image": "img", "agent": "2.1.197", "permission_mode": "plan",
        "tools": ["Read", "Bash"], "allowed_tools": ["Bash(git log, git diff)"], "disallowed_tools": ["Write"],
        "system_prompt": "s", "append_system_prompt": "a", "env": {"CI": "1", "TZ": "UTC"},
        "limits": {"max_turns": 5, "cost_usd": 0.5, "wall_s": 1800, "silence_s": 90, "cpus": 1.5,
            "memory_mib": 4096, "pids": 64, "disk_mib": 512},
        "labels": {"team": "web"}, "priority": -3,
    });
    assert_eq!(spec, Ok(wanted));
    assert_eq!(spec_of(&["--tools", "", "go"]), Ok(json!({"prompt": "go", "tools": []})));
}

#[test]
fn flags_win_over_the_keys_of_a_spec_file() {
    let dir = tempfile::tempdir().expect("dir");
    let file = dir.path().join("job.json");
    std::fs::write(&file, r#"{"prompt":"a","limits":{"wall_s":5,"pids":99},"labels":{"x":"1"}}"#)
        .expect("write");
    let file = file.to_str().expect("UTF-8");
    let spec = spec_of(&["--spec", file, "--time", "9", "-l", "y=2"]);
    let wanted = json!({"prompt": "a", "limits": {"wall_s": 9, "pids": 99}, "labels": {"x": "1", "y": "2"}});
    assert_eq!(spec, Ok(wanted));
    assert_eq!(spec_of(&["--spec", file, "b"]).map(|s| s["prompt"].clone()), Ok(json!("b")));
}

#[test]
fn a_mistake_in_a_spec_file_is_named_with_its_place() {
    let dir = tempfile::tempdir().expect("dir");
    let file = dir.path().join("job.json");
    for (text, words) in [
        ("{\"prompt\":\"a\",\n \"promt\":1}", "unknown field `promt`"),
        ("{\"prompt\":\"a\",\n \"limits\":{\"wall_s\":0}}", "limits.wall_s"),
        ("{\"prompt\":", "line 1"),
        ("[]", "not a JSON object"),
    ] {
        std::fs::write(&file, text).expect("write");
        let error = spec_of(&["--spec", file.to_str().expect("UTF-8")]).expect_err(text);
        assert!(error.contains(words) && error.contains("job.json"), "{error}");
    }
    std::fs::write(&file, r#"{"labels":"x"}"#).expect("write");
    let error = spec_of(&["--spec", file.to_str().expect("UTF-8"), "-l", "a=b", "go"]).expect_err("labels");
    assert!(error.contains("job.json"), "{error}");
}

#[test]
fn what_cannot_be_meant_is_refused_before_anything_is_sent() {
    for (args, words) in [
        (&["-w", "/nonexistent", "x"][..], "/nonexistent"),
        (&["-w", "/dev/null", "x"], "not a directory"),
        (&["--mode", "bind", "x"], "-w"),
        (&["--spec", "-", "-"], "both"),
        (&["-e", "NOT_SET", "x"], "NOT_SET"),
        (&["--memory", "128m", "x"], "limits.memory_mib"),
        (&["--priority", "101", "x"], "priority"),
        (&["--json", "--raw", "x"], "cannot be used with"),
    ] {
        let error = spec_of(args).expect_err("must be refused");
        assert!(error.contains(words), "{args:?}: {error}");
    }
}

#[test]
fn an_amount_below_zero_is_told_with_its_flag() {
    for (flag, value) in [
        ("--cost", "-1"),
        ("--batch-cost-usd", "-0.5"),
        ("--max-turns", "-1"),
        ("--time", "-5m"),
        ("--silence", "-1"),
        ("--cpus", "-2"),
        ("--memory", "-4g"),
        ("--pids", "-1"),
        ("--disk", "-1g"),
    ] {
        let (mut context, _, stderr) = crate::cli::fake::context();
        let args = ["hotcell", "run", "x", "--batch", "b", flag, value].map(Into::into);
        assert_eq!(crate::cli::run_args(&args, &mut context), ExitCode::Usage);
        let said = stderr.text();
        assert!(said.contains("must be positive") && said.contains(flag), "{flag}: {said}");
    }
}
