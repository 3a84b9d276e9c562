//! Money in integer micro-USD (one millionth of a dollar). No floats after the edge: a budget that is
//! a bound cannot be made of roundings. [`budget`] decides what may be set aside under several budgets at
//! once, [`calendar`] says which day a moment belongs to.

pub mod budget;
pub mod calendar;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use budget::{Budget, Caps, NoRoom, Scope, Standing, grant};
pub use calendar::{Calendar, CalendarError, Day};

/// An amount in micro-USD; never negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MicroUsd(pub u64);

/// Text or a number that is no amount of dollars.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an amount in USD: {0:?} (expected e.g. 0.50, at most six decimals and at most 1000000)")]
pub struct MoneyError(String);

/// The largest amount anyone may name: one million dollars.
pub const MAX: MicroUsd = MicroUsd(1_000_000_000_000);

impl MicroUsd {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// Sum that stays at the top instead of wrapping.
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// What is left of `self` after `other`; zero when nothing is.
    pub fn minus(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// As dollars, for display, metrics and JSON only.
    pub fn as_usd(self) -> f64 {
        self.0 as f64 / 1e6
    }

    /// From dollars given as a JSON or TOML number: rounded to the next micro-USD.
    ///
    /// # Errors
    /// Negative, not finite, or above [`MAX`].
    pub fn from_usd(usd: f64) -> Result<Self, MoneyError> {
        if !usd.is_finite() || !(0.0..=MAX.as_usd()).contains(&usd) {
            return Err(MoneyError(usd.to_string()));
        }
        Ok(Self((usd * 1e6).round() as u64))
    }
}

impl fmt::Display for MicroUsd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

impl FromStr for MicroUsd {
    type Err = MoneyError;
    fn from_str(text: &str) -> Result<Self, MoneyError> {
        let fail = || MoneyError(text.chars().take(40).collect());
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let ok = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || whole.len() > 7 || part.len() > 6 || !ok(whole) || !ok(part) {
            return Err(fail());
        }
        let whole: u64 = whole.parse().map_err(|_| fail())?;
        let part: u64 = format!("{part:0<6}").parse().map_err(|_| fail())?;
        Some(Self(whole * 1_000_000 + part)).filter(|sum| *sum <= MAX).ok_or_else(fail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn display_parses_back(micro in 0..=MAX.0) {
            prop_assert_eq!(MicroUsd(micro).to_string().parse(), Ok(MicroUsd(micro)));
        }
    }

    #[test]
    fn dollars_become_exact_integers() {
        assert_eq!(MicroUsd::from_usd(0.1).map(|m| m.0), Ok(100_000));
        assert_eq!("2".parse(), Ok(MicroUsd(2_000_000)));
        assert!(MicroUsd::from_usd(-0.01).is_err());
        assert!("1e3".parse::<MicroUsd>().is_err());
    }
}
