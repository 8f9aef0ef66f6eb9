//! Losses, with the gradient of the states they read computed on the way forward.
//!
//! Next-token prediction multiplies only the rows that predict a label by the output head, a few at a time: the logits
//! of a batch never exist at once. Sums run in f64 in row order, so that cutting a batch changes no bit.

use crate::config::BaseTensor;
use crate::linear::{AdapterGrads, exact_copy};
use crate::ops::{ALIGNED_ROWS, Buffer, Ops, Real};
use crate::pace::{Pace, Stopped, pieces};

/// A row that predicts a label.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Row of the states.
    pub row: usize,
    /// The token or class that it should predict.
    pub label: u32,
    /// What its gradient is multiplied by: one over the targets of its job's batch, where that is to learn the mean.
    pub weight: f32,
}

/// A prediction beside its label.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judged {
    /// `-log p(label)`, or the loss of a head's other answers; not weighted.
    pub loss: f64,
    /// No label is likelier.
    pub correct: bool,
}

/// What the losses of targets add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSum {
    /// Sum of the losses, each times what its target counts.
    pub loss: f64,
    /// Sum of what the targets count: 1 each, or their classes' weights.
    pub weight: f64,
    /// Targets whose label is the likeliest.
    pub correct: u64,
    /// Targets.
    pub targets: u64,
}

impl LossSum {
    /// Adds another sum.
    pub fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.weight += other.weight;
        self.correct += other.correct;
        self.targets += other.targets;
    }

    /// Adds a target that counts `weight`.
    pub fn push(&mut self, judged: &Judged, weight: f64) {
        self.loss += weight * judged.loss;
        self.weight += weight;
        self.correct += u64::from(judged.correct);
        self.targets += 1;
    }

    /// The mean over the targets, each by what it counts.
    pub fn mean(&self) -> f64 {
        if self.weight > 0.0 {
            self.loss / self.weight
        } else {
            self.loss
        }
    }

    /// The share of right ones.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.targets.max(1) as f64
    }
}

impl<'a> FromIterator<&'a Judged> for LossSum {
    fn from_iter<I: IntoIterator<Item = &'a Judged>>(judged: I) -> Self {
        let mut sum = Self::default();
        judged.into_iter().for_each(|judged| sum.push(judged, 1.0));
        sum
    }
}

/// Buffers of [`linear_cross_entropy`] and [`softmax_cross_entropy`].
#[derive(Debug)]
pub struct LossBuffers<O: Ops> {
    states: O::Buf,
    logits: O::Buf,
    dlogits: O::Buf,
    gradient: O::Buf,
    part: O::Buf,
    weights: O::Buf,
    judged: O::Buf,
    exact: O::Buf,
    ones: O::Buf,
}

/// What the way back adds to.
#[derive(Debug)]
pub struct Learning<'a, O: Ops> {
    /// The states' gradients, `[rows, hidden]`.
    pub states: &'a mut O::Buf,
    /// Those of the adapter that the head belongs to, and which of its tensors it is; `None` of a frozen one.
    pub output: Option<(&'a mut AdapterGrads<O>, BaseTensor)>,
}

impl<O: Ops> LossBuffers<O> {
    /// Empty buffers.
    pub fn new(ops: &O) -> Self {
        Self {
            states: ops.working(),
            logits: ops.exact(),
            dlogits: ops.working(),
            gradient: ops.working(),
            part: ops.working(),
            weights: ops.exact(),
            judged: ops.exact(),
            exact: ops.exact(),
            ones: ops.exact(),
        }
    }
}

/// What a logit costs beside a multiply-add: two visits and an exponential.
const SOFTMAX_FLOPS: usize = 256;

/// Targets whose gradients join those of a trained head together, at least: each time all of these are read and written.
const OUTPUT_ROWS: usize = 16;

/// Cross-entropy of `softmax(head * state)` for the targets' rows of `states [rows, hidden]`, one by one. Where something is
/// `learning`, adds each one's weighted gradient to the same row of the states', and what it asks of the head to the head's, target
/// after target.
///
/// Most of a vocabulary is nearly impossible; added one by one to the large terms in f32 its many small ones would vanish,
/// which shortened gradients by 2e-4 of their norm at 49152 tokens. So the gradients of [`Ops::loss_outputs`] tokens are
/// summed before they join the total.
///
/// # Errors
/// [`Stopped`] when the pace says so.
pub fn linear_cross_entropy<O: Ops>(
    (ops, pace): (&O, &dyn Pace),
    head: &O::Matrix,
    states: &O::Buf,
    targets: &[Target],
    mut learning: Option<Learning<'_, O>>,
    buffers: &mut LossBuffers<O>,
) -> Result<Vec<Judged>, Stopped> {
    let (vocab, width) = ops.dims(head);
    ops.resize(&mut buffers.judged, 2 * targets.len());
    for (chunk, targets) in targets.chunks(ops.loss_rows()).enumerate() {
        let rows: Vec<u32> = targets.iter().map(|target| target.row as u32).collect();
        let labels: Vec<u32> = targets.iter().map(|target| target.label).collect();
        weigh(ops, targets, &mut buffers.weights);
        let (count, first) = (rows.len(), chunk * ops.loss_rows());
        let rows = ops.ids(&rows);
        ops.resize(&mut buffers.states, count * width);
        ops.take_rows(states.all(), rows, buffers.states.all_mut());
        ops.resize(&mut buffers.logits, count * vocab);
        ops.resize(&mut buffers.dlogits, count * vocab);
        for (r, part) in pieces(pace, count, vocab, width) {
            let chosen = buffers.states.part(r.start * width..r.end * width);
            let logits = buffers.logits.part_mut(r.start * vocab..r.end * vocab);
            ops.matmul_part(chosen, head, part, logits);
            pace.breathe()?;
        }
        let together = softmax_rows(pace, vocab);
        for start in (0..count).step_by(together) {
            let end = start.saturating_add(together).min(count);
            let at = start * vocab..end * vocab;
            let judged = 2 * (first + start)..2 * (first + end);
            ops.cross_entropy(
                buffers.logits.part(at.clone()),
                ops.ids(&labels[start..end]),
                buffers.weights.part(start..end),
                buffers.dlogits.part_mut(at),
                buffers.judged.part_mut(judged),
            );
            pace.breathe()?;
        }
        if let Some(Learning { states, output }) = &mut learning {
            back(ops, pace, head, buffers)?;
            ops.add_rows(buffers.gradient.all(), rows, states.all_mut());
            if let Some((grads, tensor)) = output {
                output_gradients((ops, pace), (vocab, width), (grads, *tensor), buffers)?;
            }
        }
    }
    Ok(read(ops, &buffers.judged))
}

/// Rows of logits between two breaths.
fn softmax_rows(pace: &dyn Pace, vocab: usize) -> usize {
    let rows = pace.quantum_flops() / (vocab * SOFTMAX_FLOPS);
    let aligned = rows.max(1).checked_next_multiple_of(ALIGNED_ROWS);
    aligned.unwrap_or(rows)
}

/// From the gradient of the logits to that of the states.
fn back<O: Ops>(
    ops: &O,
    pace: &dyn Pace,
    head: &O::Matrix,
    buffers: &mut LossBuffers<O>,
) -> Result<(), Stopped> {
    let (vocab, _) = ops.dims(head);
    let (len, dlogits) = (buffers.states.len(), &buffers.dlogits);
    let (gradient, part) = (&mut buffers.gradient, &mut buffers.part);
    ops.resize(gradient, len);
    ops.resize(part, len);
    ops.clear(gradient.all_mut());
    for first in (0..vocab).step_by(ops.loss_outputs().min(vocab)) {
        let outputs = first..vocab.min(first.saturating_add(ops.loss_outputs()));
        ops.clear(part.all_mut());
        ops.matmul_backward_part(dlogits.all(), head, outputs, part.all_mut());
        ops.add(part.all(), gradient.all_mut());
        pace.breathe()?;
    }
    Ok(())
}

/// `dW += dlogits^T states`, row after row.
fn output_gradients<O: Ops>(
    (ops, pace): (&O, &dyn Pace),
    (vocab, width): (usize, usize),
    (grads, tensor): (&mut AdapterGrads<O>, BaseTensor),
    buffers: &mut LossBuffers<O>,
) -> Result<(), Stopped> {
    let Some(place) = grads.delta(tensor) else {
        return Ok(());
    };
    let count = buffers.states.len() / width;
    let most = pace.quantum_flops() / (2 * vocab * width);
    let most = most.max(OUTPUT_ROWS) / ALIGNED_ROWS * ALIGNED_ROWS;
    for start in (0..count).step_by(most) {
        let rows = start..start.saturating_add(most).min(count);
        let dlogits = buffers.dlogits.part(rows.start * vocab..rows.end * vocab);
        let copy = (&mut buffers.exact, &mut buffers.ones);
        exact_copy(ops, dlogits, (rows.len(), vocab), copy);
        let states = buffers.states.part(rows.start * width..rows.end * width);
        let dw = grads.part_mut(place.clone());
        ops.outer(buffers.exact.all(), states, vocab, O::T::ONE, dw);
        pace.breathe()?;
    }
    Ok(())
}

/// The targets' weights, where operations read them.
fn weigh<O: Ops>(ops: &O, targets: &[Target], weights: &mut O::Buf) {
    let numbers: Vec<O::T> = targets
        .iter()
        .map(|target| O::T::from_f32(target.weight))
        .collect();
    ops.resize(weights, numbers.len());
    ops.write(&numbers, weights.all_mut());
}

/// Cross-entropy of rows of logits `[targets, labels]`, exact, one for each target; `gradient`, exact, gets the weighted
/// gradients. The targets' own rows are not looked at.
pub fn softmax_cross_entropy<O: Ops>(
    ops: &O,
    logits: &O::Buf,
    targets: &[Target],
    gradient: &mut O::Buf,
    buffers: &mut LossBuffers<O>,
) -> Vec<Judged> {
    if targets.is_empty() {
        return Vec::new();
    }
    let labels: Vec<u32> = targets.iter().map(|target| target.label).collect();
    let LossBuffers {
        weights, judged, ..
    } = buffers;
    weigh(ops, targets, weights);
    ops.resize(gradient, logits.len());
    ops.resize(judged, 2 * targets.len());
    ops.cross_entropy(
        logits.all(),
        ops.ids(&labels),
        weights.all(),
        gradient.all_mut(),
        judged.all_mut(),
    );
    read(ops, judged)
}

/// Judged rows `[rows, 2]`, on the host.
fn read<O: Ops>(ops: &O, rows: &O::Buf) -> Vec<Judged> {
    let mut host = vec![O::T::ZERO; rows.len()];
    ops.read(rows.all(), &mut host);
    let judged = host.chunks_exact(2).map(|row| Judged {
        loss: row[0].to_f64(),
        correct: row[1] == O::T::ONE,
    });
    judged.collect()
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
                weight: [0.5, 1.0, -0.25][row % 3],
            })
            .collect();
        let mut buffers = LossBuffers::new(&ops);
        let mut gradient = vec![0.0; states.len()];
        let judged = linear_cross_entropy(
            (&ops, &Unpaced),
            &head,
            &states,
            &targets,
            Some(Learning {
                states: &mut gradient,
                output: None,
            }),
            &mut buffers,
        );
        assert_eq!(judged.map(|judged| judged.len()), Ok(targets.len()));
        assert!(
            gradient[3 * width..4 * width].iter().all(|g| *g == 0.0),
            "a row without a target"
        );
        let mut total = |states: &Vec<f64>| -> f64 {
            let judged = linear_cross_entropy(
                (&ops, &Unpaced),
                &head,
                states,
                &targets,
                None,
                &mut buffers,
            );
            let judged = judged.unwrap_or_default();
            let weighted = judged.iter().zip(&targets);
            weighted.map(|(j, t)| j.loss * f64::from(t.weight)).sum()
        };
        for index in (0..states.len()).step_by(11) {
            let (at, h) = (states[index], 1e-5);
            states[index] = at + h;
            let above = total(&states);
            states[index] = at - h;
            let below = total(&states);
            states[index] = at;
            let slope = (above - below) / (2.0 * h);
            assert!(
                (slope - gradient[index]).abs() < 1e-8,
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
        let target = [Target {
            row: 0,
            label: 0,
            weight: 1.0,
        }];
        fn gradient<O: Ops<Buf = Vec<<O as Ops>::T>>>(
            ops: O,
            weight: &[f32],
            dims: (usize, usize),
            target: &[Target],
        ) -> Vec<f64> {
            let head = ops.pack(weight, dims.0, dims.1);
            let states = vec![O::T::from_f64(-0.5); dims.1];
            let mut gradient = vec![O::T::ZERO; dims.1];
            let context: (&O, &dyn Pace) = (&ops, &Unpaced);
            let mut buffers = LossBuffers::new(&ops);
            let judged = linear_cross_entropy(
                context,
                &head,
                &states,
                target,
                Some(Learning {
                    states: &mut gradient,
                    output: None,
                }),
                &mut buffers,
            );
            assert!(judged.is_ok());
            gradient.iter().map(|g| g.to_f64()).collect()
        }
        let exact = gradient(
            Reference::<f64>::default(),
            &weight,
            (vocab, width),
            &target,
        );
        // The plain f32 operations add the softmax's denominator one by one, so only the path that serves is held to this.
        let found = gradient(crate::ops::Cpu::default(), &weight, (vocab, width), &target);
        for (found, exact) in found.iter().zip(&exact) {
            assert!((found / exact - 1.0).abs() < 2e-5, "{found}, not {exact}");
        }
    }
}
