//! The decoder: embedding, blocks, final norm, head; and its pass over a mixed batch with paged keys and values.
//!
//! One decoder runs every family: what differs (biases, head norms, window, tied head) is read from the configuration.

use espalier_adapters::batch::{Pass, Segment, Thin};
use espalier_adapters::config::{BaseTensor, LayerTensor, Site};
use espalier_adapters::linear::{BaseSites, LoraLinear, RmsNorm, Vocabulary};
use espalier_adapters::ops::{AttentionSpan, Backend, Buffer, KvRows, NO_ROW, Ops, View};
use espalier_adapters::pace::{Stopped, Unpaced};

use super::Batch;
use super::attention::{Attention, Places, grouped, shape};
use super::config::ModelConfig;
use super::dtype::WeightFormats;
use super::error::ModelError;
use super::mlp::Mlp;
use super::rope::{Angles, Rope};
use super::stream::Stream;
use super::weights::{ModelWeights, Slot};
use crate::kv_cache::{KvCache, LayerKv};

/// A base model in the operations' layout. Immutable; shared by serving and training.
#[derive(Debug)]
pub struct Decoder<O: Ops> {
    pub(crate) ops: O,
    config: ModelConfig,
    pub(crate) vocabulary: Vocabulary<O>,
    pub(crate) blocks: Vec<Block<O>>,
    pub(crate) norm: RmsNorm<O>,
    pub(crate) rope: Rope<O>,
}

/// One block.
#[derive(Debug)]
pub(crate) struct Block<O: Ops> {
    pub(crate) attention: Attention<O>,
    pub(crate) mlp: Mlp<O>,
}

/// What one block leaves for its backward pass; in serving, one set that every block writes over. `[rows, width]` each.
#[derive(Debug)]
pub(crate) struct Activations<O: Ops> {
    /// The block's input; kept in training only.
    pub(crate) x: O::Buf,
    /// Queries before norm and rope.
    pub(crate) q: O::Buf,
    /// Keys before norm and rope.
    pub(crate) k: O::Buf,
    pub(crate) v: O::Buf,
    /// Attention's output before the output projection.
    pub(crate) attn: O::Buf,
    /// `[rows, heads]`, exact; kept in training only.
    pub(crate) lse: O::Buf,
    /// The residual between attention and MLP; kept in training only.
    pub(crate) mid: O::Buf,
    pub(crate) gate: O::Buf,
    pub(crate) up: O::Buf,
}

/// What no block leaves behind.
#[derive(Debug)]
pub(crate) struct Scratch<O: Ops> {
    pub(crate) norm: O::Buf,
    pub(crate) q: O::Buf,
    pub(crate) k: O::Buf,
    pub(crate) inner: O::Buf,
    pub(crate) dnorm: O::Buf,
    pub(crate) dattn: O::Buf,
    pub(crate) dq: O::Buf,
    pub(crate) dk: O::Buf,
    pub(crate) dv: O::Buf,
    pub(crate) dinner: O::Buf,
    pub(crate) thin: Thin<O>,
}

/// Buffers of a pass, reused by the next one: nothing is allocated per layer, and nothing at all once they have grown.
#[derive(Debug)]
pub struct Workspace<O: Ops = Backend> {
    pub(crate) stream: Stream<O>,
    pub(crate) hidden: O::Buf,
    pub(crate) act: Activations<O>,
    pub(crate) scratch: Scratch<O>,
    pub(crate) angles: Angles<O>,
    pub(crate) positions: Vec<u32>,
    tokens: Vec<u32>,
    kv_rows: Vec<u32>,
}

// === impl Activations ===

impl<O: Ops> Activations<O> {
    pub(crate) fn new(ops: &O) -> Self {
        Self {
            x: ops.working(),
            q: ops.working(),
            k: ops.working(),
            v: ops.working(),
            attn: ops.working(),
            lse: ops.exact(),
            mid: ops.working(),
            gate: ops.working(),
            up: ops.working(),
        }
    }

    /// Room for all but what is kept of the stream, which takes its own.
    pub(crate) fn resize(&mut self, ops: &O, config: &ModelConfig, rows: usize) {
        let sizes = [
            (&mut self.q, rows * config.q_width()),
            (&mut self.k, rows * config.kv_width()),
            (&mut self.v, rows * config.kv_width()),
            (&mut self.attn, rows * config.q_width()),
            (&mut self.lse, rows * config.heads),
            (&mut self.gate, rows * config.intermediate),
            (&mut self.up, rows * config.intermediate),
        ];
        for (buffer, len) in sizes {
            ops.resize(buffer, len);
        }
    }

    /// Bytes for each row.
    pub(crate) fn row_bytes(ops: &O, config: &ModelConfig) -> usize {
        let widths = config.hidden + config.q_width() + config.kv_width() + config.intermediate;
        2 * widths * ops.working_bytes() + config.heads * size_of::<O::T>()
    }
}

// === impl Scratch ===

impl<O: Ops> Scratch<O> {
    fn new(ops: &O) -> Self {
        Self {
            norm: ops.working(),
            q: ops.working(),
            k: ops.working(),
            inner: ops.working(),
            dnorm: ops.working(),
            dattn: ops.working(),
            dq: ops.working(),
            dk: ops.working(),
            dv: ops.working(),
            dinner: ops.working(),
            thin: Thin::new(ops),
        }
    }

    pub(crate) fn resize(&mut self, ops: &O, config: &ModelConfig, rows: usize, backward: bool) {
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
            ops.resize(buffer, len);
        }
    }
}

// === impl Workspace ===

impl<O: Ops> Workspace<O> {
    /// Bytes for each row of a pass that goes back too: a layer's activations, what its products make on both ways, the widest
    /// input after dropout and DoRA's widest two outputs, and four rows of states.
    pub fn row_bytes(ops: &O, config: &ModelConfig) -> usize {
        let widest = config.hidden.max(config.q_width()).max(config.intermediate);
        let both_ways = 2 * (config.hidden + config.q_width() + config.kv_width());
        let back = config.q_width() + config.kv_width() + 2 * config.intermediate;
        let numbers = both_ways + back + 3 * widest + 4 * config.hidden;
        Activations::row_bytes(ops, config) + numbers * ops.working_bytes()
    }

    /// Empty buffers; they grow with the first passes.
    pub fn new(ops: &O) -> Self {
        Self {
            stream: Stream::new(ops),
            hidden: ops.working(),
            act: Activations::new(ops),
            scratch: Scratch::new(ops),
            angles: Angles::new(ops),
            positions: Vec::new(),
            tokens: Vec::new(),
            kv_rows: Vec::new(),
        }
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
    /// The stream gets what the block adds. With `keep`, `act` gets all that the backward pass reads.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, O>,
        places: &Places<'_, O>,
        stream: &mut Stream<O>,
        (act, keep): (&mut Activations<O>, bool),
        scratch: &mut Scratch<O>,
        cache: Option<&mut LayerKv<O>>,
    ) -> Result<(), Stopped> {
        self.attention
            .forward(pass, places, stream, (act, keep), scratch, cache)?;
        self.mlp.forward(pass, stream, (act, keep), scratch)
    }
}

// === impl Decoder ===

impl<O: Ops> Decoder<O> {
    /// Packs a model's weights, each one dropped as soon as it is packed: there is never a second copy of all.
    ///
    /// # Errors
    /// [`ModelError`] when the weights are not those of the configuration.
    pub fn new(ops: O, config: ModelConfig, mut weights: ModelWeights) -> Result<Self, ModelError> {
        config.validate("configuration")?;
        weights.check(&config, "weights")?;
        let output = match config.tie_embeddings {
            true => None,
            false => Some(packed(&ops, &config, &mut weights, Slot::LmHead)),
        };
        let embed = packed(&ops, &config, &mut weights, Slot::Embed);
        let vocabulary = Vocabulary::new(embed, output);
        let blocks = (0..config.layers)
            .map(|layer| Block {
                attention: Attention::new(&ops, &config, layer, &mut weights),
                mlp: Mlp::new(&ops, &config, layer, &mut weights),
            })
            .collect();
        let (eps, hidden) = (config.rms_eps, config.hidden);
        let norm = RmsNorm::new(&ops, &weights.norm, eps, BaseTensor::FinalNorm, hidden);
        let rope = Rope::new(&ops, &config);
        Ok(Self {
            ops,
            vocabulary,
            blocks,
            norm,
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
        let tables = [BaseTensor::Embedding, BaseTensor::Output];
        let tables = tables.into_iter().filter_map(|table| self.matrix(table));
        for matrix in blocks.chain(tables) {
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
        self.vocabulary.output()
    }

    /// The stream begins with the tokens' embeddings.
    pub(crate) fn embed(&self, pass: &Pass<'_, O>, tokens: &[u32], stream: &mut Stream<O>) {
        let x = stream.begin(pass.ops, tokens.len() * self.config.hidden);
        let (ops, segments) = (pass.ops, pass.segments);
        self.vocabulary.embed((ops, segments), tokens, x);
    }

    /// One step: the states after the final norm, `[rows, hidden]`, and maybe rows of no meaning behind them. Writes the rows'
    /// keys and values to the cache.
    ///
    /// # Panics
    /// On a token, position, block or row out of range: the scheduler's mistake, not a caller's.
    pub fn forward<'w>(
        &self,
        batch: &Batch<'_, O>,
        kv: &mut KvCache<O>,
        workspace: &'w mut Workspace<O>,
    ) -> &'w O::Buf {
        let (ops, block_size) = (&self.ops, kv.block_size());
        let recurs = recurs(batch);
        let rows = match recurs {
            true => ops.padded(batch.tokens.len()),
            false => batch.tokens.len(),
        };
        let Workspace {
            stream,
            hidden,
            act,
            scratch,
            angles,
            positions,
            tokens,
            kv_rows,
        } = workspace;
        ops.begin_pass();
        let pass = Pass::new(ops, self.config.layers, batch.segments, &Unpaced)
            .with_overlays(batch.overlays);
        act.resize(ops, &self.config, rows);
        scratch.resize(ops, &self.config, rows, false);
        tokens.clear();
        tokens.extend_from_slice(batch.tokens);
        kv_rows.clear();
        positions.clear();
        for span in batch.spans {
            let place = KvRows::Paged {
                table: span.block_table,
                block_size,
            };
            let new = span.start_pos..span.start_pos + span.rows.len();
            kv_rows.extend(new.clone().map(|position| place.row(position) as u32));
            positions.extend(new.map(|position| position as u32));
        }
        tokens.resize(rows, NO_ROW);
        kv_rows.resize(rows, NO_ROW);
        positions.resize(rows, 0);
        self.embed(&pass, tokens, stream);
        self.rope.angles(ops, positions, angles);
        ops.resize(hidden, stream.sum().len());
        let spans = batch.spans.iter().map(|span| AttentionSpan {
            rows: span.rows.clone(),
            start: span.start_pos,
            kv: KvRows::Paged {
                table: span.block_table,
                block_size,
            },
        });
        let places = Places {
            rope: &self.rope,
            angles,
            groups: grouped(ops, &Unpaced, shape(&self.config), spans),
            kv_rows: ops.ids(kv_rows),
            block_size,
        };
        // Whose memory it is: a step over another cache or workspace is another step.
        let over = [
            kv.place(),
            stream.sum().place(),
            hidden.place(),
            act.q.place(),
        ];
        let mut blocks = || {
            for (layer, block) in self.blocks.iter().enumerate() {
                let cache = Some(kv.layer_mut(layer));
                let done = block.forward(&pass, &places, stream, (act, false), scratch, cache);
                debug_assert!(done.is_ok(), "nothing stops an unpaced pass");
            }
            stream.norm(&pass, &self.norm, hidden);
        };
        if recurs {
            ops.recurring(&over, &mut blocks);
        } else {
            blocks();
        }
        hidden
    }

    /// The logits `[n, vocab]`, exact, of states `[n, hidden]` after the final norm, whose rows belong to `segments`.
    pub fn logits(&self, states: &O::Buf, segments: &[Segment<O>], out: &mut O::Buf) {
        self.vocabulary.logits((&self.ops, segments), states, out);
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

/// Whether a step of this kind will come again: every sequence has one row, and no weight but the base's is named in a launch.
fn recurs<O: Ops>(batch: &Batch<'_, O>) -> bool {
    let scales = |segment: &Segment<O>| segment.adapters.parts().any(|(a, _)| !a.only_adds());
    batch.overlays.is_empty()
        && batch.spans.iter().all(|span| span.rows.len() == 1)
        && !batch.segments.iter().any(scales)
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

    fn matrix(&self, tensor: BaseTensor) -> Option<&O::Matrix> {
        match tensor {
            BaseTensor::Layer(layer, LayerTensor::Weight(site)) if layer < self.layers() => {
                Some(self.weight(layer, site))
            }
            table => self.vocabulary.matrix(table),
        }
    }

    fn vector(&self, tensor: BaseTensor) -> Option<View<'_, O>> {
        let (layer, tensor) = match tensor {
            BaseTensor::Layer(layer, tensor) => (layer, tensor),
            BaseTensor::FinalNorm => return Some(self.norm.weight()),
            BaseTensor::Embedding | BaseTensor::Output => return None,
        };
        let Block { attention, mlp } = self.blocks.get(layer)?;
        match tensor {
            LayerTensor::Weight(_) => None,
            LayerTensor::Bias(site) => self.linear(layer, site).bias(),
            LayerTensor::AttnNorm => Some(attention.norm.weight()),
            LayerTensor::MlpNorm => Some(mlp.norm.weight()),
            LayerTensor::QNorm => attention.q_norm.as_ref().map(RmsNorm::weight),
            LayerTensor::KNorm => attention.k_norm.as_ref().map(RmsNorm::weight),
        }
    }

    fn hidden(&self) -> usize {
        self.config.hidden
    }
}
