//! libFuzzer's entry to the target of the same name in `targets.rs`.
#![no_main]

#[path = "../targets.rs"]
#[allow(dead_code)] // each binary runs one target of all
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::audit_lines(data));
