//! Random numbers that are the same on every machine and in every version: a ChaCha stream for
//! each purpose of one seed, and draws written out here, because those of a library may change
//! between its versions.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

/// What a stream of random numbers is for; each purpose and number has a stream of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    /// When the requests of this source are due.
    Arrivals(u32),
    /// What the request with this index holds.
    Request(u64),
    /// Which adapter the request with this index asks for.
    Adapter(u64),
    /// The text of this shared prefix.
    Prefix(u32),
}

/// One stream.
#[derive(Clone, Debug)]
pub(crate) struct Random(ChaCha8Rng);

// === impl Random ===

impl Random {
    pub(crate) fn new(seed: u64, purpose: Purpose) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(match purpose {
            Purpose::Arrivals(source) => u64::from(source),
            Purpose::Prefix(number) => (1 << 40) | u64::from(number),
            Purpose::Adapter(index) => (1 << 62) | index,
            Purpose::Request(index) => (1 << 63) | index,
        });
        Self(rng)
    }

    /// Uniform in [0, 1), 53 bits.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Uniform in 0..count; 0 when there is nothing to choose from.
    pub(crate) fn index(&mut self, count: usize) -> usize {
        ((self.unit() * count as f64) as usize).min(count.saturating_sub(1))
    }

    /// Exponential with mean 1, by inversion.
    pub(crate) fn exponential(&mut self) -> f64 {
        -(1.0 - self.unit()).ln()
    }

    /// Normal with mean 0 and deviation 1 (Box and Muller).
    pub(crate) fn normal(&mut self) -> f64 {
        let radius = (2.0 * self.exponential()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Gamma with this shape and mean 1 (Marsaglia and Tsang, 2000).
    pub(crate) fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            // A gamma of shape + 1, times a power of a uniform, has the shape.
            let boost = (1.0 - self.unit()).powf(1.0 / shape);
            return self.gamma(shape + 1.0) * (shape + 1.0) * boost / shape;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 {
                let u = 1.0 - self.unit();
                if u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                    return d * v / shape;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(mut draw: impl FnMut() -> f64) -> (f64, f64) {
        let values: Vec<f64> = (0..40_000).map(|_| draw()).collect();
        let mean = values.iter().sum::<f64>() / 40_000.0;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 40_000.0;
        (mean, variance)
    }

    #[test]
    fn draws_have_their_moments() {
        let mut random = Random::new(7, Purpose::Arrivals(0));
        let near = |(mean, variance): (f64, f64), expected: (f64, f64), what: &str| {
            assert!((mean - expected.0).abs() < 0.03, "{what}: mean {mean}");
            let off = (variance - expected.1).abs() / expected.1;
            assert!(off < 0.06, "{what}: variance {variance}");
        };
        near(moments(|| random.unit()), (0.5, 1.0 / 12.0), "uniform");
        near(moments(|| random.exponential()), (1.0, 1.0), "exponential");
        near(moments(|| random.normal()), (0.0, 1.0), "normal");
        near(moments(|| random.gamma(4.0)), (1.0, 0.25), "gamma 4");
        near(moments(|| random.gamma(0.5)), (1.0, 2.0), "gamma 0.5");
    }

    #[test]
    fn streams_are_fixed_for_ever_and_differ_by_purpose() {
        let first = |seed, purpose| Random::new(seed, purpose).unit();
        // A change of these numbers changes every schedule that anybody has published.
        assert_eq!(
            first(1, Purpose::Arrivals(0)),
            first(1, Purpose::Arrivals(0))
        );
        let all = [
            first(1, Purpose::Arrivals(0)),
            first(1, Purpose::Arrivals(1)),
            first(1, Purpose::Request(0)),
            first(1, Purpose::Request(1)),
            first(1, Purpose::Adapter(0)),
            first(1, Purpose::Prefix(0)),
            first(2, Purpose::Request(0)),
        ];
        for (i, one) in all.iter().enumerate() {
            assert!(!all[..i].contains(one), "{all:?}");
        }
    }
}
