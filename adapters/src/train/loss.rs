//! Losses, with the gradient of the states they read computed on the way forward.
//!
//! Next-token prediction multiplies only the rows that predict a label by the output head, a few at a time: the logits
//! of a batch never exist at once. Sums run in f64 in row order, so that cutting a batch changes no bit.

use crate::batch::sized;
use crate::ops::{Ops, Real};
use crate::pace::{Pace, Stopped, pieces};

/// A row that predicts a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Row of the states.
    pub row: usize,
    /// The token or class that it should predict.
    pub label: u32,
}

/// What a loss adds up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSum {
    /// Sum of `-log p(label)`.
    pub loss: f64,
    /// Targets whose label is the likeliest.
    pub correct: u64,
    /// Targets.
    pub targets: u64,
}

impl LossSum {
    /// Adds another sum.
    pub fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.correct += other.correct;
        self.targets += other.targets;
    }

    /// The mean over the targets.
    pub fn mean(&self) -> f64 {
        self.loss / self.targets.max(1) as f64
    }

    /// The share of right ones.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.targets.max(1) as f64
    }
}

/// Buffers of [`linear_cross_entropy`].
#[derive(Debug, Default)]
pub struct LossBuffers<T> {
    states: Vec<T>,
    logits: Vec<T>,
    losses: Vec<T>,
    gradient: Vec<T>,
    labels: Vec<u32>,
}

/// Rows that are multiplied by the head at a time, and rows between two breaths on their logits.
const CHUNK: usize = 64;
const SOFTMAX_CHUNK: usize = 16;

/// Tokens whose gradients are summed before they join the total. Most of a vocabulary is nearly impossible; added one by
/// one to the large terms in f32 its many small ones would vanish, which shortened gradients by 2e-4 of their norm at 49152 tokens.
const BLOCK: usize = 1024;

/// Cross-entropy of `softmax(head * state)` for the targets' rows of `states [rows, hidden]`. With `dstates`, adds
/// `scale * gradient` to the same rows there.
///
/// # Errors
/// [`Stopped`] when the pace says so.
pub fn linear_cross_entropy<O: Ops>(
    (ops, pace): (&O, &dyn Pace),
    head: &O::Matrix,
    states: &[O::T],
    targets: &[Target],
    scale: O::T,
    mut dstates: Option<&mut [O::T]>,
    buffers: &mut LossBuffers<O::T>,
) -> Result<LossSum, Stopped> {
    let (vocab, width) = ops.dims(head);
    let mut sum = LossSum::default();
    for targets in targets.chunks(CHUNK) {
        let rows = targets.len();
        let chosen = sized(&mut buffers.states, rows * width);
        for (target, chosen) in targets.iter().zip(chosen.chunks_exact_mut(width)) {
            chosen.copy_from_slice(&states[target.row * width..][..width]);
        }
        let logits = sized(&mut buffers.logits, rows * vocab);
        for (r, part) in pieces(pace, rows, vocab, width) {
            let chosen = &chosen[r.start * width..r.end * width];
            ops.matmul_part(
                chosen,
                head,
                part,
                &mut logits[r.start * vocab..r.end * vocab],
            );
            pace.breathe()?;
        }
        buffers.labels.clear();
        buffers
            .labels
            .extend(targets.iter().map(|target| target.label));
        let losses = sized(&mut buffers.losses, rows);
        let chunks = logits
            .chunks_mut(SOFTMAX_CHUNK * vocab)
            .zip(buffers.labels.chunks(SOFTMAX_CHUNK));
        for ((logits, labels), losses) in chunks.zip(losses.chunks_mut(SOFTMAX_CHUNK)) {
            sum.add(softmax_cross_entropy(ops, logits, labels, scale, losses));
            pace.breathe()?;
        }
        let Some(dstates) = dstates.as_deref_mut() else {
            continue;
        };
        let both = sized(&mut buffers.gradient, 2 * rows * width);
        let (gradient, part) = both.split_at_mut(rows * width);
        gradient.fill(O::T::ZERO);
        for block in (0..vocab).step_by(BLOCK) {
            part.fill(O::T::ZERO);
            ops.matmul_backward_part(logits, head, block..(block + BLOCK).min(vocab), part);
            ops.add(part, gradient);
            pace.breathe()?;
        }
        for (target, gradient) in targets.iter().zip(gradient.chunks_exact(width)) {
            ops.add(gradient, &mut dstates[target.row * width..][..width]);
        }
    }
    Ok(sum)
}

/// Cross-entropy of rows of logits, which become `scale *` their gradient.
pub fn softmax_cross_entropy<O: Ops>(
    ops: &O,
    logits: &mut [O::T],
    labels: &[u32],
    scale: O::T,
    losses: &mut [O::T],
) -> LossSum {
    if labels.is_empty() {
        return LossSum::default();
    }
    let classes = logits.len() / labels.len();
    let right = |(row, label): (&[O::T], &u32)| row.iter().all(|x| *x <= row[*label as usize]);
    let correct = logits
        .chunks_exact(classes)
        .zip(labels)
        .filter(|row| right(*row))
        .count() as u64;
    ops.cross_entropy(logits, labels, scale, losses);
    let loss = losses.iter().map(|loss| loss.to_f64()).sum();
    LossSum {
        loss,
        correct,
        targets: labels.len() as u64,
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::ops::Reference;
    use crate::pace::Unpaced;

    #[test]
    fn finite_differences_and_chunks() {
        let (rows, width, vocab) = (150, 6, 40);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let ops = Reference::<f64>::default();
        let weight: Vec<f32> = (0..vocab * width)
            .map(|_| rng.random_range(-1.0..1.0))
            .collect();
        let head = ops.pack(&weight, vocab, width);
        let mut states: Vec<f64> = (0..rows * width)
            .map(|_| rng.random_range(-1.0..1.0))
            .collect();
        let targets: Vec<Target> = (0..rows)
            .filter(|row| row % 7 != 3)
            .map(|row| Target {
                row,
                label: rng.random_range(0..vocab as u32),
            })
            .collect();
        let scale = 1.0 / targets.len() as f64;
        let mut buffers = LossBuffers::default();
        let mut gradient = vec![0.0; states.len()];
        let sum = linear_cross_entropy(
            (&ops, &Unpaced),
            &head,
            &states,
            &targets,
            scale,
            Some(&mut gradient),
            &mut buffers,
        );
        assert_eq!(sum.map(|sum| sum.targets), Ok(targets.len() as u64));
        assert!(
            gradient[3 * width..4 * width].iter().all(|g| *g == 0.0),
            "a row without a target"
        );
        let mut mean = |states: &[f64]| {
            let sum = linear_cross_entropy(
                (&ops, &Unpaced),
                &head,
                states,
                &targets,
                0.0,
                None,
                &mut buffers,
            );
            sum.map_or(f64::NAN, |sum| sum.mean())
        };
        for index in (0..states.len()).step_by(11) {
            let (at, h) = (states[index], 1e-5);
            states[index] = at + h;
            let above = mean(&states);
            states[index] = at - h;
            let below = mean(&states);
            states[index] = at;
            let slope = (above - below) / (2.0 * h);
            assert!(
                (slope - gradient[index]).abs() < 1e-9,
                "{slope} is not {}",
                gradient[index]
            );
        }
    }

    // The label, as likely as all others together, comes first: its term is large when the many small ones are added.
    #[test]
    fn many_small_terms_do_not_vanish() {
        let (width, vocab) = (4, 40_000);
        let weight: Vec<f32> = (0..vocab * width)
            .map(|i| {
                if i < width {
                    -4.3
                } else {
                    1.0 + (i % 7) as f32 * 0.01
                }
            })
            .collect();
        let target = [Target { row: 0, label: 0 }];
        fn gradient<O: Ops>(weight: &[f32], dims: (usize, usize), target: &[Target]) -> Vec<f64> {
            let ops = O::default();
            let head = ops.pack(weight, dims.0, dims.1);
            let states = vec![O::T::from_f64(-0.5); dims.1];
            let mut gradient = vec![O::T::ZERO; dims.1];
            let context: (&O, &dyn Pace) = (&ops, &Unpaced);
            let (scale, mut buffers) = (O::T::ONE, LossBuffers::default());
            let sum = linear_cross_entropy(
                context,
                &head,
                &states,
                target,
                scale,
                Some(&mut gradient),
                &mut buffers,
            );
            assert!(sum.is_ok());
            gradient.iter().map(|g| g.to_f64()).collect()
        }
        let exact = gradient::<Reference<f64>>(&weight, (vocab, width), &target);
        // The plain f32 operations add the softmax's denominator one by one, so only the path that serves is held to this.
        let found = gradient::<crate::ops::Backend>(&weight, (vocab, width), &target);
        for (found, exact) in found.iter().zip(&exact) {
            assert!((found / exact - 1.0).abs() < 2e-5, "{found}, not {exact}");
        }
    }
}
