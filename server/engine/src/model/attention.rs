//! The attention half of a block: norm, q, k and v with their adapters, rope, attention, output projection.
//!
//! Written once; only where keys and values lie differs between serving (the paged cache) and training (the batch itself).

use std::ops::Range;

use espalier_adapters::batch::Pass;
use espalier_adapters::config::Site;
use espalier_adapters::linear::{self, AdapterGrads, LoraLinear};
use espalier_adapters::ops::{
    AttentionGrads, AttentionSaved, AttentionShape, AttentionSpan, KvRows, Ops,
};
use espalier_adapters::pace::{Pace, Stopped};

use super::config::ModelConfig;
use super::decoder::{Activations, Scratch, packed};
use super::norm::RmsNorm;
use super::rope::{Angles, Rope};
use super::weights::{ModelWeights, Part, Slot};
use crate::kv_cache::LayerKv;

/// Attention of one block.
#[derive(Debug)]
pub(crate) struct Attention<O: Ops> {
    norm: RmsNorm<O::T>,
    pub(crate) q: LoraLinear<O>,
    pub(crate) k: LoraLinear<O>,
    pub(crate) v: LoraLinear<O>,
    pub(crate) o: LoraLinear<O>,
    q_norm: Option<RmsNorm<O::T>>,
    k_norm: Option<RmsNorm<O::T>>,
    shape: AttentionShape,
}

/// Where rows stand: the same for every layer of a pass.
#[derive(Debug)]
pub(crate) struct Places<'a, T> {
    pub(crate) rope: &'a Rope,
    pub(crate) angles: &'a Angles<T>,
    /// Spans in groups that fit between two breaths.
    pub(crate) groups: &'a [Vec<AttentionSpan<'a>>],
    /// The cache row of each batch row; unused in training.
    pub(crate) kv_rows: &'a [usize],
    /// Rows in a block of the cache; unused in training.
    pub(crate) block_size: usize,
}

/// Attention computes less per second than a matrix product, so it gets less of a quantum; its backward pass does more.
const ATTENTION_SHARE: usize = 8;

/// Cuts spans in groups of about one quantum; a long span is cut by query rows, which changes no bit.
pub(crate) fn grouped<'a>(
    pace: &dyn Pace,
    shape: AttentionShape,
    spans: impl Iterator<Item = AttentionSpan<'a>>,
) -> Vec<Vec<AttentionSpan<'a>>> {
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
    groups
}

/// The span of a whole sequence of a micro-batch.
pub(crate) fn flat_span(rows: &Range<usize>) -> AttentionSpan<'static> {
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
        let norm =
            |weight: &Option<Vec<f32>>| weight.as_deref().map(|w| RmsNorm::new(w, config.rms_eps));
        Self {
            norm: RmsNorm::new(&own.attn_norm, config.rms_eps),
            q,
            k,
            v,
            o,
            q_norm: norm(&own.q_norm),
            k_norm: norm(&own.k_norm),
            shape: shape(config),
        }
    }

    /// `x += attention(norm(x))`. Leaves q, k (both before norm and rope), v, output and lse in `act`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, O>,
        places: &Places<'_, O::T>,
        x: &mut [O::T],
        act: &mut Activations<O::T>,
        scratch: &mut Scratch<O::T>,
        cache: Option<&mut LayerKv<O::T>>,
    ) -> Result<(), Stopped> {
        self.norm.forward(pass.ops, x, &mut scratch.norm);
        linear::forward(
            pass,
            [&self.q, &self.k, &self.v],
            &scratch.norm,
            [&mut act.q, &mut act.k, &mut act.v],
            &mut scratch.thin,
        )?;
        self.place_heads(pass.ops, places, act, scratch);
        match cache {
            Some(cache) => {
                let block_size = places.block_size;
                pass.ops
                    .store_keys(&scratch.k, places.kv_rows, block_size, &mut cache.k);
                let head_dim = self.shape.head_dim;
                pass.ops
                    .store_values(&act.v, head_dim, places.kv_rows, block_size, &mut cache.v);
                for group in places.groups {
                    pass.ops.attention(
                        self.shape,
                        &scratch.q,
                        &cache.k,
                        &cache.v,
                        group,
                        &mut act.attn,
                        None,
                    );
                    pass.pace.breathe()?;
                }
            }
            None => {
                for group in places.groups {
                    let lse = Some(act.lse.as_mut_slice());
                    pass.ops.attention(
                        self.shape,
                        &scratch.q,
                        &scratch.k,
                        &act.v,
                        group,
                        &mut act.attn,
                        lse,
                    );
                    pass.pace.breathe()?;
                }
            }
        }
        let thin = &mut scratch.thin;
        linear::forward(pass, [&self.o], &act.attn, [&mut scratch.norm], thin)?;
        pass.ops.add(&scratch.norm, x);
        Ok(())
    }

    /// Queries and keys as attention reads them, from the projections' outputs: normed where the family does, turned.
    fn place_heads(
        &self,
        ops: &O,
        places: &Places<'_, O::T>,
        act: &Activations<O::T>,
        scratch: &mut Scratch<O::T>,
    ) {
        let normed = |norm: &Option<RmsNorm<O::T>>, raw: &[O::T], out: &mut [O::T]| match norm {
            Some(norm) => norm.forward(ops, raw, out),
            None => out.copy_from_slice(raw),
        };
        normed(&self.q_norm, &act.q, &mut scratch.q);
        normed(&self.k_norm, &act.k, &mut scratch.k);
        places.rope.turn(ops, places.angles, &mut scratch.q, false);
        places.rope.turn(ops, places.angles, &mut scratch.k, false);
    }

    /// Turns `dx`, the gradient of this half's output, into that of its input (left undone where `lowest`: nobody reads
    /// it), and adds the adapters' gradients.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_, O>,
        places: &Places<'_, O::T>,
        act: &Activations<O::T>,
        (dx, lowest): (&mut [O::T], bool),
        grads: &mut [Option<AdapterGrads<O::T>>],
        scratch: &mut Scratch<O::T>,
    ) -> Result<(), Stopped> {
        let zero = <O::T as Default>::default();
        scratch.dattn.fill(zero);
        self.o.backward(
            pass,
            (&act.attn, dx),
            Some(&mut scratch.dattn),
            grads,
            &mut scratch.thin,
        )?;
        self.place_heads(pass.ops, places, act, scratch);
        scratch.dk.fill(zero);
        scratch.dv.fill(zero);
        for group in places.groups {
            let saved = AttentionSaved {
                q: &scratch.q,
                k: &scratch.k,
                v: &act.v,
                out: &act.attn,
                lse: &act.lse,
            };
            let grads = AttentionGrads {
                dq: &mut scratch.dq,
                dk: &mut scratch.dk,
                dv: &mut scratch.dv,
            };
            pass.ops
                .attention_backward(self.shape, saved, group, &scratch.dattn, grads);
            pass.pace.breathe()?;
        }
        places
            .rope
            .turn(pass.ops, places.angles, &mut scratch.dq, true);
        places
            .rope
            .turn(pass.ops, places.angles, &mut scratch.dk, true);
        unnorm(
            pass.ops,
            self.q_norm.as_ref(),
            &act.q,
            &mut scratch.dq,
            &mut scratch.q,
        );
        unnorm(
            pass.ops,
            self.k_norm.as_ref(),
            &act.k,
            &mut scratch.dk,
            &mut scratch.k,
        );
        self.norm.forward(pass.ops, &act.x, &mut scratch.norm);
        scratch.dnorm.fill(zero);
        let Scratch {
            norm,
            dnorm,
            dq,
            dk,
            dv,
            thin,
            ..
        } = scratch;
        for (linear, dy) in [(&self.q, dq), (&self.k, dk), (&self.v, dv)] {
            let dn = (!lowest).then_some(dnorm.as_mut_slice());
            linear.backward(pass, (norm, dy), dn, grads, thin)?;
        }
        if !lowest {
            self.norm.backward(pass.ops, &act.x, dnorm, dx);
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

/// Replaces the gradient of a normed head by that of the head before the norm.
fn unnorm<O: Ops>(
    ops: &O,
    norm: Option<&RmsNorm<O::T>>,
    raw: &[O::T],
    dy: &mut [O::T],
    spare: &mut [O::T],
) {
    if let Some(norm) = norm {
        spare.fill(O::T::default());
        norm.backward(ops, raw, dy, spare);
        dy.copy_from_slice(spare);
    }
}
