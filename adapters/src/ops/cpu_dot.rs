//! The inner loop of products with block weights: signed bytes of rows against a panel's cells.
//!
//! For each row, output and block, the sum over 32 inputs is a whole number, exact on every path; then
//! `acc = fma(sum, weight_scale * row_scale, acc)`, and for Q4_1 `acc = fma(minimum, row_scale * sum_of_codes, acc)`, blocks ascending, one chain an output.
//! So the bits depend on the row and the weights only: not on neighbours, threads or instruction set. Layout of cells: `cpu_blocks`.
//!
//! AVX-512 uses VNNI (unsigned bytes times signed bytes, four at a time, added in 32 bits). Byte codes carry 128 more than they stand for; the sums start
//! at `-128 * sum_of_codes`, which takes it out again. It must not know what the numbers mean.

#![allow(
    unsafe_code,
    reason = "vector instructions and strided tiles need pointers"
)]
#![allow(
    clippy::needless_range_loop,
    reason = "accumulators of a block are indexed by row and column, as the sum is written"
)]

use half::f16;

use super::cpu_blocks::{cell_bytes, code_bytes};
use super::cpu_rounded_rows::RowsView;
use super::cpu_tile::{Isa, PANEL};
use super::weight::{BLOCK, WeightKind};

/// Operands of one tile: some rows by one panel.
#[derive(Clone, Copy)]
pub(super) struct DotTile {
    /// Format of the cells.
    pub(super) kind: WeightKind,
    /// The panel's first cell.
    pub(super) cells: *const u8,
    /// The rows, from the tile's first one on.
    pub(super) x: RowsView,
    /// Outputs `y[i * y_row + j]`.
    pub(super) y: *mut f32,
    /// Distance between two rows of `y`.
    pub(super) y_row: usize,
    /// Rows, any number.
    pub(super) rows: usize,
    /// Columns, 1 to 32.
    pub(super) cols: usize,
}

/// What the unsigned codes carry more than they stand for.
const fn excess(kind: WeightKind) -> i32 {
    match kind {
        WeightKind::Q8_0 => 128,
        WeightKind::Q4_0 => 8,
        _ => 0,
    }
}

impl DotTile {
    /// Computes the tile; any number of rows is cut into blocks of nearly equal height.
    ///
    /// # Safety
    /// The panel has `x.blocks` cells, the rows exist in `x`, all elements of `y` that the sizes name are inside a live allocation that no other thread
    /// touches there, and the machine has `isa`.
    pub(super) unsafe fn run(&self, isa: Isa) {
        let isa = dot_isa(isa);
        let tallest = match isa {
            Isa::Avx512 => 6,
            Isa::Avx2 => 2,
            Isa::Portable => 1,
        };
        let blocks = self.rows.div_ceil(tallest).max(1);
        let (height, taller) = (self.rows / blocks, self.rows % blocks);
        let mut row = 0;
        for b in 0..blocks {
            let rows = height + usize::from(b < taller);
            // SAFETY: the block's rows are rows of this tile, so the caller's promise covers them.
            unsafe {
                let block = DotTile {
                    x: self.x.at_row(row),
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

/// The path that this machine has for byte products: AVX-512 without VNNI takes the one of AVX2.
fn dot_isa(isa: Isa) -> Isa {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 && !is_x86_feature_detected!("avx512vnni") {
        return Isa::Avx2;
    }
    isa
}

/// The sums in plain Rust.
unsafe fn portable(t: &DotTile) {
    let cell_len = cell_bytes(t.kind);
    for r in 0..t.rows {
        let mut acc = [0.0_f32; PANEL];
        for b in 0..t.x.blocks {
            // SAFETY: the caller promised the panel's cells and the rows.
            let (cell, codes, scale, sum) = unsafe {
                let at = r * t.x.blocks + b;
                (
                    std::slice::from_raw_parts(t.cells.add(b * cell_len), cell_len),
                    std::slice::from_raw_parts(t.x.codes.add(at * BLOCK), BLOCK),
                    *t.x.scales.add(at),
                    *t.x.sums.add(at),
                )
            };
            for (output, acc) in acc.iter_mut().enumerate() {
                let mut dot = -excess(t.kind) * sum;
                for (i, code) in codes.iter().enumerate() {
                    dot += i32::from(*code) * unsigned(t.kind, cell, output, i);
                }
                let half = |i: usize| {
                    let at = code_bytes(t.kind) + (i * PANEL + output) * 2;
                    f16::from_le_bytes([cell[at], cell[at + 1]]).to_f32()
                };
                *acc = (dot as f32).mul_add(half(0) * scale, *acc);
                if t.kind == WeightKind::Q4_1 {
                    *acc = half(1).mul_add(scale * sum as f32, *acc);
                }
            }
        }
        for (c, acc) in acc.iter().enumerate().take(t.cols) {
            // SAFETY: the caller promised the tile's outputs.
            unsafe { *t.y.add(r * t.y_row + c) = *acc };
        }
    }
}

/// The unsigned code of input `i` of an output.
fn unsigned(kind: WeightKind, cell: &[u8], output: usize, i: usize) -> i32 {
    let byte = |i: usize| cell[(i / 4 * PANEL + output) * 4 + i % 4];
    i32::from(match kind {
        WeightKind::Q8_0 => byte(i),
        _ if i < 16 => byte(i) & 15,
        _ => byte(i - 16) >> 4,
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The same tile with vectors: four bytes of a row broadcast against four bytes of 16 (or 8) outputs.

    use super::{DotTile, cell_bytes, code_bytes, excess};
    use crate::ops::weight::{BLOCK, WeightKind};
    use std::arch::x86_64::*;

    const Q8: u8 = 0;
    const Q4: u8 = 1;
    const Q4_MIN: u8 = 2;

    /// How far ahead cells are prefetched, in bytes.
    const AHEAD: usize = 4096;

    const fn kind_of(kind: u8) -> WeightKind {
        match kind {
            Q8 => WeightKind::Q8_0,
            Q4 => WeightKind::Q4_0,
            _ => WeightKind::Q4_1,
        }
    }

    /// Calls a tile function with its format and row count as constants.
    macro_rules! with_rows {
        ($t:expr, $f:ident, [$($r:literal)*]) => {
            match ($t.kind, $t.rows) {
                $((WeightKind::Q8_0, $r) => $f::<Q8, $r>($t),
                  (WeightKind::Q4_0, $r) => $f::<Q4, $r>($t),
                  (WeightKind::Q4_1, $r) => $f::<Q4_MIN, $r>($t),)*
                (_, 0) => {}
                _ => unreachable!("rows are cut before, and only blocks come here"),
            }
        };
    }

    /// # Safety
    /// As `DotTile::run`, with at most 6 rows, AVX-512 and VNNI present.
    pub(super) unsafe fn avx512(t: &DotTile) {
        // SAFETY: promised by the caller.
        unsafe { with_rows!(t, block512, [1 2 3 4 5 6]) }
    }

    /// Four code bytes of each of 16 outputs, unsigned: group `g` of 8, half `n` of the panel.
    #[inline(always)]
    unsafe fn codes512<const KIND: u8>(cell: *const u8, g: usize, n: usize) -> __m512i {
        // SAFETY: the cell's codes are the caller's promise, and so is the instruction set.
        unsafe {
            if KIND == Q8 {
                return _mm512_loadu_si512(cell.add(g * 128 + n * 64).cast());
            }
            let bytes = _mm512_loadu_si512(cell.add(g % 4 * 128 + n * 64).cast());
            let bytes = if g < 4 {
                bytes
            } else {
                _mm512_srli_epi16::<4>(bytes)
            };
            _mm512_and_si512(bytes, _mm512_set1_epi8(15))
        }
    }

    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn block512<const KIND: u8, const R: usize>(t: &DotTile) {
        // SAFETY: masked stores touch only the tile's own columns; everything else is promised by the caller of `DotTile::run`.
        unsafe {
            let kind = const { kind_of(KIND) };
            let blocks = t.x.blocks;
            let mut acc = [[_mm512_setzero_ps(); 2]; R];
            let mut cell = t.cells;
            for b in 0..blocks {
                let mut line = 0;
                while line < cell_bytes(kind) {
                    _mm_prefetch::<_MM_HINT_T0>(cell.wrapping_add(AHEAD + line).cast());
                    line += 64;
                }
                let mut dot = [[_mm512_setzero_si512(); 2]; R];
                if excess(kind) != 0 {
                    for r in 0..R {
                        let start = -excess(kind) * *t.x.sums.add(r * blocks + b);
                        dot[r] = [_mm512_set1_epi32(start); 2];
                    }
                }
                for g in 0..8 {
                    let (low, high) = (codes512::<KIND>(cell, g, 0), codes512::<KIND>(cell, g, 1));
                    for r in 0..R {
                        let x = t.x.codes.add((r * blocks + b) * BLOCK + 4 * g);
                        let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
                        dot[r][0] = _mm512_dpbusd_epi32(dot[r][0], low, x);
                        dot[r][1] = _mm512_dpbusd_epi32(dot[r][1], high, x);
                    }
                }
                let halves = cell.add(code_bytes(kind)).cast::<__m256i>();
                let scales = [
                    _mm512_cvtph_ps(_mm256_loadu_si256(halves)),
                    _mm512_cvtph_ps(_mm256_loadu_si256(halves.add(1))),
                ];
                for r in 0..R {
                    let scale = _mm512_set1_ps(*t.x.scales.add(r * blocks + b));
                    for n in 0..2 {
                        let sum = _mm512_cvtepi32_ps(dot[r][n]);
                        let both = _mm512_mul_ps(scales[n], scale);
                        acc[r][n] = _mm512_fmadd_ps(sum, both, acc[r][n]);
                    }
                }
                if KIND == Q4_MIN {
                    let minima = [
                        _mm512_cvtph_ps(_mm256_loadu_si256(halves.add(2))),
                        _mm512_cvtph_ps(_mm256_loadu_si256(halves.add(3))),
                    ];
                    for r in 0..R {
                        let at = r * blocks + b;
                        let shift = _mm512_set1_ps(*t.x.scales.add(at) * *t.x.sums.add(at) as f32);
                        for n in 0..2 {
                            acc[r][n] = _mm512_fmadd_ps(minima[n], shift, acc[r][n]);
                        }
                    }
                }
                cell = cell.add(cell_bytes(kind));
            }
            for r in 0..R {
                for n in 0..2 {
                    let columns = t.cols.saturating_sub(16 * n).min(16);
                    let mask = ((1_u32 << columns) - 1) as u16;
                    _mm512_mask_storeu_ps(
                        t.y.add(r * t.y_row).wrapping_add(16 * n),
                        mask,
                        acc[r][n],
                    );
                }
            }
        }
    }

    /// # Safety
    /// As `DotTile::run`, with at most 2 rows, AVX2, FMA and F16C present.
    pub(super) unsafe fn avx2(t: &DotTile) {
        // SAFETY: promised by the caller.
        unsafe { with_rows!(t, block256, [1 2]) }
    }

    /// The sums over four inputs of 8 outputs, added to `dot`. Pairs of products fit 16 bits: 2 * 128 * 127 for bytes, whose signs are moved to the
    /// other side, 2 * 15 * 127 for nibbles.
    #[inline(always)]
    unsafe fn add256<const KIND: u8>(dot: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the instruction set is the caller's promise; no memory is touched.
        unsafe {
            let pairs = if KIND == Q8 {
                let signed = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
                _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x, signed))
            } else {
                _mm256_maddubs_epi16(codes, x)
            };
            _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    /// As `codes512`, for 8 outputs: quarter `n` of the panel.
    #[inline(always)]
    unsafe fn codes256<const KIND: u8>(cell: *const u8, g: usize, n: usize) -> __m256i {
        // SAFETY: the cell's codes are the caller's promise, and so is the instruction set.
        unsafe {
            if KIND == Q8 {
                return _mm256_loadu_si256(cell.add(g * 128 + n * 32).cast());
            }
            let bytes = _mm256_loadu_si256(cell.add(g % 4 * 128 + n * 32).cast());
            let bytes = if g < 4 {
                bytes
            } else {
                _mm256_srli_epi16::<4>(bytes)
            };
            _mm256_and_si256(bytes, _mm256_set1_epi8(15))
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn block256<const KIND: u8, const R: usize>(t: &DotTile) {
        // SAFETY: columns are copied from a whole panel's row; everything else is promised by the caller of `DotTile::run`.
        unsafe {
            let kind = const { kind_of(KIND) };
            let blocks = t.x.blocks;
            let mut rows = [[0.0_f32; 32]; R];
            for n in 0..4 {
                let mut acc = [_mm256_setzero_ps(); R];
                for b in 0..blocks {
                    let cell = t.cells.add(b * cell_bytes(kind));
                    let mut dot = [_mm256_setzero_si256(); R];
                    if KIND == Q4 {
                        for r in 0..R {
                            let start = -excess(kind) * *t.x.sums.add(r * blocks + b);
                            dot[r] = _mm256_set1_epi32(start);
                        }
                    }
                    for g in 0..8 {
                        let codes = codes256::<KIND>(cell, g, n);
                        for r in 0..R {
                            let x = t.x.codes.add((r * blocks + b) * BLOCK + 4 * g);
                            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
                            dot[r] = add256::<KIND>(dot[r], codes, x);
                        }
                    }
                    let halves = cell.add(code_bytes(kind)).cast::<__m128i>();
                    let scales = _mm256_cvtph_ps(_mm_loadu_si128(halves.add(n)));
                    for r in 0..R {
                        let at = r * blocks + b;
                        let both = _mm256_mul_ps(scales, _mm256_set1_ps(*t.x.scales.add(at)));
                        acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[r]), both, acc[r]);
                        if KIND == Q4_MIN {
                            let minima = _mm256_cvtph_ps(_mm_loadu_si128(halves.add(4 + n)));
                            let shift = *t.x.scales.add(at) * *t.x.sums.add(at) as f32;
                            acc[r] = _mm256_fmadd_ps(minima, _mm256_set1_ps(shift), acc[r]);
                        }
                    }
                }
                for r in 0..R {
                    _mm256_storeu_ps(rows[r].as_mut_ptr().add(8 * n), acc[r]);
                }
            }
            for r in 0..R {
                std::ptr::copy_nonoverlapping(rows[r].as_ptr(), t.y.add(r * t.y_row), t.cols);
            }
        }
    }
}
