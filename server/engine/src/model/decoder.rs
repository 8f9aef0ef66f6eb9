//! The decoder: embedding, blocks, final norm, head; and its pass over a mixed batch with paged keys and values.
//!
//! One decoder runs every family: what differs (biases, head norms, window, tied head) is read from the configuration.

use espalier_adapters::batch::{Pass, Thin};
use espalier_adapters::config::Site;
use espalier_adapters::linear::{BaseSites, LoraLinear};
use espalier_adapters::ops::{AttentionSpan, KvRows, Ops, Real};
use espalier_adapters::pace::{Stopped, Unpaced};

use super::Batch;
use super::attention::{Attention, Places, grouped, shape};
use super::config::ModelConfig;
use super::dtype::WeightFormats;
use super::error::ModelError;
use super::mlp::Mlp;
use super::norm::RmsNorm;
use super::rope::{Angles, Rope};
use super::weights::{ModelWeights, Slot};
use crate::kv_cache::{KvCache, LayerKv};

/// A base model in the operations' layout. Immutable; shared by serving and training.
#[derive(Debug)]
pub struct Decoder<O: Ops> {
    pub(crate) ops: O,
    config: ModelConfig,
    embed: O::Matrix,
    pub(crate) blocks: Vec<Block<O>>,
    pub(crate) norm: RmsNorm<O::T>,
    head: Option<O::Matrix>,
    pub(crate) rope: Rope,
}

/// One block.
#[derive(Debug)]
pub(crate) struct Block<O: Ops> {
    pub(crate) attention: Attention<O>,
    pub(crate) mlp: Mlp<O>,
}

/// What one block leaves for its backward pass; in serving, one set that every block writes over. `[rows, width]` each.
#[derive(Debug, Default)]
pub(crate) struct Activations<T> {
    /// The block's input; kept in training only.
    pub(crate) x: Vec<T>,
    /// Queries before norm and rope.
    pub(crate) q: Vec<T>,
    /// Keys before norm and rope.
    pub(crate) k: Vec<T>,
    pub(crate) v: Vec<T>,
    /// Attention's output before the output projection.
    pub(crate) attn: Vec<T>,
    /// `[rows, heads]`; kept in training only.
    pub(crate) lse: Vec<T>,
    /// The residual between attention and MLP; kept in training only.
    pub(crate) mid: Vec<T>,
    pub(crate) gate: Vec<T>,
    pub(crate) up: Vec<T>,
}

/// What no block leaves behind.
#[derive(Debug, Default)]
pub(crate) struct Scratch<T> {
    pub(crate) norm: Vec<T>,
    pub(crate) q: Vec<T>,
    pub(crate) k: Vec<T>,
    pub(crate) inner: Vec<T>,
    pub(crate) dnorm: Vec<T>,
    pub(crate) dattn: Vec<T>,
    pub(crate) dq: Vec<T>,
    pub(crate) dk: Vec<T>,
    pub(crate) dv: Vec<T>,
    pub(crate) dinner: Vec<T>,
    pub(crate) thin: Thin<T>,
}

/// Buffers of a pass, reused by the next one: nothing is allocated per layer, and nothing at all once they have grown.
#[derive(Debug, Default)]
pub struct Workspace<T = f32> {
    pub(crate) x: Vec<T>,
    pub(crate) hidden: Vec<T>,
    pub(crate) act: Activations<T>,
    pub(crate) scratch: Scratch<T>,
    pub(crate) angles: Angles<T>,
    kv_rows: Vec<usize>,
}

// === impl Activations ===

impl<T: Real> Activations<T> {
    pub(crate) fn resize(&mut self, config: &ModelConfig, rows: usize, keep: bool) {
        let kept = if keep { rows } else { 0 };
        let sizes = [
            (&mut self.x, kept * config.hidden),
            (&mut self.q, rows * config.q_width()),
            (&mut self.k, rows * config.kv_width()),
            (&mut self.v, rows * config.kv_width()),
            (&mut self.attn, rows * config.q_width()),
            (&mut self.lse, rows * config.heads),
            (&mut self.mid, kept * config.hidden),
            (&mut self.gate, rows * config.intermediate),
            (&mut self.up, rows * config.intermediate),
        ];
        for (buffer, len) in sizes {
            buffer.resize(len, T::ZERO);
        }
    }

    /// Bytes for each row.
    pub(crate) fn row_bytes(config: &ModelConfig) -> usize {
        let numbers = 2
            * (config.hidden + config.q_width() + config.kv_width() + config.intermediate)
            + config.heads;
        numbers * size_of::<T>()
    }
}

// === impl Scratch ===

impl<T: Real> Scratch<T> {
    pub(crate) fn resize(&mut self, config: &ModelConfig, rows: usize, backward: bool) {
        let back = if backward { rows } else { 0 };
        let sizes = [
            (&mut self.norm, rows * config.hidden),
            (&mut self.q, rows * config.q_width()),
            (&mut self.k, rows * config.kv_width()),
            (&mut self.inner, rows * config.intermediate),
            (&mut self.dnorm, back * config.hidden),
            (&mut self.dattn, back * config.q_width()),
            (&mut self.dq, back * config.q_width()),
            (&mut self.dk, back * config.kv_width()),
            (&mut self.dv, back * config.kv_width()),
            (&mut self.dinner, back * config.intermediate),
        ];
        for (buffer, len) in sizes {
            buffer.resize(len, T::ZERO);
        }
    }
}

// === impl Workspace ===

impl<T> Workspace<T>
where
    Self: Default,
{
    /// Empty buffers; they grow with the first passes.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Packs the matrix of `slot`, which leaves `weights` by that.
pub(crate) fn packed<O: Ops>(
    ops: &O,
    config: &ModelConfig,
    weights: &mut ModelWeights,
    slot: Slot,
) -> O::Matrix {
    let shape = slot.shape(config);
    let weight = weights.take(slot).unwrap_or_default();
    ops.pack_weight(&weight, shape[0], shape[1])
}

// === impl Block ===

impl<O: Ops> Block<O> {
    /// `x` becomes the block's output. With `keep`, `act` gets all that the backward pass reads.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, O>,
        places: &Places<'_, O::T>,
        x: &mut [O::T],
        (act, keep): (&mut Activations<O::T>, bool),
        scratch: &mut Scratch<O::T>,
        cache: Option<&mut LayerKv<O::T>>,
    ) -> Result<(), Stopped> {
        if keep {
            act.x.copy_from_slice(x);
        }
        self.attention
            .forward(pass, places, x, act, scratch, cache)?;
        if keep {
            act.mid.copy_from_slice(x);
        }
        self.mlp.forward(pass, x, act, scratch)
    }
}

// === impl Decoder ===

impl<O: Ops> Decoder<O> {
    /// Packs a model's weights, each one dropped as soon as it is packed: there is never a second copy of all.
    ///
    /// # Errors
    /// [`ModelError`] when the weights are not those of the configuration.
    pub fn new(config: ModelConfig, mut weights: ModelWeights) -> Result<Self, ModelError> {
        config.validate("configuration")?;
        weights.check(&config, "weights")?;
        let ops = O::default();
        let head = match config.tie_embeddings {
            true => None,
            false => Some(packed(&ops, &config, &mut weights, Slot::LmHead)),
        };
        let embed = packed(&ops, &config, &mut weights, Slot::Embed);
        let blocks = (0..config.layers)
            .map(|layer| Block {
                attention: Attention::new(&ops, &config, layer, &mut weights),
                mlp: Mlp::new(&ops, &config, layer, &mut weights),
            })
            .collect();
        let norm = RmsNorm::new(&weights.norm, config.rms_eps);
        let rope = Rope::new(&config);
        Ok(Self {
            ops,
            embed,
            blocks,
            norm,
            head,
            rope,
            config,
        })
    }

    /// The model's sizes and options.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// How many matrices of each format there are, and their bytes.
    pub fn formats(&self) -> WeightFormats {
        let sites = (0..self.config.layers).flat_map(|layer| Site::ALL.map(|site| (layer, site)));
        let blocks = sites.map(|(layer, site)| self.weight(layer, site));
        let mut formats = WeightFormats::default();
        for matrix in blocks.chain([&self.embed]).chain(&self.head) {
            formats.add(self.ops.kind(matrix), self.ops.bytes(matrix));
        }
        formats
    }

    /// Bytes of all packed matrices.
    pub fn bytes(&self) -> usize {
        self.formats().bytes()
    }

    /// The output head `[vocab, hidden]`.
    pub fn head(&self) -> &O::Matrix {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    pub(crate) fn embed(&self, tokens: &[u32], x: &mut Vec<O::T>) {
        x.resize(tokens.len() * self.config.hidden, O::T::ZERO);
        self.ops.gather(&self.embed, tokens, x);
    }

    /// One step: the states after the final norm, `[rows, hidden]`. Writes the rows' keys and values to the cache.
    ///
    /// # Panics
    /// On a token, block or row out of range: the scheduler's mistake, not a caller's.
    pub fn forward<'w>(
        &self,
        batch: &Batch<'_, O>,
        kv: &mut KvCache<O::T>,
        workspace: &'w mut Workspace<O::T>,
    ) -> &'w [O::T] {
        let rows = batch.tokens.len();
        let block_size = kv.block_size();
        let Workspace {
            x,
            hidden,
            act,
            scratch,
            angles,
            kv_rows,
        } = workspace;
        self.embed(batch.tokens, x);
        act.resize(&self.config, rows, false);
        scratch.resize(&self.config, rows, false);
        kv_rows.clear();
        for span in batch.spans {
            let place = KvRows::Paged {
                table: span.block_table,
                block_size,
            };
            kv_rows.extend((0..span.rows.len()).map(|i| place.row(span.start_pos + i)));
        }
        let positions = batch
            .spans
            .iter()
            .flat_map(|span| span.start_pos..span.start_pos + span.rows.len());
        self.rope.angles(positions, angles);
        let spans = batch.spans.iter().map(|span| AttentionSpan {
            rows: span.rows.clone(),
            start: span.start_pos,
            kv: KvRows::Paged {
                table: span.block_table,
                block_size,
            },
        });
        let groups = grouped(&Unpaced, shape(&self.config), spans);
        let places = Places {
            rope: &self.rope,
            angles,
            groups: &groups,
            kv_rows,
            block_size,
        };
        let pass = Pass {
            ops: &self.ops,
            segments: batch.segments,
            overlays: batch.overlays,
            pace: &Unpaced,
            dropout: None,
        };
        for (layer, block) in self.blocks.iter().enumerate() {
            let cache = Some(kv.layer_mut(layer));
            let done = block.forward(&pass, &places, x, (act, false), scratch, cache);
            debug_assert!(done.is_ok(), "nothing stops an unpaced pass");
        }
        hidden.resize(x.len(), O::T::ZERO);
        self.norm.forward(&self.ops, x, hidden);
        hidden
    }

    /// The logits `[n, vocab]` of states `[n, hidden]` after the final norm.
    pub fn logits(&self, hidden: &[O::T], out: &mut [O::T]) {
        self.ops.matmul(hidden, self.head(), out);
    }

    fn linear(&self, layer: usize, site: Site) -> &LoraLinear<O> {
        let Block { attention, mlp } = &self.blocks[layer];
        match site {
            Site::Q => &attention.q,
            Site::K => &attention.k,
            Site::V => &attention.v,
            Site::O => &attention.o,
            Site::Gate => &mlp.gate,
            Site::Up => &mlp.up,
            Site::Down => &mlp.down,
        }
    }
}

impl<O: Ops> BaseSites<O> for Decoder<O> {
    fn ops(&self) -> &O {
        &self.ops
    }

    fn layers(&self) -> usize {
        self.config.layers
    }

    fn weight(&self, layer: usize, site: Site) -> &O::Matrix {
        self.linear(layer, site).weight()
    }

    fn hidden(&self) -> usize {
        self.config.hidden
    }
}
