//! Commands against a daemon that speaks the wire types: what they send, print and answer.

use clap::CommandFactory;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::fake::{self, Daemon, JOB, Script, context, error, events_of_a_job, job, numbered};
use super::follow::Interrupts;
use super::*;

const OTHER: &str = "j0dq2v7hzzzzzzzz";

fn done() -> Value {
    job(JOB, json!({"state": "done", "outcome": "succeeded", "last_seq": 29}))
}

fn stopped() -> Value {
    json!({"state": "done", "outcome": "stopped", "reason": "cancelled", "last_seq": 4})
}

/// Runs a command line as a process would, but for the runtime.
async fn hotcell(daemon: &Daemon, args: &[&str], context: &mut Context) -> ExitCode {
    let socket = daemon.socket();
    let socket = ["--socket", socket.to_str().expect("UTF-8")];
    let args = ["hotcell"].iter().chain(args).chain(&socket);
    let cli = Cli::try_parse_from(args).expect("command line");
    context.out.json_errors(cli.command.json());
    let result = match cli.command {
        Command::Ls(args) => ls::ls(&args, context).await,
        Command::Show(args) => show::show(&args, context).await,
        Command::Logs(args) => logs::logs(&args, context).await,
        Command::Report(args) => report::report(&args, context).await,
        Command::Cancel(args) => cancel::cancel(&args, context).await,
        Command::Unpark(args) => unpark::unpark(&args, context).await,
        Command::Wait(args) => wait_for::wait_for(&args, context).await,
        Command::Rm(args) => rm::rm(&args, context).await,
        Command::Cost(args) => cost::cost(&args, context).await,
        Command::Health(args) => health::health(&args, context).await,
        Command::Doctor(args) => doctor::doctor(&args, context).await,
        Command::Queue(args) => queue::queue(&args, context).await,
        Command::Pause(args) => pause::pause(&args, context).await,
        Command::Resume(args) => pause::resume(&args, context).await,
        Command::Drain(args) => drain::drain(&args, context).await,
        Command::Detach(args) => drain::detach(&args, context).await,
        Command::Whoami(args) => whoami::whoami(&args, context).await,
        Command::Audit(args) => audit::audit(&args, context).await,
        Command::Run(args) => {
            let (_hand, hand) = mpsc::channel(1);
            run_with(&args, daemon, context, hand).await
        }
        _ => unreachable!("not a client command"),
    };
    result.unwrap_or_else(|error| {
        context.out.error(&error);
        error.exit_code()
    })
}

async fn run_with(
    args: &run::RunArgs,
    daemon: &Daemon,
    context: &mut Context,
    hand: mpsc::Receiver<()>,
) -> Result<ExitCode, CliError> {
    let client = Client::new(daemon.socket());
    let spec = bytes::Bytes::from_static(br#"{"prompt":"x"}"#);
    run::submit_and_follow(args, spec, &client, context, &mut Interrupts::Channel(hand)).await
}

fn run_args(args: &[&str]) -> run::RunArgs {
    let cli = Cli::try_parse_from(["hotcell", "run", "x"].iter().chain(args)).expect("command line");
    let Command::Run(args) = cli.command else { unreachable!("run") };
    *args
}

#[tokio::test]
async fn a_run_shows_the_job_and_ends_with_its_exit_code() {
    let daemon = Daemon::start(Script { jobs: vec![done()], events: events_of_a_job(), ..Script::default() });
    let (mut context, stdout, stderr) = context();
    let code = hotcell(&daemon, &["run", "x", "--idempotency-key", "k1"], &mut context).await;
    assert_eq!((code, stderr.text().as_str()), (ExitCode::Succeeded, ""));
    let text = stdout.text();
    assert!(
        text.starts_with(&format!(
            "{JOB}  trusted · claude-sonnet-4-6 · hotcell/cell · /home/ann/app (bind)\n"
        ))
    );
    assert!(text.contains("● Bash  cargo test --quiet\n") && text.contains("✓ succeeded\n"), "{text}");
    let requests = daemon.requests();
    assert_eq!(requests[0], ("POST /v1/jobs".into(), "k1".into(), r#"{"prompt":"x"}"#.into()));
    assert_eq!(requests[1].0, format!("GET /v1/jobs/{JOB}/events?from=0&follow=1"));
}

#[tokio::test]
async fn as_json_a_run_is_its_events_and_then_the_job() {
    let daemon = Daemon::start(Script { jobs: vec![done()], events: events_of_a_job(), ..Script::default() });
    let (mut context, stdout, _) = context();
    assert_eq!(hotcell(&daemon, &["run", "x", "--json"], &mut context).await, ExitCode::Succeeded);
    let lines: Vec<Value> =
        stdout.text().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines[..29], events_of_a_job());
    assert_eq!(lines[29]["job"]["id"], JOB);
    assert_eq!(lines.len(), 30);
}

#[tokio::test]
async fn a_detached_run_prints_the_id_alone() {
    let daemon = Daemon::start(Script { jobs: vec![done()], ..Script::default() });
    let (mut context, stdout, _) = context();
    assert_eq!(hotcell(&daemon, &["run", "x", "-d"], &mut context).await, ExitCode::Succeeded);
    assert_eq!(stdout.text(), format!("{JOB}\n"));
    assert_eq!(daemon.requests().len(), 1);
}

#[tokio::test]
async fn a_connection_that_breaks_is_made_again_with_nothing_doubled_or_left_out() {
    let whole: usize = events_of_a_job().iter().map(|e| e.to_string().len() + 1).sum();
    // In the first line, in the middle of a line, just before the end.
    let cuts = [10, whole / 2, 300].into();
    let daemon =
        Daemon::start(Script { jobs: vec![done()], events: events_of_a_job(), cuts, ..Script::default() });
    let (mut context, stdout, stderr) = context();
    assert_eq!(hotcell(&daemon, &["run", "x", "--json"], &mut context).await, ExitCode::Succeeded);
    let numbers: Vec<u64> = stdout
        .text()
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).expect("JSON")["seq"].as_u64())
        .collect();
    assert_eq!(numbers, (1..=29).collect::<Vec<u64>>());
    assert!(stderr.text().contains("trying again"), "{}", stderr.text());
}

#[tokio::test]
async fn a_submit_whose_answer_got_lost_is_sent_again_with_the_same_key() {
    let daemon = Daemon::start(Script { jobs: vec![done()], lost_submits: 2, ..Script::default() });
    let (mut context, stdout, _) = context();
    assert_eq!(hotcell(&daemon, &["run", "x", "-d"], &mut context).await, ExitCode::Succeeded);
    assert_eq!(stdout.text(), format!("{JOB}\n"));
    let keys: Vec<String> = daemon.requests().into_iter().map(|(_, key, _)| key).collect();
    assert!(keys.len() == 3 && keys[0].starts_with("run-"), "{keys:?}");
    assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
}

fn cancellable() -> Script {
    let mut all = numbered(vec![
        json!({"type": "state", "state": "queued"}),
        json!({"type": "state", "state": "running"}),
        json!({"type": "stop", "reason": "cancelled", "detail": "asked for by uid 1000"}),
        json!({"type": "summary", "outcome": "stopped", "reason": "cancelled", "totals": fake::totals()}),
    ]);
    let after_cancel = all.split_off(2);
    Script { jobs: vec![job(JOB, stopped())], events: all, after_cancel, ..Script::default() }
}

#[tokio::test]
async fn ctrl_c_cancels_the_job_and_waits_for_its_end() {
    let daemon = Daemon::start(cancellable());
    let (mut context, stdout, stderr) = context();
    let (hand, hears) = mpsc::channel(2);
    let args = run_args(&[]);
    let (code, ()) = tokio::join!(run_with(&args, &daemon, &mut context, hears), async {
        daemon.heard("/events").await;
        hand.send(()).await.expect("press");
    });
    assert_eq!(code.expect("run"), ExitCode::Cancelled);
    assert!(stdout.text().contains("■ stopped: cancelled"), "{}", stdout.text());
    assert!(stderr.text().contains("cancelling"), "{}", stderr.text());
    daemon.heard("/cancel").await;
}

#[tokio::test]
async fn ctrl_c_before_the_daemon_answered_cancels_the_job_once_it_has_an_id() {
    let daemon = Daemon::start(cancellable());
    let (mut context, stdout, stderr) = context();
    let (hand, hears) = mpsc::channel(2);
    hand.send(()).await.expect("press");
    let code = run_with(&run_args(&["--detach"]), &daemon, &mut context, hears).await.expect("run");
    assert_eq!(code, ExitCode::Cancelled);
    assert!(stdout.text().contains("■ stopped: cancelled"), "{}", stdout.text());
    assert!(stderr.text().contains("as soon as the daemon answers"), "{}", stderr.text());
}

#[tokio::test]
async fn a_second_ctrl_c_leaves_without_waiting() {
    let mut script = cancellable();
    // A daemon that accepts the cancel and then takes its time: the stream stays open.
    script.errors = vec![("POST /v1/jobs/", 202, job(JOB, json!({"state": "running"})))];
    let daemon = Daemon::start(script);
    let (mut context, stdout, stderr) = context();
    let (hand, hears) = mpsc::channel(2);
    let args = run_args(&["--json"]);
    let (code, ()) = tokio::join!(run_with(&args, &daemon, &mut context, hears), async {
        daemon.heard("/events").await;
        hand.send(()).await.expect("press");
        daemon.heard("/cancel").await;
        hand.send(()).await.expect("press again");
    });
    assert_eq!(code.expect("run"), ExitCode::Cancelled);
    assert!(!stdout.text().contains("summary"));
    assert!(stderr.text().contains(&format!("hotcell logs -f {JOB}")), "{}", stderr.text());
}

#[tokio::test]
async fn what_the_daemon_refuses_is_told_with_fault_and_hint() {
    let refusal = error("above_policy", "limits.cost_usd: 5 is not \u{1b}[31mallowed");
    let errors = vec![("POST /v1/jobs", 403, refusal.clone())];
    let daemon = Daemon::start(Script { errors, ..Script::default() });
    let (mut context, stdout, stderr) = context();
    assert_eq!(hotcell(&daemon, &["run", "x"], &mut context).await, ExitCode::Usage);
    assert_eq!(stdout.text(), "");
    assert_eq!(
        stderr.text(),
        "hotcell: limits.cost_usd: 5 is not allowed\n  \
         fault: the job: the same again would end the same\n  hint: do something else\n"
    );
    let (mut context, stdout, stderr) = fake::context();
    assert_eq!(hotcell(&daemon, &["run", "x", "--json"], &mut context).await, ExitCode::Usage);
    assert_eq!(serde_json::from_str::<Value>(&stdout.text()).ok(), Some(refusal));
    assert_eq!(stderr.text(), "");
}

#[tokio::test]
async fn without_a_daemon_the_exit_code_is_4() {
    let daemon = Daemon::start(Script::default());
    std::fs::remove_file(daemon.socket()).expect("remove");
    let (mut context, _, stderr) = context();
    assert_eq!(hotcell(&daemon, &["ls"], &mut context).await, ExitCode::Unavailable);
    assert!(stderr.text().contains("hotcell serve"), "{}", stderr.text());
}

#[tokio::test]
async fn ls_turns_pages_and_passes_its_filters() {
    let jobs: Vec<Value> = [
        (JOB, json!({"state": "running", "ended_at": null})),
        (
            OTHER,
            json!({"state": "queued", "started_at": null, "title": "über\u{1b}[2J\nzwei", "cost_usd": 0.0}),
        ),
        ("j0dq2v7h00000000", json!({"state": "stopping", "reason": "deadline"})),
        (
            "j0dq2v7h00000001",
            json!({"state": "done", "outcome": "failed", "phase": "run", "reason": "oom",
            "blame": "job", "message": "killed", "policy": "default"}),
        ),
        ("j0dq2v7h00000002", stopped()),
    ]
    .into_iter()
    .map(|(id, state)| job(id, state))
    .collect();
    let daemon = Daemon::start(Script { jobs: jobs.clone(), ..Script::default() });
    let (mut context, stdout, _) = context();
    let args = ["ls", "-s", "done", "-l", "team=a&b", "-p", "trusted", "--all-users", "-n", "4", "--json"];
    assert_eq!(hotcell(&daemon, &args, &mut context).await, ExitCode::Succeeded);
    let list: Value = serde_json::from_str(&stdout.text()).expect("JSON");
    assert_eq!(list["jobs"].as_array().map(Vec::len), Some(4));
    let requests = daemon.requests();
    assert_eq!(requests[0].0, "GET /v1/jobs?limit=4&state=done&label=team%3Da%26b&policy=trusted&all=1");
    assert_eq!(requests.len(), 2);

    let views: Vec<crate::api::wire::JobView> =
        jobs.into_iter().map(|job| serde_json::from_value(job).expect("job")).collect();
    let now_ms = 1_767_323_200_000;
    let table = render::tables::jobs(render::Paint::default(), &views, now_ms, true);
    insta::assert_snapshot!("ls", table.as_str());
    let none = render::tables::jobs(render::Paint::default(), &[], now_ms, false);
    assert_eq!(none.as_str(), "no jobs\n");
}

#[test]
fn show_tells_all_about_a_job() {
    let failed = json!({"state": "done", "outcome": "failed", "phase": "run", "reason": "provider_limit",
        "blame": "provider", "message": "429 rate_limit", "result": null, "workspace": null,
        "workspace_mode": "none", "priority": 3});
    let shown: Vec<String> = [done(), job(OTHER, failed)]
        .into_iter()
        .map(|job| {
            let job = serde_json::from_value(job).expect("job");
            render::tables::job(render::Paint::default(), &job, 0).as_str().to_owned()
        })
        .collect();
    insta::assert_snapshot!("show", shown.join("----\n"));
}

#[tokio::test]
async fn an_id_may_be_shortened_while_it_names_one_job() {
    let jobs = vec![done(), job(OTHER, json!({"state": "queued"}))];
    let daemon = Daemon::start(Script { jobs, ..Script::default() });
    for (name, code, words) in [
        ("j0dq2v7hk", ExitCode::Succeeded, JOB),
        ("j0dq2v7h", ExitCode::Usage, "2 jobs"),
        ("j9", ExitCode::Usage, "no job's id begins with j9"),
        ("../x", ExitCode::Usage, "not the id of a job"),
        ("j0000000000000000", ExitCode::Usage, "not the id of a job"),
        ("j000000000000000", ExitCode::Usage, "no such job"),
    ] {
        let (mut context, stdout, stderr) = context();
        assert_eq!(hotcell(&daemon, &["show", name], &mut context).await, code, "{name}");
        let said = stdout.text() + &stderr.text();
        assert!(said.contains(words), "{name}: {said}");
    }
}

#[tokio::test]
async fn one_bad_id_does_not_keep_the_other_jobs_from_being_removed() {
    let errors = vec![("DELETE /v1/jobs/j0dq2v7hz", 409, error("not_done", "the job is not done yet"))];
    let jobs = vec![done(), job(OTHER, json!({"state": "queued"}))];
    let daemon = Daemon::start(Script { jobs, errors, ..Script::default() });
    let (mut context, stdout, stderr) = context();
    assert_eq!(hotcell(&daemon, &["rm", OTHER, JOB], &mut context).await, ExitCode::Failed);
    assert_eq!(stdout.text(), format!("{JOB}  removed\n"));
    assert!(stderr.text().contains("not done yet"));
}

#[tokio::test]
async fn cancel_says_where_the_job_stands() {
    let daemon = Daemon::start(Script { jobs: vec![job(JOB, stopped())], ..Script::default() });
    let (mut context, stdout, _) = context();
    assert_eq!(hotcell(&daemon, &["cancel", JOB], &mut context).await, ExitCode::Succeeded);
    assert_eq!(stdout.text(), format!("{JOB}  done (stopped)\n"));
}

#[tokio::test]
async fn logs_begin_where_asked_and_follow_gives_the_jobs_exit_code() {
    let failed = json!({"state": "done", "outcome": "stopped", "reason": "deadline", "last_seq": 29});
    let daemon = Daemon::start(Script {
        jobs: vec![job(JOB, failed)],
        events: events_of_a_job(),
        ..Script::default()
    });
    let (mut context, stdout, _) = context();
    let args = ["logs", JOB, "--from", "27", "--json"];
    assert_eq!(hotcell(&daemon, &args, &mut context).await, ExitCode::Succeeded);
    assert_eq!(stdout.text().lines().count(), 3);
    let (mut context, stdout, _) = fake::context();
    assert_eq!(hotcell(&daemon, &["logs", "-f", JOB], &mut context).await, ExitCode::Stopped);
    assert!(stdout.text().starts_with("· queued\n"), "{}", stdout.text());
    // Nothing follows the last event: the stream's end is the end.
    let args = ["logs", "-f", JOB, "--from", "30"];
    assert_eq!(hotcell(&daemon, &args, &mut context).await, ExitCode::Stopped);
}

#[tokio::test]
async fn the_queue_is_shown_with_places_and_reasons_and_others_are_counted() {
    let queue = json!({
        "slots": {"used": 2, "total": 2}, "paused": {"since": "2026-01-02T03:04:05Z", "uid": 0},
        "waiting": 5, "parked": 1,
        "jobs": [
            {"id": JOB, "position": 3, "uid": 7, "priority": -1, "why": "user_limit", "until": null},
            {"id": OTHER, "position": null, "uid": 7, "priority": 0, "why": "provider_limit\u{1b}[2J",
             "until": "2026-01-02T04:00:00Z"},
        ],
    });
    let errors = vec![("GET /v1/queue", 200, queue.clone())];
    let daemon = Daemon::start(Script { errors, ..Script::default() });
    let (mut context, stdout, _) = context();
    assert_eq!(hotcell(&daemon, &["queue"], &mut context).await, ExitCode::Succeeded);
    let expected = format!(
        "2 of 2 slots taken, 5 waiting, 1 parked\n\
         paused by uid 0 at 2026-01-02T03:04:05Z: nothing starts until `hotcell resume`\n\
         POS  JOB               UID  PRIORITY  WAITS FOR\n\
         3    {JOB}  7    -1        its user's limit\n\
         -    {OTHER}  7    0         provider_limit until 2026-01-02T04:00:00Z\n\
         4 more that are not shown\n"
    );
    assert_eq!(stdout.text(), expected);
    let (mut context, stdout, _) = fake::context();
    assert_eq!(hotcell(&daemon, &["queue", "--json"], &mut context).await, ExitCode::Succeeded);
    assert_eq!(serde_json::from_str::<Value>(&stdout.text()).ok(), Some(queue));
}

#[tokio::test]
async fn who_may_not_end_or_hold_the_daemon_is_told_so_with_exit_code_2() {
    let no = error("above_access", "user 7 may neither end nor hold the daemon");
    let errors = vec![("POST /v1/daemon/", 403, no)];
    let daemon = Daemon::start(Script { errors, ..Script::default() });
    for command in ["drain", "detach", "pause", "resume"] {
        let (mut context, _, stderr) = context();
        assert_eq!(hotcell(&daemon, &[command], &mut context).await, ExitCode::Usage);
        assert!(stderr.text().contains("neither end nor hold"), "{}", stderr.text());
    }
}

#[tokio::test]
async fn whoami_tells_what_may_be_done_and_fails_who_is_not_listed() {
    let me = json!({"uid": 1001, "user": "alice", "groups": [{"gid": 100, "name": "users"}, {"gid": 7, "name": null}],
        "admin": false, "listed": true, "default_policy": "review",
        "policies": [{"name": "review", "description": "reads\u{1b}[2J", "cost_usd": 0.5}],
        "providers": ["*"], "images": ["hotcell/cell*"], "slots": {"used": 1, "queued": 2, "max": 3},
        "budgets": [{"scope": "user_day", "limit_usd": 5.0, "spent_usd": 1.25, "reserved_usd": 0.0, "resets_at": null}],
        "access": ["[[access]] 1 (config.toml, line 2)"]});
    let mut stranger = me.clone();
    (stranger["listed"], stranger["access"]) = (json!(false), json!([]));
    let daemon = Daemon::start(Script { errors: vec![("GET /v1/whoami", 200, me)], ..Script::default() });
    let (mut context, stdout, _) = context();
    assert_eq!(hotcell(&daemon, &["whoami"], &mut context).await, ExitCode::Succeeded);
    assert_eq!(
        stdout.text(),
        "alice  uid 1001\n  groups    users, 7\n  access    [[access]] 1 (config.toml, line 2)\n\
         \x20 policies  review (default), $0.50 a job: reads\n  providers *\n  images    hotcell/cell*\n\
         \x20 slots     1 of 3 in use, 2 waiting\n\
         \x20 budget    user's budget of the day: $5.00, $1.2500 spent, $3.7500 left\n"
    );
    daemon.script.lock().expect("lock").errors = vec![("GET /v1/whoami", 200, stranger)];
    assert_eq!(hotcell(&daemon, &["whoami"], &mut context).await, ExitCode::Usage);
    assert!(stdout.text().contains("  not listed: "), "{}", stdout.text());
}

#[tokio::test]
async fn an_audit_asks_for_what_was_chosen_and_passes_records_on_as_they_came() {
    let record = json!({"at_ms": 5, "job": JOB, "uid": 1000, "seq": 3, "origin": "daemon", "kind": "stop",
        "reason": "deadline", "detail": "60 s"});
    let errors = vec![("GET /v1/audit", 200, record.clone()), ("GET /v1/jobs", 200, record.clone())];
    let daemon = Daemon::start(Script { errors, ..Script::default() });
    let (mut context, stdout, _) = context();
    let args = ["audit", "--kind", "tool,stop", "--denied", "--since", "1970-01-01T00:00:02Z"];
    assert_eq!(hotcell(&daemon, &args, &mut context).await, ExitCode::Succeeded);
    assert_eq!(daemon.requests()[0].0, "GET /v1/audit?kind=tool%2Cstop&denied=1&since_ms=2000");
    assert_eq!(hotcell(&daemon, &["audit", JOB], &mut context).await, ExitCode::Succeeded);
    assert_eq!(daemon.requests()[1].0, format!("GET /v1/jobs/{JOB}/audit?since_ms=0"));
    // A record without its line feed is torn: it is not shown.
    assert_eq!(stdout.text(), "");
}

#[tokio::test]
async fn doctor_names_each_thing_and_what_to_do_and_fails_where_one_fails() {
    let (mut context, stdout, _) = context();
    let checks = json!({ "status": "ok", "checks": [
        { "name": "engine", "verdict": "pass", "words": "20.10 at unix:///run/e.sock" },
        { "name": "runtimes", "verdict": "note", "words": "runc only", "hint": "make gvisor adds it" },
    ] });
    let mut failing = checks.clone();
    failing["status"] = json!("degraded");
    failing["checks"][0]["verdict"] = json!("fail");
    let daemon = Daemon::start(Script { errors: vec![("GET /v1/doctor", 200, checks)], ..Script::default() });
    assert_eq!(hotcell(&daemon, &["doctor"], &mut context).await, ExitCode::Succeeded);
    let said = stdout.text();
    assert!(said.contains("ok    engine     20.10 at unix:///run/e.sock"), "{said}");
    assert!(said.contains("note  runtimes   runc only\n                 make gvisor adds it\n"), "{said}");
    daemon.script.lock().expect("lock").errors = vec![("GET /v1/doctor", 200, failing)];
    assert_eq!(hotcell(&daemon, &["doctor"], &mut context).await, ExitCode::Unavailable);
    assert!(stdout.text().contains("fails engine"));
    assert_eq!(hotcell(&daemon, &["doctor", "--json"], &mut context).await, ExitCode::Unavailable);
    assert!(stdout.text().contains("\"verdict\":\"fail\""));
}

#[tokio::test]
async fn an_attack_tells_each_promise_and_a_broken_one_is_another_exit_code() {
    let (mut context, stdout, _) = context();
    let broken = json!({ "status": "broken", "attack": { "jobs": ["j1m86x2jg70znkzf"], "policy": "untrusted", "runtime": "runsc",
        "image": "hotcell/cell" }, "checks": [
        { "name": "network", "verdict": "fail", "promise": "a cell has no network", "words": "broken: eth0", "hint": "look" },
    ] });
    let errors = vec![("POST /v1/doctor", 200, broken)];
    let daemon = Daemon::start(Script { errors, ..Script::default() });
    assert_eq!(hotcell(&daemon, &["doctor", "--policy", "untrusted"], &mut context).await, ExitCode::Failed);
    let said = stdout.text();
    assert!(
        said.contains("fails network    a cell has no network: broken: eth0\n                 look\n"),
        "{said}"
    );
    assert!(said.contains("under untrusted (runsc, hotcell/cell), attacked by j1m86x2jg70znkzf"), "{said}");
    assert_eq!(hotcell(&daemon, &["doctor", "--attack", "--json"], &mut context).await, ExitCode::Failed);
}

#[tokio::test]
async fn health_has_an_exit_code() {
    let health = json!({"status": "ok", "version": "0.1.0", "instance": "h2v7hk0x",
        "engine": "unix:///var/run/docker.sock", "problems": []});
    let daemon = Daemon::start(Script { health, ..Script::default() });
    let (mut context, stdout, _) = context();
    assert_eq!(hotcell(&daemon, &["health"], &mut context).await, ExitCode::Succeeded);
    assert_eq!(stdout.text(), "ok  hotcell 0.1.0, instance h2v7hk0x, engine unix:///var/run/docker.sock\n");
    {
        let mut script = daemon.script.lock().expect("lock");
        script.health["status"] = json!("degraded");
        script.health["problems"] = json!(["the engine does not answer"]);
    }
    assert_eq!(hotcell(&daemon, &["health"], &mut context).await, ExitCode::Unavailable);
    assert!(stdout.text().ends_with("  the engine does not answer\n"));
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_the_command_without_a_word() {
    struct Closed;
    impl std::io::Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let daemon = Daemon::start(Script { jobs: vec![done()], events: events_of_a_job(), ..Script::default() });
    for args in [&["ls"][..], &["run", "x"], &["logs", JOB, "--json"], &["show", JOB], &["cancel", JOB]] {
        let stderr = fake::Written::default();
        let out = Out::to(Box::new(Closed), Box::new(stderr.clone()));
        let mut context = Context { out, machine: Machine::default() };
        assert_eq!(hotcell(&daemon, args, &mut context).await, ExitCode::Succeeded, "{args:?}");
        assert_eq!(stderr.text(), "");
    }
}

#[tokio::test]
async fn json_lines_hold_nothing_that_a_terminal_acts_upon() {
    let note = json!({"type": "note", "text": "a\u{9b}2J\u{202e}\u{7f}ä"});
    let last = json!({"type": "summary", "outcome": "succeeded", "totals": fake::totals()});
    let events = numbered(vec![note.clone(), last]);
    let daemon = Daemon::start(Script { jobs: vec![done()], events, ..Script::default() });
    let (mut context, stdout, _) = context();
    hotcell(&daemon, &["logs", JOB, "--json"], &mut context).await;
    let text = stdout.text();
    assert!(!text.contains(['\u{9b}', '\u{202e}', '\u{7f}']), "{text:?}");
    let first: Value = serde_json::from_str(text.lines().next().expect("line")).expect("JSON");
    assert_eq!(first["text"], note["text"]);
}

#[test]
fn a_misused_command_line_has_the_shape_of_all_errors() {
    let told = |args: &[&str]| {
        let (mut context, stdout, stderr) = fake::context();
        let args: Vec<OsString> = args.iter().map(Into::into).collect();
        assert_eq!(super::run_args(&args, &mut context), ExitCode::Usage);
        (stdout.text(), stderr.text())
    };
    let (_, text) = told(&["hotcell", "run", "--memory", "4", "x"]);
    assert!(text.starts_with("hotcell: invalid value '4' for '--memory <SIZE>'"), "{text}");
    assert!(text.contains("  hint: "), "{text}");
    let (_, text) = told(&["hotcell", "rum"]);
    assert!(text.contains("'rum'") && text.contains("run"), "{text}");
    let (json, text) = told(&["hotcell", "ls", "--json", "--limit", "0"]);
    let json: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((json["error"]["code"].as_str(), text.as_str()), (Some("usage"), ""));
}

#[test]
fn the_help_texts() {
    let mut command = Cli::command().term_width(100);
    command.build();
    let mut all = command.render_help().to_string();
    let mut add = |command: &mut clap::Command| {
        all += &format!(
            "\n======== {}\n{}",
            command.get_bin_name().unwrap_or("?"),
            command.clone().term_width(100).render_help()
        );
    };
    for sub in command.get_subcommands_mut() {
        add(sub);
        for leaf in sub.get_subcommands_mut() {
            add(leaf);
        }
    }
    insta::assert_snapshot!("help", all);
    let serve = command.find_subcommand("serve").expect("serve").clone();
    insta::assert_snapshot!("help_serve_long", serve.term_width(100).render_long_help().to_string());
}

#[test]
fn the_command_line_is_sound_and_has_completions() {
    Cli::command().debug_assert();
    for shell in ["bash", "zsh", "fish"] {
        let (mut context, stdout, _) = fake::context();
        let args: Vec<OsString> = ["hotcell", "completions", shell].iter().map(Into::into).collect();
        assert_eq!(super::run_args(&args, &mut context), ExitCode::Succeeded);
        assert!(stdout.text().contains("idempotency-key"), "{shell}");
    }
}

#[test]
fn the_schema_is_that_of_the_job_spec() {
    let (mut context, stdout, _) = fake::context();
    let args: Vec<OsString> = ["hotcell", "schema"].iter().map(Into::into).collect();
    assert_eq!(super::run_args(&args, &mut context), ExitCode::Succeeded);
    let schema: Value = serde_json::from_str(&stdout.text()).expect("JSON");
    assert_eq!(schema["title"], "JobSpec");
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(schema["oneOf"], json!([{ "required": ["prompt"] }, { "required": ["command"] }]));
}

#[tokio::test]
async fn a_report_goes_to_a_pipe_as_it_is_and_to_a_terminal_without_escapes() {
    let evil = "# done\u{1b}]0;owned\u{7}\n";
    let daemon =
        Daemon::start(Script { jobs: vec![done()], report: Some(evil.to_owned()), ..Script::default() });
    let (mut pipe, stdout, stderr) = context();
    assert_eq!(hotcell(&daemon, &["report", JOB], &mut pipe).await, ExitCode::Succeeded);
    assert_eq!((stdout.text().as_str(), stderr.text().as_str()), (evil, ""));
    let (mut terminal, stdout, _) = context();
    terminal.out.terminal = true;
    assert_eq!(hotcell(&daemon, &["report", JOB], &mut terminal).await, ExitCode::Succeeded);
    assert_eq!(stdout.text(), "# done\n");
    let dir = tempfile::tempdir().expect("dir");
    let file = dir.path().join("report.md");
    let (mut context, stdout, _) = context();
    let code = hotcell(&daemon, &["report", JOB, "-o", file.to_str().expect("UTF-8")], &mut context).await;
    assert_eq!((code, stdout.text().as_str()), (ExitCode::Succeeded, ""));
    assert_eq!(std::fs::read_to_string(&file).expect("written"), evil);
}

#[tokio::test]
async fn a_report_that_is_not_there_is_an_error_with_a_hint() {
    let daemon = Daemon::start(Script { jobs: vec![done()], ..Script::default() });
    let (mut context, stdout, stderr) = context();
    assert_eq!(hotcell(&daemon, &["report", JOB], &mut context).await, ExitCode::Usage);
    assert!(stderr.text().contains("no report") && stderr.text().contains("do something else"));
    assert_eq!(stdout.text(), "");
}
