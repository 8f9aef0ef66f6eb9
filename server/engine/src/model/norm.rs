//! RMS norm with its weight.

use espalier_adapters::ops::{Ops, Real};

/// `y = x / sqrt(mean(x^2) + eps) * weight`.
#[derive(Debug)]
pub(crate) struct RmsNorm<T> {
    weight: Vec<T>,
    eps: f64,
}

impl<T: Real> RmsNorm<T> {
    pub(crate) fn new(weight: &[f32], eps: f32) -> Self {
        let weight = weight.iter().map(|w| T::from_f32(*w)).collect();
        Self {
            weight,
            eps: f64::from(eps),
        }
    }

    pub(crate) fn forward<O: Ops<T = T>>(&self, ops: &O, x: &[T], y: &mut [T]) {
        ops.rms_norm(x, &self.weight, self.eps, y);
    }

    /// `dx += ` the gradient of `x`.
    pub(crate) fn backward<O: Ops<T = T>>(&self, ops: &O, x: &[T], dy: &[T], dx: &mut [T]) {
        ops.rms_norm_backward(x, &self.weight, self.eps, dy, dx);
    }
}
