//! hotcell runs coding agents in disposable, locked-down containers. This page is the tour: the words, the
//! layers, the road of one job, and what must never happen. Each file opens with the same for its part.
//!
//! # Words
//! A **job** is one task for an agent, from submit to outcome. A **cell** is the container one job runs in,
//! once. A **policy** is the ceiling of what a job may do and spend; the **plan** is a job's spec narrowed to
//! it, in **layers** that must all allow a thing. The **gateway** is the only way out of a cell: the model's API on one
//! socket, a proxy for the hosts that the policy names on another. A **change set** is what a job changed in its private
//! copy of a workspace, kept until a person decides. The **ledger** holds reservations and charges under
//! nested **budgets**. An **event** is a numbered fact about a job; the **journal** keeps them, and the **audit** is a
//! reading of it.
//!
//! # Layers: dependencies point one way (`tests/tidy.rs` holds the table)
//! ```text
//! faces     main, cli, config, daemon, api, selftest
//! doing     cell (one cell's life), driver (the one loop), sweeper
//! deciding  scheduler (+ recover), session, retention         pure: no IO, no clock, no chance
//! hands     store, journal, engine, link, workspace, changes, git, source, gateway, cell_image, agent_bundle, npm, notifier,
//!           run_as, model, metrics, dockerfile, daemon_log
//! facts     job, policy, agent, change, event, audit, money, notice, pricing, clock  pure types; failpoint (tests)
//! ```
//! `hotcell-init` (`src/init/`) stands alone: std and libc, static, PID 1 of every cell.
//!
//! # The road of a job
//! 1. [`api::submit`]: the peer's identity from the kernel and what they may use ([`policy::access`]); JSON →
//!    [`job::JobSpec`]; [`policy::narrow()`] → [`policy::Plan`]; the workspace opened *as the peer*; the row `Queued`, on the disk before the id is told.
//! 2. [`driver`] feeds [`scheduler::Scheduler`]: slots, priority, fairness between users, limits of credentials and
//!    policies, and what room the host has; jobs that wait for a moment are parked ([`cell::park`]).
//!    `image = "build"`: what a repository's own Dockerfile would run is found ([`dockerfile`]) and told here, and built
//!    ([`cell::build`]) before the cell is made.
//! 3. [`cell::prepare`]: a runtime that was tried ([`cell::runtime`]), the cell's row first, then directory, staged mount and, beside it, scratch file system, `ctl.sock`,
//!    `api.sock`, `egress.sock`, container, start. [`job::state`] is the state machine; [`cell::record`] moves row and journal.
//! 4. [`cell::live`]: bytes come over [`link`] (acknowledged only once journaled), lines go to [`session`],
//!    which judges every tool call by [`policy::judge`] and gives back what to send; what a call waits for (a path, a
//!    hook) is found out beside it.
//! 5. [`gateway`]: authorise → inspect → wait for a turn → bound → reserve → inject the credential → forward → meter →
//!    settle; [`gateway::egress`]: decide → answer from the package cache, or resolve and check → dial the checked
//!    address → count.
//!    The job's own commands come first ([`job::JobSpec`]'s `setup`), with a way out of their own; a job of a command has
//!    a cell without an agent, in which its client takes part by [`api::attach`].
//! 6. A stop is stored, then the lease is revoked, then the CLI is interrupted, terminated, killed.
//! 7. `collect` in [`cell`]: what the agent changed in its copy becomes a change set ([`cell::changes`], [`changes`]);
//!    container, mounts and directory proven gone; `verify` judges the change set in a fresh cell, and the agent may get another
//!    try; totals, `Done`. What becomes of a change set is its submitter's word
//!    ([`api::changes`]) and done with their rights.
//!    What is over is kept as long and as much as [`retention`] says, and removed by [`api::gc`]. Who is told of it ([`notice`])
//!    hears from [`api::notices`], by an outbox that the store writes with each change of state.
//! 8. A daemon that is to end drains, stops what runs, or detaches and leaves it to the next one ([`driver::How`]).
//!    After a detach as after a crash [`scheduler::recover`] says what becomes of each row and each container. A damaged
//!    store is refused, or set aside with all that its rows gave a meaning to, where the operator says so ([`daemon`]). What a machine lacks for
//!    all this, and what to do about it, [`api::doctor`] says, which can also attack a real cell from inside
//!    ([`api::doctor::attack`]: the attacks are `hotcell-init`'s, the judgement is ours); what is known of a job that went wrong, [`api::support`]
//!    packs, without secrets.
//!
//! # What must never happen
//! - A credential in a cell, a log, a row or an answer. The gateway attaches it only against a
//!   [`policy::Permit`], which only the policy can build.
//! - A tool call that nobody judged: the task is sent only after the gate stands, and silence denies.
//! - A request that was not reserved before, or a charge that is forgotten.
//! - An address dialled that was not checked, or a host that no rule names.
//! - A line of a repository's Dockerfile run that was not listed, or with another network than a cell's.
//! - A path mounted by name: workspaces are staged from the descriptor that was checked.
//! - A file of a person's changed that they did not accept, or half a change set applied.
//! - Git run in a directory that an agent wrote, or with a repository's own configuration, hooks or filters.
//! - A resource counted as free because it was asked to go.
#![cfg(feature = "daemon")]

// facts
pub mod agent;
pub mod audit;
pub mod change;
pub mod clock;
pub mod event;
pub mod failpoint;
pub mod job;
pub mod money;
pub mod notice;
pub mod policy;
pub mod pricing;
// deciding
pub mod retention;
pub mod scheduler;
pub mod session;
// hands
pub mod agent_bundle;
pub mod cell_image;
pub mod changes;
pub mod daemon_log;
pub mod dockerfile;
pub mod engine;
pub mod gateway;
pub mod git;
pub mod journal;
pub mod link;
pub mod metrics;
pub mod model;
pub mod notifier;
pub mod npm;
pub mod run_as;
pub mod source;
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
