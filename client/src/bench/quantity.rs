//! Numbers as people write them on a command line: `200ms`, `1..20`, `20%`. Every refusal says
//! what would have been accepted; the flag and its value are added by whoever reads flags.

use std::time::Duration;

/// The longest span that a load test may name.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// A span of time with its unit; a bare number is refused, for it could mean anything.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "" => {
            return Err(format!(
                "a unit is missing; write {text}s or {text}ms (units: us, ms, s, m, h)"
            ));
        }
        _ => return Err(format!("{unit:?} is no unit; use us, ms, s, m or h")),
    };
    let value: f64 = number
        .trim()
        .parse()
        .map_err(|_| format!("{number:?} is no number; write for example 200ms or 1.5s"))?;
    let seconds = value * scale;
    if seconds >= 0.0 && seconds <= LONGEST.as_secs_f64() {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("must lie between 0s and 168h".to_owned())
    }
}

/// A number above zero and at most `limit`.
pub(crate) fn positive(text: &str, limit: f64) -> Result<f64, String> {
    let value: f64 = text
        .trim()
        .parse()
        .map_err(|_| format!("{text:?} is no number"))?;
    if value > 0.0 && value <= limit {
        Ok(value)
    } else {
        Err(format!("must be above 0 and at most {limit}"))
    }
}

/// A part of a whole: `0.2` or `20%`.
pub(crate) fn share(text: &str) -> Result<f64, String> {
    let (number, scale) = match text.strip_suffix('%') {
        Some(number) => (number, 0.01),
        None => (text, 1.0),
    };
    let value: f64 = number
        .trim()
        .parse()
        .map_err(|_| format!("{text:?} is no share; write for example 0.2 or 20%"))?;
    let value = value * scale;
    if (0.0..=1.0).contains(&value) {
        Ok(value)
    } else {
        Err("must lie between 0 and 1 (0% and 100%)".to_owned())
    }
}

/// `FROM..TO`, or one value for both.
pub(crate) fn range<T: Clone>(
    text: &str,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<(T, T), String> {
    match text.split_once("..") {
        Some((from, to)) => Ok((read(from)?, read(to)?)),
        None => {
            let value = read(text)?;
            Ok((value.clone(), value))
        }
    }
}

/// Requests a second.
pub(crate) fn rate(text: &str) -> Result<f64, String> {
    positive(text, 1e6)
}

/// A whole number from 1 to `limit`.
pub(crate) fn count(text: &str, limit: usize) -> Result<usize, String> {
    let value: usize = text
        .trim()
        .parse()
        .map_err(|_| format!("{text:?} is no whole number"))?;
    if (1..=limit).contains(&value) {
        Ok(value)
    } else {
        Err(format!("must lie between 1 and {limit}"))
    }
}

/// Microseconds of a span, saturating.
pub(crate) fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_need_a_unit_and_have_bounds() {
        assert_eq!(duration("200ms"), Ok(Duration::from_millis(200)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("30").is_err_and(|error| error.contains("30s")));
        for wrong in ["-1s", "x", "1d", "200h", "nans"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn shares_and_ranges() {
        assert_eq!(share("20%"), Ok(0.2));
        assert_eq!(share("0.2"), Ok(0.2));
        assert!(share("120%").is_err() && share("-1").is_err() && share("nan").is_err());
        assert_eq!(range("1..20", rate), Ok((1.0, 20.0)));
        assert_eq!(range("5", rate), Ok((5.0, 5.0)));
        assert!(range("0..5", rate).is_err());
        assert_eq!(count("3", 4), Ok(3));
        assert!(count("0", 4).is_err() && count("5", 4).is_err() && count("1.5", 4).is_err());
    }
}
