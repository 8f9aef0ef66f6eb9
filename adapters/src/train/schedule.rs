//! The learning rate over the steps of a run.

use serde::{Deserialize, Serialize};

/// How the learning rate moves after the warmup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Stays.
    Constant,
    /// Falls in a line, to zero after the last step.
    #[default]
    Linear,
    /// Falls along half a cosine, to zero after the last step.
    Cosine,
}

/// A learning rate as a share of its peak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Steps in which it rises in a line; the last of them has the peak.
    pub warmup: u64,
    /// Steps in all.
    pub total: u64,
    /// What it does after the warmup.
    pub decay: Decay,
}

impl Schedule {
    /// The share of the peak at step `step`, counted from 1. Never zero inside the run: no step is without effect.
    pub fn share(&self, step: u64) -> f64 {
        if step <= self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let falling = self.total.saturating_sub(self.warmup).max(1) as f64;
        let done = ((step - self.warmup - 1) as f64 / falling).min(1.0);
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => 1.0 - done,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_and_falls() {
        let schedule = |decay| Schedule {
            warmup: 4,
            total: 12,
            decay,
        };
        for decay in [Decay::Constant, Decay::Linear, Decay::Cosine] {
            let shares: Vec<f64> = (1..=12).map(|step| schedule(decay).share(step)).collect();
            assert_eq!(shares[..4], [0.25, 0.5, 0.75, 1.0]);
            assert!(shares[4] == 1.0 && shares[11] > 0.0);
        }
        assert_eq!(schedule(Decay::Linear).share(9), 0.5);
        assert!((schedule(Decay::Cosine).share(9) - 0.5).abs() < 1e-12);
        assert!(schedule(Decay::Cosine).share(6) > schedule(Decay::Linear).share(6));
        let none = Schedule {
            warmup: 0,
            total: 2,
            decay: Decay::Linear,
        };
        assert_eq!((none.share(1), none.share(2)), (1.0, 0.5));
    }
}
