//! Figures of many values: mean, deviation and percentiles, from a histogram or from the sorted
//! values themselves. Times go in as microseconds and come out as milliseconds.

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// The percentiles that every report has.
pub(crate) const PERCENTILES: [(&str, f64); 5] = [
    ("p50", 0.5),
    ("p90", 0.9),
    ("p95", 0.95),
    ("p99", 0.99),
    ("p999", 0.999),
];

/// A histogram of microseconds with three significant digits: a percentile is off by at most a
/// thousandth of itself. It grows with its largest value.
pub(crate) fn histogram() -> Histogram<u64> {
    match Histogram::new(3) {
        Ok(histogram) => histogram,
        Err(_) => unreachable!("three digits are within the crate's limits"),
    }
}

/// Records a span; zero counts as a microsecond, the smallest that a histogram tells apart.
pub(crate) fn record(histogram: &mut Histogram<u64>, micros: u64) {
    // Saturating recording would stop at the cells that there are; this one adds cells, and
    // fails only where there is no memory for them.
    let _ = histogram.record(micros.max(1));
}

/// A summary of times, in milliseconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Figures {
    pub(crate) count: u64,
    pub(crate) mean: f64,
    pub(crate) deviation: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// In the order of [`PERCENTILES`].
    pub(crate) percentiles: [f64; 5],
}

// === impl Figures ===

impl Figures {
    /// `None` without values.
    pub(crate) fn of(histogram: &Histogram<u64>) -> Option<Self> {
        if histogram.is_empty() {
            return None;
        }
        Some(Self {
            count: histogram.len(),
            mean: histogram.mean() / 1e3,
            deviation: histogram.stdev() / 1e3,
            min: histogram.min() as f64 / 1e3,
            max: histogram.max() as f64 / 1e3,
            percentiles: PERCENTILES.map(|(_, quantile)| quantile_ms(histogram, quantile)),
        })
    }

    /// From values in any order; they are sorted here.
    pub(crate) fn of_values(values: &mut [u64]) -> Option<Self> {
        values.sort_unstable();
        let (min, max) = (*values.first()?, *values.last()?);
        let count = values.len() as f64;
        let mean = values.iter().map(|v| *v as f64).sum::<f64>() / count;
        let variance = values
            .iter()
            .map(|v| (*v as f64 - mean).powi(2))
            .sum::<f64>()
            / count;
        Some(Self {
            count: values.len() as u64,
            mean: mean / 1e3,
            deviation: variance.sqrt() / 1e3,
            min: min as f64 / 1e3,
            max: max as f64 / 1e3,
            percentiles: PERCENTILES.map(|(_, quantile)| nearest_rank(values, quantile) / 1e3),
        })
    }

    pub(crate) fn percentile(&self, name: &str) -> Option<f64> {
        let place = PERCENTILES.iter().position(|(one, _)| *one == name)?;
        Some(self.percentiles[place])
    }

    pub(crate) fn to_json(&self) -> Value {
        let mut value = json!({
            "count": self.count,
            "mean": rounded(self.mean),
            "std": rounded(self.deviation),
            "min": rounded(self.min),
            "max": rounded(self.max),
        });
        for ((name, _), found) in PERCENTILES.iter().zip(self.percentiles) {
            value[*name] = rounded(found).into();
        }
        value
    }
}

/// The value below or at which this part of the values lies, in milliseconds.
pub(crate) fn quantile_ms(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    // A cell of the histogram reaches beyond the largest value that was recorded in it.
    let value = histogram.value_at_quantile(quantile).min(histogram.max());
    value as f64 / 1e3
}

/// The smallest value that at least this part of the sorted values does not exceed.
fn nearest_rank(sorted: &[u64], quantile: f64) -> f64 {
    let rank = (quantile * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1] as f64
}

/// To a microsecond, which is what was measured.
pub(crate) fn rounded(milliseconds: f64) -> f64 {
    (milliseconds * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::random::{Purpose, Random};

    #[test]
    fn percentiles_are_those_of_the_sorted_values() {
        for (sigma, count) in [(0.3, 10), (1.0, 1000), (2.5, 50_000)] {
            let mut random = Random::new(count, Purpose::Arrivals(0));
            let mut values: Vec<u64> = (0..count)
                .map(|_| (20_000.0 * (sigma * random.normal()).exp()) as u64 + 1)
                .collect();
            let mut cells = histogram();
            for value in &values {
                record(&mut cells, *value);
            }
            let found = Figures::of(&cells).unwrap();
            let truth = Figures::of_values(&mut values).unwrap();
            for (i, (name, _)) in PERCENTILES.iter().enumerate() {
                let off = (found.percentiles[i] / truth.percentiles[i] - 1.0).abs();
                assert!(off <= 1.001e-3, "{name} of {count}: off by {off}");
            }
            assert!((found.mean / truth.mean - 1.0).abs() < 1e-3);
            assert!((found.deviation / truth.deviation - 1.0).abs() < 1e-2);
            assert_eq!(found.count, truth.count);
            assert!((found.max / truth.max - 1.0).abs() < 1e-3);
        }
    }

    #[test]
    fn the_nearest_rank_is_a_value_that_occurred() {
        let mut values = vec![1000, 2000, 3000, 4000];
        let figures = Figures::of_values(&mut values).unwrap();
        assert_eq!(figures.percentile("p50"), Some(2.0));
        assert_eq!(figures.percentile("p99"), Some(4.0));
        assert_eq!(figures.percentile("p42"), None);
        assert_eq!(Figures::of_values(&mut []), None);
        assert_eq!(Figures::of(&histogram()), None);
    }
}
