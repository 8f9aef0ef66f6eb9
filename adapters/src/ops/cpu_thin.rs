//! Thin products: the two low-rank factors of an adapter, forward and backward.
//!
//! `shrink` reduces over a wide side and is a set of dot products with sixteen lanes each; `expand` and `outer` have a wide side to run along and use the
//! tile kernel. Factors are read as they are stored, so weights that change at every training step need no packing. It must not know which adapter this is.

#![allow(unsafe_code, reason = "tiles are pointers")]
#![allow(
    clippy::needless_range_loop,
    reason = "accumulators of a block are indexed by row and column, as the sum is written"
)]

use half::{bf16, f16};

use super::cpu_buffer::{rows_per_task, spread, spread_parts, with_scratch, worth_threads};
use super::cpu_lanes::{LANES, Lanes, per_isa};
use super::cpu_tile::{HALF, Isa, Out, PANEL, Tile};

/// Up to this many rows, `expand` streams the factor row by row instead of tile by tile: one pass in memory order.
pub(super) const FEW_ROWS: usize = 3;

/// Where a factor's numbers lie, and what they are.
#[derive(Clone, Copy, Debug)]
pub(super) enum FactorAt {
    /// Read as they are.
    F32(*const f32),
    /// Widened in registers.
    Bf16(*const bf16),
    /// Widened in registers.
    F16(*const f16),
}

/// A stored number, sixteen of which fill a vector.
trait Number: Copy + Default {
    /// Sixteen numbers from `p`, widened exactly.
    ///
    /// # Safety
    /// As [`Lanes::load`].
    unsafe fn load<V: Lanes>(p: *const Self) -> V;
    /// The first `n` lanes from `p`, the others 0.
    ///
    /// # Safety
    /// As [`Lanes::load_part`].
    #[inline(always)]
    unsafe fn load_part<V: Lanes>(p: *const Self, n: usize) -> V {
        let mut whole = [Self::default(); LANES];
        // SAFETY: the caller promises `n` readable numbers, n <= LANES.
        unsafe {
            std::ptr::copy_nonoverlapping(p, whole.as_mut_ptr(), n);
            Self::load(whole.as_ptr())
        }
    }
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(p: *const Self) -> V {
        // SAFETY: promised by the caller.
        unsafe { V::load(p) }
    }
    #[inline(always)]
    unsafe fn load_part<V: Lanes>(p: *const Self, n: usize) -> V {
        // SAFETY: promised by the caller.
        unsafe { V::load_n(p, n, 0.0) }
    }
}

impl Number for bf16 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(p: *const Self) -> V {
        // SAFETY: promised by the caller.
        unsafe { V::load_bf16(p) }
    }
}

impl Number for f16 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(p: *const Self) -> V {
        // SAFETY: promised by the caller.
        unsafe { V::load_f16(p) }
    }
}

/// Asks for the line that holds `p`. A factor of a few rows is read once, in order, and pages end the hardware's own guesses; the address may lie
/// outside of every allocation.
#[inline(always)]
fn ask_for<E>(p: *const E) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing, and SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// `h = x A^T`.
pub(super) fn shrink(isa: Isa, x: &[f32], a: &[f32], rank: usize, h: &mut [f32]) {
    let inputs = width(a, rank);
    let rows = h.len() / rank.max(1);
    assert_eq!(
        (x.len(), h.len()),
        (rows * inputs, rows * rank),
        "x [rows, in], h [rows, rank]"
    );
    if h.is_empty() {
        return;
    }
    if rows < 8 && worth_threads(rows * rank * inputs) {
        // Few rows of a large adapter: the factor's rows are what there is to share out.
        let out = Out(h.as_mut_ptr());
        let tasks = rank.div_ceil(8);
        return spread(tasks, rows * rank * inputs, |task| {
            let (first, count) = (task * 8, (rank - task * 8).min(8));
            // SAFETY: columns `first..first + count` of `h` belong to this task alone; lengths were checked above.
            unsafe {
                let a = FactorAt::F32(a.as_ptr().add(first * inputs));
                let h = out.at(first);
                dots(isa, x.as_ptr(), rows, a, count, inputs, 1.0, h, rank);
            }
        });
    }
    let per_task = rows_per_task(rows, inputs, rank).next_multiple_of(4);
    let run = |(x, h): (&[f32], &mut [f32])| {
        // SAFETY: `x` is [n, in], `a` [rank, in] and `h` [n, rank] for n = h.len() / rank.
        unsafe {
            let n = h.len() / rank;
            dots(
                isa,
                x.as_ptr(),
                n,
                FactorAt::F32(a.as_ptr()),
                rank,
                inputs,
                1.0,
                h.as_mut_ptr(),
                rank,
            );
        }
    };
    if per_task >= rows {
        run((x, h));
    } else {
        let work = rows * rank * inputs;
        spread_parts(h, per_task * rank, work, |i, h| {
            run((&x[i * per_task * inputs..][..h.len() / rank * inputs], h));
        });
    }
}

/// `y += scale * h Bt`.
pub(super) fn expand(isa: Isa, h: &[f32], bt: &[f32], rank: usize, scale: f32, y: &mut [f32]) {
    let outputs = width(bt, rank);
    let rows = h.len() / rank.max(1);
    assert_eq!(
        (h.len(), y.len()),
        (rows * rank, rows * outputs),
        "h [rows, rank], y [rows, out]"
    );
    if y.is_empty() || rank == 0 {
        return;
    }
    with_scratch(|scratch| {
        let scaled = scratch.0[0].first(h.len());
        for (s, h) in scaled.iter_mut().zip(h) {
            *s = scale * *h;
        }
        let scaled = &*scaled;
        if rows <= FEW_ROWS {
            return expand_few(isa, scaled, bt, rank, y);
        }
        let per_task = rows_per_task(rows, outputs, rank).next_multiple_of(12);
        let out = Out(y.as_mut_ptr());
        let work = rows * outputs * rank;
        spread(rows.div_ceil(per_task), work, |task| {
            let end = rows.min((task + 1) * per_task);
            for row in (task * per_task..end).step_by(12) {
                for first in (0..outputs).step_by(PANEL) {
                    // SAFETY: these rows of `y` belong to this task alone; lengths were checked above.
                    unsafe {
                        Tile {
                            x: scaled.as_ptr().add(row * rank),
                            x_row: rank,
                            x_k: 1,
                            w: bt.as_ptr().add(first),
                            w_k: outputs,
                            w_half: HALF,
                            k: rank,
                            y: out.at(row * outputs + first),
                            y_row: outputs,
                            rows: (end - row).min(12),
                            cols: PANEL.min(outputs - first),
                            accumulate: true,
                        }
                        .run(isa);
                    }
                }
            }
        });
    });
}

/// The same chains in memory order of `bt`: each row of it is read once from end to end.
fn expand_few(isa: Isa, scaled: &[f32], bt: &[f32], rank: usize, y: &mut [f32]) {
    let outputs = bt.len() / rank;
    let rows = y.len() / outputs;
    // Columns in one task: all of them unless there is enough work for two threads.
    let columns = if worth_threads(rows * bt.len()) {
        outputs.div_ceil(4).next_multiple_of(PANEL)
    } else {
        outputs
    };
    let out = Out(y.as_mut_ptr());
    spread(outputs.div_ceil(columns), rows * bt.len(), |task| {
        let first = task * columns;
        let count = columns.min(outputs - first);
        for (row, scaled) in scaled.chunks_exact(rank).enumerate() {
            // SAFETY: columns `first..first + count` of `y` belong to this task alone; `bt` is [rank, outputs].
            unsafe {
                let y = out.at(row * outputs + first);
                let bt = FactorAt::F32(bt.as_ptr().add(first));
                axpys(isa, scaled.as_ptr(), rank, bt, outputs, y, count);
            }
        }
    });
}

/// `dw += scale * h^T x`, row after row.
pub(super) fn outer(isa: Isa, h: &[f32], x: &[f32], rank: usize, scale: f32, dw: &mut [f32]) {
    let width = width(dw, rank);
    let rows = h.len() / rank.max(1);
    assert_eq!(
        (h.len(), x.len()),
        (rows * rank, rows * width),
        "h [rows, rank], x [rows, width]"
    );
    if h.is_empty() || dw.is_empty() {
        return;
    }
    with_scratch(|scratch| {
        let scaled = scratch.0[0].first(h.len());
        for (s, h) in scaled.iter_mut().zip(h) {
            *s = scale * *h;
        }
        let scaled = &*scaled;
        let out = Out(dw.as_mut_ptr());
        spread(width.div_ceil(PANEL), rows * rank * width, |task| {
            let first = task * PANEL;
            // SAFETY: columns `first..` of `dw` belong to this task alone; lengths were checked above.
            unsafe {
                Tile {
                    x: scaled.as_ptr(),
                    x_row: 1,
                    x_k: rank,
                    w: x.as_ptr().add(first),
                    w_k: width,
                    w_half: HALF,
                    k: rows,
                    y: out.at(first),
                    y_row: width,
                    rows: rank,
                    cols: PANEL.min(width - first),
                    accumulate: true,
                }
                .run(isa);
            }
        });
    });
}

fn width(factor: &[f32], rank: usize) -> usize {
    let width = factor.len() / rank.max(1);
    assert_eq!(factor.len(), width * rank, "a factor is [rank, width]");
    width
}

per_isa! {
    /// `h[i * h_row + j] = scale * dot(x_i, a_j)` for `i < rows`, `j < count`, vectors of `k`.
    ///
    /// # Safety
    /// The pointers are valid for these shapes, `h` does not overlap the others, and the machine has `isa`.
    pub(super) fn dots(
        x: *const f32,
        rows: usize,
        a: FactorAt,
        count: usize,
        k: usize,
        scale: f32,
        h: *mut f32,
        h_row: usize,
    ) = dots_body
}

#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "operands of a kernel")]
unsafe fn dots_body<V: Lanes>(
    x: *const f32,
    rows: usize,
    a: FactorAt,
    count: usize,
    k: usize,
    scale: f32,
    h: *mut f32,
    h_row: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        match a {
            FactorAt::F32(a) => dots_of::<V, f32>(x, rows, a, count, k, scale, h, h_row),
            FactorAt::Bf16(a) => dots_of::<V, bf16>(x, rows, a, count, k, scale, h, h_row),
            FactorAt::F16(a) => dots_of::<V, f16>(x, rows, a, count, k, scale, h, h_row),
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "operands of a kernel")]
unsafe fn dots_of<V: Lanes, E: Number>(
    x: *const f32,
    rows: usize,
    a: *const E,
    count: usize,
    k: usize,
    scale: f32,
    h: *mut f32,
    h_row: usize,
) {
    // SAFETY: blocks of the caller's rectangle.
    unsafe {
        let mut i = 0;
        while i < rows {
            let tall = if rows - i >= 4 { 4 } else { 1 };
            let mut j = 0;
            while j < count {
                let (x, a, h) = (x.add(i * k), a.add(j * k), h.add(i * h_row + j));
                j += match (tall, count - j) {
                    (4, 4..) => dot_block::<V, E, 4, 4>(x, a, k, scale, h, h_row),
                    (4, _) => dot_block::<V, E, 4, 1>(x, a, k, scale, h, h_row),
                    (_, 8..) => dot_block::<V, E, 1, 8>(x, a, k, scale, h, h_row),
                    (_, 4..) => dot_block::<V, E, 1, 4>(x, a, k, scale, h, h_row),
                    _ => dot_block::<V, E, 1, 1>(x, a, k, scale, h, h_row),
                };
            }
            i += tall;
        }
    }
}

/// `R` by `C` dot products; each has one vector of partial sums, whatever the block. Returns `C`.
#[inline(always)]
unsafe fn dot_block<V: Lanes, E: Number, const R: usize, const C: usize>(
    x: *const f32,
    a: *const E,
    k: usize,
    scale: f32,
    h: *mut f32,
    h_row: usize,
) -> usize {
    // SAFETY: promised by the caller.
    unsafe {
        let mut acc = [[V::splat(0.0); C]; R];
        let whole = k / LANES * LANES;
        let mut at = 0;
        while at < whole {
            let mut left = [V::splat(0.0); R];
            for r in 0..R {
                left[r] = V::load(x.add(r * k + at));
            }
            for c in 0..C {
                let right: V = E::load(a.add(c * k + at));
                if R == 1 {
                    ask_for(a.wrapping_add((C + c) * k + at));
                }
                for r in 0..R {
                    acc[r][c] = left[r].fma(right, acc[r][c]);
                }
            }
            at += LANES;
        }
        if whole < k {
            for c in 0..C {
                let right: V = E::load_part(a.add(c * k + whole), k - whole);
                for r in 0..R {
                    let left = V::load_n(x.add(r * k + whole), k - whole, 0.0);
                    acc[r][c] = left.fma(right, acc[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                *h.add(r * h_row + c) = scale * acc[r][c].sum();
            }
        }
        C
    }
}

per_isa! {
    /// `y += s[j] * b_j` for `j` ascending, rows `b_j` of `count` numbers `b_row` apart.
    ///
    /// # Safety
    /// The pointers are valid for these shapes, `y` does not overlap the others, and the machine has `isa`.
    pub(super) fn axpys(
        s: *const f32,
        rank: usize,
        b: FactorAt,
        b_row: usize,
        y: *mut f32,
        count: usize,
    ) = axpys_body
}

#[inline(always)]
unsafe fn axpys_body<V: Lanes>(
    s: *const f32,
    rank: usize,
    b: FactorAt,
    b_row: usize,
    y: *mut f32,
    count: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        match b {
            FactorAt::F32(b) => axpys_of::<V, f32>(s, rank, b, b_row, y, count),
            FactorAt::Bf16(b) => axpys_of::<V, bf16>(s, rank, b, b_row, y, count),
            FactorAt::F16(b) => axpys_of::<V, f16>(s, rank, b, b_row, y, count),
        }
    }
}

#[inline(always)]
unsafe fn axpys_of<V: Lanes, E: Number>(
    s: *const f32,
    rank: usize,
    b: *const E,
    b_row: usize,
    y: *mut f32,
    count: usize,
) {
    // SAFETY: rows of the caller's factor.
    unsafe {
        let mut j = 0;
        while j < rank {
            let (s, b) = (s.add(j), b.add(j * b_row));
            j += match rank - j {
                8.. => axpy_block::<V, E, 8>(s, b, b_row, y, count),
                4.. => axpy_block::<V, E, 4>(s, b, b_row, y, count),
                _ => axpy_block::<V, E, 1>(s, b, b_row, y, count),
            };
        }
    }
}

/// `C` rows onto `y`, one after the other in each element, whatever the block. Returns `C`.
#[inline(always)]
unsafe fn axpy_block<V: Lanes, E: Number, const C: usize>(
    s: *const f32,
    b: *const E,
    b_row: usize,
    y: *mut f32,
    count: usize,
) -> usize {
    // SAFETY: promised by the caller.
    unsafe {
        let mut factors = [V::splat(0.0); C];
        for c in 0..C {
            factors[c] = V::splat(*s.add(c));
        }
        let whole = count / LANES * LANES;
        let mut at = 0;
        while at < whole {
            let mut sum = V::load(y.add(at));
            for c in 0..C {
                sum = factors[c].fma(E::load(b.add(c * b_row + at)), sum);
                ask_for(b.wrapping_add((C + c) * b_row + at));
            }
            sum.store(y.add(at));
            at += LANES;
        }
        if whole < count {
            let n = count - whole;
            let mut sum = V::load_n(y.add(whole), n, 0.0);
            for c in 0..C {
                sum = factors[c].fma(E::load_part(b.add(c * b_row + whole), n), sum);
            }
            sum.store_n(y.add(whole), n);
        }
        C
    }
}
