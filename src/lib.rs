//! hotcell runs coding agents in disposable containers.
#![cfg(feature = "daemon")]

// facts
pub mod agent;
pub mod clock;
pub mod event;
pub mod job;
pub mod money;
pub mod policy;
pub mod pricing;
// deciding
pub mod scheduler;
pub mod session;
// hands
pub mod agent_bundle;
pub mod cell_image;
pub mod engine;
pub mod gateway;
pub mod journal;
pub mod link;
pub mod metrics;
pub mod model;
pub mod npm;
pub mod store;
pub mod workspace;
// doing
pub mod cell;
pub mod driver;
pub mod sweeper;
// faces
pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod selftest;
