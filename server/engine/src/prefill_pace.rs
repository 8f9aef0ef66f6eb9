//! How many prompt rows a step may take that also generates for others: as many as keep its time within a bound over
//! what it would last without them. What a row costs beside a step of decoding depends on machine, precision and batch,
//! so both are learned from the steps themselves. Arithmetic over times that others measured: no clock here.

use std::time::Duration;

/// How much a new step counts against what is known.
const WEIGHT: f64 = 0.125;
/// Prompts go on by so many rows in any case.
const LEAST: usize = 16;
/// Rows are given in whole tiles of the products' kernels.
const GRAIN: usize = 8;
/// Steps of prompts alone are learned from when they are so large that reading the weights does not dominate them.
const LARGE: usize = 64;

/// What is known of the steps so far.
pub(crate) struct PrefillPace {
    /// What prompts may add, as a share of the time of a step of decoding alone.
    max_impact: f64,
    /// Rows at most, whatever they cost.
    most: usize,
    /// Seconds of a step of decoding alone.
    decoding: Option<f64>,
    /// Seconds of a prompt row.
    row: Option<f64>,
}

// === impl PrefillPace ===

impl PrefillPace {
    pub(crate) fn new(max_impact: f64, most: usize) -> Self {
        PrefillPace {
            max_impact,
            most,
            decoding: None,
            row: None,
        }
    }

    /// Prompt rows for the next step, should it decode as well.
    pub(crate) fn rows(&self) -> usize {
        let (Some(decoding), Some(row)) = (self.decoding, self.row) else {
            return self.most;
        };
        let affordable = (self.max_impact * decoding / row) as usize;
        (affordable / GRAIN * GRAIN).max(LEAST).min(self.most)
    }

    /// Learns from a step with so many decode and prompt rows.
    pub(crate) fn note(&mut self, decodes: usize, prompt: usize, step: Duration) {
        let step = step.as_secs_f64();
        match (decodes, prompt, self.decoding) {
            (1.., 0, _) => blend(&mut self.decoding, step),
            (0, LARGE.., _) => blend(&mut self.row, step / prompt as f64),
            // A quarter at least: what is known of decoding may be older than the sequences that run now.
            (1.., LEAST.., Some(decoding)) => {
                blend(
                    &mut self.row,
                    (step - decoding).max(step / 4.0) / prompt as f64,
                );
            }
            _ => {}
        }
    }
}

fn blend(known: &mut Option<f64>, new: f64) {
    *known = Some(known.map_or(new, |known| known + WEIGHT * (new - known)));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine on which decoding costs `base` and a prompt row `row` microseconds.
    fn step(base: u64, row: u64, decodes: usize, prompt: usize) -> Duration {
        let base = if decodes > 0 { base } else { 0 };
        Duration::from_micros(base + row * prompt as u64)
    }

    fn learned(base: u64, row: u64, impact: f64) -> PrefillPace {
        let mut pace = PrefillPace::new(impact, 512);
        pace.note(0, 128, step(base, row, 0, 128));
        for _ in 0..200 {
            pace.note(8, 0, step(base, row, 8, 0));
            let rows = pace.rows();
            pace.note(8, rows, step(base, row, 8, rows));
        }
        pace
    }

    #[test]
    fn a_step_keeps_its_bound_on_any_machine() {
        for (base, row) in [(24_000, 660), (8_000, 250), (30_000, 100), (5_000, 90)] {
            let rows = learned(base, row, 1.25).rows();
            let ratio =
                step(base, row, 8, rows).as_secs_f64() / step(base, row, 8, 0).as_secs_f64();
            assert!(ratio <= 2.26, "{base} {row}: {rows} rows make {ratio}");
            let more = rows + GRAIN;
            let next = step(base, row, 8, more).as_secs_f64() / (base as f64 / 1e6);
            assert!(next > 2.2, "{base} {row}: {rows} rows are too few, {next}");
        }
    }

    #[test]
    fn prompts_always_go_on_and_never_beyond_the_limit() {
        assert_eq!(learned(1_000, 10_000, 1.25).rows(), LEAST);
        assert_eq!(learned(100_000, 1, 1.25).rows(), 512);
        assert_eq!(PrefillPace::new(1.25, 7).rows(), 7, "nothing is known yet");
        let mut small = PrefillPace::new(0.0, 7);
        small.note(0, 64, Duration::from_millis(64));
        small.note(1, 0, Duration::from_millis(1));
        assert_eq!(small.rows(), 7, "the limit is below the least");
    }

    #[test]
    fn it_follows_a_machine_that_changes() {
        let mut pace = learned(24_000, 660, 1.25);
        for _ in 0..100 {
            pace.note(32, 0, Duration::from_millis(48));
            pace.note(32, 40, Duration::from_micros(48_000 + 40 * 660));
        }
        assert!((80..=96).contains(&pace.rows()), "{}", pace.rows());
    }
}
