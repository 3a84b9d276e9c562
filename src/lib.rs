//! hotcell runs coding agents in disposable, locked-down containers. This page is the tour: the words, the
//! layers, the road of one job, and what must never happen. Each file opens with the same for its part.
//!
//! # Words
//! A **job** is one task for an agent, from submit to outcome. A **cell** is the container one job runs in,
//! once. A **policy** is the ceiling of what a job may do and spend; the **plan** is a job's spec narrowed to
//! it. The **gateway** is the only way out of a cell. The **ledger** holds reservations and charges. An
//! **event** is a numbered fact about a job; the **journal** keeps them.
//!
//! # Layers: dependencies point one way (`tests/tidy.rs` holds the table)
//! ```text
//! faces     main, cli, config, daemon, api, selftest
//! doing     cell (one cell's life), driver (the one loop), sweeper
//! deciding  scheduler (+ recover), session                    pure: no IO, no clock, no chance
//! hands     store, journal, engine, link, workspace, gateway, cell_image, agent_bundle, npm, run_as,
//!           model, metrics
//! facts     job, policy, agent, event, audit, money, pricing, clock  pure types
//! ```
//! `hotcell-init` (`src/init/`) stands alone: std and libc, static, PID 1 of every cell.
//!
//! # The road of a job
//! 1. [`api::submit`]: the peer's identity from the kernel; JSON → [`job::JobSpec`]; [`policy::narrow()`] →
//!    [`policy::Plan`]; the workspace opened *as the peer*; the row `Queued`, on the disk before the id is told.
//! 2. [`driver`] feeds [`scheduler::Scheduler`]: slots, priority, fairness between users.
//! 3. [`cell::prepare`]: the cell's row first, then directory, staged mount, scratch file system, `ctl.sock`,
//!    `api.sock`, container, start. [`job::state`] is the state machine; [`cell::record`] moves row and journal.
//! 4. [`cell::live`]: bytes come over [`link`] (acknowledged only once journaled), lines go to [`session`],
//!    which judges every tool call by [`policy::decide()`] and gives back what to send.
//! 5. [`gateway`]: authorise → reserve → inject the credential → forward → meter → settle.
//! 6. A stop is stored, then the lease is revoked, then the CLI is interrupted, terminated, killed.
//! 7. `collect` in [`cell`]: container, mounts and directory proven gone, totals, `Done`.
//! 8. After a crash [`scheduler::recover`] says what becomes of each row and each container.
//!
//! # What must never happen
//! - A credential in a cell, a log, a row or an answer. The gateway attaches it only against a
//!   [`policy::Permit`], which only the policy can build.
//! - A tool call that nobody judged: the task is sent only after the gate stands, and silence denies.
//! - A request that was not reserved before, or a charge that is forgotten.
//! - A path mounted by name: workspaces are staged from the descriptor that was checked.
//! - A resource counted as free because it was asked to go.
#![cfg(feature = "daemon")]

// facts
pub mod agent;
pub mod audit;
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
pub mod run_as;
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
