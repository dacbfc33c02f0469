//! The time of day as text.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Tells the time, and writes it anew only where it has changed.
#[derive(Debug, Default)]
pub struct Clock {
    millis: u64,
    text: String,
}

impl Clock {
    /// The time in UTC, as RFC 3339 has it, with milliseconds: `2026-11-23T16:47:31.042Z`.
    pub fn now(&mut self) -> &str {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let millis = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        if self.text.is_empty() || millis != self.millis {
            (self.millis, self.text) = (millis, rfc3339(Duration::from_millis(millis)));
        }
        &self.text
    }
}

fn rfc3339(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let millis = since_epoch.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// Year, month and day of a number of days after 1970-01-01 in the Gregorian calendar, whose 400
/// years have 146,097 days; counted from a first of March, so that leap days end a year.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + carry, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        // From `date -u -d @SECONDS`.
        for (millis, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_800_001, "2000-03-01T00:00:00.001Z"),
            (1_798_761_599_042, "2026-12-31T23:59:59.042Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(Duration::from_millis(millis)), expected);
        }
    }

    #[test]
    fn the_clock_goes_on() {
        let mut clock = Clock::default();
        let first = clock.now().to_owned();
        std::thread::sleep(Duration::from_millis(2));
        assert!(clock.now() > first.as_str());
    }
}
