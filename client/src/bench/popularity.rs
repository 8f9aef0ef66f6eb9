//! Which adapter a request asks for: how popular each one of a list is. It knows places in the
//! list, not names.

use std::{fmt, str::FromStr};

use crate::bench::random::Random;

/// How requests are spread over adapters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Popularity {
    Uniform,
    /// The k-th adapter has weight 1 / k^s.
    Zipf(f64),
    /// One after the other, by the request's index.
    RoundRobin,
    /// The first one gets this share, the others share the rest.
    Hot(f64),
}

impl FromStr for Popularity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let forms = "write uniform, zipf:1.0, round-robin or hot:0.9";
        match text.split_once(':').unwrap_or((text, "")) {
            ("uniform", "") => Ok(Self::Uniform),
            ("round-robin", "") => Ok(Self::RoundRobin),
            ("zipf", exponent) => match exponent.parse::<f64>() {
                Ok(s) if (0.0..=10.0).contains(&s) => Ok(Self::Zipf(s)),
                _ => Err(format!("zipf's exponent lies between 0 and 10; {forms}")),
            },
            ("hot", share) => match crate::bench::quantity::share(share) {
                Ok(share) => Ok(Self::Hot(share)),
                Err(error) => Err(format!("{error}; {forms}")),
            },
            _ => Err(format!("{text:?} is no popularity; {forms}")),
        }
    }
}

impl fmt::Display for Popularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform => f.write_str("uniform"),
            Self::Zipf(s) => write!(f, "zipf:{s}"),
            Self::RoundRobin => f.write_str("round-robin"),
            Self::Hot(share) => write!(f, "hot:{share}"),
        }
    }
}

/// A popularity over a list of known length.
#[derive(Clone, Debug)]
pub(crate) struct Ranking {
    popularity: Popularity,
    count: usize,
    /// For Zipf: the sum of the weights up to each place, as a part of the whole.
    cumulative: Vec<f64>,
}

// === impl Ranking ===

impl Ranking {
    /// `count` is at least 1.
    pub(crate) fn new(popularity: Popularity, count: usize) -> Self {
        let mut cumulative = Vec::new();
        if let Popularity::Zipf(s) = popularity {
            let mut sum = 0.0;
            for place in 1..=count {
                sum += (place as f64).powf(-s);
                cumulative.push(sum);
            }
            for part in &mut cumulative {
                *part /= sum;
            }
        }
        Self {
            popularity,
            count,
            cumulative,
        }
    }

    /// The place that the request with this number among those with adapters asks for.
    pub(crate) fn draw(&self, number: u64, random: &mut Random) -> usize {
        match self.popularity {
            Popularity::Uniform => random.index(self.count),
            Popularity::RoundRobin => (number % self.count as u64) as usize,
            Popularity::Zipf(_) => {
                let at = random.unit();
                let place = self.cumulative.partition_point(|part| *part <= at);
                place.min(self.count - 1)
            }
            Popularity::Hot(share) if self.count == 1 || random.unit() < share => 0,
            Popularity::Hot(_) => 1 + random.index(self.count - 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::random::Purpose;

    fn counts(text: &str, count: usize) -> Vec<usize> {
        let popularity: Popularity = text.parse().unwrap();
        assert_eq!(popularity.to_string(), text);
        let ranking = Ranking::new(popularity, count);
        let mut counts = vec![0; count];
        for number in 0..30_000 {
            let mut random = Random::new(2, Purpose::Request(number));
            counts[ranking.draw(number, &mut random)] += 1;
        }
        counts
    }

    #[test]
    fn draws_follow_the_popularity() {
        let near = |count: usize, expected: f64| (count as f64 / 30_000.0 - expected).abs() < 0.01;
        assert!(counts("uniform", 3).iter().all(|c| near(*c, 1.0 / 3.0)));
        assert_eq!(counts("round-robin", 3), [10_000; 3]);
        // Weights 1, 1/2, 1/3 and 1/4 over their sum.
        let sum = 1.0 + 0.5 + 1.0 / 3.0 + 0.25;
        for (place, count) in counts("zipf:1", 4).into_iter().enumerate() {
            assert!(
                near(count, 1.0 / (place as f64 + 1.0) / sum),
                "{place}: {count}"
            );
        }
        let hot = counts("hot:0.9", 11);
        assert!(near(hot[0], 0.9) && hot[1..].iter().all(|c| near(*c, 0.01)));
        assert_eq!(counts("hot:0.1", 1), [30_000]);
    }

    #[test]
    fn refusals_say_what_to_write() {
        for wrong in ["zipf", "zipf:x", "zipf:11", "hot:2", "uniform:1", "often"] {
            let error = wrong.parse::<Popularity>().unwrap_err();
            assert!(error.contains("round-robin"), "{error}");
        }
    }
}
