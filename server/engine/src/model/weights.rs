//! A base model's weights, whichever file they came from: row-major `[out, in]`, in Hugging Face's row order.
//! Knows no file format and no operation; the loaders fill it, the decoder packs it.

use std::collections::HashMap;

use espalier_adapters::ops::Weight;
use sha2::{Digest, Sha256};

use super::config::ModelConfig;
use super::error::ModelError;

/// One decoder block. Matrices are row-major `[out, in]`, vectors `[out]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerWeights {
    /// RMS norm before attention, `[hidden]`.
    pub attn_norm: Vec<f32>,
    /// Query projection, `[heads * head_dim, hidden]`.
    pub q: Vec<f32>,
    /// Key projection, `[kv_heads * head_dim, hidden]`.
    pub k: Vec<f32>,
    /// Value projection, `[kv_heads * head_dim, hidden]`.
    pub v: Vec<f32>,
    /// Output projection, `[hidden, heads * head_dim]`.
    pub o: Vec<f32>,
    /// Query bias, where the family has one.
    pub q_bias: Option<Vec<f32>>,
    /// Key bias, where the family has one.
    pub k_bias: Option<Vec<f32>>,
    /// Value bias, where the family has one.
    pub v_bias: Option<Vec<f32>>,
    /// RMS norm of each query head, `[head_dim]`, where the family has one.
    pub q_norm: Option<Vec<f32>>,
    /// RMS norm of each key head, `[head_dim]`, where the family has one.
    pub k_norm: Option<Vec<f32>>,
    /// RMS norm before the MLP, `[hidden]`.
    pub mlp_norm: Vec<f32>,
    /// Gate projection, `[intermediate, hidden]`.
    pub gate: Vec<f32>,
    /// Up projection, `[intermediate, hidden]`.
    pub up: Vec<f32>,
    /// Down projection, `[hidden, intermediate]`.
    pub down: Vec<f32>,
}

/// All weights of a base model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelWeights {
    /// Embedding table, `[vocab, hidden]`.
    pub embed: Vec<f32>,
    /// The blocks, first to last.
    pub layers: Vec<LayerWeights>,
    /// The final RMS norm, `[hidden]`.
    pub norm: Vec<f32>,
    /// Output head, `[vocab, hidden]`; `None` when the embedding table is the head.
    pub lm_head: Option<Vec<f32>>,
    /// Matrices in another format than f32; their places above are empty.
    kept: HashMap<Slot, Weight>,
}

/// A tensor of a base model, by place rather than by any file's spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Slot {
    Embed,
    Layer(usize, Part),
    Norm,
    LmHead,
}

/// A tensor of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    AttnNorm,
    Q,
    QBias,
    K,
    KBias,
    V,
    VBias,
    O,
    QNorm,
    KNorm,
    MlpNorm,
    Gate,
    Up,
    Down,
}

impl Part {
    pub(crate) const ALL: [Self; 14] = [
        Self::AttnNorm,
        Self::Q,
        Self::QBias,
        Self::K,
        Self::KBias,
        Self::V,
        Self::VBias,
        Self::O,
        Self::QNorm,
        Self::KNorm,
        Self::MlpNorm,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Hugging Face's name below `model.layers.N.`.
    pub(crate) fn hf(self) -> &'static str {
        match self {
            Self::AttnNorm => "input_layernorm.weight",
            Self::Q => "self_attn.q_proj.weight",
            Self::QBias => "self_attn.q_proj.bias",
            Self::K => "self_attn.k_proj.weight",
            Self::KBias => "self_attn.k_proj.bias",
            Self::V => "self_attn.v_proj.weight",
            Self::VBias => "self_attn.v_proj.bias",
            Self::O => "self_attn.o_proj.weight",
            Self::QNorm => "self_attn.q_norm.weight",
            Self::KNorm => "self_attn.k_norm.weight",
            Self::MlpNorm => "post_attention_layernorm.weight",
            Self::Gate => "mlp.gate_proj.weight",
            Self::Up => "mlp.up_proj.weight",
            Self::Down => "mlp.down_proj.weight",
        }
    }

    /// GGUF's name below `blk.N.`.
    pub(crate) fn gguf(self) -> &'static str {
        match self {
            Self::AttnNorm => "attn_norm.weight",
            Self::Q => "attn_q.weight",
            Self::QBias => "attn_q.bias",
            Self::K => "attn_k.weight",
            Self::KBias => "attn_k.bias",
            Self::V => "attn_v.weight",
            Self::VBias => "attn_v.bias",
            Self::O => "attn_output.weight",
            Self::QNorm => "attn_q_norm.weight",
            Self::KNorm => "attn_k_norm.weight",
            Self::MlpNorm => "ffn_norm.weight",
            Self::Gate => "ffn_gate.weight",
            Self::Up => "ffn_up.weight",
            Self::Down => "ffn_down.weight",
        }
    }
}

impl Slot {
    /// The canonical name, which is Hugging Face's.
    pub(crate) fn hf(self) -> String {
        match self {
            Self::Embed => "model.embed_tokens.weight".to_owned(),
            Self::Layer(layer, part) => format!("model.layers.{layer}.{}", part.hf()),
            Self::Norm => "model.norm.weight".to_owned(),
            Self::LmHead => "lm_head.weight".to_owned(),
        }
    }

    /// GGUF's name.
    pub(crate) fn gguf(self) -> String {
        match self {
            Self::Embed => "token_embd.weight".to_owned(),
            Self::Layer(layer, part) => format!("blk.{layer}.{}", part.gguf()),
            Self::Norm => "output_norm.weight".to_owned(),
            Self::LmHead => "output.weight".to_owned(),
        }
    }

    /// The shape that `config` asks for, `[out, in]` or `[out]`.
    pub(crate) fn shape(self, config: &ModelConfig) -> Vec<usize> {
        let (hidden, inner) = (config.hidden, config.intermediate);
        let (q, kv) = (config.q_width(), config.kv_width());
        match self {
            Self::Embed | Self::LmHead => vec![config.vocab, hidden],
            Self::Norm => vec![hidden],
            Self::Layer(_, part) => match part {
                Part::AttnNorm | Part::MlpNorm => vec![hidden],
                Part::Q => vec![q, hidden],
                Part::K | Part::V => vec![kv, hidden],
                Part::O => vec![hidden, q],
                Part::QBias => vec![q],
                Part::KBias | Part::VBias => vec![kv],
                Part::QNorm | Part::KNorm => vec![config.head_dim],
                Part::Gate | Part::Up => vec![inner, hidden],
                Part::Down => vec![hidden, inner],
            },
        }
    }

    /// Every tensor that a model of `config` has, in canonical order: embedding, blocks, norm, head.
    pub(crate) fn all(config: &ModelConfig) -> Vec<Self> {
        let mut slots = vec![Self::Embed];
        for layer in 0..config.layers {
            slots.extend(
                Part::ALL
                    .into_iter()
                    .filter(|part| match part {
                        Part::QBias | Part::KBias | Part::VBias => config.qkv_bias,
                        Part::QNorm | Part::KNorm => config.qk_norm,
                        _ => true,
                    })
                    .map(|part| Self::Layer(layer, part)),
            );
        }
        slots.push(Self::Norm);
        if !config.tie_embeddings {
            slots.push(Self::LmHead);
        }
        slots
    }
}

impl LayerWeights {
    fn part(&self, part: Part) -> Option<&Vec<f32>> {
        match part {
            Part::AttnNorm => Some(&self.attn_norm),
            Part::Q => Some(&self.q),
            Part::QBias => self.q_bias.as_ref(),
            Part::K => Some(&self.k),
            Part::KBias => self.k_bias.as_ref(),
            Part::V => Some(&self.v),
            Part::VBias => self.v_bias.as_ref(),
            Part::O => Some(&self.o),
            Part::QNorm => self.q_norm.as_ref(),
            Part::KNorm => self.k_norm.as_ref(),
            Part::MlpNorm => Some(&self.mlp_norm),
            Part::Gate => Some(&self.gate),
            Part::Up => Some(&self.up),
            Part::Down => Some(&self.down),
        }
    }

    fn take(&mut self, part: Part) -> Option<Vec<f32>> {
        Some(std::mem::take(match part {
            Part::Q => &mut self.q,
            Part::K => &mut self.k,
            Part::V => &mut self.v,
            Part::O => &mut self.o,
            Part::Gate => &mut self.gate,
            Part::Up => &mut self.up,
            Part::Down => &mut self.down,
            Part::AttnNorm => &mut self.attn_norm,
            Part::MlpNorm => &mut self.mlp_norm,
            Part::QBias => self.q_bias.as_mut()?,
            Part::KBias => self.k_bias.as_mut()?,
            Part::VBias => self.v_bias.as_mut()?,
            Part::QNorm => self.q_norm.as_mut()?,
            Part::KNorm => self.k_norm.as_mut()?,
        }))
    }

    fn set(&mut self, part: Part, data: Vec<f32>) {
        match part {
            Part::AttnNorm => self.attn_norm = data,
            Part::Q => self.q = data,
            Part::QBias => self.q_bias = Some(data),
            Part::K => self.k = data,
            Part::KBias => self.k_bias = Some(data),
            Part::V => self.v = data,
            Part::VBias => self.v_bias = Some(data),
            Part::O => self.o = data,
            Part::QNorm => self.q_norm = Some(data),
            Part::KNorm => self.k_norm = Some(data),
            Part::MlpNorm => self.mlp_norm = data,
            Part::Gate => self.gate = data,
            Part::Up => self.up = data,
            Part::Down => self.down = data,
        }
    }
}

impl ModelWeights {
    /// No tensor yet, room for `layers` blocks.
    pub(crate) fn empty(layers: usize) -> Self {
        Self {
            layers: vec![LayerWeights::default(); layers],
            ..Self::default()
        }
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&Vec<f32>> {
        match slot {
            Slot::Embed => Some(&self.embed),
            Slot::Layer(layer, part) => self
                .layers
                .get(layer)
                .and_then(|weights| weights.part(part)),
            Slot::Norm => Some(&self.norm),
            Slot::LmHead => self.lm_head.as_ref(),
        }
    }

    pub(crate) fn set(&mut self, slot: Slot, data: Vec<f32>) {
        match slot {
            Slot::Embed => self.embed = data,
            Slot::Layer(layer, part) => self.layers[layer].set(part, data),
            Slot::Norm => self.norm = data,
            Slot::LmHead => self.lm_head = Some(data),
        }
    }

    /// Puts a matrix in its place, in whatever format it is.
    pub(crate) fn keep(&mut self, slot: Slot, weight: Weight) {
        match weight {
            Weight::F32(values) => self.set(slot, values),
            weight => {
                self.kept.insert(slot, weight);
            }
        }
    }

    /// Takes a matrix out, so that no second copy of it outlives its packing.
    pub(crate) fn take(&mut self, slot: Slot) -> Option<Weight> {
        if let Some(kept) = self.kept.remove(&slot) {
            return Some(kept);
        }
        let values = match slot {
            Slot::Embed => std::mem::take(&mut self.embed),
            Slot::Layer(layer, part) => self.layers.get_mut(layer)?.take(part)?,
            Slot::Norm => std::mem::take(&mut self.norm),
            Slot::LmHead => self.lm_head.take()?,
        };
        Some(Weight::F32(values))
    }

    /// Numbers of a tensor, whatever its format.
    fn len(&self, slot: Slot) -> Option<usize> {
        match self.kept.get(&slot) {
            Some(kept) => Some(kept.len()),
            None => self.get(slot).map(Vec::len),
        }
    }

    /// The f32 tensors of a model of `config` in canonical order: Hugging Face's name, shape, values.
    pub fn tensors<'a>(
        &'a self,
        config: &'a ModelConfig,
    ) -> impl Iterator<Item = (String, Vec<usize>, &'a [f32])> + 'a {
        Slot::all(config)
            .into_iter()
            .filter_map(|slot| Some((slot.hf(), slot.shape(config), self.get(slot)?.as_slice())))
    }

    /// Checks that every tensor of `config` is there with its size, and none besides.
    ///
    /// # Errors
    /// [`ModelError::Weights`] with every finding.
    pub fn check(&self, config: &ModelConfig, file: &str) -> Result<(), ModelError> {
        let mut findings = Vec::new();
        if self.layers.len() != config.layers {
            findings.push(format!(
                "{} blocks, the configuration has {}",
                self.layers.len(),
                config.layers
            ));
        }
        for slot in Slot::all(config) {
            let shape = slot.shape(config);
            let expected: usize = shape.iter().product();
            match self.len(slot) {
                Some(found) if found == expected => {}
                found => findings.push(format!(
                    "{}: {} values, {shape:?} has {expected}",
                    slot.hf(),
                    found.unwrap_or(0)
                )),
            }
        }
        if findings.is_empty() {
            Ok(())
        } else {
            Err(ModelError::Weights {
                file: file.to_owned(),
                findings,
            })
        }
    }

    /// The digest of weights that are all f32; see [`BaseDigest`].
    pub fn digest(&self, config: &ModelConfig) -> String {
        let mut digest = BaseDigest::new();
        for (name, shape, values) in self.tensors(config) {
            digest.add(&name, &shape, values);
        }
        digest.finish()
    }
}

/// SHA-256, in hex, over every tensor in canonical order: the name's length and bytes, the number of dimensions, the dimensions
/// (u64, little endian), the values as f32 little endian. Equal for a GGUF and a Hugging Face directory of equal weights, whatever
/// type the file stored them in and whatever format they run in, because it is taken after widening to f32 and before any rounding.
pub(crate) struct BaseDigest(Sha256);

impl BaseDigest {
    pub(crate) fn new() -> Self {
        let mut hash = Sha256::new();
        hash.update(b"espalier-base-v1\0");
        BaseDigest(hash)
    }

    /// The next tensor in canonical order.
    pub(crate) fn add(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let hash = &mut self.0;
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name.as_bytes());
        hash.update((shape.len() as u64).to_le_bytes());
        for dimension in shape {
            hash.update((*dimension as u64).to_le_bytes());
        }
        update(hash, values);
    }

    pub(crate) fn finish(self) -> String {
        hex::encode(self.0.finalize())
    }
}

/// The digest of bare values, to compare two tensors without holding both.
pub(crate) fn values_digest(values: &[f32]) -> [u8; 32] {
    let mut hash = Sha256::new();
    update(&mut hash, values);
    hash.finalize().into()
}

fn update(hash: &mut Sha256, values: &[f32]) {
    let mut bytes = Vec::with_capacity(4 << 14);
    for chunk in values.chunks(1 << 14) {
        bytes.clear();
        bytes.extend(chunk.iter().flat_map(|value| value.to_le_bytes()));
        hash.update(&bytes);
    }
}
