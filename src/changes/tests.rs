//! What lies across several parts of this hand.

mod poison;
mod power;
