//! Steps: commands that run before the agent in its cell, one at a time, and what they leave running.

use super::*;

/// A boot message with these scripts as its steps.
fn boot_with(cell: &Cell, steps: &[&str], agent: &str) -> Boot {
    let mut boot = cell.boot(agent);
    boot.start_now = false;
    let argv = |script: &&str| ["/bin/sh", "-c", script].map(OsString::from).to_vec();
    boot.steps = steps.iter().map(argv).collect();
    boot
}

/// Adds what comes on stderr to `stderr`, acknowledged, until a step has ended.
async fn until_ended(link: &mut Link, stderr: &mut Vec<u8>) -> (u32, ExitStatus) {
    loop {
        match next(link).await {
            LinkEvent::StepEnded { index, status } => return (index, status),
            LinkEvent::Stderr { end, bytes } => {
                stderr.extend_from_slice(&bytes);
                assert_eq!(end, stderr.len() as u64);
                link.handle().ack(OutputStream::Stderr, end);
            }
            LinkEvent::Connected { .. } | LinkEvent::Disconnected => {}
            event => panic!("{event:?}"),
        }
    }
}

/// Runs one step; what it printed and how it ended.
async fn run(link: &mut Link, stderr: &mut Vec<u8>, index: u32) -> (String, ExitStatus) {
    let from = stderr.len();
    link.handle().step(index);
    let (ended, status) = until_ended(link, stderr).await;
    assert_eq!(ended, index);
    (String::from_utf8_lossy(&stderr[from..]).into_owned(), status)
}

/// The pids that a script wrote to a file, one a line, once there are so many.
fn pids(path: &Path, count: usize) -> Vec<String> {
    let since = Instant::now();
    loop {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        if text.lines().count() >= count {
            return text.lines().map(str::to_owned).collect();
        }
        assert!(since.elapsed() < PATIENCE, "{text}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn gone(pid: &str) -> bool {
    !Path::new("/proc").join(pid).exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_run_one_after_the_other_as_the_agent_does_and_print_before_they_end() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let steps = [
        "pwd; echo $MARK; cat; echo err >&2; echo again >/dev/stderr; echo end",
        "echo two; trap '' TERM; echo x >file; exit 3",
        "cat file; kill -9 $$",
    ];
    let mut boot = boot_with(&cell, &steps, "cat file; echo $MARK");
    boot.env.push(("MARK".into(), "mark".into()));
    cell.start(&boot);
    let mut stderr = Vec::new();
    let pwd = cell.run_dir.path().display();
    let first = format!("{pwd}\nmark\nerr\nagain\nend\n");
    assert_eq!(run(&mut link, &mut stderr, 0).await, (first.clone(), ExitStatus::Code(0)));
    assert_eq!(run(&mut link, &mut stderr, 1).await, ("two\n".into(), ExitStatus::Code(3)));
    assert_eq!(run(&mut link, &mut stderr, 2).await, ("x\n".into(), ExitStatus::Signal(9)));
    link.handle().start();
    let (stdout, rest, report) = finish(&mut link).await;
    assert_eq!((stdout.as_slice(), rest.as_slice()), (b"x\nmark\n".as_slice(), b"".as_slice()));
    assert_eq!((report.status, report.reason), (ExitStatus::Code(0), ExitReason::Agent));
    assert_eq!(cell.exit_code(), 0);
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_step_waits_for_its_own_output_and_not_for_that_of_its_services() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let count = 30_000; // 1.9 MB
    let loud = format!("awk 'BEGIN {{ for (i = 0; i < {count}; i++) printf \"%063d\\n\", i }}'");
    let mut boot = boot_with(&cell, &[&loud, "yes noise & echo started"], "exit 4");
    boot.buffer_bytes_max = 64 << 10;
    cell.start(&boot);
    let mut stderr = Vec::new();
    link.handle().step(0);
    assert_eq!(until_ended(&mut link, &mut stderr).await, (0, ExitStatus::Code(0)));
    assert!(stderr == numbers(count), "{} bytes before the end", stderr.len());
    let (printed, status) = run(&mut link, &mut stderr, 1).await;
    assert!(printed.contains("started\n"), "{printed}");
    assert_eq!(status, ExitStatus::Code(0));
    link.handle().start();
    let (stdout, rest, report) = finish(&mut link).await;
    assert_eq!((stdout.as_slice(), report.status), (b"".as_slice(), ExitStatus::Code(4)));
    assert!(rest.is_empty() || String::from_utf8_lossy(&rest).contains("noise\n"));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_lives_on_into_the_agents_time_and_ends_with_the_cell() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let service = "sh -c 'echo $$ >>pids; while :; do echo tick; sleep 0.02; done' & \
                   setsid sh -c 'echo $$ >>pids; while :; do echo tock; sleep 0.02; done' >&2 & exit 0";
    cell.start(&boot_with(&cell, &[service], "echo agent; echo own >&2; cat >/dev/null"));
    let mut stderr = Vec::new();
    assert_eq!(run(&mut link, &mut stderr, 0).await.1, ExitStatus::Code(0));
    let services = pids(&cell.path("pids"), 2);
    link.handle().start();
    while !matches!(next(&mut link).await, LinkEvent::Stdout { .. }) {}
    // The agent runs: what the services print goes on beside what it prints itself.
    let mut text = String::new();
    while !["tick\n", "tock\n", "own\n"].iter().all(|word| text.contains(word)) {
        if let LinkEvent::Stderr { bytes, .. } = next(&mut link).await {
            text.push_str(&String::from_utf8_lossy(&bytes));
        }
    }
    assert!(!services.iter().any(|pid| gone(pid)));
    link.handle().close_stdin();
    let (_, _, report) = finish(&mut link).await;
    assert_eq!((report.status, report.reason), (ExitStatus::Code(0), ExitReason::Agent));
    assert!(services.iter().all(|pid| gone(pid)));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_links_in_a_step_lose_and_double_nothing_and_run_nothing_twice() {
    let mut cell = Cell::new();
    let count = 100_000; // 6.4 MB
    let step = format!(
        "echo run >>runs; awk 'BEGIN {{ for (i = 0; i < {count}; i++) printf \"%063d\\n\", i }}'; exit 6"
    );
    let mut boot = boot_with(&cell, &[&step, "echo second"], "wc -l <runs");
    boot.buffer_bytes_max = 256 << 10;
    cell.start(&boot);
    let expected = numbers(count);
    let mut journal = Vec::new();
    let resume = |journal: &Vec<u8>| Resume { stdout: 0, stderr: journal.len() as u64 };
    for round in 1..=8 {
        let mut link = cell.link(resume(&journal)).await;
        link.handle().step(0);
        while journal.len() < expected.len() * round / 9 {
            if let LinkEvent::Stderr { end, bytes } = next(&mut link).await {
                journal.extend_from_slice(&bytes);
                assert_eq!(end, journal.len() as u64);
                if round % 3 != 0 || journal.len() % 5 != 0 {
                    link.handle().ack(OutputStream::Stderr, end);
                }
            }
        }
        link.destroy().await.expect("the link ends");
    }
    // Its end is told again to each new daemon, whether that asks or not, until something else is asked for.
    for ask in [true, false, true, false] {
        let mut link = cell.link(resume(&journal)).await;
        if ask {
            link.handle().step(0);
        }
        assert_eq!(until_ended(&mut link, &mut journal).await, (0, ExitStatus::Code(6)));
        assert!(journal == expected, "{} bytes came, {} were printed", journal.len(), expected.len());
        link.destroy().await.expect("the link ends");
    }
    let mut link = cell.link(resume(&journal)).await;
    assert_eq!(until_ended(&mut link, &mut journal).await, (0, ExitStatus::Code(6)));
    let from = journal.len();
    assert_eq!(run(&mut link, &mut journal, 1).await, ("second\n".into(), ExitStatus::Code(0)));
    assert_eq!(journal.len(), from + 7);
    link.destroy().await.expect("the link ends");
    // A daemon whose journal ends earlier asks for the first one once more, and gets its end and no run.
    let mut link = cell.link(resume(&journal)).await;
    assert_eq!(until_ended(&mut link, &mut journal).await, (1, ExitStatus::Code(0)));
    assert_eq!(run(&mut link, &mut journal, 0).await, (String::new(), ExitStatus::Code(6)));
    link.handle().start();
    let (stdout, _, _) = finish(&mut link).await;
    assert_eq!(String::from_utf8_lossy(&stdout).trim(), "1", "the step ran more than once");
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_hangs_is_killed_with_all_it_started() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let hang =
        "trap '' TERM INT; setsid sleep 1000 & echo $! >>pids; echo $$ >>pids; while :; do sleep 1; done";
    cell.start(&boot_with(&cell, &[hang], "echo never"));
    link.handle().step(0);
    let all = tokio::task::block_in_place(|| pids(&cell.path("pids"), 2));
    link.handle().kill();
    let (stdout, _, report) = finish(&mut link).await;
    assert_eq!((report.status, report.reason), (ExitStatus::Signal(9), ExitReason::Killed));
    assert!(stdout.is_empty() && all.iter().all(|pid| gone(pid)));
    assert_eq!(cell.exit_code(), 137);
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cell_between_two_steps_is_killed_with_its_services() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    cell.start(&boot_with(&cell, &["sleep 1000 & echo $! >pids"], "echo never"));
    assert_eq!(run(&mut link, &mut Vec::new(), 0).await.1, ExitStatus::Code(0));
    let service = pids(&cell.path("pids"), 1);
    link.handle().kill();
    let (_, _, report) = finish(&mut link).await;
    assert_eq!((report.status, report.reason), (ExitStatus::Signal(9), ExitReason::Killed));
    assert!(gone(&service[0]));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wall_limit_holds_in_a_step_and_between_steps() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let mut boot =
        boot_with(&cell, &["trap 'echo asked; exit 9' TERM; while :; do sleep 0.05; done"], "echo never");
    boot.wall_limit_ms = 200;
    cell.start(&boot);
    link.handle().step(0);
    let (stdout, stderr, report) = finish(&mut link).await;
    // The shell tells that its `sleep` was ended, too.
    assert!(stdout.is_empty() && stderr.ends_with(b"asked\n"), "{}", String::from_utf8_lossy(&stderr));
    assert_eq!((report.status, report.reason), (ExitStatus::Code(9), ExitReason::WallLimit));
    link.destroy().await.expect("the link ends");

    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let mut boot = boot_with(&cell, &["sleep 1000 & echo $! >pids"], "echo never");
    boot.wall_limit_ms = 300;
    cell.start(&boot);
    assert_eq!(run(&mut link, &mut Vec::new(), 0).await.1, ExitStatus::Code(0));
    let (_, _, report) = finish(&mut link).await;
    assert_eq!((report.status, report.reason), (ExitStatus::Signal(9), ExitReason::WallLimit));
    assert!(gone(&pids(&cell.path("pids"), 1)[0]));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_daemon_a_step_is_ended_and_a_late_daemon_learns_why() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let mut boot = boot_with(&cell, &["echo here; exec sleep 1000"], "echo never");
    boot.dead_man_ms = 400;
    cell.start(&boot);
    link.handle().step(0);
    while !matches!(next(&mut link).await, LinkEvent::Stderr { .. }) {}
    link.destroy().await.expect("the link ends");
    let init = cell.init.as_ref().expect("init was started").id();
    let since = Instant::now();
    while !family(init)[1..].is_empty() {
        assert!(since.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut link = cell.link(Resume { stdout: 0, stderr: 5 }).await;
    link.handle().step(0);
    let (_, _, report) = finish(&mut link).await;
    assert_eq!((report.status, report.reason), (ExitStatus::Signal(15), ExitReason::DeadMan));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_reaches_the_running_step_and_the_next_one_runs() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    cell.start(&boot_with(&cell, &["echo ready; exec sleep 1000", "echo next"], "echo agent"));
    link.handle().step(0);
    let mut stderr = Vec::new();
    while stderr != b"ready\n" {
        if let LinkEvent::Stderr { bytes, .. } = next(&mut link).await {
            stderr.extend_from_slice(&bytes);
        }
    }
    link.handle().signal(libc::SIGINT);
    assert_eq!(until_ended(&mut link, &mut stderr).await, (0, ExitStatus::Signal(libc::SIGINT)));
    assert_eq!(run(&mut link, &mut stderr, 1).await, ("next\n".into(), ExitStatus::Code(0)));
    link.handle().start();
    assert_eq!(finish(&mut link).await.0, b"agent\n");
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_cannot_start_says_why_and_the_cell_goes_on() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let mut boot = boot_with(&cell, &["", "", "echo fine", "echo too late"], "cat; echo agent");
    (boot.steps[0], boot.steps[1]) = (vec!["/nonexistent/tool".into()], vec!["/etc/passwd".into()]);
    cell.start(&boot);
    let mut stderr = Vec::new();
    for (index, words) in [(0, "start /nonexistent/tool: No such file"), (1, "start /etc/passwd: Permission")]
    {
        let (said, status) = run(&mut link, &mut stderr, index).await;
        assert!(said.contains(&format!("step {index}: {words}")) && said.ends_with('\n'), "{said}");
        assert_eq!(status, ExitStatus::Code(127));
    }
    let (said, status) = run(&mut link, &mut stderr, 9).await;
    assert!(said.contains("step 9: there is no such step") && status == ExitStatus::Code(127), "{said}");
    assert_eq!(run(&mut link, &mut stderr, 2).await, ("fine\n".into(), ExitStatus::Code(0)));
    link.handle().start();
    link.handle().close_stdin();
    let (stdout, _, report) = finish(&mut link).await;
    assert_eq!((stdout.as_slice(), report.status), (b"agent\n".as_slice(), ExitStatus::Code(0)));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_comes_while_a_step_runs_waits_for_its_end() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let step = "echo began; while [ ! -e go ]; do sleep 0.01; done; echo yes >done";
    cell.start(&boot_with(&cell, &[step], "cat done"));
    link.handle().step(0);
    while !matches!(next(&mut link).await, LinkEvent::Stderr { .. }) {}
    link.handle().start();
    std::fs::write(cell.path("go"), "").expect("a file");
    let (stdout, _, report) = finish(&mut link).await;
    assert_eq!((stdout.as_slice(), report.status), (b"yes\n".as_slice(), ExitStatus::Code(0)));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_cannot_start_leaves_no_service() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let mut boot = boot_with(&cell, &["sleep 1000 & echo $! >pids"], "");
    boot.argv = vec!["/nonexistent/agent".into()];
    cell.start(&boot);
    assert_eq!(run(&mut link, &mut Vec::new(), 0).await.1, ExitStatus::Code(0));
    link.handle().start();
    let event = next(&mut link).await;
    assert!(matches!(&event, LinkEvent::SpawnFailed { errno: 2, .. }), "{event:?}");
    assert!(gone(&pids(&cell.path("pids"), 1)[0]));
    link.handle().bye();
    assert_eq!(cell.exit_code(), 127);
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_pipes_can_be_opened_by_name_and_end_even_where_somebody_else_has_them() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let mut boot = cell.boot("echo out >/dev/stdout; echo err >/dev/stderr; cat /dev/stdin; exit 2");
    boot.pipes = true;
    cell.start(&boot);
    link.handle().stdin(Bytes::from(numbers(30_000))).expect("room for stdin");
    link.handle().close_stdin();
    let (stdout, stderr, report) = finish(&mut link).await;
    assert!(stdout == [b"out\n".as_slice(), &numbers(30_000)].concat(), "{} bytes came", stdout.len());
    assert_eq!((stderr.as_slice(), report.status), (b"err\n".as_slice(), ExitStatus::Code(2)));
    link.destroy().await.expect("the link ends");

    // A descriptor that left the family holds neither the output nor the report.
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let mut boot = cell.boot("echo $$ >pids; cat; seq 1 5");
    boot.pipes = true;
    cell.start(&boot);
    let agent = tokio::task::block_in_place(|| pids(&cell.path("pids"), 1));
    let held = std::fs::OpenOptions::new().write(true).open(format!("/proc/{}/fd/1", agent[0]));
    let held = held.expect("the agent's stdout");
    link.handle().close_stdin();
    let (stdout, _, report) = finish(&mut link).await;
    assert_eq!((stdout.as_slice(), report.status), (b"1\n2\n3\n4\n5\n".as_slice(), ExitStatus::Code(0)));
    drop(held);
    link.destroy().await.expect("the link ends");
}
