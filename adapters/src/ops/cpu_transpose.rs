//! Transposes of small blocks: how weights become panels, panels become their transposes, and keys become panels of positions.
//!
//! Copies only, no arithmetic: every path gives the same bits by nature. It must not know whose numbers they are.

#![allow(unsafe_code, reason = "vector instructions")]

use super::cpu_tile::Isa;

/// Asks for the first 1,024 numbers of `ahead`, one block of a panel: the hardware does not look across the page to the next panel.
pub(super) fn prefetch<W>(ahead: &[W]) {
    #[cfg(target_arch = "x86_64")]
    for line in ahead[..ahead.len().min(1024)].chunks((64 / size_of::<W>()).max(1)) {
        // SAFETY: a prefetch reads nothing, and SSE is part of x86-64.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ahead;
}

/// `to[j * to_row + i] = from[i * from_row + j]` for `i < rows`, `j < cols`.
///
/// # Safety
/// Both sides are valid for these elements and do not overlap; the machine has `isa`.
pub(super) unsafe fn transpose(
    isa: Isa,
    from: *const f32,
    from_row: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_row: usize,
) {
    for i in (0..rows).step_by(16) {
        let height = (rows - i).min(16);
        // SAFETY: blocks of the caller's rectangle.
        unsafe {
            let lines: [*const f32; 16] =
                std::array::from_fn(|r| from.wrapping_add((i + r.min(height - 1)) * from_row));
            for j in (0..cols).step_by(16) {
                let to = to.add(j * to_row + i);
                transpose_block(isa, &lines, j, height, (cols - j).min(16), to, to_row);
            }
        }
    }
}

/// `to[j * to_row + i] = *lines[i].add(offset + j)` for `i < rows`, `j < cols`, both at most 16: sixteen lines from anywhere.
///
/// # Safety
/// Every line is valid for `cols` elements from `offset`, `to` for the elements written, without overlap; the machine has `isa`.
pub(super) unsafe fn transpose_block(
    isa: Isa,
    lines: &[*const f32; 16],
    offset: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_row: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Avx512 && rows == 16 && cols == 16 {
            return x86::transpose16(lines, offset, to, to_row);
        }
        let _ = isa;
        for (i, line) in lines.iter().enumerate().take(rows) {
            for j in 0..cols {
                *to.add(j * to_row + i) = *line.add(offset + j);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Sixteen by sixteen in registers: pairs, fours, then quarters of vectors.

    use std::arch::x86_64::*;

    /// # Safety
    /// As `transpose_block`, for a whole block, with AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose16(
        lines: &[*const f32; 16],
        offset: usize,
        to: *mut f32,
        to_row: usize,
    ) {
        // SAFETY: promised by the caller.
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for i in 0..16 {
                r[i] = _mm512_loadu_ps(lines[i].add(offset));
            }
            // Within each 128-bit quarter: 4x4 transposes of rows 4g..4g+4.
            let mut t = [_mm512_setzero_ps(); 16];
            for g in 0..4 {
                let (a, b, c, d) = (r[4 * g], r[4 * g + 1], r[4 * g + 2], r[4 * g + 3]);
                let (ab_low, ab_high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (cd_low, cd_high) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                t[4 * g] = _mm512_shuffle_ps::<0x44>(ab_low, cd_low);
                t[4 * g + 1] = _mm512_shuffle_ps::<0xEE>(ab_low, cd_low);
                t[4 * g + 2] = _mm512_shuffle_ps::<0x44>(ab_high, cd_high);
                t[4 * g + 3] = _mm512_shuffle_ps::<0xEE>(ab_high, cd_high);
            }
            // t[4g + s] holds, in quarter q, column 4q + s of rows 4g..4g+4. Gather quarter q of the four groups.
            for s in 0..4 {
                let (a, b, c, d) = (t[s], t[4 + s], t[8 + s], t[12 + s]);
                let ab_even = _mm512_shuffle_f32x4::<0x88>(a, b);
                let ab_odd = _mm512_shuffle_f32x4::<0xDD>(a, b);
                let cd_even = _mm512_shuffle_f32x4::<0x88>(c, d);
                let cd_odd = _mm512_shuffle_f32x4::<0xDD>(c, d);
                let quarters = [
                    _mm512_shuffle_f32x4::<0x88>(ab_even, cd_even),
                    _mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd),
                    _mm512_shuffle_f32x4::<0xDD>(ab_even, cd_even),
                    _mm512_shuffle_f32x4::<0xDD>(ab_odd, cd_odd),
                ];
                for (q, quarter) in quarters.into_iter().enumerate() {
                    _mm512_storeu_ps(to.add((4 * q + s) * to_row), quarter);
                }
            }
        }
    }
}
