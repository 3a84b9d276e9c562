//! A stand-in for the agent's CLI, built by the benchmark with plain `rustc`, static, std only: it answers the
//! control requests that a session sends, and for a user message prints numbered frames of an exact size,
//! then a result. It must never do more than that: what is measured is the road of its lines.
//!
//! `BENCH_LINES` frames of `BENCH_LINE_BYTES` bytes (line feed counted), `BENCH_PAUSE_MS` between two of them.
//! With the argument `--print` it prints the frames at once and speaks no protocol.

use std::io::{BufRead, Write};
use std::time::Duration;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn main() {
    if std::env::args().any(|argument| argument == "--print") {
        return print_frames();
    }
    let mut talking = false;
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        if line.contains(r#""type":"control_request""#) {
            answer(&line);
            if line.contains(r#""subtype":"end_session""#) || line.contains(r#""subtype":"interrupt""#) {
                std::process::exit(0);
            }
        } else if line.contains(r#""type":"user""#) && !talking {
            talking = true;
            // On a thread of its own, so that an interrupt is heard meanwhile.
            std::thread::spawn(|| {
                print_frames();
                let result = concat!(
                    r#"{"type":"result","subtype":"success","is_error":false,"result":"printed","#,
                    r#""num_turns":1,"total_cost_usd":0.0}"#,
                    "\n"
                );
                write(result.as_bytes());
            });
        }
    }
}

fn answer(line: &str) {
    let id = line.split(r#""request_id":""#).nth(1).and_then(|rest| rest.split('"').next()).unwrap_or("");
    let text = format!(
        r#"{{"type":"control_response","response":{{"subtype":"success","request_id":"{id}","response":{{}}}}}}"#
    );
    write(format!("{text}\n").as_bytes());
}

fn print_frames() {
    let (lines, line_bytes) = (number("BENCH_LINES", 1), number("BENCH_LINE_BYTES", 1024) as usize);
    let pause_ms = number("BENCH_PAUSE_MS", 0);
    let head = |n: u64| format!(r#"{{"type":"system","subtype":"bench","n":"{n:012}","pad":""#);
    let mut frame = head(0).into_bytes();
    frame.resize(line_bytes.max(frame.len() + 3) - 3, b'x');
    frame.extend_from_slice(b"\"}\n");
    let mut block = Vec::with_capacity(64 * 1024 + frame.len());
    for n in 0..lines {
        let at = block.len();
        block.extend_from_slice(&frame);
        let head = head(n);
        block[at..at + head.len()].copy_from_slice(head.as_bytes());
        if block.len() >= 64 * 1024 || pause_ms > 0 {
            write(&block);
            block.clear();
        }
        if pause_ms > 0 {
            std::thread::sleep(Duration::from_millis(pause_ms));
        }
    }
    write(&block);
}

fn write(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(bytes).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(1);
    }
}
