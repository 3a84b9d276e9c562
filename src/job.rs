//! A job: one task for an agent, from submit to outcome. Facts only: ids, who submitted it, what was
//! asked, where it stands, how it ended. Nothing here awaits, reads a clock or touches a file.
//!
//! Read in this order: [`id`], [`spec`], [`state`] (the state machine and its diagram), [`park`],
//! [`outcome`].

pub mod id;
pub mod outcome;
pub mod park;
pub mod source;
pub mod spec;
pub mod state;

pub use id::{CellId, Identity, InstanceId, JobId};
pub use outcome::{Blame, FailReason, Outcome, Phase, StopReason};
pub use park::{Carry, ParkReason, Parked, Pause};
pub use spec::JobSpec;
pub use state::{Input, State};
