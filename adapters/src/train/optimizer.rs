//! AdamW (Loshchilov and Hutter, 2019; as `torch.optim.AdamW` computes it), with its state in the open.
//!
//! Works on one flat slice of parameters, in groups that have learning rates of their own. It must not know what the
//! parameters mean.

use std::ops::Range;

use crate::ops::{AdamWStep, Buffer, Ops, View, ViewMut};

/// The numbers of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean gradient.
    pub beta1: f64,
    /// Decay of the mean squared gradient.
    pub beta2: f64,
    /// Keeps the denominator away from zero.
    pub epsilon: f64,
    /// Decoupled: parameters shrink by `learning rate * weight_decay` before the step.
    pub weight_decay: f64,
}

/// Parameters with one learning rate.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Which of the parameters.
    pub range: Range<usize>,
    /// This step's learning rate.
    pub learning_rate: f64,
}

/// The optimizer's state.
#[derive(Debug)]
pub struct AdamW<O: Ops> {
    /// Steps done.
    pub step: u64,
    /// Mean gradients, exact.
    pub mean: O::Buf,
    /// Mean squared gradients, exact.
    pub square: O::Buf,
}

impl<O: Ops> AdamW<O> {
    /// Before the first step of `len` parameters.
    pub fn new(ops: &O, len: usize) -> Self {
        let zeros = || {
            let mut buffer = ops.exact();
            ops.resize(&mut buffer, len);
            ops.clear(buffer.all_mut());
            buffer
        };
        Self {
            step: 0,
            mean: zeros(),
            square: zeros(),
        }
    }

    /// Updates one group, or a part of one, at the step that [`AdamW::step`] counts: the caller counted it. `params` and `grads`
    /// are those of the group's range; gradients are multiplied by `scale` first (clipping).
    pub fn update(
        &mut self,
        ops: &O,
        config: &AdamWConfig,
        group: &Group,
        scale: f64,
        params: ViewMut<'_, O>,
        grads: View<'_, O>,
    ) {
        let Group {
            range,
            learning_rate,
        } = group;
        let step = self.step.min(i32::MAX as u64) as i32;
        let numbers = AdamWStep {
            scale,
            keep1: config.beta1,
            keep2: config.beta2,
            root: (1.0 - config.beta2.powi(step)).sqrt(),
            epsilon: config.epsilon,
            shrink: 1.0 - learning_rate * config.weight_decay,
            size: learning_rate / (1.0 - config.beta1.powi(step)),
        };
        let mean = self.mean.part_mut(range.clone());
        let square = self.square.part_mut(range.clone());
        ops.adamw(&numbers, params, grads, mean, square);
    }
}

/// The global norm of exact gradients.
pub fn norm<O: Ops>(ops: &O, grads: View<'_, O>) -> f64 {
    ops.sum_of_squares(grads).sqrt()
}

/// What gradients of norm `norm` are multiplied by, so that they have `limit` at most (`torch.nn.utils.clip_grad_norm_`).
pub fn clip(norm: f64, limit: Option<f64>) -> f64 {
    limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Reference;

    const CONFIG: AdamWConfig = AdamWConfig {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.1,
    };

    // The closed form: after steps with constant gradient g, both corrected means are exactly g and g^2.
    #[test]
    fn constant_gradients_move_by_the_learning_rate() {
        let ops = Reference::<f64>::default();
        let (mut adam, mut params) = (AdamW::new(&ops, 4), vec![1.0, -2.0, 3.0, 5.0]);
        let grads = [4.0, -4.0, 8.0, 1.0];
        let groups = [
            Group {
                range: 0..2,
                learning_rate: 0.5,
            },
            Group {
                range: 2..3,
                learning_rate: 0.25,
            },
        ];
        let mut expected = params.clone();
        for _ in 0..5 {
            adam.step += 1;
            for group in &groups {
                let at = group.range.clone();
                let params = &mut params[at.clone()];
                adam.update(&ops, &CONFIG, group, 0.5, params, &grads[at]);
            }
            for (p, (lr, sign)) in expected
                .iter_mut()
                .zip([(0.5, 1.0), (0.5, -1.0), (0.25, 1.0)])
            {
                *p = *p * (1.0 - lr * 0.1) - lr * sign;
            }
        }
        for (found, expected) in params.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-7, "{found} is not {expected}");
        }
        assert_eq!(params[3], 5.0, "a parameter in no group stays");
    }

    #[test]
    fn clipping_scales_only_what_is_too_long() {
        assert_eq!(norm(&Reference::<f32>::default(), &[3.0, 4.0]), 5.0);
        assert!((clip(5.0, Some(1.0)) - 0.2).abs() < 1e-6);
        assert_eq!((clip(0.5, Some(1.0)), clip(5.0, None)), (1.0, 1.0));
    }
}
