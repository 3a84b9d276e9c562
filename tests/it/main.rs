//! Integration tests: the real binaries, the real engine, the real CLI in real cells, and the scripted model
//! in place of the provider. Modules by capability. Without an engine or an image they fail: `make test`
//! provides both.

// A test says what it expects by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod access;
mod api;
mod audit;
mod bad_builds;
mod bad_input;
mod build;
mod changes;
mod clocks;
mod command;
mod copies;
mod crash;
mod crash_points;
mod doctor;
mod egress;
mod engine;
mod exec;
mod fake_agent;
mod faults;
mod image;
mod init;
mod keeping;
mod life;
mod modes;
mod money;
mod notify;

mod output;
mod own_engine;
mod packages;
mod packages_cache;
mod park;
mod place;
mod policies;
mod private;
mod provider;
mod providers;
mod requests;
mod road;
mod rules;
mod runtime;
mod scripted_engine;
mod soak;
mod sources;
mod steps;
mod stop;
mod support;
mod surroundings;
mod systemd;
mod walls;
mod workspace;
mod world;
