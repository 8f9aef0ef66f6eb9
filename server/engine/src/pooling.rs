//! One state of a text's: its last token's, or the mean of all. The same numbers in serving and in training.

use std::ops::Range;

use espalier_adapters::head::Pooling;

/// A text's states on their way to one.
#[derive(Debug)]
pub(crate) struct Pooled {
    pooling: Pooling,
    /// Of those that came so far; empty where only the last one counts.
    sum: Vec<f64>,
}

// === impl Pooled ===

impl Pooled {
    /// Nothing yet, of states of `hidden` numbers.
    pub(crate) fn new(pooling: Pooling, hidden: usize) -> Self {
        let summed = match pooling {
            Pooling::Last => 0,
            Pooling::Mean => hidden,
        };
        Self {
            pooling,
            sum: vec![0.0; summed],
        }
    }

    /// Forgets what came.
    pub(crate) fn restart(&mut self) {
        self.sum.fill(0.0);
    }

    /// How many of the first tokens' states nobody wants.
    pub(crate) fn reusable(&self) -> usize {
        match self.pooling {
            Pooling::Last => usize::MAX,
            Pooling::Mean => 0,
        }
    }

    /// Which of the next `rows` states are wanted; they end with the last one if they complete the text.
    pub(crate) fn wanted(&self, rows: usize, completes: bool) -> Range<usize> {
        match self.pooling {
            Pooling::Mean => 0..rows,
            Pooling::Last if completes => rows - 1..rows,
            Pooling::Last => rows..rows,
        }
    }

    /// Takes the next wanted states `[rows, hidden]`, and where they complete a text of `count` tokens gives its state.
    pub(crate) fn add(&mut self, states: Vec<f32>, completes: Option<usize>) -> Option<Vec<f32>> {
        if self.pooling == Pooling::Last {
            return completes.map(|_| states);
        }
        add_states(&mut self.sum, &states);
        completes.map(|count| mean(&self.sum, count))
    }
}

/// The mean of states `[rows, hidden]`.
pub(crate) fn mean_of(states: &[f32], hidden: usize) -> Vec<f32> {
    let mut sum = vec![0.0; hidden];
    add_states(&mut sum, states);
    mean(&sum, states.len() / hidden)
}

/// Adds states `[rows, hidden]` to a running sum `[hidden]`, row after row: cutting a prompt in chunks changes no bit.
fn add_states(sum: &mut [f64], states: &[f32]) {
    for row in states.chunks_exact(sum.len()) {
        for (sum, state) in sum.iter_mut().zip(row) {
            *sum += f64::from(*state);
        }
    }
}

/// The mean of `count` summed states.
fn mean(sum: &[f64], count: usize) -> Vec<f32> {
    sum.iter().map(|sum| (sum / count as f64) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_does_not_depend_on_chunks_and_the_last_state_is_itself() {
        let states: Vec<f32> = (0..30).map(|i| (i as f32 * 0.37).sin()).collect();
        let whole = mean_of(&states, 3);
        let mut cut = Pooled::new(Pooling::Mean, 3);
        assert_eq!((cut.wanted(4, false), cut.reusable()), (0..4, 0));
        assert_eq!(cut.add(states[..12].to_vec(), None), None);
        cut.restart();
        assert_eq!(cut.add(states[..12].to_vec(), None), None);
        assert_eq!(
            cut.add(states[12..].to_vec(), Some(10)),
            Some(whole.clone())
        );
        let direct = states
            .iter()
            .step_by(3)
            .map(|state| f64::from(*state))
            .sum::<f64>()
            / 10.0;
        assert!((f64::from(whole[0]) - direct).abs() < 1e-7);
        let mut last = Pooled::new(Pooling::Last, 3);
        assert_eq!((last.wanted(4, false), last.wanted(4, true)), (4..4, 3..4));
        assert_eq!(
            last.add(states[27..].to_vec(), Some(10)),
            Some(states[27..].to_vec())
        );
    }
}
