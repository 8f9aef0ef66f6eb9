//! What is fitted on held-out logits after training: the temperature that makes scores honest, and the score below which a text
//! is called out of scope. Pure functions in f64; this file must not know models, examples or files.

use super::quality::likeliest;
use crate::head::{HeadSettings, softmax};

/// Temperatures lie between this and its inverse.
const LOWEST: f64 = 0.01;

/// Halvings of the interval: more than an f64 has digits.
const HALVINGS: usize = 80;

/// The temperature that minimises the negative log-likelihood of the `right` rows of `logits [examples, labels]` (Guo et al., 2017,
/// section 4.2), `None` without examples.
///
/// The likelihood is of smoothed labels, `1 - 1/(n + 2)` for the right one and the rest shared by the others, as Platt (1999,
/// section 2.2) does: a few examples that are all right would otherwise ask for a temperature of zero. In `b = 1/T` the sum is
/// convex, and its slope, `sum of E_p[z] - E_y[z]`, rises with b: the root is found by halving.
#[must_use]
pub fn temperature(logits: &[f32], right: &[u32], labels: usize) -> Option<f64> {
    if right.is_empty() || labels < 2 {
        return None;
    }
    let smooth = 1.0 / (right.len() as f64 + 2.0);
    let rows: Vec<Vec<f64>> = logits
        .chunks_exact(labels)
        .map(|row| row.iter().map(|logit| f64::from(*logit)).collect())
        .collect();
    let wanted = |row: &[f64], right: usize| {
        let others: f64 = row.iter().sum::<f64>() - row[right];
        (1.0 - smooth) * row[right] + smooth * others / (labels - 1) as f64
    };
    let slope = |b: f64| -> f64 {
        let of = |(row, right): (&Vec<f64>, &u32)| {
            let shares = softmax(&row.iter().map(|z| z * b).collect::<Vec<_>>());
            let mean: f64 = shares.iter().zip(row).map(|(share, z)| share * z).sum();
            mean - wanted(row, *right as usize)
        };
        rows.iter().zip(right).map(of).sum()
    };
    let (mut low, mut high) = (LOWEST.ln(), -LOWEST.ln());
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(low, high);
        if slope(middle.exp()) < 0.0 {
            low = middle;
        } else {
            high = middle;
        }
    }
    Some((-f64::midpoint(low, high)).exp())
}

/// The highest score such that at most `share` of the right answers have a best score below it; `None` where none is right.
#[must_use]
pub fn out_of_scope_below(
    settings: &HeadSettings,
    (logits, right, labels): (&[f32], &[u32], usize),
    share: f64,
) -> Option<f32> {
    let mut scores: Vec<f32> = logits
        .chunks_exact(labels)
        .zip(right)
        .filter(|(row, right)| likeliest(row) == **right as usize)
        .map(|(row, _)| settings.answer(row).scores[likeliest(row)])
        .collect();
    scores.sort_by(f32::total_cmp);
    let lost = (share * scores.len() as f64).floor() as usize;
    scores.get(lost).copied()
}

/// Mean of `-ln p(right)` under a head's scores.
#[must_use]
pub fn log_loss(settings: &HeadSettings, (logits, right, labels): (&[f32], &[u32], usize)) -> f64 {
    let temperature = f64::from(settings.temperature.unwrap_or(1.0));
    let of = |(row, right): (&[f32], &u32)| {
        let scaled: Vec<f64> = row.iter().map(|z| f64::from(*z) / temperature).collect();
        let best = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scaled.iter().map(|z| (z - best).exp()).sum();
        total.ln() + best - scaled[*right as usize]
    };
    let sum: f64 = logits.chunks_exact(labels).zip(right).map(of).sum();
    sum / right.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use rand::{Rng, SeedableRng};

    use super::*;

    /// Labels drawn by softmax of known logits, which are then made over-confident by a known factor.
    fn drawn(factor: f64, count: usize) -> (Vec<f32>, Vec<u32>) {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
        let (mut logits, mut right) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let row: Vec<f64> = (0..3).map(|_| rng.random_range(-2.0..2.0)).collect();
            let mut left = rng.random_range(0.0..1.0);
            let mut label = 2;
            for (at, share) in softmax(&row).into_iter().enumerate() {
                if left < share {
                    label = at;
                    break;
                }
                left -= share;
            }
            right.push(label as u32);
            logits.extend(row.iter().map(|z| (z * factor) as f32));
        }
        (logits, right)
    }

    #[test]
    fn the_temperature_undoes_over_confidence() {
        for factor in [0.5, 1.0, 4.0] {
            let (logits, right) = drawn(factor, 20_000);
            let found = temperature(&logits, &right, 3).unwrap();
            assert!((found / factor - 1.0).abs() < 0.05, "{found} for {factor}");
            // No neighbour is better.
            let at = |temperature: f64| {
                let settings = HeadSettings {
                    temperature: Some(temperature as f32),
                    ..HeadSettings::default()
                };
                log_loss(&settings, (&logits, &right, 3))
            };
            assert!(at(found) <= at(found * 1.05) && at(found) <= at(found / 1.05));
        }
    }

    #[test]
    fn a_few_right_answers_do_not_freeze_the_scores() {
        let found = temperature(&[2.0, 0.0, 0.0, 2.0], &[0, 1], 2).unwrap();
        // Two of two right: the right label's smoothed share is 3/4, so 2/T = ln 3.
        assert!((found - 2.0 / 3.0f64.ln()).abs() < 1e-6, "{found}");
        assert_eq!(temperature(&[], &[], 2), None);
    }

    #[test]
    fn the_threshold_loses_no_more_than_it_may() {
        let settings = HeadSettings::default();
        // Best scores rise with the row; the last row is wrong.
        let logits: Vec<f32> = (1..=11).flat_map(|i| [i as f32 * 0.2, 0.0]).collect();
        let right = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let given = (logits.as_slice(), right.as_slice(), 2);
        for (share, lost) in [(0.0, 0), (0.1, 1), (0.19, 1), (0.2, 2)] {
            let below = out_of_scope_below(&settings, given, share).unwrap();
            let with = HeadSettings {
                out_of_scope_below: Some(below),
                ..settings.clone()
            };
            let out = logits[..20]
                .chunks_exact(2)
                .filter(|row| with.answer(row).out_of_scope);
            assert_eq!(out.count(), lost, "{share}");
        }
        assert_eq!(
            out_of_scope_below(&settings, (&[1.0, 0.0], &[1], 2), 0.1),
            None
        );
    }
}
