//! (IA)3 at a projection (Liu et al., 2022; PEFT's `ia3/layer.py`): `y = l * (W x + b)` where a vector is on the outputs,
//! `y = W (l * x) + b` where it is on the inputs; forward and backward, in the rows that the vector is for.
//!
//! Rows of others meet no operation that they would not meet alone. It must not know which modules are scaled, or why.

use std::ops::Range;

use super::{AdapterGrads, LoraLinear, exact_copy, numbers, some_ones};
use crate::batch::{Pass, Segment};
use crate::config::ScaleOn;
use crate::ops::{Buffer, Ops, Real, View, ViewMut};
use crate::pace::Stopped;

/// Buffers of [`LoraLinear::scale_backward`].
pub(super) struct ScaleWork<'a, O: Ops> {
    /// Working.
    pub(super) scaled: &'a mut O::Buf,
    /// Exact.
    pub(super) product: &'a mut O::Buf,
    /// Ones, exact.
    pub(super) ones: &'a mut O::Buf,
}

// === impl LoraLinear ===

impl<O: Ops> LoraLinear<O> {
    /// The vector of a segment on one side of this projection. It is never one of several adapters: see
    /// [`crate::batch::Mixture`].
    pub(super) fn vector<'a>(&self, segment: &'a Segment<O>, on: ScaleOn) -> Option<View<'a, O>> {
        let (adapter, _) = segment.adapters.parts().next()?;
        let place = adapter.scales.get(self.number())?.as_ref()?;
        (place.on == on).then(|| adapter.part(place.at.clone()))
    }

    /// The rows that have a vector on their inputs.
    fn scaled_rows<'a>(
        &self,
        pass: &'a Pass<'_, O>,
    ) -> impl Iterator<Item = (usize, &'a Range<usize>, View<'a, O>)> {
        let segments = pass.segments.iter().enumerate();
        segments.filter_map(|(index, segment)| {
            let l = self.vector(segment, ScaleOn::Inputs)?;
            Some((index, &segment.rows, l))
        })
    }

    /// What the base weight multiplies: `x [rows, in]`, or a copy that has the vectors on the inputs in it.
    pub(super) fn scaled_input<'a>(
        &self,
        pass: &Pass<'_, O>,
        x: &'a O::Buf,
        scaled: &'a mut O::Buf,
    ) -> &'a O::Buf {
        if self.scaled_rows(pass).next().is_none() {
            return x;
        }
        pass.ops.resize(scaled, x.len());
        pass.ops.copy(x.all(), scaled.all_mut());
        for (_, rows, l) in self.scaled_rows(pass) {
            let rows = numbers(rows, self.inputs);
            pass.ops.scale_columns(l, scaled.part_mut(rows));
        }
        scaled
    }

    /// `y *= l` in the rows that have a vector on their outputs.
    pub(super) fn scale(&self, pass: &Pass<'_, O>, y: &mut O::Buf) {
        for segment in pass.segments {
            if let Some(l) = self.vector(segment, ScaleOn::Outputs) {
                let rows = numbers(&segment.rows, self.outputs);
                pass.ops.scale_columns(l, y.part_mut(rows));
            }
        }
    }

    /// What comes through the base weight: `dx += ` the gradient of `x` (skipped when nobody below needs it), and the vectors'
    /// gradients. `inner` is the gradient of `W x`.
    pub(super) fn scale_backward(
        &self,
        pass: &Pass<'_, O>,
        (x, dy, inner): (&O::Buf, &O::Buf, &O::Buf),
        mut dx: Option<&mut O::Buf>,
        grads: &mut [Option<AdapterGrads<O>>],
        mut work: ScaleWork<'_, O>,
    ) -> Result<(), Stopped> {
        let mut done = 0;
        for (index, rows, l) in self.scaled_rows(pass) {
            if let Some(dx) = dx.as_deref_mut() {
                self.product_backward(pass, done..rows.start, (inner, dx))?;
            }
            done = rows.end;
            let grads = grads.get_mut(index).and_then(Option::as_mut);
            self.input_gradient(
                pass,
                (x, inner),
                (rows, l),
                (dx.as_deref_mut(), grads),
                &mut work,
            )?;
        }
        if let Some(dx) = dx {
            self.product_backward(pass, done..dy.len() / self.outputs, (inner, dx))?;
        }
        for (segment, grads) in pass.segments.iter().zip(grads) {
            let scaled = self.vector(segment, ScaleOn::Outputs).is_some();
            if let (true, Some(grads)) = (scaled, grads) {
                self.output_gradient(pass, (x, dy), &segment.rows, grads, &mut work)?;
            }
        }
        Ok(())
    }

    /// Rows with a vector on their inputs: with `dz = inner W`, `dl += ` the sum over them of `x dz`, and `dx += l dz`.
    fn input_gradient(
        &self,
        pass: &Pass<'_, O>,
        (x, inner): (&O::Buf, &O::Buf),
        (rows, l): (&Range<usize>, View<'_, O>),
        (dx, grads): (Option<&mut O::Buf>, Option<&mut AdapterGrads<O>>),
        work: &mut ScaleWork<'_, O>,
    ) -> Result<(), Stopped> {
        let (ops, at) = (pass.ops, numbers(rows, self.inputs));
        ops.resize(work.scaled, x.len());
        ops.clear(work.scaled.part_mut(at.clone()));
        self.product_backward(pass, rows.clone(), (inner, &mut *work.scaled))?;
        let place = grads.as_ref().and_then(|grads| grads.scale(self.number()));
        if let (Some(grads), Some(place)) = (grads, place) {
            let dz = work.scaled.part(at.clone());
            let sum = (&mut *work.product, &mut *work.ones);
            let (ab, size) = ((x.part(at.clone()), dz), (rows.len(), self.inputs));
            add_products(ops, ab, size, sum, grads.part_mut(place));
        }
        if let Some(dx) = dx {
            ops.scale_columns(l, work.scaled.part_mut(at.clone()));
            ops.add(work.scaled.part(at.clone()), dx.part_mut(at));
        }
        pass.pace.breathe()
    }

    /// Rows with a vector on their outputs: `dl += ` the sum over them of `dy (W x + b)`.
    fn output_gradient(
        &self,
        pass: &Pass<'_, O>,
        (x, dy): (&O::Buf, &O::Buf),
        rows: &Range<usize>,
        grads: &mut AdapterGrads<O>,
        work: &mut ScaleWork<'_, O>,
    ) -> Result<(), Stopped> {
        let Some(place) = grads.scale(self.number()) else {
            return Ok(());
        };
        let (ops, at) = (pass.ops, numbers(rows, self.outputs));
        ops.resize(work.scaled, dy.len());
        self.product(pass, &self.weight, rows.clone(), (x, &mut *work.scaled))?;
        if let Some(bias) = &self.bias {
            ops.add_bias(bias.all(), work.scaled.part_mut(at.clone()));
        }
        let y = work.scaled.part(at.clone());
        let sum = (&mut *work.product, &mut *work.ones);
        let (ab, size) = ((y, dy.part(at)), (rows.len(), self.outputs));
        add_products(ops, ab, size, sum, grads.part_mut(place));
        pass.pace.breathe()
    }
}

/// `sums [width] += ` the sum over rows of `a b`, both `[rows, width]`, row after row and exact.
pub(super) fn add_products<O: Ops>(
    ops: &O,
    (a, b): (View<'_, O>, View<'_, O>),
    (rows, width): (usize, usize),
    (product, ones): (&mut O::Buf, &mut O::Buf),
    sums: ViewMut<'_, O>,
) {
    exact_copy(ops, a, (rows, width), (product, ones));
    ops.multiply(b, product.all_mut());
    let ones = some_ones(ops, ones, rows);
    ops.outer(ones, product.all(), 1, O::T::ONE, sums);
}
