//! Rows of activations as signed bytes, for products with block weights.
//!
//! Each row is cut in blocks of 32 numbers with one scale, symmetric: `x = scale * code`, codes from -127 to 127, rounded to the nearest even one. A row's
//! codes depend on the row alone, so the row rule holds for what is computed from them. It must not know which weight they meet.

#![allow(unsafe_code, reason = "vector instructions")]

use super::cpu_buffer::{Aligned, spread};
use super::cpu_tile::{Isa, Out};
use super::weight::BLOCK;

/// Rows as codes, with what a block kernel needs of each block.
#[derive(Debug, Default)]
pub(super) struct RoundedRows {
    codes: Aligned<i8>,
    scales: Aligned<f32>,
    sums: Aligned<i32>,
}

/// `rows` rows of `blocks` blocks.
#[derive(Clone, Copy)]
pub(super) struct RowsView {
    /// `[rows][blocks][32]`, zeros behind the row's end.
    pub(super) codes: *const i8,
    /// `[rows][blocks]`: what a code stands for; NaN where a number of the block is not finite.
    pub(super) scales: *const f32,
    /// `[rows][blocks]`: the sum of the codes.
    pub(super) sums: *const i32,
    /// Blocks of a row.
    pub(super) blocks: usize,
}

// SAFETY: the view is only read while the rows that it looks at are borrowed by the code that shares it.
unsafe impl Sync for RowsView {}

impl RowsView {
    /// The view from row `row` on.
    ///
    /// # Safety
    /// The row exists, or is the end.
    pub(super) unsafe fn at_row(self, row: usize) -> Self {
        // SAFETY: promised by the caller.
        unsafe {
            RowsView {
                codes: self.codes.add(row * self.blocks * BLOCK),
                scales: self.scales.add(row * self.blocks),
                sums: self.sums.add(row * self.blocks),
                blocks: self.blocks,
            }
        }
    }
}

/// Pointers of one row's outputs.
#[derive(Clone, Copy)]
struct Codes(*mut i8, *mut i32);

// SAFETY: each row's elements are written by one task.
unsafe impl Sync for Codes {}
// SAFETY: as above.
unsafe impl Send for Codes {}

impl Codes {
    fn get(self) -> Self {
        self
    }
}

impl RoundedRows {
    /// Rounds `x [rows, k]`.
    pub(super) fn round(&mut self, isa: Isa, x: &[f32], k: usize) -> RowsView {
        let blocks = k.div_ceil(BLOCK);
        let rows = x.len() / k.max(1);
        let codes = self.codes.first(rows * blocks * BLOCK).as_mut_ptr();
        let scales = Out(self.scales.first(rows * blocks).as_mut_ptr());
        let sums = self.sums.first(rows * blocks).as_mut_ptr();
        let others = Codes(codes, sums);
        // Rows of one task: few tasks, because a row takes a fraction of a microsecond.
        let tall = rows.div_ceil(8).max(1);
        spread(rows.div_ceil(tall), rows * k * 2, |task| {
            let Codes(codes, sums) = others.get();
            for row in task * tall..rows.min((task + 1) * tall) {
                // SAFETY: the buffers hold `rows` rows and this one belongs to this task alone; the machine has `isa`.
                unsafe {
                    round_row(
                        isa,
                        &x[row * k..(row + 1) * k],
                        codes.add(row * blocks * BLOCK),
                        scales.at(row * blocks),
                        sums.add(row * blocks),
                    );
                }
            }
        });
        RowsView {
            codes,
            scales: scales.0,
            sums,
            blocks,
        }
    }
}

/// Rounds one row.
///
/// # Safety
/// The pointers are valid for the row's blocks; the machine has `isa`.
unsafe fn round_row(isa: Isa, x: &[f32], codes: *mut i8, scales: *mut f32, sums: *mut i32) {
    for (b, block) in x.chunks(BLOCK).enumerate() {
        let mut padded = [0.0_f32; BLOCK];
        let block: *const f32 = if block.len() == BLOCK {
            block.as_ptr()
        } else {
            padded[..block.len()].copy_from_slice(block);
            padded.as_ptr()
        };
        // SAFETY: `block` is 32 numbers, and the outputs are promised by the caller.
        unsafe {
            let codes = codes.add(b * BLOCK);
            let (scale, sum) = match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => x86::avx512(block, codes),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => x86::avx2(block, codes),
                _ => portable(block, codes),
            };
            *scales.add(b) = scale;
            *sums.add(b) = sum;
        }
    }
}

/// Scale and factor from the bits of the largest magnitude. As whole numbers, the bits of magnitudes are in the order of their
/// values, with infinity and NaN above all: so nothing that is not finite is lost.
#[inline(always)]
fn scale_of(bits: u32) -> (f32, f32) {
    let largest = f32::from_bits(bits);
    if !largest.is_finite() {
        (f32::NAN, 0.0)
    } else if largest < 1e-30 {
        // Its reciprocal would overflow; nothing that a model computes is so small and matters.
        (0.0, 0.0)
    } else {
        (largest / 127.0, 127.0 / largest)
    }
}

/// The definition.
unsafe fn portable(x: *const f32, codes: *mut i8) -> (f32, i32) {
    // SAFETY: 32 numbers and 32 codes are promised by the caller.
    let (x, codes) = unsafe {
        (
            std::slice::from_raw_parts(x, BLOCK),
            std::slice::from_raw_parts_mut(codes, BLOCK),
        )
    };
    let bits = x
        .iter()
        .fold(0, |m: u32, x| m.max(x.to_bits() & 0x7FFF_FFFF));
    let (scale, factor) = scale_of(bits);
    let mut sum = 0;
    for (code, x) in codes.iter_mut().zip(x) {
        *code = if factor == 0.0 {
            0
        } else {
            (x * factor).round_ties_even() as i8
        };
        sum += i32::from(*code);
    }
    (scale, sum)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The same with vectors.

    use super::scale_of;
    use std::arch::x86_64::*;

    /// # Safety
    /// 32 numbers, 32 codes, AVX-512 F, BW and VL.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")]
    pub(super) unsafe fn avx512(x: *const f32, codes: *mut i8) -> (f32, i32) {
        // SAFETY: promised by the caller.
        unsafe {
            let (a, b) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16)));
            let mask = _mm512_set1_epi32(0x7FFF_FFFF);
            let bits = _mm512_max_epu32(
                _mm512_and_si512(_mm512_castps_si512(a), mask),
                _mm512_and_si512(_mm512_castps_si512(b), mask),
            );
            let (scale, factor) = scale_of(_mm512_reduce_max_epu32(bits));
            if factor == 0.0 {
                _mm256_storeu_si256(codes.cast(), _mm256_setzero_si256());
                return (scale, 0);
            }
            let factor = _mm512_set1_ps(factor);
            let a = _mm512_cvtps_epi32(_mm512_mul_ps(a, factor));
            let b = _mm512_cvtps_epi32(_mm512_mul_ps(b, factor));
            _mm_storeu_si128(codes.cast(), _mm512_cvtepi32_epi8(a));
            _mm_storeu_si128(codes.add(16).cast(), _mm512_cvtepi32_epi8(b));
            (scale, _mm512_reduce_add_epi32(_mm512_add_epi32(a, b)))
        }
    }

    /// # Safety
    /// 32 numbers, 32 codes, AVX2.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(x: *const f32, codes: *mut i8) -> (f32, i32) {
        // SAFETY: promised by the caller.
        unsafe {
            let mask = _mm256_set1_epi32(0x7FFF_FFFF);
            let mut bits = _mm256_setzero_si256();
            for i in 0..4 {
                let x = _mm256_castps_si256(_mm256_loadu_ps(x.add(8 * i)));
                bits = _mm256_max_epu32(bits, _mm256_and_si256(x, mask));
            }
            let mut lanes = [0_u32; 8];
            _mm256_storeu_si256(lanes.as_mut_ptr().cast(), bits);
            let (scale, factor) = scale_of(lanes.into_iter().fold(0, u32::max));
            if factor == 0.0 {
                _mm256_storeu_si256(codes.cast(), _mm256_setzero_si256());
                return (scale, 0);
            }
            let factor = _mm256_set1_ps(factor);
            let mut sum = 0;
            for i in 0..4 {
                let x = _mm256_mul_ps(_mm256_loadu_ps(x.add(8 * i)), factor);
                let mut lanes = [0_i32; 8];
                _mm256_storeu_si256(lanes.as_mut_ptr().cast(), _mm256_cvtps_epi32(x));
                for (j, lane) in lanes.into_iter().enumerate() {
                    *codes.add(8 * i + j) = lane as i8;
                    sum += lane;
                }
            }
            (scale, sum)
        }
    }
}
