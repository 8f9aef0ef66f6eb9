//! From states and log-probabilities to the answers of Classify and Embed. Pure functions of numbers.

use espalier_adapters::head;

/// Probabilities of logits. The sum runs in f64, so that the shares add up to 1 as well as f32 can say.
pub(crate) fn softmax(logits: &[f64]) -> Vec<f32> {
    let shares = head::softmax(logits).into_iter();
    shares.map(|share| share as f32).collect()
}

/// Adds states `[rows, hidden]` to a running sum `[hidden]`, row after row: cutting a prompt in chunks changes no bit.
pub(crate) fn add_states(sum: &mut [f64], states: &[f32]) {
    for row in states.chunks_exact(sum.len()) {
        for (sum, state) in sum.iter_mut().zip(row) {
            *sum += f64::from(*state);
        }
    }
}

/// The mean of `count` summed states.
pub(crate) fn mean(sum: &[f64], count: usize) -> Vec<f32> {
    sum.iter().map(|sum| (sum / count as f64) as f32).collect()
}

/// Scales to unit length; a zero vector stays.
pub(crate) fn normalize(vector: &mut [f32]) {
    let norm = vector
        .iter()
        .map(|value| f64::from(*value).powi(2))
        .sum::<f64>()
        .sqrt();
    if norm > 0.0 {
        for value in vector {
            *value = (f64::from(*value) / norm) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_survive_large_logits() {
        let probabilities = softmax(&[1000.0, 1001.0, -1000.0]);
        assert!((probabilities[1] - 0.731_058_6).abs() < 1e-6);
        assert!((probabilities.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn a_mean_does_not_depend_on_chunks() {
        let states: Vec<f32> = (0..30).map(|i| (i as f32 * 0.37).sin()).collect();
        let (mut whole, mut cut) = (vec![0.0; 3], vec![0.0; 3]);
        add_states(&mut whole, &states);
        add_states(&mut cut, &states[..12]);
        add_states(&mut cut, &states[12..]);
        assert_eq!(whole, cut);
        let mut vector = mean(&whole, 10);
        normalize(&mut vector);
        assert!((vector.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-6);
    }
}
