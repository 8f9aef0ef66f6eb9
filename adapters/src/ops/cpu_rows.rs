//! Operations that look at one row at a time: norms, rotary positions, activations, plain sums.
//!
//! Reductions over a row run in 32 lanes with a fixed tree at the end, so their bits depend on the row alone. It must not know how rows are batched.

#![allow(unsafe_code, reason = "vector kernels take pointers")]

use super::cpu_buffer::{rows_per_task, spread_parts};
use super::cpu_lanes::{LANES, Lanes, per_isa};
use super::cpu_tile::{Isa, Out};

/// Rows of `width` and of `other` side by side, cut into tasks: `work(read, write)`.
fn by_rows(
    read: &[f32],
    width: usize,
    write: &mut [f32],
    other: usize,
    cost: usize,
    work: impl Fn(&[f32], &mut [f32]) + Sync,
) {
    if width == 0 || other == 0 {
        return;
    }
    let rows = read.len() / width;
    assert_eq!(
        (read.len(), write.len()),
        (rows * width, rows * other),
        "as many rows on both sides"
    );
    let per_task = rows_per_task(rows, width, cost);
    spread_parts(write, per_task * other, rows * width * cost, |i, write| {
        let own = &read[i * per_task * width..][..write.len() / other * width];
        work(own, write);
    });
}

/// `y += x`: a number is a row of its own.
pub(super) fn add(x: &[f32], y: &mut [f32]) {
    by_rows(x, 1, y, 1, 1, |x, y| {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    });
}

/// `y = x / sqrt(mean(x^2) + eps) * weight`.
pub(super) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f64, y: &mut [f32]) {
    let width = weight.len();
    by_rows(x, width, y, width, 1, |x, y| {
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            // SAFETY: three slices of `width`.
            unsafe { norm_row(isa, x.as_ptr(), weight.as_ptr(), eps, y.as_mut_ptr(), width) };
        }
    });
}

per_isa! {
    /// # Safety
    /// All pointers are valid for `n` numbers and the machine has `isa`.
    fn norm_row(x: *const f32, w: *const f32, eps: f64, y: *mut f32, n: usize) = norm_row_body
}

#[inline(always)]
unsafe fn norm_row_body<V: Lanes>(x: *const f32, w: *const f32, eps: f64, y: *mut f32, n: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        let inverse = V::splat(inverse_rms::<V>(x, eps, n));
        let mut at = 0;
        while at < n {
            let len = (n - at).min(LANES);
            let scaled = V::load_n(x.add(at), len, 0.0).mul(inverse);
            let w = V::load_n(w.add(at), len, 0.0);
            scaled.mul(w).store_n(y.add(at), len);
            at += LANES;
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
unsafe fn inverse_rms<V: Lanes>(x: *const f32, eps: f64, n: usize) -> f32 {
    // SAFETY: promised by the caller.
    unsafe {
        let squares = fold::<V>(n, Products(x, x));
        1.0 / (squares / n as f32 + eps as f32).sqrt()
    }
}

/// What a sum over a row adds up. A trait and not a closure, because only a method can be told to always inline, and vectors must stay in registers.
pub(super) trait Terms<V: Lanes>: Copy {
    /// `acc` plus the terms of numbers `at..at + len`, `len` at most sixteen.
    ///
    /// # Safety
    /// The operands are valid there and the machine has the instruction set of `V`.
    unsafe fn onto(self, acc: V, at: usize, len: usize) -> V;
}

/// A sum over `n` numbers in 32 lanes: even and odd chunks of sixteen apart, then together, then the tree.
#[inline(always)]
pub(super) unsafe fn fold<V: Lanes>(n: usize, terms: impl Terms<V>) -> f32 {
    // SAFETY: promised by the caller.
    unsafe {
        let (mut even, mut odd) = (V::splat(0.0), V::splat(0.0));
        let mut at = 0;
        while at + 2 * LANES <= n {
            even = terms.onto(even, at, LANES);
            odd = terms.onto(odd, at + LANES, LANES);
            at += 2 * LANES;
        }
        if at < n {
            even = terms.onto(even, at, (n - at).min(LANES));
            at += LANES;
        }
        if at < n {
            odd = terms.onto(odd, at, n - at);
        }
        even.add(odd).sum()
    }
}

/// `a[i] * b[i]`.
#[derive(Clone, Copy)]
struct Products(*const f32, *const f32);

impl<V: Lanes> Terms<V> for Products {
    #[inline(always)]
    unsafe fn onto(self, acc: V, at: usize, len: usize) -> V {
        // SAFETY: promised by the caller.
        unsafe { V::load_n(self.0.add(at), len, 0.0).fma(V::load_n(self.1.add(at), len, 0.0), acc) }
    }
}

/// `dy[i] * w[i] * x[i]`.
#[derive(Clone, Copy)]
struct Along {
    dy: *const f32,
    w: *const f32,
    x: *const f32,
}

impl<V: Lanes> Terms<V> for Along {
    #[inline(always)]
    unsafe fn onto(self, acc: V, at: usize, len: usize) -> V {
        // SAFETY: promised by the caller.
        unsafe {
            let g = V::load_n(self.dy.add(at), len, 0.0).mul(V::load_n(self.w.add(at), len, 0.0));
            g.fma(V::load_n(self.x.add(at), len, 0.0), acc)
        }
    }
}

/// `dx += r (dy w) - r^3 x (sum(dy w x) / n)` with `r = 1 / sqrt(mean(x^2) + eps)`.
pub(super) fn rms_norm_backward(
    isa: Isa,
    x: &[f32],
    weight: &[f32],
    eps: f64,
    dy: &[f32],
    dx: &mut [f32],
) {
    let width = weight.len();
    assert_eq!(dy.len(), dx.len(), "dy and dx are both [rows, width]");
    if width == 0 {
        return;
    }
    let rows = x.len() / width;
    assert_eq!(
        (x.len(), dx.len()),
        (rows * width, rows * width),
        "x and dx are both [rows, width]"
    );
    let per_task = rows_per_task(rows, width, 2);
    let work = |((x, dy), dx): ((&[f32], &[f32]), &mut [f32])| {
        let rows = x
            .chunks_exact(width)
            .zip(dy.chunks_exact(width))
            .zip(dx.chunks_exact_mut(width));
        for ((x, dy), dx) in rows {
            // SAFETY: four slices of `width`.
            unsafe {
                norm_row_backward(
                    isa,
                    x.as_ptr(),
                    weight.as_ptr(),
                    eps,
                    dy.as_ptr(),
                    dx.as_mut_ptr(),
                    width,
                );
            }
        }
    };
    spread_parts(dx, per_task * width, 2 * rows * width, |i, dx| {
        let own = i * per_task * width..i * per_task * width + dx.len();
        work(((&x[own.clone()], &dy[own]), dx));
    });
}

per_isa! {
    /// # Safety
    /// All pointers are valid for `n` numbers and the machine has `isa`.
    fn norm_row_backward(
        x: *const f32,
        w: *const f32,
        eps: f64,
        dy: *const f32,
        dx: *mut f32,
        n: usize,
    ) = norm_row_backward_body
}

#[inline(always)]
unsafe fn norm_row_backward_body<V: Lanes>(
    x: *const f32,
    w: *const f32,
    eps: f64,
    dy: *const f32,
    dx: *mut f32,
    n: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let inverse = inverse_rms::<V>(x, eps, n);
        let along = fold::<V>(n, Along { dy, w, x });
        let back = V::splat(-(inverse * inverse * along / n as f32));
        let inverse = V::splat(inverse);
        let mut at = 0;
        while at < n {
            let len = (n - at).min(LANES);
            let g = V::load_n(dy.add(at), len, 0.0).mul(V::load_n(w.add(at), len, 0.0));
            let d = back.fma(V::load_n(x.add(at), len, 0.0), g);
            let sum = inverse.fma(d, V::load_n(dx.add(at), len, 0.0));
            sum.store_n(dx.add(at), len);
            at += LANES;
        }
    }
}

/// Rotates each head's halves; see [`Ops::rope`](super::Ops::rope).
pub(super) fn rope(
    isa: Isa,
    x: &mut [f32],
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
    inverse: bool,
) {
    let half = head_dim / 2;
    assert_eq!(cos.len(), sin.len(), "one sine for each cosine");
    if cos.is_empty() {
        return;
    }
    let rows = cos.len() / half;
    let width = x.len() / rows;
    assert_eq!(
        (cos.len(), x.len(), width % head_dim),
        (rows * half, rows * width, 0),
        "whole rows of whole heads"
    );
    let sign = if inverse { -1.0 } else { 1.0 };
    let per_task = rows_per_task(rows, width, 1);
    let work = |((x, cos), sin): ((&mut [f32], &[f32]), &[f32])| {
        let rows = x
            .chunks_exact_mut(width)
            .zip(cos.chunks_exact(half))
            .zip(sin.chunks_exact(half));
        for ((x, cos), sin) in rows {
            // SAFETY: `x` is whole heads; `cos` and `sin` are half a head.
            unsafe {
                rope_row(
                    isa,
                    x.as_mut_ptr(),
                    width / head_dim,
                    half,
                    cos.as_ptr(),
                    sin.as_ptr(),
                    sign,
                );
            }
        }
    };
    spread_parts(x, per_task * width, rows * width, |i, x| {
        let own = i * per_task * half..i * per_task * half + x.len() / width * half;
        work(((x, &cos[own.clone()]), &sin[own]));
    });
}

per_isa! {
    /// # Safety
    /// `x` is valid for `heads * 2 * half` numbers, `cos` and `sin` for `half`; the machine has `isa`.
    fn rope_row(
        x: *mut f32,
        heads: usize,
        half: usize,
        cos: *const f32,
        sin: *const f32,
        sign: f32,
    ) = rope_row_body
}

#[inline(always)]
unsafe fn rope_row_body<V: Lanes>(
    x: *mut f32,
    heads: usize,
    half: usize,
    cos: *const f32,
    sin: *const f32,
    sign: f32,
) {
    // SAFETY: promised by the caller.
    unsafe {
        for head in 0..heads {
            let (low, high) = (x.add(head * 2 * half), x.add(head * 2 * half + half));
            let mut at = 0;
            while at < half {
                let len = (half - at).min(LANES);
                let c = V::load_n(cos.add(at), len, 0.0);
                let s = V::load_n(sin.add(at), len, 0.0).mul(V::splat(sign));
                let a = V::load_n(low.add(at), len, 0.0);
                let b = V::load_n(high.add(at), len, 0.0);
                a.mul(c).sub(b.mul(s)).store_n(low.add(at), len);
                b.mul(c).add(a.mul(s)).store_n(high.add(at), len);
                at += LANES;
            }
        }
    }
}

/// Numbers in one task of an elementwise operation that computes an exponential.
const EXP_TASK: usize = 2 * 1024;

/// What an exponential costs beside a multiply-add.
const EXP_COST: usize = 8;

/// `y = silu(gate) * up`.
pub(super) fn swiglu(isa: Isa, gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(
        gate.len() == up.len() && up.len() == y.len(),
        "gate, up and y have one length"
    );
    let work = |((gate, up), y): ((&[f32], &[f32]), &mut [f32])| {
        // SAFETY: three slices of one length.
        unsafe { swiglu_run(isa, gate.as_ptr(), up.as_ptr(), y.as_mut_ptr(), y.len()) };
    };
    let cost = EXP_COST * y.len();
    spread_parts(y, EXP_TASK, cost, |i, y| {
        let own = i * EXP_TASK..i * EXP_TASK + y.len();
        work(((&gate[own.clone()], &up[own]), y));
    });
}

per_isa! {
    /// # Safety
    /// All pointers are valid for `n` numbers and the machine has `isa`.
    fn swiglu_run(gate: *const f32, up: *const f32, y: *mut f32, n: usize) = swiglu_run_body
}

#[inline(always)]
unsafe fn swiglu_run_body<V: Lanes>(gate: *const f32, up: *const f32, y: *mut f32, n: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut at = 0;
        while at < n {
            let len = (n - at).min(LANES);
            let g = V::load_n(gate.add(at), len, 0.0);
            let u = V::load_n(up.add(at), len, 0.0);
            g.mul(sigmoid(g)).mul(u).store_n(y.add(at), len);
            at += LANES;
        }
    }
}

#[inline(always)]
unsafe fn sigmoid<V: Lanes>(x: V) -> V {
    // SAFETY: vector arithmetic only; the instruction set is the caller's promise.
    unsafe {
        let one = V::splat(1.0);
        one.div(one.add(V::splat(0.0).sub(x).exp()))
    }
}

/// Replaces `gate` and `up` by their gradients for `dy`.
pub(super) fn swiglu_backward(isa: Isa, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    assert!(
        gate.len() == up.len() && up.len() == dy.len(),
        "gate, up and dy have one length"
    );
    let work = |((gate, up), dy): ((&mut [f32], &mut [f32]), &[f32])| {
        // SAFETY: three slices of one length.
        unsafe {
            swiglu_run_backward(
                isa,
                gate.as_mut_ptr(),
                up.as_mut_ptr(),
                dy.as_ptr(),
                dy.len(),
            );
        }
    };
    let up = Out(up.as_mut_ptr());
    let cost = EXP_COST * gate.len();
    spread_parts(gate, EXP_TASK, cost, |i, gate| {
        let own = i * EXP_TASK..i * EXP_TASK + gate.len();
        // SAFETY: `up` is as long as `gate`, and the part that stands beside a part of `gate` belongs to the same task.
        let up = unsafe { std::slice::from_raw_parts_mut(up.at(own.start), own.len()) };
        work(((gate, up), &dy[own]));
    });
}

per_isa! {
    /// # Safety
    /// All pointers are valid for `n` numbers and the machine has `isa`.
    fn swiglu_run_backward(
        gate: *mut f32,
        up: *mut f32,
        dy: *const f32,
        n: usize,
    ) = swiglu_run_backward_body
}

#[inline(always)]
unsafe fn swiglu_run_backward_body<V: Lanes>(
    gate: *mut f32,
    up: *mut f32,
    dy: *const f32,
    n: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let one = V::splat(1.0);
        let mut at = 0;
        while at < n {
            let len = (n - at).min(LANES);
            let g = V::load_n(gate.add(at), len, 0.0);
            let u = V::load_n(up.add(at), len, 0.0);
            let d = V::load_n(dy.add(at), len, 0.0);
            let s = sigmoid(g);
            // silu'(g) = s (1 + g (1 - s)).
            let slope = s.mul(g.fma(one.sub(s), one));
            d.mul(u).mul(slope).store_n(gate.add(at), len);
            d.mul(g).mul(s).store_n(up.add(at), len);
            at += LANES;
        }
    }
}

per_isa! {
    /// The dot product of two vectors of `n`.
    ///
    /// # Safety
    /// Both pointers are valid for `n` numbers and the machine has `isa`.
    pub(super) fn dot(a: *const f32, b: *const f32, n: usize) -> f32 = dot_body
}

#[inline(always)]
unsafe fn dot_body<V: Lanes>(a: *const f32, b: *const f32, n: usize) -> f32 {
    // SAFETY: promised by the caller.
    unsafe { fold::<V>(n, Products(a, b)) }
}

per_isa! {
    /// `y = x * factor`, for `n` numbers.
    ///
    /// # Safety
    /// Both pointers are valid for `n` numbers and the machine has `isa`.
    pub(super) fn scaled(x: *const f32, factor: f32, y: *mut f32, n: usize) = scaled_body
}

#[inline(always)]
unsafe fn scaled_body<V: Lanes>(x: *const f32, factor: f32, y: *mut f32, n: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        let factor = V::splat(factor);
        let mut at = 0;
        while at < n {
            let len = (n - at).min(LANES);
            V::load_n(x.add(at), len, 0.0)
                .mul(factor)
                .store_n(y.add(at), len);
            at += LANES;
        }
    }
}
