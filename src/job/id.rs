//! Names of things (jobs, cells, instances) and of people (the submitter's identity). Parsing accepts
//! only what we generate: an id is used in file names, labels and container names, so it must never
//! hold a separator, a dot or an upper-case letter.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Crockford's base 32 in lower case: no i, l, o, u.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// An id that is not one of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a {kind} id: {text:?} (expected {kind_prefix}, then {digits} letters and digits)")]
pub struct IdError {
    kind: &'static str,
    kind_prefix: char,
    digits: usize,
    text: String,
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $prefix:literal, $digits:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The id as text; safe in a file name, a label and a URL.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let digits = text.strip_prefix($prefix).unwrap_or("");
                if digits.len() == $digits && digits.bytes().all(|b| ALPHABET.contains(&b)) {
                    return Ok(Self(text.to_owned()));
                }
                let shown = text.chars().take(64).collect();
                Err(IdError { kind: $kind, kind_prefix: $prefix, digits: $digits, text: shown })
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl schemars::JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                let pattern = format!("^{}[0-9a-hjkmnp-tv-z]{{{}}}$", $prefix, $digits);
                schemars::json_schema!({ "type": "string", "pattern": pattern })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id_type!(
    /// A job, e.g. `j0dq2v7hk0x3m9ra`: nine digits of time, six of chance, so ids sort by submit time.
    JobId, "job", 'j', 15
);
id_type!(
    /// A cell, e.g. `c7hk0x3m9ra2v`: twelve random digits. A cell serves one attempt of one job, ever.
    CellId, "cell", 'c', 12
);
id_type!(
    /// One daemon's state directory, e.g. `h2v7hk0x`: the label by which it finds its own containers.
    InstanceId, "instance", 'h', 7
);

fn digits(mut value: u128, count: usize) -> String {
    let mut out = vec![b'0'; count];
    for slot in out.iter_mut().rev() {
        *slot = ALPHABET[(value % 32) as usize];
        value /= 32;
    }
    out.into_iter().map(char::from).collect()
}

impl JobId {
    /// A new id from the wall clock (milliseconds) and 30 random bits.
    pub fn new(now_ms: u64, random: u64) -> Self {
        Self(format!("j{}{}", digits(u128::from(now_ms), 9), digits(u128::from(random), 6)))
    }
}

impl CellId {
    /// A new id from 60 random bits.
    pub fn new(random: u64) -> Self {
        Self(format!("c{}", digits(u128::from(random), 12)))
    }
}

impl InstanceId {
    /// A new id from 35 random bits.
    pub fn new(random: u64) -> Self {
        Self(format!("h{}", digits(u128::from(random), 7)))
    }
}

/// Who submitted a job, as the kernel told it (SO_PEERCRED and SO_PEERGROUPS): host ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Host user id.
    pub uid: u32,
    /// Host primary group id.
    pub gid: u32,
    /// Host supplementary group ids, without the primary one.
    pub groups: Vec<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_sort_by_time_and_parse_back() {
        let early = JobId::new(1_000, u64::MAX);
        let late = JobId::new(1_001, 0);
        assert!(early < late);
        assert_eq!(late.as_str().parse::<JobId>(), Ok(late.clone()));
        assert_eq!(late.as_str().len(), 16);
    }

    #[test]
    fn text_that_could_leave_a_directory_is_no_id() {
        for bad in ["", "j", "../../etc/passwd", "j0000000000000/", "J000000000000000", "c000000000000000"] {
            assert!(bad.parse::<JobId>().is_err(), "{bad}");
        }
    }
}
