//! Keys and values of all running sequences, in blocks of rows that block tables index.
//!
//! Who owns which block is the block manager's business; this only holds numbers.

use espalier_adapters::ops::{Backend, Buffer, Ops};

use crate::model::ModelConfig;

/// For each layer, keys `[blocks, kv_heads, head_dim, block_size]` and values `[blocks, kv_heads, block_size, head_dim]`, as
/// [`KvRows::Paged`](espalier_adapters::ops::KvRows::Paged) has them. Rows are written before they are read, so nothing is
/// ever cleared.
#[derive(Debug)]
pub struct KvCache<O: Ops = Backend> {
    layers: Vec<LayerKv<O>>,
    width: usize,
    blocks: usize,
    block_size: usize,
}

/// One layer's blocks.
#[derive(Debug)]
pub(crate) struct LayerKv<O: Ops> {
    pub(crate) k: O::Buf,
    pub(crate) v: O::Buf,
}

impl<O: Ops> KvCache<O> {
    /// Room for `blocks` blocks of `block_size` tokens.
    pub fn new(ops: &O, config: &ModelConfig, blocks: usize, block_size: usize) -> Self {
        let width = config.kv_width();
        let rows = || {
            let mut rows = ops.working();
            ops.resize(&mut rows, blocks * block_size * width);
            rows
        };
        let layers = (0..config.layers)
            .map(|_| LayerKv {
                k: rows(),
                v: rows(),
            })
            .collect();
        Self {
            layers,
            width,
            blocks,
            block_size,
        }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Tokens in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Copies a block's rows in every layer: for sequences that share a prefix and then part.
    pub fn copy_block(&mut self, ops: &O, from: u32, to: u32) {
        let len = self.block_size * self.width;
        let (from, to) = (from as usize * len, to as usize * len);
        for layer in &mut self.layers {
            ops.copy_within(&mut layer.k, from..from + len, to);
            ops.copy_within(&mut layer.v, from..from + len, to);
        }
    }

    /// Where the first keys are, which tells this cache from any other.
    pub(crate) fn place(&self) -> u64 {
        self.layers.first().map_or(0, |layer| layer.k.place())
    }

    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut LayerKv<O> {
        &mut self.layers[layer]
    }
}
