//! Rotary positions: the angles of every position, computed once, and those of a batch's rows, gathered once a step for all
//! layers.
//!
//! transformers computes angles in f32, so angles are rounded to f32 here too; cosines and sines are then exact, and rounded
//! to f32 once.

use espalier_adapters::ops::{Buffer, Ops};

use super::config::ModelConfig;

/// Cosines and sines of a batch's rows, `[rows, head_dim / 2]`.
#[derive(Debug)]
pub(crate) struct Angles<O: Ops> {
    cos: O::Buf,
    sin: O::Buf,
}

/// The angles of a model's positions, `[context, head_dim / 2]`.
#[derive(Debug)]
pub(crate) struct Rope<O: Ops> {
    cos: O::Matrix,
    sin: O::Matrix,
    head_dim: usize,
}

impl<O: Ops> Angles<O> {
    pub(crate) fn new(ops: &O) -> Self {
        Self {
            cos: ops.exact(),
            sin: ops.exact(),
        }
    }
}

impl<O: Ops> Rope<O> {
    pub(crate) fn new(ops: &O, config: &ModelConfig) -> Self {
        let frequencies = config.rope.inverse_frequencies(config.head_dim);
        let (context, half) = (config.context_length, frequencies.len());
        let angles =
            (0..context).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        let rounded = angles.map(|angle| {
            let (sin, cos) = f64::from(angle).sin_cos();
            (sin as f32, cos as f32)
        });
        let (sin, cos): (Vec<f32>, Vec<f32>) = rounded.unzip();
        Self {
            cos: ops.pack(&cos, context, half),
            sin: ops.pack(&sin, context, half),
            head_dim: config.head_dim,
        }
    }

    /// The angles of rows at `positions`, each below the context's length, in place of those that were there.
    pub(crate) fn angles(&self, ops: &O, positions: &[u32], angles: &mut Angles<O>) {
        let len = positions.len() * (self.head_dim / 2);
        let positions = ops.ids(positions);
        for (table, out) in [(&self.cos, &mut angles.cos), (&self.sin, &mut angles.sin)] {
            ops.resize(out, len);
            ops.gather(table, positions, out.all_mut());
        }
    }

    /// Turns the heads of `x [rows, heads * head_dim]` by their rows' angles, or back.
    pub(crate) fn turn(&self, ops: &O, angles: &Angles<O>, x: &mut O::Buf, inverse: bool) {
        let (cos, sin) = (angles.cos.all(), angles.sin.all());
        ops.rope(x.all_mut(), self.head_dim, cos, sin, inverse);
    }
}
