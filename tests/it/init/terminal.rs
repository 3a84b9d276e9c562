//! Terminals: an agent whose streams are a terminal, typed at and read over the link.

use super::*;

fn terminal(cell: &Cell, script: &str) -> Boot {
    let mut boot = cell.boot(script);
    boot.terminal = Some((24, 80));
    boot
}

/// A boot message with an interactive shell at its prompt.
fn shell(cell: &Cell) -> Boot {
    let mut boot = terminal(cell, "");
    boot.argv = ["/bin/bash", "--norc", "--noprofile", "-i"].map(OsString::from).to_vec();
    boot.env.push(("PS1".into(), "$ ".into()));
    boot.env.push(("TERM".into(), "dumb".into()));
    boot
}

fn type_in(link: &Link, text: &str) {
    link.handle().stdin(Bytes::copy_from_slice(text.as_bytes())).expect("room for stdin");
}

/// Reads and acknowledges until `words` were printed; all that was printed since the last wait.
async fn until(link: &mut Link, words: &str) -> String {
    let mut text = String::new();
    while !text.contains(words) {
        match next(link).await {
            LinkEvent::Stdout { end, bytes } => {
                text.push_str(&String::from_utf8_lossy(&bytes));
                link.handle().ack(OutputStream::Stdout, end);
            }
            LinkEvent::Stderr { .. } | LinkEvent::Exited(_) | LinkEvent::SpawnFailed { .. } => {
                panic!("no {words:?} in {text:?}")
            }
            _ => {}
        }
    }
    text
}

/// Waits until a program of this name runs below init.
fn running(cell: &Cell, name: &str) {
    let init = cell.init.as_ref().expect("init was started").id();
    let since = Instant::now();
    let is = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == name);
    while !family(init).iter().any(is) {
        assert!(since.elapsed() < PATIENCE, "no {name} runs");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What the terminal makes of lines.
fn on_terminal(text: &[u8]) -> Vec<u8> {
    String::from_utf8_lossy(text).replace('\n', "\r\n").into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_a_terminal_with_the_size_it_was_given_and_is_given_later() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let script = "tty; test -t 0 && test -t 1 && test -t 2 && echo three; echo err >&2; stty size; \
                  trap 'stty size; echo told' WINCH; echo ready; while :; do sleep 0.02; done";
    cell.start(&terminal(&cell, script));
    let text = until(&mut link, "ready\r\n").await;
    assert!(text.starts_with("/dev/pts/"), "{text}");
    assert!(text.ends_with("\r\nthree\r\nerr\r\n24 80\r\nready\r\n"), "{text}");
    link.handle().resize(50, 132);
    assert_eq!(until(&mut link, "told\r\n").await, "50 132\r\ntold\r\n");
    link.destroy().await.expect("the link ends");

    // Also a size that is told before the start, and to a daemon made anew.
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let mut boot = terminal(&cell, "stty size; read x; stty size");
    boot.start_now = false;
    cell.start(&boot);
    link.handle().resize(3, 7);
    link.handle().start();
    assert_eq!(until(&mut link, "\n").await, "3 7\r\n");
    link.destroy().await.expect("the link ends");
    let mut link = cell.link(Resume { stdout: 5, stderr: 0 }).await;
    link.handle().resize(0, 65_535);
    connected(&mut link).await;
    type_in(&link, "\n");
    let (stdout, _, report) = finish(&mut link).await;
    assert_eq!(
        (String::from_utf8_lossy(&stdout).as_ref(), report.status),
        ("\r\n0 65535\r\n", ExitStatus::Code(0))
    );
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_ends_what_runs_in_the_foreground_and_not_the_shell() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    cell.start(&shell(&cell));
    // A shell without a terminal of its own says so first.
    assert_eq!(until(&mut link, "$ ").await, "$ ");
    type_in(&link, "sleep 1000\n");
    tokio::task::block_in_place(|| running(&cell, "sleep"));
    type_in(&link, "\x03");
    until(&mut link, "^C").await;
    type_in(&link, "echo ali''ve $?\n");
    until(&mut link, "alive 130\r\n").await;
    // A signal of the daemon's goes the same way.
    type_in(&link, "sleep 1001\n");
    tokio::task::block_in_place(|| running(&cell, "sleep"));
    link.handle().signal(libc::SIGTERM);
    until(&mut link, "Terminated").await;
    type_in(&link, "echo sti''ll; exit 7\n");
    until(&mut link, "still\r\n").await;
    let (_, _, report) = finish(&mut link).await;
    assert_eq!((report.status, report.reason), (ExitStatus::Code(7), ExitReason::Agent));
    assert_eq!(cell.exit_code(), 7);
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_input_ends_a_reader_wherever_the_line_stands() {
    for (input, output) in [
        ("hello\n", "hello\r\nhello\r\n"),
        ("", ""),
        ("no newline", "no newlineno newline"),
        ("\u{e4}\n", "\u{e4}\r\n\u{e4}\r\n"),
    ] {
        let mut cell = Cell::new();
        let mut link = cell.link(Resume::default()).await;
        cell.start(&terminal(&cell, "cat"));
        if !input.is_empty() {
            type_in(&link, input);
        }
        link.handle().close_stdin();
        let (stdout, _, report) = finish(&mut link).await;
        assert_eq!((String::from_utf8_lossy(&stdout).as_ref(), report.status), (output, ExitStatus::Code(0)));
        link.destroy().await.expect("the link ends");
    }
    // The character is the one that the terminal has for it.
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    cell.start(&terminal(&cell, "stty eof ^X; echo ready; cat; exit 3"));
    until(&mut link, "ready\r\n").await;
    link.handle().close_stdin();
    assert_eq!(finish(&mut link).await.2.status, ExitStatus::Code(3));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_is_told_as_it_was_and_after_all_output() {
    let burst = numbers(2_000); // 128 KB, more than a terminal holds
    for (end, status) in [("exit 0", ExitStatus::Code(0)), ("kill -9 $$", ExitStatus::Signal(9))] {
        for _ in 0..5 {
            let mut cell = Cell::new();
            let mut link = cell.link(Resume::default()).await;
            let script =
                format!("awk 'BEGIN {{ for (i = 0; i < 2000; i++) printf \"%063d\\n\", i }}'; {end}");
            cell.start(&terminal(&cell, &script));
            let (stdout, stderr, report) = finish(&mut link).await;
            assert!(stdout == on_terminal(&burst), "{} bytes came", stdout.len());
            assert_eq!((stderr.as_slice(), report.status), (b"".as_slice(), status));
            link.destroy().await.expect("the link ends");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_links_lose_and_double_no_byte_of_a_terminal() {
    let mut cell = Cell::new();
    let count = 60_000; // 3.9 MB
    let mut boot = terminal(
        &cell,
        &format!("awk 'BEGIN {{ for (i = 0; i < {count}; i++) printf \"%063d\\n\", i }}'; cat"),
    );
    boot.buffer_bytes_max = 256 << 10;
    cell.start(&boot);
    let expected = on_terminal(&numbers(count));
    let (mut journal, mut chunks) = (Vec::new(), 0);
    for round in 1..=8 {
        let mut link = cell.link(Resume { stdout: journal.len() as u64, stderr: 0 }).await;
        while journal.len() < expected.len() * round / 9 {
            if let LinkEvent::Stdout { end, bytes } = next(&mut link).await {
                journal.extend_from_slice(&bytes);
                chunks += 1;
                if round % 3 != 0 || chunks % 2 == 0 {
                    link.handle().ack(OutputStream::Stdout, end);
                }
            }
        }
        link.destroy().await.expect("the link ends");
    }
    let mut link = cell.link(Resume { stdout: journal.len() as u64, stderr: 0 }).await;
    while journal.len() < expected.len() {
        if let LinkEvent::Stdout { end, bytes } = next(&mut link).await {
            journal.extend_from_slice(&bytes);
            link.handle().ack(OutputStream::Stdout, end);
        }
    }
    assert!(journal == expected);
    link.handle().close_stdin();
    assert_eq!(finish(&mut link).await.2.status, ExitStatus::Code(0));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_typed_arrives_whole_at_a_program_that_reads_it_raw() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let input: Vec<u8> = (0..700_000u32).flat_map(u32::to_le_bytes).collect(); // 2.8 MB, more than the window
    let script = format!("stty raw -echo; echo ready; head -c {} | sha256sum", input.len());
    cell.start(&terminal(&cell, &script));
    until(&mut link, "ready\n").await;
    link.handle().stdin(Bytes::from(input.clone())).expect("room for stdin");
    let (stdout, _, _) = finish(&mut link).await;
    let digest: String = {
        use sha2::Digest;
        sha2::Sha256::digest(&input).iter().map(|byte| format!("{byte:02x}")).collect()
    };
    assert_eq!(String::from_utf8_lossy(&stdout).split(' ').next(), Some(digest.as_str()));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_left_its_terminal_finds_it_again_by_name() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let script = "echo before; exec </dev/null >/dev/null 2>&1; while [ ! -e go ]; do sleep 0.02; done; \
                  echo back >/dev/tty; exit 4";
    cell.start(&terminal(&cell, script));
    assert_eq!(until(&mut link, "before\r\n").await, "before\r\n");
    // Nobody has it open; init still serves and does not spin.
    let init = cell.init.as_ref().expect("init was started").id();
    let cpu = || {
        let stat = std::fs::read_to_string(format!("/proc/{init}/stat")).expect("init's figures");
        let fields: Vec<_> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        fields[11].parse::<u64>().expect("ticks") + fields[12].parse::<u64>().expect("ticks")
    };
    let before = cpu();
    std::thread::sleep(Duration::from_millis(500));
    assert!(cpu() - before < 20, "init spins");
    std::fs::write(cell.path("go"), "").expect("a file");
    let (stdout, _, report) = finish(&mut link).await;
    assert_eq!((stdout.as_slice(), report.status), (b"back\r\n".as_slice(), ExitStatus::Code(4)));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_ends_a_shell_at_its_prompt_before_it_has_to_be_killed() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let mut boot = shell(&cell);
    (boot.wall_limit_ms, boot.kill_grace_ms) = (700, 60_000);
    cell.start(&boot);
    until(&mut link, "$ ").await;
    let (_, _, report) = finish(&mut link).await;
    assert_eq!((report.status, report.reason), (ExitStatus::Signal(libc::SIGHUP), ExitReason::WallLimit));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_stay_beside_the_terminal() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let mut boot = terminal(&cell, "tty >/dev/null && echo mine; cat");
    boot.start_now = false;
    let step = "tty; (while :; do echo service; sleep 0.05; done) & exit 0";
    boot.steps = vec![["/bin/sh", "-c", step].map(OsString::from).to_vec()];
    cell.start(&boot);
    link.handle().step(0);
    type_in(&link, "typed early\n");
    let mut printed = String::new();
    loop {
        match next(&mut link).await {
            LinkEvent::Stderr { bytes, .. } => printed.push_str(&String::from_utf8_lossy(&bytes)),
            LinkEvent::StepEnded { index: 0, status: ExitStatus::Code(0) } => break,
            LinkEvent::Connected { .. } | LinkEvent::StdinAcked { .. } => {}
            event => panic!("{event:?}"),
        }
    }
    assert!(printed.starts_with("not a tty\n"), "{printed}");
    link.handle().start();
    link.handle().close_stdin();
    let (stdout, _, report) = finish(&mut link).await;
    let text = String::from_utf8_lossy(&stdout);
    assert!(text.contains("mine\r\n") && text.matches("typed early\r\n").count() == 2, "{text}");
    assert!(!text.contains("service") && report.status == ExitStatus::Code(0), "{text}");
    link.destroy().await.expect("the link ends");
}
