//! `[budgets]`: what users and the daemon may spend in a day or a month, and whose midnight ends the day.
//! Parses only; what is spent is the store's to know.

use serde::Deserialize;
use toml::Spanned;

use super::ConfigError;
use super::raw::{Layers, Opt};
use crate::money::{Calendar, Caps, MicroUsd};

/// Budgets beside those of single jobs and batches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Budgets {
    /// How much, for each user and in all.
    pub caps: Caps,
    /// The IANA time zone whose midnight ends a day; the machine's where absent.
    pub time_zone: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawBudgets {
    user_day_usd: Opt<Usd>,
    day_usd: Opt<Usd>,
    month_usd: Opt<Usd>,
    time_zone: Opt<String>,
}

/// An amount as a number or a text; kept as text, so that a flag and the file are read alike.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Usd {
    Text(String),
    Whole(i64),
    Number(f64),
}

impl Usd {
    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Whole(whole) => whole.to_string(),
            Self::Number(number) => number.to_string(),
        }
    }
}

pub(super) fn budgets(layers: &Layers<'_>, raw: &RawBudgets) -> Result<Budgets, ConfigError> {
    let usd = |key, raw: &Opt<Usd>| {
        let text = raw.as_ref().map(|value| Spanned::new(value.span(), value.get_ref().text()));
        layers.checked(key, &text, amount)
    };
    Ok(Budgets {
        caps: Caps {
            user_day: usd("budgets.user_day_usd", &raw.user_day_usd)?,
            day: usd("budgets.day_usd", &raw.day_usd)?,
            month: usd("budgets.month_usd", &raw.month_usd)?,
        },
        time_zone: layers.checked("budgets.time_zone", &raw.time_zone, |name| {
            Calendar::new(Some(name)).map(|_| name.to_owned()).map_err(|error| error.to_string())
        })?,
    })
}

/// Zero is refused: somebody could mean "no limit" by it.
fn amount(text: &str) -> Result<MicroUsd, String> {
    match text.parse::<MicroUsd>() {
        Ok(MicroUsd::ZERO) => Err("is 0, with which nothing could run; leave it out for no limit".to_owned()),
        Ok(amount) => Ok(amount),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Flags, Machine};
    use super::*;

    fn load(text: &str, vars: &[(&str, &str)], flags: &[(&'static str, &str)]) -> Result<Budgets, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        let own = [("HOME", "/home/ann")].into_iter().chain(vars.iter().copied());
        let vars = own.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let machine = Machine { vars, root: false, cores: 1, exe_dir: Some("/b".into()) };
        let values = flags.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        let flags = Flags { config: Some(path), values };
        Config::load(&flags, &machine).map(|config| config.budgets).map_err(|error| error.to_string())
    }

    #[test]
    fn amounts_are_numbers_or_texts_from_all_three_places() {
        assert_eq!(load("", &[], &[]), Ok(Budgets::default()));
        let text =
            "[budgets]\nuser_day_usd = 2\nday_usd = 12.5\nmonth_usd = \"100\"\ntime_zone = \"Europe/Berlin\"";
        let budgets =
            load(text, &[("HOTCELL_BUDGETS_DAY_USD", "7.50")], &[("budgets.month_usd", "90")]).unwrap();
        let caps = Caps {
            user_day: Some(MicroUsd(2_000_000)),
            day: Some(MicroUsd(7_500_000)),
            month: Some(MicroUsd(90_000_000)),
        };
        assert_eq!(budgets, Budgets { caps, time_zone: Some("Europe/Berlin".into()) });
    }

    #[test]
    fn what_is_no_amount_or_zone_is_named_with_its_place() {
        for (text, key, word) in [
            ("[budgets]\nday_usd = 0", "budgets.day_usd", "no limit"),
            ("[budgets]\nuser_day_usd = -1", "budgets.user_day_usd", "\"-1\""),
            ("[budgets]\nmonth_usd = 0.0000001", "budgets.month_usd", "six decimals"),
            ("[budgets]\nmonth_usd = inf", "budgets.month_usd", "inf"),
            ("[budgets]\ntime_zone = \"Mars/Olympus\"", "budgets.time_zone", "Mars/Olympus"),
        ] {
            let error = load(text, &[], &[]).unwrap_err();
            assert!(error.contains(key) && error.contains(word) && error.contains("line 2"), "{error}");
        }
        assert!(load("[budgets]\nweek_usd = 1", &[], &[]).unwrap_err().contains("week_usd"));
    }
}
