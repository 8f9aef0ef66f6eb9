//! Sixteen numbers at a time, the same bits on every instruction set.
//!
//! Norms, activations, softmax and dot products are written once over [`Lanes`] and compiled for each instruction set. Every method is the same IEEE
//! operation lane by lane, and [`Lanes::sum`] adds halves onto halves, so a result never tells which path computed it. It must not know what is computed.

#![allow(unsafe_code, reason = "vector instructions")]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::{bf16, f16};

/// Numbers in one vector, on every path.
pub(super) const LANES: usize = 16;

/// 1.5 * 2^23: adding it leaves the nearest integer in the low bits of a number below 2^22.
const ROUNDER: f32 = 12_582_912.0;

/// A vector of sixteen numbers.
///
/// # Safety
/// Every method needs the instruction set of its implementation, and pointers that are valid for the lanes that it touches.
pub(super) trait Lanes: Copy {
    /// `x` in every lane.
    unsafe fn splat(x: f32) -> Self;
    /// Sixteen numbers from `p`.
    unsafe fn load(p: *const f32) -> Self;
    /// The first `n` lanes from `p`, the others `fill`.
    unsafe fn load_part(p: *const f32, n: usize, fill: f32) -> Self;
    /// Sixteen numbers from `p`, widened exactly.
    unsafe fn load_bf16(p: *const bf16) -> Self;
    /// Sixteen numbers from `p`, widened exactly.
    unsafe fn load_f16(p: *const f16) -> Self;
    /// Sixteen numbers to `p`.
    unsafe fn store(self, p: *mut f32);
    /// The first `n` lanes to `p`.
    unsafe fn store_part(self, p: *mut f32, n: usize);
    /// As `load_part`, faster for a whole vector.
    #[inline(always)]
    unsafe fn load_n(p: *const f32, n: usize, fill: f32) -> Self {
        // SAFETY: promised by the caller.
        unsafe {
            if n == LANES {
                Self::load(p)
            } else {
                Self::load_part(p, n, fill)
            }
        }
    }
    /// As `store_part`, faster for a whole vector.
    #[inline(always)]
    unsafe fn store_n(self, p: *mut f32, n: usize) {
        // SAFETY: promised by the caller.
        unsafe {
            if n == LANES {
                self.store(p)
            } else {
                self.store_part(p, n)
            }
        }
    }
    /// Lanewise sum.
    unsafe fn add(self, other: Self) -> Self;
    /// Lanewise difference.
    unsafe fn sub(self, other: Self) -> Self;
    /// Lanewise product.
    unsafe fn mul(self, other: Self) -> Self;
    /// Lanewise quotient.
    unsafe fn div(self, other: Self) -> Self;
    /// `self * factor + addend`, rounded once.
    unsafe fn fma(self, factor: Self, addend: Self) -> Self;
    /// The larger one; `other` where one of them is not a number.
    unsafe fn max(self, other: Self) -> Self;
    /// `yes` where `self < limit`, else `no`.
    unsafe fn below(self, limit: Self, yes: Self, no: Self) -> Self;
    /// `2^n` where the lane holds `n + 1.5 * 2^23`, for `n` from -126 to 127.
    unsafe fn power_of_two(self) -> Self;
    /// Lanes 8..16 onto 0..8, then 4..8 onto 0..4, and so on.
    unsafe fn sum(self) -> f32;
    /// The largest lane.
    unsafe fn largest(self) -> f32;

    /// `e` to the power of each lane: about 1 unit in the last place (2e-7 relative at most), 0 below -86.6, infinity above 88.7.
    ///
    /// The usual reduction: `x = n ln 2 + r` with `|r| <= ln(2) / 2`, a polynomial in `r`, times `2^n`. Coefficients as in Cephes' `expf`.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the instruction set is the caller's promise; no memory is touched.
        unsafe {
            let rounder = Self::splat(ROUNDER);
            let t = self.fma(Self::splat(std::f32::consts::LOG2_E), rounder);
            let n = t.sub(rounder);
            let r = n.fma(Self::splat(-355.0 / 512.0), self);
            let r = n.fma(Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.987_569_1e-4);
            for c in [
                1.398_199_9e-3,
                8.333_452e-3,
                4.166_579_6e-2,
                1.666_666_5e-1,
                0.5,
            ] {
                p = p.fma(r, Self::splat(c));
            }
            let p = p.fma(r.mul(r), r).add(Self::splat(1.0));
            // Half of the power and then twice the product, so that n = 128 overflows only where the result does.
            let power = t.sub(Self::splat(1.0)).power_of_two();
            let whole = p.mul(power).mul(Self::splat(2.0));
            let large = Self::splat(88.722_83).below(self, Self::splat(f32::INFINITY), whole);
            self.below(Self::splat(-86.6), Self::splat(0.0), large)
        }
    }
}

/// Plain Rust, for machines without AVX2 and as the definition of the others.
impl Lanes for [f32; LANES] {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller promises sixteen readable numbers.
        unsafe { p.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize, fill: f32) -> Self {
        // SAFETY: the caller promises `n` readable numbers.
        std::array::from_fn(|i| if i < n { unsafe { *p.add(i) } } else { fill })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        // SAFETY: the caller promises sixteen readable numbers.
        std::array::from_fn(|i| unsafe { *p.add(i) }.to_f32())
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // SAFETY: the caller promises sixteen readable numbers.
        std::array::from_fn(|i| unsafe { *p.add(i) }.to_f32())
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller promises sixteen writable numbers.
        unsafe { p.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        for (i, x) in self.iter().enumerate().take(n) {
            // SAFETY: the caller promises `n` writable numbers.
            unsafe { *p.add(i) = *x }
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] + other[i])
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] - other[i])
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] * other[i])
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] / other[i])
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        std::array::from_fn(|i| self[i].mul_add(factor[i], addend[i]))
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        std::array::from_fn(|i| {
            if self[i] > other[i] {
                self[i]
            } else {
                other[i]
            }
        })
    }
    #[inline(always)]
    unsafe fn below(self, limit: Self, yes: Self, no: Self) -> Self {
        std::array::from_fn(|i| if self[i] < limit[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        self.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(0x3F80_0000)))
    }
    #[inline(always)]
    unsafe fn sum(mut self) -> f32 {
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                self[i] += self[i + width];
            }
        }
        self[0]
    }
    #[inline(always)]
    unsafe fn largest(mut self) -> f32 {
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                if self[i + width] >= self[i] {
                    self[i] = self[i + width];
                }
            }
        }
        self[0]
    }
}

/// The sum of four lanes: 2 and 3 onto 0 and 1, then 1 onto 0.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn sum4(x: __m128) -> f32 {
    // SAFETY: SSE is part of x86-64.
    unsafe {
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
    }
}

/// The largest of four lanes.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn largest4(x: __m128) -> f32 {
    // SAFETY: SSE is part of x86-64.
    unsafe {
        let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps::<1>(x, x)))
    }
}

/// One register of AVX-512.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Wide(__m512);

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn mask16(n: usize) -> __mmask16 {
    ((1_u32 << n.min(LANES)) - 1) as __mmask16
}

// SAFETY (for every block below): the trait's contract gives AVX-512 F and DQ and valid pointers; masked accesses touch the first `n` lanes only.
#[cfg(target_arch = "x86_64")]
impl Lanes for Wide {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Wide(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see above.
        Wide(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize, fill: f32) -> Self {
        // SAFETY: see above.
        Wide(unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask16(n), p) })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        // SAFETY: see above.
        Wide(unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // SAFETY: see above.
        Wide(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        // SAFETY: see above.
        unsafe { _mm512_mask_storeu_ps(p, mask16(n), self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see above.
        Wide(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: see above.
        Wide(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see above.
        Wide(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: see above.
        Wide(unsafe { _mm512_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        // SAFETY: see above.
        Wide(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: see above.
        Wide(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn below(self, limit: Self, yes: Self, no: Self) -> Self {
        // SAFETY: see above.
        Wide(unsafe {
            let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, limit.0);
            _mm512_mask_blend_ps(below, no.0, yes.0)
        })
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // SAFETY: see above.
        Wide(unsafe {
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
            _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(0x3F80_0000)))
        })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let x = _mm256_add_ps(
                _mm512_castps512_ps256(self.0),
                _mm512_extractf32x8_ps::<1>(self.0),
            );
            sum4(_mm_add_ps(
                _mm256_castps256_ps128(x),
                _mm256_extractf128_ps::<1>(x),
            ))
        }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let x = _mm256_max_ps(
                _mm512_castps512_ps256(self.0),
                _mm512_extractf32x8_ps::<1>(self.0),
            );
            largest4(_mm_max_ps(
                _mm256_castps256_ps128(x),
                _mm256_extractf128_ps::<1>(x),
            ))
        }
    }
}

/// Two registers of AVX2.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Pair(__m256, __m256);

#[cfg(target_arch = "x86_64")]
impl Pair {
    #[inline(always)]
    unsafe fn masks(n: usize) -> (__m256i, __m256i) {
        // SAFETY: the contract of `Lanes` gives AVX2.
        unsafe {
            let n = _mm256_set1_epi32(n.min(LANES) as i32);
            (
                _mm256_cmpgt_epi32(n, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
                _mm256_cmpgt_epi32(n, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)),
            )
        }
    }
}

// SAFETY (for every block below): the trait's contract gives AVX2, FMA, F16C and valid pointers; masked accesses touch the first `n` lanes only.
#[cfg(target_arch = "x86_64")]
impl Lanes for Pair {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see above.
        unsafe { Pair(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see above.
        unsafe { Pair(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize, fill: f32) -> Self {
        // SAFETY: see above.
        unsafe {
            let (low, high) = Self::masks(n);
            let fill = _mm256_set1_ps(fill);
            Pair(
                _mm256_blendv_ps(fill, _mm256_maskload_ps(p, low), _mm256_castsi256_ps(low)),
                _mm256_blendv_ps(
                    fill,
                    _mm256_maskload_ps(p.wrapping_add(8), high),
                    _mm256_castsi256_ps(high),
                ),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        // SAFETY: see above.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            Pair(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // SAFETY: see above; F16C is part of the path.
        unsafe {
            Pair(
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
            )
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        // SAFETY: see above.
        unsafe {
            let (low, high) = Self::masks(n);
            _mm256_maskstore_ps(p, low, self.0);
            _mm256_maskstore_ps(p.wrapping_add(8), high, self.1);
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            Pair(
                _mm256_add_ps(self.0, other.0),
                _mm256_add_ps(self.1, other.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            Pair(
                _mm256_sub_ps(self.0, other.0),
                _mm256_sub_ps(self.1, other.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            Pair(
                _mm256_mul_ps(self.0, other.0),
                _mm256_mul_ps(self.1, other.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            Pair(
                _mm256_div_ps(self.0, other.0),
                _mm256_div_ps(self.1, other.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            Pair(
                _mm256_fmadd_ps(self.0, factor.0, addend.0),
                _mm256_fmadd_ps(self.1, factor.1, addend.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            Pair(
                _mm256_max_ps(self.0, other.0),
                _mm256_max_ps(self.1, other.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn below(self, limit: Self, yes: Self, no: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            let low = _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, limit.0);
            let high = _mm256_cmp_ps::<_CMP_LT_OQ>(self.1, limit.1);
            Pair(
                _mm256_blendv_ps(no.0, yes.0, low),
                _mm256_blendv_ps(no.1, yes.1, high),
            )
        }
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let one = _mm256_set1_epi32(0x3F80_0000);
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(self.0));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(self.1));
            Pair(
                _mm256_castsi256_ps(_mm256_add_epi32(low, one)),
                _mm256_castsi256_ps(_mm256_add_epi32(high, one)),
            )
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let x = _mm256_add_ps(self.0, self.1);
            sum4(_mm_add_ps(
                _mm256_castps256_ps128(x),
                _mm256_extractf128_ps::<1>(x),
            ))
        }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let x = _mm256_max_ps(self.0, self.1);
            largest4(_mm_max_ps(
                _mm256_castps256_ps128(x),
                _mm256_extractf128_ps::<1>(x),
            ))
        }
    }
}

/// Compiles a body that is generic over [`Lanes`] for every instruction set and gives it one entry that takes the [`Isa`](super::cpu_tile::Isa) first.
macro_rules! per_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "operands of a kernel, and the instruction set")]
        $vis unsafe fn $name(isa: $crate::ops::cpu_tile::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the same contract as the entry.
                unsafe { $body::<$crate::ops::cpu_lanes::Wide>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the same contract as the entry.
                unsafe { $body::<$crate::ops::cpu_lanes::Pair>($($arg),*) }
            }
            // SAFETY: the caller promises that the machine has `isa`, and the operands that the body asks for.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::ops::cpu_tile::Isa::Avx512 => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::ops::cpu_tile::Isa::Avx2 => avx2($($arg),*),
                    _ => $body::<[f32; $crate::ops::cpu_lanes::LANES]>($($arg),*),
                }
            }
        }
    };
}
pub(super) use per_isa;
