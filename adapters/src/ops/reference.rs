//! The operations as their formulas read: slow, obvious, the oracle of the fast paths.
//!
//! Generic over f32 and f64, so that finite differences can run in f64. It must not be clever: one loop for one sum
//! sign, no blocking, no threads.

use std::marker::PhantomData;
use std::ops::Range;

use super::host::host_memory;
use super::{
    AttentionGrads, AttentionSaved, AttentionShape, AttentionSpan, LowRank, NO_ROW, Ops, Real,
    WeightKind,
};

/// Plain operations in `T`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference<T>(PhantomData<T>);

/// A weight as it was given: row-major `[outputs, inputs]`.
#[derive(Clone, Debug)]
pub struct Plain<T> {
    outputs: usize,
    inputs: usize,
    weight: Vec<T>,
}

impl<T: Real> Plain<T> {
    fn row(&self, output: usize) -> &[T] {
        &self.weight[output * self.inputs..][..self.inputs]
    }
}

fn dot<T: Real>(left: &[T], right: &[T]) -> T {
    left.iter()
        .zip(right)
        .fold(T::ZERO, |sum, (l, r)| l.mul_add(*r, sum))
}

/// `sum += factor * row`.
fn axpy<T: Real>(factor: T, row: &[T], sum: &mut [T]) {
    for (sum, x) in sum.iter_mut().zip(row) {
        *sum = factor.mul_add(*x, *sum);
    }
}

fn sigmoid<T: Real>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp())
}

/// `1 / sqrt(mean(x^2) + eps)`.
fn inverse_rms<T: Real>(x: &[T], eps: f64) -> T {
    let mean = dot(x, x) / T::from_f64(x.len() as f64);
    T::ONE / (mean + T::from_f64(eps)).sqrt()
}

impl<T: Real> Ops for Reference<T> {
    type Matrix = Plain<T>;
    host_memory!(T);

    fn pack(&self, weight: &[f32], outputs: usize, inputs: usize) -> Plain<T> {
        assert_eq!(
            weight.len(),
            outputs * inputs,
            "a weight is [outputs, inputs]"
        );
        let weight = weight.iter().map(|w| T::from_f32(*w)).collect();
        Plain {
            outputs,
            inputs,
            weight,
        }
    }

    fn kind(&self, _: &Plain<T>) -> WeightKind {
        WeightKind::F32
    }

    fn dims(&self, weight: &Plain<T>) -> (usize, usize) {
        (weight.outputs, weight.inputs)
    }

    fn bytes(&self, weight: &Plain<T>) -> usize {
        size_of_val(weight.weight.as_slice())
    }

    fn gather(&self, weight: &Plain<T>, ids: &[u32], out: &mut [T]) {
        for (id, out) in ids.iter().zip(out.chunks_exact_mut(weight.inputs)) {
            out.copy_from_slice(weight.row(*id as usize));
        }
    }

    fn matmul_part(&self, x: &[T], weight: &Plain<T>, outputs: Range<usize>, y: &mut [T]) {
        for (x, y) in x
            .chunks_exact(weight.inputs)
            .zip(y.chunks_exact_mut(weight.outputs))
        {
            for output in outputs.clone() {
                y[output] = dot(x, weight.row(output));
            }
        }
    }

    fn matmul_backward_part(
        &self,
        dy: &[T],
        weight: &Plain<T>,
        outputs: Range<usize>,
        dx: &mut [T],
    ) {
        for (dy, dx) in dy
            .chunks_exact(weight.outputs)
            .zip(dx.chunks_exact_mut(weight.inputs))
        {
            for output in outputs.clone() {
                axpy(dy[output], weight.row(output), dx);
            }
        }
    }

    fn shrink(&self, x: &[T], a: &[T], rank: usize, h: &mut [T]) {
        let inputs = a.len() / rank;
        for (x, h) in x.chunks_exact(inputs).zip(h.chunks_exact_mut(rank)) {
            for (a, h) in a.chunks_exact(inputs).zip(h) {
                *h = dot(x, a);
            }
        }
    }

    fn expand(&self, h: &[T], bt: &[T], rank: usize, scale: T, y: &mut [T]) {
        let outputs = bt.len() / rank;
        for (h, y) in h.chunks_exact(rank).zip(y.chunks_exact_mut(outputs)) {
            for (h, b) in h.iter().zip(bt.chunks_exact(outputs)) {
                axpy(scale * *h, b, y);
            }
        }
    }

    fn outer(&self, h: &[T], x: &[T], rank: usize, scale: T, dw: &mut [T]) {
        let width = dw.len() / rank;
        for (h, x) in h.chunks_exact(rank).zip(x.chunks_exact(width)) {
            for (h, dw) in h.iter().zip(dw.chunks_exact_mut(width)) {
                axpy(scale * *h, x, dw);
            }
        }
    }

    fn low_rank(
        &self,
        x: &[T],
        updates: &Self::Updates<'_>,
        list: usize,
        mut outputs: Vec<&mut [T]>,
    ) {
        for update in &updates[list] {
            let LowRank { rows, rank, .. } = update;
            let (a, bt) = (update.a.to_vec(), update.bt.to_vec());
            let (inputs, width) = (a.len() / rank, bt.len() / rank);
            let mut h = vec![T::ZERO; rows.len() * rank];
            let x = &x[rows.start * inputs..rows.end * inputs];
            let y = &mut outputs[update.output][rows.start * width..rows.end * width];
            self.shrink(x, &a, *rank, &mut h);
            self.expand(&h, &bt, *rank, update.scale, y);
        }
    }

    fn rms_norm(&self, x: &[T], weight: &[T], eps: f64, y: &mut [T]) {
        let width = weight.len();
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let inverse = inverse_rms(x, eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = *w * (*x * inverse);
            }
        }
    }

    // With r = 1/sqrt(mean(x^2) + eps) and g = dy * w: dx = r g - r^3 x (g . x) / n.
    fn rms_norm_backward(&self, x: &[T], weight: &[T], eps: f64, dy: &[T], dx: &mut [T]) {
        let width = weight.len();
        let rows = x
            .chunks_exact(width)
            .zip(dy.chunks_exact(width))
            .zip(dx.chunks_exact_mut(width));
        for ((x, dy), dx) in rows {
            let inverse = inverse_rms(x, eps);
            let mut along = T::ZERO;
            for ((x, dy), w) in x.iter().zip(dy).zip(weight) {
                along = (*dy * *w).mul_add(*x, along);
            }
            let back = inverse * inverse * along / T::from_f64(width as f64);
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                *dx += inverse * (*dy * *w - back * *x);
            }
        }
    }

    fn rope(&self, x: &mut [T], head_dim: usize, cos: &[T], sin: &[T], inverse: bool) {
        let half = head_dim / 2;
        if cos.is_empty() {
            return;
        }
        let width = x.len() / (cos.len() / half);
        let rows = x
            .chunks_exact_mut(width)
            .zip(cos.chunks_exact(half))
            .zip(sin.chunks_exact(half));
        for ((row, cos), sin) in rows {
            for head in row.chunks_exact_mut(head_dim) {
                for i in 0..half {
                    let (a, b) = (head[i], head[i + half]);
                    let sin = if inverse { -sin[i] } else { sin[i] };
                    head[i] = a * cos[i] - b * sin;
                    head[i + half] = b * cos[i] + a * sin;
                }
            }
        }
    }

    fn swiglu(&self, gate: &[T], up: &[T], y: &mut [T]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = *gate * sigmoid(*gate) * *up;
        }
    }

    // silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
    fn swiglu_backward(&self, gate: &mut [T], up: &mut [T], dy: &[T]) {
        for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
            let s = sigmoid(*gate);
            let dgate = *dy * *up * s * (T::ONE + *gate * (T::ONE - s));
            *up = *dy * *gate * s;
            *gate = dgate;
        }
    }

    fn attention(
        &self,
        shape: AttentionShape,
        q: &[T],
        k: &[T],
        v: &[T],
        spans: &Vec<AttentionSpan<'_>>,
        out: &mut [T],
        mut lse: Option<&mut [T]>,
    ) {
        let scale = T::from_f64(shape.scale());
        for span in spans {
            for (i, row) in span.rows.clone().enumerate() {
                let last = span.start + i;
                let seen = shape.first_visible(last)..last + 1;
                for head in 0..shape.heads {
                    let q = &q[shape.q_at(row, head)];
                    let kv_head = head / (shape.heads / shape.kv_heads);
                    let score = |position: usize| {
                        let key = |d| k[span.kv.key(shape, position, kv_head, d)];
                        let key: Vec<T> = (0..shape.head_dim).map(key).collect();
                        scale * dot(q, &key)
                    };
                    let scores: Vec<T> = seen.clone().map(score).collect();
                    let highest = scores
                        .iter()
                        .fold(T::LOWEST, |a, b| if *b > a { *b } else { a });
                    let weights: Vec<T> = scores.iter().map(|s| (*s - highest).exp()).collect();
                    let total: T = weights.iter().copied().sum();
                    let out = &mut out[shape.q_at(row, head)];
                    out.fill(T::ZERO);
                    for (position, weight) in seen.clone().zip(weights) {
                        let value = &v[span.kv.value(shape, position, kv_head)..][..shape.head_dim];
                        axpy(weight / total, value, out);
                    }
                    if let Some(lse) = lse.as_deref_mut() {
                        lse[row * shape.heads + head] = highest + total.ln();
                    }
                }
            }
        }
    }

    // With p = softmax(s): dv_j += p_j dout; ds_j = p_j (dout . v_j - dout . out); dq += scale ds_j k_j; dk_j += scale ds_j q.
    fn attention_backward(
        &self,
        shape: AttentionShape,
        saved: AttentionSaved<&[T]>,
        spans: &Vec<AttentionSpan<'_>>,
        dout: &[T],
        grads: AttentionGrads<&mut [T]>,
    ) {
        let scale = T::from_f64(shape.scale());
        for span in spans {
            for (i, row) in span.rows.clone().enumerate() {
                let last = span.start + i;
                for head in 0..shape.heads {
                    let at = shape.q_at(row, head);
                    let (q, dout) = (&saved.q[at.clone()], &dout[at.clone()]);
                    let mean = dot(dout, &saved.out[at.clone()]);
                    let lse = saved.lse[row * shape.heads + head];
                    let dq = &mut grads.dq[at];
                    dq.fill(T::ZERO);
                    for position in shape.first_visible(last)..=last {
                        let kv = shape.kv_at(span.kv.row(position), head);
                        let (k, v) = (&saved.k[kv.clone()], &saved.v[kv.clone()]);
                        let p = (scale * dot(q, k) - lse).exp();
                        let ds = scale * p * (dot(dout, v) - mean);
                        axpy(p, dout, &mut grads.dv[kv.clone()]);
                        axpy(ds, q, &mut grads.dk[kv]);
                        axpy(ds, k, dq);
                    }
                }
            }
        }
    }

    fn add(&self, x: &[T], y: &mut [T]) {
        assert_eq!(x.len(), y.len(), "both sides of a sum have one length");
        y.iter_mut().zip(x).for_each(|(y, x)| *y += *x);
    }

    fn store_keys(&self, from: &[T], _: usize, rows: &[u32], block_size: usize, k: &mut [T]) {
        let Some(width) = from.len().checked_div(rows.len()) else {
            return;
        };
        for (from, row) in from.chunks_exact(width).zip(rows) {
            if *row == NO_ROW {
                continue;
            }
            let row = *row as usize;
            let block = &mut k[row / block_size * block_size * width..][..block_size * width];
            let column = block.iter_mut().skip(row % block_size).step_by(block_size);
            column.zip(from).for_each(|(to, from)| *to = *from);
        }
    }

    fn cross_entropy(
        &self,
        logits: &[T],
        labels: &[u32],
        weights: &[T],
        gradient: &mut [T],
        judged: &mut [T],
    ) {
        let Some(vocab) = logits.len().checked_div(labels.len()) else {
            return;
        };
        let rows = logits
            .chunks_exact(vocab)
            .zip(gradient.chunks_exact_mut(vocab));
        let targets = labels.iter().zip(weights);
        for (((row, gradient), (label, weight)), judged) in
            rows.zip(targets).zip(judged.chunks_exact_mut(2))
        {
            let (label, weight) = (*label as usize, *weight);
            let highest = row
                .iter()
                .fold(T::LOWEST, |a, b| if *b > a { *b } else { a });
            let total: T = row.iter().map(|x| (*x - highest).exp()).sum();
            judged[0] = highest + total.ln() - row[label];
            judged[1] = if row[label] >= highest {
                T::ONE
            } else {
                T::ZERO
            };
            for (gradient, x) in gradient.iter_mut().zip(row) {
                *gradient = weight * ((*x - highest).exp() / total);
            }
            gradient[label] -= weight;
        }
    }
}

#[cfg(test)]
mod tests;
