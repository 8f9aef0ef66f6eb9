//! The low-rank updates of a step as operations read them: whose rows, onto which output, from factors as their files store them.
//!
//! A factor keeps its file's dtype all the way into registers: reading it is what an update costs, and widening is exact.
//! It must not know adapters, sites or where a factor's memory belongs.

use std::ops::Range;

use half::{bf16, f16};

use super::Real;

/// A factor `[rank, width]` in the host's memory, row-major, as it is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Factor<'a, T> {
    /// The numbers that operations work on.
    Full(&'a [T]),
    /// The upper halves of f32.
    Bf16(&'a [bf16]),
    /// IEEE half precision.
    F16(&'a [f16]),
}

/// `y[rows] += scale * (x[rows] A^T) Bt`, where `y` is one of the outputs that share the input `x`.
#[derive(Clone, Debug)]
pub struct LowRank<F, T> {
    /// Which rows of `x` and of the output.
    pub rows: Range<usize>,
    /// Which output.
    pub output: usize,
    /// Rank, at least 1.
    pub rank: usize,
    /// The factor on `B A x`.
    pub scale: T,
    /// A `[rank, in]`.
    pub a: F,
    /// B transposed `[rank, out]`.
    pub bt: F,
}

/// An update whose factors are in the host's memory.
pub type HostLowRank<'a, T> = LowRank<Factor<'a, T>, T>;

// === impl LowRank ===

impl<F, T> LowRank<F, T> {
    /// The same update with other factors.
    pub(super) fn map<G>(self, factor: impl Fn(F) -> G) -> LowRank<G, T> {
        LowRank {
            rows: self.rows,
            output: self.output,
            rank: self.rank,
            scale: self.scale,
            a: factor(self.a),
            bt: factor(self.bt),
        }
    }
}

// === impl Factor ===

impl<T: Real> Factor<'_, T> {
    /// Numbers in it.
    pub fn len(&self) -> usize {
        match self {
            Factor::Full(numbers) => numbers.len(),
            Factor::Bf16(numbers) => numbers.len(),
            Factor::F16(numbers) => numbers.len(),
        }
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers, widened exactly, into `out` of the same length.
    pub fn widen(&self, out: &mut [T]) {
        assert_eq!(out.len(), self.len(), "a place for each number");
        match self {
            Factor::Full(numbers) => out.copy_from_slice(numbers),
            Factor::Bf16(numbers) => {
                for (out, number) in out.iter_mut().zip(*numbers) {
                    *out = T::from_f32(number.to_f32());
                }
            }
            Factor::F16(numbers) => {
                for (out, number) in out.iter_mut().zip(*numbers) {
                    *out = T::from_f32(number.to_f32());
                }
            }
        }
    }

    /// The numbers, widened exactly.
    pub fn to_vec(&self) -> Vec<T> {
        let mut out = vec![T::ZERO; self.len()];
        self.widen(&mut out);
        out
    }
}
