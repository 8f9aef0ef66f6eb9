//! RMS norm with its weight.

use espalier_adapters::ops::{Buffer, Ops, Real};

/// `y = x / sqrt(mean(x^2) + eps) * weight`.
#[derive(Debug)]
pub(crate) struct RmsNorm<O: Ops> {
    weight: O::Buf,
    eps: f64,
}

impl<O: Ops> RmsNorm<O> {
    pub(crate) fn new(ops: &O, weight: &[f32], eps: f32) -> Self {
        let numbers: Vec<O::T> = weight.iter().map(|w| O::T::from_f32(*w)).collect();
        let mut weight = ops.working();
        ops.resize(&mut weight, numbers.len());
        ops.write(&numbers, weight.all_mut());
        Self {
            weight,
            eps: f64::from(eps),
        }
    }

    pub(crate) fn forward(&self, ops: &O, x: &O::Buf, y: &mut O::Buf) {
        ops.rms_norm(x.all(), self.weight.all(), self.eps, y.all_mut());
    }

    /// `x += delta`, then the norm of that.
    pub(crate) fn forward_sum(&self, ops: &O, delta: &O::Buf, x: &mut O::Buf, y: &mut O::Buf) {
        ops.add_rms_norm(delta.all(), x, self.weight.all(), self.eps, y.all_mut());
    }

    /// `dx += ` the gradient of `x`.
    pub(crate) fn backward(&self, ops: &O, x: &O::Buf, dy: &O::Buf, dx: &mut O::Buf) {
        let weight = self.weight.all();
        ops.rms_norm_backward(x.all(), weight, self.eps, dy.all(), dx.all_mut());
    }
}
