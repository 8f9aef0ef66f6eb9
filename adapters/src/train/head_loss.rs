//! Losses of heads that answer with several labels or a number, with the gradients of their logits.
//!
//! A head's logits are few (examples by labels), so they are read to the host and summed in f64 there, on every device in the same
//! way. Means are those of transformers: over an example's labels, and over examples by the caller's weights.

use crate::head::{Problem, sigmoid};
use crate::ops::{Buffer, Ops, Real};

use super::loss::{Judged, Target};

/// Loss and gradients of rows of logits `[targets, labels]`, exact. `wanted [targets, labels]` is 1 where a label applies and 0
/// where it does not, or the number of regression. `gradient`, exact, gets the weighted gradients. The targets' own rows and labels
/// are not looked at.
///
/// Multi-label: `mean over labels of -(z log s(x) + (1 - z) log(1 - s(x)))`, torch's `BCEWithLogitsLoss`; right is a row of which
/// every label is on its side of 0. Regression: `(x - z)^2`, torch's `MSELoss`; nothing is right or wrong.
pub fn dense_loss<O: Ops>(
    ops: &O,
    problem: Problem,
    logits: &O::Buf,
    (targets, wanted): (&[Target], &[f32]),
    gradient: &mut O::Buf,
) -> Vec<Judged> {
    if targets.is_empty() {
        return Vec::new();
    }
    let labels = wanted.len() / targets.len();
    let mut host = vec![O::T::ZERO; logits.len()];
    ops.read(logits.all(), &mut host);
    let mut judged = Vec::with_capacity(targets.len());
    let rows = host
        .chunks_exact_mut(labels)
        .zip(wanted.chunks_exact(labels));
    for ((row, wanted), target) in rows.zip(targets) {
        let weight = f64::from(target.weight) / labels as f64;
        let (mut loss, mut correct) = (0.0, problem == Problem::MultiLabel);
        for (logit, wanted) in row.iter_mut().zip(wanted) {
            let (x, z) = (logit.to_f64(), f64::from(*wanted));
            let (part, slope) = match problem {
                Problem::Regression => ((x - z).powi(2), 2.0 * (x - z)),
                _ => {
                    let part = x.max(0.0) - x * z + (-x.abs()).exp().ln_1p();
                    (part, sigmoid(x) - z)
                }
            };
            loss += part;
            correct &= (x > 0.0) == (z > 0.5);
            *logit = O::T::from_f64(weight * slope);
        }
        judged.push(Judged {
            loss: loss / labels as f64,
            correct,
        });
    }
    ops.resize(gradient, host.len());
    ops.write(&host, gradient.all_mut());
    judged
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::ops::Reference;

    /// The gradient against finite differences, in f64, of sums with weights that differ.
    fn check(problem: Problem, labels: usize) {
        let (ops, rows) = (Reference::<f64>::default(), 5);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(4);
        let logits: Vec<f64> = (0..rows * labels)
            .map(|_| rng.random_range(-3.0..3.0))
            .collect();
        let wanted: Vec<f32> = (0..rows * labels)
            .map(|_| match problem {
                Problem::Regression => rng.random_range(-2.0..2.0),
                _ => f32::from(rng.random_bool(0.4)),
            })
            .collect();
        let target = |row| Target {
            row,
            label: 0,
            weight: 0.25 * (row + 1) as f32,
        };
        let targets: Vec<Target> = (0..rows).map(target).collect();
        let run = |logits: &[f64]| {
            let (mut from, mut gradient) = (ops.exact(), ops.exact());
            ops.resize(&mut from, logits.len());
            ops.write(logits, from.all_mut());
            let judged = dense_loss(&ops, problem, &from, (&targets, &wanted), &mut gradient);
            let mut slopes = vec![0.0; gradient.len()];
            ops.read(gradient.all(), &mut slopes);
            let of = |(judged, target): (&Judged, &Target)| judged.loss * f64::from(target.weight);
            (judged.iter().zip(&targets).map(of).sum::<f64>(), slopes)
        };
        let (_, slopes) = run(&logits);
        for at in 0..logits.len() {
            let step = 1e-5;
            let moved = |by: f64| {
                let mut other = logits.clone();
                other[at] += by;
                run(&other).0
            };
            let slope = (moved(step) - moved(-step)) / (2.0 * step);
            let off = (slope - slopes[at]).abs() / slope.abs().max(1e-3);
            assert!(off < 1e-6, "{problem:?} {at}: {} not {slope}", slopes[at]);
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        check(Problem::MultiLabel, 4);
        check(Problem::Regression, 1);
    }
}
