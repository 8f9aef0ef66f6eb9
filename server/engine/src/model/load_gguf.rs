//! A GGUF file as a base model: which metadata keys and tensors there must be, and Llama's rows put back in order.

use std::io::{Read, Seek};
use std::path::Path;

use espalier_adapters::gguf::{Gguf, Metadata, half_of_pair};
use espalier_adapters::ops::Weight;
use espalier_adapters::text::Tokenizer;

use super::config::{Family, ModelConfig, RopeConfig, RopeScaling};
use super::dtype::Dtype;
use super::error::ModelError;
use super::load::{self, LoadedModel, Parts, ReadWeights};
use super::weights::{Part, Slot};

const ROPE_FACTORS: &str = "rope_freqs.weight";
const DEFAULT_THETA: f32 = 10_000.0;

pub(super) fn load(path: &Path, dtype: Dtype) -> Result<LoadedModel, ModelError> {
    let gguf = Gguf::open(path)?;
    load_open(gguf, load::name_of(path, true), dtype)
}

pub(super) fn load_open<R: Read + Seek>(
    mut gguf: Gguf<R>,
    name: String,
    dtype: Dtype,
) -> Result<LoadedModel, ModelError> {
    let file = gguf.metadata().file().to_owned();
    let mut config = read_config(&gguf)?;
    if gguf.tensors().contains_key(ROPE_FACTORS) {
        config.rope.scaling = RopeScaling::Factors(gguf.dequantize(ROPE_FACTORS)?);
    }
    config.validate(&file)?;
    let text = |source| ModelError::Text {
        file: file.clone(),
        source,
    };
    let tokenizer = Tokenizer::from_gguf(gguf.metadata()).map_err(text)?;
    let jinja = gguf
        .metadata()
        .text("tokenizer.chat_template")?
        .map(str::to_owned);
    let stop_ids = stop_ids(gguf.metadata())?;
    let read = read_weights(&mut gguf, &mut config, dtype, &file)?;
    load::finish(Parts {
        file,
        name,
        config,
        read,
        tokenizer,
        jinja,
        stop_ids,
    })
}

/// Keys of `gguf-py/gguf/constants.py` of llama.cpp.
fn read_config<R: Read + Seek>(gguf: &Gguf<R>) -> Result<ModelConfig, ModelError> {
    let metadata = gguf.metadata();
    let key = "general.architecture";
    let family = match metadata.required(key, metadata.text(key))? {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        other => {
            let rule = format!(
                "is {other:?}; llama (which includes Mistral and SmolLM2), qwen2 and qwen3 are supported"
            );
            return Err(metadata.error(key, rule).into());
        }
    };
    refuse_parts(metadata, family)?;
    let key = |name: &str| format!("{}.{name}", family.as_str());
    let size = |name: &str| -> Result<Option<usize>, ModelError> { Ok(metadata.size(&key(name))?) };
    let required = |name: &str| -> Result<usize, ModelError> {
        Ok(metadata.required(&key(name), metadata.size(&key(name)))?)
    };
    let (hidden, heads) = (
        required("embedding_length")?,
        required("attention.head_count")?,
    );
    let head_dim = size("attention.key_length")?.unwrap_or(hidden / heads.max(1));
    for name in ["attention.value_length", "rope.dimension_count"] {
        if let Some(found) = size(name)?.filter(|found| *found != head_dim) {
            return Err(metadata
                .error(
                    &key(name),
                    format!("is {found}, it must be the head size {head_dim}"),
                )
                .into());
        }
    }
    let embedding = gguf.tensors().get(&Slot::Embed.gguf());
    let epsilon = key("attention.layer_norm_rms_epsilon");
    Ok(ModelConfig {
        family,
        layers: required("block_count")?,
        hidden,
        intermediate: required("feed_forward_length")?,
        heads,
        kv_heads: size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        vocab: embedding
            .and_then(|info| info.shape.first().copied())
            .unwrap_or(0),
        rms_eps: metadata.required(&epsilon, metadata.float(&epsilon))?,
        rope: RopeConfig {
            theta: metadata
                .float(&key("rope.freq_base"))?
                .unwrap_or(DEFAULT_THETA),
            scaling: scaling(metadata, family)?,
        },
        context_length: required("context_length")?,
        tie_embeddings: !gguf.tensors().contains_key(&Slot::LmHead.gguf()),
        qkv_bias: family == Family::Qwen2
            || gguf
                .tensors()
                .contains_key(&Slot::Layer(0, Part::QBias).gguf()),
        qk_norm: family == Family::Qwen3,
        sliding_window: size("attention.sliding_window")?.filter(|window| *window > 0),
    })
}

/// Refuses what the decoder has no block for, and files that are only a part of a model.
fn refuse_parts(metadata: &Metadata, family: Family) -> Result<(), ModelError> {
    let experts = format!("{}.expert_count", family.as_str());
    if let Some(count) = metadata.size(&experts)?.filter(|count| *count > 0) {
        return Err(metadata
            .error(
                &experts,
                format!("is {count}; mixtures of experts are not supported"),
            )
            .into());
    }
    if let Some(count) = metadata.size("split.count")?.filter(|count| *count > 1) {
        let rule = format!("is {count}; join the parts with gguf-split --merge first");
        return Err(metadata.error("split.count", rule).into());
    }
    if let Some(kind) = metadata
        .text("general.type")?
        .filter(|kind| *kind != "model")
    {
        return Err(metadata
            .error("general.type", format!("is {kind:?}, it must be \"model\""))
            .into());
    }
    Ok(())
}

fn scaling(metadata: &Metadata, family: Family) -> Result<RopeScaling, ModelError> {
    let key = |name: &str| format!("{}.rope.scaling.{name}", family.as_str());
    let kind = metadata.text(&key("type"))?;
    let factor = metadata.float(&key("factor"))?;
    match (kind, factor) {
        (None | Some("none"), _) => Ok(RopeScaling::None),
        (Some("linear"), Some(factor)) => Ok(RopeScaling::Linear { factor }),
        (Some("linear"), None) => Err(metadata
            .error(&key("factor"), "is missing for linear scaling")
            .into()),
        (Some(other), _) => Err(metadata
            .error(
                &key("type"),
                format!("is {other:?}; none and linear are supported"),
            )
            .into()),
    }
}

fn stop_ids(metadata: &Metadata) -> Result<Vec<u32>, ModelError> {
    let mut ids = Vec::new();
    for name in ["eos", "eot", "eom"] {
        let key = format!("tokenizer.ggml.{name}_token_id");
        // -1 is how some writers say that there is none.
        let none = matches!(
            metadata.get(&key),
            Some(espalier_adapters::gguf::Value::Signed(-1))
        );
        if let Some(id) = if none { None } else { metadata.size(&key)? } {
            let id = u32::try_from(id)
                .map_err(|_| metadata.error(&key, format!("is {id}, no token id")))?;
            ids.push(id);
        }
    }
    Ok(ids)
}

fn read_weights<R: Read + Seek>(
    gguf: &mut Gguf<R>,
    config: &mut ModelConfig,
    dtype: Dtype,
    file: &str,
) -> Result<ReadWeights, ModelError> {
    let slots = Slot::all(config);
    let mut findings = Vec::new();
    let mut wanted: std::collections::HashSet<String> =
        slots.iter().map(|slot| slot.gguf()).collect();
    wanted.insert(ROPE_FACTORS.to_owned());
    findings.extend(
        gguf.tensors()
            .keys()
            .filter(|name| !wanted.contains(*name))
            .map(|name| {
                format!(
                    "{name}: a {} model has no such tensor",
                    config.family.as_str()
                )
            }),
    );
    for slot in &slots {
        let (name, shape) = (slot.gguf(), slot.shape(config));
        match gguf.tensors().get(&name) {
            None => findings.push(format!("{name}: is missing")),
            Some(info) if info.shape != shape => {
                findings.push(format!(
                    "{name}: has shape {:?}, it must be {shape:?}",
                    info.shape
                ));
            }
            Some(_) => {}
        }
    }
    let refuse = |findings: Vec<String>| {
        Err(ModelError::Weights {
            file: file.to_owned(),
            findings,
        })
    };
    if !findings.is_empty() {
        return refuse(findings);
    }
    let mut read = ReadWeights::new(config, dtype, &slots);
    for slot in slots {
        let name = slot.gguf();
        let info = gguf.tensors().get(&name);
        read.single_precision &=
            info.is_none_or(|info| info.shape.len() == 1 || info.kind.is_f32());
        let mut weight = gguf.weight(&name)?;
        if config.family.paired_in_gguf() {
            weight = unpermuted(slot, config, weight);
        }
        findings.extend(read.add(config, slot, &name, weight).err());
    }
    if findings.is_empty() {
        Ok(read)
    } else {
        refuse(findings)
    }
}

/// llama.cpp's converter interleaves the two halves of every head of q and k (`LlamaModel.permute`: reshape to
/// `[heads, 2, head_dim / 2, in]` and swap the middle axes) because its rope turns neighbours; ours turns halves, as Hugging Face's.
/// Rows change places whole, so blocks stay what they are. Adapters go the other way (`gguf::write_lora`).
fn unpermuted(slot: Slot, config: &ModelConfig, weight: Weight) -> Weight {
    let width = match slot {
        Slot::Layer(_, Part::Q | Part::K) => config.hidden,
        Slot::Layer(_, Part::QBias | Part::KBias) => 1,
        _ => return weight,
    };
    weight.reordered(width, |row| half_of_pair(row, config.head_dim))
}
