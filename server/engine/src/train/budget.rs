//! What training may take of the time of running requests.
//!
//! Every step earns a share of its own time, and a quantum takes place only when what was earned covers all of it: the step behind
//! a quantum finds cold caches, so few long ones cost requests less than many short ones. One that runs over is paid for by those
//! that follow, so however long quanta are, they take no more than the share. The budget knows no clock: it is told what steps and
//! quanta took.

use std::time::Duration;

/// Unused credit is worth so many quanta at most: a long quiet time must not be made up for at once.
const MOST_QUANTA: f64 = 2.0;

/// Seconds that training may take beside running requests.
#[derive(Debug)]
pub(super) struct Budget {
    quantum: Duration,
    max_impact: f64,
    /// Below zero when a quantum ran over.
    credit: f64,
}

// === impl Budget ===

impl Budget {
    pub(super) fn new(quantum: Duration, max_impact: f64) -> Self {
        Self {
            quantum,
            max_impact,
            credit: 0.0,
        }
    }

    /// A quantum beside nothing. What was earned or is owed to requests that have ended is forgotten.
    pub(super) fn idle(&mut self) -> Duration {
        self.credit = 0.0;
        self.quantum
    }

    /// A quantum beside running requests, if what was earned covers it.
    pub(super) fn busy(&self) -> Option<Duration> {
        (self.credit >= self.quantum.as_secs_f64()).then_some(self.quantum)
    }

    /// Books a step of running requests.
    pub(super) fn earn(&mut self, step: Duration) {
        let most = MOST_QUANTA * self.quantum.as_secs_f64();
        self.credit = (self.credit + step.as_secs_f64() * self.max_impact).min(most);
    }

    /// Books a quantum beside running requests.
    pub(super) fn spend(&mut self, held: Duration) {
        self.credit -= held.as_secs_f64();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUANTUM: Duration = Duration::from_millis(10);

    /// Seconds in training and in steps, when each quantum takes `overrun` times what it was given.
    fn seconds(max_impact: f64, step: Duration, overrun: f64) -> (f64, f64) {
        let mut budget = Budget::new(QUANTUM, max_impact);
        let (mut steps, mut training) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..20_000 {
            budget.earn(step);
            steps += step;
            if let Some(quantum) = budget.busy() {
                let held = quantum.mul_f64(overrun);
                budget.spend(held);
                training += held;
            }
        }
        (training.as_secs_f64(), steps.as_secs_f64())
    }

    #[test]
    fn training_takes_its_share_however_long_quanta_are() {
        let quantum = QUANTUM.as_secs_f64();
        for share in [0.05, 0.25, 1.0] {
            for step in [50, 3_000, 15_000].map(Duration::from_micros) {
                for overrun in [0.3, 1.0, 7.0] {
                    let (training, steps) = seconds(share, step, overrun);
                    // The last quantum that ran over is still to be paid for.
                    let most = share * steps + overrun * quantum;
                    assert!(training <= most, "{training} of {most}");
                    // Quanta that end early, or a step that earns more than credit can hold, leave some of it.
                    let whole = step.as_secs_f64() * share <= quantum && overrun >= 1.0;
                    let least = share * steps - quantum;
                    assert!(!whole || training >= least, "{training} of {least}");
                }
            }
        }
    }

    #[test]
    fn no_share_is_no_training_and_a_quiet_time_is_not_made_up_for() {
        assert_eq!(seconds(0.0, QUANTUM, 1.0).0, 0.0);
        let mut budget = Budget::new(QUANTUM, 0.5);
        budget.earn(Duration::from_secs(3600));
        let mut quanta = 0;
        while let Some(quantum) = budget.busy() {
            budget.spend(quantum);
            quanta += 1;
        }
        assert_eq!(quanta, 2);
        // Nor does one request pay for another, or earn for it.
        for held in [0, 3600].map(Duration::from_secs) {
            budget.earn(QUANTUM * 2);
            budget.spend(held);
            budget.idle();
            assert_eq!(budget.busy(), None);
            budget.earn(QUANTUM);
            assert_eq!(budget.busy(), None);
            budget.earn(QUANTUM);
            assert_eq!(budget.busy(), Some(QUANTUM));
        }
    }
}
