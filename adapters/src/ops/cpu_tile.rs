//! The one inner loop of the CPU path: a tile of outputs `y[i, j] = start + sum_k x(i, k) * w[k, j]`, up to 12 rows by 32 columns.
//!
//! Every dense product (base weights, their transposes, thin LoRA factors, attention) is cut into such tiles. Each output element has one accumulator and one
//! chain of fused multiply-adds with `k` ascending, so its bits depend on its own operands only: not on the number of rows, on the neighbours in the tile, on
//! threads, or on the instruction set. This file must not know what the numbers mean.

#![allow(
    unsafe_code,
    reason = "vector instructions and strided tiles need pointers"
)]
#![allow(
    clippy::needless_range_loop,
    reason = "accumulators of a block are indexed by row and column, as the sum is written"
)]

use std::sync::OnceLock;

use super::cpu_stored::Stored;

/// Outputs in one packed panel of weights, and the widest tile.
pub(super) const PANEL: usize = 32;

/// Columns of half a tile, and how far apart its halves are in a row of adjacent columns.
pub(super) const HALF: isize = 16;

/// How many steps of `k` ahead the weights are prefetched: 2 KiB of a packed panel, which covers the latency of main memory.
const fn ahead<W>() -> usize {
    2048 / PANEL / size_of::<W>()
}

/// An instruction set that the inner loops were compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    /// 512-bit vectors.
    Avx512,
    /// 256-bit vectors with fused multiply-add and half-precision conversion.
    Avx2,
    /// Plain Rust on `f32::mul_add`.
    Portable,
}

impl Isa {
    /// The best instruction set of this machine, detected once.
    pub(super) fn detected() -> Self {
        static FOUND: OnceLock<Isa> = OnceLock::new();
        *FOUND.get_or_init(|| Isa::available().first().copied().unwrap_or(Isa::Portable))
    }

    /// Every instruction set that this machine can run, best first.
    pub(super) fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
            {
                found.push(Isa::Avx512);
            }
            if avx2 {
                found.push(Isa::Avx2);
            }
        }
        found.push(Isa::Portable);
        found
    }
}

/// A pointer to outputs that several threads write at disjoint places.
#[derive(Clone, Copy)]
pub(super) struct Out(pub(super) *mut f32);

// SAFETY: the pointer is only ever used to write elements that the sending code gave to one task alone.
unsafe impl Send for Out {}
// SAFETY: as above; tasks share the base pointer, never an element.
unsafe impl Sync for Out {}

impl Out {
    /// The pointer moved by `n` elements; a method so that closures capture the whole wrapper.
    ///
    /// # Safety
    /// `n` stays inside the allocation.
    pub(super) unsafe fn at(self, n: usize) -> *mut f32 {
        // SAFETY: promised by the caller.
        unsafe { self.0.add(n) }
    }
}

/// Operands of one tile. `x(i, k)` is `x[i * x_row + k * x_k]`; one of the two strides is 1. `w` is widened to f32 as it is read.
#[derive(Clone, Copy)]
pub(super) struct Tile<W = f32> {
    /// Left operand: the broadcast side.
    pub(super) x: *const f32,
    /// Distance between two rows of `x`.
    pub(super) x_row: usize,
    /// Distance between two steps of `k` in `x`.
    pub(super) x_k: usize,
    /// Right operand: `w[k * w_k + j]`, the vector side.
    pub(super) w: *const W,
    /// Distance between two steps of `k` in `w`.
    pub(super) w_k: usize,
    /// Where column 16 lies behind column 0: [`HALF`] where columns are adjacent, anything where the halves come from two places.
    pub(super) w_half: isize,
    /// Length of the sums.
    pub(super) k: usize,
    /// Outputs `y[i * y_row + j]`.
    pub(super) y: *mut f32,
    /// Distance between two rows of `y`.
    pub(super) y_row: usize,
    /// Rows, any number.
    pub(super) rows: usize,
    /// Columns, 1 to 32.
    pub(super) cols: usize,
    /// Whether the chains start from `y` or from zero.
    pub(super) accumulate: bool,
}

impl<W: Stored> Tile<W> {
    /// Computes the tile; any number of rows is cut into blocks of nearly equal height.
    ///
    /// # Safety
    /// All elements named by the strides and sizes are inside live allocations, `y` does not overlap `x` or `w`, no other thread touches those elements of
    /// `y`, one of `x_row` and `x_k` is 1, and the machine has `isa`.
    pub(super) unsafe fn run(&self, isa: Isa) {
        if self.rows == 0 {
            return;
        }
        let tallest = match isa {
            Isa::Avx512 => 12,
            Isa::Avx2 => 6,
            Isa::Portable => 4,
        };
        let blocks = self.rows.div_ceil(tallest);
        let (height, taller) = (self.rows / blocks, self.rows % blocks);
        let mut row = 0;
        for b in 0..blocks {
            let rows = height + usize::from(b < taller);
            // SAFETY: the block's rows are rows of this tile, so the caller's promise covers them.
            unsafe {
                let block = Tile {
                    x: self.x.add(row * self.x_row),
                    y: self.y.add(row * self.y_row),
                    rows,
                    ..*self
                };
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => x86::avx512(&block),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => x86::avx2(&block),
                    _ => portable(&block),
                }
            }
            row += rows;
        }
    }
}

/// The tile in plain Rust: the same chains in the same order.
unsafe fn portable<W: Stored>(t: &Tile<W>) {
    for i in 0..t.rows {
        let mut acc = [0.0_f32; PANEL];
        let acc = &mut acc[..t.cols];
        // SAFETY: the caller of `Tile::run` promised the bounds of x, w and y.
        unsafe {
            let y = std::slice::from_raw_parts_mut(t.y.add(i * t.y_row), t.cols);
            if t.accumulate {
                acc.copy_from_slice(y);
            }
            for k in 0..t.k {
                let x = *t.x.add(i * t.x_row + k * t.x_k);
                for (half, acc) in acc.chunks_mut(HALF as usize).enumerate() {
                    let w = t.w.add(k * t.w_k).wrapping_offset(half as isize * t.w_half);
                    let w = std::slice::from_raw_parts(w, acc.len());
                    for (a, w) in acc.iter_mut().zip(w) {
                        *a = x.mul_add(w.widen(), *a);
                    }
                }
            }
            y.copy_from_slice(acc);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The same tile with vectors; broadcasts of `x` against vectors of `w`.

    use super::{Tile, ahead};
    use crate::ops::cpu_stored::Stored;
    use std::arch::x86_64::*;

    /// Calls a tile function with its row count as a constant, so that the accumulators live in registers.
    macro_rules! with_rows {
        ($t:expr, $f:ident, $n:literal, $by_k:literal, [$($r:literal)*]) => {
            match $t.rows {
                $($r => $f::<_, $r, $n, $by_k>($t),)*
                _ => unreachable!("rows are cut before"),
            }
        };
    }

    /// # Safety
    /// As `Tile::run`, with at most 12 rows and AVX-512F present.
    pub(super) unsafe fn avx512<W: Stored>(t: &Tile<W>) {
        // SAFETY: promised by the caller.
        unsafe {
            match (t.cols > 16, t.x_k == 1) {
                (true, true) => with_rows!(t, block512, 2, false, [1 2 3 4 5 6 7 8 9 10 11 12]),
                (true, false) => with_rows!(t, block512, 2, true, [1 2 3 4 5 6 7 8 9 10 11 12]),
                (false, true) => with_rows!(t, block512, 1, false, [1 2 3 4 5 6 7 8 9 10 11 12]),
                (false, false) => with_rows!(t, block512, 1, true, [1 2 3 4 5 6 7 8 9 10 11 12]),
            }
        }
    }

    /// `R` rows by `N` vectors. `BY_K` says that `x` is stored with its rows adjacent.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")]
    unsafe fn block512<W: Stored, const R: usize, const N: usize, const BY_K: bool>(t: &Tile<W>) {
        // SAFETY: masked loads and stores touch only the tile's own columns; everything else is promised by the caller of `Tile::run`.
        unsafe {
            let mut mask = [0_u16; N];
            for (n, m) in mask.iter_mut().enumerate() {
                let columns = t.cols.saturating_sub(16 * n).min(16);
                *m = ((1_u32 << columns) - 1) as u16;
            }
            let mut acc = [[_mm512_setzero_ps(); N]; R];
            if t.accumulate {
                for r in 0..R {
                    for n in 0..N {
                        acc[r][n] = _mm512_maskz_loadu_ps(mask[n], t.y.add(r * t.y_row + 16 * n));
                    }
                }
            }
            let (x_row, x_k) = if BY_K { (1, t.x_k) } else { (t.x_row, 1) };
            let (mut x, mut w) = (t.x, t.w);
            for _ in 0..t.k {
                let mut b = [_mm512_setzero_ps(); N];
                for n in 0..N {
                    let w = w.wrapping_offset(n as isize * t.w_half);
                    b[n] = W::load16(w, mask[n]);
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(ahead::<W>() * t.w_k).cast());
                }
                for r in 0..R {
                    let a = _mm512_set1_ps(*x.add(r * x_row));
                    for n in 0..N {
                        acc[r][n] = _mm512_fmadd_ps(a, b[n], acc[r][n]);
                    }
                }
                x = x.wrapping_add(x_k);
                w = w.wrapping_add(t.w_k);
            }
            for r in 0..R {
                for n in 0..N {
                    _mm512_mask_storeu_ps(t.y.add(r * t.y_row + 16 * n), mask[n], acc[r][n]);
                }
            }
        }
    }

    /// # Safety
    /// As `Tile::run`, with at most 6 rows, AVX2 and FMA present.
    pub(super) unsafe fn avx2<W: Stored>(t: &Tile<W>) {
        // 32 columns would need 24 accumulators; the registers hold 12, so the tile is done in halves.
        for first in (0..t.cols).step_by(16) {
            // SAFETY: a half's columns are columns of the tile; the rest is promised by the caller.
            unsafe {
                let half = Tile {
                    w: t.w.wrapping_offset((first / 16) as isize * t.w_half),
                    y: t.y.add(first),
                    cols: (t.cols - first).min(16),
                    ..*t
                };
                let h = &half;
                match (h.cols > 8, h.x_k == 1) {
                    (true, true) => with_rows!(h, block256, 2, false, [1 2 3 4 5 6]),
                    (true, false) => with_rows!(h, block256, 2, true, [1 2 3 4 5 6]),
                    (false, true) => with_rows!(h, block256, 1, false, [1 2 3 4 5 6]),
                    (false, false) => with_rows!(h, block256, 1, true, [1 2 3 4 5 6]),
                }
            }
        }
    }

    /// `R` rows by `N` vectors of 8. `BY_K` says that `x` is stored with its rows adjacent.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn block256<W: Stored, const R: usize, const N: usize, const BY_K: bool>(t: &Tile<W>) {
        // SAFETY: masked loads and stores touch only the tile's own columns; everything else is promised by the caller of `Tile::run`.
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let mut mask = [_mm256_setzero_si256(); N];
            for (n, m) in mask.iter_mut().enumerate() {
                let columns = t.cols.saturating_sub(8 * n).min(8) as i32;
                *m = _mm256_cmpgt_epi32(_mm256_set1_epi32(columns), lanes);
            }
            let mut acc = [[_mm256_setzero_ps(); N]; R];
            if t.accumulate {
                for r in 0..R {
                    for n in 0..N {
                        acc[r][n] = _mm256_maskload_ps(t.y.add(r * t.y_row + 8 * n), mask[n]);
                    }
                }
            }
            let whole = t.cols == 8 * N;
            let (x_row, x_k) = if BY_K { (1, t.x_k) } else { (t.x_row, 1) };
            let (mut x, mut w) = (t.x, t.w);
            for _ in 0..t.k {
                let mut b = [_mm256_setzero_ps(); N];
                for n in 0..N {
                    b[n] = if whole {
                        W::load8(w.wrapping_add(8 * n))
                    } else {
                        let columns = t.cols.saturating_sub(8 * n).min(8);
                        W::load8_part(w.wrapping_add(8 * n), columns)
                    };
                }
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(ahead::<W>() * t.w_k).cast());
                for r in 0..R {
                    let a = _mm256_set1_ps(*x.add(r * x_row));
                    for n in 0..N {
                        acc[r][n] = _mm256_fmadd_ps(a, b[n], acc[r][n]);
                    }
                }
                x = x.wrapping_add(x_k);
                w = w.wrapping_add(t.w_k);
            }
            for r in 0..R {
                for n in 0..N {
                    _mm256_maskstore_ps(t.y.add(r * t.y_row + 8 * n), mask[n], acc[r][n]);
                }
            }
        }
    }
}
