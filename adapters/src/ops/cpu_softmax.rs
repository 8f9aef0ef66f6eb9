//! Exponentials over a row: the loss, attention's softmax and its gradient.
//!
//! Whole rows at a time, never rescaled; sums run in the lanes of `cpu_rows`. It must not know what the scores belong to.

#![allow(unsafe_code, reason = "vector kernels take pointers")]

use super::cpu_buffer::spread_parts;
use super::cpu_lanes::{LANES, Lanes, per_isa};
use super::cpu_rows::{Terms, fold};
use super::cpu_tile::{Isa, Out};

/// `exp(factor * (x[i] - shift))`, which also replaces `x[i]`.
#[derive(Clone, Copy)]
struct Exponentials<V> {
    x: *mut f32,
    shift: V,
    factor: V,
}

impl<V: Lanes> Terms<V> for Exponentials<V> {
    #[inline(always)]
    unsafe fn onto(self, acc: V, at: usize, len: usize) -> V {
        // SAFETY: promised by the caller.
        unsafe {
            let x = V::load_n(self.x.add(at), len, f32::NEG_INFINITY);
            let e = x.sub(self.shift).mul(self.factor).exp();
            e.store_n(self.x.add(at), len);
            acc.add(e)
        }
    }
}

/// `weight * (softmax - onehot(label))` of each row of logits to `gradient`; its loss, and whether its label comes first, to
/// `judged`.
pub(super) fn cross_entropy(
    isa: Isa,
    logits: &[f32],
    labels: &[u32],
    weights: &[f32],
    gradient: &mut [f32],
    judged: &mut [f32],
) {
    assert_eq!(2 * labels.len(), judged.len(), "two numbers for each label");
    assert_eq!(weights.len(), labels.len(), "a weight for each label");
    assert_eq!(logits.len(), gradient.len(), "a gradient for each logit");
    if labels.is_empty() {
        return;
    }
    let vocab = logits.len() / labels.len();
    assert_eq!(logits.len(), vocab * labels.len(), "whole rows of logits");
    let judged = Out(judged.as_mut_ptr());
    spread_parts(gradient, vocab, 2 * logits.len(), |i, row| {
        let (from, label) = (&logits[i * vocab..][..vocab], labels[i] as usize);
        let weight = weights[i];
        let target = from[label];
        row.copy_from_slice(from);
        // SAFETY: `row` is `vocab` numbers.
        let (highest, log_total) = unsafe { softmax_row(isa, row.as_mut_ptr(), vocab, weight) };
        row[label] -= weight;
        let first = f32::from(u8::from(target >= highest));
        // SAFETY: there are two numbers for each label, and they belong to its row's task.
        unsafe {
            judged.at(2 * i).write(log_total - target);
            judged.at(2 * i + 1).write(first);
        }
    });
}

per_isa! {
    /// Replaces the row by `scale * softmax(row)` and returns its highest number and the log of the sum of its exponentials.
    ///
    /// # Safety
    /// `x` is valid for `n` numbers and the machine has `isa`.
    fn softmax_row(x: *mut f32, n: usize, scale: f32) -> (f32, f32) = softmax_row_body
}

#[inline(always)]
unsafe fn softmax_row_body<V: Lanes>(x: *mut f32, n: usize, scale: f32) -> (f32, f32) {
    // SAFETY: promised by the caller.
    unsafe {
        let highest = highest::<V>(x, n);
        let (shift, factor) = (V::splat(highest), V::splat(1.0));
        let total = fold::<V>(n, Exponentials { x, shift, factor });
        let factor = V::splat(scale / total);
        let mut at = 0;
        while at < n {
            let len = (n - at).min(LANES);
            V::load_n(x.add(at), len, 0.0)
                .mul(factor)
                .store_n(x.add(at), len);
            at += LANES;
        }
        (highest, highest + total.ln())
    }
}

/// The largest of `n` numbers.
#[inline(always)]
unsafe fn highest<V: Lanes>(x: *const f32, n: usize) -> f32 {
    // SAFETY: promised by the caller.
    unsafe {
        let mut best = V::splat(f32::NEG_INFINITY);
        let mut at = 0;
        while at < n {
            best = best.max(V::load_n(x.add(at), (n - at).min(LANES), f32::NEG_INFINITY));
            at += LANES;
        }
        best.largest()
    }
}

per_isa! {
    /// Attention's softmax without its division: `x[i] = exp(scale * (x[i] - max))`; returns the maximum times `scale` and the sum. `n` is a multiple of 32,
    /// places that a row must not see hold minus infinity, and at least one place does not.
    ///
    /// # Safety
    /// `x` is valid for `n` numbers and the machine has `isa`.
    pub(super) fn exponentials(x: *mut f32, n: usize, scale: f32) -> (f32, f32) = exponentials_body
}

#[inline(always)]
unsafe fn exponentials_body<V: Lanes>(x: *mut f32, n: usize, scale: f32) -> (f32, f32) {
    // SAFETY: promised by the caller.
    unsafe {
        let highest = highest::<V>(x, n);
        let (shift, factor) = (V::splat(highest), V::splat(scale));
        let total = fold::<V>(n, Exponentials { x, shift, factor });
        (highest * scale, total)
    }
}

per_isa! {
    /// From raw scores `s` and `dp = dout . v`: `s = p = exp(scale * s - lse)` and `dp = scale * p * (dp - mean)`.
    ///
    /// # Safety
    /// `s` and `dp` are valid for `n` numbers and the machine has `isa`.
    pub(super) fn score_gradients(
        s: *mut f32,
        dp: *mut f32,
        n: usize,
        scale: f32,
        lse: f32,
        mean: f32,
    ) = score_gradients_body
}

#[inline(always)]
unsafe fn score_gradients_body<V: Lanes>(
    s: *mut f32,
    dp: *mut f32,
    n: usize,
    scale: f32,
    lse: f32,
    mean: f32,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let (factor, lse, mean) = (V::splat(scale), V::splat(lse), V::splat(mean));
        let mut at = 0;
        while at < n {
            let len = (n - at).min(LANES);
            let p = V::load_n(s.add(at), len, f32::NEG_INFINITY)
                .mul(factor)
                .sub(lse)
                .exp();
            let d = V::load_n(dp.add(at), len, 0.0).sub(mean);
            p.store_n(s.add(at), len);
            factor.mul(p).mul(d).store_n(dp.add(at), len);
            at += LANES;
        }
    }
}
