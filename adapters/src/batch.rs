//! A mixed batch: which rows belong to which adapters, and what a pass over them needs.
//!
//! Rows of one adapter are adjacent, so that each adapter's thin products run once per site. It must not know
//! sequences, requests or who sorted the rows.

use std::ops::Range;
use std::sync::Arc;

use crate::linear::{Overlay, PassUpdates, ResidentAdapter};
use crate::ops::{Backend, Ops, Real};
use crate::pace::Pace;

/// What is added to the base: `sum of weight * s B A x`, in this order. Nothing at all is the base alone.
#[derive(Debug)]
pub struct Mixture<O: Ops = Backend>(Vec<(Arc<ResidentAdapter<O>>, f32)>);

/// Adjacent rows with the same mixture.
#[derive(Clone, Debug)]
pub struct Segment<O: Ops = Backend> {
    /// The rows.
    pub rows: Range<usize>,
    /// Their adapters.
    pub adapters: Mixture<O>,
}

// === impl Mixture ===

impl<O: Ops> Mixture<O> {
    /// Adapters with their weights. One of weight 0 adds nothing, to the last bit. DoRA's gains and (IA)3's vectors
    /// are no summands: an adapter that has them is alone, with weight 1.
    pub fn new(parts: Vec<(Arc<ResidentAdapter<O>>, f32)>) -> Self {
        Self(parts)
    }

    /// Those that add something.
    pub fn parts(&self) -> impl Iterator<Item = (&ResidentAdapter<O>, f32)> {
        let parts = self.0.iter().filter(|(_, weight)| *weight != 0.0);
        parts.map(|(adapter, weight)| (adapter.as_ref(), *weight))
    }

    /// Whether two are the same sum, bit for bit.
    fn is(&self, other: &Self) -> bool {
        let same = |((left, l), (right, r)): (&(_, f32), &(_, f32))| {
            Arc::ptr_eq(left, right) && l.to_bits() == r.to_bits()
        };
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(same)
    }
}

// Shared, whatever the operations are: a derived clone would ask them for one.
impl<O: Ops> Clone for Mixture<O> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<O: Ops> Default for Mixture<O> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

/// One adapter as it is, or the base.
impl<O: Ops> From<Option<Arc<ResidentAdapter<O>>>> for Mixture<O> {
    fn from(adapter: Option<Arc<ResidentAdapter<O>>>) -> Self {
        Self(adapter.map(|adapter| (adapter, 1.0)).into_iter().collect())
    }
}

// === impl Segment ===

impl<O: Ops> Segment<O> {
    /// Segments of adjacent runs of rows, given as (rows, adapters) in row order; neighbours with the same mixture
    /// become one segment.
    pub fn join<M: Into<Mixture<O>>>(runs: impl IntoIterator<Item = (usize, M)>) -> Vec<Self> {
        let mut segments: Vec<Self> = Vec::new();
        let mut row = 0;
        for (count, adapters) in runs {
            let (rows, adapters) = (row..row + count, adapters.into());
            row = rows.end;
            match segments.last_mut() {
                Some(last) if last.adapters.is(&adapters) => last.rows.end = rows.end,
                _ => segments.push(Self { rows, adapters }),
            }
        }
        segments
    }
}

/// Adjacent rows that merged weights answer; they are in no segment with an adapter.
#[derive(Clone, Debug)]
pub struct Covered<'a, M> {
    /// The rows.
    pub rows: Range<usize>,
    /// What takes the base's place.
    pub overlay: &'a Overlay<M>,
}

/// Dropout on the input of A, reproducible from counters alone: a mask depends on the row's key, the site and the
/// column, not on where the row lies in a batch.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// The probability that an input is dropped, in `0..1`.
    pub rate: f32,
    /// One key for each row, from [`Dropout::row_key`].
    pub row_keys: Vec<u64>,
}

impl Dropout {
    /// The key of one row of a training batch.
    pub fn row_key(seed: u64, step: u64, example: u64, position: u64) -> u64 {
        [step, example, position]
            .iter()
            .fold(mix(seed), |key, part| mix(key ^ mix(*part)))
    }
}

/// `out = mask * x / (1 - rate)`, or `out += ...` where `add`, in rows of one key each, at site number `site`: the plain form
/// of [`Ops::dropout`]. A number is kept where the hash of (key, site, column) is not below `rate` of all hashes.
pub(crate) fn drop_out<T: Real>(
    x: &[T],
    row_keys: &[u64],
    site: usize,
    rate: f32,
    out: &mut [T],
    add: bool,
) {
    let width = x.len() / row_keys.len().max(1);
    let keep = T::from_f32(1.0 / (1.0 - rate));
    let bar = bar(rate);
    let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width));
    for (key, (x, out)) in row_keys.iter().zip(rows) {
        let key = mix(key ^ mix(site as u64));
        for (column, (x, out)) in x.iter().zip(out).enumerate() {
            let kept = mix(key.wrapping_add(column as u64)) >= bar;
            let value = if kept { *x * keep } else { T::ZERO };
            *out = if add { *out + value } else { value };
        }
    }
}

/// Hashes below this are dropped.
pub(crate) fn bar(rate: f32) -> u64 {
    (f64::from(rate) * (u64::MAX as f64)) as u64
}

/// What SplitMix64 adds from one number to the next.
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finaliser: every input bit changes every output bit (Steele, Lea and Flood, 2014).
pub(crate) fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(GOLDEN);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Small buffers that thin products reuse.
#[derive(Debug)]
pub struct Thin<O: Ops> {
    /// `A x`.
    pub(crate) h: O::Buf,
    /// Its gradient.
    pub(crate) dh: O::Buf,
    /// The input after dropout, or the gradient before it.
    pub(crate) masked: O::Buf,
    /// Gradients behind DoRA's gains.
    pub(crate) gained: O::Buf,
    /// `(W x + s B A x) / |W + s B A|`, exact, then its product with the output's gradient.
    pub(crate) direction: O::Buf,
    /// Inputs behind (IA)3's vectors, or the gradients before them.
    pub(crate) scaled: O::Buf,
    /// Some rows of gradients, exact.
    pub(crate) exact_rows: O::Buf,
    /// As many ones as were wanted so far, exact: they sum rows.
    pub(crate) ones: O::Buf,
}

impl<O: Ops> Thin<O> {
    /// Empty buffers.
    pub fn new(ops: &O) -> Self {
        Self {
            h: ops.exact(),
            dh: ops.exact(),
            masked: ops.working(),
            gained: ops.working(),
            direction: ops.exact(),
            scaled: ops.working(),
            exact_rows: ops.exact(),
            ones: ops.exact(),
        }
    }
}

/// What a pass over a batch carries through every layer.
pub struct Pass<'a, O: Ops> {
    /// The operations.
    pub ops: &'a O,
    /// Who adapts which rows; rows in no segment are the base's.
    pub segments: &'a [Segment<O>],
    layers: usize,
    /// What the segments' adapters add, by layer and site, where operations read it.
    pub(crate) updates: PassUpdates<'a, O>,
    /// Which rows merged weights answer, in row order.
    pub overlays: &'a [Covered<'a, O::Matrix>],
    /// Where to pause.
    pub pace: &'a dyn Pace,
    /// Training's dropout.
    pub dropout: Option<&'a Dropout>,
}

impl<'a, O: Ops> Pass<'a, O> {
    /// A pass over `segments` of a model of `layers` layers, without merged weights and dropout.
    pub fn new(ops: &'a O, layers: usize, segments: &'a [Segment<O>], pace: &'a dyn Pace) -> Self {
        Self {
            ops,
            segments,
            layers,
            updates: PassUpdates::new(ops, layers, segments, false),
            overlays: &[],
            pace,
            dropout: None,
        }
    }

    /// The same with rows that merged weights answer.
    #[must_use]
    pub fn with_overlays(self, overlays: &'a [Covered<'a, O::Matrix>]) -> Self {
        Self { overlays, ..self }
    }

    /// The same with dropout, or without.
    #[must_use]
    pub fn with_dropout(self, dropout: Option<&'a Dropout>) -> Self {
        let updates = match dropout {
            Some(_) => PassUpdates::new(self.ops, self.layers, self.segments, true),
            None => self.updates,
        };
        Self {
            dropout,
            updates,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropout_is_a_function_of_its_counters() {
        let keys: Vec<u64> = (0..40)
            .map(|position| Dropout::row_key(7, 3, 5, position))
            .collect();
        let all = Dropout {
            rate: 0.25,
            row_keys: keys.clone(),
        };
        let x = vec![1.0f64; 40 * 50];
        let mut whole = vec![0.0; x.len()];
        drop_out(&x, &all.row_keys, 3, all.rate, &mut whole, false);
        let kept = whole.iter().filter(|v| **v != 0.0).count() as f64 / x.len() as f64;
        assert!((kept - 0.75).abs() < 0.04, "{kept} kept");
        let mut one = vec![0.0; 50];
        drop_out(&x[..50], &keys[17..18], 3, all.rate, &mut one, false);
        assert_eq!(
            one,
            whole[17 * 50..18 * 50],
            "a row's mask does not depend on its place"
        );
        let mut other = vec![0.0; 50];
        drop_out(&x[..50], &keys[17..18], 4, all.rate, &mut other, false);
        assert_ne!(one, other, "sites have masks of their own");
    }

    #[test]
    fn neighbours_with_one_mixture_join() {
        let a = Arc::new(ResidentAdapter::empty(&Backend::default(), 1));
        let b = Arc::new(ResidentAdapter::empty(&Backend::default(), 1));
        let one = |adapter: &Arc<_>| Mixture::from(Some(Arc::clone(adapter)));
        let both = |left, right| Mixture::new(vec![(a.clone(), left), (b.clone(), right)]);
        let runs = [
            (2, one(&a)),
            (1, one(&a)),
            (3, one(&b)),
            (1, Mixture::default()),
            (4, Mixture::default()),
            (1, both(0.5, 0.25)),
            (1, both(0.5, 0.25)),
            (1, both(0.5, -0.25)),
            (1, Mixture::new(vec![(a.clone(), 0.5)])),
        ];
        let rows: Vec<_> = Segment::join(runs).into_iter().map(|s| s.rows).collect();
        assert_eq!(rows, [0..3, 3..6, 6..11, 11..13, 13..14, 14..15]);
    }

    #[test]
    fn a_part_of_weight_zero_is_no_part() {
        let a = Arc::new(ResidentAdapter::empty(&Backend::default(), 1));
        let mixture = Mixture::new(vec![(a.clone(), 0.0), (a.clone(), -2.0), (a, -0.0)]);
        let weights: Vec<f32> = mixture.parts().map(|(_, weight)| weight).collect();
        assert_eq!(weights, [-2.0]);
    }
}
