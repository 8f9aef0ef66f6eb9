//! Lengths of inputs and outputs, in tokens: how a command line writes a distribution, and how a
//! request draws from it.

use std::{fmt, str::FromStr};

use crate::bench::random::Random;

/// No length is longer; a server's own limit is usually far below.
const LONGEST: u32 = 1 << 20;

/// A distribution of lengths. Every draw is at least 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Lengths {
    Fixed(u32),
    /// Both bounds are drawn too.
    Uniform(u32, u32),
    Normal {
        mean: f64,
        deviation: f64,
    },
    /// By the median and the deviation of the logarithm: few long ones, as real traffic has.
    LogNormal {
        median: f64,
        sigma: f64,
    },
}

// === impl Lengths ===

impl Lengths {
    pub(crate) fn draw(&self, random: &mut Random) -> u32 {
        let whole = |value: f64| value.round().clamp(1.0, f64::from(LONGEST)) as u32;
        match *self {
            Self::Fixed(length) => length,
            Self::Uniform(from, to) => from + random.index((to - from + 1) as usize) as u32,
            Self::Normal { mean, deviation } => whole(mean + deviation * random.normal()),
            Self::LogNormal { median, sigma } => whole(median * (sigma * random.normal()).exp()),
        }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let forms = "write 128, uniform:64..256, normal:128,32 (mean, deviation) or lognormal:128,0.5 (median, sigma)";
        let length = |text: &str| match text.trim().parse() {
            Ok(length @ 1..=LONGEST) => Ok(length),
            Ok(_) => Err(format!("a length lies between 1 and {LONGEST} tokens")),
            Err(_) => Err(format!("{text:?} is no length; {forms}")),
        };
        let pair = |text: &str| -> Result<(f64, f64), String> {
            let wrong = || format!("{text:?} is no pair of numbers; {forms}");
            let (first, second) = text.split_once(',').ok_or_else(wrong)?;
            let read = |text: &str| text.trim().parse::<f64>().map_err(|_| wrong());
            let (first, second) = (read(first)?, read(second)?);
            if (1.0..=f64::from(LONGEST)).contains(&first) && (0.0..=1e6).contains(&second) {
                Ok((first, second))
            } else {
                Err(format!(
                    "the first number lies between 1 and {LONGEST}, the second is not negative"
                ))
            }
        };
        match text.split_once(':') {
            None => length(text).map(Self::Fixed),
            Some(("uniform", bounds)) => {
                let (from, to) = bounds
                    .split_once("..")
                    .ok_or_else(|| format!("{bounds:?} is no FROM..TO; {forms}"))?;
                match (length(from)?, length(to)?) {
                    (from, to) if from <= to => Ok(Self::Uniform(from, to)),
                    (from, to) => Err(format!("{from} is above {to}; write the smaller one first")),
                }
            }
            Some(("normal", rest)) => {
                pair(rest).map(|(mean, deviation)| Self::Normal { mean, deviation })
            }
            Some(("lognormal", rest)) => match pair(rest)? {
                (_, sigma) if sigma > 5.0 => Err(format!("sigma {sigma} is above 5")),
                (median, sigma) => Ok(Self::LogNormal { median, sigma }),
            },
            Some((kind, _)) => Err(format!("{kind:?} is no distribution; {forms}")),
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(length) => write!(f, "{length}"),
            Self::Uniform(from, to) => write!(f, "uniform:{from}..{to}"),
            Self::Normal { mean, deviation } => write!(f, "normal:{mean},{deviation}"),
            Self::LogNormal { median, sigma } => write!(f, "lognormal:{median},{sigma}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::random::Purpose;

    fn draws(text: &str) -> Vec<u32> {
        let lengths: Lengths = text.parse().unwrap();
        assert_eq!(lengths.to_string(), text);
        (0..20_000)
            .map(|i| lengths.draw(&mut Random::new(5, Purpose::Request(i))))
            .collect()
    }

    #[test]
    fn draws_follow_their_distribution() {
        assert!(draws("128").iter().all(|length| *length == 128));
        let uniform = draws("uniform:10..13");
        for length in 10..=13 {
            let count = uniform.iter().filter(|one| **one == length).count();
            assert!((4700..5300).contains(&count), "{length}: {count}");
        }
        let mean = |values: &[u32]| {
            values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64
        };
        let normal = draws("normal:200,20");
        assert!((mean(&normal) - 200.0).abs() < 1.0);
        let within = normal.iter().filter(|v| (180..=220).contains(*v)).count();
        assert!((13_300..14_400).contains(&within), "{within}");
        let mut log = draws("lognormal:100,0.5");
        // The mean is the median times exp(sigma^2 / 2).
        assert!((mean(&log) / 113.3 - 1.0).abs() < 0.02, "{}", mean(&log));
        log.sort_unstable();
        assert!((98..=102).contains(&log[10_000]), "{}", log[10_000]);
        assert!(draws("normal:1,50").iter().all(|length| *length >= 1));
    }

    #[test]
    fn refusals_say_what_to_write() {
        for wrong in [
            "0",
            "x",
            "uniform:5",
            "uniform:9..3",
            "normal:5",
            "normal:0,1",
            "zipf:3",
            "normal:5,-1",
        ] {
            let error = wrong.parse::<Lengths>().unwrap_err();
            assert!(!error.is_empty(), "{wrong}");
        }
        let error = "poisson:4".parse::<Lengths>().unwrap_err();
        assert!(error.contains("lognormal:"), "{error}");
    }
}
