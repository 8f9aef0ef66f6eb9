//! What an adapter makes of a base weight: the merged weight, and DoRA's norms of it.
//!
//! In f64 and row by row: this is done once an adapter, never in a step. It must not know where either lies in memory.

use std::borrow::Cow;

use super::dora::inverse;
use crate::config::ScaleOn;
use crate::ops::{Buffer, Ops, Real};
use crate::weights::{SiteAdapter, SiteScale};

/// Rows of a weight that are read at a time.
const ROWS: usize = 64;

/// `m / |W + s B A|` by output row. Sums in f64: the base is as it is stored, the gain as exact as f32 can be.
pub(super) fn dora_gain<O: Ops>(
    ops: &O,
    weight: &O::Matrix,
    adapter: &SiteAdapter,
    magnitude: &[f32],
) -> Vec<O::T> {
    let update = Update::of(adapter);
    by_row(ops, weight, |output, row| {
        let norm = norm(&update.onto(row, output));
        O::T::from_f64(f64::from(magnitude[output]) * inverse(norm))
    })
}

/// `|W|^2` by output row, summed in f64.
pub(super) fn row_squares<O: Ops>(ops: &O, weight: &O::Matrix) -> Vec<O::T> {
    by_row(ops, weight, |_, row| O::T::from_f64(squares(&row)))
}

/// `|W|` by output row, which is DoRA's magnitude where B is still zero.
pub fn row_norms<O: Ops>(ops: &O, weight: &O::Matrix) -> Vec<f32> {
    by_row(ops, weight, |_, row| norm(&row) as f32)
}

/// `of(output, row)` of a weight's rows.
fn by_row<O: Ops, R>(ops: &O, weight: &O::Matrix, of: impl Fn(usize, Vec<f64>) -> R) -> Vec<R> {
    let (outputs, inputs) = ops.dims(weight);
    let ids: Vec<u32> = (0..outputs as u32).collect();
    let mut gathered = ops.exact();
    let mut rows = Vec::new();
    let mut found = Vec::with_capacity(outputs);
    for ids in ids.chunks(ROWS) {
        ops.resize(&mut gathered, ids.len() * inputs);
        ops.gather(weight, ops.ids(ids), gathered.all_mut());
        rows.resize(gathered.len(), O::T::ZERO);
        ops.read(gathered.all(), &mut rows);
        for (output, row) in ids.iter().zip(rows.chunks_exact(inputs)) {
            let row = row.iter().map(|w| w.to_f64()).collect();
            found.push(of(*output as usize, row));
        }
    }
    found
}

fn squares(row: &[f64]) -> f64 {
    row.iter().map(|w| w * w).sum()
}

fn norm(row: &[f64]) -> f64 {
    squares(row).sqrt()
}

/// `s B A` of one site, to be added row by row.
struct Update<'a> {
    rank: usize,
    scale: f64,
    a: Cow<'a, [f32]>,
    b: Cow<'a, [f32]>,
}

impl<'a> Update<'a> {
    fn of(adapter: &'a SiteAdapter) -> Self {
        Self {
            rank: adapter.r,
            scale: f64::from(adapter.scale),
            a: adapter.a.to_f32(),
            b: adapter.b.to_f32(),
        }
    }

    /// Row `output` of `W + s B A`, given that of `W`.
    fn onto(&self, mut row: Vec<f64>, output: usize) -> Vec<f64> {
        let b = &self.b[output * self.rank..][..self.rank];
        for (b, a) in b.iter().zip(self.a.chunks_exact(row.len())) {
            let factor = self.scale * f64::from(*b);
            row.iter_mut()
                .zip(a)
                .for_each(|(w, a)| *w += factor * f64::from(*a));
        }
        row
    }
}

/// The weight `[out, in]` that alone does what base and (IA)3's vector do together: rows times `l`, or columns. A bias is scaled as a
/// row of the outputs is.
pub fn scaled(weight: &[f32], scale: &SiteScale) -> Vec<f32> {
    let width = match scale.on {
        ScaleOn::Outputs => weight.len() / scale.l.len(),
        ScaleOn::Inputs => scale.l.len(),
    };
    let factor = |at: usize| match scale.on {
        ScaleOn::Outputs => scale.l[at / width],
        ScaleOn::Inputs => scale.l[at % width],
    };
    let numbers = weight.iter().enumerate();
    numbers.map(|(at, w)| factor(at) * w).collect()
}

/// The weight `[out, in]` that alone does what base and adapter do together: `W + s B A`, or DoRA's
/// `m (W + s B A) / |W + s B A|`.
pub fn merged(weight: &[f32], adapter: &SiteAdapter) -> Vec<f32> {
    let update = Update::of(adapter);
    let rows = weight.chunks_exact(adapter.a.len() / adapter.r).enumerate();
    rows.flat_map(|(output, row)| {
        let row = update.onto(row.iter().map(|w| f64::from(*w)).collect(), output);
        let gain = adapter
            .magnitude
            .as_ref()
            .map_or(1.0, |m| f64::from(m[output]) * inverse(norm(&row)));
        row.into_iter().map(move |w| (gain * w) as f32)
    })
    .collect()
}
