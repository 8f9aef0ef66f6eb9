//! Small models of every family, written in both file formats for the tests of the loaders.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has failed"
)]

mod refused;
mod same;

use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value as CandleValue};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use espalier_adapters::gguf::{Array, Gguf, Metadata, Value};
use espalier_adapters::text::Tokenizer;
use rand::{Rng as _, SeedableRng as _};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use tempfile::TempDir;

use super::config::{Family, ModelConfig, RopeConfig, RopeScaling};
use super::dtype::Dtype as Kept;
use super::error::ModelError;
use super::load::{LoadedModel, load};
use super::load_gguf::load_open;
use super::tiny;
use super::weights::{ModelWeights, Part, Slot};

/// A small model of a family; sizes are all different, so that a transposed matrix cannot pass.
fn config(family: Family, tied: bool) -> ModelConfig {
    ModelConfig {
        family,
        layers: 2,
        hidden: 24,
        intermediate: 40,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        vocab: 300,
        rms_eps: 1e-5,
        rope: RopeConfig {
            theta: 50_000.0,
            scaling: RopeScaling::None,
        },
        context_length: 128,
        tie_embeddings: tied,
        qkv_bias: family == Family::Qwen2,
        qk_norm: family == Family::Qwen3,
        sliding_window: (family == Family::Mistral).then_some(16),
    }
}

fn random_weights(config: &ModelConfig) -> ModelWeights {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(11);
    let mut weights = ModelWeights::empty(config.layers);
    for slot in Slot::all(config) {
        let count: usize = slot.shape(config).iter().product();
        weights.set(
            slot,
            (0..count).map(|_| random.random::<f32>() - 0.5).collect(),
        );
    }
    weights
}

/// llama.cpp's interleaving, from its description: row `2j + s` of a head is row `s * half + j` of Hugging Face's.
fn permuted(values: &[f32], head_dim: usize, width: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let mut out = Vec::new();
    for head in values.chunks_exact(head_dim * width) {
        for j in 0..half {
            for s in 0..2 {
                let row = s * half + j;
                out.extend_from_slice(&head[row * width..(row + 1) * width]);
            }
        }
    }
    out
}

fn candle_value(value: &Value) -> CandleValue {
    match value {
        Value::Unsigned(v) => CandleValue::U32(*v as u32),
        Value::Signed(v) => CandleValue::I64(*v),
        Value::Float(v) => CandleValue::F32(*v as f32),
        Value::Bool(v) => CandleValue::Bool(*v),
        Value::String(v) => CandleValue::String(v.clone()),
        Value::Array(Array::Strings(v)) => {
            CandleValue::Array(v.iter().cloned().map(CandleValue::String).collect())
        }
        Value::Array(Array::Ints(v)) => {
            CandleValue::Array(v.iter().map(|v| CandleValue::I32(*v as i32)).collect())
        }
        Value::Array(Array::Floats(v)) => {
            CandleValue::Array(v.iter().map(|v| CandleValue::F32(*v)).collect())
        }
        Value::Array(Array::Bytes(v)) => {
            CandleValue::Array(v.iter().map(|v| CandleValue::U8(*v)).collect())
        }
    }
}

const TOKENIZER_KEYS: [&str; 9] = [
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.chat_template",
];

fn gguf_keys(config: &ModelConfig, tokenizer: &Metadata) -> Vec<(String, CandleValue)> {
    let arch = if config.family == Family::Mistral {
        "llama"
    } else {
        config.family.as_str()
    };
    let size =
        |name: &str, value: usize| (format!("{arch}.{name}"), CandleValue::U32(value as u32));
    let mut keys = vec![
        (
            "general.architecture".to_owned(),
            CandleValue::String(arch.to_owned()),
        ),
        size("block_count", config.layers),
        size("embedding_length", config.hidden),
        size("feed_forward_length", config.intermediate),
        size("attention.head_count", config.heads),
        size("attention.head_count_kv", config.kv_heads),
        size("attention.key_length", config.head_dim),
        size("rope.dimension_count", config.head_dim),
        size("context_length", config.context_length),
        (
            format!("{arch}.rope.freq_base"),
            CandleValue::F32(config.rope.theta),
        ),
        (
            format!("{arch}.attention.layer_norm_rms_epsilon"),
            CandleValue::F32(config.rms_eps),
        ),
        (
            "tokenizer.ggml.eot_token_id".to_owned(),
            CandleValue::U32(0),
        ),
    ];
    keys.extend(
        config
            .sliding_window
            .map(|window| size("attention.sliding_window", window)),
    );
    keys.extend(
        TOKENIZER_KEYS.map(|key| (key.to_owned(), candle_value(tokenizer.get(key).unwrap()))),
    );
    keys
}

fn gguf_bytes(config: &ModelConfig, weights: &ModelWeights) -> Vec<u8> {
    let interleave = matches!(config.family, Family::Llama | Family::Mistral);
    let tensors: Vec<(String, QTensor)> = Slot::all(config)
        .into_iter()
        .map(|slot| {
            let values = weights.get(slot).unwrap();
            let rows = matches!(slot, Slot::Layer(_, Part::Q | Part::K));
            let values = if interleave && rows {
                permuted(values, config.head_dim, config.hidden)
            } else {
                values.clone()
            };
            let tensor = Tensor::from_vec(values, slot.shape(config), &Device::Cpu).unwrap();
            (
                slot.gguf(),
                QTensor::quantize(&tensor, GgmlDType::F32).unwrap(),
            )
        })
        .collect();
    write_gguf(
        &gguf_keys(config, &tiny::tokenizer_metadata("test")),
        &tensors,
    )
}

fn write_gguf(keys: &[(String, CandleValue)], tensors: &[(String, QTensor)]) -> Vec<u8> {
    let keys: Vec<_> = keys
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let mut out = Cursor::new(Vec::new());
    gguf_file::write(&mut out, &keys, &tensors).unwrap();
    out.into_inner()
}

fn read_gguf(bytes: &[u8]) -> Result<LoadedModel, ModelError> {
    load_open(
        Gguf::read("test.gguf", Cursor::new(bytes))?,
        "test".to_owned(),
        Kept::F32,
    )
}

fn hf_json(config: &ModelConfig) -> serde_json::Value {
    let class = match config.family {
        Family::Llama => "LlamaForCausalLM",
        Family::Mistral => "MistralForCausalLM",
        Family::Qwen2 => "Qwen2ForCausalLM",
        Family::Qwen3 => "Qwen3ForCausalLM",
    };
    json!({
        "model_type": config.family.as_str(), "architectures": [class], "hidden_act": "silu",
        "hidden_size": config.hidden, "intermediate_size": config.intermediate, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocab, "rms_norm_eps": config.rms_eps, "max_position_embeddings": config.context_length,
        "rope_theta": config.rope.theta, "tie_word_embeddings": config.tie_embeddings,
        "sliding_window": config.sliding_window, "eos_token_id": 2,
    })
}

type RawTensor = (Dtype, Vec<usize>, Vec<u8>);

fn raw_tensors(config: &ModelConfig, weights: &ModelWeights) -> BTreeMap<String, RawTensor> {
    let tensors = weights.tensors(config);
    tensors
        .map(|(name, shape, values)| {
            (
                name,
                (
                    Dtype::F32,
                    shape,
                    values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                ),
            )
        })
        .collect()
}

fn safetensors_bytes<'a>(
    tensors: impl IntoIterator<Item = (&'a String, &'a RawTensor)>,
) -> Vec<u8> {
    let views = tensors.into_iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let views: HashMap<&String, TensorView<'_>> = views.collect();
    safetensors::serialize(views, None).unwrap()
}

/// A directory with everything but the weights.
fn hf_directory(config: &serde_json::Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    let metadata = tiny::tokenizer_metadata("test");
    write("config.json", config.to_string().as_bytes());
    write(
        "generation_config.json",
        json!({"eos_token_id": [2, 0]}).to_string().as_bytes(),
    );
    write(
        "tokenizer.json",
        Tokenizer::from_gguf(&metadata)
            .unwrap()
            .to_json()
            .unwrap()
            .as_bytes(),
    );
    let tokens = json!({"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": "wrong"});
    write("tokenizer_config.json", tokens.to_string().as_bytes());
    write(
        "chat_template.jinja",
        metadata
            .text("tokenizer.chat_template")
            .unwrap()
            .unwrap()
            .as_bytes(),
    );
    dir
}

fn hf_single(config: &serde_json::Value, tensors: &BTreeMap<String, RawTensor>) -> TempDir {
    let dir = hf_directory(config);
    std::fs::write(
        dir.path().join("model.safetensors"),
        safetensors_bytes(tensors),
    )
    .unwrap();
    dir
}

/// Two files and an index.
fn hf_sharded(config: &serde_json::Value, tensors: &BTreeMap<String, RawTensor>) -> TempDir {
    let dir = hf_directory(config);
    let mut map = serde_json::Map::new();
    for shard in 0..2 {
        let file = format!("model-{shard}.safetensors");
        let part: Vec<_> = tensors
            .iter()
            .enumerate()
            .filter(|(i, _)| i % 2 == shard)
            .map(|(_, tensor)| tensor)
            .collect();
        map.extend(part.iter().map(|(name, _)| ((*name).clone(), json!(file))));
        std::fs::write(dir.path().join(&file), safetensors_bytes(part)).unwrap();
    }
    std::fs::write(
        dir.path().join("model.safetensors.index.json"),
        json!({"weight_map": map}).to_string(),
    )
    .unwrap();
    dir
}

fn load_dir(dir: &Path) -> Result<LoadedModel, ModelError> {
    load(dir.to_str().unwrap())
}
