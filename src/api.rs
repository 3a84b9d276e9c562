//! The HTTP API on the unix socket (to come).

pub mod wire;
