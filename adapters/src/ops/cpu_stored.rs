//! Numbers as they are stored, widened in registers on their way into f32 arithmetic.
//!
//! bf16 is the upper half of an f32 and widens by a shift; f16 by the machine's conversion. Both are exact, so a product with a
//! stored weight has the bits of a product with its f32 copy. It must not know what the numbers are used for.

#![allow(unsafe_code, reason = "vector instructions")]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::fmt::Debug;

use half::{bf16, f16};

use super::cpu_buffer::Plain;

/// A number that widens to f32 exactly.
pub(super) trait Stored: Plain + Debug + Send + Sync {
    /// The number in f32.
    fn widen(self) -> f32;

    /// Numbers in f32: as they lie where they are f32, else written to `spare`, which is as long.
    fn widened<'a>(numbers: &'a [Self], spare: &'a mut [f32]) -> &'a [f32];

    /// Sixteen numbers from `p` where `mask` is set, zero elsewhere.
    ///
    /// # Safety
    /// AVX-512 F, BW and VL; `p` is readable where `mask` is set.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load16(p: *const Self, mask: __mmask16) -> __m512;

    /// Eight numbers from `p`.
    ///
    /// # Safety
    /// AVX2 and F16C; eight readable numbers.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(p: *const Self) -> __m256;

    /// The first `n` of eight numbers from `p`, zero elsewhere.
    ///
    /// # Safety
    /// AVX2 and F16C; `n` readable numbers, at most 8.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8_part(p: *const Self, n: usize) -> __m256 {
        // SAFETY: `n` readable numbers are the caller's promise; the copy has eight.
        unsafe {
            let mut part = [Self::ZERO; 8];
            std::ptr::copy_nonoverlapping(p, part.as_mut_ptr(), n);
            Self::load8(part.as_ptr())
        }
    }
}

impl Stored for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    fn widened<'a>(numbers: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        numbers
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load16(p: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { _mm512_maskz_loadu_ps(mask, p) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(p: *const Self) -> __m256 {
        // SAFETY: promised by the caller.
        unsafe { _mm256_loadu_ps(p) }
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn widened<'a>(numbers: &'a [Self], spare: &'a mut [f32]) -> &'a [f32] {
        let spare = &mut spare[..numbers.len()];
        for (wide, x) in spare.iter_mut().zip(numbers) {
            *wide = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
        spare
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load16(p: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe {
            let upper = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(upper))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(p: *const Self) -> __m256 {
        // SAFETY: promised by the caller.
        unsafe {
            let upper = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(upper))
        }
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn widened<'a>(numbers: &'a [Self], spare: &'a mut [f32]) -> &'a [f32] {
        let spare = &mut spare[..numbers.len()];
        for (wide, x) in spare.iter_mut().zip(numbers) {
            *wide = x.to_f32();
        }
        spare
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load16(p: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p.cast())) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(p: *const Self) -> __m256 {
        // SAFETY: promised by the caller.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
}
