//! RMS norm with its weight: the base's, or in a segment's rows the segment's own.
//!
//! It must not know what is normed.

use std::ops::Range;

use super::scale::add_products;
use super::{AdapterGrads, numbers};
use crate::batch::{Pass, Thin};
use crate::config::BaseTensor;
use crate::ops::{Buffer, Ops, Real, View};

/// `y = x / sqrt(mean(x^2) + eps) * weight`, in pieces of the weight's length.
#[derive(Debug)]
pub struct RmsNorm<O: Ops> {
    weight: O::Buf,
    ones: O::Buf,
    eps: f64,
    /// What an adapter may have in its place.
    at: BaseTensor,
    /// Numbers of a row of a batch: one piece, or one a head.
    width: usize,
}

// === impl RmsNorm ===

impl<O: Ops> RmsNorm<O> {
    /// A norm of rows of `width` numbers; `at` is its place in the model, where adapters may have their own.
    pub fn new(ops: &O, weight: &[f32], eps: f32, at: BaseTensor, width: usize) -> Self {
        let working = |numbers: Vec<O::T>| {
            let mut buffer = ops.working();
            ops.resize(&mut buffer, numbers.len());
            ops.write(&numbers, buffer.all_mut());
            buffer
        };
        Self {
            weight: working(weight.iter().map(|w| O::T::from_f32(*w)).collect()),
            ones: working(vec![O::T::ONE; weight.len()]),
            eps: f64::from(eps),
            at,
            width,
        }
    }

    /// The frozen weight, working.
    pub fn weight(&self) -> View<'_, O> {
        self.weight.all()
    }

    /// The segments with a weight of their own: index, rows, weight.
    fn own<'a>(
        &'a self,
        pass: &'a Pass<'_, O>,
    ) -> impl Iterator<Item = (usize, &'a Range<usize>, View<'a, O>)> {
        let segments = pass.segments.iter().enumerate();
        segments.filter_map(|(index, segment)| {
            let (adapter, _) = segment.adapters.parts().next()?;
            let own = adapter.whole.vector(self.at)?;
            Some((index, &segment.rows, own))
        })
    }

    /// `y = norm(x)`.
    pub fn forward(&self, pass: &Pass<'_, O>, x: &O::Buf, y: &mut O::Buf) {
        let weight = self.weight.all();
        pass.ops.rms_norm(x.all(), weight, self.eps, y.all_mut());
        self.own_rows(pass, x, y);
    }

    /// `x += delta`, then the norm of that.
    pub fn forward_sum(&self, pass: &Pass<'_, O>, delta: &O::Buf, x: &mut O::Buf, y: &mut O::Buf) {
        let weight = self.weight.all();
        pass.ops
            .add_rms_norm(delta.all(), x, weight, self.eps, y.all_mut());
        self.own_rows(pass, x, y);
    }

    /// The rows with a weight of their own, again.
    fn own_rows(&self, pass: &Pass<'_, O>, x: &O::Buf, y: &mut O::Buf) {
        for (_, rows, own) in self.own(pass) {
            let at = numbers(rows, self.width);
            let x = x.part(at.clone());
            pass.ops.rms_norm(x, own, self.eps, y.part_mut(at));
        }
    }

    /// `dx += ` the gradient of `x`.
    pub fn backward(&self, pass: &Pass<'_, O>, x: &O::Buf, dy: &O::Buf, dx: &mut O::Buf) {
        let mut some = |at: Range<usize>, weight| {
            if !at.is_empty() {
                let (x, dy, dx) = (x.part(at.clone()), dy.part(at.clone()), dx.part_mut(at));
                pass.ops.rms_norm_backward(x, weight, self.eps, dy, dx);
            }
        };
        let mut done = 0;
        for (_, rows, own) in self.own(pass) {
            let at = numbers(rows, self.width);
            some(done..at.start, self.weight.all());
            done = at.end;
            some(at, own);
        }
        some(done..x.len(), self.weight.all());
    }

    /// Whether a segment trains it.
    pub fn is_trained(&self, grads: &[Option<AdapterGrads<O>>]) -> bool {
        let trains = |grads: &AdapterGrads<O>| grads.delta(self.at).is_some();
        grads.iter().flatten().any(trains)
    }

    /// The gradients of the weights that segments train: `dw += ` the sum of `dy x / sqrt(mean(x^2) + eps)`.
    pub fn gradients(
        &self,
        pass: &Pass<'_, O>,
        (x, dy): (&O::Buf, &O::Buf),
        grads: &mut [Option<AdapterGrads<O>>],
        thin: &mut Thin<O>,
    ) {
        for (index, rows, _) in self.own(pass) {
            let grads = grads.get_mut(index).and_then(Option::as_mut);
            let place = |grads: &&mut AdapterGrads<O>| grads.delta(self.at);
            let Some((place, grads)) = grads.and_then(|grads| Some((place(&grads)?, grads))) else {
                continue;
            };
            let (ops, at) = (pass.ops, numbers(rows, self.width));
            let Thin {
                direction,
                scaled,
                ones,
                ..
            } = &mut *thin;
            ops.resize(scaled, at.len());
            let normed = scaled.all_mut();
            ops.rms_norm(x.part(at.clone()), self.ones.all(), self.eps, normed);
            let size = (at.len() / self.weight.len(), self.weight.len());
            let (pair, sum) = ((scaled.all(), dy.part(at)), (direction, ones));
            add_products(ops, pair, size, sum, grads.part_mut(place));
        }
    }
}
