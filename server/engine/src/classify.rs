//! From states and log-probabilities to the answers of Classify and Embed. Pure functions of numbers.

use espalier_adapters::head;

/// Probabilities of logits. The sum runs in f64, so that the shares add up to 1 as well as f32 can say.
pub(crate) fn softmax(logits: &[f64]) -> Vec<f32> {
    let shares = head::softmax(logits).into_iter();
    shares.map(|share| share as f32).collect()
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
    fn a_normalized_vector_has_length_one() {
        let mut vector = [3.0, -4.0, 0.0];
        normalize(&mut vector);
        assert_eq!(vector, [0.6, -0.8, 0.0]);
        let mut zero = [0.0; 3];
        normalize(&mut zero);
        assert_eq!(zero, [0.0; 3]);
    }
}
