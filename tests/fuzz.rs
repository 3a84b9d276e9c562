//! The fuzz targets, run for a bounded time: every seed of the corpora and then a fixed number of inputs made from
//! them, the same on every machine. No input may panic, hang, or hold memory: what is allocated while one input is
//! read is bounded by its length, and afterwards all of it is free again. A binary of its own, since it counts what
//! its allocator gives out. `HOTCELL_FUZZ_SCALE=20` runs twenty times as many.

// A test says what it expects by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

#[path = "fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/targets.rs"]
mod targets;

/// What a target may have allocated at a time: so much for anything, and so much for each byte. JSON is the worst: an
/// object of seven bytes is a node of six hundred.
const PEAK_BYTES: i64 = 24 << 20;
const PEAK_BYTES_EACH: i64 = 2_000;
/// What may be left after all inputs: caches that are filled later than by the seeds.
const LEFT_BYTES: i64 = 512 << 10;
/// Longest time of the processor for one input, in milliseconds: several thousand times the usual.
const INPUT_MS_MAX: u64 = 10_000;

/// Counts what the thread that asks has allocated: targets run on one thread each.
struct Counting;

thread_local! {
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    LIVE.set(LIVE.get() + bytes);
    PEAK.set(PEAK.get().max(LIVE.get()));
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call is handed on to `System` as it is; the counters are plain cells without destructors, which
// allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promises, handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's promises, handed on.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as i64 - layout.size() as i64);
        // SAFETY: the caller's promises, handed on.
        unsafe { System.realloc(at, layout, size) }
    }
}

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    let mut files: Vec<_> =
        std::fs::read_dir(&folder).expect("a corpus").map(|file| file.expect("a file").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{name} has no seed");
    files.iter().map(|file| std::fs::read(file).expect("a seed")).collect()
}

fn cpu_ms() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

/// Runs one input and tells it where it breaks something.
fn one(name: &str, target: fn(&[u8]), data: &[u8]) {
    PEAK.set(LIVE.get());
    let (before, began) = (LIVE.get(), cpu_ms());
    let shown = || format!("{name}: the input b\"{}\"", data.escape_ascii());
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(data))) {
        eprintln!("{}", shown());
        resume_unwind(panic);
    }
    let (peak, took_ms) = (PEAK.get() - before, cpu_ms() - began);
    let most = PEAK_BYTES + PEAK_BYTES_EACH * data.len() as i64;
    assert!(peak <= most, "{peak} bytes at a time for {}: {}", data.len(), shown());
    assert!(took_ms <= INPUT_MS_MAX, "{took_ms} ms: {}", shown());
}

fn run(name: &str, inputs: usize) {
    let (_, target) = targets::ALL.into_iter().find(|(other, _)| *other == name).expect("a target");
    let seeds = seeds(name);
    // Twice: what is made once only is made now.
    seeds.iter().chain(&seeds).for_each(|seed| one(name, target, seed));
    one(name, target, b"");
    let scale = std::env::var("HOTCELL_FUZZ_SCALE").ok();
    let scale = scale.map_or(1, |text| text.parse().expect("HOTCELL_FUZZ_SCALE is a number"));
    let mut numbers = mutate::Numbers(name.bytes().map(u64::from).sum());
    let before = LIVE.get();
    for _ in 0..inputs * scale {
        one(name, target, &mutate::input(&seeds, &mut numbers));
    }
    let left = LIVE.get() - before;
    assert!(left <= LEFT_BYTES, "{name}: {left} bytes are still held after {} inputs", inputs * scale);
}

#[test]
fn policy_files_of_any_text_are_parsed_or_refused_and_narrowings_only_narrow() {
    run("policy_file", 3_000);
}

#[test]
fn request_heads_and_urls_of_any_text_go_where_they_may_or_nowhere() {
    run("request_head", 5_000);
}

#[test]
fn request_bodies_of_any_bytes_are_read_rewritten_and_translated_or_refused() {
    run("body", 5_000);
}

#[test]
fn sse_of_any_bytes_reads_the_same_however_it_is_cut() {
    run("sse_meter", 5_000);
}

#[test]
fn event_streams_of_any_bytes_read_the_same_however_they_are_cut() {
    run("eventstream_meter", 2_500);
}

#[test]
fn first_bytes_of_any_connection_name_one_host_or_are_refused() {
    run("client_hello", 30_000);
}

#[test]
fn lines_of_any_cli_are_answered_and_the_task_waits_for_the_gate() {
    run("session", 2_000);
}

#[test]
fn journals_of_any_bytes_are_projected_and_no_agent_writes_a_record() {
    run("audit", 3_000);
}

#[test]
fn every_target_has_a_binary_for_cargo_fuzz_and_runs_here() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
    let manifest: toml::Table =
        std::fs::read_to_string(folder.join("Cargo.toml")).expect("a manifest").parse().expect("TOML");
    let binaries: Vec<_> =
        manifest["bin"].as_array().expect("binaries").iter().map(|bin| bin["name"].as_str()).collect();
    let own = include_str!("fuzz.rs");
    for (name, _) in targets::ALL {
        assert!(binaries.contains(&Some(name)), "{name} is not in tests/fuzz/Cargo.toml");
        let file = std::fs::read_to_string(folder.join(format!("fuzz_targets/{name}.rs"))).expect("a binary");
        assert!(file.contains("fuzz_target!"), "{name}");
        assert!(own.contains(&format!("run(\"{name}\", ")), "{name} does not run here");
    }
    assert_eq!(binaries.len(), targets::ALL.len());
}
