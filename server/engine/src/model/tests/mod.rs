//! The decoder against candle's models, against finite differences, and against itself in other company.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

pub(crate) mod device;
mod dora;
mod equality;
mod finite_differences;
mod oracle;
pub(crate) mod precision;

use std::sync::Arc;

use espalier_adapters::batch::{Mixture, Segment};
use espalier_adapters::config::{BaseTensor, FullConfig, ScaleOn, Site};
use espalier_adapters::ops::{Backend, Buffer, Ops, Real};
use espalier_adapters::weights::{AdapterWeights, Delta, SiteAdapter, SiteScale};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::weights::{Part, Slot};
use super::*;

/// What a test runs on: operations, what their cache asks of a block, and how far rounding takes them from exact ones.
#[derive(Clone, Debug)]
pub(crate) struct Under<O> {
    pub(crate) ops: O,
    /// Sizes that the operations can have.
    pub(crate) sizes: fn(Family) -> ModelConfig,
    pub(crate) block_size: usize,
    /// Of logits near one.
    pub(crate) tolerance: f64,
}

impl<O: Ops + Default> Default for Under<O> {
    fn default() -> Self {
        Self {
            ops: O::default(),
            sizes: small,
            block_size: 4,
            tolerance: 1e-4,
        }
    }
}

impl<O: Ops> Under<O> {
    pub(crate) fn model(&self, config: &ModelConfig, seed: u64) -> Decoder<O> {
        self.packed(config, random_weights(config, seed))
    }

    pub(crate) fn packed(&self, config: &ModelConfig, weights: ModelWeights) -> Decoder<O> {
        Decoder::new(self.ops.clone(), config.clone(), weights).unwrap()
    }

    /// The states of sequences, each `[ids, hidden]`, after passes over chunks of at most `chunk` rows of each.
    pub(crate) fn states(
        &self,
        model: &Decoder<O>,
        parts: &[Asked<O>],
        chunk: usize,
    ) -> Vec<Vec<O::T>> {
        let (config, block_size) = (model.config(), self.block_size);
        let longest = parts.iter().map(|p| p.ids.len()).max().unwrap();
        let per = longest.div_ceil(block_size);
        let mut kv = KvCache::new(model.ops(), config, per * parts.len(), block_size);
        // Blocks of the sequences are interleaved and in falling order.
        let tables: Vec<Vec<u32>> = (0..parts.len())
            .map(|p| {
                (0..per)
                    .rev()
                    .map(|b| (b * parts.len() + p) as u32)
                    .collect()
            })
            .collect();
        let mut workspace = Workspace::new(model.ops());
        let mut out = vec![Vec::new(); parts.len()];
        for start in (0..longest).step_by(chunk) {
            let (mut tokens, mut spans, mut runs, mut who) =
                (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            for (index, part) in parts.iter().enumerate() {
                let end = (start + chunk).min(part.ids.len());
                if start >= end {
                    continue;
                }
                let rows = tokens.len()..tokens.len() + end - start;
                tokens.extend_from_slice(&part.ids[start..end]);
                runs.push((rows.len(), part.adapters.clone()));
                who.push((index, rows.clone()));
                spans.push(SeqSpan {
                    rows,
                    start_pos: start,
                    block_table: &tables[index],
                });
            }
            let segments = Segment::join(runs);
            let batch = Batch {
                tokens: &tokens,
                spans: &spans,
                segments: &segments,
                overlays: &[],
            };
            let hidden = read(model.ops(), model.forward(&batch, &mut kv, &mut workspace));
            for (index, rows) in who {
                out[index].extend_from_slice(
                    &hidden[rows.start * config.hidden..rows.end * config.hidden],
                );
            }
        }
        out
    }

    /// The logits of every row of one sequence.
    pub(crate) fn logits(
        &self,
        model: &Decoder<O>,
        ids: &[u32],
        adapter: Option<Arc<ResidentAdapter<O>>>,
    ) -> Vec<O::T> {
        let asked = Asked {
            ids: ids.to_vec(),
            adapters: adapter.into(),
        };
        let states = self.states(model, std::slice::from_ref(&asked), 7);
        logits_of(model, &[(&states[0], &asked.adapters)])
    }
}

/// The operations that the server runs on without a device.
pub(crate) fn host() -> Under<Backend> {
    Under::default()
}

/// A small model whose sizes all differ.
pub(crate) fn small(family: Family) -> ModelConfig {
    ModelConfig {
        family,
        layers: 3,
        hidden: 24,
        intermediate: 40,
        heads: 6,
        kv_heads: 2,
        head_dim: 4,
        vocab: 70,
        rms_eps: 1e-5,
        rope: RopeConfig {
            theta: 1000.0,
            scaling: RopeScaling::None,
        },
        context_length: 256,
        tie_embeddings: family == Family::Llama,
        qkv_bias: family == Family::Qwen2,
        qk_norm: family == Family::Qwen3,
        sliding_window: (family == Family::Mistral).then_some(5),
    }
}

pub(crate) const FAMILIES: [Family; 4] =
    [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];

/// Random weights of a size that keeps activations near one.
pub(crate) fn random_weights(config: &ModelConfig, seed: u64) -> ModelWeights {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut weights = ModelWeights::empty(config.layers);
    for slot in Slot::all(config) {
        let shape = slot.shape(config);
        let norm = matches!(
            slot,
            Slot::Norm
                | Slot::Layer(
                    _,
                    Part::AttnNorm | Part::MlpNorm | Part::QNorm | Part::KNorm
                )
        );
        let (middle, spread) = match (norm, shape.len()) {
            (true, _) => (1.0, 0.5),
            (_, 1) => (0.0, 0.5),
            _ => (0.0, 2.0 / (shape[1] as f32).sqrt()),
        };
        let len = shape.iter().product();
        weights.set(
            slot,
            (0..len)
                .map(|_| middle + spread * rng.random_range(-1.0f32..1.0))
                .collect(),
        );
    }
    weights
}

pub(crate) fn random_model<O: Ops + Default>(config: &ModelConfig, seed: u64) -> Decoder<O> {
    Under::default().model(config, seed)
}

/// An adapter of rank 3 with a scale that no mistake leaves at one.
pub(crate) fn random_adapter<O: Ops>(
    model: &Decoder<O>,
    at: impl Fn(usize, Site) -> bool,
    dora: bool,
    seed: u64,
) -> AdapterWeights {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut random = |len: usize, low: f32, high: f32| -> Vec<f32> {
        (0..len).map(|_| rng.random_range(low..high)).collect()
    };
    let mut weights = AdapterWeights::default();
    for layer in 0..model.layers() {
        for site in Site::ALL.into_iter().filter(|site| at(layer, *site)) {
            let (outputs, inputs) = model.ops().dims(model.weight(layer, site));
            let r = 2 + site.index() % 3;
            let (a, b) = (
                random(r * inputs, -0.4, 0.4),
                random(outputs * r, -0.4, 0.4),
            );
            let magnitude = dora.then(|| random(outputs, 0.5, 2.0));
            weights.sites.insert(
                (layer, site),
                SiteAdapter {
                    r,
                    scale: 0.7,
                    a: a.into(),
                    b: b.into(),
                    magnitude,
                },
            );
        }
    }
    weights
}

/// Vectors of (IA)3 around one, on outputs and on inputs.
pub(crate) fn random_scales<O: Ops>(
    model: &Decoder<O>,
    at: impl Fn(usize, Site) -> bool,
    seed: u64,
) -> AdapterWeights {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut weights = AdapterWeights::default();
    for layer in 0..model.layers() {
        for site in Site::ALL.into_iter().filter(|site| at(layer, *site)) {
            let on = match (layer + site.index()) % 2 {
                0 => ScaleOn::Inputs,
                _ => ScaleOn::Outputs,
            };
            let (outputs, inputs) = model.ops().dims(model.weight(layer, site));
            let width = on.width((inputs, outputs));
            let l = (0..width).map(|_| rng.random_range(0.3..1.8f32)).collect();
            weights.scales.insert((layer, site), SiteScale { on, l });
        }
    }
    weights
}

/// Deltas of the tensors that are asked for and that the model has, in steps that leave sums with snapped weights exact.
pub(crate) fn random_deltas<O: Ops>(
    model: &Decoder<O>,
    at: impl Fn(BaseTensor) -> bool,
    seed: u64,
) -> AdapterWeights {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (shape, mut weights) = (model.config().base_shape(), AdapterWeights::default());
    for tensor in FullConfig::whole(&shape).tensors() {
        if at(tensor) && (tensor.is_matrix() || model.vector(tensor).is_some()) {
            let dims = tensor.shape(&shape);
            let rows = if tensor.is_matrix() { dims[0] } else { 1 };
            let len: usize = dims.iter().product();
            let values = (0..len).map(|_| snapped(rng.random_range(-0.2..0.2f32)));
            let values = values.collect();
            weights.full.insert(tensor, Delta { rows, values });
        }
    }
    weights
}

/// To a multiple of 2^-13.
pub(crate) fn snapped(number: f32) -> f32 {
    (number * 8192.0).round() / 8192.0
}

pub(crate) fn resident<O: Ops>(
    model: &Decoder<O>,
    weights: &AdapterWeights,
) -> Arc<ResidentAdapter<O>> {
    Arc::new(ResidentAdapter::build(weights, model).unwrap())
}

pub(crate) fn random_ids(config: &ModelConfig, len: usize, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len)
        .map(|_| rng.random_range(0..config.vocab as u32))
        .collect()
}

/// Numbers of the operations, on the host.
pub(crate) fn read<O: Ops>(ops: &O, buffer: &O::Buf) -> Vec<O::T> {
    let mut numbers = vec![O::T::ZERO; buffer.len()];
    ops.read(buffer.all(), &mut numbers);
    numbers
}

/// Numbers of the host, in a working buffer.
pub(crate) fn written<O: Ops>(ops: &O, numbers: &[O::T]) -> O::Buf {
    let mut buffer = ops.working();
    ops.resize(&mut buffer, numbers.len());
    ops.write(numbers, buffer.all_mut());
    buffer
}

/// One sequence of a mixed batch.
pub(crate) struct Asked<O: Ops = Backend> {
    pub(crate) ids: Vec<u32>,
    pub(crate) adapters: Mixture<O>,
}

/// The logits of the states of several sequences, one after the other.
pub(crate) fn logits_of<O: Ops>(model: &Decoder<O>, parts: &[(&[O::T], &Mixture<O>)]) -> Vec<O::T> {
    let (ops, config) = (model.ops(), model.config());
    let runs = parts.iter().map(|(states, adapters)| {
        let rows = states.len() / config.hidden;
        (rows, (*adapters).clone())
    });
    let segments = Segment::join(runs);
    let states: Vec<_> = parts.iter().map(|(states, _)| *states).collect();
    let states = states.concat();
    let mut out = ops.exact();
    ops.resize(&mut out, states.len() / config.hidden * config.vocab);
    model.logits(&written(ops, &states), &segments, &mut out);
    read(ops, &out)
}

/// The largest difference of two slices.
pub(crate) fn distance<T: Real>(left: &[T], right: &[T]) -> f64 {
    assert_eq!(left.len(), right.len());
    left.iter()
        .zip(right)
        .map(|(l, r)| (l.to_f64() - r.to_f64()).abs())
        .fold(0.0, f64::max)
}
