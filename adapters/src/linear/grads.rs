//! The gradients of an adapter in training, laid out as its parameters are.
//!
//! It must not know who adds to them.

use std::ops::Range;
use std::panic::panic_any;

use super::ResidentAdapter;
use super::layout::{Place, ScalePlace};
use super::whole::Deltas;
use crate::config::{BaseTensor, Site};
use crate::ops::{ArenaSize, Backend, Buffer, Ops, Real, Span, View, ViewMut};

/// Gradients of an adapter's parameters, in its layout.
#[derive(Debug)]
pub struct AdapterGrads<O: Ops = Backend> {
    arena: O::Arena,
    len: usize,
    sites: Vec<Option<Place<O::T>>>,
    scales: Vec<Option<ScalePlace>>,
    deltas: Deltas,
    /// What passes add to rows of the embedding table, where products with the output add to the same ones: apart until
    /// [`AdapterGrads::settle`], so that no sum depends on how a batch was cut in passes.
    looked_up: Option<O::Buf>,
}

/// Where the gradients of one site lie.
pub(super) struct SiteGrads {
    pub(super) a: Range<usize>,
    /// Of B transposed.
    pub(super) bt: Range<usize>,
    pub(super) magnitude: Option<Range<usize>>,
}

// === impl AdapterGrads ===

impl<O: Ops> AdapterGrads<O> {
    /// Zeros in the layout of `adapter`.
    pub fn of(ops: &O, adapter: &ResidentAdapter<O>) -> Self {
        let size = ArenaSize {
            full: adapter.parameters,
            half: 0,
        };
        let arena = ops.arena(None, size, &mut |full, _| full.fill(O::T::ZERO));
        Self {
            arena: arena.unwrap_or_else(|error| panic_any(error)),
            len: size.full,
            sites: adapter.sites.clone(),
            scales: adapter.scales.clone(),
            deltas: adapter.deltas.clone(),
            looked_up: None,
        }
    }

    /// Completes the sums of a batch when all of its passes have added to them.
    pub fn settle(&mut self, ops: &O) {
        let place = self.delta(BaseTensor::Embedding);
        if let (Some(place), Some(looked_up)) = (place, self.looked_up.take()) {
            let mut one = ops.exact();
            ops.resize(&mut one, 1);
            ops.write(&[O::T::ONE], one.all_mut());
            let sum = self.part_mut(place);
            ops.outer(one.all(), looked_up.all(), 1, O::T::ONE, sum);
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

    /// The norm of each site's gradients.
    pub fn norms(&self, ops: &O) -> Vec<((usize, Site), f64)> {
        let mut norms = Vec::new();
        for index in 0..self.sites.len() {
            let low_rank = self.site(index);
            let low_rank = low_rank.map(|s| [Some(s.a), Some(s.bt), s.magnitude]);
            let parts = low_rank.into_iter().flatten().flatten();
            let (layer, site) = (index / Site::ALL.len(), Site::ALL[index % Site::ALL.len()]);
            let whole = self.delta(BaseTensor::weight(layer, site));
            let parts: Vec<Range<usize>> = parts.chain(self.scale(index)).chain(whole).collect();
            if parts.is_empty() {
                continue;
            }
            let squares: f64 = parts
                .into_iter()
                .map(|at| ops.sum_of_squares(self.part(at)))
                .sum();
            let count = Site::ALL.len();
            norms.push(((index / count, Site::ALL[index % count]), squares.sqrt()));
        }
        norms
    }

    /// All become zero.
    pub fn clear(&mut self, ops: &O) {
        self.looked_up = None;
        ops.clear(O::numbers_mut(&mut self.arena, 0..self.len));
    }

    /// Where a site's gradients lie.
    pub(super) fn site(&self, index: usize) -> Option<SiteGrads> {
        let place = self.sites.get(index)?.as_ref()?;
        match (&place.a, &place.bt) {
            (Span::Full(a), Span::Full(bt)) => Some(SiteGrads {
                a: a.clone(),
                bt: bt.clone(),
                magnitude: place.magnitude.clone(),
            }),
            _ => None,
        }
    }

    /// Where the gradient of a whole tensor lies.
    pub(crate) fn delta(&self, at: BaseTensor) -> Option<Range<usize>> {
        self.deltas.get(&at).map(|place| place.at.clone())
    }

    /// Sums beside those of the embedding table's delta, which has `len` numbers; zeros at first.
    pub(super) fn looked_up(&mut self, ops: &O, len: usize) -> ViewMut<'_, O> {
        let sums = self.looked_up.get_or_insert_with(|| {
            let mut zeros = ops.exact();
            ops.resize(&mut zeros, len);
            ops.clear(zeros.all_mut());
            zeros
        });
        sums.all_mut()
    }

    /// Where the gradient of a site's vector lies.
    pub(super) fn scale(&self, index: usize) -> Option<Range<usize>> {
        let place = self.scales.get(index)?.as_ref()?;
        Some(place.at.clone())
    }

    /// Some of them, to be added to.
    pub(crate) fn part_mut(&mut self, at: Range<usize>) -> ViewMut<'_, O> {
        O::numbers_mut(&mut self.arena, at)
    }
}
