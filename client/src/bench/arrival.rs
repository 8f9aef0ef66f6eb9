//! Moments at which an open loop sends, fixed before the first request leaves: nothing that a
//! server does can move them. That is what keeps a stall visible in the latencies.

use std::time::Duration;

use crate::bench::random::Random;

/// How moments are spread around their rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Spread {
    /// Independent users: exponential gaps.
    Poisson,
    /// Equal gaps.
    Constant,
    /// Gamma gaps with this shape: below 1 burstier than Poisson, above 1 calmer.
    Gamma(f64),
}

/// Requests a second, changing in a straight line from one rate to another, then staying there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rate {
    pub(crate) from: f64,
    pub(crate) to: f64,
    pub(crate) over: Duration,
}

// === impl Rate ===

impl Rate {
    pub(crate) fn steady(rate: f64) -> Self {
        Self {
            from: rate,
            to: rate,
            over: Duration::ZERO,
        }
    }

    /// The moment by which `arrivals` requests are expected: the inverse of the rate's integral.
    fn when(&self, arrivals: f64) -> f64 {
        let over = self.over.as_secs_f64();
        let ramp = f64::midpoint(self.from, self.to) * over;
        if arrivals >= ramp {
            return over + (arrivals - ramp) / self.to;
        }
        let slope = (self.to - self.from) / over;
        if slope == 0.0 {
            return arrivals / self.from;
        }
        // The root of from t + slope t^2 / 2 = arrivals, in the form that loses no digits.
        let root = (self.from * self.from + 2.0 * slope * arrivals)
            .max(0.0)
            .sqrt();
        2.0 * arrivals / (self.from + root)
    }
}

/// An endless sequence of moments since the start, in order.
#[derive(Clone, Debug)]
pub(crate) struct Arrivals {
    spread: Spread,
    rate: Rate,
    random: Random,
    /// Expected arrivals up to the last moment.
    passed: f64,
    begun: bool,
}

impl Arrivals {
    pub(crate) fn new(spread: Spread, rate: Rate, random: Random) -> Self {
        Self {
            spread,
            rate,
            random,
            passed: 0.0,
            begun: false,
        }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.passed += match self.spread {
            Spread::Poisson => self.random.exponential(),
            Spread::Gamma(shape) => self.random.gamma(shape),
            // The first of equal gaps would only be a pause.
            Spread::Constant if !self.begun => 0.0,
            Spread::Constant => 1.0,
        };
        self.begun = true;
        Some(Duration::from_secs_f64(
            self.rate.when(self.passed).min(1e9),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::random::Purpose;

    fn arrivals(spread: Spread, rate: Rate, seed: u64) -> Arrivals {
        Arrivals::new(spread, rate, Random::new(seed, Purpose::Arrivals(0)))
    }

    fn gaps(spread: Spread) -> Vec<f64> {
        let moments: Vec<Duration> = arrivals(spread, Rate::steady(50.0), 3)
            .take(20_001)
            .collect();
        let pairs = moments.windows(2);
        pairs.map(|w| (w[1] - w[0]).as_secs_f64()).collect()
    }

    fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
        (mean, variance.sqrt())
    }

    #[test]
    fn poisson_gaps_are_exponential() {
        let gaps = gaps(Spread::Poisson);
        let (mean, deviation) = mean_and_deviation(&gaps);
        assert!((mean - 0.02).abs() < 0.0004, "mean {mean}");
        assert!((deviation - 0.02).abs() < 0.0006, "deviation {deviation}");
        // Kolmogorov and Smirnov: the largest distance to 1 - exp(-50 x), at the 1 % level.
        let mut sorted = gaps;
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len() as f64;
        let distance = sorted.iter().enumerate().map(|(i, gap)| {
            let expected = 1.0 - (-50.0 * gap).exp();
            (expected - (i as f64 + 0.5) / count).abs()
        });
        let largest = distance.fold(0.0, f64::max);
        assert!(largest < 1.63 / count.sqrt(), "{largest}");
    }

    #[test]
    fn counts_in_windows_have_variance_equal_to_their_mean() {
        let mut counts = vec![0.0_f64; 400];
        for at in arrivals(Spread::Poisson, Rate::steady(20.0), 9) {
            let Some(count) = counts.get_mut(at.as_secs() as usize) else {
                break;
            };
            *count += 1.0;
        }
        let (mean, deviation) = mean_and_deviation(&counts);
        let index = deviation * deviation / mean;
        assert!((0.8..1.2).contains(&index), "index of dispersion {index}");
    }

    #[test]
    fn constant_gaps_are_equal_and_bursts_are_not() {
        let (mean, deviation) = mean_and_deviation(&gaps(Spread::Constant));
        assert!((mean - 0.02).abs() < 1e-6 && deviation < 1e-6);
        let (mean, deviation) = mean_and_deviation(&gaps(Spread::Gamma(0.25)));
        assert!((mean - 0.02).abs() < 0.002, "{mean}");
        assert!(
            (deviation / mean - 2.0).abs() < 0.15,
            "{}",
            deviation / mean
        );
    }

    #[test]
    fn a_ramp_sends_what_its_integral_says() {
        let over = Duration::from_secs(10);
        let up = Rate {
            from: 2.0,
            to: 18.0,
            over,
        };
        let moments: Vec<f64> = arrivals(Spread::Constant, up, 1)
            .map(|at| at.as_secs_f64())
            .take_while(|at| *at < 20.0)
            .collect();
        let before = |limit: f64| moments.iter().filter(|at| **at < limit).count() as i64;
        // 2 t + 0.8 t^2 up to ten seconds, then 18 a second.
        assert!((before(5.0) - 30).abs() <= 1, "{}", before(5.0));
        assert!((before(10.0) - 100).abs() <= 1, "{}", before(10.0));
        assert!((before(20.0) - 280).abs() <= 1, "{}", before(20.0));
        let down = Rate {
            from: 18.0,
            to: 2.0,
            over,
        };
        let count = arrivals(Spread::Constant, down, 1)
            .take_while(|at| at.as_secs_f64() < 10.0)
            .count() as i64;
        assert!((count - 100).abs() <= 1, "{count}");
    }

    #[test]
    fn a_seed_fixes_the_moments() {
        let take = |seed| -> Vec<Duration> {
            arrivals(Spread::Poisson, Rate::steady(5.0), seed)
                .take(50)
                .collect()
        };
        assert_eq!(take(4), take(4));
        assert_ne!(take(4), take(5));
    }
}
