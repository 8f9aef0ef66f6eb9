//! Rotary positions: the angles of a batch's rows, computed once a step for all layers.
//!
//! transformers computes angles in f32, so angles are rounded to f32 here too; cosines and sines are then exact.

use espalier_adapters::ops::{Ops, Real};

use super::config::ModelConfig;

/// Cosines and sines of a batch's rows, `[rows, head_dim / 2]`.
#[derive(Debug, Default)]
pub(crate) struct Angles<T> {
    cos: Vec<T>,
    sin: Vec<T>,
}

/// The frequencies of a model.
#[derive(Debug)]
pub(crate) struct Rope {
    inverse_frequencies: Vec<f32>,
    head_dim: usize,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let inverse_frequencies = config.rope.inverse_frequencies(config.head_dim);
        Self {
            inverse_frequencies,
            head_dim: config.head_dim,
        }
    }

    /// The angles of rows at `positions`, in place of those that were there.
    pub(crate) fn angles<T: Real>(
        &self,
        positions: impl Iterator<Item = usize>,
        angles: &mut Angles<T>,
    ) {
        angles.cos.clear();
        angles.sin.clear();
        for position in positions {
            for frequency in &self.inverse_frequencies {
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                angles.cos.push(T::from_f64(cos));
                angles.sin.push(T::from_f64(sin));
            }
        }
    }

    /// Turns the heads of `x [rows, heads * head_dim]` by their rows' angles, or back.
    pub(crate) fn turn<O: Ops>(
        &self,
        ops: &O,
        angles: &Angles<O::T>,
        x: &mut [O::T],
        inverse: bool,
    ) {
        ops.rope(x, self.head_dim, &angles.cos, &angles.sin, inverse);
    }
}
