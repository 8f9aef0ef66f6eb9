//! An adapter's numbers in a host's memory: on cache lines, one allocation for each width, the memory of the one before
//! where it fits.

use std::ops::Range;

use half::slice::HalfBitsSliceExt;

use super::{ARENA_ALIGN, ArenaSize, Factor, Fill, Real, Span};
use crate::weights::Numbers;

/// Exact numbers and numbers of 16 bits.
#[derive(Clone, Debug)]
pub struct HostArena<T> {
    full: Aligned<T>,
    half: Aligned<u16>,
}

/// Numbers that begin on a cache line's boundary.
#[derive(Clone, Debug)]
struct Aligned<T> {
    storage: Vec<T>,
    offset: usize,
    len: usize,
}

const ALIGN_BYTES: usize = ARENA_ALIGN;

/// A spare allocation may be larger than needed by one part in so many.
const SLACK: usize = 16;

// === impl HostArena ===

impl<T: Real> HostArena<T> {
    pub(super) fn filled(spare: Option<Self>, size: ArenaSize, fill: Fill<'_, T>) -> Self {
        let (full, half) = spare.map_or_else(Default::default, |spare| {
            (spare.full.storage, spare.half.storage)
        });
        let mut arena = Self {
            full: Aligned::in_spare(full, size.full),
            half: Aligned::in_spare(half, size.half),
        };
        fill(arena.full.all_mut(), arena.half.all_mut());
        arena
    }

    pub(super) fn bytes(size: ArenaSize) -> usize {
        Aligned::<T>::allocated(size.full) * size_of::<T>()
            + Aligned::<u16>::allocated(size.half) * size_of::<u16>()
    }

    pub(super) fn numbers(&self, at: Range<usize>) -> &[T] {
        &self.full.all()[at]
    }

    pub(super) fn numbers_mut(&mut self, at: Range<usize>) -> &mut [T] {
        &mut self.full.all_mut()[at]
    }

    pub(super) fn factor(&self, span: &Span) -> Factor<'_, T> {
        let half = |at: &Range<usize>| &self.half.all()[at.clone()];
        match span {
            Span::Full(at) => Factor::Full(&self.full.all()[at.clone()]),
            Span::Bf16(at) => Factor::Bf16(half(at).reinterpret_cast()),
            Span::F16(at) => Factor::F16(half(at).reinterpret_cast()),
        }
    }
}

/// A factor's numbers as they are stored.
pub(super) fn stored<T: Real>(factor: Factor<'_, T>) -> Numbers {
    match factor {
        Factor::Full(numbers) => numbers.iter().map(|n| n.to_f32()).collect(),
        Factor::Bf16(numbers) => Numbers::Bf16(numbers.to_vec()),
        Factor::F16(numbers) => Numbers::F16(numbers.to_vec()),
    }
}

// === impl Aligned ===

impl<T: Copy + Default> Aligned<T> {
    /// Numbers in a cache line.
    const LINE: usize = ALIGN_BYTES / size_of::<T>();

    /// Room for `len` numbers, in `spare` if it is about as large as needed. Whoever fills it writes all of it.
    fn in_spare(mut spare: Vec<T>, len: usize) -> Self {
        let needed = Self::allocated(len);
        let fits = needed..=needed + needed / SLACK;
        let storage = if fits.contains(&spare.capacity()) {
            spare.resize(needed, T::default());
            spare
        } else {
            vec![T::default(); needed]
        };
        let past = storage.as_ptr() as usize % ALIGN_BYTES;
        let offset = if len == 0 {
            0
        } else {
            (ALIGN_BYTES - past) % ALIGN_BYTES / size_of::<T>()
        };
        Self {
            storage,
            offset,
            len,
        }
    }

    /// Numbers allocated for `len` aligned ones.
    fn allocated(len: usize) -> usize {
        if len == 0 { 0 } else { len + Self::LINE }
    }

    fn all(&self) -> &[T] {
        &self.storage[self.offset..self.offset + self.len]
    }

    fn all_mut(&mut self) -> &mut [T] {
        &mut self.storage[self.offset..self.offset + self.len]
    }
}
