//! Days and months of a time zone. A budget's day never goes back: the later of the clock's day and the latest
//! day seen counts, whatever the clock does. Pure: the clock and the latest day are arguments.

use std::fmt;
use std::str::FromStr;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

/// A text that is no moment, or a time zone that nobody knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CalendarError {
    /// Not the name of a time zone.
    #[error("{0:?} is not a time zone of the IANA list, such as Europe/Berlin or UTC")]
    Zone(String),
    /// Neither a date nor a time.
    #[error("{0:?} is neither a date such as 2026-01-31 nor a time such as 2026-01-31T08:00:00Z")]
    Moment(String),
}

/// A day of a budget, in the calendar's time zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Day(Date);

impl Day {
    /// Its month, `2026-01`.
    pub fn month(self) -> String {
        self.to_string()[..7].to_owned()
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Day {
    type Err = CalendarError;
    fn from_str(text: &str) -> Result<Self, CalendarError> {
        // Years of four digits only, so that days sort as text.
        let moment = || CalendarError::Moment(text.chars().take(40).collect());
        let date: Date = text.parse().map_err(|_| moment())?;
        if text.len() != 10 || date.year() < 1970 { Err(moment()) } else { Ok(Self(date)) }
    }
}

/// When budgets begin anew.
#[derive(Debug, Clone)]
pub struct Calendar {
    zone: TimeZone,
}

impl Calendar {
    /// The calendar of a time zone by its IANA name; the machine's where none is named.
    ///
    /// # Errors
    /// [`CalendarError::Zone`].
    pub fn new(zone: Option<&str>) -> Result<Self, CalendarError> {
        let zone = match zone {
            None => TimeZone::system(),
            Some(name) => TimeZone::get(name).map_err(|_| CalendarError::Zone(name.to_owned()))?,
        };
        Ok(Self { zone })
    }

    /// The zone's name; an offset where it has none.
    pub fn zone_name(&self) -> String {
        match self.zone.iana_name() {
            Some(name) => name.to_owned(),
            None => Timestamp::UNIX_EPOCH.to_zoned(self.zone.clone()).strftime("%:z").to_string(),
        }
    }

    /// The day of a moment, in milliseconds since 1970; never before `latest`, the latest day that was seen.
    pub fn day(&self, wall_ms: u64, latest: Option<Day>) -> Day {
        let ms = i64::try_from(wall_ms).unwrap_or(i64::MAX);
        let stamp = Timestamp::from_millisecond(ms).unwrap_or(Timestamp::MAX);
        let today = Day(stamp.to_zoned(self.zone.clone()).date());
        latest.map_or(today, |latest| today.max(latest))
    }

    /// When the day after `day` begins, in milliseconds since 1970.
    pub fn day_ends_ms(&self, day: Day) -> u64 {
        self.start_ms(day.0.saturating_add(1.day()))
    }

    /// When the month after that of `day` begins, in milliseconds since 1970.
    pub fn month_ends_ms(&self, day: Day) -> u64 {
        self.start_ms(day.0.first_of_month().saturating_add(1.month()))
    }

    /// When `day` begins, in milliseconds since 1970.
    pub fn day_begins_ms(&self, day: Day) -> u64 {
        self.start_ms(day.0)
    }

    /// A moment as people write it. A date means the whole day: where it begins, or with `end` where it ends.
    ///
    /// # Errors
    /// [`CalendarError::Moment`].
    pub fn moment_ms(&self, text: &str, end: bool) -> Result<u64, CalendarError> {
        if let Ok(day) = text.parse::<Day>() {
            return Ok(if end { self.day_ends_ms(day) } else { self.day_begins_ms(day) });
        }
        let stamp: Option<Timestamp> = text.parse().ok();
        let ms = stamp.and_then(|stamp| u64::try_from(stamp.as_millisecond()).ok());
        ms.ok_or_else(|| CalendarError::Moment(text.chars().take(40).collect()))
    }

    fn start_ms(&self, date: Date) -> u64 {
        // A date at the very end of time has no start in some zones.
        let start = date.to_zoned(self.zone.clone()).map(|start| start.timestamp().as_millisecond());
        u64::try_from(start.unwrap_or(i64::MAX)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ZONES: [&str; 5] = ["UTC", "Europe/Berlin", "Asia/Kathmandu", "America/Sao_Paulo", "Pacific/Apia"];

    fn calendar(zone: &str) -> Calendar {
        Calendar::new(Some(zone)).unwrap()
    }

    fn ms(text: &str) -> u64 {
        calendar("UTC").moment_ms(text, false).unwrap()
    }

    proptest! {
        #[test]
        fn a_day_holds_its_moments_and_never_goes_back(
            zone in 0usize..5, moments in proptest::collection::vec(0u64..4_000_000_000_000, 1..20)
        ) {
            let calendar = calendar(ZONES[zone]);
            let mut latest = None;
            for at in moments {
                let plain = calendar.day(at, None);
                prop_assert!(calendar.day_begins_ms(plain) <= at && at < calendar.day_ends_ms(plain));
                prop_assert!(calendar.day_ends_ms(plain) <= calendar.month_ends_ms(plain));
                let day = calendar.day(at, latest);
                prop_assert!(latest.is_none_or(|latest| latest <= day) && plain <= day);
                prop_assert!(calendar.day_ends_ms(day) > at, "the reset is always ahead");
                prop_assert_eq!(day.to_string().parse(), Ok(day));
                latest = Some(day);
            }
        }
    }

    #[test]
    fn days_follow_the_zone_and_its_changes_of_the_clock() {
        let berlin = calendar("Europe/Berlin");
        let day = berlin.day(ms("2026-03-28T23:30:00Z"), None);
        assert_eq!((day.to_string().as_str(), day.month().as_str()), ("2026-03-29", "2026-03"));
        assert_eq!(berlin.day_ends_ms(day) - berlin.day_begins_ms(day), 23 * 3_600_000);
        assert_eq!(berlin.month_ends_ms(day), ms("2026-03-31T22:00:00Z"));
        // A day that was never there: Samoa left 2011-12-30 out.
        let apia = calendar("Pacific/Apia");
        let day = apia.day(ms("2011-12-30T09:59:59Z"), None);
        assert_eq!(day.to_string(), "2011-12-29");
        assert_eq!(apia.day(ms("2011-12-30T10:00:00Z"), Some(day)).to_string(), "2011-12-31");
    }

    #[test]
    fn a_date_is_a_whole_day_and_a_time_is_itself() {
        let berlin = calendar("Europe/Berlin");
        assert_eq!(berlin.moment_ms("2026-01-31", false), Ok(ms("2026-01-30T23:00:00Z")));
        assert_eq!(berlin.moment_ms("2026-01-31", true), Ok(ms("2026-01-31T23:00:00Z")));
        for end in [false, true] {
            assert_eq!(berlin.moment_ms("2026-01-31T08:00:00+02:00", end), Ok(ms("2026-01-31T06:00:00Z")));
        }
        for bad in
            ["", "yesterday", "2026-13-01", "2026-02-30", "2026-01-31T08:00:00", "20260131", "1969-12-31"]
        {
            assert!(matches!(berlin.moment_ms(bad, false), Err(CalendarError::Moment(_))), "{bad}");
        }
        assert!(Calendar::new(Some("Europe/Atlantis")).is_err());
        assert_eq!(calendar("UTC").zone_name(), "UTC");
    }
}
