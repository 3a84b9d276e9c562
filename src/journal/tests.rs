//! The journal against torn tails, full disks, truncation and concurrent readers.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::value::RawValue;
use tempfile::TempDir;

use super::*;
use crate::event::Line;
use crate::job::{Outcome, StopReason};

const SMALL: Limits = Limits { journal_bytes_max: 16_000, segment_bytes_max: 2_000 };

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn raw(text: &str) -> Box<RawValue> {
    RawValue::from_string(text.to_owned()).unwrap()
}

fn note(text: &str) -> Body {
    Body::Note { text: text.to_owned() }
}

async fn read_all(dir: &Path, from_seq: u64, bytes_max: usize) -> Vec<u8> {
    let mut reader = Reader::open(dir, from_seq, None);
    let mut all = Vec::new();
    while let Some(chunk) = reader.next_chunk(bytes_max).await.unwrap() {
        assert_eq!(chunk.last(), Some(&b'\n'));
        all.extend_from_slice(&chunk);
    }
    all
}

fn lines(bytes: &[u8]) -> Vec<serde_json::Value> {
    bytes.split_inclusive(|b| *b == b'\n').map(|line| serde_json::from_slice(line).unwrap()).collect()
}

fn seqs(bytes: &[u8]) -> Vec<u64> {
    lines(bytes).iter().map(|line| line["seq"].as_u64().unwrap()).collect()
}

#[test]
fn lines_are_events_and_frames_stay_byte_for_byte() {
    let dir = TempDir::new().unwrap();
    let mut journal = Journal::create(dir.path().join("job"), Limits::default()).unwrap();
    let frame = r#"{"type":"assistant",  "seq":99,"x":1.0}"#;
    assert_eq!(journal.push(&Body::State { state: State::Queued }, 5).unwrap(), 1);
    assert_eq!(journal.push_frame(frame.as_bytes(), 40, 6), 2);
    assert_eq!(journal.push(&Body::Frame { end: 80, frame: raw(frame) }, 6).unwrap(), 3);
    assert_eq!(journal.push(&Body::Sent { end: 12, frame: raw("{\n \"a\": 1\n}") }, 7).unwrap(), 4);
    let output = Body::Output { stream: Stream::Stderr, end: 9, text: "a\nb".to_owned() };
    assert_eq!(journal.push(&output, 8).unwrap(), 5);
    assert_eq!(journal.commit().unwrap(), 5);
    drop(journal);
    let all = runtime().block_on(read_all(&dir.path().join("job"), 1, 1 << 20));
    let text = String::from_utf8(all.clone()).unwrap();
    let expected = format!(
        "{{\"seq\":1,\"at_ms\":5,\"origin\":\"daemon\",\"type\":\"state\",\"state\":\"queued\"}}\n\
         {{\"seq\":2,\"at_ms\":6,\"origin\":\"agent\",\"type\":\"frame\",\"end\":40,\"frame\":{frame}}}\n\
         {{\"seq\":3,\"at_ms\":6,\"origin\":\"agent\",\"type\":\"frame\",\"end\":80,\"frame\":{frame}}}\n\
         {{\"seq\":4,\"at_ms\":7,\"origin\":\"daemon\",\"type\":\"sent\",\"end\":12,\"frame\":{{  \"a\": 1 }}}}\n\
         {{\"seq\":5,\"at_ms\":8,\"origin\":\"agent\",\"type\":\"output\",\"stream\":\"stderr\",\"end\":9,\"text\":\"a\\nb\"}}\n"
    );
    assert_eq!(text, expected);
    let (_journal, recovered) = Journal::open(dir.path().join("job"), Limits::default()).unwrap();
    let last_state = Some(State::Queued);
    let wanted =
        Recovered { next_seq: 6, stdout_end: 80, stderr_end: 9, stdin_end: 12, last_state, cut_bytes: 0 };
    assert_eq!(recovered, wanted);
}

#[test]
fn a_new_attempt_begins_its_streams_again() {
    let dir = TempDir::new().unwrap();
    let mut journal = Journal::create(dir.path(), Limits::default()).unwrap();
    let sent = RawValue::from_string("{}".to_owned()).unwrap();
    journal.push_frame(b"{}", 40, 1);
    journal.push(&Body::Sent { end: 12, frame: sent }, 1).unwrap();
    let cell = crate::job::CellId::new(7);
    let paused = Some(crate::job::Pause { from_ms: 1, to_ms: 2 });
    journal.push(&Body::Attempt { attempt: 2, cell, paused, repair: None }, 2).unwrap();
    journal.commit().unwrap();
    drop(journal);
    let (mut journal, recovered) = Journal::open(dir.path(), Limits::default()).unwrap();
    assert_eq!((recovered.stdout_end, recovered.stdin_end, recovered.next_seq), (0, 0, 4));
    journal.push_frame(b"{}", 3, 3);
    journal.commit().unwrap();
    drop(journal);
    let (_journal, recovered) = Journal::open(dir.path(), Limits::default()).unwrap();
    assert_eq!((recovered.stdout_end, recovered.stdin_end), (3, 0));
}

#[test]
fn a_frame_with_a_line_feed_cannot_forge_an_event() {
    let dir = TempDir::new().unwrap();
    let mut journal = Journal::create(dir.path(), Limits::default()).unwrap();
    journal.push_frame(b"1}\n{\"seq\":2,\"origin\":\"daemon\"", 1, 1);
    journal.commit().unwrap();
    let all = runtime().block_on(read_all(dir.path(), 1, 4096));
    assert_eq!(all.iter().filter(|byte| **byte == b'\n').count(), 1);
}

#[test]
fn every_state_is_found_again() {
    let reason = StopReason::Silent;
    let failure = crate::job::outcome::Failure::new(
        crate::job::Phase::Run,
        crate::job::FailReason::Oom,
        "too much \"memory\"\n",
    );
    let states = [
        State::Queued,
        State::Preparing,
        State::Running,
        State::Stopping { reason },
        State::Parking { parked: crate::job::Parked { until_ms: 5, why: crate::job::ParkReason::DayBudget } },
        State::Parked {
            parked: crate::job::Parked { until_ms: 5, why: crate::job::ParkReason::MonthBudget },
        },
        State::Collecting { stopped: None },
        State::Collecting { stopped: Some(reason) },
        State::Done(Outcome::Succeeded),
        State::Done(Outcome::Lost),
        State::Done(Outcome::Stopped { reason }),
        State::Done(Outcome::Failed(failure)),
    ];
    let dir = TempDir::new().unwrap();
    let mut journal = Journal::create(dir.path(), SMALL).unwrap();
    for state in states {
        journal.push(&Body::State { state: state.clone() }, 1).unwrap();
        journal.commit().unwrap();
        drop(journal);
        let (reopened, recovered) = Journal::open(dir.path(), SMALL).unwrap();
        assert_eq!(recovered.last_state, Some(state));
        journal = reopened;
    }
}

#[test]
fn a_tail_torn_at_any_byte_is_cut_to_the_line_before() {
    let dir = TempDir::new().unwrap();
    let mut journal = Journal::create(dir.path(), Limits::default()).unwrap();
    journal.push_frame(b"{}", 3, 1);
    journal.push(&Body::Sent { end: 7, frame: raw("{}") }, 2).unwrap();
    journal.commit().unwrap();
    let path = segment::path(dir.path(), 1);
    let whole = path.metadata().unwrap().len();
    journal.push_frame(b"{\"a\":\"}\"}", 13, 1);
    journal.commit().unwrap();
    drop(journal);
    let bytes = std::fs::read(&path).unwrap();
    for cut in whole..bytes.len() as u64 {
        std::fs::write(&path, &bytes[..cut as usize]).unwrap();
        let (mut journal, recovered) = Journal::open(dir.path(), Limits::default()).unwrap();
        assert_eq!((recovered.next_seq, recovered.stdout_end, recovered.stdin_end), (3, 3, 7), "{cut}");
        assert_eq!(recovered.cut_bytes, cut - whole);
        assert_eq!(journal.push_frame(b"{\"a\":\"}\"}", 13, 1), 3);
        journal.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
}

#[test]
fn a_segment_torn_at_any_byte_of_its_header_held_nothing() {
    let dir = TempDir::new().unwrap();
    let mut journal = Journal::create(dir.path(), SMALL).unwrap();
    journal.push_frame(&[b'7'; 1900], 1900, 1);
    journal.commit().unwrap();
    journal.push_frame(&[b'8'; 1900], 3800, 1);
    journal.commit().unwrap();
    drop(journal);
    let path = segment::path(dir.path(), 2);
    let bytes = std::fs::read(&path).unwrap();
    let header = bytes.iter().position(|b| *b == b'\n').unwrap();
    for cut in 0..=header {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        let (journal, recovered) = Journal::open(dir.path(), SMALL).unwrap();
        assert_eq!((recovered.next_seq, recovered.stdout_end), (2, 1900), "{cut}");
        assert!(!path.exists());
        drop(journal);
    }
    // A page of zeros, as a power loss leaves it.
    std::fs::write(&path, [&bytes[..=header], &[0; 512]].concat()).unwrap();
    let (_journal, recovered) = Journal::open(dir.path(), SMALL).unwrap();
    assert_eq!((recovered.next_seq, recovered.cut_bytes), (2, 512));
}

#[test]
fn a_journal_over_its_limit_keeps_head_and_tail_and_says_so() {
    let dir = TempDir::new().unwrap();
    let mut journal = Journal::create(dir.path(), SMALL).unwrap();
    for n in 0..1000 {
        journal.push_frame(format!("\"{n:040}\"").as_bytes(), n, n);
        journal.commit().unwrap();
        let total: u64 = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(total <= SMALL.journal_bytes_max, "{total}");
    }
    runtime().block_on(async {
        let all = lines(&read_all(dir.path(), 1, 1000).await);
        let hole = all.iter().position(|line| line["type"] == "truncated").unwrap();
        let (first, last) = (all[hole]["first"].as_u64().unwrap(), all[hole]["last"].as_u64().unwrap());
        assert_eq!(all[hole]["seq"].as_u64(), Some(last));
        assert_eq!(hole as u64 + 1, first);
        assert!(first > 10 && last < 950, "{first} {last}");
        assert_eq!(all[hole + 1]["seq"].as_u64(), Some(last + 1));
        assert_eq!(all.last().unwrap()["seq"].as_u64(), Some(1000));
        assert_eq!(all.len() as u64, 1000 - (last - first));
        // Asked from within the hole: told about the part that was asked for.
        let inside = lines(&read_all(dir.path(), first + 5, 1000).await);
        assert_eq!(inside[0]["first"].as_u64(), Some(first + 5));
        assert_eq!(inside[0]["last"].as_u64(), Some(last));
        let text = inside[0].to_string();
        let event: Line = serde_json::from_str(&text).unwrap();
        assert_eq!(event.kind, "truncated");
        assert!(read_all(dir.path(), 1001, 1000).await.is_empty());
    });
}

#[test]
fn a_closed_segment_that_lost_its_tail_in_a_power_loss_is_a_hole() {
    let dir = TempDir::new().unwrap();
    let mut journal = Journal::create(dir.path(), SMALL).unwrap();
    for n in 0..30 {
        journal.push_frame(format!("\"{n:0200}\"").as_bytes(), n, 1);
        journal.commit().unwrap();
    }
    drop(journal);
    let path = segment::path(dir.path(), 2);
    let mut bytes = std::fs::read(&path).unwrap();
    let whole = bytes.len();
    bytes[whole - 400..].fill(0);
    for left in [whole, whole - 400, 200] {
        std::fs::write(&path, &bytes[..left]).unwrap();
        let all = lines(&runtime().block_on(read_all(dir.path(), 1, 4096)));
        assert_eq!(all.iter().filter(|line| line["type"] == "truncated").count(), 1);
        let mut expected = 1;
        for line in &all {
            assert_eq!(line["first"].as_u64().unwrap_or(line["seq"].as_u64().unwrap()), expected);
            expected = line["seq"].as_u64().unwrap() + 1;
        }
        assert_eq!(expected, 31);
    }
}

#[test]
fn a_follower_never_sees_bytes_behind_the_last_commit() {
    runtime().block_on(async {
        let dir = TempDir::new().unwrap();
        let mut journal = Journal::create(dir.path(), SMALL).unwrap();
        journal.push_frame(b"1", 1, 1);
        journal.commit().unwrap();
        // A write that is under way: its lines are in the file, its commit is not complete.
        let path = segment::path(dir.path(), 1);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"seq\":2,\"at_ms\":1,\"origin\":\"agent\",\"half\":1}\n");
        std::fs::write(&path, bytes).unwrap();
        let mut reader = Reader::open(dir.path(), 1, Some(journal.feed()));
        assert_eq!(seqs(&reader.next_chunk(10_000).await.unwrap().unwrap()), [1]);
        drop(journal);
        assert!(reader.next_chunk(10_000).await.unwrap().is_none());
    });
}

#[test]
fn the_head_ends_at_a_hole_however_small_what_follows_is() {
    let of = |numbers: &[(u64, u64)]| {
        let segments =
            numbers.iter().map(|(number, bytes)| Segment { number: *number, bytes: *bytes, header_bytes: 0 });
        segment::head_count(&segments.collect::<Vec<_>>(), 100)
    };
    assert_eq!(of(&[(1, 500), (2, 1)]), 1, "the first one stays whatever its size");
    assert_eq!(of(&[(1, 40), (2, 40), (3, 40)]), 2);
    assert_eq!(of(&[(1, 40), (3, 40), (4, 10)]), 1);
}

#[test]
fn what_was_not_committed_can_be_discarded() {
    let dir = TempDir::new().unwrap();
    let mut journal = Journal::create(dir.path(), SMALL).unwrap();
    journal.push_frame(b"1", 1, 1);
    journal.commit().unwrap();
    journal.push_frame(b"2", 2, 1);
    journal.discard();
    assert_eq!(journal.push(&note("full"), 2).unwrap(), 2);
    journal.commit().unwrap();
    drop(journal);
    let (_journal, recovered) = Journal::open(dir.path(), SMALL).unwrap();
    assert_eq!((recovered.next_seq, recovered.stdout_end), (3, 1));
}

#[test]
fn a_second_journal_in_one_directory_is_refused() {
    let dir = TempDir::new().unwrap();
    let _first = Journal::create(dir.path(), SMALL).unwrap();
    assert!(matches!(Journal::create(dir.path(), SMALL), Err(JournalError::Exists { .. })));
}

#[test]
fn a_follower_ends_with_its_writer_and_may_be_dropped_in_between() {
    runtime().block_on(async {
        let dir = TempDir::new().unwrap();
        let mut journal = Journal::create(dir.path(), SMALL).unwrap();
        let mut reader = Reader::open(dir.path(), 1, Some(journal.feed()));
        for n in 1..=20 {
            let dropped = tokio::time::timeout(std::time::Duration::ZERO, reader.next_chunk(100)).await;
            assert!(dropped.is_err());
            assert_eq!(journal.push(&note("x"), n).unwrap(), n);
            let pending = tokio::time::timeout(std::time::Duration::ZERO, reader.next_chunk(100)).await;
            assert!(pending.is_err(), "an event that is not committed is not shown");
            journal.commit().unwrap();
            journal.sync().await.unwrap();
            let chunk = reader.next_chunk(100).await.unwrap().unwrap();
            assert_eq!(seqs(&chunk), [n]);
        }
        drop(journal);
        assert!(reader.next_chunk(100).await.unwrap().is_none());
    });
}

/// The body of the child of the next test: a file size limit makes the kernel write a part and then refuse.
fn child_with_a_full_disk(dir: &Path) {
    // SAFETY: ignoring a signal is safe at any time; this process runs this one test only.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let limit = rustix::process::Rlimit { current: Some(10_000), maximum: None };
    let mut journal = Journal::create(dir, Limits::default()).unwrap();
    rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
    let mut committed = 0;
    let error = loop {
        journal.push_frame(format!("\"{}\"", "z".repeat(900)).as_bytes(), committed + 1, 1);
        match journal.commit() {
            Ok(seq) => committed = seq,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, JournalError::Full { .. }), "{error}");
    assert!(matches!(journal.commit(), Err(JournalError::Full { .. })));
    let limit = rustix::process::Rlimit { current: Some(1 << 30), maximum: None };
    rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
    let bytes = std::fs::read(segment::path(dir, 1)).unwrap();
    assert_eq!(bytes.last(), Some(&b'\n'), "the part that was written is cut back");
    assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count() as u64, committed + 1);
    assert_eq!(journal.commit().unwrap(), committed + 1, "with space again the same events are written");
    println!("committed {}", committed + 1);
}

#[test]
fn a_full_disk_loses_nothing_that_was_committed() {
    if let Some(dir) = std::env::var_os("HOTCELL_TEST_JOURNAL_DIR") {
        return child_with_a_full_disk(Path::new(&dir));
    }
    let dir = TempDir::new().unwrap();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "journal::tests::a_full_disk_loses_nothing_that_was_committed", "--nocapture"])
        .env("HOTCELL_TEST_JOURNAL_DIR", dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("committed 11"), "{printed}");
    let (_journal, recovered) = Journal::open(dir.path(), Limits::default()).unwrap();
    assert_eq!((recovered.next_seq, recovered.stdout_end, recovered.cut_bytes), (12, 11, 0));
}

#[derive(Debug, Clone)]
enum Op {
    Frame(usize),
    Output(bool),
    Sent,
    State(bool),
    Commit,
    Discard,
    Reopen { tear_bytes: usize },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0_usize..600).prop_map(Op::Frame),
        1 => any::<bool>().prop_map(Op::Output),
        1 => Just(Op::Sent),
        1 => any::<bool>().prop_map(Op::State),
        4 => Just(Op::Commit),
        1 => Just(Op::Discard),
        1 => (0_usize..40).prop_map(|tear_bytes| Op::Reopen { tear_bytes }),
    ]
}

/// What the journal should be: the tally after each number.
#[derive(Default)]
struct Model {
    tallies: BTreeMap<u64, Tally>,
    committed: u64,
}

impl Model {
    fn push(&mut self, seq: u64, change: impl FnOnce(&mut Tally)) {
        let mut tally = self.tallies.get(&(seq - 1)).cloned().unwrap_or_default();
        change(&mut tally);
        self.tallies.insert(seq, tally);
    }

    fn at(&self, seq: u64) -> Tally {
        self.tallies.get(&seq).cloned().unwrap_or_default()
    }
}

fn apply(op: &Op, journal: &mut Journal, model: &mut Model, end: u64) {
    match op {
        Op::Frame(bytes) => {
            let seq = journal.push_frame(format!("\"{}\"", "f".repeat(*bytes)).as_bytes(), end, 1);
            model.push(seq, |tally| tally.stdout_end = end);
        }
        Op::Output(stdout) => {
            let stream = if *stdout { Stream::Stdout } else { Stream::Stderr };
            let seq = journal.push(&Body::Output { stream, end, text: "t".to_owned() }, 1).unwrap();
            model.push(seq, |tally| match stream {
                Stream::Stdout => tally.stdout_end = end,
                Stream::Stderr => tally.stderr_end = end,
            });
        }
        Op::Sent => {
            let seq = journal.push(&Body::Sent { end, frame: raw("{}") }, 1).unwrap();
            model.push(seq, |tally| tally.stdin_end = end);
        }
        Op::State(done) => {
            let state = if *done { State::Done(Outcome::Lost) } else { State::Running };
            let seq = journal.push(&Body::State { state: state.clone() }, 1).unwrap();
            model.push(seq, |tally| tally.last_state = Some(state));
        }
        Op::Commit => model.committed = journal.commit().unwrap(),
        Op::Discard => journal.discard(),
        Op::Reopen { .. } => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_life_gives_numbers_without_gaps_and_exact_ends(ops in proptest::collection::vec(op(), 1..150)) {
        let dir = TempDir::new().unwrap();
        let mut journal = Journal::create(dir.path(), SMALL).unwrap();
        let mut model = Model::default();
        for (index, op) in ops.iter().enumerate() {
            apply(op, &mut journal, &mut model, index as u64 + 1);
            let Op::Reopen { tear_bytes } = op else { continue };
            drop(journal);
            // A write that was torn by a kill: some bytes of a line that never got whole.
            let last = *segment::list(dir.path()).unwrap().last().unwrap();
            let path = segment::path(dir.path(), last);
            let mut bytes = std::fs::read(&path).unwrap();
            let line = format!("{{\"seq\":{},\"at_ms\":1,\"origin\":\"agent\"", model.committed + 1);
            bytes.extend_from_slice(&line.as_bytes()[..*tear_bytes.min(&line.len())]);
            std::fs::write(&path, bytes).unwrap();
            let (reopened, recovered) = Journal::open(dir.path(), SMALL).unwrap();
            let tally = model.at(model.committed);
            prop_assert_eq!(recovered.next_seq, model.committed + 1);
            prop_assert_eq!(recovered.cut_bytes as usize, *tear_bytes.min(&line.len()));
            prop_assert_eq!(recovered.stdout_end, tally.stdout_end);
            prop_assert_eq!(recovered.stderr_end, tally.stderr_end);
            prop_assert_eq!(recovered.stdin_end, tally.stdin_end);
            prop_assert_eq!(recovered.last_state, tally.last_state);
            journal = reopened;
        }
        let all = lines(&runtime().block_on(read_all(dir.path(), 1, 700)));
        let mut expected = 1;
        for line in &all {
            let first = line["first"].as_u64().unwrap_or(line["seq"].as_u64().unwrap());
            prop_assert_eq!(first, expected);
            expected = line["seq"].as_u64().unwrap() + 1;
        }
        prop_assert_eq!(expected, model.committed + 1);
    }

    #[test]
    fn readers_from_any_number_get_exactly_the_suffix_while_it_is_written(
        sizes in proptest::collection::vec((0_usize..700, any::<bool>()), 1..150),
        from_seqs in proptest::collection::vec((1_u64..170, 1_usize..3000), 1..6),
        roomy in any::<bool>(),
    ) {
        let limits = if roomy { Limits { journal_bytes_max: 1 << 20, ..SMALL } } else { SMALL };
        let dir = TempDir::new().unwrap();
        runtime().block_on(async {
            let mut journal = Journal::create(dir.path(), limits).unwrap();
            let mut readers = tokio::task::JoinSet::new();
            for (from_seq, bytes_max) in from_seqs.iter().copied() {
                let mut reader = Reader::open(dir.path(), from_seq, Some(journal.feed()));
                readers.spawn(async move {
                    let mut all = Vec::new();
                    while let Some(chunk) = reader.next_chunk(bytes_max).await.unwrap() {
                        all.extend_from_slice(&chunk);
                    }
                    (from_seq, all)
                });
            }
            for (index, (bytes, commit)) in sizes.iter().enumerate() {
                journal.push_frame(format!("\"{}\"", "r".repeat(*bytes)).as_bytes(), index as u64, 1);
                if *commit {
                    journal.commit().unwrap();
                    tokio::task::yield_now().await;
                }
            }
            let last_seq = journal.commit().unwrap();
            drop(journal);
            while let Some(read) = readers.join_next().await {
                let (from_seq, all) = read.unwrap();
                let mut expected = from_seq;
                for line in lines(&all) {
                    assert!(!roomy || line["type"] == "frame");
                    assert_eq!(line["first"].as_u64().unwrap_or(line["seq"].as_u64().unwrap()), expected);
                    if line["type"] == "frame" {
                        let bytes = sizes[expected as usize - 1].0;
                        assert_eq!(line["frame"].as_str().map(str::len), Some(bytes));
                    }
                    expected = line["seq"].as_u64().unwrap() + 1;
                }
                assert_eq!(expected, from_seq.max(last_seq + 1));
            }
        });
    }
}
