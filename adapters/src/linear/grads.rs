//! The gradients of an adapter in training, laid out as its parameters are.
//!
//! It must not know who adds to them.

use std::ops::Range;
use std::panic::panic_any;

use super::ResidentAdapter;
use super::resident::Place;
use crate::ops::{ArenaSize, Backend, Ops, Real, Span, View, ViewMut};

/// Gradients of an adapter's parameters, in its layout.
#[derive(Debug)]
pub struct AdapterGrads<O: Ops = Backend> {
    arena: O::Arena,
    len: usize,
    sites: Vec<Option<Place<O::T>>>,
    head: Option<Range<usize>>,
}

impl<O: Ops> AdapterGrads<O> {
    /// Zeros in the layout of `adapter`.
    pub fn of(ops: &O, adapter: &ResidentAdapter<O>) -> Self {
        let size = ArenaSize {
            half: 0,
            ..adapter.size
        };
        let arena = ops.arena(None, size, &mut |full, _| full.fill(O::T::ZERO));
        Self {
            arena: arena.unwrap_or_else(|error| panic_any(error)),
            len: size.full,
            sites: adapter.sites.clone(),
            head: adapter.head.clone(),
        }
    }

    /// Every gradient, in the order of [`ResidentAdapter::parameters`].
    pub fn all(&self) -> View<'_, O> {
        self.part(0..self.len)
    }

    /// Some of them.
    pub fn part(&self, at: Range<usize>) -> View<'_, O> {
        O::numbers(&self.arena, at)
    }

    /// All become zero.
    pub fn clear(&mut self, ops: &O) {
        ops.clear(O::numbers_mut(&mut self.arena, 0..self.len));
    }

    /// The head's gradient.
    pub fn head_mut(&mut self) -> Option<ViewMut<'_, O>> {
        let at = self.head.clone()?;
        Some(O::numbers_mut(&mut self.arena, at))
    }

    /// Where dA and dB transposed of a site lie.
    pub(super) fn site(&self, index: usize) -> Option<(Range<usize>, Range<usize>)> {
        let place = self.sites.get(index)?.as_ref()?;
        match (&place.a, &place.bt) {
            (Span::Full(a), Span::Full(bt)) => Some((a.clone(), bt.clone())),
            _ => None,
        }
    }

    /// Some of them, to be added to.
    pub(super) fn part_mut(&mut self, at: Range<usize>) -> ViewMut<'_, O> {
        O::numbers_mut(&mut self.arena, at)
    }
}
