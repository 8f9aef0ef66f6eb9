//! Keys and values of all running sequences, in blocks of rows that block tables index.
//!
//! Who owns which block is the block manager's business; this only holds numbers.

use espalier_adapters::ops::Real;

use crate::model::ModelConfig;

/// For each layer, keys `[blocks, kv_heads, head_dim, block_size]` and values `[blocks, kv_heads, block_size, head_dim]`, as
/// [`KvRows::Paged`](espalier_adapters::ops::KvRows::Paged) has them. Rows are written before they are read, so nothing is
/// ever cleared.
#[derive(Debug)]
pub struct KvCache<T = f32> {
    layers: Vec<LayerKv<T>>,
    width: usize,
    blocks: usize,
    block_size: usize,
}

/// One layer's blocks.
#[derive(Debug)]
pub(crate) struct LayerKv<T> {
    pub(crate) k: Vec<T>,
    pub(crate) v: Vec<T>,
}

impl<T: Real> KvCache<T> {
    /// Room for `blocks` blocks of `block_size` tokens.
    pub fn new(config: &ModelConfig, blocks: usize, block_size: usize) -> Self {
        let width = config.kv_width();
        let rows = || vec![T::ZERO; blocks * block_size * width];
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

    /// Bytes of one block over all layers.
    pub fn block_bytes(config: &ModelConfig, block_size: usize) -> usize {
        2 * config.layers * block_size * config.kv_width() * size_of::<T>()
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
    pub fn copy_block(&mut self, from: u32, to: u32) {
        let len = self.block_size * self.width;
        let (from, to) = (from as usize * len, to as usize * len);
        for layer in &mut self.layers {
            layer.k.copy_within(from..from + len, to);
            layer.v.copy_within(from..from + len, to);
        }
    }

    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut LayerKv<T> {
        &mut self.layers[layer]
    }
}
