//! (to come)
/// To come.
#[derive(Debug)]
pub struct JobSpec;
