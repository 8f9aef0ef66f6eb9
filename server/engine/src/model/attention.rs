//! The attention half of a block: norm, q, k and v with their adapters, rope, attention, output projection.
//!
//! Written once; only where keys and values lie differs between serving (the paged cache) and training (the batch itself).

use std::ops::Range;

use espalier_adapters::batch::{Pass, Thin};
use espalier_adapters::config::{BaseTensor, LayerTensor, Site};
use espalier_adapters::linear::{self, AdapterGrads, LoraLinear, RmsNorm};
use espalier_adapters::ops::{
    AttentionGrads, AttentionSaved, AttentionShape, AttentionSpan, Buffer, KvRows, Ops,
};
use espalier_adapters::pace::{Pace, Stopped};

use super::config::ModelConfig;
use super::decoder::{Activations, Scratch, packed};
use super::rope::{Angles, Rope};
use super::stream::Stream;
use super::weights::{ModelWeights, Part, Slot};
use crate::kv_cache::LayerKv;

/// Attention of one block.
#[derive(Debug)]
pub(crate) struct Attention<O: Ops> {
    pub(crate) norm: RmsNorm<O>,
    pub(crate) q: LoraLinear<O>,
    pub(crate) k: LoraLinear<O>,
    pub(crate) v: LoraLinear<O>,
    pub(crate) o: LoraLinear<O>,
    pub(crate) q_norm: Option<RmsNorm<O>>,
    pub(crate) k_norm: Option<RmsNorm<O>>,
    shape: AttentionShape,
}

/// Where rows stand: the same for every layer of a pass.
#[derive(Debug)]
pub(crate) struct Places<'a, O: Ops> {
    pub(crate) rope: &'a Rope<O>,
    pub(crate) angles: &'a Angles<O>,
    /// Spans in groups that fit between two breaths.
    pub(crate) groups: Vec<O::Spans<'a>>,
    /// The cache row of each batch row; none in training.
    pub(crate) kv_rows: O::Ids<'a>,
    /// Rows in a block of the cache; unused in training.
    pub(crate) block_size: usize,
}

/// Attention computes less per second than a matrix product, so it gets less of a quantum; its backward pass does more.
const ATTENTION_SHARE: usize = 8;

/// Cuts spans in groups of about one quantum; a long span is cut by query rows, which changes no bit.
pub(crate) fn grouped<'a, O: Ops>(
    ops: &O,
    pace: &dyn Pace,
    shape: AttentionShape,
    spans: impl Iterator<Item = AttentionSpan<'a>>,
) -> Vec<O::Spans<'a>> {
    let budget = pace.quantum_flops() / ATTENTION_SHARE;
    let mut groups: Vec<Vec<AttentionSpan<'a>>> = vec![Vec::new()];
    let mut spent = 0;
    for span in spans {
        let mut done = 0;
        while done < span.rows.len() {
            let row_flops = 4 * shape.q_width() * (span.start + span.rows.len());
            let affordable =
                (budget.saturating_sub(spent) / row_flops.max(1)).min(span.rows.len() - done);
            if affordable == 0 && spent > 0 {
                groups.push(Vec::new());
                spent = 0;
                continue;
            }
            let count = affordable.max(1);
            let first = span.rows.start + done;
            if let Some(group) = groups.last_mut() {
                group.push(AttentionSpan {
                    rows: first..first + count,
                    start: span.start + done,
                    kv: span.kv,
                });
            }
            done += count;
            spent = spent.saturating_add(count * row_flops);
        }
    }
    groups.into_iter().map(|group| ops.spans(group)).collect()
}

/// The span of a whole sequence of a micro-batch.
pub(crate) fn flat_span<'a>(rows: &Range<usize>) -> AttentionSpan<'a> {
    AttentionSpan {
        rows: rows.clone(),
        start: 0,
        kv: KvRows::Flat { first: rows.start },
    }
}

impl<O: Ops> Attention<O> {
    pub(crate) fn new(
        ops: &O,
        config: &ModelConfig,
        layer: usize,
        weights: &mut ModelWeights,
    ) -> Self {
        let own = &weights.layers[layer];
        let biases = (own.q_bias.clone(), own.k_bias.clone(), own.v_bias.clone());
        let mut linear = |site: Site, part: Part, bias: Option<Vec<f32>>| {
            let weight = packed(ops, config, weights, Slot::Layer(layer, part));
            LoraLinear::new(ops, weight, bias.as_deref(), (layer, site))
        };
        let (q, k, v) = (
            linear(Site::Q, Part::Q, biases.0),
            linear(Site::K, Part::K, biases.1),
            linear(Site::V, Part::V, biases.2),
        );
        let o = linear(Site::O, Part::O, None);
        let own = &weights.layers[layer];
        let norm = |weight: &[f32], tensor: LayerTensor, width: usize| {
            let at = BaseTensor::Layer(layer, tensor);
            RmsNorm::new(ops, weight, config.rms_eps, at, width)
        };
        let of_heads = |weight: Option<&[f32]>, tensor: LayerTensor, width: usize| {
            weight.map(|weight| norm(weight, tensor, width))
        };
        Self {
            norm: norm(&own.attn_norm, LayerTensor::AttnNorm, config.hidden),
            q,
            k,
            v,
            o,
            q_norm: of_heads(own.q_norm.as_deref(), LayerTensor::QNorm, config.q_width()),
            k_norm: of_heads(own.k_norm.as_deref(), LayerTensor::KNorm, config.kv_width()),
            shape: shape(config),
        }
    }

    /// Adds `attention(norm(x))` to the stream. Leaves q, k (both before norm and rope), v, output and lse in `act`; with
    /// `keep`, the stream's sum too.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, O>,
        places: &Places<'_, O>,
        stream: &mut Stream<O>,
        (act, keep): (&mut Activations<O>, bool),
        scratch: &mut Scratch<O>,
        cache: Option<&mut LayerKv<O>>,
    ) -> Result<(), Stopped> {
        let ops = pass.ops;
        stream.norm(pass, &self.norm, &mut scratch.norm);
        if keep {
            stream.keep(ops, &mut act.x);
        }
        linear::forward(
            pass,
            [&self.q, &self.k, &self.v],
            &scratch.norm,
            [&mut act.q, &mut act.k, &mut act.v],
            &mut scratch.thin,
        )?;
        self.place_heads(pass, places, act, scratch);
        let (k, v, mut lse) = match cache {
            Some(cache) => {
                let (k, v) = (scratch.k.all(), act.v.all());
                let (head_dim, rows) = (self.shape.head_dim, places.kv_rows);
                ops.store_keys(k, head_dim, rows, places.block_size, cache.k.all_mut());
                ops.store_values(v, head_dim, rows, places.block_size, cache.v.all_mut());
                (cache.k.all(), cache.v.all(), None)
            }
            None => (scratch.k.all(), act.v.all(), Some(&mut act.lse)),
        };
        for group in &places.groups {
            let (q, out) = (scratch.q.all(), act.attn.all_mut());
            let lse = lse.as_deref_mut().map(O::Buf::all_mut);
            ops.attention(self.shape, q, k, v, group, out, lse);
            pass.pace.breathe()?;
        }
        let thin = &mut scratch.thin;
        linear::forward(pass, [&self.o], &act.attn, [stream.added()], thin)
    }

    /// Queries and keys as attention reads them, from the projections' outputs: normed where the family does, turned.
    fn place_heads(
        &self,
        pass: &Pass<'_, O>,
        places: &Places<'_, O>,
        act: &Activations<O>,
        scratch: &mut Scratch<O>,
    ) {
        let normed = |norm: &Option<RmsNorm<O>>, raw: &O::Buf, out: &mut O::Buf| match norm {
            Some(norm) => norm.forward(pass, raw, out),
            None => pass.ops.copy(raw.all(), out.all_mut()),
        };
        normed(&self.q_norm, &act.q, &mut scratch.q);
        normed(&self.k_norm, &act.k, &mut scratch.k);
        let (rope, ops) = (places.rope, pass.ops);
        rope.turn(ops, places.angles, &mut scratch.q, false);
        rope.turn(ops, places.angles, &mut scratch.k, false);
    }

    /// Turns `dx`, the gradient of this half's output, into that of its input (left undone where `lowest`: nobody reads
    /// it), and adds the adapters' gradients.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_, O>,
        places: &Places<'_, O>,
        act: &Activations<O>,
        (dx, lowest): (&mut O::Buf, bool),
        grads: &mut [Option<AdapterGrads<O>>],
        scratch: &mut Scratch<O>,
    ) -> Result<(), Stopped> {
        let ops = pass.ops;
        ops.clear(scratch.dattn.all_mut());
        self.o.backward(
            pass,
            (&act.attn, dx),
            Some(&mut scratch.dattn),
            grads,
            &mut scratch.thin,
        )?;
        self.place_heads(pass, places, act, scratch);
        ops.clear(scratch.dk.all_mut());
        ops.clear(scratch.dv.all_mut());
        for group in &places.groups {
            let saved = AttentionSaved {
                q: scratch.q.all(),
                k: scratch.k.all(),
                v: act.v.all(),
                out: act.attn.all(),
                lse: act.lse.all(),
            };
            let grads = AttentionGrads {
                dq: scratch.dq.all_mut(),
                dk: scratch.dk.all_mut(),
                dv: scratch.dv.all_mut(),
            };
            ops.attention_backward(self.shape, saved, group, scratch.dattn.all(), grads);
            pass.pace.breathe()?;
        }
        places.rope.turn(ops, places.angles, &mut scratch.dq, true);
        places.rope.turn(ops, places.angles, &mut scratch.dk, true);
        let (q_norm, k_norm) = (self.q_norm.as_ref(), self.k_norm.as_ref());
        let thin = &mut scratch.thin;
        unnorm(
            pass,
            (q_norm, &act.q),
            (&mut scratch.dq, &mut scratch.q),
            grads,
            thin,
        );
        unnorm(
            pass,
            (k_norm, &act.k),
            (&mut scratch.dk, &mut scratch.k),
            grads,
            thin,
        );
        self.norm.forward(pass, &act.x, &mut scratch.norm);
        ops.clear(scratch.dnorm.all_mut());
        let Scratch {
            norm,
            dnorm,
            dq,
            dk,
            dv,
            thin,
            ..
        } = scratch;
        let wanted = !lowest || self.norm.is_trained(grads);
        for (linear, dy) in [(&self.q, dq), (&self.k, dk), (&self.v, dv)] {
            let dn = wanted.then_some(&mut *dnorm);
            linear.backward(pass, (norm, dy), dn, grads, thin)?;
        }
        self.norm.gradients(pass, (&act.x, dnorm), grads, thin);
        if !lowest {
            self.norm.backward(pass, &act.x, dnorm, dx);
        }
        Ok(())
    }
}

/// The heads of a model.
pub(crate) fn shape(config: &ModelConfig) -> AttentionShape {
    AttentionShape {
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        window: config.sliding_window,
    }
}

/// Replaces the gradient of a normed head by that of the head before the norm, and adds that of the norm's weight.
fn unnorm<O: Ops>(
    pass: &Pass<'_, O>,
    (norm, raw): (Option<&RmsNorm<O>>, &O::Buf),
    (dy, spare): (&mut O::Buf, &mut O::Buf),
    grads: &mut [Option<AdapterGrads<O>>],
    thin: &mut Thin<O>,
) {
    if let Some(norm) = norm {
        norm.gradients(pass, (raw, dy), grads, thin);
        pass.ops.clear(spare.all_mut());
        norm.backward(pass, raw, dy, spare);
        pass.ops.copy(spare.all(), dy.all_mut());
    }
}
