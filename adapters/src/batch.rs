//! A mixed batch: which rows belong to which adapter, and what a pass over them needs.
//!
//! Rows of one adapter are adjacent, so that each adapter's thin products run once per site. It must not know
//! sequences, requests or who sorted the rows.

use std::ops::Range;
use std::sync::Arc;

use crate::linear::{Overlay, ResidentAdapter};
use crate::ops::{Ops, Real};
use crate::pace::Pace;

/// Adjacent rows with the same adapter, or with none.
#[derive(Clone, Debug)]
pub struct Segment<T = f32> {
    /// The rows.
    pub rows: Range<usize>,
    /// Their adapter; `None` is the base alone.
    pub adapter: Option<Arc<ResidentAdapter<T>>>,
}

impl<T> Segment<T> {
    /// Segments of adjacent runs of rows, given as (rows, adapter) in row order; neighbours with the same adapter
    /// become one segment.
    pub fn join(
        runs: impl IntoIterator<Item = (usize, Option<Arc<ResidentAdapter<T>>>)>,
    ) -> Vec<Self> {
        let mut segments: Vec<Self> = Vec::new();
        let mut row = 0;
        for (count, adapter) in runs {
            let rows = row..row + count;
            row = rows.end;
            let same = |last: &&mut Self| match (&last.adapter, &adapter) {
                (Some(last), Some(next)) => Arc::ptr_eq(last, next),
                (None, None) => true,
                _ => false,
            };
            match segments.last_mut().filter(same) {
                Some(last) => last.rows.end = rows.end,
                None => segments.push(Self { rows, adapter }),
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

    /// `out = mask * x / (1 - rate)`, or `out += ...` where `add`, for rows `rows` at site number `site`.
    pub fn apply<T: Real>(
        &self,
        rows: Range<usize>,
        site: usize,
        x: &[T],
        out: &mut [T],
        add: bool,
    ) {
        let width = x.len() / rows.len().max(1);
        let keep = T::from_f32(1.0 / (1.0 - self.rate));
        let bar = (f64::from(self.rate) * (u64::MAX as f64)) as u64;
        let keys = &self.row_keys[rows];
        for ((key, x), out) in keys
            .iter()
            .zip(x.chunks_exact(width))
            .zip(out.chunks_exact_mut(width))
        {
            let key = mix(key ^ mix(site as u64));
            for (column, (x, out)) in x.iter().zip(out).enumerate() {
                let kept = mix(key.wrapping_add(column as u64)) >= bar;
                let value = if kept { *x * keep } else { T::ZERO };
                *out = if add { *out + value } else { value };
            }
        }
    }
}

/// SplitMix64's finaliser: every input bit changes every output bit (Steele, Lea and Flood, 2014).
fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Small buffers that thin products reuse.
#[derive(Clone, Debug, Default)]
pub struct Thin<T> {
    /// `A x`.
    pub(crate) h: Vec<T>,
    /// Its gradient.
    pub(crate) dh: Vec<T>,
    /// The input after dropout, or the gradient before it.
    pub(crate) masked: Vec<T>,
}

/// What a pass over a batch carries through every layer.
pub struct Pass<'a, O: Ops> {
    /// The operations.
    pub ops: &'a O,
    /// Who adapts which rows; rows in no segment are the base's.
    pub segments: &'a [Segment<O::T>],
    /// Which rows merged weights answer, in row order.
    pub overlays: &'a [Covered<'a, O::Matrix>],
    /// Where to pause.
    pub pace: &'a dyn Pace,
    /// Training's dropout.
    pub dropout: Option<&'a Dropout>,
}

/// The first `len` elements of a buffer that only ever grows.
pub fn sized<T: Real>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::ZERO);
    }
    &mut buffer[..len]
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
        all.apply(0..40, 3, &x, &mut whole, false);
        let kept = whole.iter().filter(|v| **v != 0.0).count() as f64 / x.len() as f64;
        assert!((kept - 0.75).abs() < 0.04, "{kept} kept");
        let alone = Dropout {
            rate: 0.25,
            row_keys: keys[17..18].to_vec(),
        };
        let mut one = vec![0.0; 50];
        alone.apply(0..1, 3, &x[..50], &mut one, false);
        assert_eq!(
            one,
            whole[17 * 50..18 * 50],
            "a row's mask does not depend on its place"
        );
        let mut other = vec![0.0; 50];
        alone.apply(0..1, 4, &x[..50], &mut other, false);
        assert_ne!(one, other, "sites have masks of their own");
    }

    #[test]
    fn neighbours_with_one_adapter_join() {
        let a = Arc::new(ResidentAdapter::<f32>::empty(1));
        let b = Arc::new(ResidentAdapter::<f32>::empty(1));
        let runs = [
            (2, Some(a.clone())),
            (1, Some(a)),
            (3, Some(b)),
            (1, None),
            (4, None),
        ];
        let rows: Vec<_> = Segment::join(runs).into_iter().map(|s| s.rows).collect();
        assert_eq!(rows, [0..3, 3..6, 6..11]);
    }
}
