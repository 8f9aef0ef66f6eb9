//! `synthetic:NAME`: a model in the shape of a known one, with random weights that are never written down. Speed and memory can be
//! measured with it where no checkpoint is at hand; what it says means nothing.
//!
//! It must not know where the weights go: a host writes the numbers down, a device makes them where they stay.

use espalier_adapters::ops::{Uniform, Weight, WeightKind};
use espalier_adapters::text::Tokenizer;
use sha2::{Digest, Sha256};

use super::config::{Family, ModelConfig, RopeConfig, RopeScaling};
use super::dtype::Dtype;
use super::error::ModelError;
use super::load::LoadedModel;
use super::tiny::tokenizer_metadata;
use super::weights::{ModelWeights, Part, Slot};

/// Names and sizes: layers, hidden, intermediate, heads, key heads, head size, vocabulary, tied embedding.
const SHAPES: [(&str, [usize; 7], bool); 5] = [
    ("tiny-2l", [2, 64, 160, 4, 2, 16, 512], true),
    ("smollm2-135m", [30, 576, 1536, 9, 3, 64, 49_152], true),
    ("llama-3.2-1b", [16, 2048, 8192, 32, 8, 64, 128_256], true),
    ("llama-3.2-3b", [28, 3072, 8192, 24, 8, 128, 128_256], true),
    (
        "llama-3.1-8b",
        [32, 4096, 14_336, 32, 8, 128, 128_256],
        false,
    ),
];

/// Positions that it takes: as many as measurements ask for, less than the real ones do.
const CONTEXT: usize = 32_768;

/// The seed of the first matrix.
const SEED: u64 = 0xe5_0a_11_e5;

pub(super) fn load(spec: &str, name: &str, dtype: Dtype) -> Result<LoadedModel, ModelError> {
    let Some((name, sizes, tied)) = SHAPES.iter().find(|(known, ..)| *known == name) else {
        let known: Vec<&str> = SHAPES.iter().map(|(name, ..)| *name).collect();
        return Err(ModelError::Spec {
            spec: spec.to_owned(),
            rule: format!("is no known shape: {}", known.join(", ")),
        });
    };
    let metadata = tokenizer_metadata(spec);
    let tokenizer = Tokenizer::from_gguf(&metadata).map_err(|source| ModelError::Text {
        file: spec.to_owned(),
        source,
    })?;
    let config = config(sizes, *tied);
    config.validate(spec)?;
    Ok(LoadedModel {
        name: format!("synthetic-{name}"),
        weights: weights(&config, dtype),
        config,
        dtype,
        single_precision: true,
        tokenizer: tokenizer.into(),
        template: None,
        digest: hex::encode(Sha256::digest(format!("espalier-synthetic-v1 {name}"))),
        // It goes on until it is stopped: what it says ends nowhere.
        stop_ids: Vec::new(),
    })
}

fn config(sizes: &[usize; 7], tie_embeddings: bool) -> ModelConfig {
    let [
        layers,
        hidden,
        intermediate,
        heads,
        kv_heads,
        head_dim,
        vocab,
    ] = *sizes;
    ModelConfig {
        family: Family::Llama,
        layers,
        hidden,
        intermediate,
        heads,
        kv_heads,
        head_dim,
        vocab,
        rms_eps: 1e-5,
        rope: RopeConfig {
            theta: 500_000.0,
            scaling: RopeScaling::None,
        },
        context_length: CONTEXT,
        tie_embeddings,
        qkv_bias: false,
        qk_norm: false,
        sliding_window: None,
    }
}

/// Matrices whose rows keep the size of what they multiply; norms of one.
fn weights(config: &ModelConfig, dtype: Dtype) -> ModelWeights {
    let mut weights = ModelWeights::empty(config.layers);
    for (number, slot) in Slot::all(config).into_iter().enumerate() {
        let shape = slot.shape(config);
        let len = shape.iter().product();
        match slot {
            Slot::Norm | Slot::Layer(_, Part::AttnNorm | Part::MlpNorm) => {
                weights.set(slot, vec![1.0; len]);
            }
            _ => {
                let inputs = shape[1];
                let uniform = Weight::Uniform(Uniform {
                    kind: WeightKind::F32,
                    len,
                    seed: SEED + ((number as u64) << 40),
                    bound: (3.0 / inputs as f32).sqrt(),
                });
                weights.keep(slot, dtype.keep(uniform, inputs));
            }
        }
    }
    weights
}
