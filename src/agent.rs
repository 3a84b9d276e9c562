//! The Claude Code CLI as types: the frames it speaks on stdio ([`frames`]), its own tools ([`tools`]), and the
//! arguments and environment it is started with ([`options`], [`provider`], [`surroundings`]). The control protocol is not a
//! documented interface: what stands here was measured on the pinned version, and the agent self-test replays it
//! when the pin moves.

pub mod frames;
pub mod options;
pub mod provider;
pub mod surroundings;
pub mod tools;
pub mod trust_store;
pub mod way_out;
