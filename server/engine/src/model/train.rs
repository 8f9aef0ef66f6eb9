//! The decoder's pass over a micro-batch that is trained on: forward with what the backward pass reads, and back.
//!
//! The blocks are those of serving; keys and values are the micro-batch's own rows. Nothing is computed below the lowest
//! adapted layer on the way back, and nothing kept there on the way up.

use std::ops::Range;

use espalier_adapters::batch::Pass;
use espalier_adapters::linear::AdapterGrads;
use espalier_adapters::ops::{Ops, Real};
use espalier_adapters::pace::Stopped;

use super::attention::{Places, flat_span, grouped, shape};
use super::config::ModelConfig;
use super::decoder::{Activations, Decoder, Workspace};

/// A micro-batch: examples packed one after the other, without padding. Attention never crosses examples.
#[derive(Clone, Copy, Debug)]
pub struct TrainRows<'a> {
    /// A token id for each row.
    pub tokens: &'a [u32],
    /// The rows of each example, adjacent and in order.
    pub sequences: &'a [Range<usize>],
}

/// What a forward pass keeps. Buffers are reused by the next one.
#[derive(Debug, Default)]
pub struct Saved<T = f32> {
    /// The lowest layer that a gradient is wanted of; `None` keeps nothing.
    pub lowest: Option<usize>,
    /// Keep only the blocks' inputs, and run each block again on the way back: for a sequence that alone exceeds the budget.
    pub inputs_only: bool,
    layers: Vec<Activations<T>>,
    inputs: Vec<Vec<T>>,
    /// The last block's output.
    last: Vec<T>,
}

impl<T: Real> Saved<T> {
    /// Bytes that one row costs with `layers` layers kept.
    pub fn row_bytes(config: &ModelConfig, layers: usize) -> usize {
        layers * Activations::<T>::row_bytes(config)
    }
}

impl<O: Ops> Decoder<O> {
    /// The states after the final norm, `[rows, hidden]`.
    ///
    /// # Errors
    /// [`Stopped`] when the pace says so.
    pub fn forward_train<'w>(
        &self,
        pass: &Pass<'_, O>,
        rows: TrainRows<'_>,
        saved: &mut Saved<O::T>,
        workspace: &'w mut Workspace<O::T>,
    ) -> Result<&'w [O::T], Stopped> {
        let config = self.config();
        let count = rows.tokens.len();
        let Workspace {
            x,
            hidden,
            act,
            scratch,
            angles,
            ..
        } = workspace;
        self.embed(rows.tokens, x);
        act.resize(config, count, saved.inputs_only);
        scratch.resize(config, count, false);
        self.rope
            .angles(rows.sequences.iter().flat_map(|rows| 0..rows.len()), angles);
        let groups = grouped(
            pass.pace,
            shape(config),
            rows.sequences.iter().map(flat_span),
        );
        let places = Places {
            rope: &self.rope,
            angles,
            groups: &groups,
            kv_rows: &[],
            block_size: 1,
        };
        let lowest = saved.lowest.unwrap_or(config.layers);
        let kept = config.layers - lowest;
        saved.layers.resize_with(
            if saved.inputs_only { 0 } else { kept },
            Activations::default,
        );
        saved
            .inputs
            .resize_with(if saved.inputs_only { kept } else { 0 }, Vec::new);
        for (layer, block) in self.blocks.iter().enumerate() {
            let target = if layer < lowest {
                (&mut *act, saved.inputs_only)
            } else if saved.inputs_only {
                let input = &mut saved.inputs[layer - lowest];
                input.clear();
                input.extend_from_slice(x);
                (&mut *act, true)
            } else {
                let own = &mut saved.layers[layer - lowest];
                own.resize(config, count, true);
                (own, true)
            };
            block.forward(pass, &places, x, target, scratch, None)?;
            pass.pace.breathe()?;
        }
        saved.last.clear();
        saved.last.extend_from_slice(x);
        hidden.resize(x.len(), O::T::ZERO);
        self.norm.forward(&self.ops, x, hidden);
        Ok(hidden)
    }

    /// From the gradient of [`Decoder::forward_train`]'s output, which is used up, adds each segment's gradients to `grads` at
    /// the segment's index. Uses up what was saved.
    ///
    /// # Errors
    /// [`Stopped`] when the pace says so.
    pub fn backward(
        &self,
        pass: &Pass<'_, O>,
        rows: TrainRows<'_>,
        saved: &mut Saved<O::T>,
        dhidden: &[O::T],
        grads: &mut [Option<AdapterGrads<O::T>>],
        workspace: &mut Workspace<O::T>,
    ) -> Result<(), Stopped> {
        let config = self.config();
        let Some(lowest) = saved.lowest else {
            return Ok(());
        };
        let Workspace {
            x,
            hidden: again,
            act,
            scratch,
            angles,
            ..
        } = workspace;
        scratch.resize(config, rows.tokens.len(), true);
        let groups = grouped(
            pass.pace,
            shape(config),
            rows.sequences.iter().map(flat_span),
        );
        let places = Places {
            rope: &self.rope,
            angles,
            groups: &groups,
            kv_rows: &[],
            block_size: 1,
        };
        let dx = x;
        dx.fill(O::T::ZERO);
        self.norm.backward(&self.ops, &saved.last, dhidden, dx);
        for (layer, block) in self.blocks.iter().enumerate().skip(lowest).rev() {
            let act = if saved.inputs_only {
                again.clear();
                again.extend_from_slice(&saved.inputs[layer - lowest]);
                block.forward(pass, &places, again, (act, true), scratch, None)?;
                &mut *act
            } else {
                &mut saved.layers[layer - lowest]
            };
            block.mlp.backward(pass, act, dx, grads, scratch)?;
            block
                .attention
                .backward(pass, &places, act, (dx, layer == lowest), grads, scratch)?;
            pass.pace.breathe()?;
        }
        Ok(())
    }
}
