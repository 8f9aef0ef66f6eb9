//! AdamW (Loshchilov and Hutter, 2019; as `torch.optim.AdamW` computes it), with its state in the open.
//!
//! Works on one flat slice of parameters, in groups that have learning rates of their own. It must not know what the
//! parameters mean.

use std::ops::Range;

use crate::ops::Real;

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
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW<T = f32> {
    /// Steps done.
    pub step: u64,
    /// Mean gradients.
    pub mean: Vec<T>,
    /// Mean squared gradients.
    pub square: Vec<T>,
}

impl<T: Real> AdamW<T> {
    /// Before the first step of `len` parameters.
    pub fn new(len: usize) -> Self {
        Self {
            step: 0,
            mean: vec![T::ZERO; len],
            square: vec![T::ZERO; len],
        }
    }

    /// One step of every group. Gradients are multiplied by `scale` first (clipping).
    pub fn step(
        &mut self,
        config: &AdamWConfig,
        groups: &[Group],
        scale: f64,
        params: &mut [T],
        grads: &[T],
    ) {
        self.step += 1;
        for group in groups {
            self.update(config, group, scale, params, grads);
        }
    }

    /// Updates one group, or a part of one, at the step that [`AdamW::step`] counts: the caller counted it.
    pub fn update(
        &mut self,
        config: &AdamWConfig,
        group: &Group,
        scale: f64,
        params: &mut [T],
        grads: &[T],
    ) {
        let Group {
            range,
            learning_rate,
        } = group;
        let step = self.step.min(i32::MAX as u64) as i32;
        let correction1 = 1.0 - config.beta1.powi(step);
        let correction2 = (1.0 - config.beta2.powi(step)).sqrt();
        let (keep1, new1) = (T::from_f64(config.beta1), T::from_f64(1.0 - config.beta1));
        let (keep2, new2) = (T::from_f64(config.beta2), T::from_f64(1.0 - config.beta2));
        let (root, epsilon, scale) = (
            T::from_f64(correction2),
            T::from_f64(config.epsilon),
            T::from_f64(scale),
        );
        let shrink = T::from_f64(1.0 - learning_rate * config.weight_decay);
        let size = T::from_f64(learning_rate / correction1);
        let state = self.mean[range.clone()]
            .iter_mut()
            .zip(&mut self.square[range.clone()]);
        let both = params[range.clone()].iter_mut().zip(&grads[range.clone()]);
        for ((p, g), (m, v)) in both.zip(state) {
            let g = *g * scale;
            *m = keep1 * *m + new1 * g;
            *v = keep2 * *v + new2 * (g * g);
            *p = shrink * *p - size * (*m / (v.sqrt() / root + epsilon));
        }
    }
}

/// The global norm, summed in f64 in order.
pub fn norm<T: Real>(grads: &[T]) -> f64 {
    grads
        .iter()
        .map(|g| g.to_f64() * g.to_f64())
        .sum::<f64>()
        .sqrt()
}

/// What gradients of norm `norm` are multiplied by, so that they have `limit` at most (`torch.nn.utils.clip_grad_norm_`).
pub fn clip(norm: f64, limit: Option<f64>) -> f64 {
    limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: AdamWConfig = AdamWConfig {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.1,
    };

    // The closed form: after steps with constant gradient g, both corrected means are exactly g and g^2.
    #[test]
    fn constant_gradients_move_by_the_learning_rate() {
        let (mut adam, mut params) = (AdamW::<f64>::new(4), vec![1.0, -2.0, 3.0, 5.0]);
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
            adam.step(&CONFIG, &groups, 0.5, &mut params, &[4.0, -4.0, 8.0, 1.0]);
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
        assert_eq!(norm(&[3.0f32, 4.0]), 5.0);
        assert!((clip(5.0, Some(1.0)) - 0.2).abs() < 1e-6);
        assert_eq!((clip(0.5, Some(1.0)), clip(5.0, None)), (1.0, 1.0));
    }
}
