//! DoRA in training: gains that follow factors and magnitudes from step to step.
//!
//! `y = g (W x + s B (A x)) + b` with `g = m / |W + s B A|` by output row. PEFT holds the norm fixed in the backward pass
//! (`dora.py`; Liu et al., 2024, section 4.3) and takes it anew in each forward one; here it is taken once after each step of the
//! optimizer, from thin products alone. It must not know what a step is.

use std::ops::Range;

use super::{BaseSites, ResidentAdapter};
use crate::config::Site;
use crate::ops::{Buffer, Ops, Real, Span, ViewMut};
use crate::pace::{Pace, pieces};

/// Where all sites' numbers by output row lie: four images of one another, so that a site's part begins equally far from the
/// start of each.
#[derive(Clone, Debug)]
pub(super) struct Norms {
    /// Magnitudes: parameters.
    pub(super) magnitudes: Range<usize>,
    /// `m / |W + s B A|`.
    pub(super) gains: Range<usize>,
    /// `1 / |W + s B A|`.
    pub(super) inverses: Range<usize>,
    /// `|W|^2`, which never changes.
    pub(super) squares: Range<usize>,
}

/// Buffers of [`ResidentAdapter::renew_gains`].
struct Work<O: Ops> {
    /// `A W^T + s/2 A A^T B^T`, `[rank, out]`, then its product with B transposed.
    cross: O::Buf,
    /// `A A^T`, `[rank, rank]`.
    gram: O::Buf,
    ones: O::Buf,
}

// === impl Norms ===

impl Norms {
    /// What lies in `image` where `at` lies among the magnitudes.
    pub(super) fn beside(&self, at: &Range<usize>, image: &Range<usize>) -> Range<usize> {
        let offset = at.start - self.magnitudes.start;
        image.start + offset..image.start + offset + at.len()
    }
}

// === impl ResidentAdapter ===

impl<O: Ops> ResidentAdapter<O> {
    /// Takes the norms of `W + s B A` of the factors as they are now, in the operations' exact type, and the gains of the magnitudes.
    /// Does nothing to an adapter that serves or has no magnitude. Breathes between sites, but is not left half done: whether
    /// the work is still wanted is asked again by whoever goes on.
    pub fn renew_gains(&mut self, base: &impl BaseSites<O>, ops: &O, pace: &dyn Pace) {
        let Some(norms) = self.norms.clone() else {
            return;
        };
        ops.begin_pass();
        let mut sums = ops.exact();
        ops.resize(&mut sums, norms.squares.len());
        ops.copy(self.part(norms.squares.clone()), sums.all_mut());
        let mut work = Work::new(ops, self.largest_rank());
        for index in 0..self.sites.len() {
            let (layer, site) = (index / Site::ALL.len(), Site::ALL[index % Site::ALL.len()]);
            let magnitude = self.sites[index]
                .as_ref()
                .and_then(|p| p.magnitude.as_ref());
            if let Some(at) = magnitude {
                let at = norms.beside(at, &(0..sums.len()));
                let to = sums.part_mut(at);
                self.add_update_norms((base, ops, pace), (layer, site), &mut work, to);
                let _asked_again_later = pace.breathe();
            }
        }
        let host = |view| {
            let mut numbers = vec![O::T::ZERO; norms.squares.len()];
            ops.read(view, &mut numbers);
            numbers
        };
        let inverses = host(sums.all());
        let inverses = inverses.iter().map(|sum| inverse(sum.to_f64().sqrt()));
        let inverses: Vec<O::T> = inverses.map(O::T::from_f64).collect();
        let magnitudes = host(self.part(norms.magnitudes.clone()));
        let gains = magnitudes.iter().zip(&inverses).map(|(m, i)| *m * *i);
        let gains: Vec<O::T> = gains.collect();
        ops.write(&gains, self.part_mut(norms.gains));
        ops.write(&inverses, self.part_mut(norms.inverses));
    }

    /// `sums += |W + s B A|^2 - |W|^2` by output row `i`: `2 s sum_k B_ik (W A^T + s/2 B A A^T)_ik`, without a matrix of
    /// W's size. Where the base is in blocks the product with W rounds A as it rounds any row.
    fn add_update_norms(
        &self,
        (base, ops, pace): (&impl BaseSites<O>, &O, &dyn Pace),
        (layer, site): (usize, Site),
        work: &mut Work<O>,
        sums: ViewMut<'_, O>,
    ) {
        let Some(place) = self.place(layer, site) else {
            return;
        };
        let (Span::Full(a), Span::Full(bt)) = (&place.a, &place.bt) else {
            return;
        };
        let (weight, rank) = (base.weight(layer, site), place.rank);
        let (outputs, inputs) = ops.dims(weight);
        let Work { cross, gram, ones } = work;
        ops.resize(cross, rank * outputs);
        for (rows, part) in pieces(pace, rank, outputs, inputs) {
            let x = self.part(a.start + rows.start * inputs..a.start + rows.end * inputs);
            let y = cross.part_mut(rows.start * outputs..rows.end * outputs);
            ops.matmul_part(x, weight, part, y);
            let _asked_again_later = pace.breathe();
        }
        ops.resize(gram, rank * rank);
        let (a, bt) = (self.part(a.clone()), self.part(bt.clone()));
        ops.shrink(a, a, rank, gram.all_mut());
        let half = O::T::from_f64(0.5) * place.scale;
        ops.expand(gram.all(), bt, rank, half, cross.all_mut());
        ops.multiply(bt, cross.all_mut());
        let twice = place.scale + place.scale;
        ops.outer(ones.part(0..rank), cross.all(), 1, twice, sums);
    }

    fn largest_rank(&self) -> usize {
        let ranks = self.sites.iter().flatten().map(|place| place.rank);
        ranks.max().unwrap_or(0)
    }
}

impl<O: Ops> Work<O> {
    fn new(ops: &O, ranks: usize) -> Self {
        let mut ones = ops.exact();
        ops.resize(&mut ones, ranks);
        ops.write(&vec![O::T::ONE; ranks], ones.all_mut());
        Self {
            cross: ops.exact(),
            gram: ops.exact(),
            ones,
        }
    }
}

/// A row of zeros has no direction: nothing comes of it, rather than what is not a number.
pub(super) fn inverse(norm: f64) -> f64 {
    if norm > 0.0 { 1.0 / norm } else { 0.0 }
}
