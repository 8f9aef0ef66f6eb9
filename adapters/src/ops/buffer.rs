//! Numbers where operations work: buffers, parts of them, and an adapter's arena.
//!
//! A host's buffer is a vector and its parts are slices; a device's are addresses that only the device follows.

use std::fmt::Debug;
use std::ops::Range;

use super::{Ops, Real};

/// Numbers in the memory that operations work on.
pub trait Buffer: Debug + Send + Sync + 'static {
    /// Some of them, to be read.
    type View<'a>: Copy + Debug;
    /// Some of them, to be written.
    type ViewMut<'a>: Debug;

    /// How many.
    fn len(&self) -> usize;
    /// Where they are: no two buffers are at one place, and one that grows may move.
    fn place(&self) -> u64;
    /// Some of them.
    ///
    /// # Panics
    /// Beyond the end.
    fn part(&self, at: Range<usize>) -> Self::View<'_>;
    /// Some of them, to be written.
    ///
    /// # Panics
    /// Beyond the end.
    fn part_mut(&mut self, at: Range<usize>) -> Self::ViewMut<'_>;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// All of them.
    fn all(&self) -> Self::View<'_> {
        self.part(0..self.len())
    }
    /// All of them, to be written.
    fn all_mut(&mut self) -> Self::ViewMut<'_> {
        self.part_mut(0..self.len())
    }
}

/// Numbers that `O` reads.
pub type View<'a, O> = <<O as Ops>::Buf as Buffer>::View<'a>;
/// Numbers that `O` writes.
pub type ViewMut<'a, O> = <<O as Ops>::Buf as Buffer>::ViewMut<'a>;

impl<T: Real> Buffer for Vec<T> {
    type View<'a> = &'a [T];
    type ViewMut<'a> = &'a mut [T];

    fn len(&self) -> usize {
        Vec::len(self)
    }

    fn place(&self) -> u64 {
        self.as_ptr() as u64
    }

    fn part(&self, at: Range<usize>) -> &[T] {
        &self[at]
    }

    fn part_mut(&mut self, at: Range<usize>) -> &mut [T] {
        &mut self[at]
    }
}

/// How large an arena is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaSize {
    /// Exact numbers.
    pub full: usize,
    /// Numbers of 16 bits.
    pub half: usize,
}

/// Writes the numbers of an arena: exact ones, and those of 16 bits.
pub type Fill<'a, T> = &'a mut dyn FnMut(&mut [T], &mut [u16]);

/// Where a factor lies: the arena's part, and how to read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Span {
    /// Exact numbers.
    Full(Range<usize>),
    /// The upper halves of f32.
    Bf16(Range<usize>),
    /// IEEE half precision.
    F16(Range<usize>),
}

/// A device has no room.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device has no room for {asked} bytes more; {free} are free")]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub asked: usize,
    /// Bytes that are free.
    pub free: usize,
}
