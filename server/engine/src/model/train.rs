//! The decoder's pass over a micro-batch that is trained on: forward with what the backward pass reads, and back.
//!
//! The blocks are those of serving; keys and values are the micro-batch's own rows. Nothing is computed below the lowest
//! adapted layer on the way back, and nothing kept there on the way up.

use std::ops::Range;

use espalier_adapters::batch::Pass;
use espalier_adapters::linear::AdapterGrads;
use espalier_adapters::ops::{Backend, Buffer, Ops};
use espalier_adapters::pace::Stopped;

use super::attention::{Places, flat_span, grouped, shape};
use super::config::ModelConfig;
use super::decoder::{Activations, Decoder, Workspace};
use super::rope::Angles;

/// A micro-batch: examples packed one after the other, without padding. Attention never crosses examples.
#[derive(Clone, Copy, Debug)]
pub struct TrainRows<'a> {
    /// A token id for each row.
    pub tokens: &'a [u32],
    /// The rows of each example, adjacent and in order.
    pub sequences: &'a [Range<usize>],
}

/// What a forward pass keeps. Buffers are reused by the next one.
#[derive(Debug)]
pub struct Saved<O: Ops = Backend> {
    /// The lowest layer that a gradient is wanted of; `None` keeps nothing.
    pub lowest: Option<usize>,
    /// Keep only the blocks' inputs, and run each block again on the way back: for a sequence that alone exceeds the budget.
    pub inputs_only: bool,
    layers: Vec<Activations<O>>,
    inputs: Vec<O::Buf>,
    /// The last block's output.
    last: O::Buf,
}

impl<O: Ops> Saved<O> {
    /// Empty buffers; they grow with the first passes.
    pub fn new(ops: &O) -> Self {
        Self {
            lowest: None,
            inputs_only: false,
            layers: Vec::new(),
            inputs: Vec::new(),
            last: ops.working(),
        }
    }

    /// Bytes that one row costs with `layers` layers kept.
    pub fn row_bytes(ops: &O, config: &ModelConfig, layers: usize) -> usize {
        layers * Activations::row_bytes(ops, config)
    }
}

impl<O: Ops> Decoder<O> {
    /// The states after the final norm, `[rows, hidden]`. Runs on the pass's operations, which may be those beside the model's.
    ///
    /// # Errors
    /// [`Stopped`] when the pace says so.
    pub fn forward_train<'w>(
        &self,
        pass: &Pass<'_, O>,
        rows: TrainRows<'_>,
        saved: &mut Saved<O>,
        workspace: &'w mut Workspace<O>,
    ) -> Result<&'w O::Buf, Stopped> {
        let (ops, config) = (pass.ops, self.config());
        let count = rows.tokens.len();
        let Workspace {
            stream,
            hidden,
            act,
            scratch,
            angles,
            positions,
            ..
        } = workspace;
        self.embed(pass, rows.tokens, stream);
        act.resize(ops, config, count);
        scratch.resize(ops, config, count, false);
        positions.clear();
        positions.extend(rows.sequences.iter().flat_map(|rows| 0..rows.len() as u32));
        self.rope.angles(ops, positions, angles);
        let places = self.flat_places(pass, rows, angles);
        let lowest = saved.lowest.unwrap_or(config.layers);
        let kept = config.layers - lowest;
        saved
            .layers
            .resize_with(if saved.inputs_only { 0 } else { kept }, || {
                Activations::new(ops)
            });
        saved
            .inputs
            .resize_with(if saved.inputs_only { kept } else { 0 }, || ops.working());
        for (layer, block) in self.blocks.iter().enumerate() {
            let keeps = layer >= lowest;
            let target = if keeps && !saved.inputs_only {
                let own = &mut saved.layers[layer - lowest];
                own.resize(ops, config, count);
                own
            } else {
                &mut *act
            };
            block.forward(pass, &places, stream, (target, keeps), scratch, None)?;
            if keeps && saved.inputs_only {
                std::mem::swap(&mut saved.inputs[layer - lowest], &mut act.x);
            }
            pass.pace.breathe()?;
        }
        ops.resize(hidden, stream.sum().len());
        stream.norm(pass, &self.norm, hidden);
        stream.keep(ops, &mut saved.last);
        Ok(hidden)
    }

    /// Each example's rows, whose keys and values attention reads where they lie.
    fn flat_places<'a>(
        &'a self,
        pass: &Pass<'_, O>,
        rows: TrainRows<'_>,
        angles: &'a Angles<O>,
    ) -> Places<'a, O> {
        let spans = rows.sequences.iter().map(flat_span);
        Places {
            rope: &self.rope,
            angles,
            groups: grouped(pass.ops, pass.pace, shape(self.config()), spans),
            kv_rows: pass.ops.ids(&[]),
            block_size: 1,
        }
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
        saved: &mut Saved<O>,
        dhidden: &O::Buf,
        grads: &mut [Option<AdapterGrads<O>>],
        workspace: &mut Workspace<O>,
    ) -> Result<(), Stopped> {
        let (ops, config) = (pass.ops, self.config());
        let Some(lowest) = saved.lowest else {
            return Ok(());
        };
        let Workspace {
            stream: again,
            hidden: dx,
            act,
            scratch,
            angles,
            ..
        } = workspace;
        scratch.resize(ops, config, rows.tokens.len(), true);
        let places = self.flat_places(pass, rows, angles);
        ops.clear(dx.all_mut());
        let ends = (&saved.last, dhidden);
        self.norm.gradients(pass, ends, grads, &mut scratch.thin);
        self.norm.backward(pass, &saved.last, dhidden, dx);
        let reaches_tokens = self.vocabulary.is_embedding_trained(grads);
        for (layer, block) in self.blocks.iter().enumerate().skip(lowest).rev() {
            let act = if saved.inputs_only {
                let input = &saved.inputs[layer - lowest];
                ops.copy(input.all(), again.begin(ops, input.len()).all_mut());
                block.forward(pass, &places, again, (act, true), scratch, None)?;
                &mut *act
            } else {
                &mut saved.layers[layer - lowest]
            };
            let last = layer == lowest && !reaches_tokens;
            block.mlp.backward(pass, act, dx, grads, scratch)?;
            block
                .attention
                .backward(pass, &places, act, (dx, last), grads, scratch)?;
            pass.pace.breathe()?;
        }
        let below = (rows.tokens, &*dx);
        self.vocabulary
            .embedding_gradients(pass, below, grads, &mut scratch.thin);
        Ok(())
    }
}
