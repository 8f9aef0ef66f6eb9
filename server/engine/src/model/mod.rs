//! The base model: one decoder for every family, written once for serving and for training.
//!
//! Knows rows, adapters by segment, and paged keys and values. It must not know requests, sequences' states or who
//! waits for whom.

pub mod config;
pub mod dtype;
pub mod error;
pub mod weights;

mod hf_config;
mod hf_write;
mod load;
mod load_gguf;
mod load_hf;
#[cfg(test)]
mod load_tests;
mod merge;
mod safetensors_file;
mod synthetic;
mod tiny;

mod attention;
mod decoder;
mod mlp;
mod rope;
mod stream;
mod train;

use std::ops::Range;

use espalier_adapters::batch::{Covered, Segment};
use espalier_adapters::ops::{Backend, Ops};

pub use config::{Family, ModelConfig, RopeConfig, RopeScaling};
pub use decoder::{Decoder, Workspace};
pub use dtype::{Dtype, WeightFormats};
pub use error::ModelError;
pub use hf_write::FileNumbers;
pub use load::{LoadedModel, load, load_as};
pub use merge::{MergedModel, write_merged};
pub use train::{Saved, TrainRows};
pub use weights::{LayerWeights, ModelWeights};

pub use crate::kv_cache::KvCache;
pub use espalier_adapters::linear::{BaseSites, ResidentAdapter};

/// The decoder that the server runs.
pub type Model = Decoder<Backend>;

/// Numbers where that decoder works.
pub type Buf = <Backend as Ops>::Buf;

/// Adjacent rows of one sequence in a step.
#[derive(Clone, Debug)]
pub struct SeqSpan<'a> {
    /// Which rows of the batch.
    pub rows: Range<usize>,
    /// The position of the first of them in its sequence; the keys and values of all positions before it are cached.
    pub start_pos: usize,
    /// The sequence's KV blocks, enough for its last row here.
    pub block_table: &'a [u32],
}

/// One step's rows. Spans cover the rows in order; segments and overlays are in row order and need not cover all.
#[derive(Clone, Debug)]
pub struct Batch<'a, O: Ops = Backend> {
    /// A token id for each row, each below the vocabulary's size.
    pub tokens: &'a [u32],
    /// Whose rows they are.
    pub spans: &'a [SeqSpan<'a>],
    /// Which adapter they run with.
    pub segments: &'a [Segment<O>],
    /// Which rows merged weights answer.
    pub overlays: &'a [Covered<'a, O::Matrix>],
}

#[cfg(test)]
pub(crate) mod tests;
