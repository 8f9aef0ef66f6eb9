//! What the machine's arithmetic can do when it waits for nothing: the ceiling that benchmarks compare products with.
//!
//! Registers only, enough independent chains to hide latency. It must not know what is compared with it.

#![allow(unsafe_code, reason = "vector instructions")]

use std::hint::black_box;

use super::cpu_tile::Isa;

/// Steps between two looks at the counter.
const STEPS: usize = 1024;

/// Runs `rounds` rounds of f32 multiply-adds on this thread; returns the operations done, a multiply-add being two.
pub(super) fn burn_f32(isa: Isa, rounds: usize) -> usize {
    let lanes = match isa {
        // SAFETY: `isa` is one that this machine has.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::fma512(rounds) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::fma256(rounds) },
        _ => portable(rounds),
    };
    2 * lanes * STEPS * rounds
}

/// Runs `rounds` rounds of byte products added in 32 bits on this thread; returns the operations done, as [`burn_f32`]. None without VNNI.
pub(super) fn burn_i8(isa: Isa, rounds: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 && is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the machine has the instructions.
        let products = unsafe { x86::dot512(rounds) };
        return 2 * products * STEPS * rounds;
    }
    let _ = (isa, rounds);
    0
}

/// Multiply-adds of one step.
fn portable(rounds: usize) -> usize {
    let (a, b) = (black_box(0.5_f32), black_box(0.25_f32));
    let mut acc = [0.0_f32; 16];
    for _ in 0..rounds * STEPS {
        for acc in &mut acc {
            *acc = a.mul_add(b, *acc);
        }
    }
    black_box(acc);
    16
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The chains.

    use super::STEPS;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn fma512(rounds: usize) -> usize {
        let (a, b) = (
            black_box(_mm512_set1_ps(0.5)),
            black_box(_mm512_set1_ps(0.25)),
        );
        let mut acc = [_mm512_setzero_ps(); 16];
        for _ in 0..rounds * STEPS {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(a, b, *acc);
            }
        }
        black_box(acc);
        16 * 16
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn fma256(rounds: usize) -> usize {
        let (a, b) = (
            black_box(_mm256_set1_ps(0.5)),
            black_box(_mm256_set1_ps(0.25)),
        );
        let mut acc = [_mm256_setzero_ps(); 12];
        for _ in 0..rounds * STEPS {
            for acc in &mut acc {
                *acc = _mm256_fmadd_ps(a, b, *acc);
            }
        }
        black_box(acc);
        12 * 8
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn dot512(rounds: usize) -> usize {
        let (a, b) = (
            black_box(_mm512_set1_epi8(3)),
            black_box(_mm512_set1_epi8(-5)),
        );
        let mut acc = [_mm512_setzero_si512(); 16];
        for _ in 0..rounds * STEPS {
            for acc in &mut acc {
                *acc = _mm512_dpbusd_epi32(*acc, a, b);
            }
        }
        black_box(acc);
        16 * 64
    }
}
